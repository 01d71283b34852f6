package history

import "time"

// A claim is a call of the store that may have given its visit the key. Those
// that were refused are none.
type claim struct {
	visit          string
	sent, returned time.Duration

	// known says that the store has said so. What nobody has an answer to may
	// have reached the store at any time since it was sent, or never.
	known bool
}

// may reports whether the claim can have been made between from and until.
func (k *claim) may(from, until time.Duration) bool {
	return k.sent <= until && (!k.known || k.returned >= from)
}

// A call names a call of Acquire.
type call struct {
	visit string
	n     int
}

// indexClaim makes claims of rows. A process may die between both rows of a
// claim.
func (c *checker) indexClaim(calls map[call]*claim, row Row) {
	name := call{row.Visit, row.Call}
	switch {
	case row.Type == RowClaim:
		calls[name] = &claim{visit: row.Visit, sent: row.At}
		c.claims = append(c.claims, calls[name])
	case row.Type != RowClaimed && row.Type != RowRenew, row.Err != "", calls[name] == nil:
	case row.Type == RowRenew, row.State == StateAcquired:
		*calls[name] = claim{visit: row.Visit, sent: row.Sent, returned: row.Returned, known: true}
	default:
		c.claims = without(c.claims, calls[name])
	}
}

func without(claims []*claim, refused *claim) []*claim {
	for i := len(claims) - 1; i >= 0; i-- {
		if claims[i] == refused {
			return append(claims[:i], claims[i+1:]...)
		}
	}
	return claims
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
		if row.Visit == r.Visit && row.At <= until {
			return true
		}
	}
	return false
}

// freed reports whether the key may have been freed between the claim of a and
// until, and the marker that this leaves have been there for as long as kept.
// It was freed by a, or by a claim that did not come to a run, is given back
// for that, and may have taken the key over before. Who cannot have had the key
// since then has freed nothing.
func (c *checker) freed(a *run, until, kept time.Duration) bool {
	for _, row := range c.releases {
		if row.At >= a.Sent && row.At+kept <= until && (row.Visit == a.Visit || c.mayHold(row.Visit, a.Sent, until)) {
			return true
		}
	}
	return false
}

// marker is how long the marker stays that a release leaves, for certain. While
// it is there, attempts go on counting and only a new claim gets the key.
func (c *checker) marker() time.Duration { return c.Lease - tolerance }

// over reports whether b may have lost the key to a claim that was sent and
// answered then: it has freed it, or its lease was over and the key may be taken
// from it.
func (c *checker) over(b *run, sent, returned time.Duration) bool {
	at, committed := b.committed()
	switch {
	case c.freedItself(b, returned):
		return true
	case b.storedBefore(sent), committed && at <= sent, c.kind == Once:
		return false
	}
	return returned >= b.held(sent)+c.Lease-tolerance
}

// checkRenewals judges the renewals of each run against the claims that came
// after its own. A renewal is a claim like any other: it must not take the key
// from who has it.
func (c *checker) checkRenewals() {
	for _, a := range c.runs {
		for _, b := range c.runs {
			if a == b || b.Returned <= a.Sent { // b was there before a
				continue
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
func (c *checker) mayRenew(a, b *run, row Row) bool {
	before := row.Returned <= b.Sent ||
		row.Sent < b.Returned && (b.Returned >= row.Sent+c.Lease-tolerance || c.freedItself(a, b.Returned))
	return before || c.over(b, row.Sent, row.Returned)
}

// returned reports whether the key may have come back to a, after b claimed it
// and before a stored its answer: a has claimed it again when b had lost it, or
// the marker had expired that b left, or who took the key from b and gave it
// back.
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
	return c.over(b, a.storedBy, a.storedBy) && c.freed(b, a.storedBy, c.marker())
}
