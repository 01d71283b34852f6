package storetest

import (
	"slices"
	"time"

	"github.com/go-idempotency/idempotency"
)

// leaseRules are about a claim under another token, before and after its lease
// is over.
var leaseRules = slices.Concat(everyWay("starts the lease", startsLease), []rule{
	{name: "a running lease is InProgress", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		b := e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
		if b.Remaining > long {
			e.fail("Remaining up to the lease of %v", long)
		}
	}},

	{name: "Remaining is the time until the lease ends", check: remaining},

	{name: "the lease of the claim counts and not that of the call", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "B", lease: e.short, ttl: e.short}).is(idempotency.InProgress)
	}},

	{name: "a claim is taken over when its lease is over", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.changesAfter(a.span, e.short, claim{token: "B", fp: "one"}, idempotency.InProgress).acquired(2)
		e.acquire(claim{token: "A", fp: "one"}).is(idempotency.InProgress)
		e.acquire(claim{token: "C", fp: "one"}).is(idempotency.InProgress)
		e.acquire(claim{token: "B", fp: "one"}).acquired(2)
	}},

	{name: "a take-over writes its own fingerprint", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		b := e.changesAfter(a.span, e.short, claim{token: "B", fp: "one", lease: e.short}, idempotency.InProgress).acquired(2)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.Mismatch)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(3)
		e.acquire(claim{token: "D", fp: "two"}).is(idempotency.InProgress)
	}},

	// B and C must neither prolong the lease nor count as attempts.
	{name: "a claim that is refused changes nothing", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.acquire(claim{token: "B", fp: "two", ttl: e.short}).is(idempotency.Mismatch)
		e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).acquired(2)
	}},

	{name: "a Once claim is Abandoned when its lease is over", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", fp: "one", lease: e.short})
		e.changesAfter(a.span, e.short, claim{token: "B", fp: "one"}, idempotency.InProgress).is(idempotency.Abandoned)
		e.acquire(claim{token: "B"}).is(idempotency.Abandoned)
		e.acquire(claim{token: "C", fp: "one", once: true}).is(idempotency.Abandoned)
	}},

	{name: "a Once claim that is Abandoned stays its owner's", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", lease: e.short})
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).is(idempotency.Abandoned)
		e.acquire(claim{token: "A"}).acquiredOnce(1)
		e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
	}},
})

// remaining compares Remaining with the bounds that the clock sets.
func remaining(e *env) {
	a := e.acquire(claim{token: "A"}).acquired(1)
	for range 3 {
		e.pass(e.short)
		most := long - e.atLeast(a.span) + e.tolerance
		got := e.acquire(claim{token: "B"}).is(idempotency.InProgress).Remaining
		least := long - e.atMost(a.span) - e.tolerance
		if got < least || got > most {
			e.fail("Remaining between %v and %v", least.Round(time.Millisecond), most.Round(time.Millisecond))
		}
	}
}
