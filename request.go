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
	"strings"
	"sync"
)

// maxKeyBytes is the longest key, after unquoting. Stripe's limit.
const maxKeyBytes = 255

// parseKey returns the key in the lines of the header. A key comes bare, or as
// the string item of RFC 9651 that draft-ietf-httpapi-idempotency-key-header
// asks for; both forms of a key are the same key. If there is none, detail
// tells the client why.
func parseKey(lines []string) (key, detail string) {
	if len(lines) > 1 {
		return "", "The idempotency key header appears more than once."
	}
	key = strings.Trim(strings.Join(lines, ""), " \t")
	if strings.HasPrefix(key, `"`) {
		var rest string
		var ok bool
		if key, rest, ok = cutString(key); !ok || !isParameters(rest) {
			return "", "The idempotency key is not a well-formed quoted string."
		}
	} else if !isBare(key) {
		return "", "An unquoted idempotency key must be visible ASCII without quotes, commas and spaces."
	}
	switch {
	case key == "":
		return "", "The idempotency key is empty."
	case len(key) > maxKeyBytes:
		return "", "The idempotency key is longer than 255 bytes."
	}
	return key, ""
}

// cutString takes the RFC 9651 string that s begins with and returns it
// unquoted, with what follows it.
func cutString(s string) (value, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], true
		case c == '\\':
			i++
			if i == len(s) || s[i] != '"' && s[i] != '\\' {
				return "", "", false
			}
			b.WriteByte(s[i])
		case c < ' ' || c > '~':
			return "", "", false
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}

// isParameters reports whether s is a list of parameters as in RFC 9651,
// section 3.1.2. They mean nothing here, but what is not a parameter could be a
// second key that a proxy has joined to the first.
func isParameters(s string) bool {
	for s != "" {
		name, ok := strings.CutPrefix(s, ";")
		if !ok {
			return false
		}
		name = strings.TrimLeft(name, " ")
		end := strings.IndexAny(name, ";=")
		if end < 0 {
			return isToken(name)
		}
		if !isToken(name[:end]) {
			return false
		}
		s = name[end:]
		value, ok := strings.CutPrefix(s, "=")
		if !ok {
			continue
		}
		if strings.HasPrefix(value, `"`) {
			if _, s, ok = cutString(value); !ok {
				return false
			}
			continue
		}
		if display, ok := strings.CutPrefix(value, `%"`); ok {
			text, rest, ok := strings.Cut(display, `"`)
			if !ok || !isBare(strings.NewReplacer(" ", "", ",", "").Replace(text)) {
				return false
			}
			s = rest
			continue
		}
		end = strings.IndexByte(value+";", ';')
		if end == 0 || !isBare(value[:end]) {
			return false
		}
		s = value[end:]
	}
	return true
}

// isBare reports whether s is visible ASCII without quotes and commas.
func isBare(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == ',' {
			return false
		}
	}
	return true
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

// appendField appends the length of s and s, so that no two lists of fields
// have the same bytes.
func appendField[T []byte | string](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendFields(b []byte, list []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for _, s := range list {
		b = appendField(b, s)
	}
	return b
}

// hashKey returns what the store key is made of: no choice of key reaches
// another cell, and no client's key can be read in the store.
func hashKey(scratch []byte, scope, method, path, key string) [sha256.Size]byte {
	b := append(scratch, "idempotency store key 1"...)
	b = appendField(b, scope)
	b = appendField(b, method)
	b = appendField(b, path)
	b = appendField(b, key)
	return sha256.Sum256(b)
}

// appendIdentity appends all that tells two requests under one key apart, but
// for the body. The key itself is part of it, so that someone who reads a store
// cannot confirm guesses of short payloads.
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
		// An outer middleware has read the body: what it made of it counts.
		b = appendField(append(b, 'p'), r.PostForm.Encode())
	}
	return b
}

// maxPooledBuffer keeps one large request from pinning its memory for good.
const maxPooledBuffer = 64 << 10

var buffers = sync.Pool{New: func() any { return new([]byte) }}

// requestBody is the body as the middleware and the handler read it. What
// precedes the body in the fingerprint, and all or the beginning of the body,
// lie in one pooled buffer, so that it takes one hash over one slice.
type requestBody struct {
	buffer   *[]byte       // the pooled slice that identity and ahead lie in
	identity []byte        // what the fingerprint covers before the body
	ahead    []byte        // what was read of the body before the key was claimed
	whole    bool          // ahead is the whole body
	request  *http.Request // the client's, whose body is read
	copy     *http.Request // the handler's

	mu      sync.Mutex
	started bool      // reading has begun
	off     int       // what the handler has read of ahead
	read    int64     // what the handler has read in all
	hash    hash.Hash // of identity and what the handler has read; nil if whole
	eof     bool      // the handler has seen the end
	broken  bool      // the handler has seen the body break off
	closed  bool
}

// readAhead reads the body up to limit bytes. identity must lie in *b.buffer.
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
		room := min(int64(cap(buf)-len(buf)), limit+1-int64(len(buf)-len(identity)))
		n, err := r.Body.Read(buf[len(buf) : len(buf)+int(room)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			// One byte more than limit may have come together with the end. It would
			// not be whole if the end came later.
			b.whole = int64(len(buf)-len(identity)) <= limit
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fingerprint returns what tells the request apart. That is all of it when the
// body was read whole. Otherwise it is all but the body, whose digest is stored
// with the response.
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
// that is not whole is hashed as it is read.
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

func (b *requestBody) noteLocked(p []byte, err error) {
	b.started = true
	b.read += int64(len(p))
	if b.hash != nil {
		b.hash.Write(p)
	}
	switch {
	case err == io.EOF:
		b.eof = true
		// Undeclared trailers come with the end. Without them nothing is written:
		// the handler may look at its request while another goroutine, such as
		// the transport of a proxy, reads the body.
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

func (b *requestBody) hasStarted() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.started
}

// finish ends the handler's access. It reports whether the handler met a body
// that broke off, and the digest of a body that was not whole: a hash over all
// of it, or over its first n bytes together with n, when the handler stopped
// there.
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
// the same. It is for a body that is not whole and was not handed over.
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
		if _, err := io.CopyN(h, body, int64(n)); err == io.EOF {
			return false, nil // shorter than that
		} else if err != nil {
			return false, err
		}
		digest = digest[:sha256.Size]
	}
	return bytes.Equal(h.Sum(nil), digest), nil
}

// free returns the buffer to its pool. Nothing may read from b any more.
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
