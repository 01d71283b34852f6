//go:build unix

package postgres_test

import (
	"bytes"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A proxy stands between a pool and PostgreSQL, and can break a connection at
// its next COMMIT.
type proxy struct {
	addr   string
	target string

	mu     sync.Mutex // guards what follows
	armed  bool
	before bool
	during bool
	cut    bool
}

func startProxy(t *testing.T, target string) *proxy {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	p := &proxy{addr: listener.Addr().String(), target: target}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(client)
		}
	}()
	return p
}

// cutCommit breaks the connection of the next COMMIT: before PostgreSQL gets it,
// or after PostgreSQL has answered it.
func (p *proxy) cutCommit(before bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed, p.before, p.cut = true, before, false
}

// cutDuringCommit breaks the connection of the next COMMIT as soon as PostgreSQL
// has got it.
func (p *proxy) cutDuringCommit() {
	p.cutCommit(false)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.during = true
}

func (p *proxy) isDuring() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.during
}

func (p *proxy) hasCut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cut
}

// strikes reports whether a message is the COMMIT to break at, and how.
func (p *proxy) strikes(message []byte) (cut, before bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.armed || !bytes.Contains(bytes.ToLower(message), []byte("commit\x00")) {
		return false, false
	}
	p.armed, p.cut = false, true
	return true, p.before
}

func (p *proxy) serve(client net.Conn) {
	defer func() { _ = client.Close() }()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	var mute sync.Mutex // held by the side that may answer
	swallow := false
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		defer func() { _ = client.Close() }()
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			if err != nil {
				return
			}
			mute.Lock()
			lost := swallow
			mute.Unlock()
			if lost {
				return // PostgreSQL has answered the COMMIT
			}
			_, _ = client.Write(b[:n])
		}
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		cut, before := p.strikes(b[:n])
		if cut && before {
			return
		}
		if cut {
			mute.Lock()
			swallow = true
			mute.Unlock()
		}
		_, _ = server.Write(b[:n])
		if cut && p.isDuring() {
			_ = client.Close()
			<-answered // closing now could take the COMMIT back
			return
		}
	}
}
