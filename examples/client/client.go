package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"mime"
	"net/http"
	"strconv"
	"time"
)

// NewKey returns a random UUID (version 4). Make one per operation, before the
// first try, and keep it until the operation has a final answer.
func NewKey() string {
	var b [16]byte
	_, _ = rand.Read(b[:])     // never fails
	b[6] = b[6]&0x0f | 4<<4    // version 4
	b[8] = b[8]&0x3f | 0b10<<6 // the variant of RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// An Operation is a request that must take effect once. Everything in it is the
// same on every try, because the server refuses a key that comes back with
// another request. Save it (it marshals to JSON) before the first try to be
// able to resume it after a restart.
type Operation struct {
	// Key identifies the operation: NewKey, or an id of the caller's own.
	Key string

	Method, URL string

	// Header needs the Content-Type and the credentials, if any. Some servers
	// compare the credentials of two tries too, so they must stay the same.
	Header http.Header

	// Body must not be changed while Do runs.
	Body []byte
}

// A Response is the server's final answer to an operation.
type Response struct {
	Status int
	Header http.Header
	Body   []byte
	Tries  int // how many tries this call of Do made
}

// Replayed reports whether the answer is the stored answer to an earlier try.
func (r *Response) Replayed() bool { return r.Header.Get("Idempotent-Replayed") == "true" }

// A Client repeats an operation until it knows the answer. The zero value is
// usable; it is safe for concurrent use and must not be changed while in use.
type Client struct {
	// HTTP makes the single tries. Default http.DefaultClient. Its
	// CheckRedirect is asked about the redirects that Do follows: those that
	// repeat the request as it is (307 and 308) to the same host. Do returns
	// any other redirect as the answer.
	HTTP *http.Client

	// MaxTries bounds the tries of one call of Do. Default 6.
	MaxTries int

	// TryTimeout bounds a single try. It should exceed the time that the
	// server lets a duplicate wait for the first (5s by default). Default 15s.
	TryTimeout time.Duration

	// The pause after try n is random, between zero and BaseDelay * 2^(n-1)
	// but no more than MaxDelay, so that clients that failed together do not
	// come back together. Defaults 200ms and 20s.
	BaseDelay, MaxDelay time.Duration

	// MaxRetryAfter is the longest Retry-After that is waited for. A server
	// that asks for more gets no further try from this call. Default 1m.
	MaxRetryAfter time.Duration

	// MaxResponseBytes bounds the body of a response. Default 1 MiB.
	MaxResponseBytes int64

	// sleep replaces the pause between two tries. Default pause.
	sleep func(context.Context, time.Duration) error
}

// ErrResponseTooLarge says that the answer has a body larger than
// MaxResponseBytes.
var ErrResponseTooLarge = errors.New("response too large")

// A StatusError is an answer that says to try again.
type StatusError struct {
	Status int
	Code   string // of a problem+json body, in_progress say
}

func (e *StatusError) Error() string {
	if e.Code == "" {
		return fmt.Sprintf("status %d", e.Status)
	}
	return fmt.Sprintf("status %d (%s)", e.Status, e.Code)
}

// An UnsettledError says that Do gave up and that the operation may or may not
// have taken effect. To find out, do the same operation with the same key again.
type UnsettledError struct {
	Key   string
	Tries int
	Err   error // why, wrapping what the last try ended with
}

func (e *UnsettledError) Error() string {
	return fmt.Sprintf("operation %s is unsettled after %d tries: %v", e.Key, e.Tries, e.Err)
}

func (e *UnsettledError) Unwrap() error { return e.Err }

// Do sends op until it gets a final answer, whatever its status, and returns
// that. A body larger than MaxResponseBytes is cut and comes with
// ErrResponseTooLarge. Do gives up with an *UnsettledError when ctx or MaxTries
// is exhausted; any other error says that op was never sent.
func (c *Client) Do(ctx context.Context, op Operation) (*Response, error) {
	client := c.withDefaults()
	if op.Key == "" {
		// Do makes none up: the caller could not repeat the operation with it.
		return nil, errors.New("operation has no key")
	}
	if _, err := newRequest(ctx, op); err != nil {
		return nil, err
	}
	for tries := 1; ; tries++ {
		res, err := client.try(ctx, op)
		if res != nil && !retryable(res) {
			res.Tries = tries
			return res, err
		}
		var asked time.Duration
		if res != nil {
			asked = retryAfter(res.Header)
			err = &StatusError{Status: res.Status, Code: parseProblem(res).Code}
		}
		if err = client.waitAfter(ctx, tries, asked, err); err != nil {
			return nil, &UnsettledError{Key: op.Key, Tries: tries, Err: err}
		}
	}
}

// try sends op once and reads the answer. One that breaks off is no answer, but
// a reason to try again: the next is a replay of it.
func (c *Client) try(ctx context.Context, op Operation) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, c.TryTimeout)
	defer cancel()
	req, err := newRequest(ctx, op)
	if err != nil {
		return nil, err
	}
	res, err := c.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(http.MaxBytesReader(nil, res.Body, c.MaxResponseBytes))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		err = fmt.Errorf("status %d: %w", res.StatusCode, ErrResponseTooLarge)
	} else if err != nil {
		return nil, fmt.Errorf("status %d: reading the response: %w", res.StatusCode, err)
	}
	return &Response{Status: res.StatusCode, Header: res.Header, Body: body}, err
}

