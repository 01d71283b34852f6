//go:build unix

package idemtest

import (
	"os"
	"os/exec"
	"syscall"
)

// Stop stops a process until Continue, or its end.
func Stop(p *os.Process) error { return p.Signal(syscall.SIGSTOP) }

// Continue lets a process go on that was stopped.
func Continue(p *os.Process) error { return p.Signal(syscall.SIGCONT) }

// nobody is a user and a group without rights.
const nobody = 65534

// demote has a program run as nobody.
func demote(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

// quit sends SIGQUIT.
func quit(p *os.Process) error { return p.Signal(syscall.SIGQUIT) }
