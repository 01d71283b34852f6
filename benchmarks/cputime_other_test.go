//go:build !linux

package benchmarks

import "time"

var threadStart = time.Now()

// threadTime is about the processor time of the calling thread.
func threadTime() time.Duration { return time.Since(threadStart) }
