package fuzz

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write testdata/store_calls.txt anew")

// A storeFlow is a way that a request takes through the store.
type storeFlow struct {
	name     string
	says     string
	opts     idempotency.Options
	handler  func(w http.ResponseWriter, r *http.Request, run *handlerRun)
	before   func(t *testing.T, h *callHistory)                 // what came before, without a fault
	request  func(t *testing.T, h *callHistory) []*clientAnswer // nil: one request
	withheld bool                                               // a failed Complete withholds the answer

	inner, outer func(fullStore) fullStore // what is planted within the store, and around it
	remote       *idemtest.RemoteStore     // nil: a MemoryStore
}

var storeFlows = []storeFlow{
	{name: "first execution", says: "a new key; the handler answers 201", handler: created},
	{name: "duplicate that waits", says: "1s after the first request, whose handler takes 2s",
		handler: taking(2 * time.Second), request: withDuplicate},
	{name: "replay", says: "the answer of run 1 is stored", handler: created, before: once},
	{name: "take-over", says: "run 1 panicked, and its lease is over", handler: panicking(false),
		before: func(t *testing.T, h *callHistory) { once(t, h); time.Sleep(31 * time.Second) }},
	{name: "take-over while waiting", says: "run 1 panicked 28s ago; its lease ends in 2s", handler: panicking(false),
		before: func(t *testing.T, h *callHistory) { once(t, h); time.Sleep(28 * time.Second) }},
	{name: "commit", says: "Commit, then 201; where Commit fails the handler answers 500 and has done nothing",
		handler: committing(created)},
	{name: "commit, panic", says: "Commit, then the handler panics; where Commit fails it answers 500",
		handler: committing(panicking(false))},
	{name: "release", says: "the handler answers 500 in run 1, then 201", handler: failing(false)},
	{name: "panic", says: "the handler panics in run 1, then 201", handler: panicking(false)},
	{name: "renewals", says: "the handler takes 35s, and answers 500 when its lease is lost", handler: taking(35 * time.Second)},
	{name: "at most once", says: "AtMostOnce; the handler answers 201",
		opts: idempotency.Options{AtMostOnce: true}, handler: created},
	{name: "at most once, discard", says: "AtMostOnce; the handler discards in run 1, then 201",
		opts: idempotency.Options{AtMostOnce: true}, handler: failing(true)},
	{name: "at most once, duplicate that does not wait",
		says: "AtMostOnce; the first handler takes 2s and discards, the duplicate comes 507ms before that, then 201",
		opts: idempotency.Options{AtMostOnce: true}, handler: discardingLate, request: withImpatientDuplicate},
	{name: "at most once, panic", says: "AtMostOnce; the handler panics in run 1",
		opts: idempotency.Options{AtMostOnce: true}, handler: panicking(true)},
	{name: "attached", says: "the handler attaches something, so that its answer goes out only when Complete succeeds",
		handler: attaching, withheld: true},
}

func created(w http.ResponseWriter, _ *http.Request, run *handlerRun) {
	run.answer(w, http.StatusCreated)
}

func taking(d time.Duration) func(http.ResponseWriter, *http.Request, *handlerRun) {
	return func(w http.ResponseWriter, r *http.Request, run *handlerRun) {
		select {
		case <-time.After(d):
			run.answer(w, http.StatusCreated)
		case <-r.Context().Done():
			run.notDone = true
			run.answer(w, http.StatusInternalServerError)
		}
	}
}

// panicking panics in its first run, or always.
func panicking(always bool) func(http.ResponseWriter, *http.Request, *handlerRun) {
	return func(w http.ResponseWriter, _ *http.Request, run *handlerRun) {
		if always || run.number == 1 {
			panic("boom")
		}
		run.answer(w, http.StatusCreated)
	}
}

