package idempotency_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

// patience is how long the Redis tests wait for what must happen.
const patience = 20 * time.Second

// redisServer is a redis-server of the test's own.
type redisServer struct {
	t      testing.TB
	addr   string
	args   []string
	cmd    *exec.Cmd
	exited chan struct{}
	log    string
}

// startRedis starts a redis-server without persistence on a free port of the
// loopback interface. It stops with the test.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("REDIS_REQUIRED") == "1" {
		t.Fatal("REDIS_REQUIRED=1, but there is no redis-server on the PATH")
	}
	if err != nil {
		t.Skip("no redis-server on the PATH")
	}
	s := &redisServer{t: t}
	dir := t.TempDir()
	s.log = filepath.Join(dir, "log")
	for try := range 5 { // somebody else may take the port
		port := freePort(t)
		s.addr = "127.0.0.1:" + port
		s.args = append([]string{binary, "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--logfile", s.log,
			"--save", "", "--appendonly", "no"}, args...)
		if s.start() {
			break
		}
		require.Less(t, try, 4, "redis-server does not start")
	}
	t.Cleanup(s.kill)
	return s
}

func freePort(t testing.TB) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = listener.Close() }()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	return port
}

// start is false if the process ended at once.
func (s *redisServer) start() bool {
	s.cmd = exec.Command(s.args[0], s.args[1:]...)
	require.NoError(s.t, s.cmd.Start())
	exited := make(chan struct{})
	s.exited = exited
	go func(cmd *exec.Cmd) { _ = cmd.Wait(); close(exited) }(s.cmd)
	client := redis.NewClient(&redis.Options{Addr: s.addr, MaxRetries: -1})
	defer func() { _ = client.Close() }()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if client.Ping(context.Background()).Err() == nil {
			return true
		}
		select {
		case <-exited:
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	log, _ := os.ReadFile(s.log)
	s.t.Fatalf("redis-server does not answer\n%s", log)
	return false
}

// kill ends the process without a chance to save anything.
func (s *redisServer) kill() {
	_ = s.cmd.Process.Kill()
	<-s.exited
}

// restart starts it anew on the same port and directory.
func (s *redisServer) restart() { require.True(s.t, s.start(), "redis-server does not start again") }

// await waits until something is so.
func await(t testing.TB, what string, so func() bool) {
	t.Helper()
	require.Eventually(t, so, patience, time.Millisecond, what)
}

// newClient returns a client as the documentation recommends it.
func newClient(t testing.TB, addr string, change ...func(*redis.Options)) *redis.Client {
	opts := &redis.Options{Addr: addr, ContextTimeoutEnabled: true}
	for _, c := range change {
		c(opts)
	}
	client := redis.NewClient(opts)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// eachRedis runs a test on miniredis, and on a redis-server where there is one.
func eachRedis(t *testing.T, test func(t *testing.T, addr string)) {
	t.Run("miniredis", func(t *testing.T) { test(t, miniredis.RunT(t).Addr()) })
	t.Run("redis-server", func(t *testing.T) { test(t, startRedis(t).addr) })
}

// A miniStore has the clock of its miniredis.
type miniStore struct {
	*idempotency.RedisStore
	mini *miniredis.Miniredis
}

func (s miniStore) Advance(d time.Duration) { s.mini.FastForward(d) }

func newMiniStore(t *testing.T, opts *idempotency.RedisOptions) miniStore {
	mini := miniredis.RunT(t)
	return miniStore{idempotency.NewRedisStore(newClient(t, mini.Addr()), opts), mini}
}

// A redisCommand is what a client sent, its name in lower case.
type redisCommand []string

// is reports whether it is one of these.
func (c redisCommand) is(names ...string) bool { return slices.Contains(names, c[0]) }

// writes returns the state of the cell that the command is to write: C for a
// claim or a renewal, D for Complete, R for Release; 0 if it is none of these.
func (c redisCommand) writes() byte {
	switch {
	case c.is("set"):
		return c[2][1]
	case c.is("eval", "evalsha") && len(c) > 4 && len(c[4]) > 1:
		return c[4][1]
	}
	return 0
}

// A verdict is what a redisProxy does with a command.
type verdict int

const (
	pass        verdict = iota
	slow                // Redis gets it a little later
	slowReply           // its reply comes a little later
	ignore              // Redis does not get it, the connection goes on
	swallow             // Redis gets it, and the reply is lost
	cutBefore           // Redis does not get it, the connection breaks
	cutAfter            // Redis gets it, the connection breaks instead of a reply
	keepForLate         // the connection breaks, and Redis gets it with deliver
)

// A redisProxy stands between clients and a Redis, counts what it forwards, and
// does to commands what a network may do.
type redisProxy struct {
	t      *testing.T
	target string
	listen net.Listener

	mu     sync.Mutex // guards what follows
	judge  func(redisCommand) verdict
	seen   []redisCommand
	late   [][]byte
	conns  map[net.Conn]struct{}
	closed bool
}

func startProxy(t *testing.T, target string) *redisProxy {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &redisProxy{t: t, target: target, listen: listener, conns: make(map[net.Conn]struct{})}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { p.serve(conn) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		p.cut()
		serving.Wait()
	})
	return p
}

func (p *redisProxy) addr() string { return p.listen.Addr().String() }

// set has commands judged from now on. nil lets all pass.
func (p *redisProxy) set(judge func(redisCommand) verdict) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.judge = judge
}

