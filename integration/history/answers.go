package history

import "time"

// checkAnswers judges what clients saw.
func (c *checker) checkAnswers() {
	for _, r := range c.runs {
		if stored := c.storedRun(r.life); r.stored && r != stored {
			c.violate(Answers, "those of %s and %s are both stored", stored.Run, r.Run)
		}
		if r.stored && !r.final() {
			c.violate(Freed, "the answer of %s, which is not final, was replayed", r.Run)
		}
	}
	for _, op := range c.ops {
		switch {
		case op.Err != "":
			c.checkNoAnswer(op)
		case op.Code != "":
			c.checkCode(op)
		default:
			c.checkAnswer(op)
		}
		if life := c.lifeOf(op); life != noLife && op.Err == "" {
			if stored := c.storedRun(life); stored != nil && op.Start >= stored.storedBy {
				c.checkLater(op, stored)
			}
		}
	}
	c.countUnkept()
}

// checkNoAnswer judges a request without a whole answer. A process that has
// taken a request answers it, even one that another process is about to replace.
func (c *checker) checkNoAnswer(op Op) {
	if op.HungUp || c.kind == Broken || len(c.arrivals[op.ID]) == 0 {
		return
	}
	for _, visit := range c.arrivals[op.ID] {
		process := c.processes[visit]
		if killed, ok := c.Killed[process]; ok && killed <= op.End {
			return
		}
		if r := c.visits[visit]; r != nil && r.end != nil && r.end.Panic {
			return
		}
	}
	c.violate(Dropped, "request %s has no answer: %s", op.ID, op.Err)
}

// checkAnswer judges an answer of a handler.
func (c *checker) checkAnswer(op Op) {
	c.report.Answers++
	if op.Replayed {
		c.report.Replays++
	}
	r := c.byID[op.Run]
	switch {
	case r == nil:
		c.violate(Phantom, "request %s got an answer of %q, which did not run under this key", op.ID, op.Run)
	case r.Payload != op.Payload:
		c.violate(Payload, "request %s with payload %q got the answer of %s, to payload %q", op.ID, op.Payload, r.Run, r.Payload)
	case r.end == nil || r.end.Panic:
		c.violate(Phantom, "request %s got an answer of %s, which gave none", op.ID, op.Run)
	case r.end.Status != op.Status || r.end.Hash != op.Hash:
		c.violate(Phantom, "request %s got %d %s, and %s had answered %d %s", op.ID, op.Status, op.Hash, r.Run, r.end.Status, r.end.Hash)
	case op.End < r.end.At:
		c.violate(Phantom, "request %s got the answer of %s, which had not ended", op.ID, op.Run)
	case op.Replayed && r.Unprotected:
		c.violate(Exposed, "request %s got the answer of %s, which had no claim, as a replay", op.ID, r.Run)
	case op.Replayed && r.isOfPart():
		c.violate(Part, "request %s got the answer of %s, whose body had broken off", op.ID, r.Run)
	case op.Replayed:
	case r.Op != op.ID:
		c.violate(Phantom, "request %s got the answer of %s, which is not marked as a replay", op.ID, r.Run)
	case r.Unprotected:
	case r.final() && !keptOrFailed(r, op.End):
		c.violate(Unstored, "request %s got the answer of %s, which the store was not given, or has refused", op.ID, r.Run)
	}
}

// keptOrFailed reports whether the answer of r was stored before until, or the
// store failed: then the answer goes out, and may be lost if the store does not
// take it until the lease ends. An answer with an attachment never goes out then.
func keptOrFailed(r *run, until time.Duration) bool {
	for _, row := range r.completes {
		failed := row.Err != "" && r.attached()
		if row.Err != ErrLeaseLost && !failed && row.Returned <= until {
			return true
		}
	}
	return false
}

// countUnkept counts the runs that the promise names: their answers went out
// and were never stored.
func (c *checker) countUnkept() {
	for i, r := range c.runs {
		if r.stored || !r.final() {
			continue
		}
		for _, op := range c.ops {
			if op.Run == r.Run && op.Err == "" {
				c.report.Unkept++
				if i+1 < len(c.runs) && c.runs[i+1].life == r.life {
					c.report.UnkeptRuns++
				}
				break
			}
		}
	}
}

// checkCode judges an answer of the middleware's own.
func (c *checker) checkCode(op Op) {
	switch op.Code {
	case notStored:
		c.report.NotStored++
		if !c.mayBeSmall(op.End) {
			c.violate(Code, "request %s got %s, and no small record took the place of an answer, nor did a body break off", op.ID, op.Code)
		}
	case "in_progress", "store_unavailable":
	case "key_reused":
		for _, other := range c.ops {
			if other.Payload != op.Payload && other.Start <= op.End {
				return
			}
		}
		c.violate(Code, "request %s got %s, but there is no other payload", op.ID, op.Code)
	case "outcome_unknown":
		if !c.mayBeUnknown(op) {
			c.violate(Code, "request %s got %s, but there was no marked claim whose lease can have been over", op.ID, op.Code)
		}
	default:
		c.violate(Code, "request %s got %d %s", op.ID, op.Status, op.Code)
	}
}

// notStored is the code of a retry of what the store refused.
const notStored = "response_not_stored"

// mayBeSmall reports whether a small record can have been stored until then.
func (c *checker) mayBeSmall(until time.Duration) bool {
	for _, r := range c.runs {
		if len(r.smalls) > 0 && r.smalls[0].At <= until || r.isOfPart() && r.end.At <= until {
			return true
		}
	}
	return false
}

// shrunkRun returns the last run until then that was to have a small record, or
// whose answer is to a part of a body. When there are several, those before it
// were overtaken, and have none.
func (c *checker) shrunkRun(until time.Duration) (shrunk *run) {
	for _, r := range c.runs {
		if r.Sent > until {
			continue
		}
		if len(r.smalls) > 0 || r.isOfPart() {
			shrunk = r
		}
	}
	return shrunk
}

// checkLater judges a request that was sent after an answer was stored.
func (c *checker) checkLater(op Op, stored *run) {
	switch r := c.byID[op.Run]; {
	case op.Code == "store_unavailable", r != nil && r.Unprotected:
	case op.Payload != stored.Payload:
		if op.Code != "key_reused" {
			c.violate(Payload, "request %s with payload %q got %d %s, and %q is stored", op.ID, op.Payload, op.Status, op.Code, stored.Payload)
		}
	case op.Code == notStored && (len(stored.smalls) > 0 || stored.isOfPart()):
	case op.Run != stored.Run || !op.Replayed:
		c.violate(Forgotten, "request %s got %d %s%s, and the answer of %s was stored", op.ID, op.Status, op.Code, op.Run, stored.Run)
	}
}

// checkSweep wants a lasting answer from every process when all is over.
func (c *checker) checkSweep() {
	settled, asked := make(map[string]bool), make(map[string]bool)
	for _, op := range c.ops {
		if !op.Sweep {
			continue
		}
		asked[op.Replica] = true
		// Where the TTL is short, the next request may find another life.
		r := c.byID[op.Run]
		if op.Lasting(c.NoneDied) || op.Err == "" && r != nil && r.stored {
			settled[op.Replica] = true
		}
	}
	for replica := range asked {
		if !settled[replica] {
			c.violate(Stuck, "%s has no lasting answer", replica)
		}
	}
}

// Lasting reports whether asking again is pointless.
func (o Op) Lasting(noneDied bool) bool {
	return o.Err == "" && (o.Replayed || o.Code == "key_reused" || o.Code == notStored || o.Code == "outcome_unknown" && !noneDied)
}
