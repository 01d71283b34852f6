package idempotency

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// A request is one that has a key, or should have one, and what identifies it:
// the cell of its key, and the fingerprint that tells it apart from another
// request under the same key.
type request struct {
	*middleware
	r *http.Request // as the middleware got it

	key      string // the client's, unquoted
	scope    string
	storeKey string
	token    string          // names the request as an owner of the key
	text     strings.Builder // backing of storeKey, token and the header of a replay

	body        requestBody
	fingerprint []byte
	sum         [sha256.Size]byte // backing of fingerprint
}

// identify finds out which cell the request belongs to. The body is not read
// yet, so a request with an invalid key is refused before it costs memory.
func (q *request) identify(lines []string) *Error {
	if len(lines) == 0 && q.opts.RequireKey {
		return q.problem(ErrKeyMissing, nil)
	}
	key, detail := parseKey(lines)
	if detail == "" && q.opts.ValidateKey != nil {
		if err := q.opts.ValidateKey(key); err != nil {
			detail = err.Error()
		}
	}
	if detail != "" {
		err := q.problem(ErrKeyInvalid, nil)
		err.Detail = detail
		return err
	}
	q.key = key
	if q.opts.Scope != nil {
		q.scope = q.opts.Scope(q.r)
	}
	q.body.buffer = buffers.Get().(*[]byte)
	q.deriveStoreKey()
	return nil
}

const (
	// storeKeyBytes is the length of a store key: 160 bits in base64url.
	storeKeyBytes = 27

	// textBytes is enough for a store key, a token and the header of a usual
	// replay, so that all three share one allocation.
	textBytes = 224
)

// deriveStoreKey makes the store key, and the token in case that the key is
// free. One string holds both, as both are needed until the request ends.
func (q *request) deriveStoreKey() {
	path, _ := target(q.r)
	sum := hashKey((*q.body.buffer)[:0], q.scope, q.r.Method, path, q.key)
	token := newToken()
	var text [storeKeyBytes + tokenBytes]byte
	base64.RawURLEncoding.Encode(text[:storeKeyBytes], sum[:])
	base64.RawURLEncoding.Encode(text[storeKeyBytes:], token[:])
	q.text.Grow(textBytes)
	q.text.Write(text[:])
	both := q.text.String()
	q.storeKey, q.token = both[:storeKeyBytes], both[storeKeyBytes:]
}

// fingerprintBytes is the length of a fingerprint. 128 bits of the hash are
// enough. To be answered with the response of another client, an attacker needs
// a second preimage under a key that the attacker has to know. A client that
// looks for two bodies of its own with one fingerprint has to try 2^64, and
// gains its own response.
const fingerprintBytes = 16

// takeFingerprint reads the body, or the beginning of a large one, and makes
// the fingerprint. That comes before the claim: a client whose body breaks off,
// or never comes, must not hold a key.
func (q *request) takeFingerprint() *Error {
	custom := q.opts.Fingerprint != nil
	identity := appendIdentity((*q.body.buffer)[:0], q.r, q.scope, q.key, custom)
	if err := q.body.readAhead(q.r, identity, q.opts.MaxBufferedBody); err != nil {
		return q.bodyProblem(err)
	}
	switch {
	case !custom:
		q.sum = q.body.fingerprint()
	case q.body.whole:
		q.sum = q.body.customFingerprint(q.opts.Fingerprint(q.r, q.body.ahead))
	default:
		return q.problem(ErrBodyTooLarge, nil)
	}
	q.fingerprint = q.sum[:fingerprintBytes]
	return nil
}

// bodyProblem is the answer to a body that cannot be read. Every retry meets
// the limit of an outer http.MaxBytesReader again, so such a client gets 413
// and not a 400 that tells it to repeat the request.
func (q *request) bodyProblem(err error) *Error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return q.problem(ErrBodyTooLarge, err)
	}
	return q.problem(ErrBodyIncomplete, err)
}

// maxDrain is how many bytes drain reads of a body that the handler did not ask
// for. net/http reads up to 256 KiB on its own before it closes a connection.
const maxDrain = 1 << 20

// drain reads on, so that a client of HTTP/1 sees the answer and not a
// connection that is reset while it sends. HTTP/2 can end a stream without
// that. A client that waits for 100 Continue has sent nothing, and need not.
func (q *request) drain() {
	waits := !q.body.hasStarted() && q.r.Header.Get("Expect") != ""
	if q.r.Body == nil || q.body.whole || waits || q.r.ProtoMajor > 1 {
		return
	}
	_, _ = io.CopyN(io.Discard, q.r.Body, maxDrain)
}

// target returns the path and the query as the client sent them, so that
// http.StripPrefix does not fold two mounts into one.
func target(r *http.Request) (path, query string) {
	uri := r.RequestURI
	if uri == "" { // not from a server
		uri = r.URL.RequestURI()
	}
	if !strings.HasPrefix(uri, "/") {
		// The absolute form, RFC 9112 section 3.2.2, names the same resource.
		if _, rest, ok := strings.Cut(uri, "://"); ok {
			uri = "/"
			if i := strings.IndexAny(rest, "/?"); i >= 0 {
				uri = rest[i:]
			}
		}
	}
	path, query, _ = strings.Cut(uri, "?")
	return path, query
}

