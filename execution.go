package idempotency

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// An Execution is one run of a handler under a key. A handler gets it from
// [FromContext]. It must not be copied, and its zero value is of no use. It is
// safe for concurrent use. After the handler has returned, Commit fails, and
// Discard and Attach have no effect.
type Execution struct {
	key      string
	storeKey string
	attempt  int
	claim    *claim     // nil when the run is unprotected
	failOpen bool       // the run is unprotected
	outer    *Execution // of a middleware around this one, under another key; or nil
	context  context.Context

	mu         sync.Mutex // guards what follows
	ended      bool
	committed  bool
	discarded  bool
	attachment any
}

// executionKey is the key of the Execution among the values of a context.
type executionKey struct{}

// FromContext returns the Execution that a handler runs in. The bool is false
// when the request carries no key, or when no middleware of this package is
// around the handler.
func FromContext(ctx context.Context) (*Execution, bool) {
	e, _ := ctx.Value(executionKey{}).(*Execution)
	return e, e != nil
}

// covers reports whether the cell belongs to the execution, or to one that it
// is part of. A request that meets two middlewares under one key would
// otherwise wait for itself. covers of a nil Execution is false.
//
// An execution that has ended protects no request. One may go on behind an
// http.TimeoutHandler that has answered in its place: the key is free by then,
// or another request holds it.
func (e *Execution) covers(storeKey string) bool {
	for ; e != nil; e = e.outer {
		if e.storeKey == storeKey && !e.hasEnded() {
			return true
		}
	}
	return false
}

// Key returns the client's key, unquoted, or what [Options.Key] returned.
func (e *Execution) Key() string { return e.key }

// Attempt returns 1 for the first run under the key, and more when earlier runs
// died or freed it. A handler that can ask its downstream what became of a
// payment does so when Attempt is over 1.
//
// Attempts are counted for [Options.TTL] after a run that answered 5xx, met a
// body that broke off, gave no answer or died, and after every later run. After
// a first run that says that nothing was done, they are counted for one
// [Options.Lease], or for TTL if the key was at-most-once. When the store has
// lost the record, or the run is unprotected, Attempt is 1.
func (e *Execution) Attempt() int { return e.attempt }

// Protected reports whether the run holds its key. It is false when the store is
// down and [Options.FailOpen] is set: then nothing that is attached is committed,
// so a handler that would attach a transaction commits it itself.
func (e *Execution) Protected() bool { return !e.failOpen }

// Context returns the context that the handler was called with. It ends when
// the run is over: the response is stored or given up, or the handler panicked.
// A store that begins transactions for handlers follows this context. The one
// that the handler passes to the store may be derived from it, and end as soon
// as the function returns that made it, or never. During the calls that a store
// gets after the run, it is context.Background.
func (e *Execution) Context() context.Context { return e.context }

// DownstreamKey returns an idempotency key for a call that the handler makes to
// another service. It is the same in every attempt and distinct for each name.
// A service that gets the key of one name cannot compute the key of another
// unless it knows the client's key. It has the form of a UUID (version 8, RFC
// 9562, section 5.8), which every API accepts. It does not depend on the
// payload: a changed payload must fail downstream rather than run twice.
func (e *Execution) DownstreamKey(name string) string {
	b := appendField([]byte("idempotency downstream key 1"), e.storeKey)
	b = appendField(b, e.key)
	b = appendField(b, name)
	sum := sha256.Sum256(b)
	sum[6] = sum[6]&0x0f | 0x80
	sum[8] = sum[8]&0x3f | 0x80
	s := hex.EncodeToString(sum[:16])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// Commit says that the effect is about to happen, or has happened, and must
// never be repeated. After Commit the key is at-most-once, and whatever the
// handler answers is stored. If the process dies after Commit, retries are
// answered 409 in_progress until the lease ends, then 409 outcome_unknown until
// TTL.
//
// Commit is one renewal of the lease, which takes [Options.StoreTimeout] at
// most, its repetition included. When the store has lost the claim, Commit is
// two renewals: the first writes the claim again, the second marks it. The
// store is called with the values of ctx and without its cancellation.
//
// When Commit fails nothing is promised, and the handler decides whether to go
// on. The error wraps [ErrLeaseLost] when the key belongs to another owner by
// now. It wraps [ErrStoreUnavailable] when the store failed or the run is
// unprotected.
func (e *Execution) Commit(ctx context.Context) error {
	if e.hasEnded() {
		return errEnded
	}
	if e.claim == nil {
		return fmt.Errorf("%w: this request runs unprotected", ErrStoreUnavailable)
	}
	if err := e.claim.mark(ctx); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended { // meanwhile, and the key may have been freed
		return errEnded
	}
	e.committed = true
	return nil
}

// errEnded is what Commit returns when it comes too late: the key may be free.
var errEnded = errors.New("idempotency: Commit after the handler returned")

func (e *Execution) hasEnded() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ended
}