func committing(next func(http.ResponseWriter, *http.Request, *handlerRun)) func(http.ResponseWriter, *http.Request, *handlerRun) {
	return func(w http.ResponseWriter, r *http.Request, run *handlerRun) {
		if err := idemtest.Execution(r).Commit(r.Context()); err != nil {
			run.notDone = true
			run.answer(w, http.StatusInternalServerError)
			return
		}
		run.committed = true
		next(w, r, run)
	}
}

// failing says that nothing was done in its first run.
func failing(discard bool) func(http.ResponseWriter, *http.Request, *handlerRun) {
	return func(w http.ResponseWriter, r *http.Request, run *handlerRun) {
		run.notDone = run.number == 1
		if run.notDone && discard {
			idemtest.Execution(r).Discard()
		}
		status := http.StatusCreated
		if run.notDone {
			status = http.StatusInternalServerError
		}
		run.answer(w, status)
	}
}

func attaching(w http.ResponseWriter, r *http.Request, run *handlerRun) {
	idemtest.Execution(r).Attach("transaction")
	run.answer(w, http.StatusCreated)
}

func once(t *testing.T, h *callHistory) { h.send(t, h.first) }

func discardingLate(w http.ResponseWriter, r *http.Request, run *handlerRun) {
	time.Sleep(2 * time.Second)
	failing(true)(w, r, run)
}

func withDuplicate(t *testing.T, h *callHistory) []*clientAnswer {
	return twoRequests(t, h, 1001*time.Millisecond, h.first)
}

// withImpatientDuplicate sends the duplicate so late that the first try of its
// claim times out just before the first request ends.
func withImpatientDuplicate(t *testing.T, h *callHistory) []*clientAnswer {
	return twoRequests(t, h, 1493*time.Millisecond, h.another)
}

// twoRequests returns the answers of a request and of the duplicate that c gets
// after pause.
func twoRequests(t *testing.T, h *callHistory, pause time.Duration, c *idemtest.Client) []*clientAnswer {
	var owner *clientAnswer
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		owner = h.send(t, h.first)
	}()
	time.Sleep(pause)
	duplicate := h.send(t, c)
	<-answered
	return []*clientAnswer{owner, duplicate}
}

// How long a fault lasts.
const (
	thisCall    = "this call"
	untilAnswer = "until the answer"
	pastLease   = "past the lease"
)

// retryLater is when the client that does not retry at once does. Every lease
// and every outage is over then.
const retryLater = 61 * time.Second

// afterwards is how many requests follow the retry, to see what is left.
const afterwards = 2

// play lets a request through the flow with faults, a retry after pause, and
// some long afterwards. It returns what the client saw, as in the table.
func (f storeFlow) play(t *testing.T, faults []storeFault, lasts string, pause time.Duration) (h *callHistory, request, retry string) {
	synctest.Test(t, func(t *testing.T) {
		h = newHistory(f)
		if f.before != nil {
			f.before(t, h)
		}
		h.store.begin(faults)
		var got []string
		if f.request == nil {
			got = []string{h.send(t, h.first).text}
		} else {
			for _, a := range f.request(t, h) {
				got = append(got, a.text)
			}
		}
		request = strings.Join(got, " + ")
		if lasts == pastLease {
			time.AfterFunc(retryLater-time.Millisecond, h.store.recover)
		} else {
			h.store.recover()
		}
		time.Sleep(pause)
		retry = h.send(t, h.another).text
		for last, i := retry, 0; i < afterwards; i++ {
			time.Sleep(5 * time.Minute)
			now := h.send(t, h.another).text
			if strings.TrimPrefix(now, "replay ") != strings.TrimPrefix(last, "replay ") {
				retry += ", then " + now
			}
			last = now
		}
		time.Sleep(time.Hour) // what goes on in the background ends
	})
	require.Equal(t, len(faults), h.store.met, "%s: a fault did not come", f.name)
	return h, request, retry
}

