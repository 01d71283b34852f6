package history

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Each legal tale is one of the exceptions that the promise names, or of the
// things that only look like one.
func TestLegalHistories(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	refused := slices.Clip(refusedTwice)
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
		"an at-most-once run that did nothing": told(Once, runs("a", 1, 10), withoutEffect, ends("a", 20, 401), releases("a", 21), runs("b", 2, 30)),
		"an at-most-once run died":             told(Once, runs("a", 1, 10), asks("b", 200, refuses("outcome_unknown"))),
		"and came back": told(Once, runs("a", 1, 10), asks("b", 112, refuses("outcome_unknown")), ends("a", 120, 201),
			completes("a", 125, ""), first("a", 130, 201)),
		"and finds that it was stored": told(Once, runs("a", 1, 10), ends("a", 20, 201), completes("a", 40, "down"),
			asks("b", 111, refuses("outcome_unknown")), marksInVain("a", 115, 117, "Lost"), completes("a", 120, "")),
		"or that it had freed the key": told(Once, runs("a", 1, 10), withoutEffect, asks("b", 112, refuses("outcome_unknown")),
			ends("a", 116, 401), releases("a", 117), marksInVain("a", 115, 119, "Lost")),
		"or did, when Commit had failed": told(Plain, runs("a", 1, 10), marksInVain("a", 12, 40, ""), asks("b", 112, refuses("outcome_unknown")),
			ends("a", 116, 500), releases("a", 117), marksInVain("a", 115, 119, "Lost")),
		"or stored its answer": told(Plain, runs("a", 1, 10), marksInVain("a", 12, 40, ""), ends("a", 50, 201), completes("a", 60, "down"),
			asks("b", 111, refuses("outcome_unknown")), marksInVain("a", 115, 117, "Lost"), completes("a", 120, "")),
		"a process died with a mark on its way": told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksAndDies("x", 12),
			asks("b", 120, refuses("outcome_unknown"))),
		"or cannot free the key yet": told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 40, ""),
			triesToRelease("x", 60), asks("b", 120, refuses("outcome_unknown")), triesToRelease("x", 130), releases("x", 160), runs("c", 2, 170)),
		"nor until its time is over": told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 40, ""),
			triesToRelease("x", 60), triesToRelease("x", 300), asks("b", 900, refuses("outcome_unknown"))),
		"two marks come when the TTL is over": told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 20, ""),
			marksInVain("x", 20, 30, ""), releases("x", 40), asks("b", 1150, refuses("outcome_unknown"))),
		"a claim to which there was no answer is freed once": told(Plain, asksStore("x", 10, "", "down"), triesToRelease("x", 30),
			runs("a", 1, 40)),
		"a process died before it could free the key": killed(50, told(Plain, runs("a", 1, 10), ends("a", 20, 500))),
		"or was stopped until its claim was over":     stopped(15, 500, told(Plain, asksStore("x", 10, "", "down"))),
		"or the machine stood still": func() History {
			h := killed(1800, told(Plain, runs("a", 1, 10), ends("a", 20, 500)))
			h.Stalled = 1500 * ms
			return h
		}(),
		"or a mark": killed(480, told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 40, ""), triesToRelease("x", 100))),
		"a replay to a claim whose first answer was lost": told(Plain, append(whole, asksStore("x", 26, "", "down"),
			asksStore("x", 28, "Completed", ""))...),
		"Commit failed, and a renewal learns of its mark": told(Plain, runs("a", 1, 10), marksInVain("a", 12, 40, ""), renews("a", 42),
			lastRow(RowRenew, func(r *Row) { r.Once = true }), ends("a", 44, 500), releases("a", 45), runs("b", 2, 50)),
		"a committed run died": told(Plain, runs("a", 1, 10), commits("a", 13), asks("b", 200, refuses("outcome_unknown"))),
		"the store could not take an answer until the lease ended": told(Plain, runs("a", 1, 10), ends("a", 20, 201),
			completes("a", 25, "down"), first("a", 30, 201), completes("a", 100, "down"), runs("b", 2, 115),
			completes("a", 118, ErrLeaseLost), ends("b", 120, 201), completes("b", 121, ""), first("b", 122, 201), asks("c", 130, replay("b", 201))),
		"but later": told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"), first("a", 30, 201),
			completes("a", 300, ""), asks("b", 310, replay("a", 201))),
		"or never": told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"), first("a", 30, 201),
			completes("a", 300, "down"), asks("b", 1200, refuses("in_progress"))),
		"or died before the lease ended": killed(50, told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down"),
			first("a", 30, 201), runs("b", 2, 115))),
		"or before it could store it at all": killed(50, told(Plain, runs("a", 1, 10), ends("a", 20, 201), runs("b", 2, 115))),
		"or in the middle of it":             killed(500, told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 150, "down"))),
		"a stale owner is refused": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 201), completes("b", 121, ""),
			first("b", 122, 201), ends("a", 130, 201), completes("a", 131, ErrLeaseLost), asks("c", 140, replay("b", 201))),
		"the key came back to its first owner": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 401),
			releases("b", 121), ends("a", 1140, 201), completes("a", 1141, ""), asks("c", 1150, replay("a", 201))),
		"and is renewed": told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 401), releases("b", 121),
			renews("a", 1130), ends("a", 1140, 201), completes("a", 1141, ""), asks("c", 1150, replay("a", 201))),
		"or taken by a claim that came late": told(Plain, asksStore("a", 5, "", "down"), runs("a", 1, 10), runs("b", 2, 110),
			ends("a", 220, 201), completes("a", 221, ""), asks("c", 250, replay("a", 201))),
		"of two claims at a time either may be the first": told(Plain, runs("b", 1, 10), ends("b", 12, 401), releases("b", 12),
			func(t *tale) {
				runs("a", 2, 14)(t)
				for i := range t.h.Rows {
					if row := &t.h.Rows[i]; row.Op == "a" && row.Sent > 0 {
						row.Sent = 9 * ms
					}
				}
			}, renews("a", 60)),
		"a renewal that is slow, and in time": told(Plain, runs("a", 1, 10), renewsSlowly("a", 15, 120), runs("b", 2, 114)),
		"or made before the key was freed": told(Plain, runs("a", 1, 10), renewsSlowly("a", 18, 30), ends("a", 20, 500),
			releases("a", 21), runs("b", 2, 26)),
		"or answered when the handler returns": told(Plain, runs("a", 1, 10), renews("a", 55), ends("a", 60, 201),
			completes("a", 230, "down")),
		"a claim that came to nothing was given back": told(Plain, runs("a", 1, 10), asksStore("x", 112, StateAcquired, ""),
			releases("x", 115), runs("b", 3, 130)),
		"a run that did nothing is forgotten": told(Plain, runs("a", 1, 10), ends("a", 20, 401), releases("a", 21), runs("b", 1, 130)),
		"any other when the TTL is over":      told(Plain, runs("a", 1, 10), ends("a", 20, 500), releases("a", 21), runs("b", 1, 1030)),
		"as one that sent a mark": told(Once, runs("a", 1, 10), withoutEffect, ends("a", 20, 401), releases("a", 21),
			runs("b", 1, 1030)),
		"or was a later attempt": told(Plain, runs("a", 1, 10), panics("a", 15), runs("b", 2, 110), ends("b", 120, 401), releases("b", 121),
			runs("c", 1, 1130)),
		"claims that nobody knows of count": told(Plain, runs("a", 1, 10), asked("x", 112), runs("b", 3, 220)),
		"and forgotten":                     told(Plain, runs("a", 1, 10), asksStore("x", 112, "", "down"), releases("x", 115), runs("b", 1, 1130)),
		"and another payload took the key": told(Plain, runs("a", 1, 10), asksStore("x", 112, "", "down"), releases("x", 115),
			runsWith("another", "b", 3, 130)),
		"somebody may have taken the key": told(Plain, runs("a", 1, 10), asked("x", 110), ends("a", 120, 201),
			completes("a", 121, ErrLeaseLost)),
		"and is told so before its lease is over": told(Plain, runs("a", 1, 10), asked("x", 12), ends("a", 20, 201),
			completes("a", 31, ErrLeaseLost)),
		"the payload of a large body is not known": told(Large, runs("a", 1, 10), runsWith("another", "b", 2, 110)),
		"a committed failure is kept": told(Commit, runs("a", 1, 10), commits("a", 13),
			endsWith("a", 20, func(r *Row) { r.Status, r.Committed, r.Discard = 500, true, true }), completes("a", 25, "")),
		"a small record takes the place of an answer": told(Plain, append(refused, completesSmall("a", 86, ""),
			asks("b", 90, refuses(notStored)), asks("c", 92, other(refuses("key_reused"))), asks("d", 95, sweeps("one", refuses(notStored))))...),
		"or the answer is there": told(Plain, append(refused, completesSmall("a", 86, ""), asks("b", 90, replay("a", 201)))...),
		"or either, as nobody knows": told(Plain, append(refused, completesSmall("a", 86, "down"), completes("a", 120, ""),
			asks("b", 130, refuses(notStored)))...),
		"or the process died": killed(87, told(Plain, append(refused, triesSmall("a", 86), asks("b", 90, refuses(notStored)))...)),
		"or overtaken, and the next answer has one": told(Plain, append(refused, completesSmall("a", 86, "down"), runs("b", 2, 190),
			ends("b", 191, 201), completes("b", 192, "full"), completes("b", 270, "full"), renews("b", 272), completes("b", 274, "full"),
			triesSmall("b", 276), asks("c", 278, refuses(notStored)), completes("a", 1000, ErrLeaseLost), completes("b", 1000, "down"))...),
		"the answer goes out when a small record is there": told(Plain, append(refused, completesSmall("a", 86, ""),
			first("a", 100, 201), asks("b", 101, refuses(notStored)))...),
		"a body broke off, and the handler had done something": told(Broken, runs("a", 1, 10), breaksOff("a", 20, 201),
			completes("a", 25, ""), asks("b", 30, refuses(notStored)), asks("c", 40, sweeps("one", refuses(notStored)))),
		"or its process died before it could tell":  told(Broken, runs("a", 1, 10), breaksOff("a", 20, 201), asks("b", 30, refuses(notStored))),
		"or had done nothing":                       told(Broken, runs("a", 1, 10), breaksOff("a", 20, 404), releases("a", 25), runs("b", 2, 30)),
		"the store is down, and a run has no claim": told(Open, exposes("a", 10), ends("a", 20, 201), first("a", 30, 201), runs("b", 1, 40)),
		"beside one that has": told(Open, runs("a", 1, 10), exposes("b", 15), ends("b", 20, 201), first("b", 30, 201), ends("a", 40, 201),
			completes("a", 41, ""), exposes("c", 50), ends("c", 52, 201), first("c", 54, 201), asks("d", 60, replay("a", 201))),
		"a process died before it could tell of its store": told(Plain, runs("a", 1, 10), ends("a", 20, 201),
			asks("b", 30, replay("a", 201))),
	}
	for name, h := range tales {
		t.Run(name, func(t *testing.T) {
			require.Empty(t, Check(h).Violations, "\n%s", h.Lines("key"))
		})
	}
}

