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

// A stored value begins with a byte for its version (the high half) and its
// kind (the low half). What the kind says follows. Numbers are unsigned
// varints, strings follow their length.
//
//	response:  status, digest, length of head, head, length of body, body
//	notStored: status, digest
//	unknown:   digest
//	sealed:    nonce, ciphertext of a value of another kind
//
//	status: as the handler called WriteHeader with it, or 0 for a 200 that is implied
//	digest: of a request body that was too large for the fingerprint, or empty
//	head:   number of values in all, fields, trailers
//	fields, trailers: their number, then for each field its name and its values
//	name:   4 times its length plus an op, and the name
//	values: opSet: a value; opSetList, opAdd: their number and the values; opDelete: nothing
//
// Records outlive deployments, so a version that was ever released stays
// readable. The form is binary because headers may hold bytes that are not
// UTF-8, which JSON would replace.
const formVersion = 1

// implicitStatus stands for a 200 that the handler did not write itself. The
// replay does not write it either, so that outer middleware sees the same
// calls.
const implicitStatus = 0

// The kinds of a stored value. Their numbers are part of the form.
const (
	kindResponse  = 1
	kindNotStored = 2
	kindSealed    = 3
	kindUnknown   = 4
)

// form is the first byte of a stored value.
func form(kind byte) byte { return formVersion<<4 | kind }

// maxHeadBytes bounds what headers and trailers may add to a stored response.
// The reader has the same bound, so that a damaged length costs no memory.
const maxHeadBytes = 64 << 10

// Why a record is unreadable. These are causes of ErrRecordUnreadable, and the
// log shows them. A record in the clear is refused where an AEAD is set: an
// attacker who can write to the store could forge one.
var (
	errMalformed = errors.New("malformed record")
	errUnsealed  = errors.New("record is not sealed, but Options.AEAD is set")
	errSealed    = errors.New("record is sealed, but Options.AEAD is not set")
)

// A storedResponse is a stored value, read in place: body is part of the value,
// or begins there and goes on in parts.
type storedResponse struct {
	status    int
	implicit  bool // the handler did not call WriteHeader
	digest    []byte
	notStored bool
	unknown   bool // the handler gave no answer
	fields    []headerField
	trailers  []headerField
	body      []byte
	parts     [][]byte

	replayed []string // the value of Idempotent-Replayed
}

// encodeResponse appends the stored form of a response to scratch, with as much
// of its body as is in chunks. It returns nil when the headers are too large.
// The head is made first: its length stands before it.
func encodeResponse(scratch []byte, status int, digest []byte, fields, trailers []headerField, size int64, chunks [][]byte) []byte {
	var backing [512]byte
	head := binary.AppendUvarint(backing[:0], countValues(fields)+countValues(trailers))
	head = appendHeaderFields(head, fields)
	head = appendHeaderFields(head, trailers)
	if len(head) > maxHeadBytes {
		return nil
	}
	length := 1 + 4*binary.MaxVarintLen64 + len(digest) + len(head)
	for _, chunk := range chunks {
		length += len(chunk)
	}
	value := slices.Grow(scratch, length)
	value = append(value, form(kindResponse))
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

// countValues returns how many values are kept. The number lets the reader
// allocate them all at once.
func countValues(fields []headerField) (n uint64) {
	for i := range fields {
		if !fields[i].transient {
			n += uint64(len(fields[i].values))
		}
	}
	return n
}

// appendHeaderFields appends the fields that are kept. Almost every header has
// one value, so an op of its own saves the count for it.
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
		op := f.op
		if op == opSet && len(f.values) != 1 {
			op = opSetList
		}
		b = binary.AppendUvarint(b, uint64(len(f.name))<<2|uint64(op))
		b = append(b, f.name...)
		switch op {
		case opSet:
			b = appendField(b, f.values[0])
		case opSetList, opAdd:
			b = appendFields(b, f.values)
		}
	}
	return b
}

// encodeNotStored returns the stored form of a response that cannot be kept: it
// was too large or cut short, say. Status 0 is one that is not known.
func encodeNotStored(status int, digest []byte) []byte {
	return appendField(binary.AppendUvarint([]byte{form(kindNotStored)}, uint64(status)), digest)
}

// encodeUnknown returns the stored form of a run that came to no answer.
func encodeUnknown(digest []byte) []byte {
	return appendField([]byte{form(kindUnknown)}, digest)
}

// seal encrypts the value of a result and binds it to its cell and its request.
// So a response that was moved in the store to another key, or given another
// fingerprint, is unreadable.
func seal(aead cipher.AEAD, storeKey string, r Result) []byte {
	head := 1 + aead.NonceSize()
	sealed := make([]byte, head, head+len(r.Value)+aead.Overhead())
	sealed[0] = form(kindSealed)
	nonce := sealed[1:head]
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(sealed, nonce, r.Value, sealedWith(storeKey, r.Fingerprint))
}

// unseal is the reverse of seal. A panic of the AEAD makes the record
// unreadable: the client gets an answer, and the operator an event.
func unseal(aead cipher.AEAD, storeKey string, rec Record) (value []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("AEAD panicked: %v", p)
		}
	}()
	n := aead.NonceSize()
	if len(rec.Value) < 1+n {
		return nil, errMalformed
	}
	return aead.Open(nil, rec.Value[1:1+n], rec.Value[1+n:], sealedWith(storeKey, rec.Fingerprint))
}

