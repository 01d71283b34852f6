package idempotency_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// TestBehaviour is the specification in rows: what the client sends, in which
// state of the key, what it gets, and how often the handler ran in all. Time is
// virtual. What a row does not say is the default: POST /charge with body
// {"amount":1}, to a handler that answers 201 "charge N" in its Nth run.
func TestBehaviour(t *testing.T) {
	rows := []struct {
		name    string
		opts    idempotency.Options
		handler http.HandlerFunc // called with the charge counter; nil: charge
		send    []exchange
		runs    int
	}{
		// No key, wrong keys.
		{name: "without a key the request passes through every time",
			send: []exchange{{get: "201 charge 1"}, {get: "201 charge 2"}}, runs: 2},
		{name: "a required key that is missing",
			opts: idempotency.Options{RequireKey: true},
			send: []exchange{{get: "400 key_missing"}}},
		{name: "a required key does not concern other methods",
			opts: idempotency.Options{RequireKey: true},
			send: []exchange{{method: "GET", get: "201 charge 1"}}, runs: 1},
		{name: "an empty key", send: []exchange{{key: []string{""}, get: "400 key_invalid"}}},
		{name: "two keys", send: []exchange{{key: []string{"a", "b"}, get: "400 key_invalid"}}},
		{name: "a key that ValidateKey refuses, with its words",
			opts: idempotency.Options{ValidateKey: func(string) error { return errors.New("keys are UUIDs") }},
			send: []exchange{{key: k("a"), get: "400 key_invalid", detail: "keys are UUIDs"}}},
		{name: "GET with a key passes through",
			send: []exchange{{method: "GET", key: k("a"), get: "201 charge 1"}, {method: "GET", key: k("a"), get: "201 charge 2"}}, runs: 2},
		{name: "another header by option",
			opts: idempotency.Options{Header: "x-request-key"},
			send: []exchange{
				{header: http.Header{"X-Request-Key": k("a")}, get: "201 charge 1"},
				{header: http.Header{"X-Request-Key": k("a")}, get: "replay 201 charge 1"},
			}, runs: 1},

		// The stored response.
		{name: "a retry gets the first answer",
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), get: "replay 201 charge 1"}, {key: k("a"), get: "replay 201 charge 1"}}, runs: 1},
		{name: "PUT, PATCH and DELETE are eligible too, and methods do not share keys",
			send: []exchange{
				{method: "PUT", key: k("a"), get: "201 charge 1"}, {method: "PUT", key: k("a"), get: "replay 201 charge 1"},
				{method: "PATCH", key: k("a"), get: "201 charge 2"}, {method: "PATCH", key: k("a"), get: "replay 201 charge 2"},
				{method: "DELETE", key: k("a"), get: "201 charge 3"}, {method: "DELETE", key: k("a"), get: "replay 201 charge 3"},
			}, runs: 3},
		{name: "a quoted key and the bare one are the same",
			send: []exchange{{key: k(`"a"`), get: "201 charge 1"}, {key: k("a"), get: "replay 201 charge 1"}}, runs: 1},
		{name: "another key is another operation",
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("b"), get: "201 charge 2"}}, runs: 2},
		{name: "another path is another operation",
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), target: "/refund", get: "201 charge 2"}}, runs: 2},
		{name: "the TTL counts from the end of the handler",
			send: []exchange{
				{key: k("a"), get: "201 charge 1"},
				{after: 24*time.Hour - time.Second, key: k("a"), get: "replay 201 charge 1"},
				{after: time.Second, key: k("a"), get: "201 charge 2"},
			}, runs: 2},

		// A different request under the same key.
		{name: "another body", send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), body: "other", get: "422 key_reused"}}, runs: 1},
		{name: "another query", send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), target: "/charge?x=1", get: "422 key_reused"}}, runs: 1},
		{name: "another Content-Type",
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), header: http.Header{"Content-Type": {"text/csv"}}, get: "422 key_reused"}}, runs: 1},
		{name: "other credentials never get the answer of the first",
			send: []exchange{
				{key: k("a"), header: auth("alice"), get: "201 charge 1"},
				{key: k("a"), header: auth("mallory"), get: "422 key_reused"},
				{key: k("a"), get: "422 key_reused"},
				{key: k("a"), header: http.Header{"Authorization": {"alice"}, "Cookie": {"session=1"}}, get: "422 key_reused"},
				{key: k("a"), header: auth("alice"), get: "replay 201 charge 1"},
			}, runs: 1},
		{name: "with a Scope it says who asks, not the credentials",
			opts: idempotency.Options{Scope: func(r *http.Request) string { return r.Header.Get("Tenant") }},
			send: []exchange{
				{key: k("a"), header: http.Header{"Tenant": {"1"}, "Authorization": {"token 1"}}, get: "201 charge 1"},
				{key: k("a"), header: http.Header{"Tenant": {"1"}, "Authorization": {"token 2"}}, get: "replay 201 charge 1"},
				{key: k("a"), header: http.Header{"Tenant": {"2"}, "Authorization": {"token 1"}}, get: "201 charge 2"},
			}, runs: 2},
		{name: "an empty Scope counts as none",
			opts: idempotency.Options{Scope: func(*http.Request) string { return "" }},
			send: []exchange{{key: k("a"), header: auth("alice"), get: "201 charge 1"}, {key: k("a"), header: auth("mallory"), get: "422 key_reused"}}, runs: 1},
		{name: "a custom Fingerprint replaces query, Content-Type and body, not the credentials",
			opts: idempotency.Options{Fingerprint: func(_ *http.Request, body []byte) []byte { return body[:1] }},
			send: []exchange{
				{key: k("a"), body: "x1", get: "201 charge 1"},
				{key: k("a"), body: "x2", target: "/charge?y", header: http.Header{"Content-Type": {"text/csv"}}, get: "replay 201 charge 1"},
				{key: k("a"), body: "y1", get: "422 key_reused"},
				{key: k("a"), body: "x1", header: auth("mallory"), get: "422 key_reused"},
			}, runs: 1},

		// While the first is running.
		{name: "a duplicate waits for the answer",
			handler: lasting(2 * time.Second),
			send: []exchange{
				{key: k("a"), get: "201 charge 1", background: true},
				{key: k("a"), get: "replay 201 charge 1", took: 2 * time.Second},
			}, runs: 1},
		{name: "a duplicate does not wait for ever",
			handler: lasting(time.Minute),
			send: []exchange{
				{key: k("a"), get: "201 charge 1", background: true},
				{key: k("a"), get: "409 in_progress", took: 5 * time.Second},
				{after: 55 * time.Second, key: k("a"), get: "replay 201 charge 1"},
			}, runs: 1},
		{name: "NoWait",
			opts: idempotency.Options{Wait: idempotency.NoWait}, handler: lasting(time.Second),
			send: []exchange{{key: k("a"), get: "201 charge 1", background: true}, {key: k("a"), get: "409 in_progress"}}, runs: 1},
		{name: "another body while it is running",
			handler: lasting(time.Second),
			send:    []exchange{{key: k("a"), get: "201 charge 1", background: true}, {key: k("a"), body: "other", get: "422 key_reused"}}, runs: 1},
		{name: "a waiting duplicate runs when the first frees the key",
			handler: func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(time.Second)
				w.WriteHeader([]int{0, 503, 201}[run(r)])
			},
			send: []exchange{{key: k("a"), get: "503 ", background: true}, {key: k("a"), get: "201 ", took: 2 * time.Second}}, runs: 2},

		// What is final.
		{name: "answers that say that nothing was done free the key",
			handler: answering(401, 403, 407, 408, 425, 429, 500, 502, 503, 599, 201),
			send: []exchange{
				{key: k("a"), get: "401 "}, {key: k("a"), get: "403 "}, {key: k("a"), get: "407 "}, {key: k("a"), get: "408 "},
				{key: k("a"), get: "425 "}, {key: k("a"), get: "429 "}, {key: k("a"), get: "500 "}, {key: k("a"), get: "502 "},
				{key: k("a"), get: "503 "}, {key: k("a"), get: "599 "}, {key: k("a"), get: "201 "}, {key: k("a"), get: "replay 201 "},
			}, runs: 11},
		{name: "a freed key takes another body",
			handler: answering(500, 201),
			send:    []exchange{{key: k("a"), get: "500 "}, {key: k("a"), body: "other", get: "201 "}, {key: k("a"), get: "422 key_reused"}}, runs: 2},
		{name: "other errors are final", handler: answering(400),
			send: []exchange{{key: k("a"), get: "400 "}, {key: k("a"), get: "replay 400 "}}, runs: 1},
		{name: "redirects, conflicts and 422 are final", handler: answering(303, 409, 422),
			send: []exchange{
				{key: k("a"), get: "303 "}, {key: k("a"), get: "replay 303 "}, {key: k("b"), get: "409 "}, {key: k("b"), get: "replay 409 "},
				{key: k("c"), get: "422 "}, {key: k("c"), get: "replay 422 "},
			}, runs: 3},
		{name: "ShouldStore decides instead", handler: answering(500, 200, 200),
			opts: idempotency.Options{ShouldStore: func(status int, h http.Header) bool { return status == 500 && h.Get("Content-Type") != "" }},
			send: []exchange{{key: k("a"), get: "500 "}, {key: k("a"), get: "replay 500 "}, {key: k("b"), get: "200 "}, {key: k("b"), get: "200 "}}, runs: 3},
		{name: "Discard frees the key whatever the status",
			handler: func(w http.ResponseWriter, r *http.Request) { execution(r).Discard(); w.WriteHeader(201) },
			send:    []exchange{{key: k("a"), get: "201 "}, {key: k("a"), get: "201 "}}, runs: 2},
		{name: "after Commit everything is final, and Discard has no effect",
			handler: func(w http.ResponseWriter, r *http.Request) {
				must(execution(r).Commit(r.Context()))
				execution(r).Discard()
				w.WriteHeader(503)
			},
			send: []exchange{{key: k("a"), get: "503 "}, {key: k("a"), get: "replay 503 "}}, runs: 1},
		{name: "at most once: 5xx is final, not done is not",
			opts: idempotency.Options{AtMostOnce: true}, handler: answering(429, 500),
			send: []exchange{{key: k("a"), get: "429 "}, {key: k("a"), get: "500 "}, {key: k("a"), get: "replay 500 "}}, runs: 2},
		{name: "at most once: Discard still frees the key",
			opts:    idempotency.Options{AtMostOnce: true},
			handler: func(w http.ResponseWriter, r *http.Request) { execution(r).Discard(); w.WriteHeader(500) },
			send:    []exchange{{key: k("a"), get: "500 "}, {key: k("a"), get: "500 "}}, runs: 2},
		{name: "at most once: ShouldStore, if set, decides",
			opts: idempotency.Options{AtMostOnce: true, ShouldStore: func(int, http.Header) bool { return false }}, handler: answering(500, 201),
			send: []exchange{{key: k("a"), get: "500 "}, {key: k("a"), get: "201 "}}, runs: 2},

		// Crashes.
		{name: "a panic keeps the key for its lease, then a retry runs",
			handler: panicOnce,
			send: []exchange{
				{key: k("a"), get: "panic"},
				{key: k("a"), get: "409 in_progress", took: 5 * time.Second},
				{after: 25 * time.Second, key: k("a"), get: "201 attempt 2"},
				{key: k("a"), get: "replay 201 attempt 2"},
			}, runs: 2},
		{name: "a waiting duplicate takes over when the lease ends",
			opts: idempotency.Options{Lease: 3 * time.Second}, handler: panicOnce,
			send: []exchange{{key: k("a"), get: "panic"}, {key: k("a"), get: "201 attempt 2", took: 3 * time.Second}}, runs: 2},
		{name: "a dead run is taken over by the same request only",
			handler: panicOnce,
			send:    []exchange{{key: k("a"), get: "panic"}, {after: time.Minute, key: k("a"), body: "other", get: "422 key_reused"}, {key: k("a"), get: "201 attempt 2"}}, runs: 2},
		{name: "at most once: a dead run is never repeated",
			opts: idempotency.Options{AtMostOnce: true}, handler: panicOnce,
			send: []exchange{
				{key: k("a"), get: "panic"},
				{after: time.Minute, key: k("a"), get: "409 outcome_unknown"},
				{after: 23 * time.Hour, key: k("a"), get: "409 outcome_unknown"},
			}, runs: 1},
		{name: "a run that dies after Commit is never repeated",
			handler: func(w http.ResponseWriter, r *http.Request) {
				must(execution(r).Commit(r.Context()))
				panic(http.ErrAbortHandler)
			},
			send: []exchange{{key: k("a"), get: "panic"}, {after: time.Minute, key: k("a"), get: "409 outcome_unknown"}}, runs: 1},
		{name: "attempts count on over freed keys",
			handler: func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader([]int{0, 500, 500, 201}[run(r)])
				fmt.Fprintf(w, "attempt %d", execution(r).Attempt())
			},
			send: []exchange{{key: k("a"), get: "500 attempt 1"}, {key: k("a"), get: "500 attempt 2"}, {key: k("a"), get: "201 attempt 3"}}, runs: 3},

		// What cannot be kept.
		{name: "a response over MaxResponseBytes",
			opts: idempotency.Options{MaxResponseBytes: 7},
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), get: "409 response_not_stored", original: 201}}, runs: 1},
		{name: "a request body over MaxBufferedBody",
			opts: idempotency.Options{MaxBufferedBody: 4},
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), get: "replay 201 charge 1"}}, runs: 1},
		{name: "a request body of MaxBufferedBody with a custom Fingerprint",
			opts: idempotency.Options{MaxBufferedBody: 12, Fingerprint: func(*http.Request, []byte) []byte { return nil }},
			send: []exchange{{key: k("a"), get: "201 charge 1"}, {key: k("a"), body: "other", get: "replay 201 charge 1"}}, runs: 1},
		{name: "a request body over MaxBufferedBody with a custom Fingerprint",
			opts: idempotency.Options{MaxBufferedBody: 4, Fingerprint: func(*http.Request, []byte) []byte { return nil }},
			send: []exchange{{key: k("a"), get: "413 body_too_large"}}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := newAPI(store, &row.opts, row.handler)
				var background sync.WaitGroup
				for i, x := range row.send {
					time.Sleep(x.after)
					if x.background {
						background.Go(func() { c.check(t, i, x) })
						synctest.Wait() // it is as far as it gets
						continue
					}
					c.check(t, i, x)
				}
				background.Wait()
				require.Equal(t, row.runs, c.runs(), "handler runs")
			})
		})
	}
}

