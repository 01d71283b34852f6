package history

import "time"

const (
	ms    = time.Millisecond
	lease = 100 * ms
)

// A tale is a history of one key that is told line by line. Times are in
// milliseconds.
type tale struct {
	h    History
	kind string
}

func told(kind string, lines ...func(*tale)) History {
	t := &tale{h: History{Lease: lease, TTL: 10 * lease, MaxExecution: 5 * lease}, kind: kind}
	for _, line := range lines {
		line(t)
	}
	return t.h
}

func (t *tale) row(at time.Duration, kind, run string, change func(*Row)) {
	row := Row{Seq: len(t.h.Rows), At: at * ms, Type: kind, Key: "key", Kind: t.kind, Op: run, Visit: "visit-" + run}
	if change != nil {
		change(&row)
	}
	t.h.Rows = append(t.h.Rows, row)
}

func (t *tale) op(id string, from, to time.Duration, change func(*Op)) {
	op := Op{ID: id, Key: "key", Kind: t.kind, Payload: "payload", Replica: "replica", Start: from * ms, End: to * ms}
	change(&op)
	t.h.Ops = append(t.h.Ops, op)
}

// claim is a call of the store, which answers at at. It was sent one
// millisecond after the row that announces it.
func (t *tale) claim(visit string, announced time.Duration, kind string, at time.Duration, change func(*Row)) {
	number := len(t.h.Rows) + 1
	answer := Row{Attempt: 1}
	change(&answer)
	t.row(announced, RowClaim, visit, func(r *Row) { r.Call, r.Asked, r.Once = number, answer.Asked, answer.Once })
	t.row(at, kind, visit, func(r *Row) {
		r.Call, r.Sent, r.Returned, r.Attempt = number, announced*ms, at*ms, 1
		change(r)
	})
}

// attemptOf returns the attempt that the claim of a visit was.
func (t *tale) attemptOf(visit string) (attempt int) {
	for _, row := range t.h.Rows {
		if row.Visit == "visit-"+visit && row.Type == RowClaimed {
			attempt = row.Attempt
		}
	}
	return attempt
}

// runs is a run and its request, which has no answer unless told otherwise.
// A run is named like its request. That of an at-most-once key is marked.
func runs(run string, attempt int, at time.Duration) func(*tale) {
	return runsWith("payload", run, attempt, at)
}

func runsWith(payload, run string, attempt int, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.op(run, at-1, at+1000, func(op *Op) { op.Err, op.HungUp, op.Payload = "broken", true, payload })
		t.claim(run, at-1, RowClaimed, at, func(r *Row) { r.State, r.Attempt = StateAcquired, attempt })
		if t.kind == Once {
			marks(run, at, at+1)(t)
		}
		t.row(at+1, RowBegin, run, func(r *Row) {
			r.Run, r.Attempt, r.Payload, r.Sent, r.Returned = run, attempt, payload, (at-1)*ms, at*ms
		})
		t.row(at+2, RowEffect, run, nil)
	}
}

// exposes is a run without a claim, of a request whose claim was not answered.
func exposes(run string, at time.Duration) func(*tale) {
	return func(t *tale) {
		asksStore(run, at, "", "down")(t)
		exposesAnyhow(run, at)(t)
	}
}

// exposesAnyhow is the same, whatever the store has said.
func exposesAnyhow(run string, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.op(run, at-1, at+1000, func(op *Op) { op.Err, op.HungUp = "broken", true })
		t.row(at+1, RowBegin, run, func(r *Row) { r.Run, r.Attempt, r.Payload, r.Unprotected = run, 1, "payload", true })
		t.row(at+2, RowEffect, run, nil)
	}
}

// breaksOff ends a run whose body has broken off.
func breaksOff(run string, at time.Duration, status int) func(*tale) {
	return endsWith(run, at, func(r *Row) { r.Status, r.Cut = status, true })
}

func ends(run string, at time.Duration, status int) func(*tale) {
	return func(t *tale) {
		t.row(at, RowEnd, run, func(r *Row) { r.Status, r.Hash = status, "hash-"+run })
	}
}

// endsWith ends a run with a final answer, unless change makes it another.
func endsWith(run string, at time.Duration, change func(*Row)) func(*tale) {
	return func(t *tale) {
		t.row(at, RowEnd, run, func(r *Row) {
			r.Status, r.Hash = 201, "hash-"+run
			change(r)
		})
	}
}

func panics(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowEnd, run, func(r *Row) { r.Panic = true }) }
}

func commits(run string, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.row(at-1, RowCommit, run, nil)
		marks(run, at-1, at)(t)
		t.row(at, RowCommits, run, nil)
	}
}

// marks is a renewal that marks the claim.
func marks(visit string, from, to time.Duration) func(*tale) {
	return func(t *tale) {
		t.claim(visit, from, RowRenew, to, func(r *Row) {
			r.Attempt, r.Asked, r.Once = t.attemptOf(visit), t.attemptOf(visit), true
		})
	}
}

// marksInVain is a mark to which there is no answer, or a refusal.
func marksInVain(visit string, from, to time.Duration, state string) func(*tale) {
	return func(t *tale) {
		t.claim(visit, from, RowClaimed, to, func(r *Row) {
			r.Asked, r.Once, r.State = t.attemptOf(visit), true, state
			if state == "" {
				r.Err = "down"
			}
		})
	}
}

// marksAndDies is a mark whose process did not live to tell more.
func marksAndDies(visit string, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.row(at, RowClaim, visit, func(r *Row) { r.Call, r.Asked, r.Once = len(t.h.Rows)+1, t.attemptOf(visit), true })
	}
}

func renews(run string, at time.Duration) func(*tale) { return renewsSlowly(run, at-1, at) }

