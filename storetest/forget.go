package storetest

import (
	"errors"
	"time"

	"github.com/go-idempotency/idempotency"
)

var forgetRules = []rule{
	{name: "an absent cell stays absent", needsInspector: true, check: func(e *env) {
		e.forget(e.inspect().is(0))
		e.inspect().is(0)
		e.acquire(claim{token: "A"}).acquired(1)
	}},

	{name: "a running lease is ErrInProgress", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.refuseForget(e.inspect(), idempotency.ErrInProgress)
		e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)

		e.acquire(claim{token: "A", attempt: 1, once: true}).acquiredOnce(1)
		e.refuseForget(e.inspect(), idempotency.ErrInProgress)
		e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
	}},

	{name: "a claim whose lease began anew is ErrInProgress", needsInspector: true, check: func(e *env) {
		e.acquireOnce(claim{token: "A", lease: e.short})
		e.lapse()
		seen := e.inspect().is(idempotency.Abandoned)
		e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
		e.refuseForget(seen, idempotency.ErrInProgress)
		e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
	}},

	{name: "a lapsed claim is free for any request", needsInspector: true, check: func(e *env) {
		e.lapsed(false)
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
	}},

	{name: "an abandoned claim is free for any request", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.inspect().is(idempotency.Lapsed).has(1, false, "")
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.InProgress)
	}},

	{name: "an owner that was only stopped may still complete", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.complete("A", result{fp: "one", value: "late"})
		e.acquire(claim{token: "B", fp: "one"}).completed("one", "late")
	}},

	{name: "an owner that was only stopped may still renew", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.acquire(claim{token: "A", fp: "one", attempt: 1}).acquired(1)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.InProgress)
	}},

	{name: "an owner that was only stopped may still release", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.release("A")
		e.inspect().is(idempotency.Released)
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
	}},

	{name: "an owner that comes after the next run is refused", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
		e.refuseComplete("A", result{fp: "one", value: "late"})
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.complete("B", result{fp: "two", value: "done"})
		e.acquire(claim{token: "C", fp: "two"}).completed("two", "done")
	}},

	{name: "a completed cell is free for any request", needsInspector: true, check: func(e *env) {
		for _, value := range []string{"done", large} {
			e.use(randomKey())
			e.acquire(claim{token: "A", fp: "one"}).acquired(1)
			e.complete("A", result{fp: "one", value: value})
			e.forget(e.inspect().is(idempotency.Completed))
			e.inspect().is(idempotency.Released)
			e.acquire(claim{token: "B", fp: "two"}).acquiredLater()
			e.complete("B", result{fp: "two", value: "again"})
			e.acquire(claim{token: "C", fp: "two"}).completed("two", "again")
		}
	}},

	{name: "nothing brings a forgotten result back", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.forget(e.inspect())
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.refuseComplete("A", result{fp: "one", value: "late"})
		e.release("A")
		e.acquire(claim{token: "B", fp: "two"}).acquiredLater()
	}},

	{name: "a released cell stays", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.forget(e.inspect().is(idempotency.Released))
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "what is kept is kept for the rest of its TTL", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.lapse()
		e.acquire(claim{token: "B"}).acquired(2)

		e.use(randomKey())
		e.complete("A", result{value: "done"})
		e.forget(e.inspect())
		e.lapse()
		e.acquire(claim{token: "B"}).acquiredLater()
	}},

	{name: "a claim that was forgotten expires", needsInspector: true, check: func(e *env) {
		start, ttl := e.within(func(ttl time.Duration) span {
			a := e.acquire(claim{token: "A", lease: ttl / 4, ttl: ttl}).acquired(1)
			e.pass(ttl/4 + 2*e.tolerance)
			e.forget(e.inspect().is(idempotency.Lapsed))
			return a.span
		})
		e.pass(ttl - e.atLeast(start) + 2*e.tolerance)
		e.inspect().is(0)
	}},

	{name: "a second time changes nothing", needsInspector: true, check: func(e *env) {
		e.lapsed(true)
		e.forget(e.inspect().is(idempotency.Lapsed))
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
	}},

	{name: "a cell that was completed meanwhile is ErrCellChanged", needsInspector: true, check: func(e *env) {
		e.acquireOnce(claim{token: "A", fp: "one", lease: e.short})
		e.lapse()
		seen := e.inspect().is(idempotency.Abandoned)
		e.complete("A", result{fp: "one", value: "late"})
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.acquire(claim{token: "B", fp: "one"}).completed("one", "late")
	}},

	{name: "a cell that another attempt has left is ErrCellChanged", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.lapse()
		seen := e.inspect().is(idempotency.Lapsed)
		e.acquire(claim{token: "B", fp: "one", lease: e.short}).acquired(2)
		e.lapse()
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.Mismatch)
	}},

	{name: "a cell that was marked meanwhile is ErrCellChanged", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		seen := e.inspect().is(idempotency.Lapsed)
		e.acquire(claim{token: "A", attempt: 1, once: true, lease: e.short}).acquiredOnce(1)
		e.lapse()
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.acquire(claim{token: "B"}).is(idempotency.Abandoned)
	}},

	{name: "a cell of another owner is ErrCellChanged", needsInspector: true, check: func(e *env) {
		var seen view
		_, ttl := e.within(func(ttl time.Duration) span {
			done := e.complete("A", result{value: "done", ttl: ttl})
			seen = e.inspect().is(idempotency.Completed)
			return done
		})
		e.pass(ttl + 2*e.tolerance)
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.complete("B", result{value: "done"})
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.acquire(claim{token: "C"}).completed("", "done")

		_, ttl = e.within(func(ttl time.Duration) span {
			a := e.acquire(claim{token: "A", fp: "one", lease: ttl, ttl: ttl}).acquired(1)
			e.refuseForget(view{e, idempotency.Cell{}}, idempotency.ErrInProgress)
			return a.span
		})
		e.pass(ttl + 2*e.tolerance)
		e.acquireOnce(claim{token: "A", fp: "one", lease: e.short})
		e.lapse()
		seen = e.inspect().is(idempotency.Abandoned)
		seen.Owner += "B"
		e.refuseForget(seen, idempotency.ErrCellChanged)
		e.acquire(claim{token: "B"}).is(idempotency.Abandoned)
	}},

	{name: "either Forget or a take-over comes first", needsInspector: true, check: func(e *env) {
		for _, key := range e.lapsedClaims() {
			e.use(key)
			seen := e.inspect()
			if e.err != nil {
				return
			}
			var rec idempotency.Record
			var err, forgotten error
			atOnce(2, func(i int) {
				if i == 0 {
					rec, err = e.store.Acquire(e.ctx, key, e.claim(claim{token: "B", fp: "two"}))
					return
				}
				forgotten = e.store.(idempotency.Inspector).Forget(e.ctx, key, seen.Cell)
			})
			e.note("at once: Forget() = %v, Acquire(token B, fingerprint \"two\") = %s", forgotten, outcome(rec, err))
			if err != nil || forgotten != nil && !errors.Is(forgotten, idempotency.ErrInProgress) {
				e.fail("no error but ErrInProgress")
			}
			answer{e: e, Record: rec}.acquired(2)
			e.acquire(claim{token: "C", fp: "two"}).is(idempotency.InProgress)
		}
	}},

	{name: "Forget closes the channel", needsInspector: true, needsWatcher: true, check: func(e *env) {
		var changed <-chan struct{}
		_, lease := e.within(func(lease time.Duration) span {
			a := e.acquire(claim{token: "A", lease: lease}).acquired(1)
			changed = e.watch(e.ctx)
			e.acquire(claim{token: "B"}).is(idempotency.InProgress)
			return a.span
		})
		e.pass(lease + 2*e.tolerance)
		e.forget(e.inspect().is(idempotency.Lapsed))
		e.awaitClosed(changed)
	}},
}

// lapsed makes a claim of A with the fingerprint "one" whose lease is over, and
// has it forgotten.
func (e *env) lapsed(once bool) {
	want := idempotency.Lapsed
	if once {
		want = idempotency.Abandoned
		e.acquireOnce(claim{token: "A", fp: "one", lease: e.short})
	} else {
		e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
	}
	e.lapse()
	e.forget(e.inspect().is(want))
}

// forget forgets the cell, which must be as it was seen.
func (e *env) forget(seen view) { e.refuseForget(seen, nil) }

// refuseForget calls Forget, which must return an error that matches want.
func (e *env) refuseForget(seen view, want error) {
	if e.err != nil {
		return
	}
	err := e.store.(idempotency.Inspector).Forget(e.ctx, e.key, seen.Cell)
	e.note("Forget(%s) = %v", describeCell(seen.Cell, nil), err)
	if !errors.Is(err, want) {
		e.fail("%v", want)
	}
}

// acquiredLater: the answer must be Acquired with a later attempt than the
// first, and not Once.
func (a answer) acquiredLater() answer {
	if a.State != idempotency.Acquired || a.Attempt < 2 || a.Once {
		a.e.fail("Acquired, Attempt 2 or more")
	}
	return a
}