// eachWay runs test with a MemoryStore, which the middleware takes short cuts
// to, and with the same as if it were anyone's store.
func eachWay(t *testing.T, test func(t *testing.T, store idempotency.Store)) {
	synctest.Test(t, func(t *testing.T) { test(t, idempotency.NewMemoryStore()) })
	synctest.Test(t, func(t *testing.T) { test(t, anyStore{idempotency.NewMemoryStore()}) })
}

type anyStore struct{ *idempotency.MemoryStore }

// exchange is one request and the answer it should get.
type exchange struct {
	after      time.Duration // virtual time that passes first
	method     string
	target     string
	key        []string
	header     http.Header
	body       string
	background bool // do not wait for the answer

	get      string // "status body" or "status code", "replay" or "panic"
	detail   string
	original int           // original_status
	took     time.Duration // virtual time until the answer
}

func k(key string) []string         { return []string{key} }
func auth(token string) http.Header { return http.Header{"Authorization": {token}} }

// api is a handler behind the middleware.
type api struct {
	handler http.Handler
	mu      sync.Mutex
	count   int
}

type runKey struct{}

// newAPI puts handler behind the middleware. nil answers 201 "charge N".
func newAPI(store idempotency.Store, opts *idempotency.Options, handler http.HandlerFunc) *api {
	c := new(api)
	o := *opts
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if handler == nil {
		handler = lasting(0)
	}
	c.handler = idempotency.Middleware(store, &o)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.count++
		n := c.count
		c.mu.Unlock()
		handler(w, r.WithContext(context.WithValue(r.Context(), runKey{}, n)))
	}))
	return c
}

