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
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

type middleware struct {
	store   Store
	watcher Watcher      // the same store, or nil
	memory  *MemoryStore // the same store, or nil
	opts    Options
	calm    calm // what is given back
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
	c.handler, c.w, c.r = h, w, r
	if h.opts.OnEvent != nil {
		c.started = time.Now()
	}
	c.serve(lines)
	c.recycle()
}

// call is one request that has a key, or should have one, and everything that
// its execution needs: one allocation.
type call struct {
	arrival
	result Result // what the handler's run came to
	gaveUp bool   // the handler said nothing when its context, or the body, had ended

	execution Execution
	context   handlerContext
	lease     lease
	recorder  recorder
}

// arrival is the part of a call that does not need an execution.
type arrival struct {
	*handler
	w       http.ResponseWriter
	r       *http.Request
	started time.Time // only if there is an OnEvent to tell it

	key         string // the client's
	scope       string
	text        strings.Builder // of the strings that follow, and of a replay's header
	storeKey    string
	token       string // what the claim is made under
	body        requestBody
	fingerprint []byte
	sum         [sha256.Size]byte // backing of fingerprint

	outer     *Execution  // that the request is part of already, or nil
	claimSent time.Time   // when the last claim was asked for
	claimed   time.Time   // when it was answered
	uncertain atomic.Bool // a claim may have been made that nobody knows of
	waited    time.Duration
}

// calls are for reuse.
var calls = sync.Pool{New: func() any { return new(call) }}

// recycle keeps a call for reuse that nobody else can know of: one that was
// answered from memory, without running the handler. It halves the time of a
// replay.
func (c *call) recycle() {
	if c.memory != nil && c.execution.attempt == 0 {
		c.arrival = arrival{}
		calls.Put(c)
	}
}

// serve takes a request with a key to its answer.
func (c *call) serve(lines []string) {
	defer c.body.free()
	if err := c.identify(lines); err != nil {
		c.refuse(err)
		return
	}
	c.outer, _ = FromContext(c.r.Context())
	if c.outer.covers(c.storeKey) {
		c.next.ServeHTTP(c.w, c.r)
		return
	}
	if err := c.takeFingerprint(); err != nil {
		c.refuse(err)
		return
	}
	rec, err := c.claim()
	switch {
	case err == nil && rec.State == Acquired:
		c.run(rec)
		return
	case err == nil && rec.State == Completed:
		c.replay(rec)
		return
	case err != nil && c.opts.FailOpen && rec.State != InProgress && !errors.Is(err, ErrTooFewReplicas):
		// A claim that was made unnoticed protects the run for a while.
		c.runUnprotected(err)
		return
	}
	if c.uncertain.Load() {
		c.giveBack(c.opts.AtMostOnce)
	}
	if err != nil {
		c.refuse(c.problem(ErrStoreUnavailable, err))
		return
	}
	c.refuse(c.problem(refusals[rec.State], nil))
}

// refusals are the answers to a request that may not run.
var refusals = [...]error{
	InProgress: ErrInProgress,
	Mismatch:   ErrKeyReused,
	Abandoned:  ErrOutcomeUnknown,
	Lost:       ErrStoreUnavailable, // our claim came late, after we gave it up
}

// identify finds out which cell the request belongs to.
func (c *call) identify(lines []string) *Error {
	if len(lines) == 0 && c.opts.RequireKey {
		return c.problem(ErrKeyMissing, nil)
	}
	key, detail := parseKey(lines)
	if detail == "" && c.opts.ValidateKey != nil {
		if err := c.opts.ValidateKey(key); err != nil {
			detail = err.Error()
		}
	}
	if detail != "" {
		err := c.problem(ErrKeyInvalid, nil)
		err.Detail = detail
		return err
	}
	c.key = key
	if c.opts.Scope != nil {
		c.scope = c.opts.Scope(c.r)
	}
	c.body.buffer = buffers.Get().(*[]byte)
	c.nameCell()
	return nil
}

// textBytes has room for the store key, the token and the header of a usual
// replay: 65 bytes and some.
const textBytes = 224

// nameCell makes the store key, and the token in case that the cell is free.
func (c *call) nameCell() {
	path, _ := target(c.r)
	sum := hashKey((*c.body.buffer)[:0], c.scope, c.r.Method, path, c.key)
	token := newToken()
	var text [storeKeyBytes + tokenBytes]byte
	base64.RawURLEncoding.Encode(text[:storeKeyBytes], sum[:])
	base64.RawURLEncoding.Encode(text[storeKeyBytes:], token[:])
	c.text.Grow(textBytes)
	c.text.Write(text[:])
	both := c.text.String()
	c.storeKey, c.token = both[:storeKeyBytes], both[storeKeyBytes:]
}

// takeFingerprint finds out what tells the request apart from others under the
// same key, for which it reads the body or the beginning of it.
func (c *call) takeFingerprint() *Error {
	custom := c.opts.Fingerprint != nil
	identity := appendIdentity((*c.body.buffer)[:0], c.r, c.scope, c.key, custom)
	if err := c.body.readAhead(c.r, identity, c.opts.MaxBufferedBody); err != nil {
		return c.bodyProblem(err)
	}
	switch {
	case !custom:
		c.sum = c.body.fingerprint()
	case c.body.whole:
		c.sum = c.body.customFingerprint(c.opts.Fingerprint(c.r, c.body.ahead))
	default:
		return c.problem(ErrBodyTooLarge, nil)
	}
	c.fingerprint = c.sum[:]
	return nil
}

// bodyProblem is the answer to a body that cannot be read.
func (c *call) bodyProblem(err error) *Error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return c.problem(ErrBodyTooLarge, err)
	}
	return c.problem(ErrBodyIncomplete, err)
}

// claim asks for the key and, while another execution holds it, waits. An error
// comes with the state that was known last.
func (c *call) claim() (Record, error) {
	rec, err := c.tryClaim()
	if err == nil && rec.State == InProgress && c.opts.Wait != NoWait {
		if rec, err = c.wait(rec); err != nil {
			rec = Record{State: InProgress}
		}
	}
	return rec, err
}

// replay answers with the stored response, if this is the request it is for.
func (c *call) replay(rec Record) {
	resp, err := decodeResponse(c.opts.AEAD, c.storeKey, rec, &c.text, c.recorder.room.fields[:0])
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

// refuse answers with an error of the middleware's own.
func (c *call) refuse(err *Error) { c.refuseAs(Outcome(err.Code), err) }

func (c *call) refuseAs(outcome Outcome, err *Error) {
	if err.Status >= 500 || outcome == OutcomeLeaseLost {
		c.warn("request refused", err)
	}
	c.drain()
	c.opts.ErrorHandler(c.w, c.r, err)
	c.report(outcome, err.Status, err)
}

// maxDrain is how much of a body is read that nobody asked for.
const maxDrain = 1 << 20

// drain reads on, so that a client of HTTP/1 sees the answer and not a
// connection that is reset while it sends. One that waits for 100 Continue has
// sent nothing, and need not.
func (c *call) drain() {
	unasked := !c.body.hasStarted() && c.r.Header.Get("Expect") != ""
	if c.r.Body == nil || c.body.whole || unasked || c.r.ProtoMajor > 1 {
		return
	}
	_, _ = io.CopyN(io.Discard, c.r.Body, maxDrain)
}

func (c *call) problem(sentinel, cause error) *Error {
	return newError(sentinel, cause, c.opts.DocsURL)
}
