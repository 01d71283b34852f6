package integration

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A redisServer is a redis-server that loses nothing when it is killed.
type redisServer struct {
	addr   string
	args   []string
	log    string
	cmd    *exec.Cmd
	exited chan struct{}
}

// startRedis starts a redis-server that ends with the test. It writes every
// command to disk before it answers, so that a restart is no excuse.
func startRedis(t *testing.T, args ...string) *redisServer {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("REDIS_REQUIRED") == "1" {
		t.Fatal("REDIS_REQUIRED=1, but there is no redis-server on the PATH")
	}
	if err != nil {
		t.Skip("no redis-server on the PATH")
	}
	dir := t.TempDir()
	s := &redisServer{log: filepath.Join(dir, "log")}
	for try := range 5 { // somebody else may take the port
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		s.addr = listener.Addr().String()
		require.NoError(t, listener.Close())
		_, port, err := net.SplitHostPort(s.addr)
		require.NoError(t, err)
		s.args = append([]string{binary, "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--logfile", s.log,
			"--save", "", "--appendonly", "yes", "--appendfsync", "always"}, args...)
		if s.start() {
			break
		}
		require.Less(t, try, 4, "redis-server does not start")
	}
	t.Cleanup(s.kill)
	return s
}

// start is false if the process does not answer.
func (s *redisServer) start() bool {
	s.cmd = exec.Command(s.args[0], s.args[1:]...)
	must(s.cmd.Start())
	exited := make(chan struct{})
	s.exited = exited
	go func(cmd *exec.Cmd) { _ = cmd.Wait(); close(exited) }(s.cmd)
	client := redis.NewClient(&redis.Options{Addr: s.addr, MaxRetries: -1, ContextTimeoutEnabled: true})
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for client.Ping(ctx).Err() != nil {
		select {
		case <-ctx.Done():
			return false
		case <-exited:
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return true
}

// kill ends the process, even one that is stopped, without a chance to save
// anything.
func (s *redisServer) kill() {
	_ = s.cmd.Process.Kill()
	<-s.exited
}

func (s *redisServer) signal(sig syscall.Signal) { _ = s.cmd.Process.Signal(sig) }
