package history

import "time"

// checkMarks wants a mark under each run that must not be repeated, before it is
// told so, and none that nobody has asked for.
func (c *checker) checkMarks() {
	for _, k := range c.calls {
		if k.granted() && k.marked && !c.mayBeMarked(k) {
			c.violate(Marked, "the claim of %s has Once at %v, and no mark was sent", k.visit, k.returned)
		}
	}
	for _, r := range c.runs {
		if c.kind == Once && !c.isMarked(r, r.At) {
			c.violate(Unmarked, "%s began at %v", r.Run, r.At)
		}
		if at, ok := r.committed(); ok && !c.isMarked(r, at) {
			c.violate(Unmarked, "%s was told at %v that it has committed", r.Run, at)
		}
	}
}

func (c *checker) mayBeMarked(k *claim) bool {
	for _, m := range c.calls {
		if m.visit == k.visit && m.mark && m.sent <= k.returned {
			return true
		}
	}
	return false
}

// isMarked reports whether the store had said until then that the claim of r is
// marked.
func (c *checker) isMarked(r *run, until time.Duration) bool {
	for _, row := range r.renewals {
		if row.Once && row.Returned <= until {
			return true
		}
	}
	return false
}

// mayBeUnknown reports whether there can have been a marked claim whose lease was
// over when op was answered.
func (c *checker) mayBeUnknown(op Op) bool {
	for i, m := range c.calls {
		if !m.mark || m.known && m.refused || c.refusedLater(m, c.calls[i+1:], op) {
			continue
		}
		if r := c.visits[m.visit]; r != nil && r.storedBefore(op.Start) {
			continue
		}
		if op.End >= c.markedFrom(m, op.Start)+c.Lease-tolerance {
			return true
		}
	}
	return false
}

// refusedLater reports whether the visit of m was told later that the key is not
// its own. Before op, that says that no mark of it is there any more. Afterwards
// it says that m has marked nothing, or else nobody could have taken the key:
// unless the visit has given the key up itself.
func (c *checker) refusedLater(m *claim, later []*claim, op Op) bool {
	for _, k := range later {
		if k.visit != m.visit || !k.known || !k.refused {
			continue
		}
		if k.returned <= op.Start || !c.gaveItUp(m.visit, k.returned) {
			return true
		}
	}
	return false
}

// gaveItUp reports whether a visit may have stored its answer or freed the key
// until then.
func (c *checker) gaveItUp(visit string, until time.Duration) bool {
	for _, r := range c.releases {
		if r.visit == visit && r.sent <= until {
			return true
		}
	}
	r := c.visits[visit]
	return r != nil && len(r.completes) > 0 && r.completes[0].Sent <= until
}

// markedFrom returns since when the lease of a marked claim has run at least. Once
// the visit has freed the key, and knows it, a mark can only come when the cell is
// absent again: its claim was kept for the TTL, and so is the marker of whoever
// has freed the key since, as a mark was sent, or as its attempt was a later one.
func (c *checker) markedFrom(m *claim, until time.Duration) time.Duration {
	from, claimed := m.sent, m.sent
	for _, k := range c.calls {
		if k.visit != m.visit {
			continue
		}
		if k.granted() && k.returned <= until {
			from = max(from, k.sent)
		}
		if k.granted() && k.asked == 0 {
			claimed = k.sent
		}
	}
	for _, r := range c.releases {
		if r.visit == m.visit && r.known && r.returned <= until {
			from = max(from, claimed+c.TTL)
		}
	}
	return from
}

// checkFreeing wants who has to free the key to try so, until the store has
// answered. A run frees it whose answer is not kept, and a visit that has no
// answer to a claim or a mark and does not come to a run. A claim ends with its
// lease; what may be marked does not, and is freed for MaxExecution beyond that.
func (c *checker) checkFreeing() {
	for visit, due := range c.mustFree() {
		until, marks := due+c.Lease, false
		for _, k := range c.calls {
			marks = marks || k.visit == visit && k.mark
		}
		if marks {
			until += c.MaxExecution
		}
		c.checkFreed(visit, due, until)
	}
}

func (c *checker) checkFreed(visit string, due, until time.Duration) {
	slack := c.longestPause()
	if killed, ok := c.Killed[c.processes[visit]]; ok {
		if killed < due+slack {
			return
		}
		until = min(until, killed)
	}
	last, tried := time.Duration(0), false
	for _, r := range c.releases {
		if r.visit != visit {
			continue
		}
		if r.known {
			return
		}
		last, tried = max(last, r.sent), true
	}
	if !tried && c.wasStopped(c.processes[visit], until) {
		return // when it went on, a claim was over, and so was the time to free it
	}
	if !tried || last < until-slack {
		c.violate(NotFreed, "%s had from %v until %v to free the key", visit, due, until)
	}
}

// wasStopped reports whether a process was stopped then.
func (c *checker) wasStopped(process string, at time.Duration) bool {
	for _, s := range c.Stopped[process] {
		if s.From <= at && at <= s.To {
			return true
		}
	}
	return false
}

// mustFree returns the visits that have to free the key, and from when on: since
// the process knows of it, which may have been stopped meanwhile.
func (c *checker) mustFree() map[string]time.Duration {
	visits := make(map[string]time.Duration)
	completed := make(map[string]bool)
	for _, k := range c.calls {
		if c.visits[k.visit] == nil && k.failed && (k.asked == 0 || k.mark) {
			visits[k.visit] = max(visits[k.visit], k.failedAt)
		}
		completed[k.visit] = completed[k.visit] || k.completed
	}
	for visit := range completed {
		if completed[visit] { // a replay, to a claim whose first answer was lost
			delete(visits, visit)
		}
	}
	for _, r := range c.runs {
		if r.end != nil && !r.end.Panic && !r.final() {
			visits[r.Visit] = r.end.At
		}
	}
	return visits
}
