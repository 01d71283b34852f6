package idempotency

import (
	"context"
	"errors"
	"net/http"
	"time"
)

// run runs the handler under the claim and settles what becomes of its
// response. Leaving the handler by panic or runtime.Goexit is a crash: nothing
// is released, the claim ends with its lease, and the panic goes on untouched.
// Freeing the key instead would be worse than it looks: Go's Transport sends a
// request with this header again by itself when its connection breaks without
// an answer, so the handler would run, and panic, several times at once.
func (c *call) run(rec Record) {
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: rec.Attempt, call: c}
	ctx, cancel := c.handlerContext()
	defer cancel(nil)
	c.lease = lease{
		call: c, cancel: cancel, length: c.opts.Lease,
		limit: time.Now().Add(c.opts.MaxExecution),
	}
	recorder := newRecorder(c.w, c.opts.MaxResponseBytes)
	c.lease.start(c.claimSent)

	returned := false
	defer func() {
		if !returned {
			c.crashed(recorder)
		}
	}()
	c.callHandler(recorder, ctx)
	returned = true
	c.settle(ctx, recorder)
}

// runUnprotected is for FailOpen, when the store is down.
func (c *call) runUnprotected(err error) {
	c.warn("store unavailable, running unprotected", err)
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: 1}
	c.callHandler(c.w, context.WithValue(c.r.Context(), executionKey{}, &c.execution))
	c.report(OutcomeUnprotected, 0, err)
}

// callHandler calls the next handler with a copy of the request. The server
// cleans up after the request it made; what the handler opened through the copy
// is ours.
func (c *call) callHandler(w http.ResponseWriter, ctx context.Context) {
	r := c.r.WithContext(ctx)
	c.body.handOver(r)
	defer func() {
		if r.MultipartForm != nil && r.MultipartForm != c.r.MultipartForm {
			_ = r.MultipartForm.RemoveAll()
		}
	}()
	c.next.ServeHTTP(w, r)
}

// handlerContext returns a context with the values and the deadline of the
// request's, and without the client's cancellation: a client that hangs up is
// the one that will retry, so the work is finished and its answer stored.
func (c *call) handlerContext() (context.Context, context.CancelCauseFunc) {
	ctx := c.r.Context()
	deadline, limited := ctx.Deadline()
	if !c.opts.CancelOnDisconnect {
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, executionKey{}, &c.execution))
	if !limited {
		return ctx, cancel
	}
	ctx, stop := context.WithDeadline(ctx, deadline)
	return ctx, func(cause error) { cancel(cause); stop() }
}

// crashed cleans up after a handler that did not return.
func (c *call) crashed(recorder *recorder) {
	c.lease.stop()
	recorder.drop()
	c.report(OutcomePanicked, 0, nil)
}

// settle stores the response, or frees the key, and then lets the client have
// it: what a client has seen, a retry must be able to see again.
func (c *call) settle(ctx context.Context, recorder *recorder) {
	end, taken := c.lease.stop()
	committed, discarded, attached := c.execution.state()
	fingerprint, broken := c.body.finish(c.sum[:0])
	if c.fingerprint == nil {
		c.fingerprint = fingerprint
	}
	recorder.finish()

	switch {
	case committed, !discarded && !(broken && !c.opts.AtMostOnce) && c.isFinal(recorder):
		c.keep(ctx, recorder, end, committed, attached)
	case taken:
		c.withhold(recorder, OutcomeLeaseLost, c.problem(ErrInProgress, ErrLeaseLost))
	default:
		c.free(ctx, recorder, end)
	}
}

// isFinal asks ShouldStore. The handler has finished: a panic in it must not
// make the request run again.
func (c *call) isFinal(recorder *recorder) (final bool) {
	if c.opts.ShouldStore == nil {
		return isFinalStatus(recorder.status, c.opts.AtMostOnce)
	}
	final = true
	defer c.contain("ShouldStore")
	return c.opts.ShouldStore(recorder.status, recorder.header)
}

// isFinalStatus is the default of Options.ShouldStore. What is not final says
// that nothing was done yet, or not for this client.
func isFinalStatus(status int, atMostOnce bool) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired,
		http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return status < 500 || atMostOnce
}

// keep stores the response. When the store fails, the client gets it all the
// same: the handler has finished, and the claim stands while storing goes on in
// the background.
func (c *call) keep(ctx context.Context, recorder *recorder, end time.Time, committed, attached bool) {
	value, notStored := c.encode(recorder)
	result := Result{Fingerprint: c.fingerprint, Value: value, TTL: c.opts.TTL}
	complete := func(ctx context.Context) error { return c.store.Complete(ctx, c.storeKey, c.token, result) }

	var err error
	if attached { // a transaction ends only once
		err = storeCall(ctx, c.opts.StoreTimeout, complete)
	} else {
		err = c.persist(ctx, complete)
	}
	switch {
	case err == nil:
		c.send(recorder, OutcomeExecuted, notStored)
	case errors.Is(err, ErrLeaseLost):
		c.withhold(recorder, OutcomeLeaseLost, c.problem(ErrInProgress, err))
	case errors.Is(err, ErrRolledBack):
		if !committed {
			c.release(ctx, end)
		}
		c.withhold(recorder, OutcomeStoreUnavailable, c.problem(ErrStoreUnavailable, err))
	case attached:
		p := c.problem(ErrStoreUnavailable, err)
		p.Detail = "Whether the request was processed is not known yet. Repeat it later with the same key to find out."
		c.withhold(recorder, OutcomeStoreUnavailable, p)
	default:
		c.persistLater(ctx, end, "storing a response failed, its request may run again", complete)
		c.send(recorder, OutcomeExecuted, err)
	}
}

// encode returns the stored form of the response, and why that is not the
// response itself. If a callback panics, retries learn that it ran.
func (c *call) encode(recorder *recorder) (value []byte, notStored error) {
	value, notStored = encodeNotStored(recorder.status), ErrResponseNotStored
	defer c.contain("ReplayHeader or AEAD")
	if recorder.complete() {
		if v, ok := recorder.encode(c.opts.ReplayHeader); ok {
			value, notStored = v, nil
		}
	}
	if c.opts.AEAD != nil {
		value = seal(c.opts.AEAD, c.storeKey, value)
	}
	return value, notStored
}

// free gives the key back after an answer that says that nothing was done.
func (c *call) free(ctx context.Context, recorder *recorder, end time.Time) {
	c.send(recorder, OutcomeReleased, c.release(ctx, end))
}

// release frees the key, in the background if the store fails now.
func (c *call) release(ctx context.Context, end time.Time) error {
	release := func(ctx context.Context) error { return c.store.Release(ctx, c.storeKey, c.token) }
	err := c.persist(ctx, release)
	if err != nil {
		c.persistLater(ctx, end, "freeing a key failed, it stays claimed until its lease ends", release)
	}
	return err
}

// send lets the response go out.
func (c *call) send(recorder *recorder, outcome Outcome, err error) {
	recorder.send()
	c.report(outcome, recorder.status, err)
}

// withhold answers with p instead of the handler's response. What was already
// streamed cannot be taken back, but the client can be kept from taking it for
// a whole response.
func (c *call) withhold(recorder *recorder, outcome Outcome, p *Error) {
	streaming := recorder.drop()
	if !streaming {
		c.refuseAs(outcome, p)
		return
	}
	c.warn("response withheld after streaming began", p)
	c.report(outcome, recorder.status, p)
	panic(http.ErrAbortHandler)
}
