package idempotency

import (
	"maps"
	"net/http"
	"reflect"
	"slices"
)

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

// A writerState is what the ResponseWriter that the middleware was given tells
// about itself. The writers of gin, chi, negroni and gorilla/handlers tell
// whether they were written to.
type writerState struct {
	written bool
	size    int // of the body, or a negative number
	status  int
}

// stateOf asks w and the writers that it wraps. Every writer that tells more
// has a Status too, so the writer of net/http costs only two failed assertions.
func stateOf(w http.ResponseWriter) (s writerState) {
	for w != nil {
		if t, ok := w.(interface{ Status() int }); ok {
			s.add(t)
		}
		t, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = t.Unwrap()
	}
	return s
}

// add adds what one writer says. The status is that of the outermost writer.
func (s *writerState) add(w interface{ Status() int }) {
	if s.status == 0 {
		s.status = w.Status()
	}
	if t, ok := w.(interface{ Written() bool }); ok && t.Written() {
		s.written = true
	}
	switch t := w.(type) {
	case interface{ Size() int }: // gin: -1 until the header has gone out
		s.size += t.Size()
	case interface{ BytesWritten() int }:
		s.size += t.BytesWritten()
	}
}

// since reports whether the state says, and before did not, that w was written
// to. A status alone says so only if it has changed: that of gin is 200 from
// the beginning. A 1xx does not count, because it does not end a response.
func (s writerState) since(before writerState) bool {
	return s.written && !before.written || s.size > before.size || s.status != before.status && s.status >= 200
}

// committed looks in w and the writers that it wraps for a Response of echo. It
// reads two fields, because that type has no methods for them. Reading them
// costs more than a call, so it is done only after a handler that wrote
// nothing.
func committed(w http.ResponseWriter) (status int, ok bool) {
	if v := reflect.Indirect(reflect.ValueOf(w)); v.Kind() == reflect.Struct {
		c, s := v.FieldByName("Committed"), v.FieldByName("Status")
		if c.Kind() == reflect.Bool && c.Bool() && s.Kind() == reflect.Int {
			return int(s.Int()), true
		}
	}
	if t, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
		return committed(t.Unwrap())
	}
	return 0, false
}

// lookAroundLocked asks w whether the handler wrote to it, around the recorder.
// What reached the client then is not known. The header of the response has
// gone out, or is about to, so no other answer can take its place.
//
// A panic of w tells nothing about the handler, and must not undo a handler
// that has finished.
func (r *recorder) lookAroundLocked() {
	defer r.late.contain(r.late.request, r.late.storeKey, "a method of the outer ResponseWriter")
	now := stateOf(r.w)
	status, ok := committed(r.w)
	switch {
	case now.since(r.before):
		status = now.status
	case !ok:
		return
	}
	if status < 200 || status > 999 {
		status = http.StatusOK // what net/http sends for a writer without a status
	}
	r.wroteNothing, r.wroteAround, r.streaming, r.status = false, true, true, status
}

// lookAtHeader looks for an answer around the recorder where w tells nothing of
// itself, as the writer of net/http does. A header of w that changed while the
// handler ran, and that the recorder did not change, goes to this client and
// would be missing from a replay. It mostly comes with a status and a body, of
// which nothing is known: the recorder has no status then.
//
// It is not asked about a handler whose context has ended. An outer timeout may
// have answered for that one.
func (r *recorder) lookAtHeader() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.wroteNothing || r.calling {
		return
	}
	defer r.late.contain(r.late.request, r.late.storeKey, "Header of the outer ResponseWriter")
	if !maps.EqualFunc(r.w.Header(), r.outer, slices.Equal) {
		r.wroteNothing, r.wroteAround, r.streaming, r.status = false, true, true, 0
	}
}
