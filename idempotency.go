// Package idempotency makes retries of HTTP requests safe.
//
// A client that times out does not know whether its POST /charge happened, so
// it sends the request again with the same Idempotency-Key header. The
// middleware of this package runs the handler once, stores its complete
// response, and answers every retry with that:
//
//	store := idempotency.NewMemoryStore() // NewRedisStore for many replicas
//	mux.Handle("POST /charge", idempotency.Middleware(store, nil)(charge))
//
// # The promise
//
// While the store keeps its records: for each scope, method, path and key there
// is at most one running execution that holds the lease, at most one stored
// response, every replay equals that response, and a different request under
// the same key is neither executed nor answered with it.
//
// The handler can run again only when
//
//   - the process died, panicked or lost its lease in the middle of it, and the
//     key is not at-most-once ([Options.AtMostOnce], [Execution.Commit]);
//   - the store lost the record, or could not take it for as long as the lease
//     ran after the handler had finished;
//   - the handler answered with something that says that nothing was done
//     ([Options.ShouldStore]), asked for it ([Execution.Discard]), met a large
//     body that broke off and did not answer that it was done
//     ([Options.MaxBufferedBody]), or gave up what it had attached
//     ([Execution.Attach]);
//   - the TTL passed.
//
// Exactly-once effects outside of the process need the help of whoever has the
// effect: [Execution.DownstreamKey] is a key to hand on, [Execution.Attempt]
// tells a handler that an earlier run may have got somewhere, and
// [Execution.Attach] makes the effect and the record one transaction.
//
// # Rules
//
// Stored before sent: a client never sees an answer that a retry could not
// reproduce. The exceptions are a response that is streamed ([http.Flusher], or
// larger than [Options.MaxResponseBytes]) and a store that fails after the
// handler ran.
//
// A finished handler never runs again by accident: when its answer cannot be
// kept, retries are told so.
//
// When in doubt, refuse: when the store is down the answer is 503, before the
// handler runs; a record that cannot be read is an error, not a second run.
//
// # What a handler notices
//
// The context of its request is not cancelled when the client hangs up, but
// when the lease is lost ([context.Cause] is [ErrLeaseLost]) or after
// [Options.MaxExecution]. A handler that gives up then says so, with a 5xx or
// [Execution.Discard]: when it returns without a word, nobody knows how far it
// got, so that retries are answered [ErrOutcomeUnknown] and do not run.
//
// The response is held back until the handler returns or flushes. Connections
// cannot be hijacked.
package idempotency

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Middleware returns middleware that runs the next handler once for each key
// and answers every retry with the first answer. It works with any router:
//
//	mux.Handle("POST /charge", idempotency.Middleware(store, nil)(charge))
//	r.Use(idempotency.Middleware(store, nil)) // chi, gorilla/mux
//
// A request without a key passes through untouched. The store may be shared by
// several middlewares, and by several processes if it is that kind of store.
//
// Put it inside of whatever authenticates, limits, compresses, recovers or adds
// CORS headers, and of http.TimeoutHandler, whose 503 would free the key while
// the handler that it gave up on is still running. Put it outside of whatever
// reads the body. Of two nested ones that a request meets under one key, the
// outer one counts.
//
// Middleware panics if store is nil or opts is nonsense.
func Middleware(store Store, opts *Options) func(http.Handler) http.Handler {
	if store == nil {
		panic("idempotency: store is nil; use NewMemoryStore() for a single process")
	}
	m := &middleware{store: store, opts: opts.withDefaults()}
	m.watcher, _ = store.(Watcher)
	m.memory, _ = store.(*MemoryStore)
	return func(next http.Handler) http.Handler {
		if next == nil {
			panic("idempotency: the handler to wrap is nil")
		}
		return &handler{middleware: m, next: next}
	}
}

// A middleware is what all requests through it share.
type middleware struct {
	store    Store
	watcher  Watcher      // the same store, or nil
	memory   *MemoryStore // the same store, or nil
	opts     Options
	releases releases
}

type handler struct {
	*middleware
	next http.Handler
}

