package storetest

import "github.com/go-idempotency/idempotency"

var releaseRules = []rule{
	{name: "the owner's claim is freed", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "a Once claim is freed", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		e.lapse()
		e.release("A")
		// The attempt is 2, or 1 if the machine was slow and the cell is gone.
		e.acquire(claim{token: "B"}).is(idempotency.Acquired)
	}},

	// Anybody could take it over, so only its owner can tell.
	{name: "one's own lapsed claim is freed", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		a := e.release("A")
		e.turns(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	// The last time the Acquire was delayed for so long that B has come and
	// gone in the meantime.
	{name: "a delayed Acquire is Lost", check: func(e *env) {
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
		e.turns(a.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(2)
	}},

	{name: "another owner's abandoned claim stays", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		e.lapse()
		e.release("B")
		e.turns(a.span, e.short, claim{token: "C"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "a former owner leaves the new one alone", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
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
