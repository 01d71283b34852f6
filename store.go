package idempotency

import (
	"context"
	"errors"
	"strconv"
	"time"
)

// A Store keeps one cell per key. A cell is absent, claimed (a handler is
// running, or its process died), completed (a response is stored) or released
// (the key is free again; a marker remembers the token that freed it and how
// often it was claimed).
//
// All methods are atomic and safe for concurrent use. Durations are relative
// and judged by the store's own clock, never by the caller's. An expired cell
// is absent, and no cell expires before its lease. An error other than
// [ErrLeaseLost], [ErrRolledBack] and [ErrStoreFull] means that the store
// failed. It does not tell whether the operation took effect. A claim that
// meets another owner gets a [State], not an error. Methods must honour the
// deadline of their context: nothing else keeps a hanging store from hanging
// the request.
//
// A store copies the slices it keeps. The slices it returns are read-only and
// stay valid. Keys are compared byte by byte, case included. The keys of this
// package are base64url text of 27 bytes. A store takes any visible ASCII of up
// to 200 bytes as a key, and a fingerprint of up to 255 bytes.
//
// Package storetest checks an implementation against this contract.
type Store interface {
	// Acquire claims key for c.Token, or renews the claim of c.Token, or tells
	// why it cannot. A Claim with Attempt 0 is a claim; one with a positive
	// Attempt renews the attempt that it names. Acquire decides by the first
	// row that fits:
	//
	//	the cell                           a claim gets            a renewal gets
	//	absent                             Acquired, Attempt 1     Acquired, c.Attempt
	//	released under this token          Lost                    Lost
	//	released                           Acquired, Attempt + 1   Lost
	//	fingerprints known and different   Mismatch                Mismatch
	//	completed                          Completed, with Value   Lost
	//	claimed under this token,
	//	    the attempt is c.Attempt       -                       Acquired, same Attempt
	//	    any other attempt              Acquired, same Attempt  Lost
	//	claimed, lease running             InProgress, Remaining   Lost
	//	claimed with Once, lease over      Abandoned               Lost
	//	claimed, lease over                Acquired, Attempt + 1   Lost
	//
	// Acquired is the only answer that changes the cell. When the cell was
	// already claimed under this token, it keeps its fingerprint. Its lease and
	// TTL start again from now, even if the lease was over, and even if they
	// become shorter. Otherwise the cell becomes a claim without Once. It gets
	// the token, the fingerprint (even an empty one) and the attempt of the
	// answer. Either way it is kept for the longer of TTL and Lease. A
	// fingerprint is known when it is not empty.
	//
	// Only a renewal of a cell that is claimed under its token and attempt sets
	// Once, if c.Once is set. The Once of a claim is ignored. Nothing unsets
	// Once but the end of the claim (Complete, Release, or its expiry), and the
	// Forget of an [Inspector]. Record.Once tells what the cell has now. So a
	// command that is sent twice is harmless, and one that arrives after its
	// claim has ended holds a key for one lease at most.
	Acquire(ctx context.Context, key string, c Claim) (Record, error)

	// Complete stores r under token and keeps it for r.TTL. It writes when the
	// cell is claimed under token, whether or not the lease is over, and when
	// it is absent. A cell that was completed under token stays: Complete
	// returns nil and changes nothing, its TTL included. When the cell is
	// released or belongs to another owner, Complete changes nothing and
	// returns [ErrLeaseLost].
	Complete(ctx context.Context, key, token string, r Result) error

	// Release frees the cell when it is claimed under token, whether or not the
	// lease is over or Once is set. The cell is then released under token, with
	// its Attempt, for the time keep, which is more than zero. After a later
	// attempt than the first it is kept for what is left of its TTL, if that is
	// longer: the marker of an earlier attempt may stand for a run that got
	// somewhere, or for a mark that is still on its way. An absent cell
	// becomes released under token with Attempt 0, so that a delayed Acquire
	// finds the marker and claims nothing. A marker that is there already keeps
	// its time, whatever keep says. Every other cell stays as it is. In all
	// these cases Release returns nil.
	Release(ctx context.Context, key, token string, keep time.Duration) error
}

