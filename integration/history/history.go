// Package history says what clients and an effect ledger may see of a service
// behind the idempotency middleware, and finds what they may not see.
//
// A history is what happened in one run of the tests of the parent module: the
// requests that clients sent, as they saw them, and the rows that server
// processes wrote into a ledger outside of them. Check is a pure function of
// it, so a history that was found once can be judged again.
package history

import (
	"fmt"
	"time"
)

// Kinds of keys. Each has its own path.
const (
	Plain  = "plain"  // runs again when its process dies
	Once   = "once"   // Options.AtMostOnce
	Commit = "commit" // every handler calls Commit before its effect
	Large  = "large"  // like Plain, with bodies over Options.MaxBufferedBody
	Form   = "form"   // like Plain, with a form that has another boundary in each request
	Event  = "event"  // like Plain, and the key is in the body (Options.Key)
	Tenant = "tenant" // like Plain, with Options.Scope; two tenants use the same keys
	Head   = "head"   // like Large, streamed; the handler reads the payload alone, and what follows differs
	Broken = "broken" // like Large, and in some requests the body breaks off
	Open   = "open"   // like Plain, with Options.FailOpen
	Begin  = "begin"  // the effect is a row on a transaction that is committed with the answer
	Attach = "attach" // like Plain, with Execution.Attach
)

// An Op is one request of a client. Times are since the history began.
type Op struct {
	ID, Key, Kind, Payload, Replica string

	Start, End time.Duration

	// Err is why there is no whole answer. The client then knows nothing.
	Err string

	// HungUp says that the client gave up.
	HungUp bool

	Status   int
	Code     string // of the middleware's own answers
	Run      string // of the handler's: which run made it
	Hash     string // of the body
	Replayed bool

	// Sweep marks the requests at the end, when all faults are over.
	Sweep bool
}

// Types of rows.
const (
	RowClaim    = "claim"    // the store is about to be asked for the key, or to renew or mark a claim
	RowClaimed  = "claimed"  // what it said; RowRenew if a renewal succeeded
	RowBegin    = "begin"    // a handler has been called
	RowEffect   = "effect"   // it has done what must not be done twice
	RowCommit   = "commit"   // it is about to call Commit
	RowCommits  = "commits"  // Commit has returned nil
	RowEnd      = "end"      // it is about to return, or to panic
	RowRenew    = "renew"    // the store has renewed its claim
	RowSmall    = "small"    // the store is about to be told to keep a small record in the place of its answer
	RowComplete = "complete" // the store was told to keep its answer, or the small record
	RowRelease  = "release"  // the store is about to be told to free the key
	RowReleased = "released" // what it said
	RowKept     = "kept"     // in the end, of a row that a run wrote into the database
)

// A Row is a line of the ledger. Sent and Returned enclose the call of the
// store that the row is about; for RowBegin, all calls that may have made the
// claim. Processes share the clock of the machine.
type Row struct {
	Seq  int
	At   time.Duration // when the ledger had it
	Type string

	Key, Kind, Payload string

	Op      string // the request of the client
	Visit   string // its arrival at a process: Go's Transport may send it twice
	Process string
	Run     string // names one run of a handler; the ledger makes it
	Attempt int

	Sent, Returned time.Duration

	Call  int           // of RowClaim, RowRelease and what came of them: which call of the visit
	Asked int           // the attempt that a renewal names; 0 if it is a claim
	Once  bool          // of RowClaim: a mark, if it is a renewal; of its answer: the claim has Once
	State string        // of RowClaimed, if there is no Err
	Keep  time.Duration // of RowRelease: how long the marker is to be kept
	Err   string        // of RowClaimed, RowReleased and RowComplete; ErrLeaseLost, or anything else

	Unprotected bool // of RowBegin: the run has no claim (Options.FailOpen)

	RolledBack bool // of RowComplete: and so was what is attached

	Panic     bool // of RowEnd, like what follows
	Attached  bool // the answer is to be stored with an attachment, or not at all
	Cut       bool // the body has broken off under the handler
	Discard   bool
	Committed bool // Commit returned nil
	Status    int
	Hash      string
}

// ErrLeaseLost is the Err of a row for idempotency.ErrLeaseLost. All others
// leave open what became of the call.
const ErrLeaseLost = "lease lost"

// StateAcquired is the State of a row for idempotency.Acquired. All others say
// that the key was not given.
const StateAcquired = "acquired"

// A History is what Check judges. The store must not have lost any record.
type History struct {
	Lease, TTL, MaxExecution time.Duration // Options of all processes

	// NoneDied says that no process was killed and no handler panicked. Then
	// no outcome stays unknown.
	NoneDied bool

	// Killed says when processes were killed. They lived until then.
	Killed map[string]time.Duration

	// Stalled is how long the machine kept a process from running, at most.
	Stalled time.Duration

	// Stopped says when processes were stopped for a while.
	Stopped map[string][]Span

	Ops  []Op
	Rows []Row
}

// A Span is a time from its beginning to its end.
type Span struct{ From, To time.Duration }

// String is a line of a key's history.
func (o Op) String() string {
	answer := fmt.Sprintf("%d %s%s body %s", o.Status, o.Code, o.Run, o.Hash)
	if o.Err != "" {
		answer = "no answer: " + o.Err
	}
	if o.Replayed {
		answer += " (replayed)"
	}
	return fmt.Sprintf("%9.3f-%9.3f  op %s payload %s to %s: %s",
		o.Start.Seconds(), o.End.Seconds(), o.ID, o.Payload, o.Replica, answer)
}

// String is a line of a key's history.
func (r Row) String() string {
	s := fmt.Sprintf("%9.3f            %s %s visit %s of op %s attempt %d", r.At.Seconds(), r.Type, r.Run, r.Visit, r.Op, r.Attempt)
	if r.Returned > 0 {
		s += fmt.Sprintf(", store call %.3f-%.3f", r.Sent.Seconds(), r.Returned.Seconds())
	}
	switch {
	case r.Type == RowClaimed && r.Err == "":
		s += ", " + r.State
	case r.Type == RowClaim && r.Asked > 0:
		s += fmt.Sprintf(", a renewal of attempt %d, mark %t", r.Asked, r.Once)
	case r.Type == RowRelease:
		s += fmt.Sprintf(", marker for %v", r.Keep)
	case r.Type == RowBegin:
		s += fmt.Sprintf(", payload %s unprotected %t", r.Payload, r.Unprotected)
	case r.Type == RowEnd && r.Panic:
		s += ", panic"
	case r.Type == RowEnd:
		s += fmt.Sprintf(", status %d body %s discard %t committed %t cut %t attached %t",
			r.Status, r.Hash, r.Discard, r.Committed, r.Cut, r.Attached)
	case r.Err != "":
		s += ", error: " + r.Err
	case r.Once:
		s += ", once"
	}
	return s
}
