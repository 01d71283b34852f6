package idempotency

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"net/http"
	"slices"
	"sync"
)

// maxPooledBuffer is the capacity up to which a buffer is used again. A larger
// one would pin the memory of one large request for good.
const maxPooledBuffer = 64 << 10

// buffers are those of request bodies.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// requestBody is the body as the middleware and the handler read it. The
// identity, and after it all or the beginning of the body, lie in one pooled
// buffer, so that the fingerprint takes one hash over one slice.
type requestBody struct {
	buffer   *[]byte       // the pooled slice that identity and ahead lie in
	identity []byte        // what the fingerprint covers before the body
	boundary string        // does not count in the body; empty if all bytes do
	ahead    []byte        // what was read of the body before the key was claimed
	whole    bool          // ahead is the whole body
	shared   *sharedBody   // of a large buffer that duplicates may share; nil if none
	request  *http.Request // the client's, whose body is read
	copy     *http.Request // the handler's

	mu      sync.Mutex
	started bool     // reading has begun: the client was told to continue
	off     int      // how many bytes of ahead the handler has read
	read    int64    // how many bytes the handler has read in all
	hash    bodyHash // of identity and what the handler has read; nil if whole
	eof     bool     // the handler has seen the end
	broken  bool     // the handler has seen the body break off
	closed  bool
}

// A bodyHash hashes a body as it is read.
type bodyHash interface {
	io.Writer

	// sum returns the hash of the identity and what was written: all of the
	// body, or its beginning.
	sum(whole bool) []byte

	// extent returns how much of the body sum covers.
	extent() int64

	// undecided reports whether extent may become less with the next byte,
	// because what was written ends in what may be a boundary.
	undecided() bool
}

// A plainHash is the bodyHash of a body of which all bytes count.
type plainHash struct {
	hash hash.Hash
	size int64
}

func (h *plainHash) Write(p []byte) (int, error) {
	h.size += int64(len(p))
	return h.hash.Write(p)
}

func (h *plainHash) sum(bool) []byte { return h.hash.Sum(nil) }
func (h *plainHash) extent() int64   { return h.size }
func (h *plainHash) undecided() bool { return false }

// newHash returns the hash of a body of which nothing was read yet.
func (b *requestBody) newHash() bodyHash {
	if b.boundary != "" {
		return newFormHash(b.identity, b.boundary)
	}
	h := sha256.New()
	h.Write(b.identity)
	return &plainHash{hash: h}
}

// boundaryRoom is how many bytes of boundaries in a form do not count for the
// limit of what is read ahead: those of 900 parts at least. Without it, a form
// of about that limit would be a large one or not, depending on the length of
// the boundary that a client picked for this try.
const boundaryRoom = 64 << 10