// refusedTwice is a run whose answer the store does not take, though it is up.
var refusedTwice = []func(*tale){
	runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "full"), first("a", 30, 201),
	completes("a", 80, "full"), renews("a", 82), completes("a", 84, "full"),
}

// Each broken tale is a legal one in which one thing is wrong.
func TestBrokenHistories(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	with := func(more ...func(*tale)) []func(*tale) { return append(whole[:len(whole):len(whole)], more...) }
	requireKinds(t, map[string]broken{
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
		"and after the store has failed": {told(Plain, runs("a", 1, 10), ends("a", 12, 201), completes("a", 13, "down"), releases("a", 14)), []string{Freed, GaveUp}},
		"a final answer frees the key":   {told(Plain, runs("a", 1, 10), ends("a", 12, 201), releases("a", 13)), []string{Freed, GaveUp}},
		"an answer is kept that is not":  {told(Plain, runs("a", 1, 10), ends("a", 12, 500), completes("a", 13, "")), []string{Freed, NotFreed}},
		"sent before it was stored":      {told(Plain, runs("a", 1, 10), ends("a", 20, 201), first("a", 30, 201), completes("a", 40, "")), []string{Unstored}},
		"sent though it was refused":     {told(Plain, runs("a", 1, 10), ends("a", 20, 201), asked("x", 23), completes("a", 25, ErrLeaseLost), first("a", 30, 201)), []string{Unstored}},
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
	})
}

