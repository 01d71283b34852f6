package idempotency

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// errAfterReturn is what a write comes to once the handler has returned.
var errAfterReturn = errors.New("idempotency: write after the handler returned")

// A recorder is the ResponseWriter of a handler under a key. It holds the
// response back until the store has it, or lets it through as it is written
// once the handler flushes or writes more than is kept.
//
// net/http's own ResponseWriter is the reference for everything a handler can
// observe. There is no Unwrap, which would let writes bypass the record, and no
// Hijack: http.ResponseController reports http.ErrNotSupported.
type recorder struct {
	w      http.ResponseWriter
	proto  int         // major version of HTTP
	limit  int64       // how much of the body is kept
	header http.Header // of w, which the handler changes
	outer  http.Header // what outer middleware had set at the beginning
	room   headerRoom

	mu          sync.Mutex // guards what follows, against goroutines the handler leaves behind
	wroteHeader bool
	status      int
	length      int64         // declared by the handler, or -1
	declared    []string      // names of trailers
	connection  []string      // values of the Connection header
	sniff       bool          // net/http will find out the Content-Type
	fields      []headerField // what the handler changed
	trailers    []headerField
	body        recordedBody
	written     int64 // asked to be written, refused or not
	streaming   bool  // the header has gone out
	overflow    bool  // the body is not kept any more
	closed      bool
}

// init makes the zero recorder record what goes to w.
func (r *recorder) init(w http.ResponseWriter, proto int, limit int64) {
	r.w, r.proto, r.limit, r.length = w, proto, limit, -1
	r.header = w.Header()
	if len(r.header) > 0 {
		r.outer = r.header.Clone()
	}
}

// resetHeaderLocked makes the header what outer middleware had set, and then
// the fields.
func (r *recorder) resetHeaderLocked(fields []headerField) {
	clear(r.header)
	maps.Copy(r.header, r.outer)
	applyFields(r.header, fields)
}

// headerRoom is where the usual header fits in without an allocation.
type headerRoom struct {
	fields [4]headerField
	values [4]string
}

// Header implements http.ResponseWriter.
func (r *recorder) Header() http.Header { return r.header }

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.wroteHeader {
		return
	}
	if status < 100 || status > 999 {
		panic("invalid WriteHeader code " + strconv.Itoa(status)) // as net/http does
	}
	if status < 200 && (status != http.StatusSwitchingProtocols || r.proto >= 2) {
		r.informLocked(status)
		return
	}
	r.writeHeaderLocked(status)
}

// informLocked sends a 1xx response with the header as it is now. What outer
// middleware changes of the header on the way is not the handler's doing.
func (r *recorder) informLocked(status int) {
	before := r.header.Clone()
	r.w.WriteHeader(status)
	if r.outer == nil {
		r.outer = make(http.Header)
	}
	applyFields(r.outer, new(headerRoom).difference(before, r.header))
}

// writeHeaderLocked fixes the status and the header, as net/http does.
func (r *recorder) writeHeaderLocked(status int) {
	r.wroteHeader, r.status = true, status
	r.fields = r.room.difference(r.outer, r.header)
	if declared := r.header["Content-Length"]; len(declared) > 0 && declared[0] != "" {
		n, err := strconv.ParseInt(declared[0], 10, 64)
		if err != nil || n < 0 {
			r.header.Del("Content-Length") // w does the same, and says so in its log
		} else {
			r.length = n
		}
	}
	_, typed := r.header["Content-Type"]
	r.sniff = !typed && r.header.Get("Content-Encoding") == "" && bodyAllowed(status)
	r.connection = slices.Clone(r.header["Connection"])
	for _, line := range r.header["Trailer"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = strings.TrimSpace(name); name != "" {
				r.declared = append(r.declared, http.CanonicalHeaderKey(name))
			}
		}
	}
	if r.sniff && r.proto == 1 && r.header.Get("Transfer-Encoding") != "" {
		// HTTP/1 does not sniff then. A replay, which has no Transfer-Encoding
		// of the handler's, must not either.
		r.sniff = false
		r.fields = append(r.fields, headerField{op: opSet, name: "Content-Type"})
	}
}

