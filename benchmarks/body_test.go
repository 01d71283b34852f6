package benchmarks

import (
	"crypto/sha256"
	"io"
	"net/http"
	"testing"
)

// A large request body costs what it takes to read it once into a buffer of its
// length and to hash it. The floor does that and nothing else.

func BenchmarkBody64KiB(b *testing.B)  { each(b, bodyContenders(), sending(64<<10)) }
func BenchmarkBody512KiB(b *testing.B) { each(b, bodyContenders(), sending(512<<10)) }
func BenchmarkBody1MiB(b *testing.B)   { each(b, bodyContenders(), sending(1<<20)) }

func bodyContenders() []contender {
	return []contender{{"floor", newBodyFloor}, {"idempotency", inMemory}}
}

// newBodyFloor runs next once, and then answers what it said to all bodies with
// the hash of the first.
func newBodyFloor(next http.Handler) http.Handler {
	var first [sha256.Size]byte
	replay := newMapFloor(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := make([]byte, r.ContentLength)
		if _, err := io.ReadFull(r.Body, body); err != nil {
			panic(err)
		}
		switch sum := sha256.Sum256(body); {
		case first == [sha256.Size]byte{}:
			first = sum
		case sum != first:
			panic("another body")
		}
		replay.ServeHTTP(w, r)
	})
}

// sending replays requests with bodies of this size.
func sending(size int) func(*testing.B, contender) {
	return func(b *testing.B, c contender) {
		client := newBenchClient(true)
		client.setBody(size)
		h := c.wrap(newCharge(smallBody))
		client.do(h, keyAt(0))
		b.SetBytes(int64(size))
		b.ReportAllocs()
		defer reportCPU(b, processTime())
		for b.Loop() {
			client.do(h, keyAt(0))
		}
		client.check(b, smallBody, true)
	}
}
