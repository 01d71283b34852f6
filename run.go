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
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: rec.Attempt, call: c, outer: c.outer}
	c.context = handlerContext{request: c.r.Context(), execution: &c.execution, keepCancel: c.opts.CancelOnDisconnect}
	defer c.context.cancel(nil)
	c.recorder.init(c.w, c.r.ProtoMajor, c.opts.MaxResponseBytes)
	c.lease.start(c)
	c.callHandler(&c.recorder, &c.context, func() {
		c.lease.stop()
		c.recorder.drop()
	})
	c.settle(&c.context)
}

// runUnprotected is for FailOpen, when the store is down.
func (c *call) runUnprotected(err error) {
	c.warn("store unavailable, running unprotected", err)
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: 1, outer: c.outer}
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

// settle stores the response, or frees the key, and then lets the client have
// it: what a client has seen, a retry must be able to see again. The lease is
// renewed until all is ready for the store.
func (c *call) settle(ctx context.Context) {
	committed, discarded, attached := c.execution.end()
	digest, broken := c.body.finish()
	c.recorder.finish()
	c.gaveUp = c.recorder.silent && (broken || c.context.hasEnded())
	if c.gaveUp && attached && !committed && !c.opts.AtMostOnce {
		discarded = true // what it did is rolled back with its transaction
	} else if c.gaveUp {
		attached = false // a half of it must not be kept
		c.execution.detach()
		c.context.cancel(nil)
	}
	if committed || !discarded && c.isFinal(broken) {
		notStored := c.encode(digest, broken && !committed && !c.opts.AtMostOnce)
		c.keep(ctx, notStored, committed, attached)
		return
	}
	end, taken := c.lease.stop()
	err := c.release(ctx, end)
	switch {
	case taken || !time.Now().Before(end):
		c.withhold(OutcomeLeaseLost, c.problem(ErrInProgress, ErrLeaseLost))
	case c.gaveUp && broken:
		c.withhold(OutcomeReleased, c.problem(ErrBodyIncomplete, err))
	case c.gaveUp:
		p := c.problem(ErrStoreUnavailable, errors.Join(context.Cause(&c.context), err))
		if p.Detail = unsureDetail; err == nil {
			p.Detail = "This attempt was given up, and what it did was undone. Repeat it later with the same key."
		}
		c.withhold(OutcomeReleased, p)
	default:
		c.send(OutcomeReleased, err)
	}
}

// isFinal reports whether the key is not to run again. Nobody knows how far a
// handler got that gave up, but it may be told to start again when all it lacked
// was the rest of a body.
func (c *call) isFinal(broken bool) bool {
	switch {
	case broken && !c.opts.AtMostOnce && (c.gaveUp || c.recorder.status >= 400):
		return false
	case c.gaveUp:
		return true
	}
	return c.shouldStore()
}

