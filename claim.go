package idempotency

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"
)

const (
	storeKeyBytes = 43 // SHA-256 in base64url
	tokenBytes    = 22 // 16 bytes in base64url
)

// newToken returns 16 random bytes. They tell owners apart and are no secret, so
// they need not come from crypto/rand.
func newToken() (token [16]byte) {
	binary.LittleEndian.PutUint64(token[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(token[8:], rand.Uint64())
	return token
}

// A storeOp is one of the calls below.
type storeOp func(c *call, ctx context.Context) error

// complete stores the result.
func (c *call) complete(ctx context.Context) error {
	return c.store.Complete(ctx, c.storeKey, c.token, c.result)
}

// free releases the claim.
func (c *call) free(ctx context.Context) error {
	return c.store.Release(ctx, c.storeKey, c.token, c.opts.Lease)
}

// try calls op with a context that carries the values of ctx.
func (c *call) try(ctx context.Context, timeout time.Duration, op storeOp) (err error) {
	sc := newStoreContext(ctx, timeout)
	defer sc.end(context.Canceled)
	defer containStore(&err)
	return op(c, sc)
}

// containStore makes a store that panics one that fails. In the background its
// panic would be the end of the process. It is to be deferred.
func containStore(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("store panicked: %v\n%s", p, debug.Stack())
	}
}

// acquire asks the store for the key, and once more when the first answer is
// lost: the token makes that harmless. It is called at start. The first try gets
// half of StoreTimeout, so that one that hangs leaves time for another.
func (c *call) acquire(ctx context.Context, start time.Time, claim Claim) (Record, error) {
	if c.memory != nil {
		return c.memory.acquireAt(int64(start.Sub(memoryEpoch)), c.storeKey, claim)
	}
	rec, err := c.tryAcquire(ctx, c.opts.StoreTimeout/2, claim)
	if err != nil && !errors.Is(err, ErrStoreFull) {
		c.uncertain.Store(true)
		if !errors.Is(err, ErrTooFewReplicas) { // which another try would only meet again
			rec, err = c.tryAcquire(ctx, c.opts.StoreTimeout-time.Since(start), claim)
		}
	}
	return rec, err
}

func (c *call) tryAcquire(ctx context.Context, timeout time.Duration, claim Claim) (rec Record, err error) {
	sc := newStoreContext(ctx, timeout)
	defer sc.end(context.Canceled)
	defer containStore(&err)
	rec, err = c.store.Acquire(sc, c.storeKey, claim)
	if err == nil && (rec.State < Acquired || rec.State > Lost) {
		err = fmt.Errorf("store returned %v", rec.State)
	}
	if err != nil {
		return Record{}, err
	}
	return rec, nil
}

var errLateClaim = errors.New("idempotency: the lease was over before the handler could start")

// tryClaim asks for the key in the name of the request. A process that was
// stopped meanwhile asks once more: its lease is over, and someone else may
// have run by now.
func (c *call) tryClaim() (Record, error) {
	for range 2 {
		c.claimSent = monotonicNow()
		rec, err := c.acquire(c.r.Context(), c.claimSent, Claim{
			Token: c.token, Fingerprint: c.fingerprint,
			Lease: c.opts.Lease, TTL: c.opts.TTL, Once: c.opts.AtMostOnce,
		})
		c.claimed = monotonicNow()
		if err != nil || rec.State != Acquired || c.claimed.Sub(c.claimSent) < c.opts.Lease {
			return rec, err
		}
	}
	c.uncertain.Store(true)
	// Whoever has the key now may be running, so FailOpen must not.
	return Record{State: InProgress}, errLateClaim
}

// monotonicNow is half of what time.Now costs, and only for comparison.
func monotonicNow() time.Time { return memoryEpoch.Add(time.Duration(memoryNow())) }

// renew extends the claim; once marks it as never to be taken over. A renewal
// says again what it knows, in case that the store has lost the record.
func (c *call) renew(ctx context.Context, sent time.Time, once bool) (Record, error) {
	once = once || c.opts.AtMostOnce || c.execution.isCommitted()
	if e, _ := FromContext(ctx); e != &c.execution {
		// A context of the handler's own. By the Execution in it a store can tell a
		// renewal from a new claim.
		ctx = context.WithValue(ctx, executionKey{}, &c.execution)
	}
	return c.acquire(ctx, sent, Claim{
		Token: c.token, Fingerprint: c.fingerprint,
		Lease: c.opts.Lease, TTL: c.opts.TTL, Attempt: c.execution.attempt, Once: once,
	})
}

const (
	firstPoll = 25 * time.Millisecond
	lastPoll  = time.Second
)

// wait waits for the execution that holds the key, and returns what it left:
// its response, or the key. The record is still InProgress when Wait, or the
// client's patience, is over.
//
// A waiter watches first, then asks, then waits for the watch, the end of the
// lease, its Wait or its client, whichever is first. Without a watch it polls.
func (c *call) wait(rec Record) (Record, error) {
	started := time.Now()
	defer func() { c.waited = time.Since(started) }()
	ctx, cancel := context.WithTimeout(c.r.Context(), c.opts.Wait)
	defer cancel()

	poll := firstPoll
	for first := true; ; first = false {
		changed, err := c.watch(ctx)
		if err != nil && first {
			c.warn("watching a key failed, polling instead", err)
		}
		if changed != nil {
			// What changed before the watch began would not be noticed.
			if rec, err = c.tryClaim(); err != nil || rec.State != InProgress {
				return rec, err
			}
		}
		pause := rec.Remaining
		if changed == nil {
			pause = min(pause, poll/2+rand.N(poll/2))
			poll = min(2*poll, lastPoll)
		}
		if !sleepUntil(ctx, changed, max(pause, time.Millisecond)) {
			return rec, nil
		}
		if rec, err = c.tryClaim(); err != nil || rec.State != InProgress {
			return rec, err
		}
		// Someone else has the key now, or the watch was a false alarm. Not
		// trusting it for a moment keeps a broken one from becoming a busy loop.
		if changed != nil && !sleepUntil(ctx, nil, rand.N(firstPoll)) {
			return rec, nil
		}
	}
}

// watch returns nil when the store cannot watch, or not now.
func (c *call) watch(ctx context.Context) (<-chan struct{}, error) {
	if c.watcher == nil {
		return nil, nil
	}
	changed, err := c.watcher.Watch(ctx, c.storeKey)
	if err != nil {
		return nil, err
	}
	return changed, nil
}

// sleepUntil waits for d or changed. It is false when ctx ended first. When both
// have come, that of changed counts: an answer may be there.
func sleepUntil(ctx context.Context, changed <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-changed:
		return true
	case <-timer.C:
		return true
	case <-ctx.Done():
	}
	select {
	case <-changed:
		return true
	default:
		return false
	}
}

