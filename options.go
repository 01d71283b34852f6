package idempotency

import (
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// NoWait as [Options.Wait] answers a duplicate at once. It is the only negative
// Wait that is valid.
const NoWait time.Duration = -1

// Options configure [Middleware]. A nil *Options and the zero Options mean all
// defaults, and a zero field means the default of that field. Options may be
// copied. Middleware copies them, so a later change has no effect. Middleware
// panics when a field is invalid. The functions in Options must be safe for
// concurrent use.
type Options struct {
	// TTL is how long a stored response is replayed, from the end of the
	// handler on. Default 24h; 100 years at most.
	//
	// TTL is also how long the store remembers a run that freed its key and may
	// have got somewhere: [Execution.Attempt] is over 1 for TTL after a 5xx, a
	// body that broke off or no answer. After a first run whose answer says
	// that nothing was done, it is over 1 for one Lease only, so that a flood
	// of refused requests does not fill the store. With AtMostOnce it is over 1
	// for TTL then too.
	TTL time.Duration

	// Lease is how long a claim outlives a process that died: the time until a
	// retry may run the handler again. While the handler runs, it is renewed
	// every third of Lease. Default 30s, or TTL if that is less; 1ms at least.
	// It must not exceed TTL.
	//
	// A command that reaches the store late, after its claim has ended, holds a
	// key for one Lease at most, while the store keeps its records.
	Lease time.Duration

	// Wait is how long a duplicate waits for the running execution before it is
	// answered 409 in_progress. Default 5s. [NoWait] answers at once.
	Wait time.Duration

	// MaxWaiting is how many duplicates may wait at a time in this middleware,
	// those of all keys together. One more is answered 409 in_progress at once,
	// with Retry-After, and Event.Err says why. Default 1000. It must not be
	// negative: NoWait is for a service whose duplicates do not wait.
	//
	// A duplicate that waits holds its connection, a goroutine and its body up
	// to MaxBufferedBody, because its handler needs the body if the running
	// execution dies. Requests of one key with the same bytes share one copy of
	// a body over 64 KiB, so a thousand duplicates of 1 MiB hold 1 MiB, not
	// 1 GiB. Requests with other bytes, such as a form with a new multipart
	// boundary, hold a body each. The most that waiting duplicates hold in all
	// is therefore MaxWaiting times MaxBufferedBody.
	MaxWaiting int

	// MaxExecution is the time after which the lease of a running handler is no
	// longer renewed and its context is cancelled. A handler that goes on runs
	// under the rest of its lease. After that a retry may run beside it, unless
	// the key is at-most-once. Default 10m.
	//
	// It is also how long, after the lease, the middleware goes on in the
	// background with what the store did not answer: storing the response of a
	// handler that has finished, and releasing a key whose at-most-once mark
	// may have been set.
	MaxExecution time.Duration

	// StoreTimeout is the total time for a store operation, its repetition
	// included. The first try gets half of it, so that a try whose answer was
	// lost leaves time for another. Default 1s, or a third of Lease if that is
	// less. It must not exceed half of Lease, or a renewal could come too late.
	StoreTimeout time.Duration

	// Header is the request header that carries the key. Names are compared
	// without regard to case, and errors name the header as it is written here.
	// Default "Idempotency-Key", the header of
	// draft-ietf-httpapi-idempotency-key-header.
	Header string

	// Key says what the key of a request is, in the place of Header, which is
	// then not read. It is for webhooks, whose event id is in the body, and is
	// called for every request with an eligible method, before anything else is
	// done.
	//
	// Key gets the body, or nil if that is over MaxBufferedBody; it may then
	// look at a header. It must not read r.Body or parse a form of r, and must
	// not change or keep body. It returns 1 to 255 bytes of any kind. "" means
	// that the request has no key: it passes through with its body whole, or is
	// answered 400 key_missing with RequireKey. An error is answered 400
	// key_invalid, and its text is shown to the client. So is a longer key.
	// Before Key is called, a body that breaks off is answered 400
	// body_incomplete, even if the request has no key.
	//
	// Every client that can send a key can occupy it. So check the signature of
	// a webhook in Key, or in middleware outside of this one. A handler that
	// refuses a forged event with 400 is too late: that answer is stored under
	// the id of the true event. If the sender changes the body between two
	// tries, as Stripe may do with pending_webhooks, set Fingerprint to what
	// stays.
	//
	// Default nil: the key is in Header.
	Key func(r *http.Request, body []byte) (string, error)

	// Methods are the eligible methods, in upper case; all others pass through.
	// Methods of requests are compared without regard to case, and "patch" names
	// the same cell as "PATCH".
	// Default POST, PUT, PATCH, DELETE. GET, HEAD, OPTIONS, TRACE and CONNECT
	// cannot be eligible: they need no key.
	Methods []string

	// RequireKey answers 400 key_missing to an eligible request without a key.
	// Default false: such a request passes through unprotected.
	RequireKey bool

	// ValidateKey is an extra rule for keys, UUIDs only, say. It sees the key
	// unquoted, after the rule that always holds: 1 to 255 bytes of printable
	// ASCII, or of any kind if it comes from Key. The text of its error is shown
	// to the client, with 400 key_invalid. Default nil: no extra rule.
	ValidateKey func(key string) error

	// Scope says whose key it is: the tenant or the user that an outer
	// middleware authenticated. Equal keys of different scopes are different
	// keys.
	//
	// Default nil. Then all clients share one space of keys, and the
	// Authorization and Cookie headers are part of the fingerprint instead. The
	// same holds for a request for which Scope returns "". A client that learns
	// the key of another client then gets 422 and never the stored response.
	// But a key belongs to the client that sends it first. If this middleware is
	// outside of authentication, a stranger without credentials can occupy keys.
	// And a client whose credentials changed between two tries gets 422 too. So
	// a service needs a Scope if its credentials change with every request
	// (signed requests, rotating tokens, rolling cookies), or if it tells its
	// clients apart in another way (client certificates, say; for an API key in
	// a header of its own, FingerprintHeaders is enough).
	//
	// The host is not part of a key. A service for which it matters puts r.Host
	// into the scope.
	//
	// Scope may parse a form of r. With Key it gets a copy of the request, and
	// cannot read a body over MaxBufferedBody.
	//
	// A change of Scope forgets all keys: a retry of a finished request then
	// runs again. A service makes the change on new paths, or while no client
	// retries.
	Scope func(r *http.Request) string

	// FingerprintHeaders are further request headers that a retry must repeat,
	// with the same values: one that says what the request is about (a tenant,
	// an account), or who sends it (an API key). A retry in which one of them
	// differs is answered 422. Names are compared without regard to case.
	//
	// Default nil: no further ones. Authorization and Cookie count where there
	// is no Scope. If-Match, If-None-Match, If-Modified-Since and
	// If-Unmodified-Since always count, because a client that corrects a
	// precondition sends another request. All of these count with a custom
	// Fingerprint too.
	FingerprintHeaders []string

	// Fingerprint replaces the query, the Content-Type and the body in what
	// tells two requests under one key apart. A retry of a request that was
	// stored under another Fingerprint is answered 422. Fingerprint must not
	// read r.Body, which was read into body, and must not keep body. With it, a
	// body over MaxBufferedBody is answered 413. It gets a multipart body as it
	// came, with its boundaries, and nothing of a form that outer middleware has
	// parsed.
	//
	// Default nil: query, Content-Type and body count, byte by byte. There are
	// two exceptions. In a multipart body, the boundary (RFC 2046, section
	// 5.1.1) does not count: many clients pick another one for every try. Names,
	// headers, contents and the order of parts count. The boundary does count
	// when the Content-Type leaves doubt about it, or when the body is not
	// exactly what an encoder writes, with the boundary within a part, say, or
	// has more than 10,000 parts.
	//
	// When outer middleware has parsed a form (ParseForm, ParseMultipartForm,
	// PostFormValue), what it parsed counts in the place of the body: values,
	// and the names, headers and contents of files. The files are read once
	// more. If one cannot be read, the request is answered 500 body_incomplete.
	// Parts that outer middleware took with MultipartReader cannot be seen.
	Fingerprint func(r *http.Request, body []byte) []byte

	// MaxBufferedBody is the size in bytes up to which a request body is read
	// before its key is claimed. The boundaries of a multipart body do not add
	// to its size, as long as they take less than 64 KiB. Default 1 MiB; 1 TiB
	// at most.
	//
	// A larger body is streamed to the handler and hashed on the way. Two such
	// requests that differ only in the body are told apart when the handler has
	// returned, not before. When the handler met a body that broke off, the key
	// is freed. But a handler that answered below 400 has done something, so
	// retries of it are answered 409 response_not_stored. With AtMostOnce, or
	// after Commit, such a response is stored like any other.
	//
	// The limit decides what the fingerprint covers. When it is changed, a
	// retry of a request between the old limit and the new one is answered 422.
	MaxBufferedBody int64

	// MaxResponseBytes is the size in bytes of the largest response body that
	// is kept. A larger one is streamed, and a retry is answered 409
	// response_not_stored. Headers and trailers together may add 64 KiB.
	// Default 1 MiB; 1 TiB at most.
	//
	// Responses that were sent while the store failed are held until they are
	// stored, 64 MiB of them in each middleware. Retries of any more are
	// answered 409 response_not_stored.
	MaxResponseBytes int64

	// ShouldStore says which responses are final and stored. Any other frees
	// the key, so that a retry runs. Commit and Discard decide before it. It
	// gets the HTTP status and the header as the handler left it: trailers are
	// in it, under their names or with http.TrailerPrefix before them. It is not
	// called when the handler gave no answer. If it panics, the response is
	// stored.
	//
	// Default nil: all responses are final but 401, 403, 407, 408, 425, 429,
	// 5xx, and 409 with Retry-After, which another instance of this middleware
	// answers while a request is running. With AtMostOnce a 5xx is final too.
	//
	// By default a response of gRPC or gRPC-Web, which its Content-Type tells,
	// counts as what its Grpc-Status says. UNAUTHENTICATED is 401,
	// PERMISSION_DENIED 403, RESOURCE_EXHAUSTED 429. CANCELLED, UNKNOWN,
	// DEADLINE_EXCEEDED, ABORTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and
	// DATA_LOSS are 5xx. All others are final. So is a response without a valid
	// Grpc-Status. Once a gRPC-Web response has a message, its status is in the
	// body, and that of a Connect stream always is. Such a status is not seen,
	// and the response is stored: a handler that failed calls Discard.
	// RESOURCE_EXHAUSTED is also what gRPC servers answer when a reply is over
	// their limit, although the handler has finished: it calls Commit before an
	// effect that must not be repeated.
	ShouldStore func(status int, h http.Header) bool

	// ReplayHeader says which of the headers and trailers that the handler set
	// are kept for replay. Connection-level headers (RFC 9110, section 7.6.1)
	// are never kept. What outer middleware sets is always that of the current
	// request. If ReplayHeader panics, retries are answered 409
	// response_not_stored. Default nil: all but Set-Cookie, which would give a
	// retry the session of the first request. The retry of a login therefore
	// gets no session, so leave login routes outside of the middleware.
	ReplayHeader func(name string) bool

	// AtMostOnce never runs a key again unless the handler said that nothing
	// was done: with one of the 4xx that ShouldStore names, a response that a
	// custom ShouldStore refuses, Discard, or a transaction that was rolled
	// back. If a run dies or panics, retries are answered 409 outcome_unknown
	// until TTL, which should be much longer than Lease.
	//
	// It costs one more store call before the handler: the mark is set only
	// after the answer to the claim was seen, so that a claim that arrives late
	// marks nothing. A process that dies between the claim and the mark leaves
	// an ordinary claim, which ends with its lease. A key that was refused
	// leaves a marker until TTL, so limit rates outside of the middleware.
	// Default false: a run that died is repeated after Lease.
	AtMostOnce bool

	// FailOpen runs the handler unprotected when the store is down or full.
	// Commit then fails, and an attached transaction is left to the handler. A
	// request that waits for another execution when the store fails is refused
	// all the same. So is one whose cell in Redis is of another program or of a
	// newer release. Default false: the answer is 503, because a request that
	// is refused is safer than one that is charged twice.
	FailOpen bool

	// CancelOnDisconnect keeps the client's cancellation on the handler's
	// context. A handler that streams until its client leaves, as server-sent
	// events do, needs it, and what it sent until then is replayed. When a
	// handler returns without an answer after the client has hung up, retries
	// are answered 409 outcome_unknown. Default false: a client that hangs up
	// is the client that will retry, so the handler finishes and its answer is
	// stored.
	CancelOnDisconnect bool

	// AEAD seals stored responses. The store key and the fingerprint are its
	// additional data, so that a response that was moved to another key in the
	// store is unreadable. Nonces are random, so a 96-bit nonce allows 2^32
	// responses under one AEAD key (NIST SP 800-38D, section 8.3). After a
	// change of the AEAD key, older responses are unreadable and answered 500.
	// Default nil: responses are stored in the clear.
	AEAD cipher.AEAD

	// DocsURL is where this API documents its errors. It becomes the type of
	// each error (RFC 9457) and a Link header with rel="describedby". Default
	// "": about:blank and no Link.
	DocsURL string

	// Background lets a program that stops wait for what goes on after the
	// server has answered all requests: see [Background.Wait]. Default nil: a
	// program that exits while the store is down loses the responses that are
	// not stored yet, and their requests may run again.
	Background *Background

	// ErrorHandler writes the middleware's own answers. It may call
	// [WriteError] with a copy of the Error whose Status it has changed. The
	// examples of Options show two reasons: an API that wants 409 for another
	// payload under a key, as the Universal Commerce Protocol does, and clients
	// that take a 409 for final. An [Event] has the status of the Error as the
	// middleware made it. Default [WriteError].
	ErrorHandler func(http.ResponseWriter, *http.Request, *Error)

	// OnEvent is called once for each request that has a key, or should have
	// one. It runs on the request's goroutine, after the request was answered
	// or its handler panicked, so it holds up the end of the request. It is not
	// called when Key, ValidateKey, Scope, Fingerprint or ErrorHandler panicked,
	// nor by the inner of two middlewares that a request meets under one key. A
	// panic in it is logged. Default nil.
	OnEvent func(context.Context, Event)

	// Logger receives warnings and errors. A log line has the store key, which
	// is a hash, and never a client's key, a token or a body. Default nil:
	// slog.Default() at the time of logging. A panic of its handler is dropped.
	Logger *slog.Logger
}

// withDefaults returns a copy of o in which every field has its value. It
// panics on an invalid one. Defaults are resolved here alone, so that a request
// never asks what a zero means.
func (o *Options) withDefaults() Options {
	var r Options
	if o != nil {
		r = *o
	}
	setDefault(&r.TTL, 24*time.Hour)
	setDefault(&r.Lease, min(30*time.Second, r.TTL))
	setDefault(&r.Wait, 5*time.Second)
	setDefault(&r.MaxWaiting, 1000)
	setDefault(&r.MaxExecution, 10*time.Minute)
	setDefault(&r.StoreTimeout, min(time.Second, r.Lease/3))
	setDefault(&r.Header, "Idempotency-Key")
	setDefault(&r.MaxBufferedBody, 1<<20)
	setDefault(&r.MaxResponseBytes, 1<<20)
	r.Methods = slices.Clone(r.Methods)
	if len(r.Methods) == 0 {
		r.Methods = []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
	}
	r.FingerprintHeaders = slices.Concat(preconditions, r.FingerprintHeaders)
	for i, name := range r.FingerprintHeaders {
		r.FingerprintHeaders[i] = http.CanonicalHeaderKey(name)
	}
	slices.Sort(r.FingerprintHeaders)
	r.FingerprintHeaders = slices.Compact(r.FingerprintHeaders)
	if r.ReplayHeader == nil {
		r.ReplayHeader = func(name string) bool { return !strings.EqualFold(name, "Set-Cookie") }
	}
	if r.ErrorHandler == nil {
		r.ErrorHandler = WriteError
	}
	if err := r.check(); err != nil {
		panic("idempotency: " + err.Error())
	}
	return r
}

// setDefault sets a field that is zero.
func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Beyond these bounds, sums of a time and a TTL, or of a size and a limit,
// would overflow.
const (
	maxTTL   = 100 * 365 * 24 * time.Hour
	maxBytes = 1 << 40
)

// check returns an error for the first invalid field. Its text tells the fix.
func (o *Options) check() error {
	switch {
	case o.TTL < 0 || o.TTL > maxTTL:
		return errors.New("Options.TTL is negative or over 100 years; leave it zero for 24h")
	case o.Lease < time.Millisecond:
		return errors.New("Options.Lease is under 1ms; leave it zero for 30s")
	case o.Lease > o.TTL:
		return fmt.Errorf("Options.Lease %v exceeds Options.TTL %v; lower Lease or raise TTL", o.Lease, o.TTL)
	case o.Wait < 0 && o.Wait != NoWait:
		return errors.New("Options.Wait is negative; use NoWait not to wait, or zero for 5s")
	case o.MaxWaiting < 0:
		return errors.New("Options.MaxWaiting is negative; set Options.Wait to NoWait not to wait, or leave it zero for 1000")
	case o.MaxExecution < 0:
		return errors.New("Options.MaxExecution is negative; leave it zero for 10m")
	case o.StoreTimeout < 0:
		return errors.New("Options.StoreTimeout is negative; leave it zero for 1s")
	case o.StoreTimeout > o.Lease/2:
		return fmt.Errorf("Options.StoreTimeout %v exceeds half of Options.Lease %v; lower it or raise Lease",
			o.StoreTimeout, o.Lease)
	case !isToken(o.Header):
		return fmt.Errorf("Options.Header %q is not a header name", o.Header)
	case o.MaxBufferedBody < 0 || o.MaxBufferedBody > maxBytes:
		return errors.New("Options.MaxBufferedBody is negative or over 1 TiB; leave it zero for 1 MiB")
	case o.MaxResponseBytes < 0 || o.MaxResponseBytes > maxBytes:
		return errors.New("Options.MaxResponseBytes is negative or over 1 TiB; leave it zero for 1 MiB")
	}
	for _, method := range o.Methods {
		switch method {
		case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodConnect:
			return fmt.Errorf("Options.Methods has %s, which needs no idempotency key; remove it", method)
		}
		if !isToken(method) || method != strings.ToUpper(method) {
			return fmt.Errorf("Options.Methods has %q; methods are upper-case tokens", method)
		}
	}
	for _, name := range o.FingerprintHeaders {
		if !isToken(name) {
			return fmt.Errorf("Options.FingerprintHeaders has %q, which is not a header name", name)
		}
	}
	if _, err := url.Parse(o.DocsURL); err != nil || !isLinkTarget(o.DocsURL) {
		return fmt.Errorf("Options.DocsURL %q is not a URL", o.DocsURL)
	}
	return nil
}

// isToken reports whether s is a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	const special = "!#$%&'*+-.^_`|~"
	for _, c := range []byte(s) {
		if !isAlphanumeric(c) && strings.IndexByte(special, c) < 0 {
			return false
		}
	}
	return s != ""
}

// isAlphanumeric reports whether c is an ALPHA or a DIGIT of RFC 5234.
func isAlphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// logger returns where warnings and errors go. The default logger is looked up
// each time, since a program may set it after it made the middleware.
func (o *Options) logger() *slog.Logger {
	if o.Logger != nil {
		return o.Logger
	}
	return slog.Default()
}
