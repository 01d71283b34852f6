package idempotency

import (
	"context"
	"errors"
	"strconv"
	"time"
)

// A Store keeps one cell per key. A cell is absent, claimed (a handler is
// running, or died), completed (a response is stored) or released (free again,
// remembering who freed it and how often the key was claimed).
//
// All methods are atomic and safe for concurrent use. Durations are relative
// and judged by the store's own clock, never by the caller's. An expired cell
// is absent. A returned error means that the store failed, and says nothing
// about whether the operation took effect; contention is not an error but a
// [State]. Methods must honour the deadline of their context: it is the only
// thing that keeps a hanging store from hanging the request.
//
// A store copies the slices it keeps; the slices it returns are read-only and
// stay valid. Keys are compared byte by byte, case included. From this package
// they are 43 bytes of base64url; a store takes any visible ASCII of up to 200.
//
// Package storetest checks an implementation against this contract.
type Store interface {
	// Acquire claims key for c.Token or tells why it cannot. It decides, in
	// this order:
	//
	//	the cell                         answer                   change
	//	absent                           Acquired, Attempt 1      claim written
	//	released under this token        Lost                     none
	//	released                         Acquired, Attempt + 1    claimed, any fingerprint
	//	fingerprints known and different Mismatch                 none
	//	completed                        Completed, with Value    none
	//	claimed under this token         Acquired, same Attempt   renewed
	//	claimed, lease running           InProgress, Remaining    none
	//	claimed with Once, lease over    Abandoned                none
	//	claimed, lease over              Acquired, Attempt + 1    taken over
	//
	// A fingerprint is known when it is not empty. To claim is to write the
	// token, the fingerprint (even an empty one) and Once, to start the lease,
	// and to keep the cell for the longer of TTL and Lease. To renew is to
	// start both anew and to set Once if c.Once is set; Once is never unset
	// and the fingerprint stays. So a command that is sent twice is harmless,
	// and one that arrives after its claim was released resurrects nothing.
	Acquire(ctx context.Context, key string, c Claim) (Record, error)

	// Complete stores r under token and keeps it for r.TTL. It writes when the
	// cell is claimed under token, whether or not the lease is over, and when
	// it is absent. When the cell was completed under token it changes nothing
	// and returns nil. When the cell is another owner's or released it changes
	// nothing and returns [ErrLeaseLost], the one error that is not a failure.
	Complete(ctx context.Context, key, token string, r Result) error

	// Release frees the cell when it is claimed under token: it is then
	// released under token, with its Attempt, for as long as the lease of the
	// claim was. Where the cell is absent it is released under token with
	// Attempt 0 for 30 s, so that a delayed Acquire finds that and not nothing.
	// Everything else it leaves alone. Both cases return nil.
	Release(ctx context.Context, key, token string) error
}

// A Watcher is a [Store] that can tell when a cell changes. It is optional and
// found by type assertion: without it waiting duplicates poll.
type Watcher interface {
	// Watch returns a channel that is closed when the cell of key may have
	// been completed or released since the call. A store may tell only of
	// cells that an Acquire since then has found InProgress. The channel may be
	// closed for no reason, and correctness does not depend on it. The watch
	// ends with ctx. Watch must return promptly; when it returns an error, the
	// caller polls.
	Watch(ctx context.Context, key string) (<-chan struct{}, error)
}

// A Claim is what [Store.Acquire] writes.
type Claim struct {
	// Token names the owner. Printable ASCII, random, and compared verbatim.
	Token string

	// Fingerprint identifies the request. Empty when it is not known yet.
	Fingerprint []byte

	// Lease is how long the claim holds unless it is renewed. TTL is how long
	// the cell is kept.
	Lease, TTL time.Duration

	// Once forbids that the claim is ever taken over.
	Once bool
}

// A Result is what [Store.Complete] writes.
type Result struct {
	// Fingerprint replaces that of the claim, known or not.
	Fingerprint []byte

	// Value is opaque to the store.
	Value []byte

	// TTL is how long the cell is kept from now.
	TTL time.Duration

	// parts follow Value, for a MemoryStore, which keeps them as they are.
	parts [][]byte
}

// A Record is what [Store.Acquire] found.
type Record struct {
	State State

	// Attempt counts the claims of the key that were not renewals, from 1. It
	// is set when State is Acquired.
	Attempt int

	// Fingerprint and Value are set when State is Completed.
	Fingerprint, Value []byte
	parts              [][]byte // follow Value

	// Remaining is the time until the running lease ends, more than zero. It is
	// set when State is InProgress.
	Remaining time.Duration
}

// A State is the answer of [Store.Acquire]. The zero State is invalid.
type State uint8

const (
	_          State = iota
	Acquired         // the caller owns the key
	InProgress       // another owner's lease is running
	Completed        // a result is stored
	Mismatch         // the cell belongs to a request with another fingerprint
	Abandoned        // the owner of a Once claim was never heard of again
	Lost             // this very token has released the key
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
	}
	return "State(" + strconv.Itoa(int(s)) + ")"
}

// Errors that stores return.
var (
	// ErrLeaseLost: the key belongs to someone else by now. It is also the
	// cause of a handler's cancelled context when that is why.
	ErrLeaseLost = errors.New("idempotency: lease lost")

	// ErrRolledBack: Complete could not commit the transaction that the
	// handler attached, and nothing of it took effect. The handler's response
	// is then dropped and the key freed.
	ErrRolledBack = errors.New("idempotency: attached transaction rolled back")

	// ErrStoreFull: the store has no room for a new key.
	ErrStoreFull = errors.New("idempotency: store is full")
)
