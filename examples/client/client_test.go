package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// A bank is a server that charges. It remembers what reached it.
type bank struct {
	*httptest.Server

	mu      sync.Mutex
	charges int
	seen    []seen
}

// seen is the part of a try that must be the same in all tries of an operation.
type seen struct{ key, contentType, body string }

// newBank starts a bank. Requests pass through outer, if any, then through the
// middleware, then through inner, if any, and reach the handler that charges.
func newBank(t *testing.T, opts *idempotency.Options, outer, inner func(http.Handler) http.Handler) *bank {
	t.Helper()
	b := new(bank)
	var h http.Handler = http.HandlerFunc(b.charge)
	if inner != nil {
		h = inner(h)
	}
	h = idempotency.Middleware(idempotency.NewMemoryStore(), opts)(h)
	if outer != nil {
		h = outer(h)
	}
	b.Server = httptest.NewServer(b.remember(h))
	t.Cleanup(b.Close)
	return b
}

func (b *bank) charge(w http.ResponseWriter, _ *http.Request) {
	b.mu.Lock()
	b.charges++
	n := b.charges
	b.mu.Unlock()
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, "charge %d", n)
}

func (b *bank) remember(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		b.mu.Lock()
		b.seen = append(b.seen, seen{r.Header.Get("Idempotency-Key"), r.Header.Get("Content-Type"), string(body)})
		b.mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

func (b *bank) operation(key string) Operation {
	return Operation{
		Key: key, Method: http.MethodPost, URL: b.URL + "/charges",
		Header: http.Header{"Content-Type": {"application/json"}},
		Body:   []byte(`{"amount":100}`),
	}
}

// requireTries checks that all tries were n of the same request, and how many
// charges they made.
func (b *bank) requireTries(t *testing.T, op Operation, n, charges int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	want := seen{op.Key, op.Header.Get("Content-Type"), string(op.Body)}
	require.Equal(t, slices.Repeat([]seen{want}, n), b.seen)
	require.Equal(t, charges, b.charges)
}

// first hands the first n requests to special and the others to the wrapped
// handler. special may call that one too.
func first(n int, special func(next http.Handler, w http.ResponseWriter, r *http.Request)) func(http.Handler) http.Handler {
	var mu sync.Mutex
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			n--
			isSpecial := n >= 0
			mu.Unlock()
			if isSpecial {
				special(next, w, r)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// loseAnswer executes the request and closes the connection without a word.
func loseAnswer(next http.Handler, _ http.ResponseWriter, r *http.Request) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

func answer(status int, header http.Header, body string) func(http.Handler, http.ResponseWriter, *http.Request) {
	return func(_ http.Handler, w http.ResponseWriter, _ *http.Request) {
		for name, values := range header {
			w.Header()[name] = values
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// newClient returns a client with connections of its own that does not wait,
// and the pauses that it would have made.
func newClient(t *testing.T) (*Client, *[]time.Duration) {
	t.Helper()
	transport := new(http.Transport)
	t.Cleanup(transport.CloseIdleConnections)
	pauses := new([]time.Duration)
	return &Client{
		HTTP: &http.Client{Transport: transport},
		sleep: func(_ context.Context, d time.Duration) error {
			*pauses = append(*pauses, d)
			return nil
		},
	}, pauses
}

func TestLostAnswerIsReplayed(t *testing.T) {
	b := newBank(t, nil, first(2, loseAnswer), nil)
	client, pauses := newClient(t)
	op := b.operation(NewKey())

	res, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, http.StatusCreated, res.Status)
	require.Equal(t, "charge 1", string(res.Body))
	require.True(t, res.Replayed())
	require.Equal(t, 3, res.Tries)
	require.Len(t, *pauses, 2)
	b.requireTries(t, op, 3, 1)
}

func TestAnswerThatBreaksOffIsReplayed(t *testing.T) {
	b := newBank(t, nil, first(1, func(next http.Handler, w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(httptest.NewRecorder(), r)
		w.Header().Set("Content-Length", "8")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "char")
	}), nil)
	client, _ := newClient(t)
	op := b.operation(NewKey())

	res, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(res.Body))
	require.True(t, res.Replayed())
	b.requireTries(t, op, 2, 1)
}

func TestRetryAfterIsHonoured(t *testing.T) {
	b := newBank(t, nil, nil, first(2, answer(http.StatusServiceUnavailable, http.Header{"Retry-After": {"7"}}, "")))
	client, pauses := newClient(t)
	op := b.operation(NewKey())

	res, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(res.Body))
	require.False(t, res.Replayed(), "a 503 frees the key, so the third try is the first to be executed")
	b.requireTries(t, op, 3, 1)

	require.Len(t, *pauses, 2)
	for i, pause := range *pauses {
		// Clients that were told the same come back at different moments.
		require.Greater(t, pause, 7*time.Second)
		require.Less(t, pause, 7*time.Second+200*time.Millisecond<<i)
	}
}

func TestInProgressIsRepeatedUntilTheReplay(t *testing.T) {
	running, finish := make(chan struct{}), make(chan struct{})
	b := newBank(t, &idempotency.Options{Wait: idempotency.NoWait}, nil,
		first(1, func(next http.Handler, w http.ResponseWriter, r *http.Request) {
			close(running)
			<-finish
			next.ServeHTTP(w, r)
		}))
	finishOnce := sync.OnceFunc(func() { close(finish) })
	t.Cleanup(finishOnce) // or a failed test would hang
	op := b.operation(NewKey())

	original, _ := newClient(t)
	done := make(chan error, 1)
	go func() {
		_, err := original.Do(t.Context(), op)
		done <- err
	}()
	<-running

	duplicate, _ := newClient(t)
	duplicate.sleep = func(_ context.Context, d time.Duration) error {
		require.GreaterOrEqual(t, d, time.Second, "the 409 has Retry-After: 1")
		finishOnce()
		return <-done
	}
	res, err := duplicate.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(res.Body))
	require.True(t, res.Replayed())
	require.Equal(t, 2, res.Tries)
	b.requireTries(t, op, 3, 1)
}

func TestKeyReusedIsFinal(t *testing.T) {
	b := newBank(t, nil, nil, nil)
	client, pauses := newClient(t)
	op := b.operation(NewKey())
	_, err := client.Do(t.Context(), op)
	require.NoError(t, err)

	op.Body = []byte(`{"amount":999}`)
	res, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, http.StatusUnprocessableEntity, res.Status)
	require.Equal(t, "key_reused", parseProblem(res).Code)
	require.Equal(t, 1, res.Tries)
	require.Empty(t, *pauses)
}