// once gives the next command that matches a verdict, and lets all others pass.
// The channel is closed when that has happened.
func (p *redisProxy) once(v verdict, matches func(redisCommand) bool) <-chan struct{} {
	happened, done := make(chan struct{}), false
	p.set(func(c redisCommand) verdict { // under the lock of the proxy
		if done || !matches(c) {
			return pass
		}
		done = true
		close(happened)
		return v
	})
	return happened
}

// cut breaks all connections.
func (p *redisProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		_ = conn.Close()
	}
}

// commands returns the commands so far, without those that set a connection up.
func (p *redisProxy) commands() (list []redisCommand) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.seen {
		if !c.is("hello", "client") {
			list = append(list, c)
		}
	}
	return list
}

// count returns how many of the commands so far have one of the names.
func (p *redisProxy) count(names ...string) (n int) {
	for _, c := range p.commands() {
		if c.is(names...) {
			n++
		}
	}
	return n
}

// forget starts counting anew.
func (p *redisProxy) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = nil
}

// deliver sends Redis what was kept, and waits for the replies.
func (p *redisProxy) deliver() {
	p.mu.Lock()
	late := p.late
	p.late = nil
	p.mu.Unlock()
	require.NotEmpty(p.t, late, "nothing was kept")
	conn, err := net.Dial("tcp", p.target)
	require.NoError(p.t, err)
	defer func() { _ = conn.Close() }()
	replies := bufio.NewReader(conn)
	for _, command := range append(late, []byte("*2\r\n$4\r\nECHO\r\n$9\r\ndelivered\r\n")) {
		_, err = conn.Write(command)
		require.NoError(p.t, err)
	}
	require.NoError(p.t, conn.SetReadDeadline(time.Now().Add(patience)))
	for {
		line, err := replies.ReadString('\n')
		require.NoError(p.t, err)
		if line == "delivered\r\n" {
			return
		}
	}
}

// track is false when the proxy is closed.
func (p *redisProxy) track(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[conn] = struct{}{}
	return !p.closed
}

func (p *redisProxy) untrack(conn net.Conn) {
	_ = conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, conn)
}

func (p *redisProxy) verdict(c redisCommand, raw []byte) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, c)
	if p.judge == nil {
		return pass
	}
	v := p.judge(c)
	if v == keepForLate {
		p.late = append(p.late, raw)
	}
	return v
}

func (p *redisProxy) serve(client net.Conn) {
	defer p.untrack(client)
	if !p.track(client) {
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer p.untrack(server)
	p.track(server)

	// Replies go to the client until one is not to. Its first byte tells that
	// Redis has done what it was told.
	var mute, late atomic.Bool
	replied := make(chan struct{})
	go func() {
		defer func() { _ = client.Close(); _ = server.Close() }()
		told := sync.OnceFunc(func() { close(replied) })
		defer told()
		b := make([]byte, 32<<10)
		for {
			n, err := server.Read(b)
			if err != nil {
				return
			}
			if late.CompareAndSwap(true, false) {
				<-time.After(20 * time.Millisecond)
			}
			if mute.Load() {
				told()
			} else if _, err := client.Write(b[:n]); err != nil {
				return
			}
		}
	}()

	commands := bufio.NewReader(client)
	for {
		command, raw, err := readCommand(commands)
		if err != nil {
			return
		}
		v := p.verdict(command, raw)
		switch v {
		case cutBefore, keepForLate:
			return
		case ignore:
			continue
		case slow:
			<-time.After(20 * time.Millisecond)
		case slowReply:
			late.Store(true)
		case swallow, cutAfter:
			mute.Store(true)
		}
		if _, err := server.Write(raw); err != nil {
			return
		}
		if v == cutAfter {
			<-replied
			return
		}
	}
}

// readCommand returns a command and its bytes.
func readCommand(r *bufio.Reader) (command redisCommand, raw []byte, err error) {
	number := func(kind byte) (n int) {
		line, e := r.ReadBytes('\n')
		raw = append(raw, line...)
		if e == nil && (len(line) < 4 || line[0] != kind) {
			e = fmt.Errorf("want %c: %q", kind, line)
		}
		if e == nil {
			n, e = strconv.Atoi(string(bytes.TrimSpace(line[1:])))
		}
		if err == nil {
			err = e
		}
		return n
	}
	n := number('*')
	for range n {
		b := make([]byte, number('$')+2)
		if err != nil {
			return nil, nil, err
		}
		if _, err = io.ReadFull(r, b); err != nil {
			return nil, nil, err
		}
		raw = append(raw, b...)
		command = append(command, string(b[:len(b)-2]))
	}
	if err == nil && len(command) == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		command[0] = strings.ToLower(command[0])
	}
	return command, raw, err
}