func (c *api) runs() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

func (c *api) request(x exchange) *http.Request {
	if x.method == "" {
		x.method = "POST"
	}
	if x.target == "" {
		x.target = "/charge"
	}
	if x.body == "" {
		x.body = `{"amount":1}`
	}
	r := httptest.NewRequest(x.method, x.target, strings.NewReader(x.body))
	r.Header.Set("Content-Type", "application/json")
	for name, values := range x.header {
		r.Header[name] = values
	}
	if x.key != nil {
		r.Header["Idempotency-Key"] = x.key
	}
	return r
}

// do serves one request. It is nil when the handler panicked.
func (c *api) do(r *http.Request) (resp *http.Response) {
	w := httptest.NewRecorder()
	func() {
		defer func() {
			if recover() != nil {
				w = nil
			}
		}()
		c.handler.ServeHTTP(w, r)
	}()
	if w == nil {
		return nil
	}
	return w.Result()
}

func (c *api) check(t *testing.T, i int, x exchange) {
	t.Helper()
	start := time.Now()
	resp := c.do(c.request(x))
	if resp == nil {
		require.Equal(t, x.get, "panic", "exchange %d", i)
		return
	}
	got, p := describe(t, resp)
	require.Equal(t, x.get, got, "exchange %d", i)
	require.Equal(t, x.original, p.OriginalStatus)
	if x.detail != "" {
		require.Equal(t, x.detail, p.Detail)
	}
	if x.took != 0 {
		require.Equal(t, x.took, time.Since(start), "exchange %d", i)
	}
}

