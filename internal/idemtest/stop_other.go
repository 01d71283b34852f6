//go:build !unix

package idemtest

import (
	"errors"
	"os"
)

// Stop is not possible on this system.
func Stop(*os.Process) error { return errors.ErrUnsupported }

// Continue is not possible on this system.
func Continue(*os.Process) error { return errors.ErrUnsupported }
