package integration

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A linkMode is what a network does to a connection.
type linkMode string

const (
	linkUp     linkMode = "up"
	linkDown   linkMode = "down"   // connections break, and no new ones come about
	linkSlow   linkMode = "slow"   // everything comes later; what was given up by the client too
	linkMute   linkMode = "mute"   // commands get through, and instead of the reply the connection breaks
	linkHollow linkMode = "hollow" // nothing gets through, and nothing breaks
)

// A link is the way of one process to Redis.
type link struct {
	target   string
	listener net.Listener

	mu    sync.Mutex // guards what follows
	mode  linkMode
	delay time.Duration
	conns map[net.Conn]struct{}
}

func startLink(t *testing.T, target string) *link {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := &link{target: target, listener: listener, mode: linkUp, conns: make(map[net.Conn]struct{})}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go l.serve(conn)
		}
	}()
	t.Cleanup(func() {
		_ = listener.Close()
		l.set(linkDown, 0)
	})
	return l
}

func (l *link) addr() string { return l.listener.Addr().String() }

// set changes the mode of all connections. What was hollow breaks when it
// changes: bytes are missing.
func (l *link) set(mode linkMode, delay time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if mode == linkDown || l.mode == linkHollow {
		l.cutLocked()
	}
	l.mode, l.delay = mode, delay
}

// cut breaks all connections.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cutLocked()
}

func (l *link) cutLocked() {
	for conn := range l.conns {
		_ = conn.Close()
	}
}

func (l *link) current() (linkMode, time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode, l.delay
}

// track is false when connections break.
func (l *link) track(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[conn] = struct{}{}
	return l.mode != linkDown
}

func (l *link) untrack(conn net.Conn) {
	_ = conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, conn)
}

func (l *link) serve(client net.Conn) {
	defer l.untrack(client)
	if !l.track(client) {
		return
	}
	server, err := net.Dial("tcp", l.target)
	if err != nil {
		return
	}
	defer l.untrack(server)
	if !l.track(server) {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.forward(client, server, true)
		_ = client.Close()
	}()
	// Commands that are on their way arrive, though the client may be gone.
	l.forward(server, client, false)
	_ = server.(*net.TCPConn).CloseWrite()
	<-done
}

// forward copies until the source ends. Replies that nobody takes are read all
// the same.
func (l *link) forward(to, from net.Conn, replies bool) {
	b := make([]byte, 64<<10)
	gone := false
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		mode, delay := l.current()
		switch {
		case mode == linkSlow:
			<-time.After(delay)
		case mode == linkHollow:
			continue
		case mode == linkMute && replies:
			return
		}
		if gone {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			if !replies {
				return
			}
			gone = true
		}
	}
}
