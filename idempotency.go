// Package idempotency makes retries of HTTP requests safe.
//
// A client that times out does not know whether its POST /charge happened, so
// it sends the request again with the same Idempotency-Key header. The
// middleware of this package runs the handler once, stores its complete
// response, and answers every retry with that response:
//
//	store := idempotency.NewMemoryStore() // NewRedisStore for many replicas, with a Prefix for each service
//	mux.Handle("POST /charge", idempotency.Middleware(store, nil)(charge))
//
// # The promise
//
// While the store keeps its records, for each scope, method, path and key: at
// most one running execution holds the lease, at most one response is stored,
// every replay equals that response, and a different request under the same key
// is neither executed nor answered with it. A multipart form that a client
// encodes anew, with another boundary, is the same request.
//
// The handler can run again only when
//
//   - the handler panicked or lost its lease, or its process died, and the key
//     is not at-most-once ([Options.AtMostOnce], [Execution.Commit]);
//   - the store lost the record;
//   - the store did not take the response before the lease ended, a retry came
//     after that, and the key is not at-most-once;
//   - the handler's answer is not final, as a 5xx or a 429 is not
//     ([Options.ShouldStore]), or the handler asked for it
//     ([Execution.Discard]);
//   - the handler met a large body that broke off, and answered with an error
//     or not at all ([Options.MaxBufferedBody]);
//   - a transaction that the handler had attached was rolled back
//     ([Execution.Attach]);
//   - the store is down and [Options.FailOpen] is set;
//   - the TTL passed.
//
// Exactly-once effects in another system need the help of that system.
// [Execution.DownstreamKey] is a key for a call to it, [Execution.Attempt]
// tells a handler that an earlier run may have reached it, and
// [Execution.Attach] makes the effect and the record one transaction.
//
// # Rules
//
// Stored before sent: a response that retries are to get is stored before the
// client sees it. There are three exceptions. A response is streamed when the
// handler flushes ([http.Flusher]) or its body exceeds
// [Options.MaxResponseBytes]. A response that cannot be kept is sent once, and
// retries are answered [ErrResponseNotStored]. When the store fails after the
// handler ran, the response is sent, and storing it goes on in the background
// for the rest of the lease and [Options.MaxExecution] more. A program that
// stops waits for that with [Background.Wait].
//
// A finished handler does not run again because its answer cannot be kept:
// retries are then answered with [ErrResponseNotStored].
//
// When in doubt, refuse: when the store is down, the middleware answers 503
// before the handler runs. When a record cannot be read, it answers 500.
//
// # What a handler notices
//
// The context of its request is not cancelled when the client hangs up. It is
// cancelled when the lease is lost ([context.Cause] is [ErrLeaseLost]) and
// after [Options.MaxExecution] ([context.Cause] is [context.DeadlineExceeded]).
// The deadline of the request's context holds for the handler. A cancellation
// of that context does if its cause is another than [context.Canceled], and the
// handler's context then has the same cause. So a program that wants to stop
// its handlers cancels the context of [http.Server.BaseContext] with
// [context.WithCancelCause]. This does not reach a handler whose client has
// hung up before: the context of that request was cancelled already.
//
// A handler that gives up then answers with a 5xx, or calls
// [Execution.Discard]. When it returns without an answer, its effect is
// unknown: retries are answered [ErrOutcomeUnknown] and do not run.
//
// The response is held back until the handler returns, flushes, or writes more
// than [Options.MaxResponseBytes]. Connections cannot be hijacked.
//
// The handler gets a copy of the request. When the handler has returned or
// panicked, outer middleware sees the Pattern that a router inside has found.
// It does not see path values or forms. A replay runs no router, so its Pattern
// is that of the routers outside.
//
// # Cost
//
// A first execution is two calls of the [Store], a replay is one. Each renewal
// of the lease is one more, and so is [Execution.Commit]. With
// [Options.AtMostOnce] one more call marks the key before the handler starts.
package idempotency

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Middleware returns middleware that runs the next handler once for each key
// and answers every retry with the first answer. It works with any router of
// net/http handlers. For echo, gin, huma, fiber and connect-go see
// docs/frameworks.md:
//
//	mux.Handle("POST /charge", idempotency.Middleware(store, nil)(charge))
//	r.Use(idempotency.Middleware(store, nil)) // chi, gorilla/mux
//
// A request without a key passes through untouched, unless
// [Options.RequireKey] is set. Several middlewares may share a store, and so
// may several processes if all of them can reach the store.
//
// The order of middleware matters. Put this one inside of middleware that
// authenticates, limits, compresses, recovers or adds CORS headers. Put it
// inside of http.TimeoutHandler too: further out, it would see the 503 of the
// TimeoutHandler and free the key while the handler is still running. Put it
// outside of middleware that reads the body. When outer middleware has read it,
// only a form that it has parsed into the request counts
// ([Options.Fingerprint]). When a request meets two of these middlewares under
// one scope, method, path and key, the outer one protects it and the inner one
// passes it on. Once the handler of the outer one has returned, the inner one
// protects what goes on.
//
// Middleware panics if store is nil or an option is invalid. What it returns
// panics if the next handler is nil, and is safe for concurrent use.
func Middleware(store Store, opts *Options) func(http.Handler) http.Handler {
	if store == nil {
		panic("idempotency: store is nil; use NewMemoryStore() for a single process")
	}
	m := &middleware{store: store, opts: opts.withDefaults()}
	m.header = http.CanonicalHeaderKey(m.opts.Header)
	m.background = cmp.Or(m.opts.Background, new(Background))
	m.watcher, _ = store.(Watcher)
	m.memory, _ = store.(*MemoryStore)
	_, m.isRedis = store.(*RedisStore)
	return func(next http.Handler) http.Handler {
		if next == nil {
			panic("idempotency: the handler to wrap is nil")
		}
		return &handler{middleware: m, next: next}
	}
}

