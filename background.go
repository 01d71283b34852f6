package idempotency

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Background lets a program that stops wait for the work of middlewares that
// a server does not wait for. [Options.Background] gives it to a middleware,
// and several middlewares may share one. The zero value is ready to use. A
// Background must not be copied, and is safe for concurrent use.
//
// [http.Server.Shutdown] returns when all requests are answered. Two things may
// still go on then. While the store fails, the middleware sends a response that
// is not stored yet, and goes on storing it. A process that exits before that
// loses the response, and a retry runs the handler again. And a handler goes on
// running when http.TimeoutHandler has answered in its place. So a program calls
// Wait between Shutdown and its exit:
//
//	err := server.Shutdown(ctx)
//	err = errors.Join(err, background.Wait(ctx))
type Background struct {
	running atomic.Int64 // requests that ask for a key or hold one

	mu      sync.Mutex       // guards what follows, and retry.timer
	retries map[*retry]error // with the error of the last try
	waiting int              // calls of Wait
	idle    chan struct{}    // closed when nothing goes on; nil unless Wait needs it
}

// Wait returns nil when nothing goes on any more: no request with a key is
// being answered, no response waits to be stored, and no key waits to be freed.
// While Wait waits, store calls that failed are repeated at once and then after
// pauses of at most 0.2 seconds. Without Wait the pauses grow to a sixth of
// [Options.Lease], to spare a store that is down.
//
// When ctx ends first, the error wraps that of ctx and tells how much is left.
// Each response that is not stored is then logged with its store key, since its
// request may run again if the program exits. The work goes on until the
// program exits, and Wait may be called again.
//
// Work may begin while Wait waits. Call Wait after the server has stopped taking
// requests: a request that arrives later is not waited for. When Shutdown gives
// up because handlers are still running, Wait waits for those handlers too.
func (b *Background) Wait(ctx context.Context) error {
	running, retries := b.drain(ctx)
	if running == 0 && len(retries) == 0 {
		return nil
	}
	unstored := 0
	for r, err := range retries {
		if r.stores {
			unstored++
			r.warn(r.ctx, r.storeKey, "a response is not stored yet, its request may run again if the program exits now", err)
		}
	}
	return fmt.Errorf("%d requests running, %d responses not stored, %d keys not freed: %w",
		running, unstored, len(retries)-unstored, ctx.Err())
}

// drain waits until nothing goes on or ctx ends, and returns what is left. It
// has all retries make their next try at once.
func (b *Background) drain(ctx context.Context) (running int64, retries map[*retry]error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting++
	defer func() { b.waiting-- }()
	for r := range b.retries {
		if r.timer.Stop() { // else a try is on its way
			r.timer.Reset(rand.N(firstRetry))
		}
	}
	for b.running.Load() > 0 || len(b.retries) > 0 {
		if ctx.Err() != nil {
			return b.running.Load(), maps.Clone(b.retries)
		}
		b.sleepLocked(ctx)
	}
	return 0, nil
}

// sleepLocked unlocks b until nothing goes on or ctx ends.
func (b *Background) sleepLocked(ctx context.Context) {
	if b.idle == nil {
		b.idle = make(chan struct{})
	}
	idle := b.idle
	b.mu.Unlock()
	defer b.mu.Lock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// isAwaited reports whether a program is about to exit.
func (b *Background) isAwaited() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waiting > 0
}

// enter counts a request that is about to ask for its key. A nil Background
// counts nothing, because processors would share the counter. With a
// MemoryStore they share nothing else.
func (b *Background) enter() {
	if b != nil {
		b.running.Add(1)
	}
}

// leave ends what enter began. What the request leaves to the background has
// begun before that, so Wait never finds a gap between the two.
func (b *Background) leave() {
	if b != nil && b.running.Add(-1) == 0 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.wakeLocked()
	}
}

// remove ends a retry.
func (b *Background) remove(r *retry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.retries, r)
	if len(b.retries) == 0 {
		b.wakeLocked()
	}
}

// wakeLocked has the calls of Wait look again.
func (b *Background) wakeLocked() {
	if b.idle != nil {
		close(b.idle)
		b.idle = nil
	}
}

