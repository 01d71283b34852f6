package idempotency

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// errAfterReturn is the error of a Write once the handler has returned. The
// record is complete by then, and a write that the client got but the record
// did not have would make the replay another response.
var errAfterReturn = errors.New("idempotency: write after the handler returned")

// A recorder is the ResponseWriter of a handler under a key. It holds the
// response back until the store has it. Once the handler flushes, or writes
// more than is kept, the recorder lets the response through as it is written.
//
// net/http's own ResponseWriter is the reference for everything a handler can
// observe. There is no Unwrap, which would let writes bypass the record, and no
// Hijack: http.ResponseController reports http.ErrNotSupported.
type recorder struct {
	w       http.ResponseWriter
	proto   int         // major version of HTTP
	limit   int64       // how many bytes of the body are kept
	header  http.Header // the handler's own, until it is sent to that of w
	outer   http.Header // what outer middleware had set at the beginning
	sent    atomic.Bool // Header returns that of w
	scratch headerScratch

	mu               sync.Mutex // guards what follows, against goroutines the handler leaves behind
	wroteHeader      bool
	implicit         bool // the handler did not call WriteHeader
	wroteNothing     bool // the handler did not write at all
	status           int
	length           int64         // declared by the handler, or -1
	declared         []string      // names of trailers
	connection       []string      // values of the Connection header
	sniff            bool          // net/http will sniff the Content-Type
	fields           []headerField // what the handler changed
	trailersInHeader http.Header   // values of trailers that the header has already
	trailers         []headerField // what the handler changed of its trailers since
	body             recordedBody
	written          int64 // bytes that the handler wrote, refused or not
	streaming        bool  // the header has gone out
	overflow         bool  // the body is not kept any more
	closed           bool
}

// init makes the zero recorder record what goes to w.
func (r *recorder) init(w http.ResponseWriter, proto int, limit int64) {
	r.w, r.proto, r.limit, r.length = w, proto, limit, -1
	// A map of its own: the header of w is written to when the response goes
	// out, and a goroutine that flushes must not meet one that sets a trailer.
	if outer := w.Header(); len(outer) > 0 {
		r.header, r.outer = outer.Clone(), outer.Clone()
	} else {
		r.header = make(http.Header)
	}
}

// A headerScratch holds the usual header without an allocation.
type headerScratch struct {
	fields [4]headerField
	values [4]string
}

// Header implements http.ResponseWriter. While the finished response goes out,
// w may call hooks of outer middleware that was handed this writer, to be
// called before the header is sent. What such a hook sets must reach w, so it
// gets the header of w.
func (r *recorder) Header() http.Header {
	if r.sent.Load() {
		return r.w.Header()
	}
	return r.header
}

// WriteHeader implements http.ResponseWriter. As in net/http, the first call
// counts, and an impossible status panics: a program that is wrong without this
// middleware is wrong in the same way with it.
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

// informLocked sends a 1xx response with the header as it is now. It is not
// recorded: a replay has nothing to inform of. Outer middleware may change the
// header on the way. Those changes go into all three headers, so that they do
// not count as differences that the handler made.
func (r *recorder) informLocked(status int) {
	h := r.w.Header()
	before := h.Clone()
	applyFields(h, new(headerScratch).difference(r.outer, r.header))
	sent := h.Clone()
	r.w.WriteHeader(status)
	changed := new(headerScratch).difference(sent, h)
	// The handler may take back what it sent with the 1xx, so the header of w
	// is again what it was before.
	clear(h)
	maps.Copy(h, before)
	if r.outer == nil {
		r.outer = make(http.Header)
	}
	for _, header := range []http.Header{h, r.header, r.outer} {
		applyFields(header, cloneFields(changed))
	}
}

// writeHeaderLocked fixes the status and the header, as net/http does: what the
// handler changes afterwards, trailers excepted, has no effect.
func (r *recorder) writeHeaderLocked(status int) {
	r.wroteHeader, r.status = true, status
	r.fields = r.scratch.difference(r.outer, r.header)
	if declared := r.header["Content-Length"]; len(declared) > 0 && declared[0] != "" {
		n, err := strconv.ParseInt(declared[0], 10, 64)
		if err != nil || n < 0 {
			r.header.Del("Content-Length") // w does the same, and says so in its log
		} else {
			r.length = n
		}
	}
	// A header that is there without a value tells net/http not to sniff.
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
	r.trailersInHeader = r.trailersLocked()
	if r.sniff && r.proto == 1 && r.header.Get("Transfer-Encoding") != "" {
		// HTTP/1 does not sniff then. A replay, which has no Transfer-Encoding
		// of the handler's, must not either.
		r.sniff = false
		r.fields = append(r.fields, headerField{op: opSet, name: "Content-Type"})
	}
}

// needHeaderLocked is what net/http does for a handler that does not call
// WriteHeader.
func (r *recorder) needHeaderLocked() {
	if !r.wroteHeader {
		r.implicit = true
		r.writeHeaderLocked(http.StatusOK)
	}
}

