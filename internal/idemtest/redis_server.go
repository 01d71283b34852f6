package idemtest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// Patience is how long the Redis tests wait for what must happen.
const Patience = 20 * time.Second

// A RedisServer is a redis-server of the test's own. What StartRedis does not
// start, as a Sentinel, is started with Start.
type RedisServer struct {
	T    testing.TB
	Addr string
	Args []string // the program first
	Log  string   // a file

	cmd    *exec.Cmd
	exited chan struct{}
}

// StartRedis starts a redis-server without persistence on a free port of the
// loopback interface. It stops with the test.
func StartRedis(t testing.TB, args ...string) *RedisServer {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("REDIS_REQUIRED") == "1" {
		t.Fatal("REDIS_REQUIRED=1, but there is no redis-server on the PATH")
	}
	if err != nil {
		t.Skip("no redis-server on the PATH")
	}
	s := &RedisServer{T: t}
	dir := t.TempDir()
	s.Log = filepath.Join(dir, "log")
	for try := range 5 { // somebody else may take the port
		port := FreePort(t)
		s.Addr = "127.0.0.1:" + port
		s.Args = append([]string{binary, "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--logfile", s.Log,
			"--save", "", "--appendonly", "no"}, args...)
		if s.Start() {
			break
		}
		require.Less(t, try, 4, "redis-server does not start")
	}
	t.Cleanup(s.Kill)
	return s
}

// FreePort returns a port of the loopback interface that was free just now.
func FreePort(t testing.TB) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = listener.Close() }()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	return port
}

// Start starts the process. It is false if that does not answer.
func (s *RedisServer) Start() bool {
	s.cmd = exec.Command(s.Args[0], s.Args[1:]...)
	require.NoError(s.T, s.cmd.Start())
	exited := make(chan struct{})
	s.exited = exited
	go func(cmd *exec.Cmd) { _ = cmd.Wait(); close(exited) }(s.cmd)
	client := redis.NewClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer func() { _ = client.Close() }()
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); {
		if client.Ping(context.Background()).Err() == nil {
			return true
		}
		select {
		case <-exited:
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	s.Kill()
	log, _ := os.ReadFile(s.Log)
	s.T.Logf("redis-server does not answer\n%s", log)
	return false
}

// Kill ends the process, even one that is stopped, without a chance to save
// anything.
func (s *RedisServer) Kill() {
	_ = s.cmd.Process.Kill()
	<-s.exited
}

// Process is the process that was started last.
func (s *RedisServer) Process() *os.Process { return s.cmd.Process }

// Restart starts it anew on the same port and directory.
func (s *RedisServer) Restart() { require.True(s.T, s.Start(), "redis-server does not start again") }

// Await waits until something is so, which the failure calls what.
func Await(t testing.TB, what string, so func() bool) {
	t.Helper()
	require.Eventually(t, so, Patience, time.Millisecond, what)
}

// DialRedis returns a client as the documentation recommends it.
func DialRedis(t testing.TB, addr string, change ...func(*redis.Options)) *redis.Client {
	opts := &redis.Options{Addr: addr, ContextTimeoutEnabled: true}
	for _, c := range change {
		c(opts)
	}
	client := redis.NewClient(opts)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// AwaitReplicas waits until a primary has n replicas that acknowledge writes. One
// that is online may not get any yet.
func AwaitReplicas(t *testing.T, primary redis.UniversalClient, n int) {
	t.Helper()
	Await(t, "replicas", func() bool {
		pipe := primary.Pipeline()
		pipe.Set(t.Context(), "written", "", 0)
		replicas := pipe.Do(t.Context(), "wait", n, 50)
		_, err := pipe.Exec(t.Context())
		return err == nil && replicas.Val() == int64(n)
	})
}

// CommandsSent returns how many commands clients have sent for more than
// setting up a connection, by Redis's own count. That has the commands of
// scripts too, and every script of a RedisStore begins with a GET, which
// nobody else sends.
func CommandsSent(t testing.TB, admin redis.UniversalClient) (sent int64, calls map[string]int64) {
	calls = make(map[string]int64)
	for line := range strings.Lines(admin.Info(t.Context(), "commandstats").Val()) {
		name, stat, found := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":calls=")
		if !found {
			continue
		}
		number, _, _ := strings.Cut(stat, ",")
		n, err := strconv.ParseInt(number, 10, 64)
		require.NoError(t, err)
		calls[name] = n
	}
	require.LessOrEqual(t, calls["get"], calls["eval"]+calls["evalsha"], "%v", calls)
	for name, n := range calls {
		switch name {
		case "get", "pttl", "pexpire", "setrange", "publish": // in scripts
		case "hello", "auth", "client|setinfo", "client|maint_notifications": // of new connections
		case "config|resetstat", "info": // ours
		default:
			sent += n
		}
	}
	return sent, calls
}
