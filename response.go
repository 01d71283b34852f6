package idempotency

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// A stored value is a version byte, a kind byte and what the kind says. Numbers
// are unsigned varints, strings follow their length.
//
//	response:  status, digest, length of head, head, length of body, body
//	notStored: status, digest
//	unknown:   digest
//	sealed:    nonce, ciphertext of a kind byte and what that says
//
//	status: as the handler called WriteHeader with it, or 0 for a 200 that is implied
//	digest: of a request body that was too large for the fingerprint, or empty
//	head:   number of values in all, fields, trailers
//	fields, trailers: their number, then for each: op, name, number of values, values
//	                  or: opCommon and the number of a common header, and its value
//	                  unless that is common too
//
// Records outlive deployments, so a version that was ever released stays
// readable.
const formVersion = 1

const implicitStatus = 0

const (
	kindResponse  = 1
	kindNotStored = 2
	kindSealed    = 3
	kindUnknown   = 4
)

// maxHeadBytes bounds what headers and trailers may add to a stored response.
const maxHeadBytes = 64 << 10

var (
	errMalformed = errors.New("malformed record")
	errUnsealed  = errors.New("record is not sealed, but Options.AEAD is set")
	errSealed    = errors.New("record is sealed, but Options.AEAD is not set")
)

// storedResponse is a stored value, read in place: body is part of it, or begins
// there and goes on in parts.
type storedResponse struct {
	status    int
	implicit  bool // the handler did not call WriteHeader
	digest    []byte
	notStored bool
	unknown   bool // what the handler came to
	fields    []headerField
	trailers  []headerField
	body      []byte
	parts     [][]byte

	replayed []string // the value of Idempotent-Replayed
}

// encodeResponse appends the stored form of a response to scratch, with as much
// of its body as is in chunks. It returns nil when the headers are too large.
func encodeResponse(scratch []byte, status int, digest []byte, fields, trailers []headerField, size int64, chunks [][]byte) []byte {
	var headRoom [512]byte
	head := binary.AppendUvarint(headRoom[:0], countValues(fields)+countValues(trailers))
	head = appendHeaderFields(head, fields)
	head = appendHeaderFields(head, trailers)
	if len(head) > maxHeadBytes {
		return nil
	}
	room := 2 + 4*binary.MaxVarintLen64 + len(digest) + len(head)
	for _, chunk := range chunks {
		room += len(chunk)
	}
	value := slices.Grow(scratch, room)
	value = append(value, formVersion, kindResponse)
	value = binary.AppendUvarint(value, uint64(status))
	value = appendField(value, digest)
	value = binary.AppendUvarint(value, uint64(len(head)))
	value = append(value, head...)
	value = binary.AppendUvarint(value, uint64(size))
	for _, chunk := range chunks {
		value = append(value, chunk...)
	}
	return value
}

func countValues(fields []headerField) (n uint64) {
	for i := range fields {
		if !fields[i].transient {
			n += uint64(len(fields[i].values))
		}
	}
	return n
}

func appendHeaderFields(b []byte, fields []headerField) []byte {
	var n uint64
	for i := range fields {
		if !fields[i].transient {
			n++
		}
	}
	b = binary.AppendUvarint(b, n)
	for i := range fields {
		f := &fields[i]
		if f.transient {
			continue
		}
		n, common := commonHeader(f)
		switch {
		case !common:
			b = append(b, f.op)
			b = appendField(b, f.name)
			b = appendFields(b, f.values)
		case commonHeaders[n].value == "":
			b = append(b, opCommon+byte(n))
			b = appendField(b, f.values[0])
		default:
			b = append(b, opCommon+byte(n))
		}
	}
	return b
}

// encodeNotStored returns the stored form of a response that is too large, or
// otherwise not to be had again.
func encodeNotStored(status int, digest []byte) []byte {
	return appendField(binary.AppendUvarint([]byte{formVersion, kindNotStored}, uint64(status)), digest)
}

// encodeUnknown returns the stored form of a run that came to no answer.
func encodeUnknown(digest []byte) []byte {
	return appendField([]byte{formVersion, kindUnknown}, digest)
}

