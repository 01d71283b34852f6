package storetest

import "github.com/go-idempotency/idempotency"

// renewRules are about Acquire with the token that holds the claim already.
var renewRules = []rule{
	{name: "the attempt stays", check: func(e *env) {
		for range 3 {
			e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		}
		e.release("A")
		e.acquire(claim{token: "B", fp: "one"}).acquired(2)
		e.acquire(claim{token: "B", fp: "one"}).acquired(2)
	}},

	{name: "the lease starts anew", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.pass(e.short / 2)
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "the lease starts anew every time", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		for range 3 {
			e.pass(e.short / 2)
			a = e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		}
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "a claim can be renewed when its lease is over", check: func(e *env) {
		for _, once := range []bool{false, true} {
			e.use(randomKey())
			e.acquire(claim{token: "A", lease: e.short, once: once}).acquired(1)
			e.lapse()
			e.acquire(claim{token: "A", once: once}).acquired(1)
			e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		}
	}},

	{name: "a claim cannot be renewed after it was taken over", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		b := e.turns(a.span, e.short, claim{token: "B", lease: e.short}, idempotency.InProgress).acquired(2)
		// The former owner is anyone: it waits, and may then take over.
		e.turns(b.span, e.short, claim{token: "A"}, idempotency.InProgress).acquired(3)
	}},

	{name: "the fingerprint stays", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "A"}).acquired(1)
		empty := e.claim(claim{token: "A"})
		empty.Fingerprint = []byte{}
		e.send(empty).acquired(1)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
	}},

	{name: "an unknown fingerprint stays unknown", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.InProgress)
		e.acquire(claim{token: "A", fp: "two"}).acquired(1)
	}},

	{name: "Once is set when it is asked for", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		a := e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},

	{name: "Once is never unset", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short, once: true}).acquired(1)
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
	}},
}