func TestWhichAnswersAreRepeated(t *testing.T) {
	problemJSON := http.Header{"Content-Type": {"application/problem+json"}}
	tests := []struct {
		name     string
		status   int
		header   http.Header
		body     string
		repeated bool
	}{
		{name: "200", status: 200},
		{name: "303", status: 303}, // without a Location there is nothing to follow
		{name: "400", status: 400},
		{name: "401", status: 401},
		{name: "403", status: 403},
		{name: "404", status: 404},
		{name: "408", status: 408, repeated: true},
		{name: "409", status: 409},
		{name: "422", status: 422},
		{name: "425", status: 425, repeated: true},
		{name: "429", status: 429, repeated: true},
		{name: "500", status: 500, repeated: true},
		{name: "501", status: 501},
		{name: "502", status: 502, repeated: true},
		{name: "503", status: 503, repeated: true},
		{name: "504", status: 504, repeated: true},
		{"400 body_incomplete", 400, problemJSON, `{"code":"body_incomplete","retryable":true}`, true},
		{"409 in_progress", 409, problemJSON, `{"code":"in_progress","retryable":true}`, true},
		{"409 outcome_unknown", 409, problemJSON, `{"code":"outcome_unknown","retryable":false}`, false},
		{"500 record_unreadable", 500, problemJSON, `{"code":"record_unreadable","retryable":false}`, false},
		{"500 problem of the handler's own", 500, problemJSON, `{"title":"out of order"}`, true},
		{"500 broken problem", 500, problemJSON, `{"retryable":`, true},
		{"409 other media type", 409, nil, `{"retryable":true}`, false},
		{"500 replayed", 500, http.Header{"Idempotent-Replayed": {"true"}}, "", false},
		{"500 not replayed", 500, http.Header{"Idempotent-Replayed": {"false"}}, "", true},
		{"200 that talks", 200, problemJSON, `{"retryable":true}`, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBank(t, nil, first(1, answer(tt.status, tt.header, tt.body)), nil)
			client, pauses := newClient(t)
			op := b.operation(NewKey())
			res, err := client.Do(t.Context(), op)
			require.NoError(t, err)
			if !tt.repeated {
				require.Equal(t, tt.status, res.Status)
				require.Equal(t, tt.body, string(res.Body))
				require.Empty(t, *pauses)
				b.requireTries(t, op, 1, 0)
				return
			}
			require.Equal(t, "charge 1", string(res.Body))
			require.Len(t, *pauses, 1)
			b.requireTries(t, op, 2, 1)
		})
	}
}