func renewsSlowly(run string, from, to time.Duration) func(*tale) {
	return func(t *tale) {
		t.claim(run, from, RowRenew, to, func(r *Row) { r.Attempt, r.Asked = t.attemptOf(run), t.attemptOf(run) })
	}
}

// asksStore is a claim that does not come to a run. It was made, as the second
// attempt, it was refused, or nobody knows.
func asksStore(visit string, at time.Duration, state, err string) func(*tale) {
	return asksStoreAs(visit, 2, at, state, err)
}

func asksStoreAs(visit string, attempt int, at time.Duration, state, err string) func(*tale) {
	return func(t *tale) {
		t.claim(visit, at-1, RowClaimed, at, func(r *Row) { r.State, r.Err, r.Attempt = state, err, attempt })
	}
}

// asked is a claim whose process did not live to tell of it.
func asked(visit string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowClaim, visit, func(r *Row) { r.Call = len(t.h.Rows) + 1 }) }
}

// releases leaves a marker for as long as is due. The store answers.
func releases(run string, at time.Duration) func(*tale) {
	return func(t *tale) { releasesFor(run, at, t.due(run), "")(t) }
}

// triesToRelease is a Release to which there is no answer.
func triesToRelease(run string, at time.Duration) func(*tale) {
	return func(t *tale) { releasesFor(run, at, t.due(run), "down")(t) }
}

func releasesFor(run string, at, keep time.Duration, err string) func(*tale) {
	return func(t *tale) {
		number := len(t.h.Rows) + 1
		t.row(at, RowRelease, run, func(r *Row) { r.Call, r.Keep = number, keep })
		t.row(at+1, RowReleased, run, func(r *Row) { r.Call, r.Sent, r.Returned, r.Err = number, at*ms, (at+1)*ms, err })
	}
}

func (t *tale) due(run string) time.Duration {
	for _, row := range t.h.Rows {
		isMark := row.Type == RowClaim && row.Asked > 0 && row.Once
		gotSomewhere := row.Type == RowEnd && (row.Status >= 500 || row.Cut) && !row.Discard
		if row.Visit == "visit-"+run && (isMark || gotSomewhere) {
			return t.h.TTL
		}
	}
	return t.h.Lease
}

func completes(run string, at time.Duration, err string) func(*tale) {
	return func(t *tale) {
		t.row(at, RowComplete, run, func(r *Row) { r.Sent, r.Returned, r.Err = (at-1)*ms, at*ms, err })
	}
}

// completesSmall asks the store to keep a small record in the place of the answer.
func completesSmall(run string, at time.Duration, err string) func(*tale) {
	return func(t *tale) {
		triesSmall(run, at-1)(t)
		completes(run, at, err)(t)
	}
}

// triesSmall is the same, by a process that does not live to tell of it.
func triesSmall(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowSmall, run, nil) }
}

// attaches ends a run whose answer is to be stored with what is attached.
func attaches(run string, at time.Duration) func(*tale) {
	return endsWith(run, at, func(r *Row) { r.Attached = true })
}

// rollsBack is a Complete that has rolled back what was attached.
func rollsBack(run string, at time.Duration, err string) func(*tale) {
	return func(t *tale) {
		completes(run, at, err)(t)
		t.h.Rows[len(t.h.Rows)-1].RolledBack = true
	}
}

// keeps is a row of the run in the database.
func keeps(run string) func(*tale) {
	return func(t *tale) {
		t.row(5000, RowKept, "", func(r *Row) { r.Visit, r.Run = "", run })
	}
}

// expects has the client of a request wait for its answer.
func expects(id string) func(*tale) {
	return func(t *tale) {
		for i := range t.h.Ops {
			if t.h.Ops[i].ID == id {
				t.h.Ops[i].HungUp = false
			}
		}
	}
}

// killed is when the process of all runs was killed.
func killed(at time.Duration, h History) History {
	h.Killed = map[string]time.Duration{"": at * ms}
	return h
}

// stopped is when the process of all visits was stopped for a while.
func stopped(from, to time.Duration, h History) History {
	h.Stopped = map[string][]Span{"": {{From: from * ms, To: to * ms}}}
	return h
}

func noneDied(h History) History {
	h.NoneDied = true
	return h
}

// withoutEffect takes the effect of the run back that was told last.
func withoutEffect(t *tale) {
	for i := len(t.h.Rows) - 1; t.h.Rows[i].Type != RowBegin; i-- {
		if t.h.Rows[i].Type == RowEffect {
			t.h.Rows = append(t.h.Rows[:i], t.h.Rows[i+1:]...)
		}
	}
}

func effects(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowEffect, run, nil) }
}

// first is the answer to the request of the run.
func first(run string, at time.Duration, status int) func(*tale) {
	return func(t *tale) {
		for i := range t.h.Ops {
			if op := &t.h.Ops[i]; op.ID == run {
				op.Err, op.End, op.Status, op.Run, op.Hash = "", at*ms, status, run, "hash-"+run
			}
		}
	}
}

// asks is another request, from at on.
func asks(id string, at time.Duration, change func(*Op)) func(*tale) {
	return func(t *tale) { t.op(id, at, at+2, change) }
}

func replay(run string, status int) func(*Op) {
	return func(op *Op) { op.Status, op.Run, op.Hash, op.Replayed = status, run, "hash-"+run, true }
}

func sweeps(replica string, change func(*Op)) func(*Op) {
	return func(op *Op) { op.Sweep, op.Replica = true, replica; change(op) }
}

func refuses(code string) func(*Op) {
	return func(op *Op) { op.Status, op.Code = 409, code }
}

func other(change func(*Op)) func(*Op) {
	return func(op *Op) { op.Payload = "another"; change(op) }
}