// difference returns what turns base into header. The values are copied: the
// handler may go on changing them. A list that begins with the values of base
// is an opAdd, so that a Vary of outer middleware is not stored and replayed
// twice.
func (s *headerScratch) difference(base, header http.Header) []headerField {
	backing, fields := s.values[:0], s.fields[:0]
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

// sets reports whether the handler has set a header that goes out.
func (r *recorder) sets(name string) bool {
	return slices.ContainsFunc(r.fields, func(f headerField) bool { return f.name == name && len(f.values) > 0 })
}

// Write implements http.ResponseWriter. While the response is kept, it does not
// report that the client is gone: the client may come again for it, and a
// handler that stopped at the error would leave half of its work. Past the
// limit it reports the error, so that an endless stream ends.
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

// recordLocked is Write under the lock. It refuses what net/http refuses, and
// with the same errors, in the same order.
func recordLocked[T []byte | string](r *recorder, p T) (int, error) {
	if r.closed {
		return 0, errAfterReturn
	}
	r.needHeaderLocked()
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
	// The kept part goes out and is then dropped: a part of a body is no
	// replay, and a handler that streams gigabytes must not hold them.
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

// bodyAllowed reports whether a response with the status may have a body (RFC
// 9110, section 6.4.1).
func bodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}

// Flush implements http.Flusher.
func (r *recorder) Flush() { _ = r.FlushError() }

// FlushError is what http.ResponseController calls. From here on the response
// is sent as it is written, and still recorded. A writer that cannot flush
// changes nothing: the response would otherwise be streamed, and could not be
// withheld, for no use.
func (r *recorder) FlushError() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errAfterReturn
	}
	if !canFlush(r.w) {
		return http.ErrNotSupported
	}
	r.needHeaderLocked()
	if !r.streaming {
		r.streamLocked()
		r.fixContentTypeLocked()
	}
	err := http.NewResponseController(r.w).Flush()
	if !r.overflow && !errors.Is(err, http.ErrNotSupported) {
		return nil // as for Write
	}
	return err
}

// canFlush reports whether http.ResponseController finds a Flush. It looks
// before the header is sent; asking the controller itself would flush.
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

// fixContentTypeLocked records the Content-Type that net/http finds out at a
// flush. net/http sniffs what is there at the first flush. A replay has the
// whole body at once and could come to another type.
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

// streamLocked sends what was held back. The fields are not stored yet, so
// outer middleware, which may change values in place, gets copies.
func (r *recorder) streamLocked() {
	if r.streaming {
		return
	}
	r.streaming = true
	applyFields(r.w.Header(), cloneFields(r.fields))
	r.sendLocked()
}

// sendLocked calls WriteHeader only if the handler did: outer middleware, one
// that compresses, say, treats an implied header in its own way.
func (r *recorder) sendLocked() {
	if !r.implicit {
		r.w.WriteHeader(r.status)
	}
	for _, chunk := range r.body.chunks {
		if _, err := r.w.Write(chunk); err != nil {
			r.body.mayBeInUse = true
			return // the client is gone
		}
	}
}

// finish ends the handler's access: what is written from now on is neither sent
// nor recorded. The header is fixed here at the latest, and then the trailers.
func (r *recorder) finish() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wroteNothing = !r.wroteHeader
	r.needHeaderLocked()
	r.closed = true
	if now := r.trailersLocked(); now != nil || r.trailersInHeader != nil {
		r.trailers = new(headerScratch).difference(r.trailersInHeader, now)
	}
}

// trailersLocked returns a copy of what the header has of trailers, or nil.
func (r *recorder) trailersLocked() (trailers http.Header) {
	for name, values := range r.header {
		if r.isTrailer(name) {
			if trailers == nil {
				trailers = make(http.Header)
			}
			trailers[name] = slices.Clone(values)
		}
	}
	return trailers
}

// isTrailer reports whether net/http would send a header as a trailer: one that
// the handler declared, or one with http.TrailerPrefix.
func (r *recorder) isTrailer(name string) bool {
	return strings.HasPrefix(name, http.TrailerPrefix) || slices.Contains(r.declared, name)
}

// complete reports whether the recorder has the whole response. It has not when
// the response was too large, or shorter than its Content-Length.
func (r *recorder) complete() bool {
	return !r.overflow && (r.length < 0 || !bodyAllowed(r.status) || r.body.size == r.length)
}

// send sends the finished response to the client. Its chunks are free
// afterwards: encode has copied them, or a MemoryStore has taken the larger
// ones.
func (r *recorder) send() {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.w.Header()
	if !r.streaming {
		r.streaming = true
		applyFields(h, r.fields)
		announceTrailers(h, r.trailers)
		// From here on a hook of outer middleware works on the header of w.
		r.sent.Store(true)
		r.sendLocked()
		if r.implicit && !r.wroteNothing && r.body.size == 0 {
			_, _ = r.w.Write(nil) // as the handler did
		}
	}
	applyFields(h, r.trailers)
	r.body.free()
}

// drop ends the handler's access without sending what was held back. It reports
// whether the header has gone out before.
func (r *recorder) drop() (streaming bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.body.free()
	return r.streaming
}

// encode appends the stored form of the finished response to scratch. With
// whole, or if the response is small, that is all of it. Otherwise value is
// only its beginning, and parts follow, which spares a large body a copy.
// encode returns nil when the headers are too large.
func (r *recorder) encode(scratch, digest []byte, keep func(name string) bool, whole bool) (value []byte, parts [][]byte) {
	markTransient(r.fields, keep, r.connection, r.body.size)
	// A Content-Length among the trailers is not the length of anything, so
	// none is kept: -1 is never equal to it.
	markTransient(r.trailers, keep, r.connection, -1)
	chunks := r.body.chunks
	if !whole && r.body.size > maxPacked {
		chunks, parts = chunks[:1], slices.Clone(chunks[1:])
	}
	status := r.status
	if r.implicit && (r.wroteNothing || r.body.size > 0) {
		status = implicitStatus // not after a Write of nothing or a Flush, which are not repeated
	}
	return encodeResponse(scratch, status, digest, r.fields, r.trailers, r.body.size, chunks), parts
}