func TestGivesUpAfterMaxTries(t *testing.T) {
	b := newBank(t, nil, nil, first(1000, answer(http.StatusServiceUnavailable, nil, "")))
	client, pauses := newClient(t)
	client.MaxTries = 4
	op := b.operation("order-17")

	_, err := client.Do(t.Context(), op)
	var unsettled *UnsettledError
	require.ErrorAs(t, err, &unsettled)
	require.Equal(t, "order-17", unsettled.Key)
	require.Equal(t, 4, unsettled.Tries)
	var status *StatusError
	require.ErrorAs(t, err, &status)
	require.Equal(t, http.StatusServiceUnavailable, status.Status)
	require.EqualError(t, err, "operation order-17 is unsettled after 4 tries: no tries left: status 503")
	require.Len(t, *pauses, 3)
	b.requireTries(t, op, 4, 0)
}

func TestNetworkErrorsEndToo(t *testing.T) {
	b := newBank(t, nil, nil, nil)
	op := b.operation("order-17")
	b.Close() // nobody listens there any more

	client, pauses := newClient(t)
	_, err := client.Do(t.Context(), op)
	var unsettled *UnsettledError
	require.ErrorAs(t, err, &unsettled)
	require.Equal(t, 6, unsettled.Tries)
	require.Len(t, *pauses, 5)
}

func TestDoesNotWaitPastTheDeadline(t *testing.T) {
	b := newBank(t, nil, nil, first(1000, answer(http.StatusTooManyRequests, http.Header{"Retry-After": {"50"}}, "")))
	client, pauses := newClient(t)
	op := b.operation("order-17")
	ctx, cancel := context.WithTimeout(t.Context(), 49*time.Second)
	defer cancel()

	_, err := client.Do(ctx, op)
	var unsettled *UnsettledError
	require.ErrorAs(t, err, &unsettled)
	require.Equal(t, "order-17", unsettled.Key)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "status 429")
	require.Empty(t, *pauses)
	require.NoError(t, ctx.Err(), "it gives up at once, not when the time is over")
	b.requireTries(t, op, 1, 0)
}

func TestDoesNotWaitForAnHour(t *testing.T) {
	b := newBank(t, nil, nil, first(1000, answer(http.StatusServiceUnavailable, http.Header{"Retry-After": {"3600"}}, "")))
	client, pauses := newClient(t)
	op := b.operation("order-17")

	_, err := client.Do(t.Context(), op)
	require.ErrorContains(t, err, "told to wait for 1h0m0s: status 503")
	require.Empty(t, *pauses)
	b.requireTries(t, op, 1, 0)
}

