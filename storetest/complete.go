package storetest

import "github.com/go-idempotency/idempotency"

var completeRules = []rule{
	{name: "the owner's result is stored", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		for range 2 {
			e.acquire(claim{token: "B", fp: "one"}).completed("one", "done")
		}
	}},

	{name: "the result is stored after the lease is over", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		e.complete("A", result{value: "done"})
		e.acquire(claim{token: "B"}).completed("", "done")
	}},

	{name: "the result of an abandoned claim is stored", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", lease: e.short})
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
		e.complete("A", result{value: "done"})
		e.acquire(claim{token: "B"}).completed("", "done")
	}},

	{name: "an absent cell is written", check: func(e *env) {
		e.complete("A", result{fp: "one", value: "done"})
		e.acquire(claim{token: "A", fp: "one"}).completed("one", "done")
		e.acquire(claim{token: "B", fp: "one"}).completed("one", "done")
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
	}},

	{name: "the fingerprint replaces that of the claim", check: func(e *env) {
		for _, before := range []string{"", "zero"} {
			for _, after := range []string{"", "one"} {
				e.use(randomKey())
				e.acquire(claim{token: "A", fp: before}).acquired(1)
				e.complete("A", result{fp: after, value: "done"})
				e.acquire(claim{token: "B", fp: "one"}).completed(after, "done")
				if after != "" {
					e.acquire(claim{token: "B", fp: "zero"}).is(idempotency.Mismatch)
				}
			}
		}
	}},

	{name: "a second time by the owner is no error", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{value: "done"})
		e.complete("A", result{value: "done"})
		e.acquire(claim{token: "B"}).completed("", "done")
	}},

	{name: "a second time by the owner changes nothing", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.complete("A", result{fp: "two", value: "undone", ttl: e.short})
		e.acquire(claim{token: "B"}).completed("one", "done")
		e.lapse()
		e.acquire(claim{token: "B"}).completed("one", "done")
	}},

	// The owner may be alive although its lease is over.
	{name: "another owner's claim is refused", check: func(e *env) {
		e.acquireOnce(claim{token: "A", lease: e.short})
		e.refuseComplete("B", result{value: "wrong"})
		e.lapse()
		e.refuseComplete("B", result{value: "wrong"})
		e.acquire(claim{token: "A"}).acquiredOnce(1)
	}},

	{name: "a former owner is refused after a take-over", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
		e.refuseComplete("A", result{value: "late"})
		e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		e.complete("B", result{value: "done"})
		e.refuseComplete("A", result{value: "late"})
		e.acquire(claim{token: "C"}).completed("", "done")
	}},

	{name: "a cell completed under another token is refused", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.refuseComplete("B", result{fp: "two", value: "wrong"})
		e.acquire(claim{token: "C"}).completed("one", "done")
	}},

	{name: "a released cell is refused", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.refuseComplete("A", result{value: "late"})
		e.refuseComplete("B", result{value: "wrong"})
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "a cell released while it was absent is refused", check: func(e *env) {
		e.release("A")
		e.refuseComplete("A", result{value: "late"})
		e.acquire(claim{token: "B"}).acquired(1)
	}},
}
