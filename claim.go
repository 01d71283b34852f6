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
// so they need not come from crypto/rand, which takes several times as long.
func newToken() (token [16]byte) {
	binary.LittleEndian.PutUint64(token[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(token[8:], rand.Uint64())
	return token
}

// An owner is the name under which a request calls the store: a key and a token.
// It outlives the request where a call goes on in the background.
type owner struct {
	*middleware
	storeKey, token string
}

// acquire calls Acquire. A State that does not exist, or a claim without an
// attempt, which could not be renewed, is a failure of the store and not a free
// key.
func (o owner) acquire(ctx context.Context, timeout time.Duration, q Claim) (rec Record, err error) {
	err = callStore(ctx, timeout, func(ctx context.Context) error {
		rec, err = o.store.Acquire(ctx, o.storeKey, q)
		if err == nil && (rec.State < Acquired || rec.State > Lost || rec.State == Acquired && rec.Attempt < 1) {
			err = fmt.Errorf("store returned %v with attempt %d", rec.State, rec.Attempt)
		}
		return err
	})
	if err != nil {
		return Record{}, err
	}
	return rec, nil
}

// storeResult calls Complete.
func (o owner) storeResult(ctx context.Context, timeout time.Duration, r Result) error {
	return callStore(ctx, timeout, func(ctx context.Context) error {
		return o.store.Complete(ctx, o.storeKey, o.token, r)
	})
}

// freeKey calls Release.
func (o owner) freeKey(ctx context.Context, timeout, keep time.Duration) error {
	return callStore(ctx, timeout, func(ctx context.Context) error {
		return o.store.Release(ctx, o.storeKey, o.token, keep)
	})
}

// A claim is the hold of one request on its key. It asks for the key, waits for
// it, renews it, and gives it up by storing a result or by freeing the key. No
// other part of the middleware calls the Store.
//
// Two rules of Store keep the claim simple: only a renewal marks, and it marks
// only the attempt that it names. So a command of a claim that arrives after
// the claim has ended holds the key for one lease at most. The middleware need
// not look for it.
type claim struct {
	owner
	fingerprint []byte

	// These are written until the handler starts, by the goroutine of the
	// request alone.
	attempt      int
	answered     time.Time     // when the store answered the Acquire that got the key
	waited       time.Duration // how long the request waited for another execution
	heldByOther  bool          // another execution may be running
	mayBeClaimed bool          // a call has failed that may have claimed the key, or may do so yet
	handler      *cancellation // cancels the handler; nil before it starts

	mu       sync.Mutex // guards what follows
	leaseEnd time.Time  // the lease runs until then at least, by our monotonic clock
	marked   bool       // the store said that the claim has Once
	markSent bool       // a mark was sent, answered or not
	lost     bool       // a renewal found that the key is not ours any more
	freed    bool       // the key was freed, so that nothing may mark it
}

// errLateClaim is why a request is refused when its process was too slow to use
// the claim, or when the store has lost the mark twice.
var errLateClaim = errors.New("idempotency: the lease was over, or the mark lost, before the handler could start")

// try asks for the key, and with AtMostOnce marks it. The handler must not
// start under a lease that is over: a process that was stopped between the
// question and the answer may have been overtaken by another owner. So try
// compares the end of the lease with the time of the last answer. When the
// lease is over or the mark is missing, it asks once more. After two such
// failures the request is refused: the process is too slow to keep a lease, or
// the store does not keep the mark.
func (c *claim) try(ctx context.Context) (Record, error) {
	for range 2 {
		sent := monotonicNow()
		rec, err := c.ask(ctx, sent, 0, false)
		if err != nil || rec.State != Acquired {
			return rec, err
		}
		c.answered = monotonicNow()
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
		c.heldByOther = true // by an owner that came while this process was stopped
	}
	c.mayBeClaimed = true
	return Record{}, errLateClaim
}

// hold notes that the key was claimed. The lease counts from when the question
// was sent, and the store does not begin to count earlier. So the claim never
// relies on a lease for longer than the store does.
func (c *claim) hold(sent time.Time, rec Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.attempt, c.leaseEnd, c.lost = rec.Attempt, sent.Add(c.opts.Lease), false
}

// question returns what is asked of Acquire: the key (attempt 0), or to renew
// the claim of attempt.
func (c *claim) question(attempt int, once bool) Claim {
	return Claim{
		Token: c.token, Fingerprint: c.fingerprint, Lease: c.opts.Lease, TTL: c.opts.TTL,
		Attempt: attempt, Once: once,
	}
}

// ask asks the store for the key (attempt 0), or to renew the claim of attempt.
// When the first answer is lost it asks once more, which the token makes
// harmless. The first try gets half of StoreTimeout, so that a try that hangs
// leaves time for another.
//
// A failed claim may have been written, so it is noted for abandon. A full
// store has certainly written nothing. A failed renewal is not noted here: its
// handler is running, or try notes it.
func (c *claim) ask(ctx context.Context, sent time.Time, attempt int, once bool) (Record, error) {
	q := c.question(attempt, once)
	if c.memory != nil {
		return c.memory.acquireAt(int64(sent.Sub(memoryEpoch)), c.storeKey, q)
	}
	rec, err := c.acquire(ctx, c.opts.StoreTimeout/2, q)
	if err == nil || errors.Is(err, ErrStoreFull) {
		return rec, err
	}
	if attempt == 0 {
		c.mayBeClaimed = true
	}
	if errors.Is(err, ErrTooFewReplicas) { // which another try would only meet again
		return rec, err
	}
	return c.acquire(ctx, c.opts.StoreTimeout-time.Since(sent), q)
}

// callStore calls op with the values of ctx and without its cancellation. A
// panic of the store becomes an error: in the background it would end the
// process.
func callStore(ctx context.Context, timeout time.Duration, op func(context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	defer containStore(&err)
	return op(ctx)
}

// containStore makes a panic of the store an error. It is to be deferred.
func containStore(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("store panicked: %v\n%s", p, debug.Stack())
	}
}

// monotonicNow returns a time that is good only for comparison. It takes half
// as long as time.Now, which also reads the wall clock.
func monotonicNow() time.Time { return memoryEpoch.Add(time.Duration(memoryNow())) }

// renew starts the lease anew. With once it marks the claim as at-most-once.
// When the store has confirmed the mark, every later renewal repeats it, in
// case the store loses the record. A store that has lost the record writes the
// claim again and answers without Once, so renew asks a second time to mark
// the new claim. It does not do so when the key was freed meanwhile: such a
// mark would belong to no handler.
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
		if again := c.renewed(sent, rec) && once && !rec.Once; !again {
			break
		}
	}
	return rec, nil
}

