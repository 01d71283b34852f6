package idempotency

import (
	"context"
	"math/rand/v2"
	"time"
)

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
		changed, err := c.watch(ctx)
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

// watch returns nil when the store cannot watch, or not now.
func (c *claim) watch(ctx context.Context) (changed <-chan struct{}, err error) {
	if c.watcher == nil {
		return nil, nil
	}
	defer containStore(&err)
	if changed, err = c.watcher.Watch(ctx, c.storeKey); err != nil {
		return nil, err
	}
	return changed, nil
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
