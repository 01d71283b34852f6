package idempotency

import (
	"context"
	"sync"
	"time"
)

// A handlerContext is the context of a handler: with the values and the deadline
// of the request's, and without the client's cancellation. A client that hangs
// up is the one that will retry, so the work is finished and its answer stored.
//
// What it takes to cancel it is made when somebody asks: most handlers that take
// microseconds do not, and four allocations are a tenth of such a request.
type handlerContext struct {
	request    context.Context
	execution  *Execution
	keepCancel bool // CancelOnDisconnect

	mu    sync.Mutex // guards what follows
	inner context.Context
	asked bool // somebody wanted to know of its end
	stop  context.CancelCauseFunc
	ended bool
}

// within returns the context that does the work. All values go through it, that
// by which package context finds a parent as well.
func (c *handlerContext) within() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inner == nil {
		c.makeLocked()
	}
	return c.inner
}

// watched is within for who wants to know of the end.
func (c *handlerContext) watched() context.Context {
	inner := c.within()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = true
	return inner
}

// hasEnded reports whether the handler can have seen the end of its context.
func (c *handlerContext) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked && c.inner.Err() != nil
}

func (c *handlerContext) makeLocked() {
	ctx := c.request
	deadline, limited := ctx.Deadline()
	if !c.keepCancel {
		ctx = context.WithoutCancel(ctx)
	}
	c.inner, c.stop = context.WithCancelCause(ctx)
	if limited {
		cancel, stop := c.stop, context.CancelFunc(nil)
		c.inner, stop = context.WithDeadline(c.inner, deadline)
		c.stop = func(cause error) { cancel(cause); stop() }
	}
	if c.ended {
		c.stop(nil)
	}
}

// cancel ends the context, if it has not ended yet. Without a cause that is
// context.Canceled.
func (c *handlerContext) cancel(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	if c.inner == nil && cause != nil {
		c.makeLocked() // now: later its deadline may seem to have come first
	}
	c.ended = true
	if c.inner != nil {
		c.stop(cause)
	}
}

// String implements fmt.Stringer, for tests and logs that print a context. Its
// fields are not theirs to read.
func (c *handlerContext) String() string { return "idempotency.handlerContext" }

// Deadline implements context.Context.
func (c *handlerContext) Deadline() (time.Time, bool) { return c.request.Deadline() }

// Done implements context.Context.
func (c *handlerContext) Done() <-chan struct{} { return c.watched().Done() }

// Err implements context.Context.
func (c *handlerContext) Err() error { return c.watched().Err() }

// Value implements context.Context.
func (c *handlerContext) Value(key any) any {
	if key == (executionKey{}) {
		return c.execution
	}
	if _, ok := key.(*int); ok {
		// By such a key context.Cause looks for the cause, before Go 1.26 without
		// asking for Err.
		return c.watched().Value(key)
	}
	return c.within().Value(key)
}

// A storeContext is the context of one store call: the values of the request, a
// deadline, and not the client's cancellation. Its timer is made only when a
// store asks for Done. MemoryStore does not, and the timer is what makes
// context.WithTimeout cost more than a whole replay from memory.
type storeContext struct {
	context.Context // for its values
	deadline        time.Time

	mu    sync.Mutex // guards what follows
	done  chan struct{}
	timer *time.Timer
	err   error
}

// newStoreContext returns a context with the values of ctx. Even the cause of the
// end of ctx, which package context finds among them, is kept off.
func newStoreContext(ctx context.Context, timeout time.Duration) *storeContext {
	return &storeContext{Context: context.WithoutCancel(ctx), deadline: time.Now().Add(timeout)}
}

func (c *storeContext) String() string { return "idempotency.storeContext" }

func (c *storeContext) Deadline() (time.Time, bool) { return c.deadline, true }

func (c *storeContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.err != nil {
			close(c.done)
		} else {
			c.timer = time.AfterFunc(time.Until(c.deadline), func() { c.end(context.DeadlineExceeded) })
		}
	}
	return c.done
}

func (c *storeContext) Err() error {
	if !time.Now().Before(c.deadline) {
		c.end(context.DeadlineExceeded)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *storeContext) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	if c.done != nil {
		close(c.done)
		c.timer.Stop()
	}
}