// What is about bodies that break off, and about runs without a claim.
func TestRulesOfPartsAndExposedRuns(t *testing.T) {
	part := func(lines ...func(*tale)) History { return told(Broken, lines...) }
	open := func(lines ...func(*tale)) History { return told(Open, lines...) }
	requireKinds(t, map[string]broken{
		"the answer to a part is replayed": {part(runs("a", 1, 10), breaksOff("a", 20, 201), completes("a", 25, ""),
			asks("b", 40, replay("a", 201))), []string{Part}},
		"a part that came to nothing is kept": {part(runs("a", 1, 10), breaksOff("a", 20, 404), completes("a", 25, "down"),
			releases("a", 30)), []string{Freed}},
		"a part that came to something frees the key": {part(runs("a", 1, 10), breaksOff("a", 20, 201), releases("a", 25)),
			[]string{Freed, GaveUp}},
		"the marker of a part is short": {part(runs("a", 1, 10), breaksOff("a", 20, 401), releasesFor("a", 25, lease, "")),
			[]string{Marker}},
		"not stored, and the body was whole": {part(runs("a", 1, 10), asks("b", 30, refuses(notStored)), breaksOff("a", 40, 201)),
			[]string{Code}},

		"no claim, and the store has not failed": {open(asksStoreAs("a", 1, 10, StateAcquired, ""), exposesAnyhow("a", 10)), []string{Exposed}},
		"nor before": {open(asksStoreAs("a", 1, 10, StateAcquired, ""), exposesAnyhow("a", 10), asksStore("a", 30, "", "down")),
			[]string{Exposed}},
		"no claim, beside a run that is known": {open(runs("a", 1, 10), asksStore("b", 12, "in progress", ""), exposes("b", 20)),
			[]string{Exposed}},
		"no claim, and its answer is kept": {open(exposes("a", 10), ends("a", 20, 201), completes("a", 25, "")), []string{Exposed}},
		"or replayed":                      {open(exposes("a", 10), ends("a", 20, 201), asks("b", 30, replay("a", 201))), []string{Exposed}},
		"no claim, and the key is freed": {open(exposes("a", 10), ends("a", 20, 500), releasesFor("a", 25, 10*lease, "")),
			[]string{Freed}},
		"its effect comes twice": {open(exposes("a", 10), effects("a", 15)), []string{Twice}},
	})
}

