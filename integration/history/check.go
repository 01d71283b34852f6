package history

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Kinds of violations.
const (
	Overlap   = "overlap"         // a run was let in while another held the lease
	RanAgain  = "ran again"       // a run was let in although an answer was stored, or after Commit
	Twice     = "twice"           // an at-most-once key was let in again, or has two effects
	Stale     = "stale owner"     // one that had lost the key stored its answer
	TookBack  = "took back"       // one that had lost the key renewed its claim
	Freed     = "freed"           // a key was freed though its run was final, or kept though it was not
	Unstored  = "unstored"        // an answer went out that a retry cannot get
	Answers   = "two answers"     // clients got answers of different runs
	Phantom   = "phantom"         // an answer is not that of a run under this key
	Payload   = "payload"         // a different payload ran, or got the answer
	Attempt   = "attempt"         // attempts do not count the claims
	Unmarked  = "not marked"      // a run began, or was told that it has committed, without a mark
	Marked    = "marked"          // a claim has Once that nobody has marked
	Marker    = "marker"          // the key was freed for another time than is due
	NotFreed  = "not freed"       // who had to free the key did not go on until it was free
	Shrunk    = "small record"    // a small record took the place of an answer too early, or without need
	GaveUp    = "gave up"         // a run stopped storing its answer before its time was over
	Lost      = "lost to nobody"  // a run was told that its lease is lost, and nobody can have taken it
	Forgotten = "forgotten"       // a stored answer was known, and later not
	Part      = "part"            // a whole body got the answer to a part of it
	Exposed   = "exposed"         // a run was unprotected without need, or beside one that its request was told of
	Code      = "unexpected code" // an error that nothing explains
	Outlived  = "outlived"        // a record was there when its TTL was over
	Torn      = "torn"            // of an answer and what is stored with it, one is there without the other
	Dropped   = "dropped"         // a process that was not killed gave a client no answer
	Stuck     = "stuck"           // no answer, though all faults are over
	Register  = "not linearizable"
	Unjudged  = "not judged" // the search for a linearization was given up
)

// A Violation is what must not be.
type Violation struct{ Kind, Key, Detail string }

func (v Violation) String() string { return v.Key + ": " + v.Kind + ": " + v.Detail }

// A Report is what Check found.
type Report struct {
	Violations []Violation
	Keys, Runs int
	Lives      int // of keys: one more for each time that a TTL ended
	Effects    int
	Answers    int // of handlers, to clients
	Replays    int
	Exposed    int // runs without a claim
	NotStored  int // requests that were told that the answer is not stored

	// Why runs of plain keys were followed by others. All of them are legal.
	AfterRelease, AfterLease int
	// Unkept counts answers that went out though the store had failed, as the
	// promise allows, and UnkeptRuns those after which another run came.
	Unkept, UnkeptRuns int
}

