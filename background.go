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
// is down there may be one for each request that was refused.
type retry struct {
	call   func() error
	until  time.Time // a failure from then on is the last one
	pause  time.Duration
	longer time.Duration   // the longest pause
	done   func(err error) // called with the last error, or nil
}

const firstRetry = 50 * time.Millisecond

// start makes the first try after a short pause.
func (r *retry) start() {
	r.pause = firstRetry
	r.again()
}

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

// again waits for about the pause: those that failed together come back one
// after the other.
func (r *retry) again() {
	pause := r.pause/2 + rand.N(r.pause/2+1)
	time.AfterFunc(min(pause, max(0, time.Until(r.until))), r.try)
}

// completeLater goes on storing the result of a handler that has finished. It
// goes on beyond the end of the lease, until which no other request can run: from
// then on a retry may come first, and Complete then finds that the key is lost.
func (c *claim) completeLater(ctx context.Context, r Result) {
	r.Fingerprint = bytes.Clone(r.Fingerprint)
	leaseEnd, _ := c.standing()
	until := leaseEnd.Add(c.opts.MaxExecution)
	call, storeKey := c.detached(ctx), strings.Clone(c.storeKey)
	token, m := strings.Clone(c.token), c.middleware
	later := retry{until: until, longer: c.opts.Lease / 6, call: func() error {
		return callStore(call, m.opts.StoreTimeout, func(ctx context.Context) error {
			return m.store.Complete(ctx, storeKey, token, r)
		})
	}}
	later.done = func(err error) {
		if err != nil {
			m.warn(call, storeKey, "storing a response failed, its request may run again", err)
		}
	}
	later.start()
}

// The bounds of what is released in the background.
const (
	maxPendingReleases = 50_000 // at a time, of one middleware; about 30 MiB
	maxReleaseCalls    = 16     // at a time, so that a store that comes back is not flooded
)

// releases counts what a middleware releases in the background.
type releases struct{ pending, calls atomic.Int64 }

var (
	errTooManyReleases = errors.New("too many keys wait to be released")
	errReleasesBusy    = errors.New("other keys are being released")
)

// releaseLater frees the key in the background. It goes on for one lease, after
// which an unmarked claim has ended by itself. A mark that was sent may stand
// until TTL, so it gets another MaxExecution.
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
	call, storeKey := c.detached(ctx), strings.Clone(c.storeKey)
	token, m := strings.Clone(c.token), c.middleware
	later := retry{until: until, longer: c.opts.Lease / 6, call: func() error {
		if m.releases.calls.Add(1) > maxReleaseCalls {
			m.releases.calls.Add(-1)
			return errReleasesBusy
		}
		defer m.releases.calls.Add(-1)
		return callStore(call, m.opts.StoreTimeout, func(ctx context.Context) error {
			return m.store.Release(ctx, storeKey, token, keep)
		})
	}}
	later.done = func(err error) {
		m.releases.pending.Add(-1)
		if err != nil {
			m.warn(call, storeKey, "freeing a key failed, it stays claimed", err)
		}
	}
	later.start()
}

func (c *claim) hasSentMark() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.markSent
}

// detached returns a context that carries a copy of the Execution in ctx, if
// there is one, and nothing else: the values of a request belong to its router
// once the request is over, and may be large.
func (c *claim) detached(ctx context.Context) context.Context {
	e, ok := FromContext(ctx)
	if !ok || e.storeKey != c.storeKey {
		return context.Background()
	}
	return context.WithValue(context.Background(), executionKey{}, e.detachedCopy())
}