// ServeHTTP implements http.Handler. A request without a key costs one look at
// the header map.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	lines, ok := r.Header[h.opts.Header]
	if !ok && !h.opts.RequireKey || !slices.Contains(h.opts.Methods, r.Method) {
		h.next.ServeHTTP(w, r)
		return
	}
	c := calls.Get().(*call)
	c.middleware, c.next, c.w, c.r = h.middleware, h.next, w, r
	if h.opts.OnEvent != nil {
		c.started = time.Now()
	}
	c.serve(lines)
	c.recycle()
}

// A call takes one request with a key to its answer. It holds, in one
// allocation, what the steps make, in their order. Each of them knows only those
// before it.
type call struct {
	request
	claim        claim
	execution    Execution
	cancellation cancellation
	context      handlerContext
	recorder     recorder
	lease        lease
	settlement   settlement

	w       http.ResponseWriter
	next    http.Handler
	started time.Time // only if there is an OnEvent
}

// serve is the way of every request with a key.
func (c *call) serve(lines []string) {
	defer c.body.free()
	if err := c.identify(lines); err != nil {
		c.refuse(err)
		return
	}
	outer, _ := FromContext(c.r.Context())
	if outer.covers(c.storeKey) {
		c.next.ServeHTTP(c.w, c.r)
		return
	}
	if err := c.takeFingerprint(); err != nil {
		c.refuse(err)
		return
	}
	c.claim.middleware, c.claim.storeKey, c.claim.token, c.claim.fingerprint = c.middleware, c.storeKey, c.token, c.fingerprint
	rec, err := c.claim.get(c.r.Context())
	switch {
	case err == nil && rec.State == Acquired:
		c.run(rec.Attempt, outer)
	case err == nil && rec.State == Completed:
		c.replay(rec)
	case err != nil && c.mayRunUnprotected(err):
		c.runUnprotected(err, outer)
	default:
		c.claim.abandon()
		c.refuse(c.refusal(rec.State, err))
	}
}

// run runs the handler under the claim, and answers with what the run comes to.
func (c *call) run(attempt int, outer *Execution) {
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: attempt, claim: &c.claim, outer: outer}
	c.cancellation = cancellation{request: c.r.Context(), keepCancel: c.opts.CancelOnDisconnect}
	c.context = handlerContext{&c.cancellation, &c.execution}
	defer c.context.cancel(nil)
	c.recorder.init(c.w, c.r.ProtoMajor, c.opts.MaxResponseBytes)
	c.claim.handler = &c.cancellation
	c.lease.claim, c.lease.ctx, c.lease.handler = &c.claim, &c.context, &c.cancellation
	c.lease.start()
	c.callHandler(&c.recorder, &c.context)
	c.settlement.middleware, c.settlement.request, c.settlement.claim = c.middleware, &c.request, &c.claim
	c.settlement.execution, c.settlement.context = &c.execution, &c.context
	c.settlement.lease, c.settlement.recorder = &c.lease, &c.recorder
	c.deliver(c.settlement.settle())
}

// mayRunUnprotected reports whether the handler may run although the store
// failed. Not when another execution may be running, which FailOpen is not for.
// A claim that was made unnoticed protects the run for a while.
func (c *call) mayRunUnprotected(err error) bool {
	return c.opts.FailOpen && !c.claim.heldByOther && !errors.Is(err, ErrTooFewReplicas)
}

func (c *call) runUnprotected(err error, outer *Execution) {
	c.warn(c.r.Context(), c.storeKey, "store unavailable, running unprotected", err)
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: 1, outer: outer}
	c.callHandler(c.w, context.WithValue(c.r.Context(), executionKey{}, &c.execution))
	c.execution.end()
	c.report(OutcomeUnprotected, 0, err)
}