// Discard says that nothing happened: the response is not kept and the key is
// freed, whatever the status. It has no effect after Commit.
func (e *Execution) Discard() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.ended {
		e.discarded = true
	}
}

// Attach hands v to the store, for its Complete or Release. The contexts of
// both carry the Execution, so a store that shares a database with the handler
// can take a transaction from [Execution.Attachment], write the response on it
// and commit both. See [ErrRolledBack]. A later Attach replaces v.
//
// With an attachment a Complete that failed is not repeated, and the handler's
// response is not sent: the retry finds out whether the transaction went
// through.
//
// Begin the transaction with the context of the request. That context is
// cancelled when the handler is done, so a transaction cannot stay open. When
// the handler returns without an answer, after that context has ended or a
// large body has broken off, the store is not asked to commit: the transaction
// is rolled back and the key freed. After Commit, and with
// [Options.AtMostOnce], retries are answered 409 outcome_unknown instead, and
// the transaction is left to its context.
//
// Attach only what the store knows how to end. With [Options.FailOpen] the
// handler has to end the transaction of an unprotected run itself. A handler
// that panics ends its transaction itself too, with a deferred Rollback.
func (e *Execution) Attach(v any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.ended {
		e.attachment = v
	}
}

// Attachment returns what was last attached, or nil. Stores call it with the
// Execution that [FromContext] finds in the context of Complete and Release.
func (e *Execution) Attachment() any {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.attachment
}

// detachedCopy returns an Execution for the store's calls after the request. It
// holds nothing of the request: its strings are cloned, since they may be parts
// of larger ones.
func (e *Execution) detachedCopy() *Execution {
	e.mu.Lock()
	defer e.mu.Unlock()
	return &Execution{
		key: strings.Clone(e.key), storeKey: strings.Clone(e.storeKey), attempt: e.attempt,
		ended: true, committed: e.committed, discarded: e.discarded, attachment: e.attachment,
		context: context.Background(),
	}
}

// detach takes what was attached away from the store.
func (e *Execution) detach() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.attachment = nil
}

// end is called when the handler has returned, or panicked. It takes the facts
// in one step, so that a Commit in another goroutine is either among them or
// fails.
func (e *Execution) end() (committed, discarded, attached bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended = true
	return e.committed, e.discarded, e.attachment != nil
}

// A handlerContext is the context of a handler. It has the values and the
// deadline of the request's context, and ends when that context is cancelled
// with a cause of its own: a server that stops tells its handlers so. It has
// the client's cancellation only with CancelOnDisconnect: a client that hangs
// up is the client that will retry, so by default the handler finishes and its
// answer is stored.
type handlerContext struct {
	*cancellation
	execution *Execution
}

// Value implements context.Context.
func (c *handlerContext) Value(key any) any {
	if key == (executionKey{}) {
		return c.execution
	}
	return c.value(key)
}

// String implements fmt.Stringer, for tests and logs that print a context.
// Printing its fields would race with the goroutines that write them.
func (c *handlerContext) String() string { return "idempotency.handlerContext" }

