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

// An Execution is one run of a handler under a key. It is safe for concurrent
// use. After the handler has returned, Commit fails, and Discard and Attach come
// too late.
type Execution struct {
	key      string
	storeKey string
	attempt  int
	claim    *claim     // nil when the run is unprotected
	outer    *Execution // that of a middleware around this one, under another key; or nil

	mu         sync.Mutex // guards what follows
	ended      bool
	committed  bool
	discarded  bool
	attachment any
}

type executionKey struct{}

// FromContext returns the Execution that a handler runs in. It is false when
// the request carries no key, or the middleware is not there.
func FromContext(ctx context.Context) (*Execution, bool) {
	e, _ := ctx.Value(executionKey{}).(*Execution)
	return e, e != nil
}

// covers reports whether the execution, or one that it is part of, is that of the
// cell. Of a nil Execution that is false.
func (e *Execution) covers(storeKey string) bool {
	for ; e != nil; e = e.outer {
		if e.storeKey == storeKey {
			return true
		}
	}
	return false
}

// Key returns the client's key, unquoted.
func (e *Execution) Key() string { return e.key }

// Attempt returns 1, or more when earlier runs under the key died, or freed it.
// A handler that can ask its downstream what became of a payment does so when
// Attempt is over 1.
func (e *Execution) Attempt() int { return e.attempt }

// DownstreamKey returns an idempotency key for a call that the handler makes to
// another service: the same in every attempt, distinct for each name, unrelated
// to the client's key for those who do not know it. It has the form of a UUID
// (version 8, RFC 9562), which every API accepts. It does not depend on the
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
// never be repeated. From here the key is at-most-once, and whatever the handler
// answers is stored. If the process dies after Commit, retries are answered
// 409 outcome_unknown until TTL.
//
// Commit is one store call, which takes StoreTimeout at most. When the store has
// lost the claim, Commit is two calls: one writes the claim again, one marks it.
// When Commit fails nothing is promised, and the handler decides whether to go
// on. The error wraps [ErrLeaseLost] when the key belongs to another owner by
// now, and [ErrStoreUnavailable] when the store failed or the run is unprotected.
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

// Attach hands v to the store: the contexts of Complete and Release carry the
// Execution, so that a store which shares a database with the handler can take
// a transaction from [Execution.Attachment], write the response on it and
// commit both. See [ErrRolledBack]. With an attachment a failed Complete is not
// retried, and the handler's response is not sent: whether the transaction went
// through is what the retry finds out.
//
// Begin a transaction with the context of the request, which is cancelled when
// the handler is done, so that nothing can leave it open. When the handler
// returns without an answer after that context has ended, or a large body has
// broken off, the store is not asked to commit: the transaction is rolled back and
// the key freed, or, after Commit and with [Options.AtMostOnce], left to its
// context.
//
// Attach only what the store knows how to end, and not with [Options.FailOpen]:
// nobody ends what is attached to an unprotected run. A handler that panics ends
// its transaction itself, with a deferred Rollback.
func (e *Execution) Attach(v any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.ended {
		e.attachment = v
	}
}

// Attachment returns what was last attached, or nil.
func (e *Execution) Attachment() any {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.attachment
}

// detachedCopy returns an Execution for the store's calls after the request: it
// holds nothing of the request.
func (e *Execution) detachedCopy() *Execution {
	e.mu.Lock()
	defer e.mu.Unlock()
	return &Execution{
		key: strings.Clone(e.key), storeKey: strings.Clone(e.storeKey), attempt: e.attempt,
		ended: true, committed: e.committed, discarded: e.discarded, attachment: e.attachment,
	}
}

// detach takes what was attached away from the store.
func (e *Execution) detach() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.attachment = nil
}

// end is called when the handler has returned, or panicked.
func (e *Execution) end() (committed, discarded, attached bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended = true
	return e.committed, e.discarded, e.attachment != nil
}

// A handlerContext is the context of a handler: with the values and the deadline
// of the request's, and without the client's cancellation. A client that hangs
// up is the one that will retry, so the work is finished and its answer stored.
type handlerContext struct {
	*cancellation
	execution *Execution
}

// Value implements context.Context.
func (c *handlerContext) Value(key any) any {
	if key == (executionKey{}) {
		return c.execution
	}
	return c.cancellation.value(key)
}

// String implements fmt.Stringer, for tests and logs that print a context. Its
// fields are not theirs to read.
func (c *handlerContext) String() string { return "idempotency.handlerContext" }

// A cancellation is the end of a handler's context. What it takes to cancel a
// context is made when the handler asks for it: most handlers that take
// microseconds do not, and four allocations are a tenth of such a request.
type cancellation struct {
	request    context.Context
	keepCancel bool // CancelOnDisconnect

	mu       sync.Mutex // guards what follows
	parent   context.Context
	observed bool // the handler has asked for the end of its context
	stop     context.CancelCauseFunc
	ended    bool
}

// inner returns the context that does the work. All values go through it: by
// some of them package context finds a parent.
func (c *cancellation) inner() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.parent == nil {
		c.makeLocked()
	}
	return c.parent
}

// observe is inner for a handler that can see the end of its context.
func (c *cancellation) observe() context.Context {
	inner := c.inner()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.observed = true
	return inner
}

// hasEnded reports whether the handler can have seen the end of its context.
func (c *cancellation) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.observed && c.parent.Err() != nil
}

func (c *cancellation) makeLocked() {
	ctx := c.request
	deadline, limited := ctx.Deadline()
	if !c.keepCancel {
		ctx = context.WithoutCancel(ctx)
	}
	c.parent, c.stop = context.WithCancelCause(ctx)
	if limited {
		cancel, stop := c.stop, context.CancelFunc(nil)
		c.parent, stop = context.WithDeadline(c.parent, deadline)
		c.stop = func(cause error) { cancel(cause); stop() }
	}
	if c.ended {
		c.stop(nil)
	}
}

// cancel ends the context, if it has not ended yet. Without a cause that is
// context.Canceled.
func (c *cancellation) cancel(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	if c.parent == nil && cause != nil {
		c.makeLocked() // now: later its deadline may seem to have come first
	}
	c.ended = true
	if c.parent != nil {
		c.stop(cause)
	}
}

// Deadline implements context.Context.
func (c *cancellation) Deadline() (time.Time, bool) { return c.request.Deadline() }

// Done implements context.Context.
func (c *cancellation) Done() <-chan struct{} { return c.observe().Done() }

// Err implements context.Context.
func (c *cancellation) Err() error { return c.observe().Err() }

func (c *cancellation) value(key any) any {
	if _, ok := key.(*int); ok {
		// By such a key context.Cause looks for the cause, before Go 1.26 without
		// asking for Err.
		return c.observe().Value(key)
	}
	return c.inner().Value(key)
}
