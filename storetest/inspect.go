package storetest

import (
	"fmt"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// large is a value that a store may keep in another place than a small one.
var large = strings.Repeat("large ", 20<<10)

var inspectRules = []rule{
	{name: "an absent cell is the zero Cell", needsInspector: true, check: func(e *env) {
		if c := e.inspect().is(0); c.Attempt != 0 || c.Once || c.Owner != "" || c.Lease != 0 || c.TTL != 0 ||
			len(c.Fingerprint) > 0 || len(c.Value) > 0 {
			e.fail("the zero Cell")
		}
		e.acquire(claim{token: "A"}).acquired(1)
	}},

	{name: "a running lease is InProgress", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.inspect().is(idempotency.InProgress).has(1, false, "one")
		e.acquire(claim{token: "A", fp: "one", attempt: 1, once: true}).acquiredOnce(1)
		e.inspect().is(idempotency.InProgress).has(1, true, "one")
	}},

	{name: "Lapsed and Abandoned begin when the lease ends", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.lapse()
		e.inspect().is(idempotency.Lapsed).has(1, false, "one")
		e.acquire(claim{token: "B", fp: "one", lease: e.short}).acquired(2)
		e.lapse()
		e.inspect().is(idempotency.Lapsed).has(2, false, "one")
		e.acquire(claim{token: "B", attempt: 2, once: true, lease: e.short}).acquiredOnce(2)
		e.lapse()
		e.inspect().is(idempotency.Abandoned).has(2, true, "one")
	}},

	{name: "a completed cell shows its result", needsInspector: true, check: func(e *env) {
		for _, value := range []string{"done", "", large} {
			e.use(randomKey())
			e.acquire(claim{token: "A", fp: "one"}).acquired(1)
			e.complete("A", result{fp: "two", value: value})
			c := e.inspect().is(idempotency.Completed).has(0, false, "two")
			e.same("value", c.Value, value)
		}
	}},

	{name: "a released cell counts attempts", needsInspector: true, check: func(e *env) {
		e.release("A")
		e.inspect().is(idempotency.Released).attempt(0)
		e.use(randomKey())
		e.acquireOnce(claim{token: "A"})
		e.release("A")
		e.inspect().is(idempotency.Released).attempt(1)
		e.acquire(claim{token: "B"}).acquired(2)
		e.release("B")
		e.inspect().is(idempotency.Released).attempt(2)
	}},

	{name: "an expired cell is absent", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short / 2, ttl: e.short}).acquired(1)
		e.lapse()
		e.inspect().is(0)
		e.complete("A", result{value: "done", ttl: e.short})
		e.lapse()
		e.inspect().is(0)
		e.releaseFor("A", e.short)
		e.lapse()
		e.inspect().is(0)
	}},

	{name: "Lease and TTL are the times that are left", needsInspector: true, check: timesLeft},

	{name: "Inspect changes nothing", needsInspector: true, check: func(e *env) {
		claimed, lease := e.within(func(lease time.Duration) span {
			a := e.acquire(claim{token: "A", fp: "one", lease: lease}).acquired(1)
			e.inspect().is(idempotency.InProgress)
			return a.span
		})
		e.changesAfter(claimed, lease, claim{token: "B", fp: "one"}, idempotency.InProgress).acquired(2)

		done, ttl := e.within(func(ttl time.Duration) span {
			done := e.complete("A", result{value: "done", ttl: ttl})
			e.inspect().is(idempotency.Completed)
			return done
		})
		e.changesAfter(done, ttl, claim{token: "B"}, idempotency.Completed).acquired(1)
	}},

	{name: "Owner tells owners apart", needsInspector: true, check: func(e *env) {
		owners := make(map[string]bool)
		for _, token := range []string{"A", "a", "AA"} {
			e.use(randomKey())
			e.acquire(claim{token: token}).acquired(1)
			claimed := e.inspect()
			if again := e.inspect(); again.Owner != claimed.Owner {
				e.fail("the same Owner as before, %q", claimed.Owner)
			}
			e.complete(token, result{value: "done"})
			completed := e.inspect()
			for _, owner := range []string{"claimed " + claimed.Owner, "completed " + completed.Owner} {
				if owners[owner] {
					e.fail("an Owner that no other token has")
				}
				owners[owner] = true
			}
		}
	}},

	{name: "returned slices stay valid", needsInspector: true, check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		claimed := e.inspect()
		e.lapse()
		e.acquire(claim{token: "B"}).acquired(2)
		e.complete("B", result{fp: "two", value: "done"})
		completed := e.inspect()
		e.forget(completed)
		e.acquire(claim{token: "C", fp: "three"}).acquiredLater()
		e.complete("C", result{fp: "four", value: "null"})
		e.same("fingerprint", claimed.Fingerprint, "one")
		e.same("fingerprint", completed.Fingerprint, "two")
		e.same("value", completed.Value, "done")
	}},
}

