package idempotency

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// allFacts returns every combination of facts, with a status for each class.
func allFacts() (all []facts) {
	for bits := range 1 << 7 {
		has := func(i int) bool { return bits>>i&1 == 1 }
		for _, status := range []int{200, 399, 400, 500} {
			f := facts{
				atMostOnce: has(0), committed: has(1), discarded: has(2), attached: has(3),
				unanswered: has(4), cutOff: has(5), final: has(6), status: status,
			}
			if f.atMostOnce && f.cutOff || f.unanswered && f.final {
				continue // gather does not make these
			}
			all = append(all, f)
		}
	}
	return all
}

// verdictRows is the table of verdicts as it is documented: the first row that
// matches. An entry is "yes", "no", or "" for either.
var verdictRows = []struct {
	committed, unanswered, attached, discarded, cutOff, status, final string

	want verdict
}{
	{committed: "yes", unanswered: "yes", want: retryLearnsNothing},
	{committed: "yes", want: retryReplays},
	{unanswered: "yes", attached: "yes", want: retryRuns},
	{discarded: "yes", want: retryRuns},
	{unanswered: "yes", cutOff: "yes", want: retryRuns},
	{cutOff: "yes", status: "400 or more", want: retryRuns},
	{unanswered: "yes", want: retryLearnsNothing},
	{final: "no", want: retryRuns},
	{cutOff: "yes", want: retryLearnsStatus},
	{want: retryReplays},
}

func TestVerdict(t *testing.T) {
	matches := func(entry string, fact bool) bool { return entry == "" || (entry != "no") == fact }
	used := make(map[int]bool)
	for _, f := range allFacts() {
		for i, row := range verdictRows {
			if matches(row.committed, f.committed) && matches(row.unanswered, f.unanswered) &&
				matches(row.attached, f.attached && !f.atMostOnce) && matches(row.discarded, f.discarded) &&
				matches(row.cutOff, f.cutOff) && matches(row.status, f.status >= 400) && matches(row.final, f.final) {
				require.Equal(t, row.want, f.verdict(), "row %d: %+v", i, f)
				used[i] = true
				break
			}
		}
	}
	require.Len(t, used, len(verdictRows), "a row that no facts reach")
}

// Whatever the options, Commit and AtMostOnce are never undone by a run that
// may have had its effect.
func TestVerdictOfAtMostOnce(t *testing.T) {
	for _, f := range allFacts() {
		if f.verdict() == retryRuns {
			require.False(t, f.committed, "%+v", f)
			require.True(t, !f.atMostOnce || f.discarded || !f.final && !f.unanswered, "%+v", f)
		}
	}
}

// answerRows is the table of answers as it is documented: the first row that
// matches.
var answerRows = []struct {
	name  string
	match func(v verdict, f facts, r storeReport) bool
	want  Outcome
	says  error // nil: the handler's response
	later bool  // storing goes on
}{
	{"runs; another owner was seen, or the lease is over",
		func(v verdict, f facts, r storeReport) bool { return v == retryRuns && (r.lost || r.over) },
		OutcomeLeaseLost, ErrInProgress, false},
	{"runs; left unanswered, the body cut off",
		func(v verdict, f facts, r storeReport) bool { return v == retryRuns && f.unanswered && f.cutOff },
		OutcomeReleased, ErrBodyIncomplete, false},
	{"runs; left unanswered",
		func(v verdict, f facts, r storeReport) bool { return v == retryRuns && f.unanswered },
		OutcomeReleased, ErrStoreUnavailable, false},
	{"runs", func(v verdict, f facts, r storeReport) bool { return v == retryRuns }, OutcomeReleased, nil, false},
	{"stored; left unanswered",
		func(v verdict, f facts, r storeReport) bool { return r.err == nil && f.unanswered },
		OutcomeOutcomeUnknown, ErrOutcomeUnknown, false},
	{"stored", func(v verdict, f facts, r storeReport) bool { return r.err == nil }, OutcomeExecuted, nil, false},
	{"the lease is lost",
		func(v verdict, f facts, r storeReport) bool { return errors.Is(r.err, ErrLeaseLost) },
		OutcomeLeaseLost, ErrInProgress, false},
	{"another owner was seen, and rolled back or not committed",
		func(v verdict, f facts, r storeReport) bool {
			return r.lost && (errors.Is(r.err, ErrRolledBack) || !f.committed)
		}, OutcomeLeaseLost, ErrInProgress, false},
	{"rolled back",
		func(v verdict, f facts, r storeReport) bool { return errors.Is(r.err, ErrRolledBack) },
		OutcomeStoreUnavailable, ErrStoreUnavailable, false},
	{"failed, attached",
		func(v verdict, f facts, r storeReport) bool { return f.attached },
		OutcomeStoreUnavailable, ErrStoreUnavailable, false},
	{"failed; left unanswered",
		func(v verdict, f facts, r storeReport) bool { return f.unanswered },
		OutcomeOutcomeUnknown, ErrOutcomeUnknown, true},
	{"failed", func(v verdict, f facts, r storeReport) bool { return true }, OutcomeExecuted, nil, true},
}

func TestAnswer(t *testing.T) {
	used := make(map[string]bool)
	for _, f := range allFacts() {
		v := f.verdict()
		if f.unanswered && v != retryRuns {
			f.attached = false // settle detaches it
		}
		for _, err := range []error{nil, ErrLeaseLost, fmt.Errorf("commit: %w", ErrRolledBack), errors.New("down")} {
			for _, r := range []storeReport{{err: err}, {err: err, lost: true}, {err: err, over: true}} {
				s := settlement{middleware: new(middleware), facts: f}
				checkAnswer(t, s.answer(v, r), v, f, r, used)
			}
		}
	}
	require.Len(t, used, len(answerRows), "a row that nothing reaches")
}

func checkAnswer(t *testing.T, a answer, v verdict, f facts, r storeReport, used map[string]bool) {
	for _, row := range answerRows {
		if !row.match(v, f, r) {
			continue
		}
		used[row.name] = true
		require.Equal(t, row.want, a.outcome, "%s: %+v %+v", row.name, f, r)
		require.Equal(t, row.later, a.storing, "%s: %+v %+v", row.name, f, r)
		if row.says == nil {
			require.Nil(t, a.problem, "%s: %+v %+v", row.name, f, r)
		} else {
			require.ErrorIs(t, a.problem, row.says, "%s: %+v %+v", row.name, f, r)
			checkDetail(t, a.problem, v, f, r)
		}
		return
	}
}

// checkDetail checks what a 503 says of the transaction: a client must not be
// told that nothing was done when that is not known.
func checkDetail(t *testing.T, p *Error, v verdict, f facts, r storeReport) {
	if p.Status != http.StatusServiceUnavailable {
		return
	}
	undone := r.err == nil
	if v != retryRuns {
		undone = errors.Is(r.err, ErrRolledBack) && !f.committed
	}
	require.Equal(t, !undone, p.Detail == unknownDetail, "%+v %+v: %s", f, r, p.Detail)
}
