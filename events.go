package idempotency

import (
	"context"
	"log/slog"
	"net/http"
	"time"
)

// An Outcome says what became of a request. When the handler did not run and
// the middleware answered with an error of its own, it is the [Error.Code].
type Outcome string

const (
	OutcomeExecuted          Outcome = "executed"            // ran, and is not to run again
	OutcomeReleased          Outcome = "released"            // ran, and freed the key
	OutcomeReplayed          Outcome = "replayed"            // answered with the stored response
	OutcomeInProgress        Outcome = "in_progress"         // another request with the key is running
	OutcomeKeyReused         Outcome = "key_reused"          // the key belongs to a different request
	OutcomeKeyMissing        Outcome = "key_missing"         // RequireKey, and the request has none
	OutcomeKeyInvalid        Outcome = "key_invalid"         // malformed, or refused by ValidateKey
	OutcomeOutcomeUnknown    Outcome = "outcome_unknown"     // at-most-once, and the run died; or it ended without an answer
	OutcomeResponseNotStored Outcome = "response_not_stored" // a retry of what could not be kept
	OutcomeRecordUnreadable  Outcome = "record_unreadable"   // damaged, newer, or sealed under another key
	OutcomeBodyIncomplete    Outcome = "body_incomplete"     // broke off before the handler could run
	OutcomeBodyTooLarge      Outcome = "body_too_large"      // custom Fingerprint, or MaxBytesReader
	OutcomeStoreUnavailable  Outcome = "store_unavailable"   // failed before the handler ran, or did not commit what it attached
	OutcomeUnprotected       Outcome = "unprotected"         // FailOpen, and the store was down or full
	OutcomeLeaseLost         Outcome = "lease_lost"          // ran, but its lease was over or taken over; its answer was dropped
	OutcomePanicked          Outcome = "panicked"            // left the handler by panic or runtime.Goexit
)

// An Event is what [Options.OnEvent] gets, one for each request. It may be
// copied.
type Event struct {
	// Outcome says what became of the request.
	Outcome Outcome

	// StoreKey names the cell in the store. It is a hash, safe for logs. It is
	// "" when the request had no valid key.
	StoreKey string

	// Attempt is that of the execution, from 1. Zero: the handler did not run.
	Attempt int

	// Status is the HTTP status of the answer. For an answer of the
	// middleware's own it is that of the Error, even if Options.ErrorHandler
	// has sent another. It is zero after a panic, and when the handler ran
	// unprotected, where the response is not recorded.
	Status int

	// Duration is the time in the middleware and the handler. Waited is the
	// part of it that the request spent waiting for another execution.
	Duration, Waited time.Duration

	// Err is the cause when the outcome is not the usual one. It matches the
	// sentinels with errors.Is. For OutcomeExecuted it tells why the response
	// is not stored, or not yet. It may hold what a store said, so it is for
	// logs.
	Err error

	// Request is the request as the middleware got it. When the handler ran, it
	// has the Pattern that the handler's router found. It belongs to the server,
	// so it is valid only during the call of OnEvent.
	Request *http.Request
}

// report emits the event of this request. The duration is read only when
// OnEvent is set: reading the clock twice would be a measurable part of a
// replay from memory.
func (c *call) report(outcome Outcome, status int, err error) {
	if c.opts.OnEvent == nil {
		return
	}
	defer c.contain(c.r.Context(), c.storeKey, "OnEvent")
	c.opts.OnEvent(c.r.Context(), Event{
		Outcome: outcome, StoreKey: c.storeKey, Attempt: c.execution.attempt, Status: status,
		Duration: time.Since(c.started), Waited: c.claim.waited, Err: err, Request: c.r,
	})
}

// contain is deferred around a callback. A panic in a callback must not undo a
// request whose handler has run: it would look like a crash of the handler, and
// a retry would run it again.
func (m *middleware) contain(ctx context.Context, storeKey, callback string) {
	if p := recover(); p != nil {
		m.log(ctx, slog.LevelError, "panic in "+callback, slog.String("store_key", storeKey), slog.Any("panic", p))
	}
}

// warn logs a failure. What a store says may be logged, but never sent to a
// client.
func (m *middleware) warn(ctx context.Context, storeKey, msg string, err error) {
	m.log(ctx, slog.LevelWarn, msg, slog.String("store_key", storeKey), slog.Any("error", err))
}

// mistake logs that a program is put together in a way in which retries do not
// get the response. status is what the client gets.
func (m *middleware) mistake(ctx context.Context, storeKey, msg string, status int) {
	m.log(ctx, slog.LevelError, msg+", see docs/frameworks.md", slog.String("store_key", storeKey), slog.Int("status", status))
}

// log writes a line. The client's cancellation is taken off the context, for a
// log handler that honours it would drop the lines about clients that hung up.
//
// A panic of the log is dropped. The handler may have run and its response not
// be stored yet. On the goroutine of a timer, the panic would end the process.
func (m *middleware) log(ctx context.Context, level slog.Level, msg string, attrs ...slog.Attr) {
	defer func() { _ = recover() }()
	m.opts.logger().LogAttrs(context.WithoutCancel(ctx), level, "idempotency: "+msg, attrs...)
}