// timesLeft compares Lease and TTL with the bounds that the clock sets.
func timesLeft(e *env) {
	between := func(what string, got, of time.Duration, least, most time.Duration) {
		if e.err == nil && (got < of-most-e.tolerance || got > of-least+e.tolerance) {
			e.fail("%s between %v and %v", what, (of - most).Round(time.Millisecond), (of - least).Round(time.Millisecond))
		}
	}
	a := e.acquire(claim{token: "A", lease: long / 2}).acquired(1)
	for range 3 {
		e.pass(e.short)
		least := e.atLeast(a.span)
		c := e.inspect().is(idempotency.InProgress)
		most := e.atMost(a.span)
		between("Lease", c.Lease, long/2, least, most)
		between("TTL", c.TTL, long, least, most)
	}
	for name, end := range map[string]func() span{
		"completed": func() span { return e.complete("A", result{value: "done", ttl: long / 2}) },
		"released":  func() span { return e.releaseFor("A", long/2) },
		"abandoned": func() span { return e.acquireOnce(claim{token: "A", lease: e.short, ttl: long / 2}).span },
	} {
		e.use(randomKey())
		s := end()
		e.lapse()
		least := e.atLeast(s)
		c := e.inspect()
		between("TTL of a cell that is "+name, c.TTL, long/2, least, e.atMost(s))
		if c.Lease != 0 {
			e.fail("no Lease")
		}
	}
}

// A view is what Inspect returned.
type view struct {
	e *env
	idempotency.Cell
}

// inspect calls Inspect.
func (e *env) inspect() view {
	if e.err != nil {
		return view{e: e}
	}
	c, err := e.store.(idempotency.Inspector).Inspect(e.ctx, e.key)
	e.note("Inspect() = %s", describeCell(c, err))
	if err != nil {
		e.fail("no error")
	}
	return view{e, c}
}

// is: the cell must have this state, and the times that go with it.
func (v view) is(s idempotency.State) view {
	switch {
	case v.State != s:
		v.e.fail("%v", s)
	case (v.Lease > 0) != (s == idempotency.InProgress) || v.Lease < 0:
		v.e.fail("a Lease above 0 while the lease is running, and 0 otherwise")
	case (v.TTL > 0) != (s != 0) || v.TTL < 0:
		v.e.fail("a TTL above 0 unless nothing is there")
	}
	return v
}

// attempt: the cell must have had so many attempts, and no mark.
func (v view) attempt(n int) view {
	if v.Attempt != n || v.Once {
		v.e.fail("Attempt %d, not Once", n)
	}
	return v
}

// has: the cell must have just this.
func (v view) has(attempt int, once bool, fp string) view {
	if v.Attempt != attempt || v.Once != once || string(v.Fingerprint) != fp {
		v.e.fail("Attempt %d, Once %v, fingerprint %s", attempt, once, show([]byte(fp)))
	}
	return v
}

// describeCell returns a cell for the log.
func describeCell(c idempotency.Cell, err error) string {
	if err != nil {
		return fmt.Sprintf("error %q", err)
	}
	if c.State == 0 {
		return "nothing there"
	}
	return fmt.Sprintf("%v, Attempt %d, Once %v, Lease %v, TTL %v, fingerprint %s, value %s",
		c.State, c.Attempt, c.Once, c.Lease, c.TTL, show(c.Fingerprint), show(c.Value))
}
