package idempotency

import (
	"context"
	"log/slog"
	"net/http"
	"time"
)

// An Outcome says what became of a request. Those that are an answer of the
// middleware's own are named like the [Error.Code].
type Outcome string

const (
	OutcomeExecuted          Outcome = "executed"            // ran, and is not to run again
	OutcomeReleased          Outcome = "released"            // ran, answered that nothing was done, and freed the key
	OutcomeReplayed          Outcome = "replayed"            // answered with the stored response
	OutcomeInProgress        Outcome = "in_progress"         // another request with the key is running
	OutcomeKeyReused         Outcome = "key_reused"          // the key belongs to a different request
	OutcomeKeyMissing        Outcome = "key_missing"         // RequireKey
	OutcomeKeyInvalid        Outcome = "key_invalid"         // malformed
	OutcomeOutcomeUnknown    Outcome = "outcome_unknown"     // at-most-once, and the run died; or it ended without an answer
	OutcomeResponseNotStored Outcome = "response_not_stored" // a retry of what could not be kept
	OutcomeRecordUnreadable  Outcome = "record_unreadable"   // damaged, newer, or sealed under another key
	OutcomeBodyIncomplete    Outcome = "body_incomplete"     // broke off before the claim
	OutcomeBodyTooLarge      Outcome = "body_too_large"      // custom Fingerprint, or MaxBytesReader
	OutcomeStoreUnavailable  Outcome = "store_unavailable"   // failed before the handler ran, or rolled back
	OutcomeUnprotected       Outcome = "unprotected"         // FailOpen, and the store was down
	OutcomeLeaseLost         Outcome = "lease_lost"          // ran, but the key was taken over; its answer was dropped
	OutcomePanicked          Outcome = "panicked"            // left the handler by panic or runtime.Goexit
)

// An Event is what [Options.OnEvent] gets, one for each request.
type Event struct {
	Outcome Outcome

	// StoreKey names the cell. It is a hash, safe for logs; "" when the request
	// had no valid key.
	StoreKey string

	// Attempt is that of the execution. Zero: there was none.
	Attempt int

	// Status is what the client was sent; zero after a panic, and when the handler
	// ran unprotected.
	Status int

	// Duration is the time in the middleware and the handler. Waited is the
	// part of it spent waiting for another execution.
	Duration, Waited time.Duration

	// Err is why, when the outcome is not the usual one. For OutcomeExecuted it
	// is what kept the response from being stored.
	Err error

	// Request is the request as the middleware got it.
	Request *http.Request
}

// report emits the event of this request.
func (c *call) report(outcome Outcome, status int, err error) {
	if c.opts.OnEvent == nil {
		return
	}
	defer c.contain(c.r.Context(), "OnEvent")
	c.opts.OnEvent(c.r.Context(), Event{
		Outcome: outcome, StoreKey: c.storeKey, Attempt: c.execution.attempt, Status: status,
		Duration: time.Since(c.started), Waited: c.claim.waited, Err: err, Request: c.r,
	})
}

// contain keeps a panic in a callback from undoing a request that was answered.
// It is to be deferred.
func (m *middleware) contain(ctx context.Context, callback string) {
	if p := recover(); p != nil {
		m.opts.logger().LogAttrs(ctx, slog.LevelError, "idempotency: panic in "+callback, slog.Any("panic", p))
	}
}

// warn logs a failure. What a store says may be logged, but never sent.
func (m *middleware) warn(ctx context.Context, storeKey, msg string, err error) {
	m.opts.logger().LogAttrs(context.WithoutCancel(ctx), slog.LevelWarn, "idempotency: "+msg,
		slog.String("store_key", storeKey), slog.Any("error", err))
}