// seal encrypts a stored form and binds it to its cell.
func seal(aead cipher.AEAD, storeKey string, value []byte) []byte {
	head := 2 + aead.NonceSize()
	sealed := make([]byte, head, head+len(value)+aead.Overhead())
	sealed[0], sealed[1] = formVersion, kindSealed
	nonce := sealed[2:head]
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(sealed, nonce, value[1:], []byte(storeKey))
}

// decodeResponse reads a stored value. Everything that is not one is an error,
// never a panic. Its strings are appended to text and its fields to the empty
// fields.
func decodeResponse(aead cipher.AEAD, storeKey string, rec Record, text *strings.Builder, fields []headerField) (storedResponse, error) {
	value := rec.Value
	if len(value) < 2 {
		return storedResponse{}, errMalformed
	}
	if value[0] != formVersion {
		return storedResponse{}, fmt.Errorf("record has version %d, this release reads up to %d", value[0], formVersion)
	}
	kind, payload := value[1], value[2:]
	switch {
	case kind == kindSealed && aead == nil:
		return storedResponse{}, errSealed
	case kind == kindResponse && aead != nil:
		return storedResponse{}, errUnsealed
	case kind == kindSealed:
		n := aead.NonceSize()
		if len(payload) < n {
			return storedResponse{}, errMalformed
		}
		plain, err := aead.Open(nil, payload[:n], payload[n:], []byte(storeKey))
		if err != nil {
			return storedResponse{}, err
		}
		if len(plain) == 0 {
			return storedResponse{}, errMalformed
		}
		kind, payload = plain[0], plain[1:]
	}
	return decodePayload(kind, payload, rec.parts, text, fields)
}

func decodePayload(kind byte, payload []byte, parts [][]byte, text *strings.Builder, fields []headerField) (storedResponse, error) {
	resp := storedResponse{parts: parts, notStored: kind == kindNotStored, unknown: kind == kindUnknown}
	if kind != kindResponse && !resp.notStored && !resp.unknown {
		return storedResponse{}, fmt.Errorf("record has unknown kind %d", kind)
	}
	ok := true
	if !resp.unknown {
		if resp, payload, ok = decodeStatus(resp, payload); !ok {
			return storedResponse{}, errMalformed
		}
	}
	size, payload, ok := cutUvarint(payload)
	if !ok || size > uint64(len(payload)) {
		return storedResponse{}, errMalformed
	}
	resp.digest, payload = payload[:size], payload[size:]
	if kind == kindResponse {
		return decodeParts(resp, payload, text, fields)
	}
	if len(payload) != 0 {
		return storedResponse{}, errMalformed
	}
	return resp, nil
}

func decodeStatus(resp storedResponse, payload []byte) (_ storedResponse, rest []byte, ok bool) {
	status, rest, ok := cutUvarint(payload)
	if status == implicitStatus && !resp.notStored {
		resp.implicit, status = true, http.StatusOK
	}
	resp.status = int(status)
	// The recorder never stores another 1xx, and WriteHeader panics beyond 999.
	return resp, rest, ok && (status == http.StatusSwitchingProtocols || status >= 200 && status <= 999)
}

func decodeParts(resp storedResponse, payload []byte, text *strings.Builder, fields []headerField) (storedResponse, error) {
	size, payload, ok := cutUvarint(payload)
	if !ok || size > uint64(len(payload)) || size > maxHeadBytes {
		return storedResponse{}, errMalformed
	}
	// One string for the whole head: the fields are parts of it.
	before := text.Len()
	text.Write(payload[:size])
	var head headReader
	values, rest := head.number(text.String()[before:])
	if values > uint64(len(rest)) {
		return storedResponse{}, errMalformed
	}
	backing := make([]string, values+1)
	backing[values] = "true"
	resp.replayed = backing[values:]
	head.values = backing[:0:values]
	resp.fields, rest = head.fields(rest, fields)
	resp.trailers, rest = head.fields(rest, nil)
	size, resp.body, ok = cutUvarint(payload[size:])
	if !ok || head.failed || rest != "" || size != uint64(len(resp.body))+resp.partsSize() {
		return storedResponse{}, errMalformed
	}
	return resp, nil
}

