package history

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

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

// runs is a run and its request, which has no answer unless told otherwise.
// A run is named like its request.
func runs(run string, attempt int, at time.Duration) func(*tale) {
	return runsWith("payload", run, attempt, at)
}

func runsWith(payload, run string, attempt int, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.op(run, at-1, at+1000, func(op *Op) { op.Err, op.Payload = "broken", payload })
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

func panics(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowEnd, run, func(r *Row) { r.Panic = true }) }
}

func commits(run string, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.row(at, RowCommit, run, nil)
		t.row(at, RowRenew, run, func(r *Row) { r.Sent, r.Returned, r.Once = (at-1)*ms, at*ms, true })
	}
}

func renews(run string, at time.Duration) func(*tale) {
	return func(t *tale) {
		t.row(at, RowRenew, run, func(r *Row) { r.Sent, r.Returned = (at-1)*ms, at*ms })
	}
}

func releases(run string, at time.Duration) func(*tale) {
	return func(t *tale) { t.row(at, RowRelease, run, nil) }
}

func completes(run string, at time.Duration, err string) func(*tale) {
	return func(t *tale) {
		t.row(at, RowComplete, run, func(r *Row) { r.Sent, r.Returned, r.Err = (at-1)*ms, at*ms, err })
	}
}

func dead(h History) History {
	h.Dead = []string{""}
	return h
}

func noneDied(h History) History {
	h.NoneDied = true
	return h
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

func refuses(code string) func(*Op) {
	return func(op *Op) { op.Status, op.Code = 409, code }
}

func other(change func(*Op)) func(*Op) {
	return func(op *Op) { op.Payload = "another"; change(op) }
}

// Each legal tale is one of the exceptions that the promise names, or of the
// things that only look like one.
func TestLegalHistories(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	tales := map[string]History{
		"first, replay": told(Plain, append(whole, asks("b", 40, replay("a", 201)))...),
		"another payload is refused": told(Plain, append(whole, asks("b", 12, other(refuses("key_reused"))),
			asks("c", 40, other(refuses("key_reused"))))...),
		"duplicates are told to come again": told(Plain, append(whole, asks("b", 12, refuses("in_progress")))...),
		"the process died, and the lease ended": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 201),
			completes("b", 125, ""), first("b", 130, 201)),
		"a handler panicked": told(Plain, runs("a", 1, 10), panics("a", 15), runs("b", 2, 110)),
		"a run freed the key": told(Plain, runs("a", 1, 10), ends("a", 20, 500), releases("a", 21), first("a", 25, 500),
			runs("b", 2, 30), ends("b", 40, 201), completes("b", 41, ""), first("b", 42, 201)),
		"and another payload took it": told(Plain, runs("a", 1, 10), ends("a", 20, 500), releases("a", 21),
			runsWith("another", "b", 2, 30)),
		"an at-most-once run that did nothing": told(Once, runs("a", 1, 10), func(t *tale) {
			t.h.Rows = t.h.Rows[:len(t.h.Rows)-1] // no effect
		}, ends("a", 20, 401), releases("a", 21), runs("b", 2, 30)),
		"an at-most-once run died": told(Once, runs("a", 1, 10), asks("b", 200, refuses("outcome_unknown"))),
		"and came back":            told(Once, append(whole, asks("b", 12, refuses("outcome_unknown")))...),
		"a committed run died":     told(Plain, runs("a", 1, 10), commits("a", 13), asks("b", 200, refuses("outcome_unknown"))),
		"the store could not take an answer until the lease ended": told(Plain, runs("a", 1, 10), ends("a", 20, 201),
			completes("a", 25, "down"), first("a", 30, 201), completes("a", 100, "down"), runs("b", 2, 115),
			ends("b", 120, 201), completes("b", 121, ""), first("b", 122, 201), asks("c", 130, replay("b", 201))),
		"or died before the lease ended": dead(told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"),
			first("a", 30, 201), runs("b", 2, 115))),
		"a stale owner is refused": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 201), completes("b", 121, ""),
			first("b", 122, 201), ends("a", 130, 201), completes("a", 131, ErrLeaseLost), asks("c", 140, replay("b", 201))),
		"the key came back to its first owner": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 500),
			releases("b", 121), ends("a", 240, 201), completes("a", 241, ""), asks("c", 250, replay("a", 201))),
		"a claim that came to nothing was given back": told(Plain, runs("a", 1, 10), releases("x", 115), runs("b", 1, 130)),
		"a process died before it could tell of its store": told(Plain, runs("a", 1, 10), ends("a", 20, 201),
			asks("b", 30, replay("a", 201))),
	}
	for name, h := range tales {
		t.Run(name, func(t *testing.T) {
			require.Empty(t, Check(h).Violations, "\n%s", h.Lines("key"))
		})
	}
}