// appendField appends the length of s and s. Without the length, the fields
// "ab", "c" and "a", "bc" would have the same bytes, and two clients could
// share a cell.
func appendField[T []byte | string](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendFields appends the number of fields and each of them.
func appendFields(b []byte, list []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for _, s := range list {
		b = appendField(b, s)
	}
	return b
}

// hashKey returns what the store key is made of. No choice of a key reaches
// another cell, and no client's key can be read in the store. To reach the cell
// of another client takes a second preimage of 160 bits.
//
// The label is short so that a usual path and a UUID fit into one block of
// SHA-256, 55 bytes, which saves 60 ns.
func hashKey(scratch []byte, scope, method, path, key string) (sum [20]byte) {
	b := append(scratch, 'k')
	b = appendField(b, scope)
	b = appendField(b, method)
	b = appendField(b, path)
	b = appendField(b, key)
	full := sha256.Sum256(b)
	copy(sum[:], full[:])
	return sum
}

// appendIdentity appends all that tells two requests under one key apart, but
// for the body. The key itself is part of it, so that a reader of a leaked
// store cannot confirm guesses of short payloads. Credentials are part of it
// only where there is no scope: a scope says whose request it is, and
// credentials may change between two tries.
func appendIdentity(b []byte, r *http.Request, scope, key string, custom bool) []byte {
	b = append(b, 'f') // short, for a block of SHA-256 less: 50 ns
	b = appendField(b, key)
	if scope == "" {
		b = append(b, 'c')
		b = appendFields(b, r.Header["Authorization"])
		b = appendFields(b, r.Header["Cookie"])
	} else {
		b = append(b, 's')
	}
	if custom {
		return append(b, 'f')
	}
	b = append(b, 'b')
	_, query := target(r)
	b = appendField(b, query)
	b = appendFields(b, r.Header["Content-Type"])
	if r.PostForm != nil {
		// An outer middleware has read the body, so the form that it parsed counts.
		b = appendField(append(b, 'p'), r.PostForm.Encode())
	}
	return b
}

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
	ahead    []byte        // what was read of the body before the key was claimed
	whole    bool          // ahead is the whole body
	request  *http.Request // the client's, whose body is read
	copy     *http.Request // the handler's

	mu      sync.Mutex
	started bool      // reading has begun: the client was told to continue
	off     int       // how many bytes of ahead the handler has read
	read    int64     // how many bytes the handler has read in all
	hash    hash.Hash // of identity and what the handler has read; nil if whole
	eof     bool      // the handler has seen the end
	broken  bool      // the handler has seen the body break off
	closed  bool
}

// readAhead reads the body up to limit bytes. identity must lie in *b.buffer. A
// body that declares more than limit is left alone: it is streamed in any case,
// and a client that waits for 100 Continue is not asked to send before the
// handler wants the body.
func (b *requestBody) readAhead(r *http.Request, identity []byte, limit int64) error {
	b.request = r
	buf := identity
	defer func() {
		*b.buffer = buf
		b.identity, b.ahead = buf[:len(identity)], buf[len(identity):]
	}()
	if r.Body == nil || r.Body == http.NoBody {
		b.whole = true
		return nil
	}
	if r.ContentLength > limit {
		return nil
	}
	b.started = true
	// A declared length is not trusted with memory before the bytes come. The
	// spare byte lets the end arrive together with the last of them.
	buf = slices.Grow(buf, int(min(max(r.ContentLength, 0), maxPooledBuffer))+1)
	for int64(len(buf)-len(identity)) <= limit {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf))
		}
		space := min(int64(cap(buf)-len(buf)), limit+1-int64(len(buf)-len(identity)))
		n, err := r.Body.Read(buf[len(buf) : len(buf)+int(space)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			// There is space for one byte over limit. A body that fills it is
			// large, whether its end has come with that byte or comes later.
			b.whole = int64(len(buf)-len(identity)) <= limit
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fingerprint returns what tells the request apart. When the body was read
// whole, it covers all of the request. Otherwise it covers all but the body,
// whose digest is stored with the response. The letter keeps a large body from
// having the fingerprint of a small one.
func (b *requestBody) fingerprint() [sha256.Size]byte {
	if !b.whole {
		return sha256.Sum256(append([]byte{'l'}, b.identity...))
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
		b.hash = sha256.New()
		b.hash.Write(b.identity)
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
		b.hash.Write(p)
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
	case err != nil:
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
// of it, or, when the handler stopped after n bytes, over those together with
// n.
func (b *requestBody) finish() (digest []byte, broken bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.hash == nil {
		return nil, b.broken
	}
	digest = b.hash.Sum(nil)
	if !b.eof && b.read != b.request.ContentLength {
		digest = binary.BigEndian.AppendUint64(digest, uint64(b.read))
	}
	return digest, b.broken
}

// matches reads as much of the body as digest covers and reports whether it is
// the same. It is called for a body that is not whole and was not handed over.
func (b *requestBody) matches(digest []byte) (bool, error) {
	h := sha256.New()
	h.Write(b.identity)
	body := io.MultiReader(bytes.NewReader(b.ahead), b.request.Body)
	switch len(digest) {
	case sha256.Size:
		b.started = true
		if _, err := io.Copy(h, body); err != nil {
			return false, err
		}
	case sha256.Size + 8:
		n := binary.BigEndian.Uint64(digest[sha256.Size:])
		b.started = b.started || n > 0
		if _, err := io.CopyN(h, body, int64(n)); errors.Is(err, io.EOF) {
			return false, nil // shorter than that
		} else if err != nil {
			return false, err
		}
		digest = digest[:sha256.Size]
	}
	return bytes.Equal(h.Sum(nil), digest), nil
}

// free returns the buffer to its pool. The lock waits for a Read that copies
// from it; a later Read finds the body closed.
func (b *requestBody) free() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if buffer := b.buffer; buffer != nil {
		b.buffer, b.identity, b.ahead = nil, nil, nil
		if cap(*buffer) <= maxPooledBuffer {
			buffers.Put(buffer)
		}
	}
}
