package idemtest

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// linkChunk is how many bytes a link reads at a time.
const linkChunk = 64 << 10

// StartLink returns an address whose connections reach the target with a
// latency: every byte arrives delay later, in both directions. The link has no
// limit of bandwidth. It ends with the test.
func StartLink(t testing.TB, target string, delay time.Duration) (addr string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var serving sync.WaitGroup
	ended := make(chan struct{})
	serving.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			cut := sync.OnceFunc(func() { _ = client.Close(); _ = server.Close() })
			gone := make(chan struct{})
			serving.Go(func() {
				select {
				case <-ended:
				case <-gone:
				}
				cut()
			})
			serving.Go(func() { defer close(gone); carry(server, client, delay) })
			serving.Go(func() { defer cut(); carry(client, server, delay) })
		}
	})
	t.Cleanup(func() {
		close(ended)
		_ = listener.Close()
		serving.Wait()
	})
	return listener.Addr().String()
}

// carry takes what comes from one connection to the other, delay later. It
// returns when one of them has broken.
func carry(to, from net.Conn, delay time.Duration) {
	type chunk struct {
		bytes []byte
		due   time.Time
	}
	way := make(chan chunk, 1024)
	broken := make(chan struct{})
	go func() {
		defer close(way)
		for {
			b := make([]byte, linkChunk)
			n, err := from.Read(b)
			if err != nil {
				return
			}
			select {
			case way <- chunk{b[:n:n], time.Now().Add(delay)}:
			case <-broken:
				return
			}
		}
	}()
	defer close(broken)
	for c := range way {
		time.Sleep(time.Until(c.due))
		if _, err := to.Write(c.bytes); err != nil {
			return
		}
	}
}
