package idempotency

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A giveBack frees a claim for which nobody will run, in the background: one
// that may have been made although its answer was lost, or that may still
// arrive. It frees it as soon as the store is there, and once more when the marker
// that it left has expired, or is over for another reason: a claim that arrives
// where no marker is would hold the key for a lease, and an at-most-once claim
// that nobody knows of would never end.
//
// While the store is down there may be one for every request that was refused,
// for as long as MaxExecution, so it is small and has no goroutine but for a
// call that is on its way.
type giveBack struct {
	*middleware
	ctx             context.Context // for its values
	storeKey, token string
	end             time.Time // after this a failure is the last one
	pause           time.Duration
	freed           bool
}

const firstGiveBack = 50 * time.Millisecond

// giveBack begins to free the claim. once says that it may be at-most-once.
func (c *call) giveBack(once bool) {
	g := &giveBack{
		middleware: c.middleware, ctx: context.WithoutCancel(c.r.Context()), storeKey: c.storeKey, token: c.token,
		end: c.backgroundEnd(time.Now().Add(c.opts.Lease), once), pause: firstGiveBack,
	}
	g.after(g.pause)
}

func (g *giveBack) after(d time.Duration) { time.AfterFunc(d, g.try) }

func (g *giveBack) try() {
	if !g.calm.enter() {
		g.after(g.pause)
		return
	}
	err := g.free()
	g.calm.leave(err)
	now := time.Now()
	switch {
	case err == nil && !g.freed:
		g.freed, g.pause = true, firstGiveBack
		g.after(max(g.opts.Lease, absentMarker) + g.pause)
	case err == nil:
	case !now.Before(g.end):
		g.opts.logger().LogAttrs(g.ctx, slog.LevelWarn, "idempotency: releasing an uncertain claim failed",
			slog.String("store_key", g.storeKey), slog.Any("error", err))
	default:
		g.pause = min(2*g.pause, g.opts.Lease/6)
		g.after(min(g.pause, g.end.Sub(now)))
	}
}

func (g *giveBack) free() (err error) {
	sc := newStoreContext(g.ctx, g.opts.StoreTimeout)
	defer sc.end(context.Canceled)
	defer containStore(&err)
	return g.store.Release(sc, g.storeKey, g.token)
}

// A calm keeps what is done in the background from burying a store that is down
// or has just come back.
type calm struct {
	mu      sync.Mutex // guards what follows
	running int
	quiet   time.Time // nothing begins before
}

const (
	calmCalls = 16                    // on their way at a time
	calmPause = 10 * time.Millisecond // after a failure
)

// enter is false when it is to be tried later.
func (c *calm) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running >= calmCalls || time.Now().Before(c.quiet) {
		return false
	}
	c.running++
	return true
}

func (c *calm) leave(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	c.quiet = time.Time{}
	if err != nil {
		c.quiet = time.Now().Add(calmPause)
	}
}
