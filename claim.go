package idempotency

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"
)

// tokenBytes is the length of a token: 16 bytes in base64url.
const tokenBytes = 22

// newToken returns 16 random bytes. They tell owners apart and are no secret,
// so they need not come from crypto/rand.
func newToken() (token [16]byte) {
	binary.LittleEndian.PutUint64(token[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(token[8:], rand.Uint64())
	return token
}

// A claim is the hold of one request on its key. It asks for the key, waits for
// it, renews it, and gives it up by storing a result or by freeing the key. No
// other part of the middleware calls the Store.
//
// Two rules of Store keep the claim simple. A renewal marks only the attempt
// that it names, and only renewals mark. So a command of a claim that arrives
// after the claim has ended holds the key for one lease at the most, and needs
// no attention.
type claim struct {
	*middleware
	storeKey    string
	token       string
	fingerprint []byte

	// These are written until the handler starts, by the goroutine of the
	// request alone.
	attempt      int
	answered     time.Time     // when the store answered the last Acquire
	waited       time.Duration // for another execution
	heldByOther  bool          // another execution may be running
	mayBeClaimed bool          // the store may hold a claim that no handler runs under
	handler      *cancellation // of the handler, or nil before it starts

	mu       sync.Mutex // guards what follows
	leaseEnd time.Time  // the lease runs until then at least, by our monotonic clock
	marked   bool       // the store said that the claim has Once
	markSent bool       // a mark was sent, answered or not
	lost     bool       // a renewal found that the key is not ours any more
}

// errLateClaim says why a request is refused whose process was too slow.
var errLateClaim = errors.New("idempotency: the lease was over, or the mark lost, before the handler could start")

// get asks for the key and, while another execution holds it, waits. The client's
// cancellation, which comes with ctx, ends waiting but no store call.
func (c *claim) get(ctx context.Context) (Record, error) {
	rec, err := c.try(ctx)
	if err != nil || rec.State != InProgress {
		return rec, err
	}
	c.heldByOther = true
	if c.opts.Wait == NoWait {
		return rec, nil
	}
	return c.wait(ctx, rec)
}

// try asks for the key. A process that was stopped between the question and the
// answer may find that the lease is over by now, and that another owner has come
// and gone. It asks once more then.
func (c *claim) try(ctx context.Context) (Record, error) {
	for range 2 {
		sent := monotonicNow()
		rec, err := c.ask(ctx, sent, 0, false)
		c.answered = monotonicNow()
		if err != nil || rec.State != Acquired {
			return rec, err
		}
		c.hold(sent, rec)
		if c.opts.AtMostOnce {
			if rec, err = c.renew(ctx, true); err != nil {
				c.mayBeClaimed = true
				return Record{}, err
			}
			c.answered = monotonicNow()
			if rec.State != Acquired { // another owner has come meanwhile
				return Record{State: InProgress}, nil
			}
		}
		if (rec.Once || !c.opts.AtMostOnce) && c.answered.Before(c.leaseEnd) {
			return rec, nil
		}
	}
	c.mayBeClaimed, c.heldByOther = true, true
	return Record{}, errLateClaim
}

// hold notes that the key was claimed.
func (c *claim) hold(sent time.Time, rec Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attempt, c.leaseEnd, c.lost = rec.Attempt, sent.Add(c.opts.Lease), false
}

// ask asks the store for the key, or to renew the claim of attempt. It asks once
// more when the first answer is lost: the token makes that harmless. The first
// try gets half of StoreTimeout, so that one that hangs leaves time for another.
func (c *claim) ask(ctx context.Context, sent time.Time, attempt int, once bool) (Record, error) {
	q := Claim{
		Token: c.token, Fingerprint: c.fingerprint, Lease: c.opts.Lease, TTL: c.opts.TTL,
		Attempt: attempt, Once: once,
	}
	if c.memory != nil {
		return c.memory.acquireAt(int64(sent.Sub(memoryEpoch)), c.storeKey, q)
	}
	rec, err := c.askOnce(ctx, c.opts.StoreTimeout/2, q)
	if err == nil || errors.Is(err, ErrStoreFull) {
		return rec, err
	}
	if attempt == 0 {
		c.mayBeClaimed = true
	}
	if errors.Is(err, ErrTooFewReplicas) { // which another try would only meet again
		return rec, err
	}
	return c.askOnce(ctx, c.opts.StoreTimeout-time.Since(sent), q)
}

func (c *claim) askOnce(ctx context.Context, timeout time.Duration, q Claim) (rec Record, err error) {
	err = callStore(ctx, timeout, func(ctx context.Context) error {
		rec, err = c.store.Acquire(ctx, c.storeKey, q)
		if err == nil && (rec.State < Acquired || rec.State > Lost) {
			err = fmt.Errorf("store returned %v", rec.State)
		}
		return err
	})
	if err != nil {
		return Record{}, err
	}
	return rec, nil
}

// callStore calls op with the values of ctx, without its cancellation, and makes
// a store that panics one that fails: in the background its panic would be the
// end of the process.
func callStore(ctx context.Context, timeout time.Duration, op func(context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("store panicked: %v\n%s", p, debug.Stack())
		}
	}()
	return op(ctx)
}

// monotonicNow is half of what time.Now costs, and only for comparison.
func monotonicNow() time.Time { return memoryEpoch.Add(time.Duration(memoryNow())) }

const (
	firstPoll = 25 * time.Millisecond
	lastPoll  = time.Second
)

// wait waits for the execution that holds the key, and returns what it left: its
// response, or the key. The record is still InProgress when Wait, or the client's
// patience, is over.
//
// A waiter watches first, then asks, then waits for the watch, the end of the
// lease, its Wait or its client, whichever is first. Without a watch it polls.
func (c *claim) wait(ctx context.Context, rec Record) (Record, error) {
	started := time.Now()
	defer func() { c.waited = time.Since(started) }()
	ctx, cancel := context.WithTimeout(ctx, c.opts.Wait)
	defer cancel()

	poll := firstPoll
	for first := true; ; first = false {
		changed, err := c.watch(ctx)
		if err != nil && first {
			c.warn(ctx, c.storeKey, "watching a key failed, polling instead", err)
		}
		if changed != nil {
			// What changed before the watch began would not be noticed.
			if rec, err = c.try(ctx); err != nil || rec.State != InProgress {
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
		if rec, err = c.try(ctx); err != nil || rec.State != InProgress {
			return rec, err
		}
		// Another owner has the key now, or the watch was a false alarm. Not
		// trusting it for a moment keeps a broken one from becoming a busy loop.
		if changed != nil && !sleepUntil(ctx, nil, rand.N(firstPoll)) {
			return rec, nil
		}
	}
}

// watch returns nil when the store cannot watch, or not now.
func (c *claim) watch(ctx context.Context) (<-chan struct{}, error) {
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
// have come, changed counts: an answer may be there.
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

// renew starts the lease anew; once marks the claim as never to be taken over.
// Every renewal after that repeats the mark, in case that the store has lost the
// record. A store that has lost it answers without Once and writes the claim
// again, so it is asked once more.
func (c *claim) renew(ctx context.Context, once bool) (rec Record, err error) {
	c.mu.Lock()
	c.markSent = c.markSent || once
	once = once || c.marked
	c.mu.Unlock()
	for range 2 {
		sent := monotonicNow()
		rec, err = c.ask(ctx, sent, c.attempt, once)
		if err != nil {
			return rec, err
		}
		c.renewed(sent, rec)
		if rec.State != Acquired || rec.Once || !once {
			break
		}
	}
	return rec, nil
}

// renewed notes what the store answered to a renewal.
func (c *claim) renewed(sent time.Time, rec Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rec.State != Acquired {
		c.lost = true
		if c.handler != nil {
			c.handler.cancel(ErrLeaseLost) // without effect if it was cancelled before
		}
		return
	}
	c.marked = c.marked || rec.Once
	if end := sent.Add(c.opts.Lease); end.After(c.leaseEnd) {
		c.leaseEnd = end
	}
}

// mark makes the key at-most-once while its handler runs.
func (c *claim) mark(ctx context.Context) error {
	rec, err := c.renew(ctx, true)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrStoreUnavailable, err)
	case rec.State != Acquired:
		return fmt.Errorf("%w: the key is %v", ErrLeaseLost, rec.State)
	case !rec.Once:
		return fmt.Errorf("%w: it loses the claim", ErrStoreUnavailable)
	}
	return nil
}

// standing returns when the lease ends, and whether the key was lost before.
func (c *claim) standing() (leaseEnd time.Time, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaseEnd, c.lost
}

// complete stores the result. With an attachment it tries once: a transaction
// ends only once.
func (c *claim) complete(ctx context.Context, r Result, attached bool) error {
	if c.memory != nil {
		return c.memory.Complete(ctx, c.storeKey, c.token, r)
	}
	op := func(ctx context.Context) error { return c.store.Complete(ctx, c.storeKey, c.token, r) }
	if attached {
		return callStore(ctx, c.opts.StoreTimeout, op)
	}
	return c.persist(ctx, op)
}

// release frees the key, in the background if the store fails now. Its marker is
// kept for keep.
func (c *claim) release(ctx context.Context, keep time.Duration) error {
	if c.memory != nil {
		return c.memory.Release(ctx, c.storeKey, c.token, keep)
	}
	err := c.persist(ctx, func(ctx context.Context) error {
		return c.store.Release(ctx, c.storeKey, c.token, keep)
	})
	if err != nil {
		c.releaseLater(ctx, keep)
	}
	return err
}

// persist repeats op within StoreTimeout until it succeeds or its error is final.
func (c *claim) persist(ctx context.Context, op func(context.Context) error) error {
	deadline := time.Now().Add(c.opts.StoreTimeout)
	timeout := c.opts.StoreTimeout / 2
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		err := callStore(ctx, timeout, op)
		if err == nil || isFinalError(err) || time.Until(deadline) <= pause {
			return err
		}
		time.Sleep(pause)
		timeout = time.Until(deadline)
	}
}

// isFinalError reports whether repeating a store call is pointless.
func isFinalError(err error) bool {
	return errors.Is(err, ErrLeaseLost) || errors.Is(err, ErrRolledBack)
}

// abandon gives up a claim that no handler will run under. Such a claim may stand
// in the store although its answer was lost, or may arrive there later.
func (c *claim) abandon() {
	if c.mayBeClaimed {
		c.releaseLater(context.Background(), c.opts.Lease)
	}
}
