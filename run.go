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
		call: c, ctx: ctx, cancel: cancel, length: c.opts.Lease,
		limit: time.Now().Add(c.opts.MaxExecution),
	}
	recorder := newRecorder(c.w, c.r.ProtoMajor, c.opts.MaxResponseBytes)
	c.lease.start(c.claimSent)
	c.callHandler(recorder, ctx, func() {
		c.lease.stop()
		recorder.drop()
	})
	c.settle(ctx, recorder)
}

// runUnprotected is for FailOpen, when the store is down.
func (c *call) runUnprotected(err error) {
	c.warn("store unavailable, running unprotected", err)
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: 1}
	ctx := context.WithValue(c.r.Context(), executionKey{}, &c.execution)
	c.callHandler(c.w, ctx, func() {})
	c.execution.end()
	c.report(OutcomeUnprotected, 0, err)
}

// callHandler calls the next handler with a copy of the request, and crashed if
// it does not return. The server cleans up after the request it made; what the
// handler opened through the copy is ours.
func (c *call) callHandler(w http.ResponseWriter, ctx context.Context, crashed func()) {
	r := c.r.WithContext(ctx)
	c.body.handOver(r)
	returned := false
	defer func() {
		if r.MultipartForm != nil && r.MultipartForm != c.r.MultipartForm {
			_ = r.MultipartForm.RemoveAll()
		}
		if !returned {
			c.execution.end()
			crashed()
			c.report(OutcomePanicked, 0, nil)
		}
	}()
	c.next.ServeHTTP(w, r)
	returned = true
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

// settle stores the response, or frees the key, and then lets the client have
// it: what a client has seen, a retry must be able to see again. The lease is
// renewed until all is ready for the store.
func (c *call) settle(ctx context.Context, recorder *recorder) {
	committed, discarded, attached := c.execution.end()
	digest, broken := c.body.finish()
	recorder.finish()
	final := committed || !discarded && !(broken && !c.opts.AtMostOnce) && c.isFinal(recorder)
	if final {
		value, notStored := c.encode(recorder, digest)
		c.keep(ctx, recorder, value, notStored, committed, attached)
		return
	}
	end, taken := c.lease.stop()
	err := c.release(ctx, end)
	if taken || !time.Now().Before(end) {
		c.withhold(recorder, OutcomeLeaseLost, c.problem(ErrInProgress, ErrLeaseLost))
		return
	}
	c.send(recorder, OutcomeReleased, err)
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
func (c *call) keep(ctx context.Context, recorder *recorder, value []byte, notStored error, committed, attached bool) {
	result := Result{Fingerprint: c.fingerprint, Value: value, TTL: c.opts.TTL}
	complete := func(ctx context.Context) error { return c.store.Complete(ctx, c.storeKey, c.token, result) }

	end, taken := c.lease.stop()
	var err error
	if attached { // a transaction ends only once
		err = storeCall(ctx, c.opts.StoreTimeout, complete)
	} else {
		err = c.persist(ctx, complete)
	}
	rolledBack := errors.Is(err, ErrRolledBack)
	if rolledBack && !committed {
		err = errors.Join(err, c.release(ctx, end))
	}
	switch {
	case err == nil:
		c.send(recorder, OutcomeExecuted, notStored)
	case errors.Is(err, ErrLeaseLost) || rolledBack && taken:
		c.withhold(recorder, OutcomeLeaseLost, c.problem(ErrInProgress, err))
	case rolledBack || attached:
		p := c.problem(ErrStoreUnavailable, err)
		if committed || !rolledBack {
			p.Detail = "Whether the request was processed is not known. Repeat it later with the same key to find out."
		}
		c.withhold(recorder, OutcomeStoreUnavailable, p)
	default:
		end = c.backgroundEnd(end, committed || c.opts.AtMostOnce)
		c.persistLater(ctx, end, "storing a response failed, its request may run again", complete)
		c.send(recorder, OutcomeExecuted, err)
	}
}

// encode returns the stored form of the response, and why that is not the
// response itself: a callback that panics, say, must not make the handler run
// again.
func (c *call) encode(recorder *recorder, digest []byte) (value []byte, notStored error) {
	value = c.encodeResponse(recorder, digest)
	if value == nil {
		notStored = ErrResponseNotStored
		value = encodeNotStored(recorder.status, digest)
	}
	if c.opts.AEAD == nil {
		return value, notStored
	}
	if sealed := c.seal(value); sealed != nil {
		return sealed, notStored
	}
	return encodeNotStored(recorder.status, digest), ErrResponseNotStored
}

// encodeResponse returns nil if the response cannot be kept.
func (c *call) encodeResponse(recorder *recorder, digest []byte) (value []byte) {
	if !recorder.complete() {
		return nil
	}
	defer c.contain("ReplayHeader")
	return recorder.encode(digest, c.opts.ReplayHeader)
}

// seal returns nil if the AEAD panics.
func (c *call) seal(value []byte) (sealed []byte) {
	defer c.contain("AEAD")
	return seal(c.opts.AEAD, c.storeKey, value)
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
	if streaming := recorder.drop(); !streaming {
		c.refuseAs(outcome, p)
		return
	}
	c.warn("a response was withheld that had begun to stream", p)
	c.report(outcome, recorder.status, p)
	panic(http.ErrAbortHandler)
}
