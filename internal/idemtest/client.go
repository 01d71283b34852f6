// Package idemtest is what the tests of several packages share: a handler
// behind the middleware with its client, stores that fail as told, and real
// Redis servers.
package idemtest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// An Exchange is one request and the answer it should get. What it does not say
// is the default: POST /charge with the JSON {"amount":1}, without a key.
type Exchange struct {
	After      time.Duration // virtual time that passes first
	Method     string
	Target     string
	Key        string
	Keys       []string // in place of Key: none, an empty one, several
	Header     http.Header
	Body       string
	Background bool // do not wait for the answer

	Get      string // "status body" or "status code", "replay" or "panic"
	Detail   string
	Original int           // original_status
	Took     time.Duration // virtual time until the answer
}

// A Client sends requests to a handler behind the middleware.
type Client struct {
	Handler http.Handler // the middleware

	mu    sync.Mutex // guards count
	count int
}

type runKey struct{}

// NewClient puts handler behind the middleware. A nil handler answers 201
// "charge N" in its Nth run.
func NewClient(store idempotency.Store, opts *idempotency.Options, handler http.HandlerFunc) *Client {
	c := new(Client)
	o := *opts
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if handler == nil {
		handler = Lasting(0)
	}
	c.Handler = idempotency.Middleware(store, &o)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.count++
		n := c.count
		c.mu.Unlock()
		handler(w, r.WithContext(context.WithValue(r.Context(), runKey{}, n)))
	}))
	return c
}

// Runs returns how often the handler was called.
func (c *Client) Runs() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

// Request returns the request of x.
func (c *Client) Request(x Exchange) *http.Request {
	if x.Method == "" {
		x.Method = "POST"
	}
	if x.Target == "" {
		x.Target = "/charge"
	}
	if x.Body == "" {
		x.Body = `{"amount":1}`
	}
	r := httptest.NewRequest(x.Method, x.Target, strings.NewReader(x.Body))
	r.Header.Set("Content-Type", "application/json")
	for name, values := range x.Header {
		r.Header[name] = values
	}
	if x.Key != "" {
		x.Keys = []string{x.Key}
	}
	if x.Keys != nil {
		r.Header["Idempotency-Key"] = x.Keys
	}
	return r
}

// Do serves one request. The response is nil when the handler panicked.
func (c *Client) Do(r *http.Request) (resp *http.Response) {
	w := httptest.NewRecorder()
	func() {
		defer func() {
			if recover() != nil {
				w = nil
			}
		}()
		c.Handler.ServeHTTP(w, r)
	}()
	if w == nil {
		return nil
	}
	return w.Result()
}

// Check sends the request of x, which is exchange number i of the test, and
// checks the answer.
func (c *Client) Check(t *testing.T, i int, x Exchange) {
	t.Helper()
	start := time.Now()
	resp := c.Do(c.Request(x))
	if resp == nil {
		require.Equal(t, x.Get, "panic", "exchange %d", i)
		return
	}
	got, p := Describe(t, resp)
	require.Equal(t, x.Get, got, "exchange %d", i)
	require.Equal(t, x.Original, p.OriginalStatus)
	if x.Detail != "" {
		require.Equal(t, x.Detail, p.Detail)
	}
	if x.Took != 0 {
		require.Equal(t, x.Took, time.Since(start), "exchange %d", i)
	}
}

// A Problem is the body of an error of the middleware.
type Problem struct {
	Type, Title, Detail, Code string
	Status                    int
	Retryable                 bool
	OriginalStatus            int `json:"original_status"`
}

// Describe returns "status body", or "status code" for a problem.
func Describe(t *testing.T, resp *http.Response) (string, Problem) {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	var p Problem
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

// Run returns how often the handler was called, this run included.
func Run(r *http.Request) int { return r.Context().Value(runKey{}).(int) }

// Execution returns the execution that r belongs to.
func Execution(r *http.Request) *idempotency.Execution {
	e, ok := idempotency.FromContext(r.Context())
	if !ok {
		panic("no execution in the context")
	}
	return e
}

// Must is for what cannot fail.
func Must(err error) {
	if err != nil {
		panic(err)
	}
}

// Lasting answers 201 "charge N" after d.
func Lasting(d time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(d)
		_, err := io.ReadAll(r.Body)
		Must(err)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", Run(r))
	}
}

// Answering answers its Nth run with the Nth status, the last one from then on.
func Answering(statuses ...int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(statuses[min(Run(r), len(statuses))-1])
	}
}

// PanicOnce is a handler that panics in its first run.
func PanicOnce(w http.ResponseWriter, r *http.Request) {
	if Run(r) == 1 {
		panic("boom")
	}
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, "attempt %d", Execution(r).Attempt())
}