// sealedWith returns the additional data of an AEAD. The length before the key
// keeps a part of a fingerprint from passing as a part of the key.
func sealedWith(storeKey string, fingerprint []byte) []byte {
	return append(appendField(nil, storeKey), fingerprint...)
}

// decodeResponse reads a stored value. Any other bytes are an error, never a
// panic and never a second run: they are evidence that the handler ran. The
// strings are appended to text and the fields to fields, which is empty and may
// have capacity.
//
// With an AEAD only a response must be sealed. The small records may be in the
// clear: one is stored when sealing has failed.
func decodeResponse(aead cipher.AEAD, storeKey string, rec Record, text *strings.Builder, fields []headerField) (storedResponse, error) {
	value := rec.Value
	kind, err := kindOf(value)
	switch {
	case err != nil:
		return storedResponse{}, err
	case kind == kindSealed && aead == nil:
		return storedResponse{}, errSealed
	case kind == kindResponse && aead != nil:
		return storedResponse{}, errUnsealed
	case kind == kindSealed:
		if value, err = unseal(aead, storeKey, rec); err == nil {
			kind, err = kindOf(value)
		}
		if err != nil {
			return storedResponse{}, err
		}
	}
	return decodePayload(kind, value[1:], rec.parts, text, fields)
}

// kindOf returns the kind of a value whose version this release can read.
func kindOf(value []byte) (kind byte, err error) {
	if len(value) == 0 {
		return 0, errMalformed
	}
	if version := value[0] >> 4; version != formVersion {
		return 0, fmt.Errorf("record has version %d, this release reads up to %d", version, formVersion)
	}
	return value[0] & 0xf, nil
}

// decodePayload reads what follows the first byte. Every length is compared
// with what is left before it is used.
func decodePayload(kind byte, payload []byte, parts [][]byte, text *strings.Builder, fields []headerField) (storedResponse, error) {
	resp := storedResponse{parts: parts, notStored: kind == kindNotStored, unknown: kind == kindUnknown}
	if kind != kindResponse && !resp.notStored && !resp.unknown {
		return storedResponse{}, fmt.Errorf("record has unknown kind %d", kind)
	}
	if !resp.unknown {
		var ok bool
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

// decodeStatus reads the status. A damaged one must not reach WriteHeader,
// which panics on it.
func decodeStatus(resp storedResponse, payload []byte) (_ storedResponse, rest []byte, ok bool) {
	status, rest, ok := cutUvarint(payload)
	if status == implicitStatus && !resp.notStored {
		resp.implicit, status = true, http.StatusOK
	}
	resp.status = int(status)
	// Of the 1xx the recorder stores only 101. WriteHeader panics over 999. Of an
	// answer around the recorder the status may not be known.
	return resp, rest, ok && (status == http.StatusSwitchingProtocols || status >= 200 && status <= 999 || resp.notStored && status == 0)
}

// decodeParts reads the head and the body of a response. Its size must be that
// of all parts, so that a record of which a part is missing is unreadable.
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

// partsSize returns the size of the body that is in parts.
func (s *storedResponse) partsSize() (n uint64) {
	for _, part := range s.parts {
		n += uint64(len(part))
	}
	return n
}

// cutUvarint takes a number from the front of b.
func cutUvarint(b []byte) (n uint64, rest []byte, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 {
		return 0, nil, false
	}
	return n, b[size:], true
}

// A headReader takes the head of a response apart. After a failure it returns
// zeros, so that its callers check failed once, at the end. Its methods take
// the rest of the head and return what is left of it: that stays in registers,
// which saves 60 ns of a replay.
type headReader struct {
	values []string // backing of all values
	failed bool
}

// number takes a number. Most numbers take one byte; this half is small enough
// for the compiler to inline.
func (r *headReader) number(s string) (n uint64, rest string) {
	if s != "" && s[0] < 0x80 {
		return uint64(s[0]), s[1:]
	}
	return r.longNumber(s)
}

// longNumber takes a number of more than one byte.
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

// text takes a string and its length.
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

// field takes one field into f.
func (r *headReader) field(s string, f *headerField) (rest string) {
	n, s := r.number(s)
	f.op, n = byte(n&3), n>>2
	if n > uint64(len(s)) {
		r.failed = true
		return ""
	}
	f.name, s = s[:n], s[n:]
	n = 1
	switch f.op {
	case opSetList, opAdd:
		n, s = r.number(s)
	case opDelete:
		return s
	}
	if f.op == opSetList {
		f.op = opSet
	}
	f.values = r.take(n)
	for i := range f.values {
		f.values[i], s = r.text(s)
	}
	return s
}

// take returns n of the values.
func (r *headReader) take(n uint64) []string {
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

// announceTrailers sets those trailers that no Trailer header declares. Without
// them in the header, net/http would give a short body a Content-Length. A body
// that has one has no last chunk for trailers to follow (RFC 9112, section
// 7.1.2).
func announceTrailers(h http.Header, trailers []headerField) {
	for i := range trailers {
		if trailers[i].op == opSet && strings.HasPrefix(trailers[i].name, http.TrailerPrefix) {
			trailers[i].apply(h)
		}
	}
}
