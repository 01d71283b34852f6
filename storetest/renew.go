package storetest

import "github.com/go-idempotency/idempotency"

// resendRules are about a claim under the token that holds the key already: the
// same command, sent twice.
var resendRules = []rule{
	{name: "the attempt stays", check: func(e *env) {
		for range 3 {
			e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		}
		e.release("A")
		e.acquire(claim{token: "B", fp: "one"}).acquired(2)
		e.acquire(claim{token: "B", fp: "one"}).acquired(2)
	}},

	{name: "the lease may be over", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
	}},

	{name: "the fingerprint stays", check: func(e *env) { e.keepsFingerprint(0) }},

	{name: "an unknown fingerprint stays unknown", check: func(e *env) { e.keepsUnknownFingerprint(0) }},

	// The former owner has no better right than any other token.
	{name: "a claim that was taken over is another owner's", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		b := e.changesAfter(a.span, e.short, claim{token: "B", lease: e.short}, idempotency.InProgress).acquired(2)
		e.changesAfter(b.span, e.short, claim{token: "A"}, idempotency.InProgress).acquired(3)
	}},
}

// renewRules check what a renewal gets, in the order of the table of Acquire.
var renewRules = []rule{
	// The store has lost the record of a handler that is still running.
	{name: "an absent cell becomes a claim of the attempt", check: func(e *env) {
		for _, attempt := range []int{1, 2, 300} {
			e.use(randomKey())
			e.acquire(claim{token: "A", attempt: attempt, fp: "one"}).acquired(attempt)
			e.acquire(claim{token: "C", fp: "two"}).is(idempotency.Mismatch)
			e.acquire(claim{token: "C", fp: "one"}).is(idempotency.InProgress)
			e.acquire(claim{token: "A", attempt: attempt + 1}).is(idempotency.Lost)
			a := e.acquire(claim{token: "A", attempt: attempt, lease: e.short}).acquired(attempt)
			e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).acquired(attempt + 1)
		}
	}},

	{name: "a cell released under the token is Lost", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 1, fp: "two"}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 2, once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "a cell released under another token is Lost", check: func(e *env) {
		e.acquire(claim{token: "B", fp: "one"}).acquired(1)
		e.release("B")
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 1, fp: "two", once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 2, once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).is(idempotency.Lost)
		e.acquire(claim{token: "C"}).acquired(2)
	}},

	{name: "a cell released while it was absent is Lost", check: func(e *env) {
		for _, token := range []string{"A", "B"} {
			e.use(randomKey())
			e.release(token)
			e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
			e.acquire(claim{token: "C"}).acquired(1)
		}
	}},

	{name: "Mismatch comes before the token and the attempt", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		for _, token := range []string{"A", "B"} {
			e.acquire(claim{token: token, attempt: 1, fp: "two"}).is(idempotency.Mismatch)
			e.acquire(claim{token: token, attempt: 2, fp: "two"}).is(idempotency.Mismatch)
		}
		e.complete("A", result{fp: "one", value: "done"})
		e.acquire(claim{token: "A", attempt: 1, fp: "two"}).is(idempotency.Mismatch)
		e.acquire(claim{token: "B", attempt: 1, fp: "two"}).is(idempotency.Mismatch)
	}},

	{name: "a completed cell is Lost", check: func(e *env) {
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
		e.complete("A", result{fp: "one", value: "done"})
		for _, token := range []string{"A", "B"} {
			e.acquire(claim{token: token, attempt: 1, fp: "one"}).is(idempotency.Lost)
			e.acquire(claim{token: token, attempt: 1, once: true}).is(idempotency.Lost)
		}
		e.acquire(claim{token: "C"}).completed("one", "done")
	}},

	{name: "the attempt stays", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		for range 2 {
			e.acquire(claim{token: "A", attempt: 1}).acquired(1)
		}
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
		for range 2 {
			e.acquire(claim{token: "B", attempt: 2}).acquired(2)
		}
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	{name: "the lease may be over", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "A", attempt: 1}).acquired(1)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
	}},

	{name: "the lease starts anew every time", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		for range 3 {
			e.pass(e.short / 2)
			a = e.acquire(claim{token: "A", attempt: 1, lease: e.short}).acquired(1)
		}
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	}},

	{name: "the fingerprint stays", check: func(e *env) { e.keepsFingerprint(1) }},

	{name: "an unknown fingerprint stays unknown", check: func(e *env) { e.keepsUnknownFingerprint(1) }},

	{name: "another attempt is Lost", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "A", attempt: 2}).is(idempotency.Lost)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
		for _, attempt := range []int{1, 3, 258} {
			e.acquire(claim{token: "B", attempt: attempt}).is(idempotency.Lost)
			e.acquire(claim{token: "B", attempt: attempt, once: true}).is(idempotency.Lost)
		}
		e.acquire(claim{token: "B", attempt: 2}).acquired(2)
	}},

	{name: "another attempt is Lost when the lease is over", check: func(e *env) {
		e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "A", attempt: 2}).is(idempotency.Lost)
		e.acquire(claim{token: "B"}).acquired(2)
	}},

	// Two commands of A are late: its claim, which was sent twice, and the
	// renewal that was to mark it. Meanwhile B has claimed and released the key,
	// so the marker is B's.
	{name: "a late renewal does not mark a late claim", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.release("A")
		e.acquire(claim{token: "B"}).acquired(2)
		e.release("B")
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(3)
		e.acquire(claim{token: "A", attempt: 1, once: true}).is(idempotency.Lost)
		e.changesAfter(a.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(4)
	}},

	{name: "another owner's claim is Lost while its lease runs", check: func(e *env) {
		e.acquire(claim{token: "B", fp: "one"}).acquired(1)
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 1, fp: "one", once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "B", attempt: 1}).acquired(1)
	}},

	{name: "another owner's claim is Lost when its lease is over", check: func(e *env) {
		b := e.acquire(claim{token: "B", lease: e.short}).acquired(1)
		e.lapse()
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 2, once: true}).is(idempotency.Lost)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(2)
	}},

	{name: "another owner's Once claim is Lost when its lease is over", check: func(e *env) {
		b := e.acquireOnce(claim{token: "B", lease: e.short})
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).is(idempotency.Abandoned)
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "C"}).is(idempotency.Abandoned)
	}},

	{name: "a claim that was taken over is Lost", check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		b := e.changesAfter(a.span, e.short, claim{token: "B", lease: e.short}, idempotency.InProgress).acquired(2)
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.acquire(claim{token: "A", attempt: 2}).is(idempotency.Lost)
		e.lapse()
		e.acquire(claim{token: "A", attempt: 1}).is(idempotency.Lost)
		e.changesAfter(b.span, e.short, claim{token: "C"}, idempotency.InProgress).acquired(3)
	}},

	// No refused call may prolong the lease, mark the claim or change its token,
	// its attempt or its fingerprint.
	{name: "a renewal that is refused changes nothing", check: func(e *env) {
		a := e.acquire(claim{token: "A", fp: "one", lease: e.short}).acquired(1)
		e.acquire(claim{token: "A", attempt: 1, fp: "two", once: true}).is(idempotency.Mismatch)
		e.acquire(claim{token: "A", attempt: 2, once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "B", attempt: 1, once: true}).is(idempotency.Lost)
		e.acquire(claim{token: "C", fp: "two"}).is(idempotency.Mismatch)
		e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).acquired(2)
	}},
}

// keepsFingerprint sends the claim of a known fingerprint again, or renews it,
// without one.
func (e *env) keepsFingerprint(attempt int) {
	e.acquire(claim{token: "A", fp: "one"}).acquired(1)
	e.acquire(claim{token: "A", attempt: attempt}).acquired(1)
	empty := e.claim(claim{token: "A", attempt: attempt})
	empty.Fingerprint = []byte{}
	e.send(empty).acquired(1)
	e.acquire(claim{token: "B", fp: "two"}).is(idempotency.Mismatch)
	e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
}

// keepsUnknownFingerprint sends a claim without a fingerprint again, or renews
// it, with one.
func (e *env) keepsUnknownFingerprint(attempt int) {
	e.acquire(claim{token: "A"}).acquired(1)
	e.acquire(claim{token: "A", attempt: attempt, fp: "one"}).acquired(1)
	e.acquire(claim{token: "B", fp: "two"}).is(idempotency.InProgress)
	e.acquire(claim{token: "A", attempt: attempt, fp: "two"}).acquired(1)
}
