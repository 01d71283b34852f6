package idempotency

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Errors that a client can get in the place of its answer. [Error.Err] matches
// one of these with [errors.Is]; where there is a cause it wraps that as well.
var (
	// ErrKeyMissing: 400, RequireKey is set and the request has no key.
	ErrKeyMissing = errors.New("idempotency: key missing")

	// ErrKeyInvalid: 400, the header is empty, repeated, too long, malformed,
	// or refused by ValidateKey. With Options.Key: Key returned an error or a
	// key that is too long.
	ErrKeyInvalid = errors.New("idempotency: key invalid")

	// ErrKeyReused: 422, a request with another query, body, Content-Type,
	// precondition, header of FingerprintHeaders or other credentials came
	// before under the key.
	ErrKeyReused = errors.New("idempotency: key reused for a different request")

	// ErrInProgress: 409, another request with the key is still running, or
	// took over the key while this one ran.
	ErrInProgress = errors.New("idempotency: request in progress")

	// ErrOutcomeUnknown: 409, the run of an at-most-once key never reported how
	// it ended, or a handler returned without an answer after its context had
	// ended. The handler does not run again.
	ErrOutcomeUnknown = errors.New("idempotency: outcome unknown")

	// ErrResponseNotStored: 409, the handler ran, but its response could not be
	// kept. Error.OriginalStatus is the status of that response, if it is known.
	ErrResponseNotStored = errors.New("idempotency: response not stored")

	// ErrRecordUnreadable: 500, the stored response is damaged, was written by
	// a newer release, or is sealed under another AEAD key.
	ErrRecordUnreadable = errors.New("idempotency: stored record unreadable")

	// ErrBodyIncomplete: 400, the request body broke off. The handler did not
	// run, because the middleware could not tell the request from others under
	// the key, or could not ask Options.Key for its key. Or the handler ran,
	// met the break in a large body and returned without an answer. The status
	// is 500 when outer middleware has parsed a form and one of its files
	// cannot be read again: the client has sent all of it.
	ErrBodyIncomplete = errors.New("idempotency: request body incomplete")

	// ErrBodyTooLarge: 413, the request body is over MaxBufferedBody and a
	// custom Fingerprint needs all of it, or an outer http.MaxBytesReader
	// refused it.
	ErrBodyTooLarge = errors.New("idempotency: request body too large")

	// ErrStoreUnavailable: 503, the store failed before the handler ran, or did
	// not commit the transaction that the handler attached. Or the handler
	// returned without an answer after its context had ended, and what it did
	// was discarded or rolled back.
	ErrStoreUnavailable = errors.New("idempotency: store unavailable")
)

// An Error is an answer of the middleware's own, and the middleware makes it.
// [Options.ErrorHandler] receives it, and must not change it: the [Event] of
// the request carries the same one. The zero Error is of no use: it has no Err,
// so its Error method panics.
type Error struct {
	// Status is the HTTP status.
	Status int

	// Code is stable snake_case for programs, one for each sentinel.
	Code string

	// Detail is a sentence for a person. It never contains what a store said.
	// For key_invalid it may be the text of ValidateKey or Key.
	Detail string

	// Type is Options.DocsURL, or about:blank.
	Type string

	// RetryAfter is when the client may try again, from now. [WriteError]
	// rounds it up to whole seconds. Zero: no advice.
	RetryAfter time.Duration

	// Retryable tells a program that the same request may succeed later, with
	// the same key. It is true for in_progress, store_unavailable and
	// body_incomplete.
	Retryable bool

	// OriginalStatus is the HTTP status of a response that was not stored.
	// Zero: there is none, or it was written around the middleware and is not
	// known.
	OriginalStatus int

	// Err is the sentinel, or wraps it together with the cause. It is for logs,
	// not for clients: the cause may hold what a store said.
	Err error
}

// Error returns what Err says.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// problem is what clients see of one sentinel. The first three titles are those
// of draft-ietf-httpapi-idempotency-key-header, "Error Scenarios". In a detail,
// "{key}" stands for what the client knows the key as: the name of its header.
type problem struct {
	err        error
	status     int
	code       string
	title      string
	detail     string
	retryAfter time.Duration
	retryable  bool
}

// problems are all of them. A new sentinel needs a row, or middleware.problem
// panics.
var problems = []problem{
	{err: ErrKeyMissing, status: http.StatusBadRequest, code: "key_missing",
		title:  "Idempotency-Key is missing",
		detail: "The request has no {key}, which this operation requires."},
	{err: ErrKeyReused, status: http.StatusUnprocessableEntity, code: "key_reused",
		title:  "Idempotency-Key is already used",
		detail: "Another request came before under this {key}, and it may have succeeded."},
	{err: ErrInProgress, status: http.StatusConflict, code: "in_progress",
		title:      "A request is outstanding for this Idempotency-Key",
		detail:     "A request with this {key} is still being processed. Repeat it later with the same key.",
		retryAfter: time.Second, retryable: true},
	{err: ErrKeyInvalid, status: http.StatusBadRequest, code: "key_invalid",
		title:  "Idempotency-Key is invalid",
		detail: "This {key} is not valid."},
	{err: ErrOutcomeUnknown, status: http.StatusConflict, code: "outcome_unknown",
		title: "The outcome of this request is unknown",
		detail: "A request with this {key} was started and never reported its outcome. It is not repeated. " +
			"Find out what happened before using a new key."},
	{err: ErrResponseNotStored, status: http.StatusConflict, code: "response_not_stored",
		title:  "The response to this request was not stored",
		detail: "The request with this {key} was processed and is not repeated, but its response could not be kept."},
	{err: ErrRecordUnreadable, status: http.StatusInternalServerError, code: "record_unreadable",
		title:  "The stored response is unreadable",
		detail: "The request with this {key} was processed and is not repeated, but its stored response cannot be read."},
	{err: ErrBodyIncomplete, status: http.StatusBadRequest, code: "body_incomplete",
		title:     "The request body is incomplete",
		detail:    "The request body broke off. This attempt was not processed. Repeat the request with the same key.",
		retryable: true},
	{err: ErrBodyTooLarge, status: http.StatusRequestEntityTooLarge, code: "body_too_large",
		title:  "The request body is too large",
		detail: "The request body is larger than this operation accepts. This attempt was not processed."},
	{err: ErrStoreUnavailable, status: http.StatusServiceUnavailable, code: "store_unavailable",
		title: "The idempotency store is unavailable",
		detail: "This attempt was not processed, because it could not be protected against being processed twice. " +
			"Repeat it later with the same key.",
		retryAfter: time.Second, retryable: true},
}

