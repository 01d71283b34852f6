package idempotency

import (
	"bytes"
	"slices"
	"sync"
)

// sharedBodies let the requests under one key hold one copy of a large body.
// Duplicates have the same bytes, and each needs them until its answer is
// known: the handler of a duplicate reads the body if the execution that it
// waits for dies. Without sharing, a hundred duplicates of 1 MiB would hold
// 112 MiB.
//
// The zero value is ready for use. It is safe for concurrent use.
type sharedBodies struct {
	mu    sync.Mutex             // guards what follows
	byKey map[string]*sharedBody // by store key; made with the first
}

// A sharedBody is the buffer of one request body, which is not written to any
// more.
type sharedBody struct {
	bodies       *sharedBodies
	storeKey     string
	buffer       *[]byte // as in requestBody
	identityLen  int
	participants int // guarded by bodies.mu; the last to leave drops the body
}

// join makes b share the buffer of the requests under storeKey that came before
// it, if the bytes are the same, and else leaves it alone. A buffer that the
// pool may take back is not shared. The bytes are compared, because a custom
// Fingerprint gives one fingerprint to several bodies.
func (s *sharedBodies) join(storeKey string, b *requestBody) {
	if len(*b.buffer) <= maxPooledBuffer {
		return
	}
	s.mu.Lock()
	shared := s.byKey[storeKey]
	if shared == nil {
		if s.byKey == nil {
			s.byKey = make(map[string]*sharedBody)
		}
		shared = &sharedBody{bodies: s, storeKey: storeKey, buffer: b.buffer, identityLen: len(b.identity)}
		s.byKey[storeKey] = shared
	}
	shared.participants++
	s.mu.Unlock()

	b.shared = shared
	if len(b.identity) == shared.identityLen && bytes.Equal(*b.buffer, *shared.buffer) {
		b.use(shared.buffer)
		return
	}
	b.leave()
}

// leave ends the use of a shared body by b. b keeps its buffer.
func (b *requestBody) leave() {
	if b.shared == nil {
		return
	}
	bodies := b.shared.bodies
	bodies.mu.Lock()
	defer bodies.mu.Unlock()
	b.shared.participants--
	if b.shared.participants == 0 {
		delete(bodies.byKey, b.shared.storeKey)
	}
	b.shared = nil
}

// scratch returns a buffer to write to, for a request that has no more use for
// its body. It is that of the body, unless other requests may read from it.
func (b *requestBody) scratch() *[]byte {
	if b.shared != nil {
		return new([]byte)
	}
	return b.buffer
}

// shrink gives back what the buffer has beyond the bytes in it. A pooled buffer
// may have room for 64 KiB and hold a hundred bytes, which is too much to keep
// for seconds.
func (b *requestBody) shrink() {
	if b.shared != nil {
		return
	}
	exact, pooled := slices.Clone(*b.buffer), b.buffer
	b.use(&exact)
	if cap(*pooled) <= maxPooledBuffer {
		buffers.Put(pooled)
	}
}

// use replaces the buffer by another one with the same bytes.
func (b *requestBody) use(buffer *[]byte) {
	n := len(b.identity)
	b.buffer, b.identity, b.ahead = buffer, (*buffer)[:n], (*buffer)[n:]
}
