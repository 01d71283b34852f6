//go:build !unix

package idemtest

import (
	"errors"
	"os"
	"os/exec"
)

// Stop is not possible on this system.
func Stop(*os.Process) error { return errors.ErrUnsupported }

// Continue is not possible on this system.
func Continue(*os.Process) error { return errors.ErrUnsupported }

// nobody is no user of this system.
const nobody = -1

func demote(*exec.Cmd) {}

// quit is not possible on this system, so the process is killed.
func quit(p *os.Process) error { return p.Kill() }
