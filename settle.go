package idempotency

import (
	"context"
	"errors"
	"net/http"
	"time"
)

// facts are what is known about a run that has ended. facts.verdict decides from
// them what a retry gets, and settlement.answer what the client gets.
type facts struct {
	atMostOnce bool // Options.AtMostOnce
	committed  bool // Execution.Commit succeeded
	discarded  bool // Execution.Discard was called
	attached   bool // Execution.Attach was called
	unanswered bool // the handler wrote nothing; its context ended or the body broke off
	cutOff     bool // the body broke off under the handler, without Options.AtMostOnce
	final      bool // ShouldStore says that the response is final
	status     int  // what the response counts as, which for gRPC is not its HTTP status
}

// A verdict is what a retry of the request gets.
type verdict uint8

const (
	retryRuns          verdict = iota // the handler runs again
	retryReplays                      // the stored response
	retryLearnsStatus                 // response_not_stored, with the status
	retryLearnsNothing                // outcome_unknown
)

// verdict decides by the first rule that applies. Commit counts before Discard,
// and both count before ShouldStore. AtMostOnce changes only the default of
// ShouldStore.
//
// A run without an answer may have done any part of its work. A retry of it
// runs only if its transaction is rolled back, the handler called Discard, or
// the body had broken off under the handler.
func (f facts) verdict() verdict {
	switch {
	case f.committed && f.unanswered:
		return retryLearnsNothing
	case f.committed:
		return retryReplays
	case f.unanswered && f.attached && !f.atMostOnce: // what is attached is rolled back
		return retryRuns
	case f.discarded:
		return retryRuns
	case f.unanswered && f.cutOff:
		return retryRuns
	case f.cutOff && f.status >= 400:
		return retryRuns
	case f.unanswered:
		return retryLearnsNothing
	case !f.final:
		return retryRuns
	case f.cutOff: // a retry with the whole body must not get the answer to a part
		return retryLearnsStatus
	}
	return retryReplays
}

// A storeReport is what the store made of a verdict.
type storeReport struct {
	err  error // of Complete or Release
	lost bool  // a renewal found that the key is not ours any more
	over bool  // the lease is over by our clock
}

// An answer is what the client gets.
type answer struct {
	outcome Outcome
	problem *Error // replaces the handler's response if not nil
	err     error  // for the event
	storing bool   // the response goes out before it is stored
}

// Details that replace that of ErrStoreUnavailable, which says that the handler
// did not run.
const (
	unknownDetail = "Whether the request was processed is not known. Repeat it later with the same key to find out."
	undoneDetail  = "This attempt was given up, and what it did was undone. Repeat it later with the same key."
)

// answer decides what the client gets, by the first rule that applies. When
// another owner may store a different response, a response that is not stored
// is withheld, unless the handler called Commit. When the transaction of a
// response that was to be stored may not have been committed, the response is
// withheld.
//
// When a key was freed under a lost or overdue lease, another request may be
// running its handler, so the client is told to ask again later. Any other
// response that the store did not take is still sent: the handler has finished,
// and completeLater goes on storing it.
func (s *settlement) answer(v verdict, r storeReport) answer {
	f := &s.facts
	rolledBack := errors.Is(r.err, ErrRolledBack)
	runs := v == retryRuns
	switch {
	case runs && (r.lost || r.over):
		return s.withhold(OutcomeLeaseLost, ErrInProgress, ErrLeaseLost, "")
	case runs && f.unanswered && f.cutOff:
		return s.withhold(OutcomeReleased, ErrBodyIncomplete, r.err, "")
	case runs && f.unanswered && r.err == nil:
		return s.withhold(OutcomeReleased, ErrStoreUnavailable, s.cause, undoneDetail)
	case runs && f.unanswered:
		return s.withhold(OutcomeReleased, ErrStoreUnavailable, errors.Join(s.cause, r.err), unknownDetail)
	case runs:
		return answer{outcome: OutcomeReleased, err: r.err}
	case r.err == nil && f.unanswered:
		return s.withhold(OutcomeOutcomeUnknown, ErrOutcomeUnknown, s.cause, "")
	case r.err == nil:
		return answer{outcome: OutcomeExecuted, err: s.notStored}
	case errors.Is(r.err, ErrLeaseLost) || r.lost && (rolledBack || !f.committed):
		return s.withhold(OutcomeLeaseLost, ErrInProgress, r.err, "")
	case rolledBack && !f.committed:
		return s.withhold(OutcomeStoreUnavailable, ErrStoreUnavailable, r.err, undoneDetail)
	case rolledBack || f.attached:
		return s.withhold(OutcomeStoreUnavailable, ErrStoreUnavailable, r.err, unknownDetail)
	case f.unanswered:
		a := s.withhold(OutcomeOutcomeUnknown, ErrOutcomeUnknown, s.cause, "")
		a.storing = true
		return a
	}
	return answer{outcome: OutcomeExecuted, err: r.err, storing: true}
}

