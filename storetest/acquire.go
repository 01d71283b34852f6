package storetest

import (
	"context"
	"errors"

	"github.com/go-idempotency/idempotency"
)

// acquireRules check what a claim gets, in the order of the table of Acquire.
// Token A claims first, then B, and C finds out what the call of B has left.
var acquireRules = []rule{
	{name: "an absent cell is claimed", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "C", fp: "one"}).is(idempotency.InProgress)
	}},

	{name: "a cell released under the token is Lost whatever the fingerprint", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "A", fp: "two"}).is(idempotency.Lost)
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
	}},

	{name: "a released cell is claimed with any fingerprint", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B", fp: "two"}).acquired(2)
		e.acquire(claim{token: "C", fp: "one"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.InProgress)
	}},

	{name: "a released cell is claimed without a fingerprint", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.InProgress)
	}},

	{name: "Mismatch while the lease runs", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "C", fp: "one"}).is(idempotency.InProgress)
	}},

	{name: "Mismatch comes before Completed", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "C", fp: "one"}).completed("one", "done")
	}},

	{name: "Mismatch comes before the claim's own token", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "A", fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
	}},

	{name: "Mismatch comes before Abandoned", check: func(e *env) {
		a := e.acquireOnce(claim{token: "A", fp: "one", lease: e.short})
		e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).is(idempotency.Abandoned)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
	}},

	{name: "Mismatch comes before take-over", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
		e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).acquired(2)
	}},

	{name: "an unknown fingerprint is no Mismatch", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		empty := e.claim(claim{token: "B"})
		empty.Fingerprint = []byte{}
		e.send(empty).is(idempotency.InProgress)

		e.use(randomKey())
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "B", fp: "two"}).is(idempotency.InProgress)
	}},

	{name: "fingerprints are compared byte by byte", check: func(e *env) {
		fps := []string{"one", "One", "one\x00", "one ", "on", "\xff\xfe", "\xff\xfd", "\x00"}
		for i, fp := range fps {
			e.use(randomKey())
			e.acquire(claim{token: "A", fp: fp}).acquired(1)
			for j, other := range fps {
				want := idempotency.Mismatch
				if i == j {
					want = idempotency.InProgress
				}
				e.acquire(claim{token: "B", fp: other}).is(want)
			}
		}
	}},

	{name: "Completed comes before the claim's own token", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.acquire(claim{token: "A", fp: "one"}).completed("one", "done")
	}},

	{name: "Completed comes with an unknown fingerprint too", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		e.acquire(claim{token: "B"}).completed("one", "done")

		e.use(randomKey())
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{value: "done"})
		e.acquire(claim{token: "B", fp: "two"}).completed("", "done")
	}},

	{name: "tokens are compared verbatim", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		for _, other := range []string{"a", "AA", ""} {
			e.acquire(claim{token: other}).is(idempotency.InProgress)
			e.acquire(claim{token: other, attempt: 1}).is(idempotency.Lost)
			e.refuseComplete(other, result{value: "forged"})
			e.release(other)
		}
		e.acquire(claim{token: "A"}).acquired(1)
	}},

	{name: "Attempt counts claims after releases and take-overs", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		b := e.acquire(claim{token: "B", lease: e.short}).acquired(2)
		c := e.changesAfter(b.span, e.short, claim{token: "C", lease: e.short}, idempotency.InProgress).acquired(3)
		e.changesAfter(c.span, e.short, claim{token: "D"}, idempotency.InProgress).acquired(4)
		e.acquire(claim{token: "D"}).acquired(4)
		e.release("D")
		e.acquire(claim{token: "E"}).acquired(5)
	}},

	{name: "a cancelled context leads to an error or a true answer", check: cancelled},

	{name: "no call goes on after its deadline", check: func(e *env) {
		ctx, cancel := context.WithTimeout(e.ctx, 0)
		defer cancel()
		e.mustReturn("Acquire", func() { _, _ = e.store.Acquire(ctx, e.key, e.claim(claim{token: "A"})) })
		e.mustReturn("Complete", func() { _ = e.store.Complete(ctx, e.key, e.token("A"), e.result(result{})) })
		e.mustReturn("Release", func() { _ = e.store.Release(ctx, e.key, e.token("A"), long) })
	}},
}

// cancelled makes calls whose context has ended. Each must have done its work or
// return an error. Then the owner goes on.
func cancelled(e *env) {
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()

	c := e.claim(claim{token: "A"})
	rec, err := e.store.Acquire(ctx, e.key, c)
	e.note("with a cancelled context, %s = %s", e.describe(c), outcome(rec, err))
	if err == nil && (rec.State != idempotency.Acquired || rec.Attempt != 1) {
		e.fail("an error, or Acquired, Attempt 1")
	}
	e.acquire(claim{token: "A"}).acquired(1)

	err = e.store.Complete(ctx, e.key, e.token("A"), e.result(result{value: "done"}))
	e.note("with a cancelled context, Complete(token A, value \"done\") = %v", err)
	if errors.Is(err, idempotency.ErrLeaseLost) {
		e.fail("success, or another error: the lease is not lost")
	}
	if err == nil {
		e.acquire(claim{token: "B"}).completed("", "done")
	}
	e.complete("A", result{value: "done"})

	e.use(randomKey())
	e.acquire(claim{token: "A"}).acquired(1)
	err = e.store.Release(ctx, e.key, e.token("A"), long)
	e.note("with a cancelled context, Release(token A) = %v", err)
	if err == nil {
		e.acquire(claim{token: "A"}).is(idempotency.Lost)
	}
	e.release("A")
	e.acquire(claim{token: "B"}).acquired(2)
}