// A broken is a history and the kinds of violations that are in it.
type broken struct {
	h    History
	want []string
}

func requireKinds(t *testing.T, rows map[string]broken) {
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			report := Check(row.h)
			require.ElementsMatch(t, row.want, report.Kinds(), "%v\n%s", report.Violations, row.h.Lines("key"))
		})
	}
}

// Each rule of the judge is the only one that finds one of the histories of the
// three tests that follow.
func TestRulesOfRuns(t *testing.T) {
	requireKinds(t, map[string]broken{
		"two effects in one run":                {told(Plain, runs("a", 1, 10), effects("a", 12)), []string{Twice}},
		"two effects of at-most-once runs":      {told(Once, runs("a", 1, 10), ends("a", 20, 401), releases("a", 21), runs("b", 2, 30)), []string{Twice}},
		"two effects after Commit failed":       {told(Commit, runs("a", 1, 10), runs("b", 2, 200)), []string{Twice}},
		"at-most-once let in without an effect": {told(Once, runs("a", 1, 10), withoutEffect, runs("b", 2, 200)), []string{Twice}},
		"the store was to keep a failure":       {told(Plain, runs("a", 1, 10), ends("a", 12, 500), completes("a", 13, "down"), releases("a", 14)), []string{Freed}},
		"a failure is replayed":                 {told(Plain, runs("a", 1, 10), ends("a", 12, 500), releases("a", 13), asks("b", 20, replay("a", 500))), []string{Freed}},
		"freed while the handler runs":          {told(Plain, runs("a", 1, 10), releases("a", 13)), []string{Freed}},
		"freed by a panic":                      {told(Plain, runs("a", 1, 10), panics("a", 12), releases("a", 13)), []string{Freed}},
		"somebody else's release is not a's": {told(Plain, runs("a", 1, 10), asksStore("x", 30, "", "down"), releases("x", 50),
			runs("b", 2, 60)), []string{Overlap}},
		"nor that of an at-most-once key": {told(Once, runs("a", 1, 10), withoutEffect, asksStore("x", 130, "", "down"),
			releases("x", 150), runs("b", 2, 160)), []string{Twice}},

		// Payloads and attempts, when a release is no excuse.
		"who was refused frees no key for others": {told(Plain, runs("a", 1, 10), asksStore("x", 112, "in progress", ""),
			releases("x", 115), runsWith("another", "b", 2, 130)), []string{Payload}},
		"nor does who frees it later": {told(Plain, runs("a", 1, 10), asksStore("x", 112, "", "down"), runsWith("another", "b", 3, 130),
			releases("x", 140)), []string{Payload}},
		"nor does who came before": {told(Plain, asksStoreAs("x", 1, 5, StateAcquired, ""), runs("a", 2, 10), releases("x", 115),
			runsWith("another", "b", 3, 130)), []string{Payload}},
		"nor restarts attempts": {told(Plain, runs("a", 1, 10), asksStore("x", 112, "in progress", ""), releases("x", 115),
			runs("b", 1, 220)), []string{Attempt}},
		"attempts go on while the marker is there": {told(Plain, runs("a", 1, 10), ends("a", 20, 401), releases("a", 21),
			runs("b", 1, 110)), []string{Attempt}},
		"also that of a run that did nothing and had sent a mark": {told(Once, runs("a", 1, 10), withoutEffect, ends("a", 20, 401),
			releases("a", 21), runs("b", 1, 800)), []string{Attempt}},
		"or of a visit that did not come to a run": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 20, ""),
			releases("x", 21), runs("b", 1, 800)), []string{Attempt}},
		"or that was a later attempt": {told(Plain, runs("a", 1, 10), panics("a", 15), runs("b", 2, 110), ends("b", 120, 401),
			releases("b", 121), runs("c", 1, 800)), []string{Attempt}},
		"or may have been": {told(Plain, runs("a", 1, 10), asksStore("x", 112, "", "down"), releases("x", 115),
			runs("b", 1, 800)), []string{Attempt}},
		"which is for the TTL, whatever the release says": {told(Plain, runs("a", 1, 10), ends("a", 20, 500),
			releasesFor("a", 21, lease, ""), runs("b", 1, 800)), []string{Attempt, Marker}},
		"not one that was left before": {told(Plain, asksStore("x", 5, "", "down"), releases("x", 20), runs("a", 1, 30),
			runs("b", 1, 140)), []string{Attempt}},
		"nor for claims before": {told(Plain, asksStoreAs("x", 1, 5, StateAcquired, ""), runs("a", 2, 10), runs("b", 4, 110)), []string{Attempt}},
		"nor for renewals":      {told(Plain, runs("a", 1, 10), marksInVain("a", 49, 50, ""), runs("b", 3, 160)), []string{Attempt}},
		"or of a claim that did not come to a run": {told(Plain, runs("a", 1, 10), asksStore("x", 112, StateAcquired, ""),
			runs("b", 2, 230)), []string{Attempt}},
		"the first attempt is the first":         {told(Plain, runs("a", 2, 10)), []string{Attempt}},
		"no attempt is left out":                 {told(Plain, runs("a", 1, 10), runs("b", 3, 110)), []string{Attempt}},
		"nor counted for who was refused":        {told(Plain, runs("a", 1, 10), asksStore("x", 50, "in progress", ""), runs("b", 3, 110)), []string{Attempt}},
		"a run is of the attempt of its claim":   {told(Plain, runs("a", 1, 10), lastRow(RowBegin, func(r *Row) { r.Attempt = 2 })), []string{Attempt}},
		"a renewal is of the attempt that it is": {told(Plain, runs("a", 1, 10), renews("a", 20), lastRow(RowRenew, func(r *Row) { r.Attempt = 2 })), []string{Attempt}},
	})
}