// A Watcher is a [Store] that can tell when a cell changes. It is optional and
// found by type assertion. Without it, waiting duplicates poll. The first pause
// is at most 25ms, and the pauses grow to at most one second.
type Watcher interface {
	// Watch returns a channel that is closed when the cell of key may have been
	// completed, released or forgotten ([Inspector]) since the call. A store
	// may tell only of cells that an Acquire since then has found InProgress.
	// It may also close the channel when nothing has changed, and correctness
	// does not depend on it. The watch ends with ctx. Watch must return
	// promptly. When it returns an error, the caller polls.
	Watch(ctx context.Context, key string) (<-chan struct{}, error)
}

// A Claim is what [Store.Acquire] writes. It may be copied; the copies share
// Fingerprint, which a store only reads. The zero Claim is invalid: it has no
// Token and no Lease.
type Claim struct {
	// Token names the owner. It is printable ASCII, random, and compared
	// verbatim.
	Token string

	// Fingerprint identifies the request. It is empty when it is not known yet.
	Fingerprint []byte

	// Lease is how long the claim holds unless it is renewed. TTL is how long
	// the cell is kept. Both count from when the store decides.
	Lease, TTL time.Duration

	// Attempt is 0 to claim the key. To renew a claim, it is the Attempt of the
	// Record that answered the claim.
	Attempt int

	// Once marks the claim as at-most-once: it is never taken over. Only a
	// renewal sets it.
	Once bool
}

// A Result is what [Store.Complete] writes. It may be copied; the copies share
// their slices, which a store only reads.
type Result struct {
	// Fingerprint replaces that of the claim, known or not.
	Fingerprint []byte

	// Value is opaque to the store.
	Value []byte

	// TTL is how long the cell is kept, from the call of Complete on.
	TTL time.Duration

	// parts follow Value. Only the stores of this package get them, which spares
	// a large response one copy: a MemoryStore keeps them as they are, and a
	// RedisStore copies them into the cell.
	parts [][]byte
}

// A Record is what [Store.Acquire] found. A field means something only in the
// State that its comment names. A Record may be copied; the copies share their
// slices, which are read-only. The zero Record is invalid.
type Record struct {
	State State

	// Attempt counts the claims of the key, renewals not included, from 1. It
	// starts anew when the cell was absent in between. Once says that the claim
	// is never taken over. Both are set when State is Acquired.
	Attempt int
	Once    bool

	// Fingerprint and Value are set when State is Completed.
	Fingerprint, Value []byte
	parts              [][]byte // follow Value

	// Remaining is the time until the running lease ends, more than zero. It is
	// set when State is InProgress.
	Remaining time.Duration
}

// A State is the answer of [Store.Acquire], or the state of a [Cell]. The zero
// State is no answer, so that the middleware notices a store that forgets to
// set it. A Cell has the zero State when nothing is there.
type State uint8

// The numbers are fixed: stores write them and compare them. Acquire does not
// answer with the last two, nor has a Cell the state Acquired, Mismatch or Lost.
const (
	_          State = iota
	Acquired         // the caller owns the key
	InProgress       // a lease is running, for Acquire another owner's
	Completed        // a result is stored
	Mismatch         // the cell belongs to a request with another fingerprint
	Abandoned        // the lease of a claim with Once is over
	Lost             // the token does not own the key any more
	Lapsed           // the lease of a claim without Once is over; the next claim takes it over
	Released         // the key is free, and a marker counts its attempts
)

// String returns the name of the constant.
func (s State) String() string {
	switch s {
	case Acquired:
		return "Acquired"
	case InProgress:
		return "InProgress"
	case Completed:
		return "Completed"
	case Mismatch:
		return "Mismatch"
	case Abandoned:
		return "Abandoned"
	case Lost:
		return "Lost"
	case Lapsed:
		return "Lapsed"
	case Released:
		return "Released"
	}
	return "State(" + strconv.Itoa(int(s)) + ")"
}

// Errors that stores return. They are matched with errors.Is, so a store may
// wrap them. Every other error is a failure of the store.
var (
	// ErrLeaseLost: the token does not own the key any more. It is also the
	// cause ([context.Cause]) of a handler's context that was cancelled for it.
	ErrLeaseLost = errors.New("idempotency: lease lost")

	// ErrRolledBack: Complete could not commit the transaction that the handler
	// attached, and nothing of it took effect. The handler's response is
	// dropped, and the key is freed unless Commit has marked it.
	ErrRolledBack = errors.New("idempotency: attached transaction rolled back")

	// ErrStoreFull: the store has no room for a key that it does not have.
	// Acquire returns it for a claim or a renewal of such a key, and has then
	// written nothing.
	ErrStoreFull = errors.New("idempotency: store is full")
)
