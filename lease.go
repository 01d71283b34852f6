package idempotency

import (
	"context"
	"sync"
	"time"
)

// A lease keeps a claim while its handler runs. A timer renews the claim every
// third of its lease, and cancels the handler when the claim is lost.
type lease struct {
	claim   *claim
	ctx     context.Context // of the handler, for its values
	handler *cancellation
	limit   time.Time // from here on the claim is not renewed: MaxExecution

	mu       sync.Mutex // guards what follows
	timer    *time.Timer
	renewing bool
	stopped  bool
}

// start begins to keep the claim.
func (l *lease) start() {
	now := l.claim.answered
	l.limit = now.Add(l.claim.opts.MaxExecution)
	end, _ := l.claim.standing()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timer = time.AfterFunc(l.until(now, end, l.claim.opts.Lease/3), l.tick)
}

// until returns the time to the next tick: next, or the end of the lease or of
// the execution if that comes first.
func (l *lease) until(now, leaseEnd time.Time, next time.Duration) time.Duration {
	return max(0, min(next, l.limit.Sub(now), leaseEnd.Sub(now)))
}

// tick renews the claim, or cancels the handler when that is no longer possible.
// While the store is asked the timer goes on towards the end of the lease, so
// that a store that hangs cannot hide it.
func (l *lease) tick() {
	now := time.Now()
	end, lost := l.claim.standing()
	l.mu.Lock()
	switch {
	case l.stopped:
	case lost: // a Commit found that out, and has cancelled the handler
		l.stopped = true
	case !now.Before(end):
		l.stopped = true
		l.handler.cancel(ErrLeaseLost)
		l.claim.warn(l.ctx, l.claim.storeKey, "a lease could not be renewed in time", ErrLeaseLost)
	case !now.Before(l.limit):
		l.stopped = true
		l.handler.cancel(context.DeadlineExceeded)
	case l.renewing:
		l.timer.Reset(l.until(now, end, l.claim.opts.Lease))
	default:
		l.renewing = true
		l.timer.Reset(l.until(now, end, l.claim.opts.Lease))
		l.mu.Unlock()
		l.renew()
		return
	}
	l.mu.Unlock()
}

// renew renews the claim once and sets the timer for the next time. After a
// failure that is soon, so that there are a few more tries before the lease ends.
func (l *lease) renew() {
	rec, err := l.claim.renew(l.ctx, false)
	next := l.claim.opts.Lease / 3
	switch {
	case err != nil:
		l.claim.warn(l.ctx, l.claim.storeKey, "renewing a lease failed", err)
		next = l.claim.opts.Lease / 12
	case rec.State != Acquired:
		l.claim.warn(l.ctx, l.claim.storeKey, "a lease was taken over", ErrLeaseLost)
	}
	end, lost := l.claim.standing()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.renewing = false
	if l.stopped {
		return
	}
	if lost {
		l.stopped = true
		l.timer.Stop()
		return
	}
	l.timer.Reset(l.until(time.Now(), end, next))
}

// stop ends the renewals. One that is on its way may still extend the claim, or
// find that the key is lost; claim.standing tells.
func (l *lease) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.timer.Stop()
}