func TestRulesOfMarks(t *testing.T) {
	isMarked := func(r *Row) { r.Once = true }
	notMarked := func(r *Row) { r.Once = false }
	later := func(r *Row) { r.Returned = 30 * ms }
	claimOf := asksStoreAs("x", 1, 10, StateAcquired, "")
	requireKinds(t, map[string]broken{
		"an at-most-once run begins without a mark": {told(Once, runs("a", 1, 10), lastRow(RowRenew, notMarked)), []string{Unmarked}},
		"or before its mark is answered":            {told(Once, runs("a", 1, 10), lastRow(RowRenew, later)), []string{Unmarked}},
		"committed without a mark":                  {told(Plain, runs("a", 1, 10), commits("a", 13), lastRow(RowRenew, notMarked)), []string{Unmarked}},
		"or before it is answered":                  {told(Plain, runs("a", 1, 10), commits("a", 13), lastRow(RowRenew, later)), []string{Unmarked}},
		"a claim is marked":                         {told(Plain, runs("a", 1, 10), lastRow(RowClaimed, isMarked)), []string{Marked}},
		"a renewal is marked that was no mark": {told(Plain, runs("a", 1, 10), renews("a", 12), lastRow(RowRenew, isMarked)),
			[]string{Marked}},
		"or before there was a mark": {told(Plain, runs("a", 1, 10), lastRow(RowClaimed, isMarked), commits("a", 15)), []string{Marked}},

		"nor by the mark of another": {told(Plain, runs("a", 1, 10), commits("a", 13), asksStore("x", 112, StateAcquired, ""),
			lastRow(RowClaimed, isMarked)), []string{Marked}},

		"a run that may have got somewhere leaves a short marker": {told(Plain, runs("a", 1, 10), ends("a", 20, 500),
			releasesFor("a", 21, lease, "")), []string{Marker}},
		"one that did nothing leaves a long one": {told(Plain, runs("a", 1, 10), ends("a", 20, 401),
			releasesFor("a", 21, 10*lease, "")), []string{Marker}},
		"after a mark it is a short one": {told(Once, runs("a", 1, 10), withoutEffect, ends("a", 20, 401),
			releasesFor("a", 21, lease, "")), []string{Marker}},
		"or after a mark without an answer": {told(Plain, runs("a", 1, 10), marksInVain("a", 12, 15, ""), ends("a", 20, 401),
			releasesFor("a", 21, lease, "")), []string{Marker}},
		"or there was no run": {told(Once, claimOf, marksInVain("x", 11, 40, ""), releasesFor("x", 60, lease, "")), []string{Marker}},
		"or neither a run nor a mark, and it is a long one": {told(Plain, asksStore("x", 10, "", "down"),
			releasesFor("x", 20, 10*lease, "")), []string{Marker}},
		"or the mark was another's": {told(Once, claimOf, marksInVain("x", 11, 20, ""), releases("x", 30), asksStore("y", 50, "", "down"),
			releasesFor("y", 60, 10*lease, "")), []string{Marker}},

		"a failure does not free the key": {told(Plain, runs("a", 1, 10), ends("a", 20, 500)), []string{NotFreed}},
		"a claim is not freed":            {told(Plain, asksStore("x", 10, "", "down")), []string{NotFreed}},
		"nor after a stop":                {stopped(15, 60, told(Plain, asksStore("x", 10, "", "down"))), []string{NotFreed}},
		"a mark is not freed":             {told(Once, claimOf, marksInVain("x", 11, 40, "")), []string{NotFreed}},
		"or once, and in vain":            {told(Once, claimOf, marksInVain("x", 11, 40, ""), triesToRelease("x", 60)), []string{NotFreed}},
		"or by somebody else":             {told(Once, claimOf, marksInVain("x", 11, 40, ""), asksStore("y", 20, "in progress", ""), releases("y", 60)), []string{NotFreed}},
		"and its process lives for long":  {killed(480, told(Once, claimOf, marksInVain("x", 11, 40, ""), triesToRelease("x", 60))), []string{NotFreed}},
		"a failure after a mark is freed for as long": {told(Plain, runs("a", 1, 10), marksInVain("a", 12, 20, ""), ends("a", 20, 500),
			triesToRelease("a", 60)), []string{NotFreed}},
	})
}

