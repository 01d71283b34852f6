package storetest

import (
	"time"

	"github.com/go-idempotency/idempotency"
)

// A way is a row of the table of Acquire whose answer is Acquired. Its prepare
// makes a cell that fits the row, with lease and ttl where the row leaves a
// choice. Its claim acquires that cell.
type way struct {
	name    string
	prepare func(e *env, lease, ttl time.Duration)
	claim   claim
}

var ways = []way{
	{"the claim of an absent cell", noCell, claim{token: "A", fp: "one"}},
	{"the renewal of an absent cell", noCell, claim{token: "A", fp: "one", attempt: 2}},
	{"the claim of a released cell", releasedCell, claim{token: "B", fp: "one"}},
	{"a claim that is sent twice", claimedCell, claim{token: "A", fp: "one"}},
	{"a renewal", claimedCell, claim{token: "A", fp: "one", attempt: 1}},
	{"a take-over", lapsedCell, claim{token: "B", fp: "one"}},
}

func noCell(*env, time.Duration, time.Duration) {}

func claimedCell(e *env, lease, ttl time.Duration) {
	e.acquire(claim{token: "A", fp: "one", lease: lease, ttl: ttl}).acquired(1)
}

func releasedCell(e *env, lease, ttl time.Duration) {
	claimedCell(e, lease, long)
	e.releaseFor("A", ttl)
}

// lapsedCell leaves some of a short TTL, so its lease must be shorter.
func lapsedCell(e *env, _, ttl time.Duration) {
	claimedCell(e, e.short/2, ttl)
	e.pass(e.short/2 + 2*e.tolerance)
}

// everyWay returns a rule for each way.
func everyWay(name string, check func(*env, way)) (rules []rule) {
	for _, w := range ways {
		rules = append(rules, rule{name: w.name + " " + name, check: func(e *env) { check(e, w) }})
	}
	return rules
}

// startsLease acquires a cell whose lease would end sooner, and one whose lease
// would end later.
func startsLease(e *env, w way) {
	for _, before := range []time.Duration{e.short / 2, long} {
		e.use(randomKey())
		w.prepare(e, before, long)
		c := w.claim
		c.lease = e.short
		a := e.acquire(c).acquiredAny()
		e.changesAfter(a.span, e.short, claim{token: "C", fp: "one"}, idempotency.InProgress).acquired(a.Attempt + 1)
	}
}

// startsTTL acquires a cell that would be kept for longer, and one that would
// not be kept for as long. A claim with another fingerprint cannot take the cell
// over, so its answer changes when the cell expires. Attempt tells whether the
// cell is still there.
func startsTTL(e *env, w way) {
	w.prepare(e, e.short/2, long)
	c := w.claim
	c.lease, c.ttl = e.short/2, e.short
	a := e.acquire(c).acquiredAny()
	e.changesAfter(a.span, e.short, claim{token: "C", fp: "two"}, idempotency.Mismatch).acquired(1)

	e.use(randomKey())
	w.prepare(e, e.short/2, e.short)
	c.ttl = long
	a = e.acquire(c).acquiredAny()
	e.lapse()
	e.acquire(claim{token: "C", fp: "one"}).acquired(a.Attempt + 1)
}

// keepsLease acquires a cell with a TTL that ends before the lease.
func keepsLease(e *env, w way) {
	w.prepare(e, e.short/2, e.short)
	c := w.claim
	c.ttl = e.short
	e.acquire(c).acquiredAny()
	e.lapse()
	e.acquire(claim{token: "C", fp: "one"}).is(idempotency.InProgress)
}