// A Retry-After of just MaxRetryAfter is waited for.
func TestWaitsForAMinute(t *testing.T) {
	b := newBank(t, nil, nil, first(1, answer(http.StatusServiceUnavailable, http.Header{"Retry-After": {"60"}}, "")))
	client, pauses := newClient(t)
	op := b.operation("order-17")

	_, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Len(t, *pauses, 1)
	b.requireTries(t, op, 2, 1)
}

// Who gives up tells the code of the last problem, whatever the parameters of
// its media type.
func TestGivesUpWithTheCode(t *testing.T) {
	header := http.Header{"Content-Type": {"application/problem+json; charset=utf-8"}}
	b := newBank(t, nil, first(1000, answer(http.StatusConflict, header, `{"code":"in_progress","retryable":true}`)), nil)
	client, _ := newClient(t)
	_, err := client.Do(t.Context(), b.operation("order-17"))
	var status *StatusError
	require.ErrorAs(t, err, &status)
	require.Equal(t, StatusError{Status: http.StatusConflict, Code: "in_progress"}, *status)
	require.ErrorContains(t, err, "status 409 (in_progress)")
}

func TestResumeAfterRestart(t *testing.T) {
	b := newBank(t, nil, first(1, loseAnswer), nil)

	// The operation is saved before it is tried, and the process has no luck.
	saved, err := json.Marshal(b.operation(NewKey()))
	require.NoError(t, err)
	before, _ := newClient(t)
	before.MaxTries = 1
	var op Operation
	require.NoError(t, json.Unmarshal(saved, &op))
	_, err = before.Do(t.Context(), op)
	var unsettled *UnsettledError
	require.ErrorAs(t, err, &unsettled)
	require.Equal(t, op.Key, unsettled.Key)

	// The next process knows nothing but what was saved.
	after, _ := newClient(t)
	var resumed Operation
	require.NoError(t, json.Unmarshal(saved, &resumed))
	res, err := after.Do(t.Context(), resumed)
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(res.Body))
	require.True(t, res.Replayed())
	b.requireTries(t, op, 2, 1)
}

func TestResponseTooLarge(t *testing.T) {
	large := strings.Repeat("x", 11)
	for _, tt := range []struct {
		status, limit, tries int
		body                 string
		err                  error
	}{
		{status: 200, limit: 11, tries: 1, body: large},
		{status: 200, limit: 10, tries: 1, body: large[:10], err: ErrResponseTooLarge},
		{status: 503, limit: 10, tries: 2, body: "charge 1"}, // nobody needs the body of a 503
	} {
		t.Run(fmt.Sprint(tt.status, " limit ", tt.limit), func(t *testing.T) {
			b := newBank(t, nil, first(1, answer(tt.status, nil, large)), nil)
			client, _ := newClient(t)
			client.MaxResponseBytes = int64(tt.limit)
			op := b.operation(NewKey())
			res, err := client.Do(t.Context(), op)
			require.ErrorIs(t, err, tt.err)
			require.Equal(t, tt.body, string(res.Body))
			b.requireTries(t, op, tt.tries, tt.tries-1)
		})
	}
}

// Do changes neither the operation nor the client: both may be in use elsewhere.
func TestWhatTheCallerPassesIsNotChanged(t *testing.T) {
	b := newBank(t, nil, first(2, loseAnswer), nil)
	client, _ := newClient(t)
	before, httpBefore := *client, *client.HTTP
	before.sleep = nil
	op := b.operation(NewKey())
	op.Header.Set("Idempotency-Key", "a key that the caller left there")
	header, body := op.Header.Clone(), slices.Clone(op.Body)
	_, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, header, op.Header)
	require.Equal(t, body, op.Body)
	after := *client
	after.sleep = nil
	require.Equal(t, before, after)
	require.Equal(t, httpBefore, *client.HTTP)
	b.requireTries(t, op, 3, 1)

	zero := new(Client)
	_, err = zero.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, new(Client), zero)
	require.Nil(t, http.DefaultClient.CheckRedirect)
}

