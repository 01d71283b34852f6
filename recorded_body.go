package idempotency

import "sync"

// recordedBody is a body in chunks: a small one that is pooled, which most
// bodies fit into, then larger ones, which a MemoryStore keeps as they are.
// Growing one buffer by doubling costs five times as much at 1 MiB.
type recordedBody struct {
	chunks [][]byte
	first  [1][]byte // backing of chunks for a small body
	size   int64

	// mayBeInUse: a Write of a chunk has failed. net/http's HTTP/2 returns from one
	// while a frame of it may still be on its way, so it is not used again.
	mayBeInUse bool
}

const (
	smallChunk = 4 << 10
	largeChunk = 32 << 10
)

var smallChunks = sync.Pool{New: func() any { return new([smallChunk]byte) }}

func appendBody[T []byte | string](b *recordedBody, p T) {
	if b.chunks == nil {
		b.first[0] = smallChunks.Get().(*[smallChunk]byte)[:0]
		b.chunks = b.first[:]
	}
	last := &b.chunks[len(b.chunks)-1]
	n := min(len(p), cap(*last)-len(*last))
	*last = append(*last, p[:n]...)
	b.size += int64(n)
	if p = p[n:]; len(p) == 0 {
		return
	}
	// No more than the half of what is kept in the end is left empty.
	if size := int(min(b.size, largeChunk)); len(p) < size {
		b.chunks = append(b.chunks, append(make([]byte, 0, size), p...))
	} else {
		b.chunks = append(b.chunks, append([]byte(nil), p...))
	}
	b.size += int64(len(p))
}

// free gives the small chunk back.
func (b *recordedBody) free() {
	if b.chunks != nil && !b.mayBeInUse {
		smallChunks.Put((*[smallChunk]byte)(b.chunks[0][:smallChunk]))
	}
	*b = recordedBody{}
}