// renewed notes what the store answered to a renewal, and reports whether the
// claim stands. Answers may come out of order, as Commit renews beside the
// lease, so the end of the lease only grows.
func (c *claim) renewed(sent time.Time, rec Record) (stands bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rec.State != Acquired {
		c.lost = true
		if c.handler != nil {
			c.handler.cancel(ErrLeaseLost) // without effect if it was cancelled before
		}
		return false
	}
	c.marked = c.marked || rec.Once
	if end := sent.Add(c.opts.Lease); end.After(c.leaseEnd) {
		c.leaseEnd = end
	}
	return !c.freed
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

// standing returns when the lease ends, and whether a renewal has found that
// the key is lost.
func (c *claim) standing() (leaseEnd time.Time, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaseEnd, c.lost
}

// complete stores the result. With an attachment it tries once: a transaction
// can be ended only once, and after a lost answer the second try would find it
// gone.
func (c *claim) complete(ctx context.Context, r Result, attached bool) error {
	if c.memory != nil {
		return c.memory.Complete(ctx, c.storeKey, c.token, r)
	}
	if attached {
		return c.storeResult(ctx, c.opts.StoreTimeout, r)
	}
	return c.persist(func(timeout time.Duration) error { return c.storeResult(ctx, timeout, r) })
}

// release frees the key, and goes on in the background if the store fails now.
// Otherwise a retry would wait for the end of the lease, or of the TTL if the
// key is marked. The store keeps the marker for at least keep.
func (c *claim) release(ctx context.Context, keep time.Duration) error {
	c.mu.Lock()
	c.freed = true
	c.mu.Unlock()
	if c.memory != nil {
		return c.memory.Release(ctx, c.storeKey, c.token, keep)
	}
	err := c.persist(func(timeout time.Duration) error { return c.freeKey(ctx, timeout, keep) })
	if err != nil {
		c.releaseLater(ctx, keep)
	}
	return err
}

// persist repeats op within StoreTimeout until it succeeds or its error is
// final. The first try gets half of the time, as in ask.
func (c *claim) persist(op func(timeout time.Duration) error) error {
	deadline := time.Now().Add(c.opts.StoreTimeout)
	timeout := c.opts.StoreTimeout / 2
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		err := op(timeout)
		if err == nil || isFinalError(err) || time.Until(deadline) <= pause {
			return err
		}
		time.Sleep(pause)
		timeout = time.Until(deadline)
	}
}

// isFinalError reports whether repeating a store call is pointless: the store
// works, and has decided.
func isFinalError(err error) bool {
	return errors.Is(err, ErrLeaseLost) || errors.Is(err, ErrRolledBack)
}

// abandon gives up a claim that no handler will run under. Such a claim may
// stand in the store although its answer was lost, or may arrive there later.
// Release leaves a marker, which such a late claim meets. A claim that the
// store has refused for certain costs no call.
func (c *claim) abandon() {
	if c.mayBeClaimed {
		c.releaseLater(context.Background(), c.markerTime(true))
	}
}

// markerTime returns how long the marker of a freed key is kept. One lease is
// enough when nothing was done, so that a flood of refused requests does not
// fill the store. A run that may have got somewhere is remembered for the TTL,
// so that the next run can tell. The TTL also applies when a mark was sent. If
// the marker were gone, a late claim and a late mark could together hold the
// key until TTL.
func (c *claim) markerTime(nothingDone bool) time.Duration {
	if nothingDone && !c.hasSentMark() {
		return c.opts.Lease
	}
	return c.opts.TTL
}

// hasSentMark reports whether the key may be at-most-once in the store.
func (c *claim) hasSentMark() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.markSent
}