// A middleware is what all requests through it share.
type middleware struct {
	store   Store
	watcher Watcher      // the same store; nil if it cannot watch
	memory  *MemoryStore // the same store; nil if it is another kind
	isRedis bool         // the store is a RedisStore
	opts    Options
	header  string // Options.Header as it stands in a header map

	background *Background // of Options, or one of its own
	releases   releases
	unstored   atomic.Int64 // bytes of responses that wait to be stored
	waiting    atomic.Int64 // duplicates that wait at present
	bodies     sharedBodies
}

// A handler is the middleware around one next handler.
type handler struct {
	*middleware
	next http.Handler
}

// ServeHTTP implements http.Handler. Without Options.Key, a request without a
// key costs one lookup in the header map, and gets the ResponseWriter and the
// Request as they came.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	lines, ok := r.Header[h.header]
	if !ok && !h.opts.RequireKey && h.opts.Key == nil || !h.isEligible(r.Method) {
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

// isEligible compares methods without regard to case. Methods are
// case-sensitive (RFC 9110, section 9.1), but a browser's fetch sends "patch" as
// the page has written it, and there are routers that take it for PATCH.
func (m *middleware) isEligible(method string) bool {
	return slices.Contains(m.opts.Methods, method) ||
		slices.ContainsFunc(m.opts.Methods, func(eligible string) bool { return strings.EqualFold(eligible, method) })
}

// A call takes one request with a key to its answer. It holds the parts that
// the steps use, in the order of the steps and in one allocation.
type call struct {
	request
	claim        claim
	execution    Execution
	cancellation cancellation
	context      handlerContext
	recorder     recorder
	lease        lease

	w       http.ResponseWriter
	next    http.Handler
	started time.Time // only if there is an OnEvent
}

// serve answers a request that has a key, or that RequireKey says must have
// one. With Options.Key it is any eligible request. The steps that need neither
// the body nor the store come first, so that refusing a request is cheap.
func (c *call) serve(lines []string) {
	defer c.body.free()
	if err := c.identify(lines); err != nil {
		c.refuse(err)
		return
	}
	outer, _ := FromContext(c.r.Context())
	if c.key == "" || outer.covers(c.storeKey) {
		c.body.restore(c.r)
		c.next.ServeHTTP(c.w, c.r)
		return
	}
	if err := c.takeFingerprint(); err != nil {
		c.refuse(err)
		return
	}
	c.opts.Background.enter()
	defer c.opts.Background.leave()
	c.claim.owner, c.claim.fingerprint = owner{c.middleware, c.storeKey, c.token}, c.fingerprint
	c.bodies.join(c.storeKey, &c.body)
	rec, err := c.obtain()
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
//
// Each part gets what it needs here, and none calls the call. What goes on in
// the background after the answer uses claim.detach, so that it does not keep
// the request alive.
func (c *call) run(attempt int, outer *Execution) {
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: attempt, claim: &c.claim, outer: outer, context: &c.context}
	c.cancellation = cancellation{request: c.r.Context(), keepCancel: c.opts.CancelOnDisconnect}
	c.context = handlerContext{&c.cancellation, &c.execution}
	defer c.context.cancel(nil)
	c.recorder.init(c.w, c.r.ProtoMajor, c.opts.MaxResponseBytes)
	c.recorder.late = lateAnswer{middleware: c.middleware, storeKey: c.storeKey, request: c.r.Context()}
	c.claim.handler = &c.cancellation
	c.lease.claim, c.lease.ctx, c.lease.handler = &c.claim, &c.context, &c.cancellation
	c.lease.start()
	c.callHandler(&c.recorder, &c.context)
	s := settlement{
		middleware: c.middleware, request: &c.request, claim: &c.claim, lease: &c.lease,
		execution: &c.execution, context: &c.context, recorder: &c.recorder,
	}
	a := s.settle()
	c.deliver(a, s.facts.unanswered)
}

// mayRunUnprotected reports whether the handler may run although the store
// failed. It may not when the store has told this request of another execution:
// FailOpen accepts that a handler is not protected, not that it runs beside one
// that is known. A store with too few replicas works and refuses, so FailOpen
// does not apply to it either. Nor does it to a Redis cell that cannot be read:
// its handler may have finished.
//
// A claim may have been written although its answer was lost. The middleware
// leaves it in the store: the handler does run, and the claim keeps duplicates
// away for one lease, or until TTL if the mark was written too.
func (c *call) mayRunUnprotected(err error) bool {
	return c.opts.FailOpen && !c.claim.heldByOther && !errors.Is(err, ErrTooFewReplicas) &&
		!errors.Is(err, errForeignCell)
}

// runUnprotected runs the handler without a claim. Its Execution has no claim,
// so Commit fails and says why; the client's own context and ResponseWriter are
// passed on, because no answer is kept for a retry.
func (c *call) runUnprotected(err error, outer *Execution) {
	c.warn(c.r.Context(), c.storeKey, "store unavailable, running unprotected", err)
	c.execution = Execution{key: c.key, storeKey: c.storeKey, attempt: 1, outer: outer, failOpen: true}
	c.execution.context = context.WithValue(c.r.Context(), executionKey{}, &c.execution)
	c.callHandler(c.w, c.execution.context)
	c.execution.end()
	c.report(OutcomeUnprotected, 0, err)
}

// callHandler calls the next handler with a copy of the request. The server
// removes the multipart files of the request that it made; callHandler removes
// those that the handler opened through the copy.
//
// The Pattern of an inner router goes back to the request, where tracing and
// metrics further out look for the route. Nothing else does. With a changed
// Method or a form it would be another request if outer middleware sent it
// through again. Path values may share a map with the copy, which a goroutine
// that the handler left behind may read.
//
// A handler that leaves by panic or runtime.Goexit is a crash: nothing is
// released, the claim ends with its lease, and the panic goes on untouched.
// Freeing the key instead would run the handler again and again. When a
// connection breaks without an answer, Go's Transport sends a request with this
// header again on its own. The handler would then run, and panic, several
// times: up to five times when measured.
func (c *call) callHandler(w http.ResponseWriter, ctx context.Context) {
	r := c.r.WithContext(ctx)
	c.body.handOver(r)
	returned := false
	defer func() {
		if r.Pattern != c.r.Pattern { // written only then, as the router itself would
			c.r.Pattern = r.Pattern
		}
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

// crashed ends a run whose handler does not return. It stops the renewals, so
// that the claim ends with its lease. It stops the recorder, so that a goroutine
// that the handler left behind writes nothing. It does not free the key.
func (c *call) crashed() {
	c.execution.end()
	if c.execution.claim != nil {
		c.lease.stop()
		c.recorder.crash()
	}
	c.report(OutcomePanicked, 0, nil)
}

// replay answers with the stored response, if the request is the one that the
// response belongs to. The store has compared the fingerprints; replay compares
// them again, because a store may not know one of them, and a wrong replay
// would show the response of another request. A large body is not in the
// fingerprint, so its digest is compared here.
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
		c.refuse(c.reused())
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
	case errors.Is(err, errTooManyWaiting):
		return c.problem(ErrInProgress, err)
	case err != nil:
		return c.problem(ErrStoreUnavailable, err)
	case state == InProgress:
		return c.problem(ErrInProgress, nil)
	case state == Mismatch:
		return c.reused()
	case state == Abandoned:
		return c.problem(ErrOutcomeUnknown, nil)
	}
	return c.problem(ErrStoreUnavailable, nil) // Lost: a release of this token came before its claim
}

// refuse answers with an error of the middleware's own.
func (c *call) refuse(err *Error) { c.refuseAs(Outcome(err.Code), err) }

// refuseAs is refuse under another outcome than the error's own. A refusal that
// an operator has to know of is logged; one that is the client's doing is not.
func (c *call) refuseAs(outcome Outcome, err *Error) {
	if err.Status >= 500 || outcome == OutcomeLeaseLost {
		c.warn(c.r.Context(), c.storeKey, "request refused", err)
	}
	c.drain()
	c.opts.ErrorHandler(c.w, c.r, err)
	c.report(outcome, err.Status, err)
}

// deliver sends the handler's response, or answers in its place. What was
// already streamed cannot be taken back. Then deliver aborts the connection, so
// that the client does not take a part of the response for all of it.
func (c *call) deliver(a answer, unanswered bool) {
	switch {
	case a.problem == nil:
		c.recorder.send(a.outcome == OutcomeExecuted)
		c.report(a.outcome, c.recorder.status, a.err)
	case !c.recorder.withdraw():
		c.refuseAs(a.outcome, a.problem)
	case unanswered: // an outer timeout has answered, with a failure too
		c.report(a.outcome, c.recorder.status, a.problem)
	default:
		c.warn(c.r.Context(), c.storeKey, "a response was withheld that had begun to stream", a.problem)
		c.report(a.outcome, c.recorder.status, a.problem)
		panic(http.ErrAbortHandler)
	}
}

// calls holds calls for reuse.
var calls = sync.Pool{New: func() any { return new(call) }}

// recycle keeps a call for reuse if the store is a MemoryStore and no handler
// ran under the call's own Execution. A handler may leave goroutines behind that
// use the recorder or the context. Another store may still read the fingerprint
// of a claim whose call timed out. Reuse halves the time of a replay.
func (c *call) recycle() {
	if c.memory != nil && c.execution.attempt == 0 {
		c.request, c.claim = request{}, claim{}
		c.w, c.next = nil, nil
		calls.Put(c)
	}
}
