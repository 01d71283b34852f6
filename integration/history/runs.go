package history

import (
	"fmt"
	"slices"
	"time"
)

// checkRuns looks at each run for itself.
func (c *checker) checkRuns() {
	effects := 0
	visits := make(map[string]*run)
	for _, r := range c.runs {
		visits[r.Visit] = r
		effects += r.effects
		if op := c.op(r.Op); op == nil || op.Payload != r.Payload {
			c.violate(Payload, "%s ran payload %q, which its request %s did not send", r.Run, r.Payload, r.Op)
		}
		if r.effects > 1 {
			c.violate(Twice, "%s has %d effects", r.Run, r.effects)
		}
		if len(r.completes) > 0 && !r.final() {
			c.violate(Freed, "the answer of %s, which is not final, was kept", r.Run)
		}
	}
	for _, row := range c.releases {
		if r := visits[row.Visit]; r != nil && (r.end == nil || r.end.Panic || r.final()) {
			c.violate(Freed, "%s freed the key", r.Run)
		}
	}
	if c.kind != Plain && effects > 1 {
		c.violate(Twice, "%d effects under an at-most-once key", effects)
	}
}

func (c *checker) op(id string) *Op {
	for i := range c.ops {
		if c.ops[i].ID == id {
			return &c.ops[i]
		}
	}
	return nil
}

// checkPairs judges each run with each that came after it. When the claims of
// two were made at the same time, either may have been the first: then one of
// both orders must be legal.
func (c *checker) checkPairs() {
	for i, a := range c.runs {
		for _, b := range c.runs[i+1:] {
			switch {
			case a.Returned <= b.Sent:
				c.add(c.judgePair(a, b))
			case b.Returned <= a.Sent:
				c.add(c.judgePair(b, a))
			default:
				if v := c.judgePair(a, b); v != nil && c.judgePair(b, a) != nil {
					c.add(v)
				}
			}
		}
	}
	for i := 1; i < len(c.runs); i++ {
		a, b := c.runs[i-1], c.runs[i]
		switch _, freed := c.freed(a, b.Returned); {
		case c.kind == Plain && freed:
			c.report.AfterRelease++
		case c.kind == Plain:
			c.report.AfterLease++
		}
	}
}

func (c *checker) add(v *Violation) {
	if v != nil {
		c.report.Violations = append(c.report.Violations, *v)
	}
}

// freed returns a call that may have freed the key between the claim of a and
// until, and whether it was a's own. A claim that did not come to a run is
// given back too, and may have taken the key over before.
func (c *checker) freed(a *run, until time.Duration) (own, anybodys bool) {
	for _, row := range c.releases {
		if row.Visit == a.Visit && row.At <= until {
			own = true
		}
		if row.At >= a.Sent && row.At <= until {
			anybodys = true
		}
	}
	return own, anybodys
}

// judgePair judges b, whose claim came after that of a. Between both:
//
//   - a has freed the key, or its lease was over. That is counted from the last
//     renewal that was made before b's claim for certain;
//   - a's lease being over does not count when the key is at-most-once;
//   - a has not stored its answer. It may do so later only if the key has come
//     back to it: b has freed it, and a renewed its claim then, or the marker
//     that b left had expired;
//   - if a had an answer, it has tried to store it until then;
//   - the payload is the same, unless the key was freed.
func (c *checker) judgePair(a, b *run) *Violation {
	violate := func(kind, format string, args ...any) *Violation {
		return &Violation{kind, c.key, fmt.Sprintf("%s, then %s: ", a.Run, b.Run) + fmt.Sprintf(format, args...)}
	}
	own, anybody := c.freed(a, b.Returned)
	if at, ok := a.committed(); ok && b.Sent >= at {
		return violate(RanAgain, "the first had committed")
	}
	if a.stored && b.Sent >= a.storedBy {
		return violate(RanAgain, "the answer of the first was stored")
	}
	if !own && c.kind == Once {
		return violate(Twice, "an at-most-once key was let in again")
	}
	held := a.held(b.Sent)
	if !own && b.Returned < held+c.lease-tolerance {
		return violate(Overlap, "%v after the claim or its renewal, of a lease of %v", b.Returned-held, c.lease)
	}
	if a.Payload != b.Payload && !anybody {
		return violate(Payload, "payload %q, then %q", a.Payload, b.Payload)
	}
	if b.Attempt <= a.Attempt && !anybody {
		return violate(Attempt, "attempt %d, then %d", a.Attempt, b.Attempt)
	}
	if c.gaveUp(a, held+c.lease) {
		return violate(GaveUp, "the first had until %v to store its answer", held+c.lease)
	}
	if a.stored && !c.returned(a, b) {
		return violate(Stale, "the first stored its answer after the second was let in")
	}
	return nil
}

// held returns when the last claim or renewal was asked for that was made
// before another claim, asked for at until, for certain.
func (r *run) held(until time.Duration) time.Duration {
	held := r.Sent
	for _, row := range r.renewals {
		if row.Returned <= until {
			held = max(held, row.Sent)
		}
	}
	return held
}

// gaveUp reports whether a run that could not store its answer stopped trying
// long before its lease ended, though its process lived. It tries for the last
// time when the lease ends.
func (c *checker) gaveUp(r *run, end time.Duration) bool {
	if r.stored || len(r.completes) == 0 || slices.Contains(c.dead, r.Process) {
		return false
	}
	for _, row := range r.completes {
		if row.Err == ErrLeaseLost || row.Returned >= end-c.lease/4 {
			return false
		}
	}
	return true
}

// returned reports whether the key may have come back to a, after b claimed it.
func (c *checker) returned(a, b *run) bool {
	for _, row := range a.renewals {
		if row.Returned >= b.Sent {
			return true
		}
	}
	_, freed := c.freed(b, a.storedBy)
	return freed
}