// difference returns what turns base into header. The values are copied: the
// handler may go on changing them.
func (room *headerRoom) difference(base, header http.Header) []headerField {
	backing, fields := room.values[:0], room.fields[:0]
	for name, values := range header {
		f := headerField{op: opSet, name: name}
		if outer, ok := base[name]; ok {
			if slices.Equal(outer, values) {
				continue
			}
			if len(outer) > 0 && len(outer) < len(values) && slices.Equal(outer, values[:len(outer)]) {
				f.op, values = opAdd, values[len(outer):]
			}
		}
		backing = append(backing, values...)
		f.values = slices.Clip(backing[len(backing)-len(values):])
		fields = append(fields, f)
	}
	for name := range base {
		if _, ok := header[name]; !ok {
			fields = append(fields, headerField{op: opDelete, name: name})
		}
	}
	return fields
}

// Write implements http.ResponseWriter. As long as the response is kept it does
// not report that the client is gone: the client may come again for it.
func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return recordLocked(r, p)
}

// WriteString implements io.StringWriter.
func (r *recorder) WriteString(s string) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return recordLocked(r, s)
}

func recordLocked[T []byte | string](r *recorder, p T) (int, error) {
	if r.closed {
		return 0, errAfterReturn
	}
	if !r.wroteHeader {
		r.writeHeaderLocked(http.StatusOK)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if !bodyAllowed(r.status) {
		return 0, http.ErrBodyNotAllowed
	}
	r.written += int64(len(p))
	if r.length >= 0 && r.written > r.length {
		return 0, http.ErrContentLength
	}
	if !r.overflow && r.body.size+int64(len(p)) > r.limit {
		r.streamLocked()
		r.overflow = true
		r.body.free()
	}
	if r.overflow {
		return r.w.Write([]byte(p))
	}
	appendBody(&r.body, p)
	if r.streaming {
		_, _ = r.w.Write([]byte(p))
	}
	return len(p), nil
}

func bodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}

// Flush implements http.Flusher.
func (r *recorder) Flush() { _ = r.FlushError() }

// FlushError is what http.ResponseController calls. From here on the response
// is sent as it is written, and still recorded.
func (r *recorder) FlushError() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errAfterReturn
	}
	if !canFlush(r.w) {
		return http.ErrNotSupported
	}
	if !r.wroteHeader {
		r.writeHeaderLocked(http.StatusOK)
	}
	if !r.streaming {
		r.fixContentTypeLocked()
		r.streamLocked()
	}
	err := http.NewResponseController(r.w).Flush()
	if !r.overflow {
		return nil // as for Write
	}
	return err
}

// canFlush reports whether http.ResponseController finds a Flush.
func canFlush(w http.ResponseWriter) bool {
	for {
		switch t := w.(type) {
		case interface{ FlushError() error }, http.Flusher:
			return true
		case interface{ Unwrap() http.ResponseWriter }:
			w = t.Unwrap()
		default:
			return false
		}
	}
}

// SetReadDeadline is what http.ResponseController calls.
func (r *recorder) SetReadDeadline(deadline time.Time) error {
	return http.NewResponseController(r.w).SetReadDeadline(deadline)
}

// SetWriteDeadline is what http.ResponseController calls.
func (r *recorder) SetWriteDeadline(deadline time.Time) error {
	return http.NewResponseController(r.w).SetWriteDeadline(deadline)
}

// EnableFullDuplex is what http.ResponseController calls.
func (r *recorder) EnableFullDuplex() error {
	return http.NewResponseController(r.w).EnableFullDuplex()
}

// fixContentTypeLocked records what net/http is about to find out. It sniffs
// what is there at the first flush; at a replay that would be the whole body.
func (r *recorder) fixContentTypeLocked() {
	if !r.sniff {
		return
	}
	f := headerField{op: opSet, name: "Content-Type"} // present without a value: not sniffed
	if r.body.size > 0 {
		f.values = []string{http.DetectContentType(r.body.chunks[0])}
	}
	r.fields = append(r.fields, f)
}