// withRedirects returns a copy of client that follows a redirect only where the
// same request goes to the same host.
//
// After 301, 302 and 303, net/http sends a GET without the body (RFC 9110,
// section 15.4 permits that for 301 and 302). The answer to the GET says nothing
// about the operation: it is often the 200 of a login page.
//
// After 307 and 308, net/http repeats the method, the body and the key. Another
// host is another server, which has never seen the key, so that the operation
// could take effect on both. It could also read the body and the key: net/http
// takes Authorization and Cookie off the request, and nothing else. Another
// scheme counts as another host.
func withRedirects(client *http.Client) *http.Client {
	c := *client
	c.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		first := via[0]
		if req.Method != first.Method || req.URL.Host != first.URL.Host || req.URL.Scheme != first.URL.Scheme {
			return http.ErrUseLastResponse
		}
		if client.CheckRedirect != nil {
			return client.CheckRedirect(req, via)
		}
		if len(via) >= 10 { // as net/http does
			return errors.New("stopped after 10 redirects")
		}
		return nil
	}
	return &c
}

// newRequest makes the request of one try. Every try needs its own, with the
// body from its start.
func newRequest(ctx context.Context, op Operation) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, op.Method, op.URL, bytes.NewReader(op.Body))
	if err != nil {
		return nil, err
	}
	if op.Header != nil {
		req.Header = op.Header.Clone()
	}
	req.Header.Set("Idempotency-Key", op.Key)
	return req, nil
}

// retryable reports whether the same request may get another answer later. The
// key makes a further try safe, so retryable only has to say whether a further
// try is useful.
func retryable(res *Response) bool {
	if res.Status < 400 || res.Replayed() {
		return false // a stored answer stays as it is, even a 500
	}
	if says := parseProblem(res).Retryable; says != nil {
		return *says // the server knows: one 409 may be worth a retry, another not
	}
	switch res.Status {
	case http.StatusRequestTimeout, // the request did not arrive whole
		http.StatusTooEarly,            // sent again after the TLS handshake it is fine
		http.StatusTooManyRequests,     // not now
		http.StatusInternalServerError, // not stored: the server freed the key
		http.StatusBadGateway,          // a proxy does not know what became of it,
		http.StatusGatewayTimeout,      // which is what the key is for
		http.StatusServiceUnavailable:
		return true
	}
	return false // another 4xx is about the request, and that stays the same
}

// problem has the members of an RFC 9457 body that matter here.
type problem struct {
	Code      string `json:"code"`
	Retryable *bool  `json:"retryable"`
}

// parseProblem returns the zero problem for any other body.
func parseProblem(res *Response) problem {
	var p problem
	mediaType, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/problem+json" || json.Unmarshal(res.Body, &p) != nil {
		return problem{}
	}
	return p
}

// retryAfter returns how long the server asks to wait: a number of seconds, or
// a date, which is read by the server's own clock. Zero: it does not ask.
func retryAfter(h http.Header) time.Duration {
	value := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 64); err == nil {
		return time.Duration(min(seconds, math.MaxInt64/uint64(time.Second))) * time.Second
	}
	until, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return max(0, until.Sub(now))
}

// waitAfter pauses before the next try. It returns an error that wraps cause
// when there must not be one.
func (c *Client) waitAfter(ctx context.Context, tries int, asked time.Duration, cause error) error {
	if tries >= c.MaxTries {
		return fmt.Errorf("no tries left: %w", cause)
	}
	if asked > c.MaxRetryAfter {
		return fmt.Errorf("told to wait for %v: %w", asked, cause)
	}
	// The backoff comes on top of what the server asked for, so that clients
	// that were told the same do not come back at the same moment.
	wait := asked + c.backoff(tries)
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
		return fmt.Errorf("%w before the next try; last try: %w", context.DeadlineExceeded, cause)
	}
	if err := c.sleep(ctx, wait); err != nil {
		return fmt.Errorf("%w; last try: %w", err, cause)
	}
	return nil
}

// backoff returns a random pause after the given number of tries.
func (c *Client) backoff(tries int) time.Duration {
	ceiling := min(c.BaseDelay, c.MaxDelay)
	for i := 1; i < tries && ceiling < c.MaxDelay; i++ {
		ceiling += min(ceiling, c.MaxDelay-ceiling) // doubles, up to MaxDelay
	}
	return mathrand.N(ceiling)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// withDefaults returns a copy in which every field has its value.
func (c *Client) withDefaults() *Client {
	d := *c
	if d.HTTP == nil {
		d.HTTP = http.DefaultClient
	}
	d.HTTP = withRedirects(d.HTTP)
	if d.sleep == nil {
		d.sleep = pause
	}
	setDefault(&d.MaxTries, 6)
	setDefault(&d.TryTimeout, 15*time.Second)
	setDefault(&d.BaseDelay, 200*time.Millisecond)
	setDefault(&d.MaxDelay, 20*time.Second)
	setDefault(&d.MaxRetryAfter, time.Minute)
	setDefault(&d.MaxResponseBytes, 1<<20)
	return &d
}

func setDefault[T int | int64 | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}
