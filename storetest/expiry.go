package storetest

import (
	"slices"
	"time"

	"github.com/go-idempotency/idempotency"
)

// expiryRules are about the end of cells. The Attempt of a new claim tells whether
// the cell was still there: it is 1 when the cell had expired.
var expiryRules = slices.Concat(
	everyWay("starts the TTL anew", startsTTL),
	everyWay("does not expire before its lease", keepsLease),
	markerRules,
	[]rule{
		{name: "a Once claim expires", check: func(e *env) {
			a := e.acquireOnce(claim{token: "A", lease: e.short / 2, ttl: e.short})
			e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress, idempotency.Abandoned).acquired(1)
		}},

		{name: "a completed cell expires", check: func(e *env) {
			e.acquire(claim{token: "A"}).acquired(1)
			a := e.complete("A", result{value: "done", ttl: e.short})
			e.changesAfter(a, e.short, claim{token: "B"}, idempotency.Completed).acquired(1)
		}},

		{name: "Complete starts a TTL of its own", check: func(e *env) {
			e.acquire(claim{token: "A", lease: e.short, ttl: e.short}).acquired(1)
			e.complete("A", result{value: "done"})
			e.lapse()
			e.acquire(claim{token: "B"}).completed("", "done")
		}},

		{name: "a second Complete does not prolong the first", check: func(e *env) {
			first, ttl := e.within(func(ttl time.Duration) span {
				first := e.complete("A", result{value: "done", ttl: ttl})
				e.complete("A", result{value: "done"})
				return first
			})
			e.changesAfter(first, ttl, claim{token: "B"}, idempotency.Completed).acquired(1)
		}},

		{name: "Complete writes after the claim has expired", check: func(e *env) {
			e.acquire(claim{token: "A", lease: e.short, ttl: e.short}).acquired(1)
			e.lapse()
			e.complete("A", result{value: "done"})
			e.acquire(claim{token: "B"}).completed("", "done")
		}},

		{name: "a renewal that is refused does not prolong a completed cell", check: func(e *env) {
			e.acquire(claim{token: "A"}).acquired(1)
			done := e.complete("A", result{value: "done", ttl: e.short})
			e.changesAfter(done, e.short, claim{token: "A", attempt: 2}, idempotency.Lost).acquired(2)
		}},
	})

// markerRules are about how long the marker of a released cell is kept.
var markerRules = []rule{
	{name: "a released cell expires before the claim would have", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		a := e.releaseFor("A", e.short)
		e.changesAfter(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "a released cell expires after the claim would have", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short / 2, ttl: e.short / 2}).acquired(1)
		a := e.releaseFor("A", e.short)
		e.changesAfter(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "a released cell counts attempts for as long as it is kept", check: func(e *env) {
		_, ttl := e.within(func(ttl time.Duration) span {
			a := e.acquire(claim{token: "A", lease: ttl, ttl: ttl}).acquired(1)
			e.release("A")
			return a.span
		})
		e.pass(ttl + 2*e.tolerance)
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "a release of a later attempt does not shorten the TTL", check: func(e *env) {
		start, ttl := e.within(func(ttl time.Duration) span {
			e.acquire(claim{token: "A"}).acquired(1)
			e.release("A")
			b := e.acquire(claim{token: "B", lease: ttl, ttl: ttl}).acquired(2)
			e.releaseFor("B", ttl/4)
			return b.span
		})
		e.changesAfter(start, ttl, claim{token: "B"}, idempotency.Lost).acquired(1)
	}},

	{name: "a release of a later attempt is kept for longer than the TTL", check: func(e *env) {
		_, ttl := e.within(func(ttl time.Duration) span {
			e.acquire(claim{token: "B", lease: ttl, ttl: ttl}).acquired(1)
			e.release("B")
			c := e.acquire(claim{token: "C", lease: ttl, ttl: ttl}).acquired(2)
			e.release("C")
			return c.span
		})
		e.pass(ttl + 2*e.tolerance)
		e.acquire(claim{token: "C"}).is(idempotency.Lost)
		e.acquire(claim{token: "D"}).acquired(3)
	}},

	{name: "an absent cell that was released expires", check: func(e *env) {
		a := e.releaseFor("A", e.short)
		e.changesAfter(a, e.short, claim{token: "A"}, idempotency.Lost).acquired(1)
	}},

	{name: "an absent cell that was released is kept", check: func(e *env) {
		e.release("A")
		e.lapse()
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
	}},

	{name: "a second release does not prolong the first", check: func(e *env) {
		for _, token := range []string{"A", "B"} {
			first, keep := e.within(func(keep time.Duration) span {
				first := e.releaseFor("A", keep)
				e.release(token)
				return first
			})
			e.changesAfter(first, keep, claim{token: "A"}, idempotency.Lost).acquired(1)
		}
	}},

	{name: "a second release does not shorten the first", check: func(e *env) {
		e.release("A")
		e.releaseFor("A", e.short)
		e.releaseFor("B", e.short)
		e.lapse()
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
	}},

	{name: "a renewal that is refused does not prolong a released cell", check: func(e *env) {
		a := e.releaseFor("A", e.short)
		e.changesAfter(a, e.short, claim{token: "B", attempt: 2}, idempotency.Lost).acquired(2)
	}},

	{name: "a release that is not the owner's changes no TTL", check: func(e *env) {
		start, ttl := e.within(func(ttl time.Duration) span {
			a := e.acquire(claim{token: "A", fp: "one", lease: ttl / 2, ttl: ttl}).acquired(1)
			e.release("B")
			return a.span
		})
		e.changesAfter(start, ttl, claim{token: "B", fp: "two"}, idempotency.Mismatch).acquired(1)

		e.use(randomKey())
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.releaseFor("B", e.short)
		e.lapse()
		e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
	}},

	{name: "a release of a completed cell changes no TTL", check: func(e *env) {
		done, ttl := e.within(func(ttl time.Duration) span {
			done := e.complete("A", result{value: "done", ttl: ttl})
			e.release("A")
			return done
		})
		e.changesAfter(done, ttl, claim{token: "B"}, idempotency.Completed).acquired(1)

		e.use(randomKey())
		e.complete("A", result{value: "done"})
		e.releaseFor("A", e.short)
		e.lapse()
		e.acquire(claim{token: "B"}).completed("", "done")
	}},
}