// undisturbed plays the flow without a fault, and returns the calls that the
// request makes.
func (f storeFlow) undisturbed(t *testing.T) (rules storeRules, calls []string, row string) {
	h, request, now := f.play(t, nil, thisCall, 0)
	storeRules{undisturbed: time.Minute}.check(t, h, f.name)
	later, _, after := f.play(t, nil, thisCall, retryLater)
	storeRules{undisturbed: time.Minute}.check(t, later, f.name)

	first := 0
	if f.before != nil {
		first = 1
	}
	end := 0
	for _, a := range h.answers[first : len(h.answers)-1-afterwards] {
		rules.undisturbed, end = max(rules.undisturbed, a.took), max(end, a.at)
	}
	// A duplicate that a Complete wakes may ask before that Complete returns.
	slices.SortFunc(h.calls, func(a, b storeCall) int { return a.began - b.began })
	for _, c := range h.calls {
		if c.name != "" && c.at < end {
			calls = append(calls, c.name)
		}
	}
	rules.calls = len(calls)
	return rules, calls, outcome(request, now, after, len(h.runs), len(later.runs))
}

// outcome is the right part of a row.
func outcome(request, now, after string, runs ...int) string {
	return fmt.Sprintf("%-45s  %-59s  %-47s  %d/%d", request, now, after, runs[0], runs[1])
}

// rows are the table of one flow. Every row is one fault.
func (f storeFlow) rows(t *testing.T) string {
	rules, calls, normal := f.undisturbed(t)
	var b strings.Builder
	fmt.Fprintf(&b, "\n== %s: %s ==\n", f.name, f.says)
	fmt.Fprintf(&b, "calls: %s\n\n", strings.Join(calls, " "))
	fmt.Fprintf(&b, rowFormat, "call", "goes wrong", "how long", outcomeHead)
	fmt.Fprintf(&b, rowFormat, "none", "", "", normal)
	slices.Sort(calls)
	for _, call := range calls {
		b.WriteByte('\n')
		for _, way := range waysOf(call) {
			for _, lasts := range durationsOf(way) {
				name := fmt.Sprintf("%s: %s %s, %s", f.name, call, way.name, lasts)
				p := rules
				p.outage = lasts == pastLease
				faults := []storeFault{{call: call, way: way, on: lasts != thisCall}}
				at, request, now := f.play(t, faults, lasts, 0)
				p.check(t, at, name+", retried at once")
				later, again, after := f.play(t, faults, lasts, retryLater)
				p.check(t, later, name+", retried later")
				require.Equal(t, request, again, name)
				row := outcome(request, now, after, len(at.runs), len(later.runs))
				if row == normal {
					row = "as without a fault"
				}
				fmt.Fprintf(&b, rowFormat, call, way.name, lasts, row)
			}
		}
	}
	return b.String()
}

const rowFormat = "%-10s  %-26s  %-16s  %s\n"

var outcomeHead = fmt.Sprintf("%-45s  %-59s  %-47s  %s", "the request", "retried at once", "retried 61s later", "runs")

func waysOf(call string) []storeWay {
	if strings.HasPrefix(call, "Watch") {
		return watchWays
	}
	return storeWays
}

// durationsOf leaves out what adds nothing: an outage in which replies arrive.
func durationsOf(way storeWay) []string {
	if way.reply == answers || way.reply == tardy || way.reply == jumpy || way.later > 0 {
		return []string{thisCall, untilAnswer}
	}
	return []string{thisCall, untilAnswer, pastLease}
}

