package storetest

import "github.com/go-idempotency/idempotency"

var releaseRules = []rule{
	{name: "the owner's claim is freed", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "a Once claim is freed", check: func(e *env) {
		e.acquireOnce(claim{token: "A", lease: e.short})
		e.lapse()
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	// B could take the claim over as well, so A asks whether it was freed.
	{name: "one's own lapsed claim is freed", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		e.release("A")
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	// The last claim of A was delayed until B had completed.
	{name: "a delayed claim is Lost", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "A", once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
		e.complete("B", result{value: "done"})
		e.acquire(claim{token: "A"}).completed("", "done")
	}},

	{name: "an absent cell remembers the release", check: func(e *env) {
		e.release("A")
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
	}},

	{name: "an absent cell that was released has had no attempts", check: func(e *env) {
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(1)
		e.release("B")
		e.acquire(claim{token: "C"}).acquired(2)
	}},

	{name: "a second time changes nothing", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.release("A")
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "another owner's claim stays", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.release("B")
		e.changesAfter(a.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(2)
	}},

	{name: "another owner's abandoned claim stays", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", lease: e.short})
		e.lapse()
		e.release("B")
		e.changesAfter(a.span, e.short, claim{token: "C"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a former owner leaves the new one alone", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
		e.release("A")
		e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		e.complete("B", result{value: "done"})
		e.acquire(claim{token: "C"}).completed("", "done")
	}},

	{name: "a cell released under another token stays", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
		e.release("B")
		e.release("A")
		e.acquire(claim{token: "B"}).is(idempotency.Lost)
		e.acquire(claim{token: "A"}).acquired(3)
	}},

	{name: "a completed cell stays", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.release("A")
		e.acquire(claim{token: "C"}).completed("one", "done")
		e.release("B")
		e.acquire(claim{token: "C"}).completed("one", "done")
	}},
}
