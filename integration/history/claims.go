package history

import "time"

// A claim is a call of Acquire: a claim of the key, or a renewal of one.
type claim struct {
	visit, op      string
	asked          int  // the attempt that a renewal names; 0 if it is a claim
	mark           bool // a renewal that is to set Once
	sent, returned time.Duration

	// known says that the store has answered, and what. What nobody has an
	// answer to may have reached the store at any time since it was sent, or
	// never.
	known, refused bool
	completed      bool // refused, with an answer to replay
	failed         bool // the visit has lived to see that there is no answer
	failedAt       time.Duration
	attempt        int
	marked         bool // the claim has Once
}

func (k *claim) granted() bool { return k.known && !k.refused }

// may reports whether the claim can have been made between from and until.
func (k *claim) may(from, until time.Duration) bool {
	return k.sent <= until && (!k.known || k.returned >= from)
}

// A release is a call of Release.
type release struct {
	visit    string
	sent     time.Duration
	asked    time.Duration // for how long the marker was to be kept
	keep     time.Duration // how long it has to be there
	marks    bool          // the visit had sent a mark before
	known    bool          // the store has answered
	returned time.Duration
}

// A call names a call of the store.
type call struct {
	visit string
	n     int
}

// indexCall makes calls of rows. A process may die between both rows of a call.
func (c *checker) indexCall(claims map[call]*claim, releases map[call]*release, row Row) {
	name := call{row.Visit, row.Call}
	k, r := claims[name], releases[name]
	switch row.Type {
	case RowClaim:
		k = &claim{visit: row.Visit, op: row.Op, sent: row.At, asked: row.Asked, mark: row.Asked > 0 && row.Once}
		claims[name] = k
		c.calls = append(c.calls, k)
	case RowClaimed, RowRenew:
		switch {
		case k == nil:
		case row.Err != "":
			k.failed, k.failedAt = true, row.At
		default:
			k.known, k.sent, k.returned, k.attempt, k.marked = true, row.Sent, row.Returned, row.Attempt, row.Once
			k.refused = row.Type == RowClaimed && row.State != StateAcquired
			k.completed = row.State == "Completed"
		}
	case RowRelease:
		r = &release{visit: row.Visit, sent: row.At, asked: row.Keep, marks: c.hasSentMark(row.Visit)}
		releases[name] = r
		c.releases = append(c.releases, r)
	case RowReleased:
		if r != nil && row.Err == "" {
			r.known, r.returned = true, row.Returned
		}
	}
}

// indexClaims picks the calls that may have given their visit the key. Renewals
// do not give it: they find it, or a cell that is absent.
func (c *checker) indexClaims() {
	for _, k := range c.calls {
		if k.asked == 0 && !k.refused {
			c.claims = append(c.claims, k)
		}
	}
	for _, r := range c.releases {
		r.keep = c.marker(r)
	}
}

// hasSentMark reports whether a mark of the visit is among the calls so far.
func (c *checker) hasSentMark(visit string) bool {
	for _, k := range c.calls {
		if k.visit == visit && k.mark {
			return true
		}
	}
	return false
}

// marker is how long the marker of a release has to be there, whatever the
// middleware has asked for: for the TTL when the run may have got somewhere, or
// the visit has sent a mark.
func (c *checker) marker(r *release) time.Duration {
	run := c.visits[r.visit]
	gotSomewhere := run != nil && run.end != nil && (run.end.Status >= 500 || run.end.Cut || run.rolledBack()) && !run.end.Discard
	if r.marks || gotSomewhere {
		return c.TTL
	}
	return c.Lease
}

// mayHold reports whether a visit can have got the key between from and until.
func (c *checker) mayHold(visit string, from, until time.Duration) bool {
	for _, k := range c.claims {
		if k.visit == visit && k.may(from, until) {
			return true
		}
	}
	return false
}

// lostTo reports whether somebody else can have got the key between the claim
// of r and until. Nothing else is a reason to tell r that its lease is lost.
func (c *checker) lostTo(r *run, until time.Duration) bool {
	for _, k := range c.claims {
		if k.visit != r.Visit && k.may(r.Sent, until) {
			return true
		}
	}
	return false
}

// freedItself reports whether r may have freed the key until then.
func (c *checker) freedItself(r *run, until time.Duration) bool {
	for _, row := range c.releases {
		if row.visit == r.Visit && row.sent <= until {
			return true
		}
	}
	return false
}

// freed reports whether the key may have been freed between from and until: by
// who may have had it since then. That may be a claim that did not come to a
// run, and has taken the key over before.
func (c *checker) freed(from, until time.Duration) bool {
	for _, r := range c.releases {
		may := !r.known || r.returned >= from
		if may && r.sent <= until && c.mayHold(r.visit, from, until) {
			return true
		}
	}
	return false
}

