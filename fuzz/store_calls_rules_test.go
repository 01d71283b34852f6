package fuzz

import (
	"fmt"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// storeRules are what must hold whatever the store does, whatever the table
// says.
type storeRules struct {
	undisturbed time.Duration // what the request takes without a fault
	calls       int           // and how many store calls
	outage      bool          // the store was down for longer than the lease
}

// check checks all rules on the history of one key.
func (p storeRules) check(t require.TestingT, h *callHistory, name string) {
	require.False(t, h.together, "%s: two runs at once", name)
	for _, run := range h.runs {
		p.checkRun(t, h, name, run)
	}
	for i, a := range h.answers {
		require.Equal(t, 1, a.events, "%s: events of request %d", name, i)
		p.checkAnswer(t, h, name, a)
		p.checkPatience(t, h, name, i)
		p.checkClaims(t, h, name, i)
	}
	p.checkReplays(t, h, name)
	p.checkEnd(t, h, name)
}

// checkRun looks for a run that should not have been, after this one.
func (p storeRules) checkRun(t require.TestingT, h *callHistory, name string, run *handlerRun) {
	for _, next := range h.runs[run.number:] {
		for _, stored := range h.kept {
			require.Less(t, next.start, stored, "%s: run %d began after an answer was kept", name, next.number)
		}
		finished := run.end != 0 && !run.notDone
		once := run.committed || h.flow.opts.AtMostOnce
		if once {
			require.True(t, run.end != 0 && run.notDone && !run.committed,
				"%s: an at-most-once key ran again, in run %d", name, next.number)
		}
		if !run.notDone {
			require.GreaterOrEqual(t, next.began.Sub(run.began), 30*time.Second,
				"%s: run %d within the lease of run %d", name, next.number, run.number)
		}
		if finished && !h.flow.withheld {
			// The one way for it to run again that is documented.
			require.True(t, p.outage, "%s: run %d after run %d had finished", name, next.number, run.number)
		}
	}
}

// checkAnswer checks that the client was told what a handler said, or an error.
func (p storeRules) checkAnswer(t require.TestingT, h *callHistory, name string, a *clientAnswer) {
	var own *handlerRun // the run of this request
	for _, run := range h.runs {
		if h.answers[run.request] == a {
			require.Nil(t, own, "%s: one request ran twice", name)
			own = run
		}
	}
	if a.run != "" {
		var number int
		_, err := fmt.Sscan(a.run, &number)
		require.NoError(t, err)
		require.LessOrEqual(t, number, len(h.runs), "%s: an answer without a run", name)
		run := h.runs[number-1]
		require.Equal(t, run.sent, strings.TrimPrefix(a.text, "replay "), "%s: not what the handler said", name)
		require.True(t, run.end != 0 && run.end < a.at, "%s: answered before the handler had returned", name)
		require.Equal(t, a.replay, own != run, "%s: whose answer is it?", name)
	} else {
		require.True(t, a.status == 0 || a.status >= 400, "%s: %s without a run", name, a.text)
	}
	if a.text == "503 store_unavailable" && !h.flow.withheld {
		require.Nil(t, own, "%s: 503 although the handler ran", name)
	}
}

// checkPatience checks how long the client waited: StoreTimeout for each call
// at most, unless the store ignores that. Then a call takes as long as the store
// likes, that of another request which this one waits for as well; but it is
// tried twice at most.
func (p storeRules) checkPatience(t require.TestingT, h *callHistory, name string, request int) {
	a, own, all := h.answers[request], 0, 0
	for _, c := range h.calls {
		if c.isDeaf && a.sent < c.at && c.at < a.at {
			all++
			if c.request == request {
				own++
			}
		}
	}
	require.LessOrEqual(t, own, 2*p.calls, "%s: how often a store was asked that takes too long", name)
	bound := p.undisturbed + time.Duration(p.calls)*time.Second + time.Duration(all)*deafness
	require.LessOrEqual(t, a.took, bound+5*time.Millisecond, "%s: how long the client waited", name)
}

// checkClaims checks that the handler ran for a request exactly when the store
// said that it may, and that a store which failed before that gives a 503.
func (p storeRules) checkClaims(t require.TestingT, h *callHistory, name string, request int) {
	start := 0
	for _, run := range h.runs {
		if run.request == request {
			start = run.start
		}
	}
	var last *storeCall
	for i := range h.calls {
		c := &h.calls[i]
		before := c.at < h.answers[request].at && (start == 0 || c.at < start)
		if c.request == request && before && strings.HasPrefix(c.name, "Acquire") {
			last = c
		}
	}
	switch {
	case last == nil: // what happened before
	case start != 0:
		require.NoError(t, last.err, "%s: the handler ran although the store failed", name)
		require.Equal(t, idempotency.Acquired, last.state, "%s: the handler ran although it may not", name)
	case last.err != nil:
		require.Equal(t, "503 store_unavailable", h.answers[request].text, name)
	default:
		require.NotEqual(t, idempotency.Acquired, last.state, "%s: the handler may run and did not", name)
	}
}

// checkReplays checks that everyone gets the same answer: that of the first run
// which was to be kept.
func (p storeRules) checkReplays(t require.TestingT, h *callHistory, name string) {
	var first string
	for _, a := range h.answers {
		isKept := a.run != "" && (a.replay || !h.runs[mustNumber(a.run)-1].notDone)
		switch {
		case !isKept:
		case first == "" || !a.replay && p.outage: // run again, see checkRun
			first = strings.TrimPrefix(a.text, "replay ")
		default:
			require.Equal(t, first, strings.TrimPrefix(a.text, "replay "), "%s: another answer than the first", name)
		}
	}
}

// checkEnd checks that the key is not stuck, long after the last fault: the
// client got an answer, or the run of an at-most-once key has died.
func (p storeRules) checkEnd(t require.TestingT, h *callHistory, name string) {
	end := h.answers[len(h.answers)-1]
	if end.run != "" {
		return
	}
	require.Equal(t, "409 outcome_unknown", end.text, "%s: the key is stuck", name)
	// A late claim takes the key anew when its marker is gone, and a late mark
	// of the same attempt finds it. One late command alone leaves no key stuck.
	if h.late >= 2 {
		return
	}
	require.NotEmpty(t, h.runs, "%s: unknown what became of no run", name)
	run := h.runs[len(h.runs)-1]
	died := run.end == 0 && (run.committed || h.flow.opts.AtMostOnce)
	require.True(t, died || p.outage && run.notDone, "%s: run %d reported how it ended", name, run.number)
}

func mustNumber(s string) (n int) {
	_, err := fmt.Sscan(s, &n)
	idemtest.Must(err)
	return n
}