// withhold makes an answer that replaces the handler's response. An empty
// detail leaves that of the problem.
func (s *settlement) withhold(outcome Outcome, sentinel, cause error, detail string) answer {
	p := s.problem(sentinel, cause)
	if detail != "" {
		p.Detail = detail
	}
	return answer{outcome: outcome, problem: p}
}

// A settlement turns a finished run into an answer for the client. It gathers
// the facts, takes the verdict, calls the store, and then answers. A retry must
// be able to get what the client has seen, so the store comes first.
type settlement struct {
	*middleware
	request   *request
	claim     *claim
	lease     *lease
	execution *Execution
	context   *handlerContext
	recorder  *recorder

	facts     facts
	digest    []byte // of a request body that is not in the fingerprint
	cause     error  // why the handler's context ended
	notStored error  // why the stored form is not the response
}

// settle makes the facts from what the handler left behind, and settles them.
// The lease is renewed until the result is ready for the store: encoding and
// sealing a large response takes time too.
func (s *settlement) settle() answer {
	s.gather()
	v := s.facts.verdict()
	if v == retryRuns {
		return s.free(v)
	}
	if s.facts.unanswered { // half a transaction must not be kept
		s.facts.attached = false
		s.execution.detach()
		s.context.cancel(nil)
	}
	return s.keep(v)
}

// gather makes the facts. It ends the handler's access to the execution, the
// body and the recorder, so that nothing changes the facts afterwards. The 200
// of a handler without an answer is the recorder's own, so ShouldStore is not
// asked about it.
func (s *settlement) gather() {
	f := &s.facts
	f.atMostOnce = s.opts.AtMostOnce
	f.committed, f.discarded, f.attached = s.execution.end()
	digest, broken := s.request.body.finish()
	s.recorder.finish()
	s.digest, f.status = digest, effectiveStatus(s.recorder.status, s.recorder.header)
	f.cutOff = broken && !f.atMostOnce && !s.recorder.wroteAround
	f.unanswered = (s.recorder.wroteNothing || s.mayBeAnsweredFor()) && (broken || s.context.hasEnded())
	if !f.unanswered {
		s.recorder.lookAtHeader()
	}
	switch {
	case f.unanswered:
		s.cause = context.Cause(s.context)
	case s.recorder.wroteAround:
		// The status may be that of an outer timeout, which has answered in the
		// place of the handler, so it must not free the key.
		f.final = true
		s.mistake(s.request.r.Context(), s.claim.storeKey, "the handler answered around the middleware, and retries get 409 response_not_stored", s.recorder.status)
	case !f.committed && !f.discarded: // which decide before ShouldStore
		f.final = s.shouldStore()
	}
}

// mayBeAnsweredFor reports whether a failure that was written around the
// middleware may be that of an outer timeout. A handler that gave up then has an
// attached transaction that is half done. To roll it back is right even if the
// failure is the handler's own.
func (s *settlement) mayBeAnsweredFor() bool {
	return s.recorder.wroteAround && s.facts.attached && s.facts.status >= 400
}

// shouldStore asks Options.ShouldStore. The handler has finished, so a panic in
// ShouldStore must not make the request run again.
func (s *settlement) shouldStore() (final bool) {
	if s.opts.ShouldStore == nil {
		return !s.saysNothingWasDone() && (s.facts.status < 500 || s.opts.AtMostOnce)
	}
	final = true
	defer s.contain(s.request.r.Context(), s.claim.storeKey, "ShouldStore")
	return s.opts.ShouldStore(s.recorder.status, s.recorder.header)
}