// A cancellation is the end of a handler's context. The context that can be
// cancelled is made when the handler first asks for its end, and only from then
// on follows the request's context. Most handlers that take microseconds do not
// ask, and its allocations would be a tenth of such a request.
type cancellation struct {
	request    context.Context
	keepCancel bool // CancelOnDisconnect

	mu       sync.Mutex // guards what follows
	parent   context.Context
	observed bool // the handler has asked for the end of its context
	stop     context.CancelCauseFunc
	unfollow func() bool // ends the registration with the request's context; nil if there is none
	ended    bool
}

// observe returns the context that does the work, to a handler that can see its
// end.
func (c *cancellation) observe() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.parent == nil {
		c.makeLocked()
	}
	c.observed = true
	return c.parent
}

// hasEnded reports whether the handler can have seen the end of its context. A
// handler that never looked has not given up: when it returns without an
// answer, that is a 200.
func (c *cancellation) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.observed && c.parent.Err() != nil
}

// makeLocked makes the context.
func (c *cancellation) makeLocked() {
	if c.keepCancel {
		c.parent, c.stop = context.WithCancelCause(c.request)
	} else {
		c.followLocked()
	}
	if c.ended {
		c.endLocked(nil)
	}
}

// followLocked makes a context that ends when the request's context is
// cancelled with a cause of its own. WithoutCancel drops the deadline together
// with the cancellation, so the deadline is set again: it holds for a handler
// whose client has hung up, too.
func (c *cancellation) followLocked() {
	c.parent, c.stop = context.WithCancelCause(context.WithoutCancel(c.request))
	if cause := c.serverCause(); cause != nil {
		c.stop(cause) // before the deadline, which may be over by now
	}
	if deadline, limited := c.request.Deadline(); limited {
		cancel, stop := c.stop, context.CancelFunc(nil)
		c.parent, stop = context.WithDeadline(c.parent, deadline)
		c.stop = func(cause error) { cancel(cause); stop() }
	}
	c.unfollow = context.AfterFunc(c.request, func() {
		if cause := c.serverCause(); cause != nil {
			c.cancel(cause)
		}
	})
}

// serverCause returns the cause with which the request's context was cancelled.
// It returns nil for a client that hung up, whose cause is context.Canceled, and
// for a deadline, which the handler's context has itself.
func (c *cancellation) serverCause() error {
	cause := context.Cause(c.request)
	if errors.Is(cause, context.Canceled) || errors.Is(c.request.Err(), context.DeadlineExceeded) {
		return nil
	}
	return cause
}

// cancel ends the context, if it has not ended yet. Without a cause, the cause
// is context.Canceled.
func (c *cancellation) cancel(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	if c.parent == nil && cause != nil {
		c.makeLocked() // made later, it could find its deadline over and miss the cause
	}
	c.ended = true
	if c.parent != nil {
		c.endLocked(cause)
	}
}

// endLocked ends the context that was made. The request's context may live as
// long as its server, so nothing of the handler stays registered with it.
func (c *cancellation) endLocked(cause error) {
	c.stop(cause)
	if c.unfollow != nil {
		c.unfollow()
	}
}

// Deadline implements context.Context.
func (c *cancellation) Deadline() (time.Time, bool) { return c.request.Deadline() }

// Done implements context.Context.
func (c *cancellation) Done() <-chan struct{} { return c.observe().Done() }

// Err implements context.Context.
func (c *cancellation) Err() error { return c.observe().Err() }

// value is Value without the Execution. Package context looks for the context
// that it can cancel by such a key as an *int, and must find the handler's and
// not the request's. WithoutCancel keeps it from the request's under any key.
func (c *cancellation) value(key any) any {
	if _, ok := key.(*int); ok {
		// context.Cause finds the cause by such a key. Before Go 1.26 it did so
		// without calling Err, and then this is where the handler sees the end.
		return c.observe().Value(key)
	}
	return context.WithoutCancel(c.request).Value(key)
}