// A retry repeats a store call in the background, until it succeeds or its time
// is over. It has a timer and no goroutine, and holds no request: while a store
// is down, there may be one for each request that was refused.
type retry struct {
	until  time.Time     // a failure after it is the last one
	longer time.Duration // the longest pause
	owner
	ctx    context.Context // from detach
	stores bool            // a response; else the retry frees a key
	call   func() error
	done   func(err error) // called with the last error, or nil

	pause time.Duration
	timer *time.Timer // guarded by Background.mu
}

// firstRetry is the first pause, which doubles with each failure. While Wait
// waits, no pause is longer than awaitedPause: the program does not exit before.
const (
	firstRetry   = 50 * time.Millisecond
	awaitedPause = 200 * time.Millisecond
)

// start makes the first try after a short pause: the request itself has tried
// just before.
func (r *retry) start() {
	r.pause = firstRetry
	r.again(nil)
}

// try makes one try, on the goroutine of the timer.
func (r *retry) try() {
	err := r.call()
	switch {
	case err == nil || isFinalError(err) || !time.Now().Before(r.until):
		r.done(err)
		r.background.remove(r)
	default:
		r.pause = min(2*r.pause, r.longer)
		r.again(err)
	}
}

// again sets the timer for about the pause. The jitter spreads calls that
// failed together, so that a store that comes back is not asked by all of them
// at once. The last try is made when the time is over, and not before.
func (r *retry) again(err error) {
	b := r.background
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.retries == nil {
		b.retries = make(map[*retry]error)
	}
	b.retries[r] = err
	pause := r.pause
	if b.waiting > 0 {
		pause = min(pause, awaitedPause)
	}
	pause = pause/2 + rand.N(pause/2+1)
	r.timer = time.AfterFunc(min(pause, max(0, time.Until(r.until))), r.try)
}

// maxUnstored is how many bytes of responses wait to be stored in a middleware.
// When a store is down it takes no claims either, so that few responses wait.
// When a store takes claims and refuses responses, at 1,000 responses of 1 MiB
// a second, the middleware would otherwise hold 20 GiB, and the process would
// die.
const maxUnstored = 64 << 20

var errTooManyUnstored = errors.New("the responses that wait to be stored take too much memory")

// completeLater goes on storing the result of a handler that has finished, for
// the rest of the lease and MaxExecution more. Until the lease ends, no other
// request can run. After that, a retry may run the handler again, unless the
// key is at-most-once. If one does, Complete returns ErrLeaseLost, and
// completeLater gives up. If no retry has come, a late record is still better
// than none: the next retry gets it.
//
// A store may be up and refuse the result, one that is too large for it, say. A
// handler that has finished must not run again because of that. So in the
// second half of the lease, small takes the place of a result that the store
// refuses although it renews the claim. It takes two refusals in a row: the
// first may be that of a store that has just come back. While Wait waits, small
// does not wait for the second half: the program may exit before. A result that
// exceeds maxUnstored is replaced by small at once.
func (c *claim) completeLater(ctx context.Context, r, small Result) {
	leaseEnd, _ := c.standing()
	ctx, o := c.detach(ctx)
	size := int64(len(r.Value) + sizeOf(r.parts))
	if o.unstored.Add(size) > maxUnstored {
		o.unstored.Add(-size)
		r, size = small, 0
		o.warn(ctx, o.storeKey, "a response is not kept, so retries are told response_not_stored", errTooManyUnstored)
	}
	r.Fingerprint = bytes.Clone(r.Fingerprint) // the request, which holds it, is over
	small.Fingerprint = r.Fingerprint
	renewal := c.question(c.attempt, c.hasSentMark())
	renewal.Token, renewal.Fingerprint = o.token, r.Fingerprint
	later := retry{until: leaseEnd.Add(o.opts.MaxExecution), longer: o.opts.Lease / 6, owner: o, ctx: ctx, stores: true}
	refused := false
	later.call = func() error {
		err := o.storeResult(ctx, o.opts.StoreTimeout, r)
		if err == nil || isFinalError(err) || time.Until(leaseEnd) > o.opts.Lease/2 && !o.background.isAwaited() {
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
		o.unstored.Add(-size)
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
	maxPendingReleases = 50_000 // keys that wait to be released; about 25 MiB
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
	later := retry{until: until, longer: o.opts.Lease / 6, owner: o, ctx: ctx}
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