// readAhead reads the body up to limit bytes, and boundaryRoom more of a form.
// identity must lie in *b.buffer. A body that declares more is left alone: it is
// streamed in any case, and a client that waits for 100 Continue is not asked
// to send before the handler wants the body.
func (b *requestBody) readAhead(r *http.Request, identity []byte, limit int64) error {
	b.request = r
	most := limit
	if b.boundary != "" {
		most += boundaryRoom
	}
	buf := identity
	defer func() {
		*b.buffer = buf
		b.identity, b.ahead = buf[:len(identity)], buf[len(identity):]
	}()
	if r.Body == nil || r.Body == http.NoBody {
		b.whole = true
		return nil
	}
	if r.ContentLength > most {
		return nil
	}
	b.started = true
	// The spare byte lets the end arrive together with the last byte before it.
	declared := int64(len(identity)) + max(r.ContentLength, 0) + 1
	buf = slices.Grow(buf, max(0, int(min(declared, maxPooledBuffer))-len(buf)))
	for int64(len(buf)-len(identity)) <= most {
		if len(buf) == cap(buf) {
			buf = b.grow(buf, declared)
		}
		space := min(int64(cap(buf)-len(buf)), most+1-int64(len(buf)-len(identity)))
		n, err := r.Body.Read(buf[len(buf) : len(buf)+int(space)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			// There is space for one byte over the limit. A body that fills it is
			// large, whether its end has come with that byte or comes later.
			size := int64(len(buf) - len(identity))
			b.whole = size <= limit || size <= most && b.extentOf(buf[len(identity):]) <= limit
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// grow returns a larger buffer with the bytes of full, which is full. A
// declared length is not trusted with memory before some of the bytes have
// come: a client has the server allocate at most 32 times what it has sent. So
// a declared body of 1 MiB is copied once, after 64 KiB. Doubling would
// allocate two such bodies for it.
func (b *requestBody) grow(full []byte, declared int64) []byte {
	size := 2 * int64(len(full))
	if declared > int64(len(full)) {
		size = min(declared, 32*int64(len(full)))
	}
	larger := append(make([]byte, 0, size), full...)
	if cap(full) <= maxPooledBuffer {
		*b.buffer = full
		buffers.Put(b.buffer)
		b.buffer = new([]byte)
	}
	return larger
}

// unused returns the space of the buffer behind what was read ahead, as an empty
// slice.
func (b *requestBody) unused() []byte {
	used := len(b.identity) + len(b.ahead)
	return (*b.buffer)[used:used]
}

// prepend puts the identity before a body that was read ahead for Options.Key,
// when the identity was not known yet.
func (b *requestBody) prepend(identity []byte) {
	buf := slices.Insert((*b.buffer)[:len(b.ahead)], 0, identity...)
	*b.buffer = buf
	b.identity, b.ahead = buf[:len(identity)], buf[len(identity):]
}

// restore gives back to r what was read ahead of its body, for a request that
// passes through. It changes r itself, as http.MaxBytesReader is used to: a copy
// would hide from outer middleware, and from the server, what they find in r
// afterwards: trailers, a parsed form with its files, r.Pattern, and the part of
// the body that the handler left.
//
// The buffer goes with the body: a goroutine that the handler leaves behind may
// still read from it.
func (b *requestBody) restore(r *http.Request) {
	if len(b.ahead) == 0 {
		return
	}
	r.Body = &restoredBody{rest: r.Body, ahead: b.ahead}
	b.buffer, b.ahead = nil, nil
}

// A restoredBody is a body of which the beginning was read before. As the body
// of net/http, it may be closed while another goroutine reads it.
type restoredBody struct {
	rest io.ReadCloser

	mu    sync.Mutex // guards ahead
	ahead []byte
}

// Read implements io.Reader.
func (b *restoredBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	if len(b.ahead) > 0 {
		defer b.mu.Unlock()
		n := copy(p, b.ahead)
		b.ahead = b.ahead[n:]
		return n, nil
	}
	b.mu.Unlock()
	return b.rest.Read(p)
}

// Close implements io.Closer.
func (b *restoredBody) Close() error {
	b.mu.Lock()
	b.ahead = nil
	b.mu.Unlock()
	return b.rest.Close()
}

// extentOf returns how many bytes of a body count.
func (b *requestBody) extentOf(body []byte) int64 {
	h := b.newHash()
	_, _ = h.Write(body) // a hash never fails
	return h.extent()
}

// fingerprint returns what tells the request apart. When the body was read
// whole, it covers all of the request. Otherwise it covers all but the body,
// whose digest is stored with the response. The letter keeps a large body from
// having the fingerprint of a small one.
func (b *requestBody) fingerprint() [sha256.Size]byte {
	if !b.whole {
		return sha256.Sum256(append([]byte{'l'}, b.identity...))
	}
	if b.boundary != "" {
		h := b.newHash()
		_, _ = h.Write(b.ahead)
		return [sha256.Size]byte(h.sum(true))
	}
	return sha256.Sum256((*b.buffer)[:len(b.identity)+len(b.ahead)])
}

// customFingerprint is fingerprint with print in the place of query,
// Content-Type and body.
func (b *requestBody) customFingerprint(print []byte) [sha256.Size]byte {
	return sha256.Sum256(append(slices.Clip(b.identity), print...))
}

// handOver makes the body that of the handler's copy of the request. A body
// that is not whole is hashed as it is read. An empty one becomes http.NoBody,
// which proxies and clients recognise.
func (b *requestBody) handOver(r *http.Request) {
	b.copy = r
	if b.whole && len(b.ahead) == 0 {
		r.Body = http.NoBody
		return
	}
	if !b.whole {
		b.hash = b.newHash()
	}
	r.Body = b
}

// Read implements io.Reader for the handler.
func (b *requestBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	if !b.closed && (b.whole || b.off < len(b.ahead)) {
		n := copy(p, b.ahead[b.off:])
		b.off += n
		var err error
		if n == 0 && len(p) > 0 {
			err = io.EOF
		}
		b.noteLocked(p[:n], err)
		b.mu.Unlock()
		return n, err
	}
	closed := b.closed
	b.mu.Unlock()
	if closed {
		return 0, http.ErrBodyReadAfterClose
	}

	// The client may take its time: reading under the lock would make the end
	// of the handler wait for a goroutine that the handler left behind.
	n, err := b.request.Body.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	b.noteLocked(p[:n], err)
	return n, err
}

// noteLocked notes what the handler has read, and how reading ended.
func (b *requestBody) noteLocked(p []byte, err error) {
	b.started = true
	b.read += int64(len(p))
	if b.hash != nil {
		_, _ = b.hash.Write(p)
	}
	switch {
	case errors.Is(err, io.EOF):
		b.eof = true
		// Undeclared trailers come with the end. Without trailers the copy is not
		// written to: the handler may look at its request while another
		// goroutine, such as the transport of a proxy, reads the body.
		if trailer := b.request.Trailer; trailer != nil && b.copy.Trailer == nil {
			b.copy.Trailer = trailer
		}
	case err != nil && !b.eof: // the server closes a body that was read whole
		var tooLarge *http.MaxBytesError
		b.broken = !errors.As(err, &tooLarge) // every retry meets the same limit
	}
}

// Close implements io.Closer for the handler. The server closes its own body.
func (b *requestBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

// hasStarted reports whether the client may be sending the body by now.
func (b *requestBody) hasStarted() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.started
}

// finish ends the handler's access. broken tells whether the handler met a body
// that broke off. digest is that of a body that was not whole: a hash over all
// of it, or, when the handler stopped before the end, over what it has read
// together with the extent of that.
func (b *requestBody) finish() (digest []byte, broken bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.hash == nil {
		return nil, b.broken
	}
	whole := b.eof || b.read == b.request.ContentLength
	digest = b.hash.sum(whole)
	if !whole {
		digest = binary.BigEndian.AppendUint64(digest, uint64(b.hash.extent()))
	}
	return digest, b.broken
}

// matches reads as much of the body as digest covers and reports whether it is
// the same. It is called for a body that is not whole and was not handed over.
func (b *requestBody) matches(digest []byte) (bool, error) {
	h := b.newHash()
	body := io.MultiReader(bytes.NewReader(b.ahead), b.request.Body)
	if len(digest) != sha256.Size+8 {
		b.started = true
		if _, err := io.Copy(h, body); err != nil {
			return false, err
		}
		return bytes.Equal(h.sum(true), digest), nil
	}
	sum, extent := digest[:sha256.Size], int64(binary.BigEndian.Uint64(digest[sha256.Size:]))
	for {
		missing := extent - h.extent()
		switch {
		case missing == 0 && bytes.Equal(h.sum(false), sum):
			return true, nil
		case missing <= 0 && !h.undecided():
			return false, nil
		}
		// In the middle of what may be a boundary, the next byte decides.
		b.started = true
		if _, err := io.CopyN(h, body, max(missing, 1)); errors.Is(err, io.EOF) {
			return false, nil // shorter than that
		} else if err != nil {
			return false, err
		}
	}
}

// free returns the buffer to its pool. The lock waits for a Read that copies
// from it; a later Read finds the body closed.
func (b *requestBody) free() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.leave()
	if buffer := b.buffer; buffer != nil {
		b.buffer, b.identity, b.ahead = nil, nil, nil
		if cap(*buffer) <= maxPooledBuffer {
			buffers.Put(buffer)
		}
	}
}