// The documented defaults, which also stand in for what is negative.
func TestDefaults(t *testing.T) {
	for _, client := range []Client{{}, {MaxTries: -1, TryTimeout: -1, BaseDelay: -1, MaxDelay: -1, MaxRetryAfter: -1, MaxResponseBytes: -1}} {
		d := client.withDefaults()
		require.Equal(t, 6, d.MaxTries)
		require.Equal(t, 15*time.Second, d.TryTimeout)
		require.Equal(t, 200*time.Millisecond, d.BaseDelay)
		require.Equal(t, 20*time.Second, d.MaxDelay)
		require.Equal(t, time.Minute, d.MaxRetryAfter)
		require.EqualValues(t, 1<<20, d.MaxResponseBytes)
		require.Equal(t, http.DefaultClient.Transport, d.HTTP.Transport)
	}
}

// A closeTracker counts the bodies that are open.
type closeTracker struct {
	io.Reader
	open *int
}

func (b closeTracker) Close() error { *b.open--; return nil }

// brokenReader is a connection that breaks while a response is read.
type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A response that is left open keeps its connection for good.
func TestResponsesAreClosed(t *testing.T) {
	open, tries := 0, 0
	client, _ := newClient(t)
	client.MaxResponseBytes = 5
	client.HTTP.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
		bodies := []io.Reader{strings.NewReader("busy"), strings.NewReader("too large"), brokenReader{}, strings.NewReader("done")}
		status := []int{503, 503, 201, 201}[tries]
		open++
		tries++
		return &http.Response{StatusCode: status, Body: closeTracker{bodies[tries-1], &open}}, nil
	})
	res, err := client.Do(t.Context(), Operation{Key: "order-17", Method: http.MethodPost, URL: "http://bank.test/"})
	require.NoError(t, err)
	require.Equal(t, "done", string(res.Body))
	require.Equal(t, 4, tries)
	require.Zero(t, open)
}

// An operation needs no header.
func TestOperationWithoutHeader(t *testing.T) {
	b := newBank(t, nil, nil, nil)
	client, _ := newClient(t)
	op := b.operation(NewKey())
	op.Header = nil
	res, err := client.Do(t.Context(), op)
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(res.Body))
}

func TestUnusableOperationsAreNotSent(t *testing.T) {
	b := newBank(t, nil, nil, nil)
	client, _ := newClient(t)
	noKey, badMethod := b.operation(""), b.operation(NewKey())
	badMethod.Method = "NO METHOD"
	for _, op := range []Operation{noKey, badMethod} {
		_, err := client.Do(t.Context(), op)
		require.Error(t, err)
		require.False(t, errors.As(err, new(*UnsettledError)))
	}
	require.Empty(t, b.seen)
}

