package idempotency

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
)

// A request is one that has a key, or should have one, and what identifies it:
// the cell of its key, and the fingerprint that tells it apart from another
// request under the same key.
type request struct {
	*middleware
	r *http.Request // as the middleware got it

	key      string // the client's, unquoted; or of Options.Key, "" if there is none
	scope    string
	storeKey string
	token    string          // names the request as an owner of the key
	text     strings.Builder // backing of storeKey, token and the header of a replay

	body        requestBody
	fingerprint []byte
	sum         [sha256.Size]byte // backing of fingerprint
}

// identify finds out which cell the request belongs to. Only Options.Key needs
// the body for that. Without it a request with an invalid key is refused before
// its body costs memory. A request that may pass through without a key has no
// cell.
func (q *request) identify(lines []string) *Error {
	q.body.buffer = buffers.Get().(*[]byte)
	key, err := q.findKey(lines)
	if err != nil || key == "" {
		return err
	}
	if q.opts.ValidateKey != nil {
		if err := q.opts.ValidateKey(key); err != nil {
			return q.invalidKey(err.Error(), err)
		}
	}
	q.key = key
	if q.opts.Scope != nil {
		q.scope = q.askForScope()
	}
	q.deriveStoreKey()
	return nil
}

// findKey returns the key of the header, or of Options.Key. It is "" only if
// Options.Key found none and the request may pass through.
func (q *request) findKey(lines []string) (string, *Error) {
	if q.opts.Key != nil {
		return q.askForKey()
	}
	if len(lines) == 0 && q.opts.RequireKey {
		return "", q.problem(ErrKeyMissing, nil)
	}
	key, detail := parseKey(lines, q.opts.Header)
	if detail != "" {
		return "", q.invalidKey(detail, nil)
	}
	return key, nil
}

// askForKey reads the body and asks Options.Key. A body that breaks off is
// refused: its key cannot be known, and the client that repeats the request
// will have one.
func (q *request) askForKey() (string, *Error) {
	if q.opts.Fingerprint == nil {
		q.body.boundary = formBoundary(q.r) // decides what is too large
	}
	if err := q.body.readAhead(q.r, (*q.body.buffer)[:0], q.opts.MaxBufferedBody); err != nil {
		return "", q.bodyProblem(err)
	}
	var body []byte
	if q.body.whole {
		body = slices.Clip(q.body.ahead)
		if body == nil { // a body that is empty, and not one that is too large
			body = []byte{}
		}
	}
	switch key, err := q.opts.Key(q.r, body); {
	case err != nil:
		return "", q.invalidKey(err.Error(), err)
	case key == "" && q.opts.RequireKey:
		return "", q.problem(ErrKeyMissing, nil)
	case len(key) > maxKeyBytes:
		return "", q.invalidKey("The idempotency key of this request is longer than 255 bytes.", nil)
	default:
		return key, nil
	}
}

// askForScope asks Options.Scope, which may look into a form of the request.
// With Options.Key the body was read before. A Scope that parses the form of
// such a request would find no tenant in it, and would leave an empty form to
// the handler. So Scope gets a copy of the request with the body that was read.
//
// A body that is not whole cannot be read by Scope. Part of a form could have
// part of a tenant in it, another part in every try.
func (q *request) askForScope() string {
	if q.opts.Key == nil {
		return q.opts.Scope(q.r)
	}
	r := q.r.WithContext(q.r.Context())
	r.Body = io.NopCloser(bytes.NewReader(q.body.ahead))
	if !q.body.whole {
		r.Body = http.MaxBytesReader(nil, io.NopCloser(strings.NewReader("x")), 0)
	}
	defer func() {
		if r.MultipartForm != nil && r.MultipartForm != q.r.MultipartForm {
			_ = r.MultipartForm.RemoveAll()
		}
	}()
	return q.opts.Scope(r)
}