// absent reports whether the cell may have been absent between from, when a
// visit claimed the key as attempt, and until. While a marker is there, attempts
// go on counting and only a new claim gets the key. Only the marker of a first
// attempt may be short. Those who came after the visit were later attempts, whose
// markers are kept for what is left of the TTL.
func (c *checker) absent(visit string, attempt int, from, until time.Duration) bool {
	for _, r := range c.releases {
		if r.visit == visit && attempt == 1 && r.sent+r.keep-tolerance <= until {
			return true
		}
	}
	return until >= from+c.TTL-tolerance
}

// over reports whether b may have lost the key to a claim that was sent and
// answered then: it has freed it, the TTL of its record was over, or its lease was
// and the key may be taken from it.
func (c *checker) over(b *run, sent, returned time.Duration) bool {
	at, committed := b.committed()
	held := b.held(sent)
	last := held
	if b.stored {
		last = max(held, b.storedFrom())
	}
	switch {
	case c.freedItself(b, returned), returned >= last+c.TTL-tolerance:
		return true
	case b.storedBefore(sent), committed && at <= sent, c.kind == Once:
		return false
	}
	return returned >= held+c.Lease-tolerance
}

// checkRenewals judges the renewals of each run against the claims that came
// after its own. A renewal takes the key from nobody, even when the lease of who
// has it is over, or the key was freed.
func (c *checker) checkRenewals() {
	for _, a := range c.runs {
		for _, b := range c.runs {
			if a == b || b.Returned <= a.Sent || b.Sent < a.Returned && c.judgePair(b, a) == nil {
				continue // b was there before a, or may have been
			}
			for _, row := range a.renewals {
				if !c.mayRenew(a, b, row) {
					c.violate(TookBack, "%s renewed its claim between %v and %v, and %s had it", a.Run, row.Sent, row.Returned, b.Run)
				}
			}
		}
	}
}

// mayRenew judges a renewal of a, whose claim came before that of b. What was
// sent before b's claim, and answered after it, may have been the first of both.
// And the marker may be over that b left, or who took the key from b.
func (c *checker) mayRenew(a, b *run, row Row) bool {
	before := row.Returned <= b.Sent ||
		row.Sent < b.Returned && (b.Returned >= row.Sent+c.Lease-tolerance || c.freedItself(a, b.Returned))
	return before || c.absent(b.Visit, b.Attempt, b.Sent, row.Returned) && c.over(b, row.Sent, row.Returned)
}

// returned reports whether the key may have come back to a, after b claimed it
// and before a stored its answer: a claim of a's that came late took it when b
// had lost it, or the marker is over that b left, or who took the key from b.
func (c *checker) returned(a, b *run) bool {
	for _, k := range c.claims {
		answered := k.returned
		if !k.known {
			answered = a.storedBy
		}
		if k.visit == a.Visit && k.may(b.Sent, a.storedBy) && c.over(b, k.sent, answered) {
			return true
		}
	}
	return c.over(b, a.storedBy, a.storedBy) && c.absent(b.Visit, b.Attempt, b.Sent, a.storedBy)
}

// checkAttempts wants attempts to count the claims: as long as the cell was not
// absent, each is higher than those before, and by no more than what may have
// come in between. Renewals change nothing, and a run is of the attempt that its
// claim was.
func (c *checker) checkAttempts() {
	last := make(map[string]int) // of visits
	for _, k := range c.calls {
		switch {
		case !k.granted():
		case k.asked > 0 && k.attempt != k.asked:
			c.violate(Attempt, "%s renewed attempt %d, and was told of attempt %d", k.visit, k.asked, k.attempt)
		case k.asked == 0:
			last[k.visit] = k.attempt
			c.checkAttempt(k)
		}
	}
	for _, r := range c.runs {
		if r.Attempt != last[r.Visit] {
			c.violate(Attempt, "%s ran as attempt %d, and its claim was attempt %d", r.Run, r.Attempt, last[r.Visit])
		}
	}
}

func (c *checker) checkAttempt(k *claim) {
	previous := &claim{known: true} // as it was before all of them
	for _, other := range c.claims {
		if other == k || !other.known || other.returned > k.sent {
			continue
		}
		if other.visit != k.visit && k.attempt <= other.attempt && !c.absent(other.visit, other.attempt, other.sent, k.returned) {
			c.violate(Attempt, "%s was attempt %d, then %s attempt %d", other.visit, other.attempt, k.visit, k.attempt)
			return
		}
		if other.returned > previous.returned {
			previous = other
		}
	}
	most := previous.attempt + 1
	for _, other := range c.claims {
		if other != k && other != previous && other.may(previous.sent, k.returned) {
			most++
		}
	}
	if k.attempt > most {
		c.violate(Attempt, "%s was attempt %d, and there were no more than %d claims", k.visit, k.attempt, most)
	}
}
