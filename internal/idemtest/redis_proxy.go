package idemtest

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A RedisCommand is what a client sent, its name in lower case.
type RedisCommand []string

// Is reports whether it is one of these.
func (c RedisCommand) Is(names ...string) bool { return slices.Contains(names, c[0]) }

// Writes returns the state of the cell that the command is to write: C for a
// claim or a renewal, D for Complete, R for Release; 0 if it is none of these.
func (c RedisCommand) Writes() byte {
	switch {
	case c.Is("set"):
		return c[2][1]
	case c.Is("eval", "evalsha") && len(c) > 4 && len(c[4]) > 1:
		return c[4][1]
	}
	return 0
}

// A Verdict is what a RedisProxy does with a command.
type Verdict int

// What a RedisProxy does with a command.
const (
	Pass        Verdict = iota
	Slow                // Redis gets it a little later
	SlowReply           // its reply comes a little later
	Ignore              // Redis does not get it, the connection goes on
	Swallow             // Redis gets it, and the reply is lost
	CutBefore           // Redis does not get it, the connection breaks
	CutAfter            // Redis gets it, the connection breaks instead of a reply
	KeepForLate         // the connection breaks, and Redis gets it with Deliver
)

// A RedisProxy stands between clients and a Redis, counts what it forwards, and
// does to commands what a network may do.
type RedisProxy struct {
	t      *testing.T
	target string
	listen net.Listener

	mu     sync.Mutex // guards what follows
	judge  func(RedisCommand) Verdict
	seen   []RedisCommand
	late   [][]byte
	conns  map[net.Conn]struct{}
	closed bool
}

// StartProxy starts a RedisProxy that ends with the test.
func StartProxy(t *testing.T, target string) *RedisProxy {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &RedisProxy{t: t, target: target, listen: listener, conns: make(map[net.Conn]struct{})}
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
		p.Cut()
		serving.Wait()
	})
	return p
}

// Addr returns where clients connect to.
func (p *RedisProxy) Addr() string { return p.listen.Addr().String() }

// Set has commands judged from now on. nil lets all pass.
func (p *RedisProxy) Set(judge func(RedisCommand) Verdict) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.judge = judge
}

// Once gives the next command that matches a verdict, and lets all others pass.
// The channel is closed when that has happened.
func (p *RedisProxy) Once(v Verdict, matches func(RedisCommand) bool) <-chan struct{} {
	happened, done := make(chan struct{}), false
	p.Set(func(c RedisCommand) Verdict { // under the lock of the proxy
		if done || !matches(c) {
			return Pass
		}
		done = true
		close(happened)
		return v
	})
	return happened
}

// Cut breaks all connections.
func (p *RedisProxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		_ = conn.Close()
	}
}

// Commands returns the commands so far, without those that set a connection up.
func (p *RedisProxy) Commands() (list []RedisCommand) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.seen {
		if !c.Is("hello", "client") {
			list = append(list, c)
		}
	}
	return list
}

// Count returns how many of the commands so far have one of the names.
func (p *RedisProxy) Count(names ...string) (n int) {
	for _, c := range p.Commands() {
		if c.Is(names...) {
			n++
		}
	}
	return n
}

// Forget starts counting anew.
func (p *RedisProxy) Forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = nil
}

// Deliver sends Redis what was kept, and waits for the replies.
func (p *RedisProxy) Deliver() {
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
	require.NoError(p.t, conn.SetReadDeadline(time.Now().Add(Patience)))
	for {
		line, err := replies.ReadString('\n')
		require.NoError(p.t, err)
		if line == "delivered\r\n" {
			return
		}
	}
}

// track is false when the proxy is closed.
func (p *RedisProxy) track(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[conn] = struct{}{}
	return !p.closed
}

func (p *RedisProxy) untrack(conn net.Conn) {
	_ = conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, conn)
}

func (p *RedisProxy) verdict(c RedisCommand, raw []byte) Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = append(p.seen, c)
	if p.judge == nil {
		return Pass
	}
	v := p.judge(c)
	if v == KeepForLate {
		p.late = append(p.late, raw)
	}
	return v
}

func (p *RedisProxy) serve(client net.Conn) {
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

	var replies proxyReplies
	replied := make(chan struct{})
	go func() {
		defer func() { _ = client.Close(); _ = server.Close() }()
		replies.pass(server, client, sync.OnceFunc(func() { close(replied) }))
	}()
	p.passCommands(client, server, &replies, replied)
}

// passCommands passes commands on to the server until one is not to go there.
func (p *RedisProxy) passCommands(client, server net.Conn, replies *proxyReplies, replied <-chan struct{}) {
	commands := bufio.NewReader(client)
	for {
		command, raw, err := readCommand(commands)
		if err != nil {
			return
		}
		v := p.verdict(command, raw)
		switch v {
		case CutBefore, KeepForLate:
			return
		case Ignore:
			continue
		case Slow:
			<-time.After(20 * time.Millisecond)
		case SlowReply:
			replies.late.Store(true)
		case Swallow, CutAfter:
			replies.mute.Store(true)
		}
		if _, err := server.Write(raw); err != nil {
			return
		}
		if v == CutAfter {
			<-replied
			return
		}
	}
}

// proxyReplies says what becomes of the replies to a client.
type proxyReplies struct{ mute, late atomic.Bool }

// pass passes replies on to the client until one is not to go there. It calls
// told at the first byte of that one, which shows that Redis has done what it
// was told, and at the latest when it returns.
func (r *proxyReplies) pass(server, client net.Conn, told func()) {
	defer told()
	b := make([]byte, 32<<10)
	for {
		n, err := server.Read(b)
		if err != nil {
			return
		}
		if r.late.CompareAndSwap(true, false) {
			<-time.After(20 * time.Millisecond)
		}
		if r.mute.Load() {
			told()
		} else if _, err := client.Write(b[:n]); err != nil {
			return
		}
	}
}

// readCommand returns a command and its bytes.
func readCommand(r *bufio.Reader) (command RedisCommand, raw []byte, err error) {
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
