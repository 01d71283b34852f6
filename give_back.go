package idempotency

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
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
// for as long as MaxExecution, so it is small, and has a timer and no goroutine.
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
	// Without the execution of a middleware around this one, whose transaction a
	// store would roll back.
	ctx := context.WithValue(context.WithoutCancel(c.r.Context()), executionKey{}, (*Execution)(nil))
	g := &giveBack{
		middleware: c.middleware, ctx: ctx, storeKey: c.storeKey, token: c.token,
		end: c.backgroundEnd(time.Now().Add(c.opts.Lease), once), pause: firstGiveBack,
	}
	if g.calm.begin() {
		g.after(g.pause)
	} else {
		g.giveUp(errTooManyGiveBacks)
	}
}

func (g *giveBack) after(d time.Duration) { time.AfterFunc(d, g.try) }

func (g *giveBack) try() {
	err := errNotNow
	if g.calm.enter() {
		err = g.free()
		g.calm.leave(err)
	}
	now := time.Now()
	switch {
	case err == nil && !g.freed:
		g.freed, g.pause = true, firstGiveBack
		g.after(g.opts.Lease + g.pause)
	case err == nil:
		g.calm.end()
	case err != errNotNow && !now.Before(g.end):
		g.calm.end()
		g.giveUp(err)
	default:
		g.pause = min(2*g.pause, g.opts.Lease/6)
		pause := g.pause
		if err == errNotNow { // at another time than all the others
			pause = pause/2 + rand.N(pause/2+1)
		}
		if now.Before(g.end) {
			pause = min(pause, g.end.Sub(now))
		}
		g.after(pause)
	}
}

func (g *giveBack) giveUp(err error) {
	g.opts.logger().LogAttrs(g.ctx, slog.LevelWarn, "idempotency: releasing an uncertain claim failed",
		slog.String("store_key", g.storeKey), slog.Any("error", err))
}

func (g *giveBack) free() (err error) {
	sc := newStoreContext(g.ctx, g.opts.StoreTimeout)
	defer sc.end(context.Canceled)
	defer containStore(&err)
	return g.store.Release(sc, g.storeKey, g.token, g.opts.Lease)
}

// A calm keeps what is given back from burying a store that is down or has just
// come back, and from filling the memory.
type calm struct {
	mu      sync.Mutex // guards what follows
	begun   int
	running int
	quiet   time.Time // nothing is tried before
}

const (
	maxGiveBacks = 50_000                // about 50 MiB
	calmCalls    = 16                    // on their way at a time
	calmPause    = 10 * time.Millisecond // after a failure
)

var (
	errTooManyGiveBacks = errors.New("too many others wait to be released")
	errNotNow           = errors.New("the store is busy with others, or down")
)

// begin is false when there are too many.
func (c *calm) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.begun >= maxGiveBacks {
		return false
	}
	c.begun++
	return true
}

func (c *calm) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun--
}

// enter is false when it is to be tried later. A few do no harm.
func (c *calm) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running >= calmCalls || c.begun > calmCalls && time.Now().Before(c.quiet) {
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