func (s *storedResponse) partsSize() (n uint64) {
	for _, part := range s.parts {
		n += uint64(len(part))
	}
	return n
}

func cutUvarint(b []byte) (n uint64, rest []byte, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 {
		return 0, nil, false
	}
	return n, b[size:], true
}

// headReader takes the head of a response apart. After a failure it returns
// zeros. Its methods take the rest of the head and return what is left of it:
// that stays in registers, which saves 60 ns of a replay.
type headReader struct {
	values []string // backing of all values
	failed bool
}

func (r *headReader) number(s string) (n uint64, rest string) {
	if s != "" && s[0] < 0x80 {
		return uint64(s[0]), s[1:]
	}
	return r.longNumber(s)
}

func (r *headReader) longNumber(s string) (n uint64, rest string) {
	for i := range min(len(s), 5) { // 35 bits hold any number here
		n |= uint64(s[i]&0x7f) << (7 * i)
		if s[i] < 0x80 {
			return n, s[i+1:]
		}
	}
	r.failed = true
	return 0, ""
}

func (r *headReader) text(s string) (text, rest string) {
	n, s := r.number(s)
	if n > uint64(len(s)) {
		r.failed = true
		return "", ""
	}
	return s[:n], s[n:]
}

// fields appends fields to the empty list.
func (r *headReader) fields(s string, fields []headerField) (_ []headerField, rest string) {
	n, s := r.number(s)
	if n > uint64(len(s)) { // a field takes one byte at least
		r.failed = true
		return nil, ""
	}
	fields = slices.Grow(fields, int(n))[:n]
	for i := range fields {
		s = r.field(s, &fields[i])
	}
	return fields, s
}

func (r *headReader) field(s string, f *headerField) (rest string) {
	if s == "" {
		r.failed = true
		return ""
	}
	op, s := s[0], s[1:]
	if op >= opCommon && int(op-opCommon) < len(commonHeaders) {
		return r.common(s, int(op-opCommon), f)
	}
	r.failed = r.failed || op > opDelete
	f.op = op
	f.name, s = r.text(s)
	n, s := r.number(s)
	f.values = r.room(n)
	for i := range f.values {
		f.values[i], s = r.text(s)
	}
	return s
}

func (r *headReader) common(s string, n int, f *headerField) (rest string) {
	f.op, f.name, f.values = opSet, commonHeaders[n].name, r.room(1)
	if r.failed {
		return ""
	}
	f.values[0] = commonHeaders[n].value
	if f.values[0] == "" {
		f.values[0], s = r.text(s)
	}
	return s
}

// room returns n of the values.
func (r *headReader) room(n uint64) []string {
	first := len(r.values)
	if n > uint64(cap(r.values)-first) {
		r.failed = true
		return nil
	}
	r.values = r.values[:first+int(n)]
	return r.values[first:len(r.values):len(r.values)]
}

// replay writes the response on top of what outer middleware has set for the
// current request.
func (s *storedResponse) replay(w http.ResponseWriter) {
	h := w.Header()
	applyFields(h, s.fields)
	h["Idempotent-Replayed"] = s.replayed
	announceTrailers(h, s.trailers)
	// Without a body, trailers would become headers.
	if !s.implicit || len(s.body) == 0 && len(s.trailers) > 0 {
		w.WriteHeader(s.status)
	}
	if len(s.body) > 0 {
		// A failed write means that the client is gone; it may come again.
		_, _ = w.Write(s.body)
	}
	for _, part := range s.parts {
		if _, err := w.Write(part); err != nil {
			break
		}
	}
	applyFields(h, s.trailers)
}

// announceTrailers sets those trailers that nothing declares. Without them in
// the header net/http would give a short body a Content-Length, and a body
// that has one cannot have trailers.
func announceTrailers(h http.Header, trailers []headerField) {
	for i := range trailers {
		if trailers[i].op == opSet && strings.HasPrefix(trailers[i].name, http.TrailerPrefix) {
			trailers[i].apply(h)
		}
	}
}