// commit is Execution.Commit: a renewal that also marks the claim.
func (c *call) commit(ctx context.Context) error {
	sent := time.Now()
	rec, err := c.renew(ctx, sent, true)
	c.lease.extended(sent, rec, err)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStoreUnavailable, err)
	}
	if rec.State != Acquired {
		return fmt.Errorf("%w: the key is %v", ErrLeaseLost, rec.State)
	}
	return nil
}

// persist repeats op, a Complete or a Release, within StoreTimeout until it
// succeeds or its error is final.
func (c *call) persist(ctx context.Context, op storeOp) error {
	if c.memory != nil { // which looks at no context and takes no time
		return op(c, ctx)
	}
	deadline := time.Now().Add(c.opts.StoreTimeout)
	timeout := c.opts.StoreTimeout / 2
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		err := c.try(ctx, timeout, op)
		if err == nil || isFinal(err) || time.Until(deadline) <= pause {
			return err
		}
		time.Sleep(pause)
		timeout = time.Until(deadline)
	}
}

// isFinal reports whether repeating a store call is pointless.
func isFinal(err error) bool {
	return errors.Is(err, ErrLeaseLost) || errors.Is(err, ErrRolledBack)
}

// persistLater goes on with op in the background until end. It tries once at
// least, and for the last time at the end.
func (c *call) persistLater(ctx context.Context, end time.Time, failure string, op storeOp) {
	go func() {
		for pause := 50 * time.Millisecond; ; pause = min(2*pause, c.opts.Lease/6) {
			last := time.Until(end) <= pause
			time.Sleep(min(pause, max(0, time.Until(end))))
			err := c.try(ctx, c.opts.StoreTimeout, op)
			if err == nil {
				return
			}
			if isFinal(err) || last {
				c.warn(failure, err)
				if errors.Is(err, ErrLeaseLost) {
					c.abandon()
				}
				return
			}
		}
	}()
}

// backgroundEnd returns how long it makes sense to go on after a store failed,
// for a claim whose lease runs until end: nobody takes an at-most-once claim
// over, which would leave its outcome unknown.
func (c *call) backgroundEnd(end time.Time, once bool) time.Time {
	if once {
		return end.Add(c.opts.MaxExecution)
	}
	return end
}

// isOnce reports whether the claim may be marked as at-most-once, even if no
// Commit succeeded: the reply to one may have been lost.
func (c *call) isOnce() bool { return c.opts.AtMostOnce || c.uncertain.Load() }