// lastRow changes the last row of a type.
func lastRow(kind string, change func(*Row)) func(*tale) {
	return func(t *tale) {
		for i := len(t.h.Rows) - 1; i >= 0; i-- {
			if t.h.Rows[i].Type == kind {
				change(&t.h.Rows[i])
				return
			}
		}
	}
}

func TestRulesOfStoring(t *testing.T) {
	refused := slices.Clip(refusedTwice)
	requireKinds(t, map[string]broken{
		"the store is not given the answer":     {told(Plain, runs("a", 1, 10), ends("a", 20, 201), runs("b", 2, 115)), []string{GaveUp}},
		"and the process lives for long":        {killed(500, told(Plain, runs("a", 1, 10), ends("a", 20, 201))), []string{GaveUp}},
		"it is tried once":                      {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "down")), []string{GaveUp}},
		"until the end of the lease":            {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 105, "down")), []string{GaveUp}},
		"not until the time of a renewed lease": {told(Plain, runs("a", 1, 10), renews("a", 50), ends("a", 80, 201), completes("a", 230, "down")), []string{GaveUp}},
		"lost to nobody":                        {told(Plain, runs("a", 1, 10), ends("a", 90, 201), completes("a", 95, ErrLeaseLost), completes("a", 300, "down")), []string{Lost}},
		"and nobody tries again":                {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ErrLeaseLost)), []string{Lost, GaveUp}},
		"lost to who was refused":               {told(Plain, runs("a", 1, 10), asksStore("x", 22, "in progress", ""), ends("a", 90, 201), completes("a", 95, ErrLeaseLost), completes("a", 300, "down")), []string{Lost}},
		"lost to who came before":               {told(Plain, asksStoreAs("x", 1, 5, StateAcquired, ""), runs("a", 2, 10), ends("a", 90, 201), completes("a", 95, ErrLeaseLost), completes("a", 300, "down")), []string{Lost}},
		"lost to who came later":                {told(Plain, runs("a", 1, 10), ends("a", 90, 201), completes("a", 95, ErrLeaseLost), asked("x", 97), completes("a", 300, "down")), []string{Lost}},
		"stored while the marker of b is there": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 401), releases("b", 121), ends("a", 130, 201), completes("a", 150, "")), []string{Stale}},
		"which is for the TTL":                  {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 500), releases("b", 121), ends("a", 130, 201), completes("a", 800, "")), []string{Stale}},

		"also when b did nothing and came later": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 401), releases("b", 121), ends("a", 130, 201), completes("a", 800, "")), []string{Stale}},

		"stored while b renews its claim": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), asksStore("x", 112, "", "down"),
			releases("x", 113), renews("b", 150), ends("a", 160, 201), completes("a", 225, "")), []string{Stale}},

		// Renewals.
		"who was let in too early renews": {told(Plain, runs("a", 1, 10), runs("b", 2, 90), renews("b", 95)), []string{Overlap}},
		"an at-most-once claim is not taken back": {told(Once, runs("a", 1, 10), withoutEffect, ends("a", 20, 401),
			releases("a", 21), runs("b", 2, 30), renews("a", 200)), []string{TookBack}},
		"a stale owner renews":                  {told(Plain, runs("a", 1, 10), runs("b", 2, 110), renews("a", 130)), []string{TookBack}},
		"though the lease of the other is over": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), renews("a", 215)), []string{TookBack}},
		"though the other has freed the key": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 401),
			releases("b", 121), renews("a", 800)), []string{TookBack}},
		"though the other had committed": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), commits("b", 115), renews("a", 300)), []string{TookBack}},
		"though the other had, and is not over": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), commits("b", 115),
			renews("b", 1000), asksStore("x", 1118, "", "down"), releases("x", 1121), renews("a", 1300)), []string{TookBack}},
		"though the other is stored": {told(Plain, runs("a", 1, 10), runs("b", 2, 110), ends("b", 120, 201), completes("b", 121, ""),
			renews("a", 300)), []string{TookBack}},
		"sent before, answered after": {told(Plain, runs("a", 1, 10), renewsSlowly("a", 100, 130), runs("b", 2, 112)), []string{TookBack}},
		"and then stores": {told(Plain, runs("a", 1, 10), renewsSlowly("a", 100, 130), runs("b", 2, 112), ends("a", 140, 201),
			completes("a", 141, "")), []string{TookBack, Stale}},

		// Small records.
		"a small record before its time": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, "full"), renews("a", 30),
			completes("a", 35, "full"), completesSmall("a", 40, "")), []string{Shrunk}},
		"after one refusal": {told(Plain, runs("a", 1, 10), ends("a", 70, 201), renews("a", 82), completes("a", 84, "full"),
			completesSmall("a", 90, "")), []string{Shrunk}},
		"though the store was not asked again": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 80, "full"),
			renews("a", 82), completesSmall("a", 90, "")), []string{Shrunk}},
		"though it renewed nothing": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 80, "full"),
			completes("a", 84, "full"), completesSmall("a", 90, "")), []string{Shrunk}},
		"though the store had the answer": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 80, "full"),
			renews("a", 82), completes("a", 84, ""), completesSmall("a", 90, "")), []string{Shrunk}},
		"though the key was lost": {told(Plain, runs("a", 1, 10), ends("a", 20, 201), completes("a", 80, "full"), renews("a", 82),
			asked("x", 83), completes("a", 84, ErrLeaseLost), completesSmall("a", 90, "down")), []string{Shrunk}},
		"ran again after a small record": {told(Plain, append(refused, completesSmall("a", 86, ""), runs("b", 2, 300))...), []string{RanAgain}},
		"or its process died": {killed(87, told(Plain, append(refused, triesSmall("a", 86), asks("b", 90, refuses(notStored)),
			runs("c", 2, 300))...)), []string{RanAgain, Register}},
	})
}