// problem is the body of an error of the middleware.
type problem struct {
	Type, Title, Detail, Code string
	Status                    int
	Retryable                 bool
	OriginalStatus            int `json:"original_status"`
}

// describe returns "status body", or "status code" for a problem.
func describe(t *testing.T, resp *http.Response) (string, problem) {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	var p problem
	text := string(body)
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		require.NoError(t, json.Unmarshal(body, &p))
		require.Equal(t, resp.StatusCode, p.Status)
		text = p.Code
	}
	text = fmt.Sprintf("%d %s", resp.StatusCode, text)
	if resp.Header.Get("Idempotent-Replayed") == "true" {
		text = "replay " + text
	}
	return text, p
}

// run returns how often the handler was called, this run included.
func run(r *http.Request) int { return r.Context().Value(runKey{}).(int) }

func execution(r *http.Request) *idempotency.Execution {
	e, ok := idempotency.FromContext(r.Context())
	if !ok {
		panic("no execution in the context")
	}
	return e
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// lasting answers 201 "charge N" after d.
func lasting(d time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(d)
		_, err := io.ReadAll(r.Body)
		must(err)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", run(r))
	}
}

// answering answers its Nth run with the Nth status, the last one from then on.
func answering(statuses ...int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(statuses[min(run(r), len(statuses))-1])
	}
}

func panicOnce(w http.ResponseWriter, r *http.Request) {
	if run(r) == 1 {
		panic("boom")
	}
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, "attempt %d", execution(r).Attempt())
}
