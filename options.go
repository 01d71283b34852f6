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

// NoWait as [Options.Wait] answers a duplicate at once.
const NoWait time.Duration = -1

// Options configure [Middleware]. A nil *Options and a zero field mean the
// defaults. Middleware copies them; the functions in them must be safe for
// concurrent use.
type Options struct {
	// TTL is how long a stored response is replayed, from the end of the
	// handler on. Default 24h; 100 years at most.
	TTL time.Duration

	// Lease is how long a claim outlives a process that died: the time until a
	// retry may run the handler again. It is renewed while the handler runs.
	// Default 30s, or TTL if that is less. It must not exceed TTL.
	Lease time.Duration

	// Wait is how long a duplicate waits for the running execution before it is
	// answered 409. Default 5s. [NoWait] answers at once.
	Wait time.Duration

	// MaxExecution is the time after which the lease of a running handler is
	// no longer renewed and its context is cancelled. Default 10m.
	MaxExecution time.Duration

	// StoreTimeout is the total time for a store operation, its retries
	// included; the first try gets half of it. Default 1s, or a third of Lease
	// if that is less. It must not exceed half of Lease, or a renewal could
	// come too late.
	StoreTimeout time.Duration

	// Header is the request header that carries the key. Default
	// "Idempotency-Key".
	Header string

	// Methods are the eligible methods; all others pass through. Default POST,
	// PUT, PATCH, DELETE. Safe methods cannot be eligible.
	Methods []string

	// RequireKey answers 400 to an eligible request without a key. Default
	// false: such a request passes through unprotected.
	RequireKey bool

	// ValidateKey is an extra rule for keys, UUIDs only, say. What its error
	// says is shown to the client. Default nil: 1 to 255 bytes of printable
	// ASCII.
	ValidateKey func(key string) error

	// Scope says who a key belongs to: a tenant or a user that an outer
	// middleware authenticated. Equal keys of different scopes are different
	// keys.
	//
	// Default nil, and the same for a request for which it returns "": keys
	// are shared by everyone, and the Authorization and Cookie headers are
	// part of the fingerprint instead. Someone else who learns a key then gets
	// 422 and never the stored response; but so does a client whose
	// credentials changed between two tries. A service whose credentials
	// change with every request (signed requests, rotating tokens, rolling
	// cookies) needs a Scope, and so does one that tells its clients apart in
	// another way (an API key in a header of its own, client certificates).
	//
	// The host is not part of a key either: a service for which it matters
	// puts r.Host into the scope.
	Scope func(r *http.Request) string

	// Fingerprint replaces the query, the Content-Type and the body in what
	// tells two requests under one key apart. It must not read r.Body, which
	// was read into body, nor keep body. Default nil: all three count, byte by
	// byte. With it, a body over MaxBufferedBody is answered 413.
	Fingerprint func(r *http.Request, body []byte) []byte

	// MaxBufferedBody is the size in bytes up to which a request body is read
	// before its key is claimed. A larger one is streamed to the handler and
	// hashed on the way; until the handler has returned, two such requests
	// that differ only in the body are not told apart. When the handler met one
	// that broke off, the key is freed; but if it answered below 400 it has done
	// something, and retries are answered 409 response_not_stored. Default 1 MiB.
	// Where a change of this option makes a retry a large body that was none
	// before, or the other way round, it is answered 422.
	MaxBufferedBody int64

	// MaxResponseBytes is the size in bytes of the largest response body that
	// is kept. A larger one is streamed, and a retry is answered 409
	// response_not_stored. Headers and trailers together may add 64 KiB.
	// Default 1 MiB.
	MaxResponseBytes int64

	// ShouldStore says which responses are final and kept. Any other frees the
	// key. Default nil: all but 401, 403, 407, 408, 425, 429, 5xx, and 409 with
	// Retry-After, which another instance of this middleware answers while a
	// request is running; with AtMostOnce 5xx is final too. If it panics the
	// response is kept.
	ShouldStore func(status int, h http.Header) bool

	// ReplayHeader says which of the headers and trailers that the handler set
	// are kept for replay. Connection-level ones never are. What outer
	// middleware sets is always that of the current request. Default nil: all
	// but Set-Cookie.
	ReplayHeader func(name string) bool

	// AtMostOnce never runs a key again unless the handler's own answer said
	// that nothing was done: one of the 4xx that ShouldStore names, or
	// Discard. If a run dies or panics, retries are answered 409
	// outcome_unknown until TTL, which should be much longer than Lease.
	// Default false: they run again after Lease.
	AtMostOnce bool

	// FailOpen runs the handler unprotected when the store is down or full. Commit
	// then fails and nobody ends an attached transaction. Default false: the
	// answer is then 503, because a request that is refused is safer than one
	// that is charged twice.
	FailOpen bool

	// CancelOnDisconnect keeps the client's cancellation on the handler's
	// context. Default false: the client that hangs up is the one that will
	// retry, so the handler finishes and its answer is stored. With it, retries of
	// a handler that returns without a word are answered 409 outcome_unknown.
	CancelOnDisconnect bool

	// AEAD seals stored responses, with the store key as additional data.
	// Nonces are random, so a 96-bit nonce allows 2^32 responses under one key.
	// Default nil: they are stored in the clear.
	AEAD cipher.AEAD

	// DocsURL is where this API documents its errors. It becomes their type
	// and a Link header. Default "": about:blank and no Link.
	DocsURL string

	// ErrorHandler writes the middleware's own answers. Default [WriteError].
	ErrorHandler func(http.ResponseWriter, *http.Request, *Error)

	// OnEvent is called once for each request that has a key or should have,
	// on the request's goroutine, when it was answered or its handler panicked;
	// not when Scope, ValidateKey, Fingerprint or ErrorHandler panicked. A panic
	// in it is contained. Default nil.
	OnEvent func(context.Context, Event)

	// Logger receives warnings and errors; never a key, a token or a body.
	// Default nil: slog.Default() at the time of logging.
	Logger *slog.Logger
}

// withDefaults returns a copy of o in which every field has its value. It
// panics on nonsense.
func (o *Options) withDefaults() Options {
	var r Options
	if o != nil {
		r = *o
	}
	setDefault(&r.TTL, 24*time.Hour)
	setDefault(&r.Lease, min(30*time.Second, r.TTL))
	setDefault(&r.Wait, 5*time.Second)
	setDefault(&r.MaxExecution, 10*time.Minute)
	setDefault(&r.StoreTimeout, min(time.Second, r.Lease/3))
	setDefault(&r.Header, "Idempotency-Key")
	setDefault(&r.MaxBufferedBody, 1<<20)
	setDefault(&r.MaxResponseBytes, 1<<20)
	r.Header = http.CanonicalHeaderKey(r.Header)
	r.Methods = slices.Clone(r.Methods)
	if len(r.Methods) == 0 {
		r.Methods = []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
	}
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

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Beyond these bounds sums would overflow.
const (
	maxTTL   = 100 * 365 * 24 * time.Hour
	maxBytes = 1 << 40
)

// check returns an error that tells the fix.
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

func isAlphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// logger is where warnings and errors go.
func (o *Options) logger() *slog.Logger {
	if o.Logger != nil {
		return o.Logger
	}
	return slog.Default()
}
