package history

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// A life is the time in which a record of the key is there for certain. A key
// has one life after the other: when the TTL of its record is over, the key
// counts as a new one.
type life struct {
	from  time.Duration // the write that began the life was confirmed by then
	until time.Duration // no record of the life can have been over before
}

// noLife is that of a request that came when the TTL may have been over: both
// what was there before and what came then may explain its answer.
const noLife = -1

// A write is one of a record that the store has confirmed. It was made between
// sent and returned.
type write struct {
	visit          string
	sent, returned time.Duration
	claims         int // that led to it; 0 if it is a renewal or a stored answer
}

// indexLives finds the lives of the key and says which one each run is of. A
// write begins a life if the TTL may have passed since the last time at which the
// store wrote a record of the key for certain. Without that evidence it belongs to
// the life before, and the rules of that life judge it.
//
// Most lives begin with a claim. A run that could not store its answer goes on
// trying, and may do so when the TTL is over. It is of the life that it begins then.
func (c *checker) indexLives() {
	c.lives = []life{{}}
	began := make(map[string]int) // by visits
	for _, w := range c.writes() {
		last, touched := c.lastTouch(w.sent)
		end := last + c.TTL - tolerance
		// A claim to which there was no answer may have begun the life. Then a
		// later attempt is the first that the ledger knows of.
		if touched && w.returned >= end && w.claims <= 1+c.unanswered(w.returned) {
			c.lives[len(c.lives)-1].until = end
			began[w.visit] = len(c.lives)
			c.lives = append(c.lives, life{from: w.returned})
		}
	}
	end := time.Duration(math.MaxInt64)
	if last, touched := c.lastTouch(end); touched {
		end = last + c.TTL - tolerance
	}
	c.lives[len(c.lives)-1].until = end
	for _, r := range slices.Concat(c.runs, c.exposed) {
		r.life = max(c.lifeAt(r.Returned), began[r.Visit])
	}
}

// writes returns the writes in the order in which the store confirmed them.
func (c *checker) writes() (writes []write) {
	for _, k := range c.calls {
		switch {
		case !k.granted():
		case k.asked > 0:
			writes = append(writes, write{visit: k.visit, sent: k.sent, returned: k.returned})
		default:
			writes = append(writes, write{k.visit, k.sent, k.returned, k.attempt})
		}
	}
	for _, r := range c.runs {
		for _, row := range r.completes {
			if row.Err == "" {
				writes = append(writes, write{visit: r.Visit, sent: row.Sent, returned: row.Returned})
			}
		}
	}
	slices.SortStableFunc(writes, func(a, b write) int { return cmp.Compare(a.returned, b.returned) })
	return writes
}

// lifeAt returns the life that had begun last.
func (c *checker) lifeAt(at time.Duration) int {
	n := len(c.lives) - 1
	for n > 0 && c.lives[n].from > at {
		n--
	}
	return n
}

// lifeOf returns the life that a request belongs to from its start to its end, or
// noLife.
func (c *checker) lifeOf(op Op) int {
	n := c.lifeAt(op.Start)
	if op.End > c.lives[n].until {
		return noLife
	}
	return n
}

// lastTouch returns the last time before which the store has not written the
// record that it has written for certain until then. Each write starts the TTL
// anew, except that of an answer that is stored already.
func (c *checker) lastTouch(until time.Duration) (last time.Duration, touched bool) {
	touch := func(at time.Duration) { last, touched = max(last, at), true }
	for _, k := range c.calls {
		if k.granted() && k.returned <= until {
			touch(k.sent)
		}
	}
	for _, r := range c.runs {
		if r.storedBefore(until) {
			touch(r.storedFrom())
		}
	}
	return last, touched
}

// storedFrom returns the time before which the answer of r was not stored.
func (r *run) storedFrom() time.Duration {
	for _, row := range r.completes {
		if row.Err != ErrLeaseLost {
			return row.Sent
		}
	}
	if r.end == nil {
		return r.At
	}
	return r.end.At
}

// unanswered counts the claims to which there was no answer, and that can have
// been made until then.
func (c *checker) unanswered(until time.Duration) (n int) {
	for _, k := range c.claims {
		if !k.known && k.sent <= until {
			n++
		}
	}
	return n
}

// checkLives wants nothing of a record to be told when its TTL is over. A key
// without any record is a matter of other rules.
func (c *checker) checkLives() {
	c.report.Lives += len(c.lives)
	for _, op := range c.ops {
		if op.Err != "" {
			continue
		}
		var end time.Duration
		switch r := c.byID[op.Run]; {
		case op.Replayed && r != nil:
			end = c.storedUntil(r)
		case op.Code == "in_progress", op.Code == "key_reused", op.Code == "outcome_unknown", op.Code == notStored:
			end = c.recordUntil(op)
		default:
			continue
		}
		if end > 0 && op.Start > end+tolerance {
			c.violate(Outlived, "request %s began at %v and got %s%s, and the TTL of every record was over at %v",
				op.ID, op.Start, op.Code, op.Run, end)
		}
	}
}

// storedUntil returns when the answer of r is over. Complete may be tried again
// after a reply that was lost, and writes the record anew if it is over by then.
func (c *checker) storedUntil(r *run) time.Duration {
	stored := r.storedBy
	for _, row := range r.completes {
		switch row.Err {
		case ErrLeaseLost:
		case "":
			stored = max(stored, row.Returned)
		default:
			stored = max(stored, c.arrivedBy(row.Returned))
		}
	}
	return stored + c.TTL
}

// arrivedBy returns when a command has arrived to which there was no answer. It
// may come as late as processes are stopped and links are slow.
func (c *checker) arrivedBy(sent time.Duration) time.Duration { return sent + 2*longestPause*c.Lease }

// recordUntil returns when every record is over that requests before op, or beside
// it, can have left behind. Go's Transport may have sent op itself twice.
func (c *checker) recordUntil(op Op) (end time.Duration) {
	sentOnce := len(c.arrivals[op.ID]) < 2
	for _, k := range c.calls {
		switch {
		case k.refused, k.sent > op.End, k.op == op.ID && sentOnce:
		case k.known:
			end = max(end, k.returned+c.TTL)
		default:
			end = max(end, c.arrivedBy(k.sent)+c.TTL)
		}
	}
	for _, r := range c.releases {
		if r.sent <= op.End {
			end = max(end, c.arrivedBy(r.sent)+c.TTL)
		}
	}
	for _, r := range c.runs {
		end = max(end, c.storedUntil(r))
		if len(r.completes) == 0 && r.final() { // its process may have died in the middle of it
			end = max(end, c.arrivedBy(r.end.At)+c.TTL)
		}
	}
	return end
}