func TestNewKey(t *testing.T) {
	keys := map[string]bool{}
	for range 1000 {
		key := NewKey()
		require.Regexp(t, `^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, key)
		keys[key] = true
	}
	require.Len(t, keys, 1000)
}

func TestRetryAfter(t *testing.T) {
	const date = "Thu, 15 Jan 2026 12:00:00 GMT"
	tests := []struct {
		name, value string
		want        time.Duration
	}{
		{"none", "", 0},
		{"seconds", "120", 2 * time.Minute},
		{"zero", "0", 0},
		{"negative", "-1", 0},
		{"fraction", "1.5", 0},
		{"date", "Thu, 15 Jan 2026 12:00:30 GMT", 30 * time.Second},
		{"date in the past", "Thu, 15 Jan 2026 11:00:00 GMT", 0},
		{"nonsense", "soon", 0},
		{"large", "18446744073709551615", 9223372036 * time.Second},
		{"too large", "18446744073709551616", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{"Date": {date}}
			h.Set("Retry-After", tt.value)
			require.Equal(t, tt.want, retryAfter(h))
		})
	}

	synctest.Test(t, func(t *testing.T) {
		h := http.Header{}
		h.Set("Retry-After", time.Now().UTC().Add(30*time.Second).Format(http.TimeFormat))
		require.Equal(t, 30*time.Second, retryAfter(h), "without Date our own clock has to do")
	})
}

func TestBackoff(t *testing.T) {
	client := (&Client{BaseDelay: time.Second, MaxDelay: 5 * time.Second}).withDefaults()
	for tries, ceiling := range map[int]time.Duration{
		1: time.Second, 2: 2 * time.Second, 3: 4 * time.Second, 4: 5 * time.Second, 1000: 5 * time.Second,
	} {
		shortest, longest := ceiling, time.Duration(0)
		for range 1000 {
			pause := client.backoff(tries)
			require.GreaterOrEqual(t, pause, time.Duration(0))
			require.Less(t, pause, ceiling)
			shortest, longest = min(shortest, pause), max(longest, pause)
		}
		// All thousand in one half: less likely than 1 in 10^300.
		require.Greater(t, longest, ceiling/2, "tries %d", tries)
		require.Less(t, shortest, ceiling/2, "tries %d", tries)
	}
}

// roundTripper is a network for tests with virtual time.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestTryTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var keys []string
		client := &Client{HTTP: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			keys = append(keys, r.Header.Get("Idempotency-Key"))
			if len(keys) == 1 {
				<-r.Context().Done() // a server that went silent
				return nil, r.Context().Err()
			}
			rec := httptest.NewRecorder()
			rec.WriteHeader(http.StatusCreated)
			return rec.Result(), nil
		})}}
		start := time.Now()
		res, err := client.Do(t.Context(), Operation{Key: "order-17", Method: http.MethodPost, URL: "http://bank.test/"})
		require.NoError(t, err)
		require.Equal(t, http.StatusCreated, res.Status)
		require.Equal(t, []string{"order-17", "order-17"}, keys)
		require.GreaterOrEqual(t, time.Since(start), 15*time.Second)
		require.Less(t, time.Since(start), 15*time.Second+200*time.Millisecond)
	})
}

// A server that goes silent in the middle of its answer has not answered.
func TestTryTimeoutCoversTheBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		client := &Client{HTTP: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			if tries++; tries == 1 {
				body, w := io.Pipe()
				context.AfterFunc(r.Context(), func() { w.CloseWithError(r.Context().Err()) })
				return &http.Response{StatusCode: http.StatusCreated, Body: body}, nil
			}
			return &http.Response{StatusCode: http.StatusCreated, Body: http.NoBody}, nil
		})}}
		start := time.Now()
		res, err := client.Do(t.Context(), Operation{Key: "order-17", Method: http.MethodPost, URL: "http://bank.test/"})
		require.NoError(t, err)
		require.Equal(t, 2, res.Tries)
		require.GreaterOrEqual(t, time.Since(start), 15*time.Second)
		require.Less(t, time.Since(start), 15*time.Second+200*time.Millisecond)
	})
}

func TestContextEndsThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("cable broken")
		client := &Client{
			HTTP: &http.Client{Transport: roundTripper(func(*http.Request) (*http.Response, error) {
				return nil, broken
			})},
			BaseDelay: 1000 * time.Hour, MaxDelay: 1000 * time.Hour,
		}
		shutdown := errors.New("shutting down")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Millisecond, func() { cancel(shutdown) })
		start := time.Now()
		_, err := client.Do(ctx, Operation{Key: "order-17", Method: http.MethodPost, URL: "http://bank.test/"})
		require.ErrorIs(t, err, shutdown)
		require.ErrorIs(t, err, broken)
		var unsettled *UnsettledError
		require.ErrorAs(t, err, &unsettled)
		require.Equal(t, "order-17", unsettled.Key)
		require.Equal(t, time.Millisecond, time.Since(start))
	})
}

func TestContextEndsTheTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		client := &Client{HTTP: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			tries++
			<-r.Context().Done()
			return nil, r.Context().Err()
		})}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := client.Do(ctx, Operation{Key: "order-17", Method: http.MethodPost, URL: "http://bank.test/"})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 1, tries)
		require.Equal(t, time.Second, time.Since(start))
	})
}
