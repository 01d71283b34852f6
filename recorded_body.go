package idempotency

import "sync"

// A recordedBody is a body in chunks: a small one that is pooled, which most
// bodies fit into, then larger ones, which a MemoryStore keeps as they are.
// Growing one buffer by doubling costs five times as much at 1 MiB, since each
// step copies all that came before.
type recordedBody struct {
	chunks [][]byte
	first  [1][]byte // backing of chunks for a small body
	size   int64

	// mayBeInUse says that a Write of a chunk has failed. The HTTP/2 of
	// net/http returns from such a Write while a frame of the chunk may still
	// be on its way. The next response would then be written over it, so the
	// chunk is not used again.
	mayBeInUse bool
}

// Most responses of an API fit into smallChunk, 4 KiB. A largeChunk is what
// io.Copy writes at a time, 32 KiB.
const (
	smallChunk = 4 << 10
	largeChunk = 32 << 10
)

// smallChunks are the first chunks of finished responses. The larger ones are
// not pooled: a MemoryStore owns them.
var smallChunks = sync.Pool{New: func() any { return new([smallChunk]byte) }}

// appendBody appends p. It is generic, so that WriteString needs no copy of its
// string. It fills the last chunk before it makes another, and copies p: the
// handler may use its buffer again.
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
	// At most half of what a MemoryStore keeps is left empty: a chunk is no
	// larger than what came before it, or just as large as p.
	if size := int(min(b.size, largeChunk)); len(p) < size {
		b.chunks = append(b.chunks, append(make([]byte, 0, size), p...))
	} else {
		b.chunks = append(b.chunks, append([]byte(nil), p...))
	}
	b.size += int64(len(p))
}

// free returns the small chunk to its pool and forgets the others.
func (b *recordedBody) free() {
	if b.chunks != nil && !b.mayBeInUse {
		smallChunks.Put((*[smallChunk]byte)(b.chunks[0][:smallChunk]))
	}
	*b = recordedBody{}
}