// problem returns the Error for one of the sentinels above. The cause is for
// logs and errors.Is only.
func (m *middleware) problem(sentinel, cause error) *Error {
	for _, p := range problems {
		if !errors.Is(sentinel, p.err) {
			continue
		}
		e := &Error{
			Status: p.status, Code: p.code, Detail: strings.ReplaceAll(p.detail, "{key}", m.keyName()),
			Type: m.opts.DocsURL, RetryAfter: p.retryAfter, Retryable: p.retryable, Err: sentinel,
		}
		if e.Type == "" {
			e.Type = "about:blank"
		}
		if cause != nil {
			e.Err = fmt.Errorf("%w: %w", sentinel, cause)
		}
		return e
	}
	panic("idempotency: no problem for " + sentinel.Error())
}

// keyName is what clients know the key as. With Options.Key it is in no header
// that this package knows of.
func (m *middleware) keyName() string {
	if m.opts.Key != nil {
		return "idempotency key"
	}
	return m.opts.Header
}

// reusedAdvice ends the detail of a 422. Its reader is the client, who is tempted
// to send the request once more under a new key.
const reusedAdvice = " To get the answer to the first request, repeat it exactly as it was. " +
	"If you cannot, because a token was refreshed, say, find out in another way what became of it. " +
	"A new key is right only for a new operation: the same operation under a new key may be done twice."

// reused is the answer to a request that differs from the one before it under
// the key. It is written for the client, and names what may differ: what the
// options count, and credentials only where no scope says whose request it is.
func (q *request) reused() *Error {
	var parts []string
	if q.opts.Fingerprint == nil {
		parts = append(parts, "query", "body", "Content-Type")
	} else {
		parts = append(parts, "the content that this operation compares")
	}
	if q.scope == "" {
		parts = append(parts, "credentials (Authorization, Cookie)")
	}
	for _, name := range q.opts.FingerprintHeaders {
		if !slices.Contains(preconditions, name) {
			parts = append(parts, name)
		}
	}
	err := q.problem(ErrKeyReused, nil)
	err.Detail += " The two differ in at least one of: " + strings.Join(parts, ", ") +
		", preconditions (" + strings.Join(preconditions, ", ") + ")." + reusedAdvice
	return err
}

// isLinkTarget reports whether s can stand in the angle brackets of a Link
// header (RFC 8288, section 3). A character outside of it could end the header
// or begin another parameter.
func isLinkTarget(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '<' || c == '>' || c == '"' {
			return false
		}
	}
	return true
}

// WriteError writes err as a problem of RFC 9457 (application/problem+json)
// with the members code, retryable and, where there is one, original_status. It
// sets Cache-Control: no-store, Content-Language: en and
// X-Content-Type-Options: nosniff, Retry-After in seconds when RetryAfter is
// not zero, and a Link header when Type is a URL. It is the default
// [Options.ErrorHandler], and a custom one may call it for the errors that it
// does not write itself. It panics as WriteHeader does when Status is not an
// HTTP status, as in the zero Error.
func WriteError(w http.ResponseWriter, _ *http.Request, err *Error) {
	body := struct {
		Type           string `json:"type"`
		Title          string `json:"title"`
		Status         int    `json:"status"`
		Detail         string `json:"detail,omitempty"`
		Code           string `json:"code"`
		Retryable      bool   `json:"retryable"`
		OriginalStatus int    `json:"original_status,omitempty"`
	}{
		Type: err.Type, Title: http.StatusText(err.Status), Status: err.Status, Detail: err.Detail,
		Code: err.Code, Retryable: err.Retryable, OriginalStatus: err.OriginalStatus,
	}
	for _, p := range problems {
		if p.code == err.Code {
			body.Title = p.title
		}
	}
	// Strings and numbers always marshal; invalid UTF-8 becomes U+FFFD.
	b, _ := json.Marshal(body)

	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Del("Content-Length") // of whatever was meant to be sent instead
	h.Set("Content-Language", "en")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if err.RetryAfter > 0 {
		seconds := (err.RetryAfter-1)/time.Second + 1
		h.Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	if err.Type != "" && err.Type != "about:blank" && isLinkTarget(err.Type) {
		h.Add("Link", "<"+err.Type+`>; rel="describedby"`)
	}
	w.WriteHeader(err.Status)
	// A failed write means that the client is gone.
	_, _ = w.Write(append(b, '\n'))
}
