package storetest

import (
	"time"

	"github.com/go-idempotency/idempotency"
)

// expiryRules are about the end of cells. That a cell still exists shows in
// Attempt: it is 1 again where nothing is left.
var expiryRules = []rule{
	{name: "a completed cell expires", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		a := e.complete("A", result{value: "done", ttl: e.short})
		e.turns(a, e.short, claim{token: "B"}, idempotency.Completed).acquired(1)
	}},

	// Asked for with another fingerprint, a claim cannot be taken over.
	{name: "a claim expires", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short / 2, ttl: e.short}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B", fp: "two"}, idempotency.Mismatch).acquired(1)
	}},

	{name: "an abandoned claim expires", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short / 2, ttl: e.short, once: true}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress, idempotency.Abandoned).acquired(1)
	}},

	{name: "a released cell expires a lease later", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		a := e.release("A")
		e.turns(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "a released cell expires the lease of its last claim later", check: lastLease},

	{name: "a second release does not prolong the first", needsAdvance: true, check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		a := e.release("A")
		e.pass(e.short / 2)
		e.release("A")
		e.turns(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "an absent cell that was released expires after 30s", needsAdvance: true, check: func(e *env) {
		a := e.release("A")
		e.turns(a, 30*time.Second, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "no claim expires before its lease", check: func(e *env) {
		e.acquire(claim{token: "A", ttl: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.acquire(claim{token: "A", ttl: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
	}},

	{name: "a renewal starts the TTL anew", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short / 2, ttl: e.short}).acquired(1)
		e.pass(e.short * 3 / 4)
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.turns(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "a take-over starts the TTL anew", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short / 2, ttl: e.short}).acquired(1)
		// The attempt is 2, or 1 if the machine was slow and the cell is gone.
		e.turns(a.span, e.short/2, claim{token: "B"}, idempotency.InProgress).is(idempotency.Acquired)
		e.lapse()
		e.acquire(claim{token: "C"}).is(idempotency.InProgress)
	}},

	{name: "the claim of a released cell starts the TTL anew", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short, ttl: e.short}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).is(idempotency.Acquired)
		e.lapse()
		e.acquire(claim{token: "C"}).is(idempotency.InProgress)
	}},

	{name: "Complete starts a TTL of its own", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short, ttl: e.short}).acquired(1)
		e.complete("A", result{value: "done"})
		e.lapse()
		e.acquire(claim{token: "B"}).completed("", "done")
	}},

	{name: "a second Complete does not prolong the first", check: secondComplete},

	{name: "Complete writes after the claim has expired", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short, ttl: e.short}).acquired(1)
		e.lapse()
		e.complete("A", result{value: "done"})
		e.acquire(claim{token: "B"}).completed("", "done")
	}},
}

// lastLease releases claims that had another lease before: a renewal, the claim
// of a released cell and a take-over.
func lastLease(e *env) {
	e.acquire(claim{token: "A"}).acquired(1)
	e.acquire(claim{token: "A", lease: e.short}).acquired(1)
	a := e.release("A")
	e.turns(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)

	e.use(randomKey())
	e.acquire(claim{token: "A"}).acquired(1)
	e.release("A")
	e.acquire(claim{token: "B", lease: e.short}).acquired(2)
	b := e.release("B")
	e.turns(b, e.short, claim{token: "B"}, idempotency.Lost).acquired(1)

	e.use(randomKey())
	a = e.acquire(claim{token: "A", lease: e.short}).acquired(1).span
	e.turns(a, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	e.release("B")
	e.lapse()
	e.acquire(claim{token: "B"}).is(idempotency.Lost)
}

// secondComplete completes again, to be kept for longer.
func secondComplete(e *env) {
	for ttl := e.short; e.err == nil; ttl *= 2 {
		e.use(randomKey())
		first := e.complete("A", result{value: "done", ttl: ttl})
		e.complete("A", result{value: "done"})
		// On a slow machine nothing may have been left for the second to find,
		// and it was right to write.
		if e.atMost(first) < ttl-e.tolerance {
			e.turns(first, ttl, claim{token: "B"}, idempotency.Completed).acquired(1)
			return
		}
	}
}