// saysNothingWasDone reports whether the response says that the handler did
// nothing yet, or nothing for this client. A retry with other credentials, or
// later, may succeed, so storing such a response would lock the client out of
// its own key.
//
// A conflict with Retry-After is what this package answers while another
// request is running, and the handler may be a proxy to a service that uses
// this package too. When outer middleware has set that header, the handler has
// not said so.
func (s *settlement) saysNothingWasDone() bool {
	switch s.facts.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired,
		http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	case http.StatusConflict:
		return s.recorder.sets("Retry-After")
	}
	return false
}

// free frees the key. Another owner counts only if it was seen before: a renewal
// that is on its way may find that the key is free, which is our own doing.
func (s *settlement) free(v verdict) answer {
	s.lease.stop()
	_, lost := s.claim.standing()
	f := &s.facts
	nothingDone := f.discarded || !f.unanswered && !f.cutOff && s.saysNothingWasDone()
	report := s.report(s.claim.release(s.context, s.claim.markerTime(nothingDone)))
	report.lost = lost
	return s.answer(v, report)
}

// keep stores what a retry is to get. When the store fails, the client gets the
// response all the same, unless a transaction is attached or the lease is lost.
// The handler has finished, and storing goes on in the background.
//
// A transaction that was rolled back has done nothing, so its key is freed.
// After Commit the handler has said otherwise, and the key stays claimed.
func (s *settlement) keep(v verdict) answer {
	result := s.encode(v)
	s.lease.stop()
	err := s.claim.complete(s.context, result, s.facts.attached)
	if errors.Is(err, ErrRolledBack) && !s.facts.committed {
		err = errors.Join(err, s.claim.release(s.context, s.opts.TTL))
	}
	a := s.answer(v, s.report(err))
	if a.storing {
		small := result
		if !s.facts.unanswered {
			small = s.encode(retryLearnsStatus)
		}
		s.claim.completeLater(s.context, result, small)
	}
	return a
}

// report returns what the store made of the verdict. It reads the clock after the
// call: when the lease ended meanwhile, another handler may be running,
// whatever the store answered.
func (s *settlement) report(err error) storeReport {
	end, lost := s.claim.standing()
	return storeReport{err: err, lost: lost, over: !time.Now().Before(end)}
}

// encode makes the result that says what the verdict is. A response that cannot
// be kept, because a callback panicked, say, becomes a record that tells a
// retry only the status: it must not make the handler run again.
func (s *settlement) encode(v verdict) Result {
	r := Result{Fingerprint: s.claim.fingerprint, TTL: s.opts.TTL}
	switch v {
	case retryLearnsNothing:
		r.Value = encodeUnknown(s.digest)
	case retryReplays:
		s.encodeResponse(&r)
	}
	if r.Value == nil {
		s.notStored = ErrResponseNotStored
		r.Value, r.parts = encodeNotStored(s.recorder.status, s.digest), nil
	}
	if s.opts.AEAD == nil {
		return r
	}
	sealed := s.seal(r)
	if sealed == nil {
		s.notStored = ErrResponseNotStored
		sealed = encodeNotStored(s.recorder.status, s.digest)
	}
	r.Value = sealed
	return r
}

// encodeResponse makes no Value if the response cannot be kept.
func (s *settlement) encodeResponse(r *Result) {
	if !s.recorder.complete() {
		return
	}
	defer s.contain(s.request.r.Context(), s.claim.storeKey, "ReplayHeader")
	if s.memory == nil || s.opts.AEAD != nil {
		whole := s.opts.AEAD != nil || !s.isRedis
		r.Value, r.parts = s.recorder.encode(nil, s.digest, s.opts.ReplayHeader, whole)
		return
	}
	// A MemoryStore copies what is small before it returns, and the request no
	// longer needs its buffer. Other stores may still hold Value in the
	// background, or after a call that timed out.
	buffer := s.request.body.scratch()
	r.Value, r.parts = s.recorder.encode((*buffer)[:0], s.digest, s.opts.ReplayHeader, false)
	if r.Value != nil {
		*buffer = r.Value[:0]
	}
}

// seal returns nil if the AEAD panics. The response is then stored as one that
// cannot be kept, and never in the clear.
func (s *settlement) seal(r Result) (sealed []byte) {
	defer s.contain(s.request.r.Context(), s.claim.storeKey, "AEAD")
	return seal(s.opts.AEAD, s.claim.storeKey, r)
}
