package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A server is one replica of a service, in one process after the other.
type server struct {
	config replicaConfig
	name   string

	mu     sync.Mutex // guards what follows
	cmd    *exec.Cmd
	url    string // "" while there is no process
	starts int
	stderr tail
}

// startServer starts a server process that ends with the test.
func startServer(t *testing.T, config replicaConfig) *server {
	s := &server{config: config, name: config.Name}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() && testing.Verbose() {
			t.Logf("%s wrote\n%s", s.name, s.stderr.String())
		}
	})
	require.NoError(t, s.start())
	return s
}

// start starts a process.
func (s *server) start() error {
	s.mu.Lock()
	s.starts++
	config := s.config
	config.Name = fmt.Sprintf("%s.%d", s.name, s.starts)
	s.mu.Unlock()
	cmd, url, err := launch(config, &s.stderr)
	if err != nil {
		return fmt.Errorf("%s does not serve: %w\n%s", config.Name, err, s.stderr.String())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.config, s.cmd, s.url = config, cmd, url
	return nil
}

// launch returns a process when it serves, and its address.
func launch(config replicaConfig, stderr io.Writer) (cmd *exec.Cmd, url string, err error) {
	text, err := json.Marshal(config)
	must(err)
	binary, err := os.Executable()
	must(err)
	cmd = exec.Command(binary)
	cmd.Env = replicaEnviron(text)
	cmd.Stderr = stderr
	if _, err = cmd.StdinPipe(); err != nil { // ends with us
		return nil, "", err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, "", err
	}
	return cmd, "http://" + strings.TrimPrefix(strings.TrimSpace(line), "serving on "), nil
}

// deploy starts another process, and has the one before finish what it does.
// Until the other one serves, clients are sent to the one before.
func (s *server) deploy() error {
	s.mu.Lock()
	old := s.cmd
	s.mu.Unlock()
	if err := s.start(); err != nil {
		return err
	}
	if err := old.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return old.Wait()
}

// address returns "" while there is no process.
func (s *server) address() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.url
}

// current returns the process and its address.
func (s *server) current() (process, address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.config.Name, s.url
}

// kill ends the process, even one that is stopped, without a chance to finish
// anything. It returns the name of the process.
func (s *server) kill() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.url = ""
	if s.cmd != nil && s.cmd.Process != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	}
	return s.config.Name
}

// stopFor stops the process for d, or until ctx ends.
func (s *server) stopFor(ctx context.Context, d time.Duration) {
	s.mu.Lock()
	process := s.cmd.Process
	s.mu.Unlock()
	stopFor(ctx, process, d)
}

// A tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

const tailLength = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b.Write(p)
	if t.b.Len() > 2*tailLength {
		t.b.Next(t.b.Len() - tailLength)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}
