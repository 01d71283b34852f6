//go:build !linux

package benchmarks

import "time"

var threadStart = time.Now()

// threadTime is about the processor time of the calling thread.
func threadTime() time.Duration { return time.Since(threadStart) }

// processTime is about the processor time of all threads.
func processTime() time.Duration { return time.Since(threadStart) }
