//go:build unix

package idemtest

import (
	"os"
	"syscall"
)

// Stop stops a process until Continue, or its end.
func Stop(p *os.Process) error { return p.Signal(syscall.SIGSTOP) }

// Continue lets a process go on that was stopped.
func Continue(p *os.Process) error { return p.Signal(syscall.SIGCONT) }
