package idempotency

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// errTooManyWaiting is why a duplicate was refused without a wait.
var errTooManyWaiting = errors.New("as many duplicates as Options.MaxWaiting allows are waiting")

// obtain asks for the key and, while another execution holds it, waits. The
// client's cancellation ends the wait and the watch, but never a call of
// Acquire: a claim that was cancelled on its way may have been written.
func (c *call) obtain() (Record, error) {
	rec, err := c.claim.try(c.r.Context())
	if err != nil || rec.State != InProgress {
		return rec, err
	}
	c.claim.heldByOther = true
	if c.opts.Wait == NoWait {
		return rec, nil
	}
	if !c.beginWait() {
		return rec, errTooManyWaiting
	}
	defer c.waiting.Add(-1)
	c.body.shrink()
	return c.claim.wait(c.r.Context(), rec)
}

// beginWait counts one more waiting duplicate, or reports that MaxWaiting are
// waiting already. It never counts more, not even for a moment: a duplicate
// that is refused must not take the place of another.
func (m *middleware) beginWait() bool {
	for {
		n := m.waiting.Load()
		if n >= int64(m.opts.MaxWaiting) {
			return false
		}
		if m.waiting.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// A duplicate that polls pauses for at most firstPoll at first. That bound
// doubles up to lastPoll, so that a handler that takes minutes costs each of
// its duplicates one or two calls a second.
const (
	firstPoll = 25 * time.Millisecond
	lastPoll  = time.Second
)

// wait waits for the execution that holds the key, and returns what it left:
// its response, or the key. The record is still InProgress when Options.Wait is
// over or the client has gone.
//
// A waiter watches first, then asks, then waits for the watch, the end of the
// lease, its Wait or its client, whichever is first. What changes between the
// question and the watch is then never missed. Without a watch it polls, with
// jitter, so that duplicates that came together do not ask together.
func (c *claim) wait(ctx context.Context, rec Record) (Record, error) {
	started := time.Now()
	defer func() { c.waited = time.Since(started) }()
	ctx, cancel := context.WithTimeout(ctx, c.opts.Wait)
	defer cancel()

	poll := firstPoll
	for first := true; ; first = false {
		changed, news, err := c.watch(ctx)
		if err != nil && first {
			c.warn(ctx, c.storeKey, "watching a key failed, polling instead", err)
		}
		if changed != nil {
			// The watch does not tell what changed before it began.
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
		if news != nil {
			if told, ok := news.toldOf(c.question(0, false)); ok {
				return told, nil
			}
		}
		if rec, err = c.try(ctx); err != nil || rec.State != InProgress {
			return rec, err
		}
		// Another owner has the key now, or the watch told of nothing. A short
		// pause keeps a broken watch from becoming a busy loop.
		if changed != nil && !sleepUntil(ctx, nil, rand.N(firstPoll)) {
			return rec, nil
		}
	}
}

// watch returns nil when the store cannot watch, or not now. A RedisStore has
// news, which bring the response to many duplicates at once.
func (c *claim) watch(ctx context.Context) (changed <-chan struct{}, news *redisNews, err error) {
	defer containStore(&err)
	switch watcher := c.watcher.(type) {
	case nil:
		return nil, nil, nil
	case *RedisStore:
		if news, err = watcher.watch(ctx, watcher.opts.Prefix+c.storeKey); err == nil {
			changed = news.changed
		}
	default:
		changed, err = watcher.Watch(ctx, c.storeKey)
	}
	if err != nil {
		return nil, nil, err
	}
	return changed, news, nil
}

// sleepUntil waits for d or changed. It is false when ctx ended first. When ctx
// and changed have both come, changed counts: the answer may be there, and the
// client is still owed it when only Options.Wait is over.
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
