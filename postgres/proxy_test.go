//go:build unix

package postgres_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
)

// A proxy stands between a pool and PostgreSQL. It can break a connection at
// its next COMMIT, and can stop to pass anything on, without a word.
type proxy struct {
	addr   string
	target string

	mu    sync.Mutex // guards what follows
	armed cut
	done  bool // it has cut
	deaf  bool
}

// A cut is how a COMMIT fails.
type cut uint8

const (
	notCut       cut = iota
	cutBefore        // before PostgreSQL gets it
	cutDuring        // as soon as PostgreSQL has got it
	cutAfter         // after PostgreSQL has answered it
	cutWithError     // the client gets an error then, as from a pooler that has lost its server
)

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

// cutCommit breaks the connection of the next COMMIT.
func (p *proxy) cutCommit(how cut) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed, p.done = how, false
}

func (p *proxy) hasCut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// deafen keeps from all clients what PostgreSQL sends from now on.
func (p *proxy) deafen() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = true
}

func (p *proxy) isDeaf() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.deaf
}

// strikes reports whether a message is the COMMIT to break at, and how.
func (p *proxy) strikes(message []byte) cut {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.armed == notCut || !bytes.Contains(bytes.ToLower(message), []byte("commit\x00")) {
		return notCut
	}
	how := p.armed
	p.armed, p.done = notCut, true
	return how
}

func (p *proxy) serve(client net.Conn) {
	defer func() { _ = client.Close() }()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	var mute sync.Mutex // held by the side that may answer
	swallow := notCut
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
			swallow = notCut
			mute.Unlock()
			if lost == cutWithError {
				b, _ := (&pgproto3.ErrorResponse{Severity: "ERROR", Code: "08P01", Message: "server conn crashed?"}).Encode(nil)
				b, _ = (&pgproto3.ReadyForQuery{TxStatus: 'I'}).Encode(b)
				_, _ = client.Write(b)
				continue
			}
			if lost != notCut {
				return // PostgreSQL has answered the COMMIT
			}
			if !p.isDeaf() {
				_, _ = client.Write(b[:n])
			}
		}
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		if isCancelRequest(b[:n]) {
			return // pgx asks for one when a connection breaks, and it may come too late
		}
		how := p.strikes(b[:n])
		switch how {
		case cutBefore:
			return
		case cutAfter, cutWithError:
			mute.Lock()
			swallow = how
			mute.Unlock()
		}
		_, _ = server.Write(b[:n])
		if how == cutDuring {
			_ = client.Close()
			<-answered // closing now could take the COMMIT back
			return
		}
	}
}

// isCancelRequest reports whether a connection is there only to cancel what
// another one does.
func isCancelRequest(message []byte) bool {
	const code = 80877102 // of the protocol
	return len(message) == 16 && binary.BigEndian.Uint32(message[4:]) == code
}
