package idempotency

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// A retry repeats a store call in the background, until it succeeds or its time
// is over. It has a timer and no goroutine, and holds no request: while a store
// is down, there may be one for each request that was refused.
type retry struct {
	call   func() error
	until  time.Time // a failure after it is the last one
	pause  time.Duration
	longer time.Duration   // the longest pause
	done   func(err error) // called with the last error, or nil
}

// firstRetry is the first pause, which doubles with each failure.
const firstRetry = 50 * time.Millisecond

// start makes the first try after a short pause: the request itself has tried
// just before.
func (r *retry) start() {
	r.pause = firstRetry
	r.again()
}

// try makes one try, on the goroutine of the timer.
func (r *retry) try() {
	err := r.call()
	switch {
	case err == nil || isFinalError(err) || !time.Now().Before(r.until):
		r.done(err)
	default:
		r.pause = min(2*r.pause, r.longer)
		r.again()
	}
}

// again sets the timer for about the pause. The jitter spreads calls that
// failed together, so that a store that comes back is not asked by all of them
// at once. The last try is made when the time is over, and not before.
func (r *retry) again() {
	pause := r.pause/2 + rand.N(r.pause/2+1)
	time.AfterFunc(min(pause, max(0, time.Until(r.until))), r.try)
}

// completeLater goes on storing the result of a handler that has finished, for
// the rest of the lease and MaxExecution more. Until the lease ends, no other
// request can run. After that, a retry may run the handler again, unless the
// key is at-most-once. If one does, Complete returns ErrLeaseLost, and
// completeLater gives up. If no retry has come, a late record is still better
// than none: the next retry gets it.
//
// A store may be up and refuse the result, one that is too large for it, say. A
// handler that has finished must not run again because of that. So in the second
// half of the lease, small takes the place of a result that the store refuses
// although it renews the claim. It takes two refusals in a row: the first may be
// that of a store that has just come back.
func (c *claim) completeLater(ctx context.Context, r, small Result) {
	leaseEnd, _ := c.standing()
	ctx, o := c.detach(ctx)
	r.Fingerprint = bytes.Clone(r.Fingerprint) // the request, which holds it, is over
	small.Fingerprint = r.Fingerprint
	renewal := c.question(c.attempt, c.hasSentMark())
	renewal.Token, renewal.Fingerprint = o.token, r.Fingerprint
	later := retry{until: leaseEnd.Add(o.opts.MaxExecution), longer: o.opts.Lease / 6}
	refused := false
	later.call = func() error {
		err := o.storeResult(ctx, o.opts.StoreTimeout, r)
		if err == nil || isFinalError(err) || time.Until(leaseEnd) > o.opts.Lease/2 {
			return err
		}
		rec, down := o.acquire(ctx, o.opts.StoreTimeout, renewal)
		up := down == nil && rec.State == Acquired
		if !up || !refused {
			refused = up
			return err
		}
		o.warn(ctx, o.storeKey, "the store refuses a response, so retries are told response_not_stored", err)
		return o.storeResult(ctx, o.opts.StoreTimeout, small)
	}
	later.done = func(err error) {
		if err != nil {
			o.warn(ctx, o.storeKey, "storing a response failed, its request may run again", err)
		}
	}
	later.start()
}

// The bounds of what a middleware releases in the background. At 2,000 refused
// requests a second, a store that is down for a lease of 30s would otherwise
// leave 60,000 timers.
const (
	maxPendingReleases = 50_000 // keys that wait to be released; about 30 MiB
	maxReleaseCalls    = 16     // store calls at a time, so that a store that comes back is not flooded
)

// releases counts what a middleware releases in the background: the keys, and
// the store calls that are on their way.
type releases struct{ pending, calls atomic.Int64 }

var (
	errTooManyReleases = errors.New("too many keys wait to be released")
	errReleasesBusy    = errors.New("other keys are being released")
)

// releaseLater frees the key in the background. It goes on for one lease, after
// which an unmarked claim has ended by itself. A mark that was sent may stand
// until TTL, so releaseLater then goes on for MaxExecution more. When it gives
// up, or when too many keys wait already, it logs that. The key then stays
// claimed until its lease ends, or until TTL if it is marked.
func (c *claim) releaseLater(ctx context.Context, keep time.Duration) {
	if c.releases.pending.Add(1) > maxPendingReleases {
		c.releases.pending.Add(-1)
		c.warn(ctx, c.storeKey, "a key stays claimed", errTooManyReleases)
		return
	}
	until := time.Now().Add(c.opts.Lease)
	if c.hasSentMark() {
		until = until.Add(c.opts.MaxExecution)
	}
	ctx, o := c.detach(ctx)
	later := retry{until: until, longer: o.opts.Lease / 6}
	later.call = func() error {
		defer o.releases.calls.Add(-1)
		if o.releases.calls.Add(1) > maxReleaseCalls {
			return errReleasesBusy
		}
		return o.freeKey(ctx, o.opts.StoreTimeout, keep)
	}
	later.done = func(err error) {
		o.releases.pending.Add(-1)
		if err != nil {
			o.warn(ctx, o.storeKey, "freeing a key failed, it stays claimed", err)
		}
	}
	later.start()
}

// detach returns what calls in the background need, and nothing of the request,
// whose values belong to its router once it is over and may be large. The
// context carries a copy of the Execution in ctx, if there is one.
func (c *claim) detach(ctx context.Context) (context.Context, owner) {
	o := owner{c.middleware, strings.Clone(c.storeKey), strings.Clone(c.token)}
	e, ok := FromContext(ctx)
	if !ok {
		return context.Background(), o
	}
	return context.WithValue(context.Background(), executionKey{}, e.detachedCopy()), o
}
