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
	w     http.ResponseWriter
	proto int      // major version of HTTP
	limit int64    // how much of the body is kept
	outer []string // names that outer middleware had set at the beginning

	mu          sync.Mutex  // guards what follows, against goroutines the handler leaves behind
	header      http.Header // the handler's own, so that what it drops never reaches w
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

func newRecorder(w http.ResponseWriter, proto int, limit int64) *recorder {
	r := &recorder{w: w, proto: proto, limit: limit, length: -1, header: make(http.Header)}
	for name, values := range w.Header() {
		r.header[name] = slices.Clone(values)
		r.outer = append(r.outer, name)
	}
	return r
}

// Header implements http.ResponseWriter. The map begins as a copy of what outer
// middleware has set.
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

// informLocked sends a 1xx response, with the handler's header as it is now.
func (r *recorder) informLocked(status int) {
	h := r.w.Header()
	outer := maps.Clone(h)
	clear(h)
	maps.Copy(h, r.header)
	r.w.WriteHeader(status)
	clear(h)
	maps.Copy(h, outer)
}

// writeHeaderLocked fixes the status and the header, as net/http does.
func (r *recorder) writeHeaderLocked(status int) {
	r.wroteHeader, r.status = true, status
	r.fields = headerDifference(r.w.Header(), r.header, r.outer)
	if declared := r.header.Get("Content-Length"); declared != "" {
		n, err := strconv.ParseInt(declared, 10, 64)
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

// headerDifference returns what turns base into header, where the handler could
// have deleted only what is in outer. The values are copied: the handler may go
// on changing its map.
func headerDifference(base, header http.Header, outer []string) []headerField {
	count := 0
	for _, values := range header {
		count += len(values)
	}
	backing := make([]string, 0, count)
	fields := make([]headerField, 0, len(header))
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
	for _, name := range outer {
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

// streamLocked sends what was held back.
func (r *recorder) streamLocked() {
	if r.streaming {
		return
	}
	r.streaming = true
	r.sendLocked()
}

func (r *recorder) sendLocked() {
	h := r.w.Header()
	for i := range r.fields {
		r.fields[i].apply(h)
	}
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
	for i := range r.fields {
		found = found || r.isTrailer(r.fields[i].name)
	}
	if !found {
		return
	}
	before := r.w.Header()
	if !r.streaming {
		before = maps.Clone(before)
		for i := range r.fields {
			r.fields[i].apply(before)
		}
	}
	names := slices.DeleteFunc(slices.Collect(maps.Keys(before)), func(name string) bool { return !r.isTrailer(name) })
	trailers := maps.Clone(r.header)
	maps.DeleteFunc(trailers, func(name string, _ []string) bool { return !r.isTrailer(name) })
	r.trailers = headerDifference(before, trailers, names)
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
	h := r.w.Header()
	if !r.streaming {
		announceTrailers(h, r.trailers)
		r.streaming = true
		r.sendLocked()
	}
	for i := range r.trailers {
		r.trailers[i].apply(h)
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
	return r.streaming
}

// encode returns the stored form of the finished response, or nil when its
// headers are too large.
func (r *recorder) encode(digest []byte, keep func(name string) bool) []byte {
	markTransient(r.fields, keep, r.connection, r.body.size)
	markTransient(r.trailers, keep, r.connection, -1)
	return encodeResponse(r.status, digest, r.fields, r.trailers, r.body.chunks)
}

// recordedBody is a body in pooled chunks. Small first, then large: growing one
// buffer by doubling costs five times as much at 1 MiB, and a chunk of one size
// can go back to its pool whatever the body was.
type recordedBody struct {
	chunks [][]byte
	size   int64

	// lent: a Write of a chunk has failed. net/http's HTTP/2 returns from one
	// while a frame of it may still be on its way, so it is not used again.
	lent bool
}

const (
	smallChunk = 4 << 10
	largeChunk = 32 << 10
)

var (
	smallChunks = sync.Pool{New: func() any { return new([smallChunk]byte) }}
	largeChunks = sync.Pool{New: func() any { return new([largeChunk]byte) }}
)

func appendBody[T []byte | string](b *recordedBody, p T) {
	b.size += int64(len(p))
	for len(p) > 0 {
		last := len(b.chunks) - 1
		if last < 0 || len(b.chunks[last]) == cap(b.chunks[last]) {
			b.chunks = append(b.chunks, newChunk(last < 0))
			last++
		}
		chunk := b.chunks[last]
		n := copy(chunk[len(chunk):cap(chunk)], p)
		b.chunks[last] = chunk[:len(chunk)+n]
		p = p[n:]
	}
}

func newChunk(small bool) []byte {
	if small {
		return smallChunks.Get().(*[smallChunk]byte)[:0]
	}
	return largeChunks.Get().(*[largeChunk]byte)[:0]
}

// free gives the chunks back.
func (b *recordedBody) free() {
	for _, chunk := range b.chunks {
		switch {
		case b.lent:
		case cap(chunk) == smallChunk:
			smallChunks.Put((*[smallChunk]byte)(chunk[:smallChunk]))
		default:
			largeChunks.Put((*[largeChunk]byte)(chunk[:largeChunk]))
		}
	}
	*b = recordedBody{}
}
