package storetest

import "github.com/go-idempotency/idempotency"

// onceRules are about the mark that keeps a claim from being taken over: what
// sets it, and what ends it.
var onceRules = []rule{
	{name: "a renewal sets Once", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		a := e.acquire(claim{token: "A", attempt: 1, lease: e.short, once: true}).acquiredOnce(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a renewal sets Once when the lease is over", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		a := e.acquire(claim{token: "A", attempt: 1, lease: e.short, once: true}).acquiredOnce(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a renewal sets Once of any attempt", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B", lease: e.short}).acquired(2)
		b := e.acquire(claim{token: "B", attempt: 2, lease: e.short, once: true}).acquiredOnce(2)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	// An owner that sees Record.Once false sends the renewal again.
	{name: "a renewal of an absent cell does not set Once", check: func(e *env) {
		e.acquire(claim{token: "A", attempt: 2, lease: e.short, once: true}).acquired(2)
		a := e.acquire(claim{token: "A", attempt: 2, lease: e.short}).acquired(2)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(3)

		e.use(randomKey())
		e.acquire(claim{token: "A", attempt: 2, lease: e.short, once: true}).acquired(2)
		a = e.acquire(claim{token: "A", attempt: 2, lease: e.short, once: true}).acquiredOnce(2)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "the claim of an absent cell does not set Once", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "the claim of a released cell does not set Once", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		b := e.acquire(claim{token: "B", lease: e.short, once: true}).acquired(2)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(3)
	}},

	{name: "a take-over does not set Once", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		take := claim{token: "B", lease: e.short, once: true}
		b := e.changesAfter(a.span, e.short, take, idempotency.InProgress).acquired(2)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(3)
	}},

	{name: "a claim that is sent twice does not set Once", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		a := e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "a claim that is refused does not set Once", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.acquire(claim{token: "B", fp: "two", once: true}).is(idempotency.Mismatch)
		e.changesAfter(a.span, e.short, claim{token: "C", once: true}, idempotency.InProgress).acquired(2)
	}},

	{name: "a claim that is sent twice does not unset Once", check: func(e *env) {
		e.acquireOnce(claim{token: "A", lease: e.short})
		a := e.acquire(claim{token: "A", lease: e.short}).acquiredOnce(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a renewal does not unset Once", check: func(e *env) {
		e.acquireOnce(claim{token: "A", lease: e.short})
		a := e.acquire(claim{token: "A", attempt: 1, lease: e.short}).acquiredOnce(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a call that is refused does not unset Once", check: func(e *env) {
		e.acquireOnce(claim{token: "A", fp: "one"})
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.acquire(claim{token: "A", attempt: 2}).is(idempotency.Lost)
		e.acquire(claim{token: "B", attempt: 1}).is(idempotency.Lost)
		e.refuseComplete("B", result{value: "wrong"})
		e.release("B")
		e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
	}},

	{name: "Once ends with a release", check: func(e *env) {
		e.acquireOnce(claim{token: "A"})
		e.release("A")
		b := e.acquire(claim{token: "B", lease: e.short}).acquired(2)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(3)
	}},

	{name: "Once ends with the cell", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", lease: e.short / 2, ttl: e.short})
		b := claim{token: "B", lease: e.short}
		e.changesAfter(a.span, e.short, b, idempotency.InProgress, idempotency.Abandoned).acquired(1)
		e.acquire(b).acquired(1)

		e.use(randomKey())
		e.acquireOnce(claim{token: "A"})
		done := e.complete("A", result{value: "done", ttl: e.short})
		e.changesAfter(done, e.short, b, idempotency.Completed).acquired(1)
		e.acquire(b).acquired(1)
	}},
}
