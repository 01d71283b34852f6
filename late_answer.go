package idempotency

import (
	"context"
	"errors"
	"net/http"
)

// errAfterReturn is the error of a Write once the handler has returned. The
// record is complete by then, and a write that the client got but the record
// did not have would make the replay another response.
var errAfterReturn = errors.New("idempotency: write after the handler returned")

// A lateAnswer is what a framework writes when the handler has returned. Echo
// answers an error that a handler returns after all middleware has returned, and
// a panic after its Recover. The client of a handler that wrote nothing gets
// that answer, as it does without this middleware. It is never recorded.
//
// The writer of net/http must not be used when the request is over, for then it
// may write into another response. The context of the request ends before that.
// Outer middleware that ends the context earlier, a timeout that has returned,
// costs the client the late answer.
type lateAnswer struct {
	*middleware
	storeKey string
	request  context.Context // as the middleware got it

	open bool // what is written goes to the client
	kept bool // a retry gets an empty 200
	told bool // the log has it
}

// answerLateLocked hands a call after the end of the handler to w, or refuses
// it. It fixes the header of a handler that panicked.
func (r *recorder) answerLateLocked(status int, call func(w http.ResponseWriter)) error {
	l := &r.late
	if !l.open {
		return errAfterReturn
	}
	r.waitLocked() // for another part of the answer
	if l.kept && !l.told {
		l.told = true
		r.callLocked(func(http.ResponseWriter) {
			l.mistake(l.request, l.storeKey, "an answer came after the handler had returned, and retries get an empty 200", status)
		})
	}
	if l.request.Err() != nil {
		return errAfterReturn
	}
	if !r.sent.Load() {
		applyFields(r.w.Header(), new(headerScratch).difference(r.outer, r.header))
		r.sent.Store(true)
	}
	r.callLocked(call)
	return nil
}

// writeLateLocked is Write after the end of the handler.
func writeLateLocked[T []byte | string](r *recorder, p T) (n int, err error) {
	if late := r.answerLateLocked(http.StatusOK, func(w http.ResponseWriter) { n, err = w.Write([]byte(p)) }); late != nil {
		return 0, late
	}
	return n, err
}

// flushLateLocked is Flush after the end of the handler.
func (r *recorder) flushLateLocked() (err error) {
	late := r.answerLateLocked(http.StatusOK, func(w http.ResponseWriter) { err = http.NewResponseController(w).Flush() })
	return errors.Join(late, err)
}
