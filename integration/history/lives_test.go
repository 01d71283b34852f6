package history

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// A key is new when the TTL of its record is over. In these tales that is after
// a second.
func TestLegalLives(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	with := func(more ...func(*tale)) []func(*tale) { return append(whole[:len(whole):len(whole)], more...) }
	again := []func(*tale){ends("b", 1050, 201), completes("b", 1055, ""), first("b", 1060, 201), asks("c", 1070, replay("b", 201))}
	for name, row := range map[string]struct {
		h     History
		lives int
	}{
		"the key is new":          {told(Plain, append(with(runs("b", 1, 1030)), again...)...), 2},
		"for another payload too": {told(Plain, append(with(runsWith("another", "b", 1, 1030)), again[:2]...)...), 2},
		"at-most-once, once a life": {told(Once, append(with(runs("b", 1, 1030), asks("d", 1034, refuses("in_progress"))),
			again...)...), 2},
		"and after a process that died": {told(Once, runs("a", 1, 10), asks("x", 200, refuses("outcome_unknown")), runs("b", 1, 1020)), 2},
		"a claim to which there was no answer was the first": {told(Plain, with(asked("x", 1030), asks("y", 1040, refuses("in_progress")),
			runs("b", 2, 1140))...), 2},
		"the record is there to the end": {told(Plain, with(asks("b", 1020, replay("a", 201)))...), 1},
		"or is not, when a request was on its way": {told(Plain, with(runs("b", 1, 1022), asks("c", 1021, refuses("in_progress")),
			asks("d", 1021, other(refuses("key_reused"))))...), 2},
		"the answer is stored anew": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"),
			asks("b", 30, replay("a", 201)), completes("a", 1200, ""), asks("c", 2100, replay("a", 201))), 2},
		"renewals keep the claim": {told(Plain, runs("a", 1, 10), renews("a", 60), renews("a", 110), ends("a", 150, 201),
			completes("a", 155, ""), asks("b", 1100, replay("a", 201))), 1},
		"a process died while it stored its answer": {killed(920, told(Plain, runs("a", 1, 10), ends("a", 900, 201),
			asks("b", 1500, other(refuses("key_reused"))))), 1},
		"a request was sent twice": {told(Once, runs("a", 1, 10), asks("b", 1030, refuses("outcome_unknown")),
			asksStoreAs("b", 1, 1031, StateAcquired, ""), marks("b", 1032, 1033),
			asksStoreAs("b", 1, 1140, "abandoned", ""), lastRow(RowClaimed, func(r *Row) { r.Visit = "again" }),
			func(t *tale) { t.h.Ops[1].End = 1150 * ms }), 2},
		"a run of an earlier life stores its answer": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"),
			runs("b", 1, 1020), ends("b", 1030, 201), completes("b", 1040, ""), asks("c", 1050, replay("b", 201)),
			renews("a", 2060), completes("a", 2065, ""), asks("d", 2070, replay("a", 201))), 3},
		"without a renewal": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"),
			runs("b", 1, 1020), ends("b", 1030, 201), completes("b", 1040, ""), asks("c", 1050, replay("b", 201)),
			completes("a", 2065, ""), asks("d", 2070, replay("a", 201))), 3},
		"a third life": {told(Plain, with(runs("b", 1, 1030), ends("b", 1032, 201), completes("b", 1033, ""), runs("c", 1, 2040))...), 3},
	} {
		t.Run(name, func(t *testing.T) {
			report := Check(row.h)
			require.Empty(t, report.Violations, "\n%s", row.h.Lines("key"))
			require.Equal(t, row.lives, report.Lives)
		})
	}
}

func TestRulesOfLives(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	with := func(more ...func(*tale)) History {
		return told(Plain, append(whole[:len(whole):len(whole)], more...)...)
	}
	requireKinds(t, map[string]broken{
		"a record ends before its TTL": {with(runs("b", 1, 900)), []string{Attempt, Register, RanAgain}},
		"a claim does":                 {told(Once, runs("a", 1, 10), runs("b", 1, 900)), []string{Attempt, Twice}},
		"an answer outlives it":        {with(asks("b", 1040, replay("a", 201))), []string{Outlived}},
		"in a life that follows": {with(runs("b", 1, 1030), ends("b", 1035, 201), completes("b", 1036, ""), asks("c", 1040, replay("a", 201))),
			[]string{Forgotten, Outlived}},
		"a refusal outlives it":        {with(asks("b", 1040, refuses("in_progress"))), []string{Outlived}},
		"of another payload":           {with(asks("b", 1040, other(refuses("key_reused")))), []string{Outlived}},
		"an unknown outcome does":      {told(Once, runs("a", 1, 10), asks("b", 1040, refuses("outcome_unknown"))), []string{Outlived}},
		"a small record does":          {told(Broken, runs("a", 1, 10), breaksOff("a", 20, 201), completes("a", 25, ""), asks("b", 1040, refuses(notStored))), []string{Outlived}},
		"one of a life before stores":  {told(Plain, runs("a", 1, 10), runs("b", 1, 1020), ends("a", 1024, 201), completes("a", 1026, "")), []string{Stale}},
		"one of a life before renews":  {with(runs("b", 1, 1030), ends("b", 1035, 201), completes("b", 1036, ""), renews("a", 1100)), []string{TookBack}},
		"two effects in a later life":  {told(Once, runs("a", 1, 10), runs("b", 1, 1020), effects("b", 1025)), []string{Twice}},
		"forgotten in a later life":    {with(runs("b", 1, 1030), ends("b", 1035, 201), completes("b", 1036, ""), asks("c", 1040, refuses("in_progress"))), []string{Forgotten}},
		"two runs at once, in another": {with(runs("b", 1, 1030), runs("c", 2, 1050)), []string{Overlap}},
	})
}
