package storetest

import (
	"slices"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Two kinds of duration keep the suite from failing on a slow machine. A lease
// or TTL that a rule waits for is short. Any other is long: it outlives the rule,
// however slow the machine.
const (
	ruleTimeout = time.Minute
	long        = 5 * time.Minute
)

// A timing is the durations that a rule works with.
type timing struct {
	// short is a lease or TTL that a rule waits out.
	short time.Duration

	// tolerance is how coarse the store's clock may be, or how far off.
	tolerance time.Duration

	// patience is how long, in real time, a rule waits for an event at no set
	// time, such as a notification.
	patience time.Duration
}

func timingOf(store idempotency.Store) timing {
	if _, ok := store.(advancer); ok {
		return timing{short: 10 * time.Second, tolerance: time.Second, patience: 5 * time.Second}
	}
	return timing{short: 100 * time.Millisecond, tolerance: 10 * time.Millisecond, patience: 5 * time.Second}
}

// An instant is a reading of the machine's clock, and how far the store's clock
// was moved by then.
type instant struct {
	wall  time.Time
	moved time.Duration
}

func (e *env) now() instant { return instant{time.Now(), e.moved} }

// A span is when a call began and ended. The store did its work somewhere in
// between, so the time since then has a lower and an upper bound.
type span struct{ before, after instant }

// atLeast returns the time that has passed on the store's clock since s for
// certain. A virtual clock may stand still when it is not moved.
func (e *env) atLeast(s span) time.Duration {
	if e.clock != nil {
		return e.moved - s.after.moved
	}
	return time.Since(s.after.wall)
}

// atMost returns the time that may have passed on the store's clock since s. A
// virtual clock may run by itself as well.
func (e *env) atMost(s span) time.Duration {
	return e.moved - s.before.moved + time.Since(s.before.wall)
}

// pass lets d pass on the store's clock.
func (e *env) pass(d time.Duration) {
	if e.err != nil {
		return
	}
	e.note("%v pass", d)
	if e.clock != nil {
		e.clock.Advance(d)
		e.moved += d
		return
	}
	select {
	case <-time.After(d):
	case <-e.ctx.Done():
		e.fail("the rule to end within %v", ruleTimeout)
	}
}

// within does steps with a key of its own and a short duration, and with longer
// ones until the steps took less than that: on a slow machine the cell may have
// expired between them. An error of steps that took longer may be the machine's
// and not the store's, so it does not count. It returns what steps returned, and
// the duration.
func (e *env) within(steps func(d time.Duration) span) (start span, d time.Duration) {
	for d = e.short; e.err == nil; d *= 2 {
		e.use(randomKey())
		begin := e.now()
		start = steps(d)
		if e.atMost(span{before: begin}) < d-e.tolerance {
			break
		}
		if e.ctx.Err() == nil {
			e.err = nil
		}
	}
	return start, d
}

// lapse lets enough time pass to end a short lease or TTL.
func (e *env) lapse() { e.pass(e.short + 2*e.tolerance) }

// changesAfter calls Acquire with c until the state is none of from, and returns
// that answer. It must come no sooner than d after start, and must come.
//
// Both bounds are measured, so a slow machine makes the check coarse and never
// wrong. The states in from change no cell, so the number of calls does not
// matter.
func (e *env) changesAfter(start span, d time.Duration, c claim, from ...idempotency.State) answer {
	step, limit := e.tolerance/2, d+e.patience
	if e.clock != nil {
		// The moves are exact: one look just before the time and one after.
		e.pass(d - 2*e.tolerance - e.atLeast(start))
		step, limit = 3*e.tolerance, d
	}
	steps := len(e.log)
	for e.err == nil {
		waited := e.atLeast(start)
		e.log = e.log[:steps] // one line for all that was asked so far
		e.note("at least %v have passed", waited)
		a := e.acquire(c)
		if !slices.Contains(from, a.State) {
			if most := e.atMost(start); most < d-e.tolerance {
				e.fail("%v for %v: it is over after %v at most", from, d, most)
			}
			return a
		}
		if waited > limit {
			e.fail("%v to be over after %v", from, d)
		}
		e.pass(step)
	}
	return answer{e: e}
}

// mustReturn makes a call that must return within the patience.
func (e *env) mustReturn(what string, call func()) {
	if e.err != nil {
		return
	}
	e.note("%s()", what)
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		call()
	}()
	select {
	case <-returned:
	case <-time.After(e.patience):
		e.fail("it to have returned after %v", e.patience)
	}
}