// Kinds returns the kinds of violations found, each once.
func (r *Report) Kinds() []string {
	var kinds []string
	for _, v := range r.Violations {
		kinds = append(kinds, v.Kind)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// tolerance is for the milliseconds that Redis counts in.
const tolerance = 5 * time.Millisecond

// Check judges a history. It takes nothing on trust that it can see for
// itself: a run that follows another needs evidence, in the ledger, of what
// allows it.
func Check(h History) *Report {
	report := &Report{}
	for _, c := range split(h) {
		c.report = report
		c.countKey()
		c.checkRuns()
		c.checkExposed()
		c.checkPairs()
		c.checkRenewals()
		c.checkAttempts()
		c.checkMarks()
		c.checkFreeing()
		c.checkAnswers()
		c.checkSweep()
		c.checkLives()
		c.checkKept()
		c.checkRegister()
	}
	return report
}

// A run is one call of a handler, as the ledger tells it.
type run struct {
	Row       // RowBegin
	life      int
	effects   int
	commits   *Row // the first RowCommits
	end       *Row
	renewals  []Row // that succeeded, of its visit
	completes []Row
	smalls    []Row // RowSmall

	stored   bool
	storedBy time.Duration // it was stored at this time at the latest
}

// final reports whether the run's answer says that the key is not to run again.
// It is Options.ShouldStore's default, and what Commit and Discard do to it.
func (r *run) final() bool {
	if r.end == nil || r.end.Panic {
		return false
	}
	if r.end.Committed {
		return true
	}
	if r.end.Discard {
		return false
	}
	if r.end.Cut {
		return r.end.Status < 400
	}
	switch r.end.Status {
	case 401, 403, 407, 408, 425, 429:
		return false
	}
	return r.end.Status < 500 || r.Kind == Once
}

// isOfPart reports whether a retry learns the status of the run and no more: its
// body broke off, and it says that it has done something.
func (r *run) isOfPart() bool {
	return r.end != nil && r.end.Cut && !r.end.Committed && r.final()
}

// committed returns when Commit had succeeded, as the handler was told. A mark
// whose answer was lost says nothing, even if a renewal learns of it.
func (r *run) committed() (at time.Duration, ok bool) {
	if r.commits == nil {
		return 0, false
	}
	return r.commits.At, true
}

// A checker judges one key.
type checker struct {
	key  string
	kind string
	*History
	ops      []Op
	rows     []Row
	runs     []*run
	exposed  []*run // without a claim; runs has none of them
	byID     map[string]*run
	lives    []life
	calls    []*claim
	claims   []*claim // of calls, those that may have given their visit the key
	releases []*release
	search   time.Duration // how long a linearization is searched for
	report   *Report

	visits    map[string]*run     // that have come to a run
	processes map[string]string   // of visits
	arrivals  map[string][]string // visits of requests
}

// atMostOnce reports whether an effect must not be repeated even when a process
// dies.
func (c *checker) atMostOnce() bool { return c.kind == Once || c.kind == Commit }

// isLarge reports whether the claim of a body does not say what the body is.
func (c *checker) isLarge() bool { return c.kind == Large || c.kind == Head || c.kind == Broken }

// split makes a checker for each key, in order of their names.
func split(h History) []*checker {
	keys := make(map[string]*checker)
	of := func(key, kind string) *checker {
		c := keys[key]
		if c == nil {
			c = &checker{
				key: key, kind: kind, History: &h, byID: make(map[string]*run), search: searchTime,
				visits: make(map[string]*run), processes: make(map[string]string), arrivals: make(map[string][]string),
			}
			keys[key] = c
		}
		return c
	}
	for _, op := range h.Ops {
		c := of(op.Key, op.Kind)
		c.ops = append(c.ops, op)
	}
	for _, row := range h.Rows {
		c := of(row.Key, row.Kind)
		c.rows = append(c.rows, row)
	}
	var list []*checker
	for _, c := range keys {
		c.index()
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *checker) int { return strings.Compare(a.key, b.key) })
	return list
}

// index makes runs of rows.
func (c *checker) index() {
	claims, releases, renewals := make(map[call]*claim), make(map[call]*release), make(map[string][]Row)
	slices.SortStableFunc(c.rows, func(a, b Row) int { return a.Seq - b.Seq })
	for _, row := range c.rows {
		r := c.visits[row.Visit]
		if _, ok := c.processes[row.Visit]; !ok && row.Visit != "" {
			c.processes[row.Visit] = row.Process
			c.arrivals[row.Op] = append(c.arrivals[row.Op], row.Visit)
		}
		c.indexCall(claims, releases, row)
		if row.Type == RowRenew && row.Err == "" { // of a mark, before the run
			renewals[row.Visit] = append(renewals[row.Visit], row)
		}
		c.indexRow(r, row)
	}
	for _, r := range c.runs {
		r.renewals = renewals[r.Visit]
	}
	c.indexClaims()
	for _, op := range c.ops {
		// A process may die before it can say that it has stored something.
		if r := c.byID[op.Run]; r != nil && op.Replayed {
			r.storedUntil(op.End)
		}
		if r := c.shrunkRun(op.End); r != nil && op.Code == notStored {
			r.storedUntil(op.End)
		}
	}
	c.indexLives()
}

// indexRow adds a row to the run that its visit has come to, or nil.
func (c *checker) indexRow(r *run, row Row) {
	switch {
	case row.Type == RowBegin:
		c.begin(row)
	case r == nil: // a claim that did not come to a run
	case row.Type == RowEffect:
		r.effects++
	case row.Type == RowCommits && r.commits == nil:
		r.commits = &row
	case row.Type == RowEnd:
		r.end = &row
	case row.Type == RowSmall:
		r.smalls = append(r.smalls, row)
	case row.Type == RowComplete:
		r.completes = append(r.completes, row)
		if row.Err == "" {
			r.storedUntil(row.Returned)
		}
	}
}

// begin notes a run. One without a claim is exposed.
func (c *checker) begin(row Row) {
	r := &run{Row: row}
	if row.Unprotected {
		c.exposed = append(c.exposed, r)
	} else {
		c.runs = append(c.runs, r)
	}
	c.visits[row.Visit], c.byID[row.Run] = r, r
}

func (r *run) storedUntil(t time.Duration) {
	if !r.stored || t < r.storedBy {
		r.stored, r.storedBy = true, t
	}
}

func (r *run) storedBefore(t time.Duration) bool { return r.stored && r.storedBy <= t }

func (c *checker) countKey() {
	c.report.Keys++
	c.report.Runs += len(c.runs)
	c.report.Exposed += len(c.exposed)
	for _, r := range c.runs {
		c.report.Effects += r.effects
	}
}

func (c *checker) violate(kind, format string, args ...any) {
	c.report.Violations = append(c.report.Violations, Violation{kind, c.key, fmt.Sprintf(format, args...)})
}

// storedRun returns the run whose answer is stored in a life of the key, or nil.
// checkAnswers finds it when there are several.
func (c *checker) storedRun(life int) *run {
	var first *run
	for _, r := range c.runs {
		if r.life == life && r.stored && (first == nil || r.storedBy < first.storedBy) {
			first = r
		}
	}
	return first
}

// Lines is the history of one key, for a person to read.
func (h History) Lines(key string) string {
	type line struct {
		at   time.Duration
		text string
	}
	var lines []line
	for _, op := range h.Ops {
		if op.Key == key {
			lines = append(lines, line{op.Start, op.String()})
		}
	}
	for _, row := range h.Rows {
		if row.Key == key {
			lines = append(lines, line{row.At, row.String()})
		}
	}
	slices.SortStableFunc(lines, func(a, b line) int { return int(a.at - b.at) })
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(l.text + "\n")
	}
	return b.String()
}