// Each broken tale is a legal one in which one thing is wrong.
func TestBrokenHistories(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	with := func(more ...func(*tale)) []func(*tale) { return append(whole[:len(whole):len(whole)], more...) }
	rows := map[string]struct {
		h    History
		want []string
	}{
		"let in while the lease runs":    {told(Plain, runs("a", 1, 10), runs("b", 2, 90)), []string{Overlap}},
		"let in after a renewal":         {told(Plain, runs("a", 1, 10), renews("a", 50), runs("b", 2, 120)), []string{Overlap}},
		"let in at the same time":        {told(Plain, runs("a", 1, 10), runs("b", 1, 10)), []string{Overlap}},
		"let in after a panic":           {told(Plain, runs("a", 1, 10), panics("a", 12), runs("b", 2, 20)), []string{Overlap}},
		"ran after it was stored":        {told(Plain, with(runs("b", 2, 200))...), []string{Register, RanAgain}},
		"ran after Commit":               {told(Plain, runs("a", 1, 10), commits("a", 13), runs("b", 2, 200)), []string{RanAgain}},
		"ran after Commit on its path":   {told(Commit, runs("a", 1, 10), commits("a", 13), runs("b", 2, 200)), []string{RanAgain, Twice}},
		"at-most-once let in twice":      {told(Once, runs("a", 1, 10), runs("b", 2, 200)), []string{Twice}},
		"a stale owner stores":           {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("a", 120, 201), completes("a", 121, "")), []string{Stale}},
		"a panic frees the key":          {told(Plain, runs("a", 1, 10), panics("a", 12), releases("a", 13), runs("b", 2, 20)), []string{Freed}},
		"a final answer frees the key":   {told(Plain, runs("a", 1, 10), ends("a", 12, 201), releases("a", 13)), []string{Freed}},
		"an answer is kept that is not":  {told(Plain, runs("a", 1, 10), ends("a", 12, 500), completes("a", 13, "")), []string{Freed}},
		"sent before it was stored":      {told(Plain, runs("a", 1, 10), ends("a", 20, 201), first("a", 30, 201), completes("a", 40, "")), []string{Unstored}},
		"sent though it was refused":     {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ErrLeaseLost), first("a", 30, 201)), []string{Unstored}},
		"an answer of nobody":            {told(Plain, with(asks("b", 40, replay("x", 201)))...), []string{Forgotten, Register, Phantom}},
		"another body":                   {told(Plain, with(asks("b", 40, func(op *Op) { replay("a", 201)(op); op.Hash = "x" }))...), []string{Phantom}},
		"another status":                 {told(Plain, with(asks("b", 40, replay("a", 200)))...), []string{Phantom}},
		"not marked as a replay":         {told(Plain, with(asks("b", 22, func(op *Op) { replay("a", 201)(op); op.Replayed = false }))...), []string{Phantom}},
		"a payload that was not sent":    {told(Plain, runs("a", 1, 10), func(t *tale) { t.h.Ops[0].Payload = "x" }), []string{Payload}},
		"another payload runs":           {told(Plain, runs("a", 1, 10), runsWith("another", "b", 2, 200)), []string{Payload}},
		"another payload is answered":    {told(Plain, with(asks("b", 40, other(replay("a", 201))))...), []string{Payload}},
		"another payload is not refused": {told(Plain, with(asks("b", 40, other(refuses("in_progress"))))...), []string{Register, Payload}},
		"attempts repeat":                {told(Plain, runs("a", 2, 10), runs("b", 2, 200)), []string{Attempt}},
		"a stored answer is forgotten":   {told(Plain, with(asks("b", 40, refuses("in_progress")))...), []string{Forgotten, Register}},
		"a payload that was not":         {told(Plain, with(asks("b", 40, refuses("key_reused")))...), []string{Forgotten, Code}},
		"unknown for no reason":          {told(Plain, runs("a", 1, 10), asks("b", 200, refuses("outcome_unknown"))), []string{Code}},
		"an unreadable record":           {told(Plain, runs("a", 1, 10), asks("b", 12, refuses("record_unreadable"))), []string{Code}},
		"never an answer":                {told(Plain, runs("a", 1, 10), asks("b", 200, func(op *Op) { refuses("in_progress")(op); op.Sweep = true })), []string{Stuck}},
		"unknown, though none died":      {noneDied(told(Once, runs("a", 1, 10), asks("b", 200, func(op *Op) { refuses("outcome_unknown")(op); op.Sweep = true }))), []string{Stuck}},
		"answers of two runs": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), runs("b", 2, 115), ends("b", 120, 201),
			asks("c", 130, replay("b", 201)), asks("d", 130, replay("a", 201))), []string{Register, Stale, Answers}},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			report := Check(row.h)
			require.ElementsMatch(t, row.want, report.Kinds(), "%v\n%s", report.Violations, row.h.Lines("key"))
		})
	}
}

// The model finds by itself that an answer changes, whatever the other rules
// say: the register goes back.
func TestRegister(t *testing.T) {
	h := told(Plain, runs("a", 1, 10), ends("a", 20, 201), runs("b", 2, 115), ends("b", 120, 201),
		asks("c", 130, replay("a", 201)), asks("d", 140, replay("b", 201)), asks("e", 150, replay("a", 201)))
	for _, c := range split(h) {
		c.report = new(Report)
		c.checkRegister()
		require.Equal(t, []string{Register}, c.report.Kinds())
	}
}
