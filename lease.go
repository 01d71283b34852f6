package idempotency

import (
	"context"
	"sync"
	"time"
)

// A lease keeps a claim while its handler runs. A timer renews the claim every
// third of its lease, and cancels the handler when the claim is lost.
//
// A third leaves time to repeat a failed renewal before the lease ends. A lease
// is a timer and not a goroutine, because most handlers return before the first
// tick. For them it only sets and stops a timer.
type lease struct {
	claim   *claim
	ctx     context.Context // of the handler, for its values
	handler *cancellation
	limit   time.Time // the end of MaxExecution, from which the claim is not renewed

	mu       sync.Mutex // guards what follows
	timer    *time.Timer
	renewing bool
	stopped  bool
}

// start begins to keep the claim. MaxExecution and the first tick count from
// claim.answered, so start need not read the clock again.
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

// tick renews the claim, or cancels the handler when that is no longer
// possible. While a renewal is on its way, the timer goes on towards the end of
// the lease. A store that hangs then cannot keep the handler from being
// cancelled in time.
//
// The lock is not held during the renewal: stop waits for the lock when the
// handler has returned, and a slow store must not hold up its response.
func (l *lease) tick() {
	l.mu.Lock()
	now := time.Now()
	end, lost := l.claim.standing() // under the lock: renew may have extended it just now
	switch {
	case l.stopped:
	case lost: // a Commit or a renewal found that out, and cancelled the handler
		l.stopped = true
	case !now.Before(end):
		l.stopped = true
		// Another owner may take the key from now on. The handler is told at
		// once, so that the two overlap as little as possible.
		l.handler.cancel(ErrLeaseLost)
		l.claim.warn(l.ctx, l.claim.storeKey, "a lease could not be renewed in time", ErrLeaseLost)
	case !now.Before(l.limit):
		l.stopped = true
		// The claim goes on until the end of its lease, which is the time that
		// the handler has to return.
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

// renew renews the claim once and sets the timer for the next renewal. After a
// failure, the next one comes a twelfth of the lease later, which leaves time
// for a few more tries before the lease ends.
func (l *lease) renew() {
	_, err := l.claim.renew(l.ctx, false)
	end, lost := l.claim.standing()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.renewing = false
	if l.stopped {
		return // the request may be over, and what its context holds may be in use for another
	}
	next := l.claim.opts.Lease / 3
	if err != nil {
		l.claim.warn(l.ctx, l.claim.storeKey, "renewing a lease failed", err)
		next = l.claim.opts.Lease / 12
	}
	if lost {
		l.stopped = true
		l.timer.Stop()
		l.claim.warn(l.ctx, l.claim.storeKey, "a lease was taken over", ErrLeaseLost)
		return
	}
	l.timer.Reset(l.until(time.Now(), end, next))
}

// stop ends the renewals. It does not wait for a renewal that is on its way.
// That renewal may still extend the claim, or find that the key is lost;
// claim.standing tells.
func (l *lease) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.timer.Stop()
}
