package idempotency

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
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
	call     *call      // nil when the run is unprotected
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
// never be repeated: from here the key is at-most-once, and whatever the
// handler answers is stored. If the run dies after Commit, retries are answered
// 409 outcome_unknown until TTL.
//
// It is one store call, which takes StoreTimeout at most. When it fails nothing
// is promised, and the handler decides whether to go on. The error wraps
// [ErrLeaseLost] when the key belongs to someone else by now, and
// [ErrStoreUnavailable] when the store failed or the run is unprotected.
func (e *Execution) Commit(ctx context.Context) error {
	if e.call == nil {
		return fmt.Errorf("%w: this request runs unprotected", ErrStoreUnavailable)
	}
	if e.hasEnded() {
		return errEnded
	}
	if err := e.call.commit(ctx); err != nil {
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

func (e *Execution) isCommitted() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.committed
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

// A lease is the running claim of one execution. A timer renews it every third
// of its length and notices when it is lost.
type lease struct {
	call   *call // whose claim it is
	length time.Duration
	limit  time.Time // from here on it is not renewed

	mu       sync.Mutex // guards what follows
	timer    *time.Timer
	end      time.Time // the claim holds until then at least, by our monotonic clock
	renewing bool
	stopped  bool
	taken    bool // another owner was seen
	freed    bool // the run is not to have the key any more
}

// start begins to keep the lease that c has claimed.
func (l *lease) start(c *call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.call, l.length = c, c.opts.Lease
	l.limit, l.end = c.claimed.Add(c.opts.MaxExecution), c.claimSent.Add(l.length)
	l.timer = time.AfterFunc(l.untilLocked(c.claimed, l.length/3), l.tick)
}

// untilLocked returns the time to the next tick: next, or the end of the
// execution if that comes first.
func (l *lease) untilLocked(now time.Time, next time.Duration) time.Duration {
	return max(0, min(next, l.limit.Sub(now), l.end.Sub(now)))
}

// tick renews the lease, or cancels the handler when that is no longer
// possible. While the store is asked the timer goes on towards the end of the
// lease, so that a store that hangs cannot hide it.
func (l *lease) tick() {
	l.mu.Lock()
	now := time.Now()
	switch {
	case l.stopped:
	case !now.Before(l.end):
		l.stopped = true
		l.call.context.cancel(ErrLeaseLost)
		l.call.warn("a lease could not be renewed in time", ErrLeaseLost)
	case !now.Before(l.limit):
		l.stopped = true
		l.call.context.cancel(context.DeadlineExceeded)
	case l.renewing:
		l.timer.Reset(l.untilLocked(now, l.length))
	default:
		l.renewing = true
		l.timer.Reset(l.untilLocked(now, l.length))
		l.mu.Unlock()
		l.renewOnce(now)
		return
	}
	l.mu.Unlock()
}

func (l *lease) renewOnce(sent time.Time) {
	rec, err := l.call.renew(&l.call.context, sent, false)
	if err != nil {
		l.call.warn("renewing a lease failed", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.renewing = false
	if l.stopped {
		l.lateLocked(rec, err, l.call.isOnce())
		return
	}
	switch {
	case err != nil:
		l.timer.Reset(l.untilLocked(time.Now(), l.length/12)) // a few more tries before the end
	case rec.State == Acquired:
		l.extendLocked(sent)
		l.timer.Reset(l.untilLocked(time.Now(), l.length/3))
	default:
		l.loseLocked()
	}
}

func (l *lease) extendLocked(sent time.Time) {
	if end := sent.Add(l.length); end.After(l.end) {
		l.end = end
	}
}

func (l *lease) loseLocked() {
	l.taken, l.stopped = true, true
	l.timer.Stop()
	l.call.context.cancel(ErrLeaseLost) // without effect if it was cancelled before
	l.call.warn("a lease was taken over", ErrLeaseLost)
}

// extended tells the lease what a Commit came to.
func (l *lease) extended(sent time.Time, rec Record, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.stopped:
		l.lateLocked(rec, err, true)
	case err != nil:
	case rec.State == Acquired:
		l.extendLocked(sent)
	default:
		l.loseLocked()
	}
}

// lateLocked takes the answer to a renewal that was still on its way when the
// lease was stopped. If the key was freed meanwhile, and someone else has come
// and gone, it may have claimed the key for nobody; once says whether for good.
func (l *lease) lateLocked(rec Record, err error, once bool) {
	seen := err == nil && rec.State != Acquired
	l.taken = l.taken || seen
	// Of two tries the first may still arrive.
	if l.freed && (!seen || l.call.uncertain.Load()) {
		l.call.giveBack(once)
	}
}

// free is called before the key is freed, or when it is lost. It reports whether
// it is for the first time.
func (l *lease) free() (first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first, l.freed = !l.freed, true
	return first
}

// stop ends the renewals. It returns the end of the lease and whether another
// owner was seen. A renewal that is on its way finds its own claim, or see
// lateLocked.
func (l *lease) stop() (end time.Time, taken bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	l.timer.Stop()
	return l.end, l.taken
}