// invalidKey is the answer to a key that was refused. The detail tells the client
// why; if it is empty, the client gets that of the problem.
func (q *request) invalidKey(detail string, cause error) *Error {
	err := q.problem(ErrKeyInvalid, cause)
	if detail != "" {
		err.Detail = detail
	}
	return err
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
	sum := hashKey(q.body.unused(), q.scope, q.r.Method, path, q.key)
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
	if q.opts.Key != nil { // which has read the body
		identity, err := q.appendIdentity(nil, custom)
		if err != nil {
			return q.formProblem(err)
		}
		q.body.prepend(identity)
	} else {
		identity, err := q.appendIdentity(q.body.unused(), custom)
		if err != nil {
			return q.formProblem(err)
		}
		if err := q.body.readAhead(q.r, identity, q.opts.MaxBufferedBody); err != nil {
			return q.bodyProblem(err)
		}
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

// formProblem is the answer to a form that an outer middleware has parsed, and
// of which a file cannot be read again. Without the file, the request cannot be
// told from another one. The client has sent all of it, so the status is 500,
// and the cause is logged.
func (q *request) formProblem(cause error) *Error {
	err := q.problem(ErrBodyIncomplete, cause)
	err.Status = http.StatusInternalServerError
	err.Detail = "A file of the form could not be read again. This attempt was not processed. " +
		"Repeat the request with the same key."
	return err
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
	return splitTarget(uri)
}

// splitTarget is target for the text of a request line.
func splitTarget(uri string) (path, query string) {
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
// of another client takes a second preimage of 160 bits. A method in any case
// and any spelling of a path that is equivalent name the same cell.
//
// The label is short so that a usual path and a UUID fit into one block of
// SHA-256, 55 bytes, which saves 60 ns.
func hashKey(scratch []byte, scope, method, path, key string) (sum [20]byte) {
	b := append(scratch, 'k')
	b = appendField(b, scope)
	b = appendField(b, strings.ToUpper(method))
	b = appendField(b, normalize(path))
	b = appendField(b, key)
	full := sha256.Sum256(b)
	copy(sum[:], full[:])
	return sum
}

// preconditions are headers that are part of every fingerprint. A client that
// corrects If-Match after a 412 sends another request (RFC 9110, section 13),
// and must not get the old 412.
var preconditions = []string{"If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"}

// appendIdentity appends all that tells two requests under one key apart, but
// for the body. The key itself is part of it, so that a reader of a leaked
// store cannot confirm guesses of short payloads. Credentials are part of it
// only where there is no scope: a scope says whose request it is, and
// credentials may change between two tries. A letter before each part that may
// be missing keeps one part from passing as another. The last letter says how
// the body counts after it: 'f' by the custom fingerprint, 'm' as a form without
// its boundaries, 'd' byte by byte.
func (q *request) appendIdentity(b []byte, custom bool) ([]byte, error) {
	header := q.r.Header
	b = append(b, 'f') // short, for a block of SHA-256 less: 50 ns
	b = appendField(b, q.key)
	if q.scope == "" {
		b = append(b, 'c')
		b = appendFields(b, header["Authorization"])
		b = appendFields(b, header["Cookie"])
	} else {
		b = append(b, 's')
	}
	for _, name := range q.opts.FingerprintHeaders {
		if values, ok := header[name]; ok {
			b = appendField(append(b, 'h'), name)
			b = appendFields(b, values)
		}
	}
	if custom {
		return append(b, 'f'), nil
	}
	return q.appendContent(b)
}

// appendContent appends the query, the Content-Type, and what an outer
// middleware has parsed of the body, which cannot be read again. What is left of
// a body after that counts byte by byte.
//
// When MultipartForm is empty, the outer middleware may have called
// MultipartReader and read some of the parts, which cannot be seen. The boundary
// then counts: another form of the same client most likely has another one.
func (q *request) appendContent(b []byte) ([]byte, error) {
	_, query := target(q.r)
	query = normalize(query)
	parsed, contentType := q.r.MultipartForm, q.r.Header["Content-Type"]
	typ, isForm := parseMultipartType(contentType)
	if isForm && (parsed == nil || len(parsed.Value)+len(parsed.File) > 0) {
		b = appendField(append(b, 'm'), query)
		b = appendField(b, typ.before)
		b = appendField(b, typ.after)
	} else {
		isForm = false
		b = appendField(append(b, 'b'), query)
		b = appendFields(b, contentType)
	}
	if q.r.PostForm != nil {
		b = appendField(append(b, 'p'), q.r.PostForm.Encode())
	}
	if parsed != nil {
		var err error
		b, err = appendParsedForm(append(b, 'q'), parsed)
		return append(b, 'd'), err
	}
	if isForm {
		q.body.boundary = typ.boundary
		return append(b, 'm'), nil
	}
	return append(b, 'd'), nil
}