// callHandler calls the next handler with a copy of the request. The server
// cleans up after the request it made; what the handler opened through the copy
// is ours.
//
// Leaving the handler by panic or runtime.Goexit is a crash: nothing is released,
// the claim ends with its lease, and the panic goes on untouched. Freeing the key
// instead would be worse than it looks: Go's Transport sends a request with this
// header again by itself when its connection breaks without an answer, so the
// handler would run, and panic, several times at once.
func (c *call) callHandler(w http.ResponseWriter, ctx context.Context) {
	r := c.r.WithContext(ctx)
	c.body.handOver(r)
	returned := false
	defer func() {
		if r.MultipartForm != nil && r.MultipartForm != c.r.MultipartForm {
			_ = r.MultipartForm.RemoveAll()
		}
		if !returned {
			c.crashed()
		}
	}()
	c.next.ServeHTTP(w, r)
	returned = true
}

// crashed ends a run whose handler does not return.
func (c *call) crashed() {
	c.execution.end()
	if c.execution.claim != nil {
		c.lease.stop()
		c.recorder.drop()
	}
	c.report(OutcomePanicked, 0, nil)
}

// replay answers with the stored response, if this is the request it is for.
func (c *call) replay(rec Record) {
	resp, err := decodeResponse(c.opts.AEAD, c.storeKey, rec, &c.text, c.recorder.scratch.fields[:0])
	if err != nil {
		c.refuse(c.problem(ErrRecordUnreadable, err))
		return
	}
	same := bytes.Equal(c.fingerprint, rec.Fingerprint)
	if same && !c.body.whole {
		if same, err = c.body.matches(resp.digest); err != nil {
			c.refuse(c.bodyProblem(err))
			return
		}
	}
	switch {
	case !same:
		c.refuse(c.problem(ErrKeyReused, nil))
	case resp.unknown:
		c.refuse(c.problem(ErrOutcomeUnknown, nil))
	case resp.notStored:
		err := c.problem(ErrResponseNotStored, nil)
		err.OriginalStatus = resp.status
		c.refuse(err)
	default:
		c.drain()
		resp.replay(c.w)
		c.report(OutcomeReplayed, resp.status, nil)
	}
}

// refusal is the answer to a request that may not run.
func (c *call) refusal(state State, err error) *Error {
	switch {
	case err != nil:
		return c.problem(ErrStoreUnavailable, err)
	case state == InProgress:
		return c.problem(ErrInProgress, nil)
	case state == Mismatch:
		return c.problem(ErrKeyReused, nil)
	case state == Abandoned:
		return c.problem(ErrOutcomeUnknown, nil)
	}
	return c.problem(ErrStoreUnavailable, nil) // Lost: our claim came after we gave it up
}

// refuse answers with an error of the middleware's own.
func (c *call) refuse(err *Error) { c.refuseAs(Outcome(err.Code), err) }

func (c *call) refuseAs(outcome Outcome, err *Error) {
	if err.Status >= 500 || outcome == OutcomeLeaseLost {
		c.warn(c.r.Context(), c.storeKey, "request refused", err)
	}
	c.drain()
	c.opts.ErrorHandler(c.w, c.r, err)
	c.report(outcome, err.Status, err)
}

// deliver lets the handler's response go out, or answers in its place. What was
// already streamed cannot be taken back, but the client can be kept from taking
// it for a whole response.
func (c *call) deliver(a answer) {
	switch {
	case a.problem == nil:
		c.recorder.send()
		c.report(a.outcome, c.recorder.status, a.err)
	case !c.recorder.drop():
		c.refuseAs(a.outcome, a.problem)
	default:
		c.warn(c.r.Context(), c.storeKey, "a response was withheld that had begun to stream", a.problem)
		c.report(a.outcome, c.recorder.status, a.problem)
		panic(http.ErrAbortHandler)
	}
}

// calls are for reuse.
var calls = sync.Pool{New: func() any { return new(call) }}

// recycle keeps a call for reuse that no handler can hold: one that was answered
// from memory, without running the handler. It halves the time of a replay.
func (c *call) recycle() {
	if c.memory != nil && c.execution.attempt == 0 {
		c.request, c.claim = request{}, claim{}
		c.w, c.next = nil, nil
		calls.Put(c)
	}
}

func (m *middleware) problem(sentinel, cause error) *Error {
	return newError(sentinel, cause, m.opts.DocsURL)
}