func TestRulesOfAnswers(t *testing.T) {
	whole := []func(*tale){runs("a", 1, 10), ends("a", 20, 201), completes("a", 25, ""), first("a", 30, 201)}
	with := func(more ...func(*tale)) []func(*tale) { return append(whole[:len(whole):len(whole)], more...) }
	crash := func(r *Row) { r.Panic = true }
	refused := slices.Clip(refusedTwice)
	unknown := refuses("outcome_unknown")
	requireKinds(t, map[string]broken{
		"an answer of a run that crashed": {told(Plain, runs("a", 1, 10), first("a", 20, 201)), []string{Phantom}},
		"an answer of a run that panicked": {told(Plain, runs("a", 1, 10), endsWith("a", 15, crash),
			first("a", 20, 201)), []string{Phantom}},
		"replayed before the run has ended": {told(Plain, runs("a", 1, 10), asks("b", 15, replay("a", 201)), ends("a", 20, 201),
			completes("a", 25, ""), first("a", 30, 201)), []string{Phantom}},
		"another payload is answered at once": {told(Plain, with(asks("b", 22, other(replay("a", 201))))...), []string{Payload}},
		"another payload of a large body":     {told(Large, with(asks("b", 22, other(replay("a", 201))))...), []string{Payload}},
		"the other payload came later": {told(Plain, runs("a", 1, 10), asks("b", 20, refuses("key_reused")),
			asks("c", 40, other(refuses("in_progress")))), []string{Code}},
		"a later answer that is no replay": {told(Plain, with(func(t *tale) {
			t.op("a", 40, 50, func(op *Op) { replay("a", 201)(op); op.Replayed = false })
		})...), []string{Forgotten}},
		"one process is settled, another not": {told(Plain, with(asks("b", 40, sweeps("one", replay("a", 201))),
			asks("c", 40, sweeps("two", refuses("store_unavailable"))))...), []string{Stuck}},

		// Small records.
		"not stored, though nobody said so": {told(Plain, runs("a", 1, 10), asks("b", 50, refuses(notStored))), []string{Code}},
		"or nobody yet":                     {told(Plain, append(refused, asks("b", 50, refuses(notStored)), completesSmall("a", 86, ""))...), []string{Code}},
		"not stored, and there":             {told(Plain, append(refused, completesSmall("a", 86, ""), asks("b", 90, refuses(notStored)), asks("c", 95, replay("a", 201)))...), []string{Register}},
		"not stored for another payload":    {told(Plain, append(refused, completesSmall("a", 86, ""), asks("b", 90, other(refuses(notStored))))...), []string{Payload}},

		// Unknown outcomes.
		"unknown while the lease runs":       {told(Once, runs("a", 1, 10), asks("b", 50, unknown)), []string{Code}},
		"unknown while a renewed lease runs": {told(Once, runs("a", 1, 10), renews("a", 80), asks("b", 120, unknown)), []string{Code}},
		"unknown before Commit":              {told(Plain, runs("a", 1, 10), asks("b", 200, unknown), commits("a", 205)), []string{Code}},
		"unknown though it was stored":       {told(Once, with(asks("b", 200, unknown))...), []string{Code, Forgotten, Register}},
		"unknown though it was only claimed": {told(Once, asked("x", 10), asks("b", 200, unknown)), []string{Code}},
		"unknown though the mark was refused": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 12, 14, "Lost"),
			asks("b", 200, unknown)), []string{Code}},
		"unknown though the key was lost before": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 12, 14, ""),
			asksStore("x", 20, "in progress", ""), releases("x", 400), asks("b", 200, unknown)), []string{Code}},
		"or is lost later": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 12, 14, ""), asks("b", 200, unknown),
			asksStore("x", 220, "in progress", ""), releases("x", 400)), []string{Code}},
		"whoever else frees the key": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 12, 14, ""), releases("y", 100),
			asks("b", 200, unknown), asksStore("x", 220, "in progress", ""), releases("x", 400)), []string{Code}},
		"or is lost before the run has an answer": {told(Plain, runs("a", 1, 10), marksInVain("a", 12, 40, ""), asked("x", 100),
			asks("b", 112, unknown), marksInVain("a", 115, 117, "Lost"), ends("a", 130, 201), completes("a", 140, ErrLeaseLost)), []string{Code}},
		"unknown when the run had lost it before": {told(Plain, runs("a", 1, 10), marksInVain("a", 12, 40, ""), ends("a", 50, 201),
			completes("a", 60, "down"), marksInVain("a", 115, 117, "Lost"), asks("b", 130, unknown), completes("a", 140, "")), []string{Code}},
		"unknown though the mark was freed": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 12, 14, ""),
			releases("x", 40), asks("b", 300, unknown)), []string{Code}},
		"unknown though two marks are late": {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksInVain("x", 11, 20, ""),
			marksInVain("x", 20, 30, ""), releases("x", 40), asks("b", 1090, unknown)), []string{Code}},
		"unknown though the run has freed it": {told(Once, runs("a", 1, 10), ends("a", 20, 401), releases("a", 21),
			asks("b", 200, unknown)), []string{Code}},
		"unknown though no claim was made":      {told(Once, asksStore("x", 1, "in progress", ""), asks("b", 200, unknown)), []string{Code}},
		"unknown while the lease of it runs":    {told(Once, asksStoreAs("x", 1, 10, StateAcquired, ""), marksAndDies("x", 12), asks("b", 50, unknown)), []string{Code}},
		"unknown though it was no at-most-once": {told(Plain, asked("x", 10), asks("b", 200, unknown)), []string{Code}},
	})
}

