package benchmarks

import "testing"

// A large request body costs what it takes to read it once into a buffer of its
// length and to hash it. The floor does that, and what it does for a small one.

func BenchmarkBody64KiB(b *testing.B)  { each(b, bodyContenders(), sending(64<<10)) }
func BenchmarkBody512KiB(b *testing.B) { each(b, bodyContenders(), sending(512<<10)) }
func BenchmarkBody1MiB(b *testing.B)   { each(b, bodyContenders(), sending(1<<20)) }

func bodyContenders() []contender {
	return []contender{{"floor", newMapFloor}, {"idempotency", inMemory}}
}

// sending replays requests with bodies of this size.
func sending(size int) func(*testing.B, contender) {
	return func(b *testing.B, c contender) {
		b.SetBytes(int64(size))
		replayOf(b, newUpload(size), smallBody, c)
	}
}

// newUpload returns a client whose requests have bodies of this size.
func newUpload(size int) *benchClient {
	client := newBenchClient(true)
	client.setBody(size)
	return client
}