// streamLocked sends what was held back. The handler, which is running, then
// finds the header as it left it: it may have set trailers already.
func (r *recorder) streamLocked() {
	if r.streaming {
		return
	}
	r.streaming = true
	left := maps.Clone(r.header)
	r.resetHeaderLocked(r.fields)
	r.sendLocked()
	clear(r.header)
	maps.Copy(r.header, left)
}

func (r *recorder) sendLocked() {
	r.w.WriteHeader(r.status)
	for _, chunk := range r.body.chunks {
		if _, err := r.w.Write(chunk); err != nil {
			r.body.lent = true
			return // the client is gone
		}
	}
}

// finish ends the handler's access: what is written from now on is neither sent
// nor recorded.
func (r *recorder) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.wroteHeader {
		r.writeHeaderLocked(http.StatusOK)
	}
	r.closed = true
	r.findTrailersLocked()
}

// findTrailersLocked finds out what differs in the trailers from the header that
// goes out before them.
func (r *recorder) findTrailersLocked() {
	found := len(r.declared) > 0
	for name := range r.header {
		found = found || r.isTrailer(name)
	}
	for name := range r.outer { // which the handler may have deleted
		found = found || r.isTrailer(name)
	}
	for i := range r.fields {
		found = found || r.isTrailer(r.fields[i].name)
	}
	if !found {
		return
	}
	before := maps.Clone(r.outer)
	if before == nil {
		before = make(http.Header)
	}
	applyFields(before, r.fields)
	trailers := maps.Clone(r.header)
	for _, h := range []http.Header{before, trailers} {
		maps.DeleteFunc(h, func(name string, _ []string) bool { return !r.isTrailer(name) })
	}
	r.trailers = new(headerRoom).difference(before, trailers)
}

func (r *recorder) isTrailer(name string) bool {
	return strings.HasPrefix(name, http.TrailerPrefix) || slices.Contains(r.declared, name)
}

// complete reports whether the recorder has the whole response: it was neither
// too large nor cut short.
func (r *recorder) complete() bool {
	return !r.overflow && (r.length < 0 || !bodyAllowed(r.status) || r.body.size == r.length)
}

// send lets the finished response through.
func (r *recorder) send() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.streaming {
		r.streaming = true
		r.resetHeaderLocked(r.fields)
		announceTrailers(r.header, r.trailers)
		r.sendLocked()
		applyFields(r.header, r.trailers) // where the handler has them while it streams
	}
	r.body.free()
}

// drop ends the handler's access without sending what was held back. It reports
// whether the header has gone out before.
func (r *recorder) drop() (streaming bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.body.free()
	if !r.streaming {
		r.resetHeaderLocked(nil)
	}
	return r.streaming
}

// encode appends the stored form of the finished response to scratch: all of it
// if whole is set or it is small, and otherwise only its beginning, which parts
// follow. It returns nil when the headers are too large.
func (r *recorder) encode(scratch, digest []byte, keep func(name string) bool, whole bool) (value []byte, parts [][]byte) {
	markTransient(r.fields, keep, r.connection, r.body.size)
	markTransient(r.trailers, keep, r.connection, -1)
	chunks := r.body.chunks
	if !whole && r.body.size > maxPacked {
		chunks, parts = chunks[:1], slices.Clone(chunks[1:])
	}
	return encodeResponse(scratch, r.status, digest, r.fields, r.trailers, r.body.size, chunks), parts
}

// recordedBody is a body in chunks: a small one that is pooled, which most
// bodies fit into, then larger ones, which a MemoryStore keeps as they are.
// Growing one buffer by doubling costs five times as much at 1 MiB.
type recordedBody struct {
	chunks [][]byte
	first  [1][]byte // backing of chunks for a small body
	size   int64

	// lent: a Write of a chunk has failed. net/http's HTTP/2 returns from one
	// while a frame of it may still be on its way, so it is not used again.
	lent bool
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
	if b.chunks != nil && !b.lent {
		smallChunks.Put((*[smallChunk]byte)(b.chunks[0][:smallChunk]))
	}
	*b = recordedBody{}
}