// shouldStore asks ShouldStore. The handler has finished: a panic in it must not
// make the request run again.
func (c *call) shouldStore() (final bool) {
	if c.opts.ShouldStore == nil {
		return isFinalStatus(c.recorder.status, c.opts.AtMostOnce) && !c.saysWhenToComeAgain()
	}
	final = true
	defer c.contain("ShouldStore")
	return c.opts.ShouldStore(c.recorder.status, c.recorder.header)
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

// saysWhenToComeAgain reports whether the response is a conflict with
// Retry-After. That is what this package answers while another request is
// running, and the handler may be a proxy to a service that has it too. When
// outer middleware has set the same, it is not the handler that says so.
func (c *call) saysWhenToComeAgain() bool {
	return c.recorder.status == http.StatusConflict && c.recorder.sets("Retry-After")
}

const unsureDetail = "Whether the request was processed is not known. Repeat it later with the same key to find out."

// keep stores the response. When the store fails, the client gets it all the
// same: the handler has finished, and the claim stands while storing goes on in
// the background.
func (c *call) keep(ctx context.Context, notStored error, committed, attached bool) {
	end, taken := c.lease.stop()
	var err error
	if attached { // a transaction ends only once
		err = c.try(ctx, c.opts.StoreTimeout, (*call).complete)
	} else {
		err = c.persist(ctx, (*call).complete)
	}
	rolledBack := errors.Is(err, ErrRolledBack)
	if rolledBack && !committed {
		err = errors.Join(err, c.release(ctx, end))
	}
	switch {
	case err == nil:
		c.result = Result{} // a context that outlives the request would keep it
		c.send(OutcomeExecuted, notStored)
	case errors.Is(err, ErrLeaseLost) || taken && (rolledBack || !committed):
		c.abandon()
		c.withhold(OutcomeLeaseLost, c.problem(ErrInProgress, err))
	case rolledBack || attached:
		p := c.problem(ErrStoreUnavailable, err)
		if committed || !rolledBack {
			p.Detail = unsureDetail
		}
		c.withhold(OutcomeStoreUnavailable, p)
	default:
		end = c.backgroundEnd(end, committed || c.isOnce())
		c.persistLater(ctx, end, "storing a response failed, its request may run again", (*call).complete)
		c.send(OutcomeExecuted, err)
	}
}

// encode makes the result of the response. It returns why that is not the
// response itself: a callback that panics, say, must not make the handler run
// again. Of a response to a body that broke off (partial) a retry with the whole
// body learns only that it was given.
func (c *call) encode(digest []byte, partial bool) (notStored error) {
	c.result = Result{Fingerprint: c.fingerprint, TTL: c.opts.TTL}
	switch {
	case c.gaveUp:
		c.result.Value = encodeUnknown(digest)
	case !partial:
		c.encodeResponse(digest)
	}
	if c.result.Value == nil {
		notStored = ErrResponseNotStored
		c.result.Value, c.result.parts = encodeNotStored(c.recorder.status, digest), nil
	}
	if c.opts.AEAD == nil {
		return notStored
	}
	sealed := c.seal(c.result.Value)
	if sealed == nil {
		notStored = ErrResponseNotStored
		sealed = encodeNotStored(c.recorder.status, digest)
	}
	c.result.Value = sealed
	return notStored
}

// encodeResponse makes no Value if the response cannot be kept.
func (c *call) encodeResponse(digest []byte) {
	if !c.recorder.complete() {
		return
	}
	defer c.contain("ReplayHeader")
	if c.memory == nil || c.opts.AEAD != nil {
		c.result.Value, _ = c.recorder.encode(nil, digest, c.opts.ReplayHeader, true)
		return
	}
	// A MemoryStore copies what is small before it returns, and nobody needs
	// the buffer of the request any more.
	c.result.Value, c.result.parts = c.recorder.encode((*c.body.buffer)[:0], digest, c.opts.ReplayHeader, false)
	if c.result.Value != nil {
		*c.body.buffer = c.result.Value[:0]
	}
}

// seal returns nil if the AEAD panics.
func (c *call) seal(value []byte) (sealed []byte) {
	defer c.contain("AEAD")
	return seal(c.opts.AEAD, c.storeKey, value)
}

// release frees the key, in the background if the store fails now.
func (c *call) release(ctx context.Context, end time.Time) error {
	first := c.lease.free()
	err := c.persist(ctx, (*call).free)
	if err != nil {
		end = c.backgroundEnd(end, c.isOnce())
		c.persistLater(ctx, end, "freeing a key failed, it stays claimed until its lease ends", (*call).free)
	}
	if first && c.uncertain.Load() {
		c.giveBack(c.isOnce()) // a claim whose answer was lost may still arrive
	}
	return err
}

// abandon is for a run that has lost its key: a claim whose answer was lost may
// still arrive, when whoever has the key now has freed it.
func (c *call) abandon() {
	if c.lease.free() && c.uncertain.Load() {
		c.giveBack(c.isOnce())
	}
}

// send lets the response go out. In the place of a handler that gave up it says
// that nobody knows what it came to.
func (c *call) send(outcome Outcome, err error) {
	if c.gaveUp {
		c.withhold(OutcomeOutcomeUnknown, c.problem(ErrOutcomeUnknown, context.Cause(&c.context)))
		return
	}
	c.recorder.send()
	c.report(outcome, c.recorder.status, err)
}

// withhold answers with p instead of the handler's response. What was already
// streamed cannot be taken back, but the client can be kept from taking it for
// a whole response.
func (c *call) withhold(outcome Outcome, p *Error) {
	if streaming := c.recorder.drop(); !streaming {
		c.refuseAs(outcome, p)
		return
	}
	c.warn("a response was withheld that had begun to stream", p)
	c.report(outcome, c.recorder.status, p)
	panic(http.ErrAbortHandler)
}