// TestStoreCalls lets every call that a request makes of the store go wrong in
// every way, and compares what the client sees with the table in
// testdata/store_calls.txt, whose head says how to read it. A new call, or a
// new outcome, fails here until someone has thought about it and has run
//
//	go test -run TestStoreCalls -update ./fuzz
//
// What must hold in every row, whatever the table says, is in storeRules.
//
// The table holds for every store. With STORE_CALLS_AT in the environment the
// calls go to the store that is served there. The tests of package postgres and
// of examples/customstore start this one so.
func TestStoreCalls(t *testing.T) {
	file := filepath.Join("testdata", "store_calls.txt")
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	golden := string(content)
	head, _, _ := strings.Cut(golden, "\n== ")
	written, played := head, 0
	var remote *idemtest.RemoteStore
	if addr := os.Getenv(idemtest.RemoteStoreAddr); addr != "" {
		remote = idemtest.DialStore(t, addr)
	}
	for _, f := range storeFlows {
		f.remote = remote
		t.Run(f.name, func(t *testing.T) {
			rows := f.rows(t)
			written += rows
			played++
			if !*update {
				was, is := section(golden, f.name), section(rows, f.name)
				require.Equal(t, without(was, is), without(is, was), "rows that differ")
			}
		})
	}
	switch {
	case t.Failed() || played < len(storeFlows): // -run has chosen some
	case *update:
		require.NoError(t, os.WriteFile(file, []byte(written), 0o644))
	default:
		require.Equal(t, golden, written, "the table is in another order")
		requireInReadme(t, countRows(written), "rows")
	}
}

// countRows returns how many faults the table has.
func countRows(table string) (n int) {
	for line := range strings.Lines(table) {
		call, _, _ := strings.Cut(line, " ")
		if strings.Contains(call, "#") {
			n++
		}
	}
	return n
}

// requireInReadme requires that the README says how many there are.
func requireInReadme(t *testing.T, n int, what string) {
	t.Helper()
	number := fmt.Sprint(n)
	if n >= 1000 {
		number = fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	t.Logf("%s %s", number, what)
	readme, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	require.True(t, regexp.MustCompile(`\b`+number+" "+what+`\b`).Match(readme), "README.md does not say %s %s", number, what)
}

// TestStoreCallsInPairs lets a second call go wrong after the first, one of
// those that only the repair of the first makes included. Nobody has thought
// about each of these outcomes; the rules must hold in all of them, with a retry
// inside of the lease and with one after it.
func TestStoreCallsInPairs(t *testing.T) {
	pairs, played := 0, 0
	for _, f := range storeFlows {
		t.Run(f.name, func(t *testing.T) {
			n := f.pairs(t)
			t.Logf("%d pairs", n)
			pairs += n
			played++
		})
	}
	if played == len(storeFlows) { // or -run has chosen some
		requireInReadme(t, pairs, "pairs")
	}
}

// pairs plays all pairs of faults of one flow, and returns how many there are.
func (f storeFlow) pairs(t *testing.T) (n int) {
	rules, calls, _ := f.undisturbed(t)
	for _, call := range calls {
		for _, way := range waysOf(call) {
			first := storeFault{call: call, way: way}
			h, _, _ := f.play(t, []storeFault{first}, thisCall, retryLater)
			for _, second := range h.callsAfter(call) {
				for _, way := range waysOf(second) {
					faults := []storeFault{first, {call: second, way: way}}
					for _, pause := range []time.Duration{0, retryLater} {
						name := fmt.Sprintf("%s: %s %s, %s %s, retried after %v",
							f.name, call, first.way.name, second, way.name, pause)
						h, _, _ := f.play(t, faults, thisCall, pause)
						rules.check(t, h, name)
					}
					n++
				}
			}
		}
	}
	return n
}

// section returns the rows of the table that are about one flow.
func section(golden, flow string) []string {
	_, rest, _ := strings.Cut(golden, "\n== "+flow+":")
	rest, _, _ = strings.Cut("\n== "+flow+":"+rest, "\n\n== ")
	return strings.Split(rest, "\n")
}

// without returns the rows that are not among others.
func without(rows, others []string) string {
	return strings.Join(slices.DeleteFunc(slices.Clone(rows), func(row string) bool {
		return slices.Contains(others, row)
	}), "\n")
}
