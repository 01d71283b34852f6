package idempotency

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

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
	before  writerState // what w said of itself at the beginning
	scratch headerScratch

	mu               sync.Mutex // guards what follows, against goroutines the handler leaves behind
	changed          sync.Cond  // calling is false again, or closed true
	calling          bool       // a goroutine is in a call of w, without the lock
	wroteHeader      bool
	implicit         bool // the handler did not call WriteHeader
	wroteNothing     bool // the handler did not write at all
	wroteAround      bool // the handler wrote to w, around the recorder
	status           int
	length           int64           // declared by the handler, or -1
	declared         map[string]bool // names of trailers
	connection       map[string]bool // names in the Connection header
	sniff            bool            // net/http will sniff the Content-Type
	fields           []headerField   // what the handler changed
	trailersInHeader http.Header     // values of trailers that the header has already
	trailers         []headerField   // what the handler changed of its trailers since
	body             recordedBody
	written          int64 // bytes that the handler wrote, refused or not
	streaming        bool  // the header has gone out
	overflow         bool  // the body is not kept any more
	closed           bool  // the handler has ended
	dropped          bool  // what the recorder holds is not sent any more
	late             lateAnswer
}

// init makes the zero recorder record what goes to w.
func (r *recorder) init(w http.ResponseWriter, proto int, limit int64) {
	r.w, r.proto, r.limit, r.length = w, proto, limit, -1
	r.changed.L = &r.mu
	r.before = stateOf(w)
	// A map of its own: the header of w is written to when the response goes
	// out, and a goroutine that flushes must not meet one that sets a trailer.
	if outer := w.Header(); len(outer) > 0 {
		r.header, r.outer = outer.Clone(), outer.Clone()
	} else {
		r.header = make(http.Header)
	}
}

// lock takes the lock for a call of the handler. It waits while another
// goroutine is in a call of w: w sees one call at a time, in the order of the
// record. When the handler ends meanwhile, the call came too late.
func (r *recorder) lock() {
	r.mu.Lock()
	for r.calling && !r.closed {
		r.changed.Wait()
	}
}

// waitLocked waits until no goroutine is in a call of w.
func (r *recorder) waitLocked() {
	for r.calling {
		r.changed.Wait()
	}
}

// callLocked calls w without the lock. A client that does not read holds such a
// call up for as long as it likes. The end of the handler, a panic above all,
// takes only the lock, so it does not wait for that client. A caller of
// callLocked makes the record complete before the call, and looks at closed and
// dropped after it.
func (r *recorder) callLocked(call func(w http.ResponseWriter)) {
	r.calling = true
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.calling = false
		r.changed.Broadcast()
	}()
	call(r.w)
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
	r.lock()
	defer r.mu.Unlock()
	if r.closed {
		_ = r.answerLateLocked(status, func(w http.ResponseWriter) { w.WriteHeader(status) })
		return
	}
	if r.wroteHeader {
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
	r.callLocked(func(w http.ResponseWriter) { w.WriteHeader(status) })
	if r.dropped {
		return // the header belongs to the answer in the place of the handler's
	}
	changed := new(headerScratch).difference(sent, h)
	// The handler may take back what it sent with the 1xx, so the header of w
	// is again what it was before.
	clear(h)
	maps.Copy(h, before)
	applyFields(h, changed)
	if r.closed {
		return // the difference has been made
	}
	if r.outer == nil {
		r.outer = make(http.Header)
	}
	applyFields(r.header, cloneFields(changed))
	applyFields(r.outer, cloneFields(changed))
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
	r.connection, r.declared = namesIn(r.header["Connection"]), namesIn(r.header["Trailer"])
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

// sets reports whether the handler has set a header that goes out.
func (r *recorder) sets(name string) bool {
	return slices.ContainsFunc(r.fields, func(f headerField) bool { return f.name == name && len(f.values) > 0 })
}

// Write implements http.ResponseWriter. While the response is kept, it does not
// report that the client is gone: the client may come again for it, and a
// handler that stopped at the error would leave half of its work. Past the
// limit it reports the error, so that an endless stream ends.
func (r *recorder) Write(p []byte) (int, error) {
	r.lock()
	defer r.mu.Unlock()
	return recordLocked(r, p)
}

// WriteString implements io.StringWriter.
func (r *recorder) WriteString(s string) (int, error) {
	r.lock()
	defer r.mu.Unlock()
	return recordLocked(r, s)
}

// recordLocked is Write under the lock. It refuses what net/http refuses, and
// with the same errors, in the same order.
func recordLocked[T []byte | string](r *recorder, p T) (int, error) {
	if r.closed {
		return writeLateLocked(r, p)
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
		r.overflow = true // before the calls of w: the handler may end meanwhile
		if !r.streaming {
			r.startStreamLocked()
			r.sendLocked()
		}
		if r.dropped {
			return 0, errAfterReturn
		}
		r.body.free()
	}
	if r.overflow {
		return writeLocked(r, p)
	}
	appendBody(&r.body, p)
	if r.streaming {
		_, _ = writeLocked(r, p)
	}
	return len(p), nil
}

// writeLocked writes p to w.
func writeLocked[T []byte | string](r *recorder, p T) (n int, err error) {
	r.callLocked(func(w http.ResponseWriter) { n, err = w.Write([]byte(p)) })
	return n, err
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
	r.lock()
	defer r.mu.Unlock()
	if r.closed {
		return r.flushLateLocked()
	}
	if !canFlush(r.w) {
		return http.ErrNotSupported
	}
	r.needHeaderLocked()
	if !r.streaming {
		r.startStreamLocked()
		r.fixContentTypeLocked() // before the calls of w: the handler may end meanwhile
		r.sendLocked()
		if r.dropped {
			return errAfterReturn
		}
	}
	err := r.flushLocked()
	if !r.overflow && !errors.Is(err, http.ErrNotSupported) {
		return nil // as for Write
	}
	return err
}

// flushLocked flushes w.
func (r *recorder) flushLocked() (err error) {
	r.callLocked(func(w http.ResponseWriter) { err = http.NewResponseController(w).Flush() })
	return err
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

// startStreamLocked hands the header to w. The fields are not stored yet, so
// outer middleware, which may change values in place, gets copies.
func (r *recorder) startStreamLocked() {
	r.streaming = true
	applyFields(r.w.Header(), cloneFields(r.fields))
}

// sendLocked calls WriteHeader only if the handler did: outer middleware, one
// that compresses, say, treats an implied header in its own way. It stops when
// the response is dropped meanwhile.
func (r *recorder) sendLocked() {
	if status := r.status; !r.implicit {
		r.callLocked(func(w http.ResponseWriter) { w.WriteHeader(status) })
	}
	for _, chunk := range r.body.chunks {
		if r.dropped {
			return
		}
		if _, err := writeLocked(r, chunk); err != nil {
			r.body.mayBeInUse = true
			return // the client is gone
		}
	}
}
