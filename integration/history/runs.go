package history

import (
	"fmt"
	"slices"
	"time"
)

// checkRuns looks at each run for itself.
func (c *checker) checkRuns() {
	effects := make([]int, len(c.lives))
	for _, r := range slices.Concat(c.runs, c.exposed) {
		effects[r.life] += r.effects
		if op := c.op(r.Op); op == nil || op.Payload != r.Payload {
			c.violate(Payload, "%s ran payload %q, which its request %s did not send", r.Run, r.Payload, r.Op)
		}
		if r.effects > 1 {
			c.violate(Twice, "%s has %d effects", r.Run, r.effects)
		}
	}
	for _, r := range c.runs {
		c.checkStoring(r)
	}
	c.checkReleases()
	for _, n := range effects {
		if c.atMostOnce() && n > 1 {
			c.violate(Twice, "%d effects under an at-most-once key", n)
		}
	}
}

// checkReleases wants runs to free the key when they have come to nothing, and
// all who free it to leave a marker for as long as is due.
func (c *checker) checkReleases() {
	for _, f := range c.releases {
		r := c.visits[f.visit]
		switch {
		case r != nil && (r.Unprotected || r.end == nil || r.end.Panic || r.final() && !r.rolledBack()):
			c.violate(Freed, "%s freed the key", r.Run)
		case f.asked != f.keep:
			c.violate(Marker, "%s freed the key, with a marker for %v in the place of %v", f.visit, f.asked, f.keep)
		}
	}
}

// checkExposed wants a reason for a run without a claim: a call of its visit has
// failed. It is none that another execution may be running, and its request was
// told so before. Nothing of such a run is stored.
func (c *checker) checkExposed() {
	for _, r := range c.exposed {
		failed := false
		for _, k := range c.calls {
			if k.visit != r.Visit || k.sent > r.At {
				continue
			}
			failed = failed || k.failed
			if k.refused {
				c.violate(Exposed, "%s began at %v, and had been told of another run", r.Run, r.At)
			}
		}
		if !failed {
			c.violate(Exposed, "%s began at %v, and the store had not failed", r.Run, r.At)
		}
		if len(r.completes) > 0 {
			c.violate(Exposed, "the answer of %s was kept", r.Run)
		}
	}
}

// checkStoring judges what a run did to have its answer stored.
func (c *checker) checkStoring(r *run) {
	if len(r.completes) > 0 && !r.final() {
		c.violate(Freed, "the answer of %s, which is not final, was kept", r.Run)
	}
	for _, row := range r.completes {
		if row.Err == ErrLeaseLost && !c.lostTo(r, row.Returned) {
			c.violate(Lost, "%s lost its lease between %v and %v, and nobody can have taken the key", r.Run, r.Sent, row.Returned)
		}
	}
	for _, row := range r.smalls {
		if !c.mayShrink(r, row.At) {
			c.violate(Shrunk, "%s gave its answer up at %v for a small record, and the store had not renewed its claim in between two refusals", r.Run, row.At)
		}
	}
	if end, gaveUp := c.gaveUp(r); gaveUp {
		c.violate(GaveUp, "%s had until %v to store its answer", r.Run, end)
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
		switch {
		case a.life != b.life:
		case c.atMostOnce():
		case c.freed(a.Sent, b.Returned):
			c.report.AfterRelease++
		default:
			c.report.AfterLease++
		}
	}
}

func (c *checker) add(v *Violation) {
	if v != nil {
		c.report.Violations = append(c.report.Violations, *v)
	}
}

// judgePair judges b, whose claim came after that of a. Between both:
//
//   - a has freed the key, or its lease was over. That is counted from the last
//     renewal that was made before b's claim for certain;
//   - a's lease being over does not count when the key is at-most-once;
//   - a has not stored its answer. It may do so later only if the key has come
//     back to it;
//   - the payload is the same, unless the key was freed, or the store cannot
//     know it: the claim of a large body has none.
//
// When the TTL was over in between, only the answer of a must not come later.
func (c *checker) judgePair(a, b *run) *Violation {
	violate := func(kind, format string, args ...any) *Violation {
		return &Violation{kind, c.key, fmt.Sprintf("%s, then %s: ", a.Run, b.Run) + fmt.Sprintf(format, args...)}
	}
	if a.life != b.life {
		if a.stored && a.storedFrom() >= b.Returned && !c.returned(a, b) {
			return violate(Stale, "the first stored its answer in a later life of the key")
		}
		return nil
	}
	own := c.freedItself(a, b.Returned)
	if at, ok := a.committed(); ok && b.Sent >= at {
		return violate(RanAgain, "the first had committed")
	}
	if a.storedBefore(b.Sent) {
		return violate(RanAgain, "the answer of the first was stored")
	}
	if !own && c.kind == Once {
		return violate(Twice, "an at-most-once key was let in again")
	}
	held := a.held(b.Sent)
	if !own && b.Returned < held+c.Lease-tolerance {
		return violate(Overlap, "%v after the claim or its renewal, of a lease of %v", b.Returned-held, c.Lease)
	}
	if a.Payload != b.Payload && !c.isLarge() && !c.freed(a.Sent, b.Returned) {
		return violate(Payload, "payload %q, then %q", a.Payload, b.Payload)
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

// gaveUp reports whether a run that had to store its answer, and could not,
// stopped trying though its process lived and its time was not over: a lease
// and MaxExecution. Only who may have lost the key to somebody else may stop when
// told so.
func (c *checker) gaveUp(r *run) (end time.Duration, gaveUp bool) {
	if r.stored || !r.final() || r.attached() && len(r.completes) > 0 {
		return 0, false
	}
	end = c.leaseEnd(r) + c.MaxExecution
	slack := c.longestPause()
	if killed, ok := c.Killed[r.Process]; ok {
		if killed < r.end.At+slack {
			return end, false
		}
		end = min(end, killed)
	}
	for _, row := range r.completes {
		if row.Err == ErrLeaseLost && c.lostTo(r, row.Returned) || row.Returned >= end-slack {
			return end, false
		}
	}
	return end, true
}

// leaseEnd returns when the lease of a run ended that has an answer. A renewal
// that comes back when the handler returns may be too late to count.
func (c *checker) leaseEnd(r *run) time.Duration {
	last := r.Sent
	for _, row := range r.renewals {
		if row.At <= r.end.At-c.Lease/8 {
			last = max(last, row.Sent)
		}
	}
	return last + c.Lease
}

// mayShrink reports whether a small record may take the place of the answer of r
// at that time. The store was asked for the answer in vain, then it renewed the
// claim, so it is not down, and then it refused the answer once more. All that
// comes late in the lease: its second half, of which the judge, who does not know
// when the middleware read its clock, makes two thirds.
func (c *checker) mayShrink(r *run, at time.Duration) bool {
	if r.end == nil {
		return false
	}
	failed := func(from, until time.Duration) bool {
		for _, row := range r.completes {
			if row.Err != "" && row.Err != ErrLeaseLost && row.Sent >= from && row.Returned <= until {
				return true
			}
		}
		return false
	}
	for _, renewal := range r.renewals {
		if failed(r.end.At, renewal.Sent) && failed(renewal.Returned, at) && renewal.Sent >= c.leaseEnd(r)-2*c.Lease/3 {
			return true
		}
	}
	return false
}

// longestPause is for how many leases there may be nothing between two tries:
// a process may be stopped for two and a half.
const longestPause = 4

// longestPause is the same for a machine that had too much to do.
func (c *checker) longestPause() time.Duration { return longestPause*c.Lease + c.Stalled }
