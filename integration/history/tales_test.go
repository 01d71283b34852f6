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
	t := &tale{h: History{Lease: lease}, kind: kind}
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
	t.row(announced, RowClaim, visit, func(r *Row) { r.Call = number })
	t.row(at, kind, visit, func(r *Row) {
		r.Call, r.Sent, r.Returned = number, announced*ms, at*ms
		change(r)
	})
}

// runs is a run and its request, which has no answer unless told otherwise.
// A run is named like its request.
func runs(run string, attempt int, at time.Duration) func(*tale) {
	return runsWith("payload", run, attempt, at)
}

func runsWith(payload, run string, attempt int, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.op(run, at-1, at+1000, func(op *Op) { op.Err, op.Payload = "broken", payload })
		t.claim(run, at-1, RowClaimed, at, func(r *Row) { r.State = StateAcquired })
		t.row(at+1, RowBegin, run, func(r *Row) {
			r.Run, r.Attempt, r.Payload, r.Sent, r.Returned = run, attempt, payload, (at-1)*ms, at*ms
		})
		t.row(at+2, RowEffect, run, nil)
	}
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
		t.row(at, RowCommit, run, nil)
		t.claim(run, at-1, RowRenew, at, func(r *Row) { r.Once = true })
	}
}

func renews(run string, at time.Duration) func(*tale) { return renewsSlowly(run, at-1, at) }

func renewsSlowly(run string, from, to time.Duration) func(*tale) {
	return func(t *tale) { t.claim(run, from, RowRenew, to, func(*Row) {}) }
}

// claims is a claim that does not come to a run. It was made, it was refused,
// or nobody knows.
func asksStore(visit string, at time.Duration, state, err string) func(*tale) {
	return func(t *tale) { t.claim(visit, at-1, RowClaimed, at, func(r *Row) { r.State, r.Err = state, err }) }
}

// asked is a claim whose process did not live to tell of it.
func asked(visit string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowClaim, visit, func(r *Row) { r.Call = len(t.h.Rows) + 1 }) }
}

func releases(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowRelease, run, nil) }
}

func completes(run string, at time.Duration, err string) func(*tale) {
	return func(t *tale) {
		t.row(at, RowComplete, run, func(r *Row) { r.Sent, r.Returned, r.Err = (at-1)*ms, at*ms, err })
	}
}

// killed is when the process of all runs was killed.
func killed(at time.Duration, h History) History {
	h.Killed = map[string]time.Duration{"": at * ms}
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
