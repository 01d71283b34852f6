package idempotency

import (
	"context"
	"crypto/cipher"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// An Inspector is a [Store] that an operator can look into. It is optional and
// found by type assertion; the middleware does not use it. [MemoryStore],
// [RedisStore] and the store of module postgres are Inspectors. Both methods
// are atomic and safe for concurrent use, and honour the deadline of their
// context.
//
// The key is a store key. [StoreKey] derives it from what a client sent, and
// [Event] and the log of the middleware have it.
type Inspector interface {
	// Inspect returns the cell of key. It changes nothing: no lease and no TTL
	// begins anew. An error means that the store failed, or that what it keeps
	// under the key is no cell. When nothing is there, Inspect returns the zero
	// Cell and no error.
	Inspect(ctx context.Context, key string) (Cell, error)

	// Forget lets the handler run again under key, for a request of any
	// content. It is for an operator who has found out by other means what
	// became of the last run.
	//
	// seen is the Cell of that run, as the operator has inspected it. Forget
	// does nothing and returns [ErrInProgress] while a lease is running, also
	// that of a claim with Once. It does nothing and returns [ErrCellChanged]
	// when the owner, the state or the attempt is no longer that of seen:
	// another run has come since, whose outcome the operator does not know, or
	// the old one has reported after all. Every other error means that the
	// store failed, and does not tell whether the operation took effect.
	//
	// What the cell becomes depends on what it is:
	//
	//	nothing there          stays
	//	Released               stays: the key is free already
	//	Lapsed, Abandoned      Lapsed, without Once and without a fingerprint
	//	Completed              Released, so that the next claim gets Attempt 2 or more
	//
	// The cell is not deleted, for three reasons. Attempts go on counting, so
	// that the next run can tell that it is not the first: a handler that asks
	// its provider before it charges goes by Execution.Attempt. A delayed
	// renewal of a run that has ended brings nothing back. And a claim stays
	// open to its owner: a process that was thought dead, and was only stopped,
	// may still finish. Its answer is then stored if no other run has begun,
	// and replayed, so that the handler does not run a second time. If another
	// run has begun, the answer of the first comes too late and is dropped, as
	// after any take-over. So an operator should make sure that the process is
	// gone before the key is forgotten.
	//
	// The next run gets the same Execution.DownstreamKey, so a provider that has
	// seen it answers as it did before.
	//
	// A cell that is kept is kept for at least the rest of its TTL. A store that
	// is a [Watcher] tells those who watch the key.
	Forget(ctx context.Context, key string, seen Cell) error
}

// ErrCellChanged: the cell is no longer the one that the operator has seen.
// [Inspector] returns it from Forget, which has then done nothing. Inspect the
// cell again. A client of the store that sends Forget a second time, because the
// first answer was lost, finds what the first one has changed.
var ErrCellChanged = errors.New("idempotency: the cell has changed since it was inspected")

// A Cell is what a [Store] keeps under a key, as [Inspector] shows it. A Cell
// may be copied; the copies share their slices, which are read-only. The zero
// Cell says that nothing is there.
type Cell struct {
	// State is InProgress, Lapsed, Abandoned, Completed, Released, or 0 when
	// nothing is there.
	State State

	// Attempt counts the claims of the key, from 1. It is 0 when State is
	// Completed: stores need not keep it. It may be 0 when State is Released,
	// when a key was freed before it was claimed.
	Attempt int

	// Once says that the claim is at-most-once: it is never taken over. It is
	// set when State is Abandoned, and may be set when State is InProgress.
	Once bool

	// Owner names the request that claimed, completed or released the cell. Its
	// text means nothing but to the Forget of the same store, and two requests
	// never have the same. It is empty after Forget of a completed cell.
	Owner string

	// Lease is how long the lease still runs: more than zero when State is
	// InProgress, else zero. TTL is how long the cell is still kept: more than
	// zero unless nothing is there. Both are the store's own measure. An owner
	// starts the TTL anew with each renewal, and with its result. So the TTL of
	// [Options] less this one is how long ago that was.
	Lease, TTL time.Duration

	// Fingerprint identifies the request. It is empty when it is not known, and
	// may be when State is Released.
	Fingerprint []byte

	// Value is what Complete has stored, when State is Completed. Response
	// opens it.
	Value []byte
}

// A StoredResponse is the stored outcome of a run, opened for an operator. It
// may be copied; the copies share what it holds.
type StoredResponse struct {
	// Outcome is what a retry of the same request comes to. OutcomeReplayed: it
	// gets the response. OutcomeResponseNotStored: the handler answered, but
	// the response could not be kept. OutcomeOutcomeUnknown: the handler gave
	// no answer.
	Outcome Outcome

	// Status is the HTTP status of the answer. It is 0 for
	// OutcomeOutcomeUnknown.
	Status int

	// Header is what the handler made of the header, and Trailer of the
	// trailers. They are the differences from what outer middleware had set: a
	// replay adds them to what outer middleware sets for that request (a
	// request id, CORS), which is not stored. A header that the handler deleted
	// is not shown, nor are those that Options.ReplayHeader leaves out. Both
	// are empty unless Outcome is OutcomeReplayed.
	Header, Trailer http.Header

	// Body is the whole body, as it was written. It is read-only, and empty
	// unless Outcome is OutcomeReplayed.
	Body []byte
}

// Response opens the stored outcome of a completed cell. aead is
// [Options.AEAD], nil if the service has none. storeKey is the key that the
// cell was inspected with: a sealed response is bound to it.
//
// The error matches [ErrRecordUnreadable] when the record is damaged, was
// written by a newer release, or is sealed under another key. It also does when
// only one of record and caller has an AEAD. A cell that is not Completed has
// no response, which is an error of another kind.
func (c Cell) Response(storeKey string, aead cipher.AEAD) (*StoredResponse, error) {
	if c.State != Completed {
		return nil, fmt.Errorf("idempotency: only a cell that is Completed has a response, and this is %v", c.State)
	}
	var text strings.Builder
	stored, err := decodeResponse(aead, storeKey, Record{Fingerprint: c.Fingerprint, Value: c.Value}, &text, nil)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrRecordUnreadable, err)
	case stored.unknown:
		return &StoredResponse{Outcome: OutcomeOutcomeUnknown}, nil
	case stored.notStored:
		return &StoredResponse{Outcome: OutcomeResponseNotStored, Status: stored.status}, nil
	}
	resp := &StoredResponse{
		Outcome: OutcomeReplayed, Status: stored.status, Body: stored.body,
		Header: make(http.Header), Trailer: make(http.Header),
	}
	applyFields(resp.Header, stored.fields)
	for _, f := range stored.trailers {
		f.name = strings.TrimPrefix(f.name, http.TrailerPrefix)
		f.apply(resp.Trailer)
	}
	return resp, nil
}

// StoreKey returns the store key of a client's key: the cell that a [Store]
// keeps for it. It is the derivation of the middleware itself.
//
//   - scope is what [Options.Scope] returned for the client; "" without one.
//   - method is the HTTP method, in any case.
//   - path is the path as the client sent it, before a mux or
//     [http.StripPrefix] changed it. It may be copied from an access log as it
//     is: a query and the scheme and host of an absolute URL do not count, and
//     spellings that are equivalent (RFC 3986, section 6.2.2) are one.
//   - key is the client's key, unquoted, as [Execution.Key] returns it. It is
//     taken verbatim. A client may send it as a quoted string ("order-17", with
//     the quotes); those quotes are no part of the key.
//
// A path that differs by as little as a slash at its end names another cell,
// which is empty. So an operator who finds nothing checks all four.
func StoreKey(scope, method, path, key string) string {
	path, _ = splitTarget(path)
	sum := hashKey(nil, scope, method, path, key)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