// What is final is kept, and nothing else is.
func TestFinalAnswers(t *testing.T) {
	for _, row := range []struct {
		name, kind string
		final      bool
		change     func(*Row)
		committed  bool
	}{
		{"401", Plain, false, func(r *Row) { r.Status = 401 }, false},
		{"403", Plain, false, func(r *Row) { r.Status = 403 }, false},
		{"407", Plain, false, func(r *Row) { r.Status = 407 }, false},
		{"408", Plain, false, func(r *Row) { r.Status = 408 }, false},
		{"425", Plain, false, func(r *Row) { r.Status = 425 }, false},
		{"429", Plain, false, func(r *Row) { r.Status = 429 }, false},
		{"500", Plain, false, func(r *Row) { r.Status = 500 }, false},
		{"500 of an at-most-once run", Once, true, func(r *Row) { r.Status = 500 }, false},
		{"401 of an at-most-once run", Once, false, func(r *Row) { r.Status = 401 }, false},
		{"404", Plain, true, func(r *Row) { r.Status = 404 }, false},
		{"500 after Commit", Plain, true, func(r *Row) { r.Status, r.Committed = 500, true }, true},
		{"Discard", Plain, false, func(r *Row) { r.Discard = true }, false},
		{"Discard after Commit", Plain, true, func(r *Row) { r.Discard, r.Committed = true, true }, true},
		{"panic", Plain, false, func(r *Row) { r.Panic = true }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			run := []func(*tale){runs("a", 1, 10), endsWith("a", 20, row.change)}
			if row.committed {
				run = slices.Insert(run, 1, commits("a", 13))
			}
			kept := Check(told(row.kind, append(slices.Clip(run), completes("a", 25, ""))...))
			freed := Check(told(row.kind, append(slices.Clip(run), releases("a", 25))...))
			if row.final {
				require.Empty(t, kept.Violations)
				require.Equal(t, []string{Freed, GaveUp}, freed.Kinds())
				return
			}
			if row.name == "panic" { // which neither keeps nor frees
				require.Equal(t, []string{Freed}, kept.Kinds())
				return
			}
			require.Equal(t, []string{Freed, NotFreed}, kept.Kinds())
			require.Empty(t, freed.Violations)
		})
	}
}

// A history that is too much for the search is not taken for a good one.
func TestUnjudged(t *testing.T) {
	var lines []func(*tale)
	for range 40 { // in any order, and none of them helps
		lines = append(lines, func(t *tale) { t.op("x", 1, 1000, refuses("in_progress")) })
	}
	lines = append(lines, runs("a", 1, 10), ends("a", 20, 201), runs("b", 2, 115), ends("b", 120, 201),
		asks("c", 130, replay("a", 201)), asks("d", 140, replay("b", 201)))
	for _, c := range split(told(Plain, lines...)) {
		c.report, c.search = new(Report), 10*ms
		c.checkRegister()
		require.Equal(t, []string{Unjudged}, c.report.Kinds())
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
