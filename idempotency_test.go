package idempotency_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
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
		send    []idemtest.Exchange
		runs    int
	}{
		// No key, wrong keys.
		{name: "without a key the request passes through every time",
			send: []idemtest.Exchange{{Get: "201 charge 1"}, {Get: "201 charge 2"}}, runs: 2},
		{name: "a required key that is missing",
			opts: idempotency.Options{RequireKey: true},
			send: []idemtest.Exchange{{Get: "400 key_missing"}}},
		{name: "a required key does not concern other methods",
			opts: idempotency.Options{RequireKey: true},
			send: []idemtest.Exchange{{Method: "GET", Get: "201 charge 1"}}, runs: 1},
		{name: "an empty key", send: []idemtest.Exchange{{Keys: []string{""}, Get: "400 key_invalid"}}},
		{name: "two keys", send: []idemtest.Exchange{{Keys: []string{"a", "b"}, Get: "400 key_invalid"}}},
		{name: "a key that ValidateKey refuses, with its words",
			opts: idempotency.Options{ValidateKey: func(string) error { return errors.New("keys are UUIDs") }},
			send: []idemtest.Exchange{{Key: "a", Get: "400 key_invalid", Detail: "keys are UUIDs"}}},
		{name: "GET with a key passes through",
			send: []idemtest.Exchange{{Method: "GET", Key: "a", Get: "201 charge 1"}, {Method: "GET", Key: "a", Get: "201 charge 2"}}, runs: 2},
		{name: "another header by option",
			opts: idempotency.Options{Header: "x-request-key"},
			send: []idemtest.Exchange{
				{Header: http.Header{"X-Request-Key": {"a"}}, Get: "201 charge 1"},
				{Header: http.Header{"X-Request-Key": {"a"}}, Get: "replay 201 charge 1"},
			}, runs: 1},

		// The stored response.
		{name: "a retry gets the first answer",
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Get: "replay 201 charge 1"}, {Key: "a", Get: "replay 201 charge 1"}}, runs: 1},
		{name: "PUT, PATCH and DELETE are eligible too, and methods do not share keys",
			send: []idemtest.Exchange{
				{Method: "PUT", Key: "a", Get: "201 charge 1"}, {Method: "PUT", Key: "a", Get: "replay 201 charge 1"},
				{Method: "PATCH", Key: "a", Get: "201 charge 2"}, {Method: "PATCH", Key: "a", Get: "replay 201 charge 2"},
				{Method: "DELETE", Key: "a", Get: "201 charge 3"}, {Method: "DELETE", Key: "a", Get: "replay 201 charge 3"},
			}, runs: 3},
		{name: "a quoted key and the bare one are the same",
			send: []idemtest.Exchange{{Key: `"a"`, Get: "201 charge 1"}, {Key: "a", Get: "replay 201 charge 1"}}, runs: 1},
		{name: "another key is another operation",
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "b", Get: "201 charge 2"}}, runs: 2},
		{name: "another path is another operation",
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Target: "/refund", Get: "201 charge 2"}}, runs: 2},
		{name: "the TTL counts from the end of the handler",
			send: []idemtest.Exchange{
				{Key: "a", Get: "201 charge 1"},
				{After: 24*time.Hour - time.Second, Key: "a", Get: "replay 201 charge 1"},
				{After: time.Second, Key: "a", Get: "201 charge 2"},
			}, runs: 2},

		// A different request under the same key.
		{name: "another body", send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Body: "other", Get: "422 key_reused"}}, runs: 1},
		{name: "another query", send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Target: "/charge?x=1", Get: "422 key_reused"}}, runs: 1},
		{name: "another Content-Type",
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Header: http.Header{"Content-Type": {"text/csv"}}, Get: "422 key_reused"}}, runs: 1},
		{name: "other credentials never get the answer of the first",
			send: []idemtest.Exchange{
				{Key: "a", Header: auth("alice"), Get: "201 charge 1"},
				{Key: "a", Header: auth("mallory"), Get: "422 key_reused"},
				{Key: "a", Get: "422 key_reused"},
				{Key: "a", Header: http.Header{"Authorization": {"alice"}, "Cookie": {"session=1"}}, Get: "422 key_reused"},
				{Key: "a", Header: auth("alice"), Get: "replay 201 charge 1"},
			}, runs: 1},
		{name: "with a Scope it says who asks, not the credentials",
			opts: idempotency.Options{Scope: func(r *http.Request) string { return r.Header.Get("Tenant") }},
			send: []idemtest.Exchange{
				{Key: "a", Header: http.Header{"Tenant": {"1"}, "Authorization": {"token 1"}}, Get: "201 charge 1"},
				{Key: "a", Header: http.Header{"Tenant": {"1"}, "Authorization": {"token 2"}}, Get: "replay 201 charge 1"},
				{Key: "a", Header: http.Header{"Tenant": {"2"}, "Authorization": {"token 1"}}, Get: "201 charge 2"},
			}, runs: 2},
		{name: "an empty Scope counts as none",
			opts: idempotency.Options{Scope: func(*http.Request) string { return "" }},
			send: []idemtest.Exchange{{Key: "a", Header: auth("alice"), Get: "201 charge 1"}, {Key: "a", Header: auth("mallory"), Get: "422 key_reused"}}, runs: 1},
		{name: "a custom Fingerprint replaces query, Content-Type and body, not the credentials",
			opts: idempotency.Options{Fingerprint: func(_ *http.Request, body []byte) []byte { return body[:1] }},
			send: []idemtest.Exchange{
				{Key: "a", Body: "x1", Get: "201 charge 1"},
				{Key: "a", Body: "x2", Target: "/charge?y", Header: http.Header{"Content-Type": {"text/csv"}}, Get: "replay 201 charge 1"},
				{Key: "a", Body: "y1", Get: "422 key_reused"},
				{Key: "a", Body: "x1", Header: auth("mallory"), Get: "422 key_reused"},
			}, runs: 1},

		// While the first is running.
		{name: "a duplicate waits for the answer",
			handler: idemtest.Lasting(2 * time.Second),
			send: []idemtest.Exchange{
				{Key: "a", Get: "201 charge 1", Background: true},
				{Key: "a", Get: "replay 201 charge 1", Took: 2 * time.Second},
			}, runs: 1},
		{name: "a duplicate does not wait for ever",
			handler: idemtest.Lasting(time.Minute),
			send: []idemtest.Exchange{
				{Key: "a", Get: "201 charge 1", Background: true},
				{Key: "a", Get: "409 in_progress", Took: 5 * time.Second},
				{After: 55 * time.Second, Key: "a", Get: "replay 201 charge 1"},
			}, runs: 1},
		{name: "NoWait",
			opts: idempotency.Options{Wait: idempotency.NoWait}, handler: idemtest.Lasting(time.Second),
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1", Background: true}, {Key: "a", Get: "409 in_progress"}}, runs: 1},
		{name: "another body while it is running",
			handler: idemtest.Lasting(time.Second),
			send:    []idemtest.Exchange{{Key: "a", Get: "201 charge 1", Background: true}, {Key: "a", Body: "other", Get: "422 key_reused"}}, runs: 1},
		{name: "a waiting duplicate runs when the first frees the key",
			handler: func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(time.Second)
				w.WriteHeader([]int{0, 503, 201}[idemtest.Run(r)])
			},
			send: []idemtest.Exchange{{Key: "a", Get: "503 ", Background: true}, {Key: "a", Get: "201 ", Took: 2 * time.Second}}, runs: 2},

		// What is final.
		{name: "answers that say that nothing was done free the key",
			handler: idemtest.Answering(401, 403, 407, 408, 425, 429, 500, 502, 503, 599, 201),
			send: []idemtest.Exchange{
				{Key: "a", Get: "401 "}, {Key: "a", Get: "403 "}, {Key: "a", Get: "407 "}, {Key: "a", Get: "408 "},
				{Key: "a", Get: "425 "}, {Key: "a", Get: "429 "}, {Key: "a", Get: "500 "}, {Key: "a", Get: "502 "},
				{Key: "a", Get: "503 "}, {Key: "a", Get: "599 "}, {Key: "a", Get: "201 "}, {Key: "a", Get: "replay 201 "},
			}, runs: 11},
		{name: "a freed key takes another body",
			handler: idemtest.Answering(500, 201),
			send:    []idemtest.Exchange{{Key: "a", Get: "500 "}, {Key: "a", Body: "other", Get: "201 "}, {Key: "a", Get: "422 key_reused"}}, runs: 2},
		{name: "other errors are final", handler: idemtest.Answering(400),
			send: []idemtest.Exchange{{Key: "a", Get: "400 "}, {Key: "a", Get: "replay 400 "}}, runs: 1},
		{name: "redirects, conflicts and 422 are final", handler: idemtest.Answering(303, 409, 422),
			send: []idemtest.Exchange{
				{Key: "a", Get: "303 "}, {Key: "a", Get: "replay 303 "}, {Key: "b", Get: "409 "}, {Key: "b", Get: "replay 409 "},
				{Key: "c", Get: "422 "}, {Key: "c", Get: "replay 422 "},
			}, runs: 3},
		{name: "ShouldStore decides instead", handler: idemtest.Answering(500, 200, 200),
			opts: idempotency.Options{ShouldStore: func(status int, h http.Header) bool { return status == 500 && h.Get("Content-Type") != "" }},
			send: []idemtest.Exchange{{Key: "a", Get: "500 "}, {Key: "a", Get: "replay 500 "}, {Key: "b", Get: "200 "}, {Key: "b", Get: "200 "}}, runs: 3},
		{name: "Discard frees the key whatever the status",
			handler: func(w http.ResponseWriter, r *http.Request) { idemtest.Execution(r).Discard(); w.WriteHeader(201) },
			send:    []idemtest.Exchange{{Key: "a", Get: "201 "}, {Key: "a", Get: "201 "}}, runs: 2},
		{name: "after Commit everything is final, and Discard has no effect",
			handler: func(w http.ResponseWriter, r *http.Request) {
				idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
				idemtest.Execution(r).Discard()
				w.WriteHeader(503)
			},
			send: []idemtest.Exchange{{Key: "a", Get: "503 "}, {Key: "a", Get: "replay 503 "}}, runs: 1},
		{name: "at most once: 5xx is final, not done is not",
			opts: idempotency.Options{AtMostOnce: true}, handler: idemtest.Answering(429, 500),
			send: []idemtest.Exchange{{Key: "a", Get: "429 "}, {Key: "a", Get: "500 "}, {Key: "a", Get: "replay 500 "}}, runs: 2},
		{name: "at most once: Discard still frees the key",
			opts:    idempotency.Options{AtMostOnce: true},
			handler: func(w http.ResponseWriter, r *http.Request) { idemtest.Execution(r).Discard(); w.WriteHeader(500) },
			send:    []idemtest.Exchange{{Key: "a", Get: "500 "}, {Key: "a", Get: "500 "}}, runs: 2},
		{name: "at most once: ShouldStore, if set, decides",
			opts: idempotency.Options{AtMostOnce: true, ShouldStore: func(int, http.Header) bool { return false }}, handler: idemtest.Answering(500, 201),
			send: []idemtest.Exchange{{Key: "a", Get: "500 "}, {Key: "a", Get: "201 "}}, runs: 2},

		// Crashes.
		{name: "a panic keeps the key for its lease, then a retry runs",
			handler: idemtest.PanicOnce,
			send: []idemtest.Exchange{
				{Key: "a", Get: "panic"},
				{Key: "a", Get: "409 in_progress", Took: 5 * time.Second},
				{After: 25 * time.Second, Key: "a", Get: "201 attempt 2"},
				{Key: "a", Get: "replay 201 attempt 2"},
			}, runs: 2},
		{name: "a waiting duplicate takes over when the lease ends",
			opts: idempotency.Options{Lease: 3 * time.Second}, handler: idemtest.PanicOnce,
			send: []idemtest.Exchange{{Key: "a", Get: "panic"}, {Key: "a", Get: "201 attempt 2", Took: 3 * time.Second}}, runs: 2},
		{name: "a dead run is taken over by the same request only",
			handler: idemtest.PanicOnce,
			send:    []idemtest.Exchange{{Key: "a", Get: "panic"}, {After: time.Minute, Key: "a", Body: "other", Get: "422 key_reused"}, {Key: "a", Get: "201 attempt 2"}}, runs: 2},
		{name: "at most once: a dead run is never repeated",
			opts: idempotency.Options{AtMostOnce: true}, handler: idemtest.PanicOnce,
			send: []idemtest.Exchange{
				{Key: "a", Get: "panic"},
				{After: time.Minute, Key: "a", Get: "409 outcome_unknown"},
				{After: 23 * time.Hour, Key: "a", Get: "409 outcome_unknown"},
			}, runs: 1},
		{name: "a run that dies after Commit is never repeated",
			handler: func(w http.ResponseWriter, r *http.Request) {
				idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
				panic(http.ErrAbortHandler)
			},
			send: []idemtest.Exchange{{Key: "a", Get: "panic"}, {After: time.Minute, Key: "a", Get: "409 outcome_unknown"}}, runs: 1},
		{name: "attempts count on over freed keys",
			handler: func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader([]int{0, 500, 500, 201}[idemtest.Run(r)])
				fmt.Fprintf(w, "attempt %d", idemtest.Execution(r).Attempt())
			},
			send: []idemtest.Exchange{{Key: "a", Get: "500 attempt 1"}, {Key: "a", Get: "500 attempt 2"}, {Key: "a", Get: "201 attempt 3"}}, runs: 3},

		// What cannot be kept.
		{name: "a response over MaxResponseBytes",
			opts: idempotency.Options{MaxResponseBytes: 7},
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Get: "409 response_not_stored", Original: 201}}, runs: 1},
		{name: "a request body over MaxBufferedBody",
			opts: idempotency.Options{MaxBufferedBody: 4},
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Get: "replay 201 charge 1"}}, runs: 1},
		{name: "a request body of MaxBufferedBody with a custom Fingerprint",
			opts: idempotency.Options{MaxBufferedBody: 12, Fingerprint: func(*http.Request, []byte) []byte { return nil }},
			send: []idemtest.Exchange{{Key: "a", Get: "201 charge 1"}, {Key: "a", Body: "other", Get: "replay 201 charge 1"}}, runs: 1},
		{name: "a request body over MaxBufferedBody with a custom Fingerprint",
			opts: idempotency.Options{MaxBufferedBody: 4, Fingerprint: func(*http.Request, []byte) []byte { return nil }},
			send: []idemtest.Exchange{{Key: "a", Get: "413 body_too_large"}}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := idemtest.NewClient(store, &row.opts, row.handler)
				var background sync.WaitGroup
				for i, x := range row.send {
					time.Sleep(x.After)
					if x.Background {
						background.Go(func() { c.Check(t, i, x) })
						synctest.Wait() // it is as far as it gets
						continue
					}
					c.Check(t, i, x)
				}
				background.Wait()
				require.Equal(t, row.runs, c.Runs(), "handler runs")
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

func auth(token string) http.Header { return http.Header{"Authorization": {token}} }

// What serves a request from memory serves another one after it, of another
// middleware perhaps. Nothing of the first is left for the second: not its
// scope, its body, its key, nor the time that it waited.
func TestCallsAreReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		scoped := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
			Scope:           func(*http.Request) string { return "acme" },
			MaxBufferedBody: 4, // bodies are large
		}, idemtest.Lasting(time.Second))
		plain := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add, RequireKey: true}, nil)

		plain.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		var first sync.WaitGroup
		first.Go(func() { scoped.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		for i := range 20 {
			// The first of these waits.
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			plain.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			require.Zero(t, events.Last().Waited)
			require.Zero(t, events.Last().Attempt)
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
			plain.Check(t, i, idemtest.Exchange{Get: "400 key_missing"})
			require.Empty(t, events.Last().StoreKey)
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			name := fmt.Sprint("b", i)
			plain.Check(t, i, idemtest.Exchange{Key: name, Get: fmt.Sprint("201 charge ", i+2)})
			plain.Check(t, i, idemtest.Exchange{Key: name, Body: "x", Get: "422 key_reused"})
		}
		first.Wait()
		require.Equal(t, 1, scoped.Runs())
		require.Equal(t, 21, plain.Runs())
	})
}

// Many clients at once get their own answers, first, replayed and cut short by
// a limit, whatever buffers they share on the way.
func TestAnswersAreNotMixedUp(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 40 << 10}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		w.Header().Set("X-Body", string(body))
		for range 5 {
			_, err = w.Write(bytes.Repeat(body, 1+len(body)%3000))
			idemtest.Must(err)
		}
	})
	var clients sync.WaitGroup
	for n := range 8 {
		clients.Go(func() {
			for i := range 60 {
				body := fmt.Sprintf("client %d request %d %s", n, i, strings.Repeat("x", i%7*(i%11)))
				want := "200 " + strings.Repeat(body, 5*(1+len(body)%3000))
				x := idemtest.Exchange{Key: fmt.Sprint(n, "-", i), Body: body}
				got, _ := idemtest.Describe(t, c.Do(c.Request(x)))
				if got != want {
					t.Errorf("client %d got another answer to request %d", n, i)
				}
				if len(want) > 40<<10 {
					want = "409 response_not_stored"
				} else {
					want = "replay " + want
				}
				for range 2 {
					if got, _ := idemtest.Describe(t, c.Do(c.Request(x))); got != want {
						t.Errorf("client %d got another replay of request %d", n, i)
					}
				}
			}
		})
	}
	clients.Wait()
	require.Equal(t, 8*60, c.Runs())
}

func TestNestedMiddlewareRunsOnce(t *testing.T) {
	store := idempotency.NewMemoryStore()
	mw := idempotency.Middleware(store, nil)
	runs := 0
	h := mw(mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		runs++
		w.WriteHeader(http.StatusCreated)
	})))
	for range 2 {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("POST", "/charge", strings.NewReader("x"))
		r.Header.Set("Idempotency-Key", "a")
		h.ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code)
	}
	require.Equal(t, 1, runs)
}

// Two middlewares that a request meets under different keys protect both.
func TestNestedMiddlewareOfAnotherKey(t *testing.T) {
	var keys []string
	inner := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Header: "Inner-Key"}, func(w http.ResponseWriter, r *http.Request) {
		keys = append(keys, idemtest.Execution(r).Key())
		w.WriteHeader(http.StatusCreated)
	})
	outer := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, inner.Handler.ServeHTTP)
	for _, key := range []string{"a", "b"} {
		outer.Do(outer.Request(idemtest.Exchange{Key: key, Header: http.Header{"Inner-Key": {"inner"}}}))
	}
	require.Equal(t, []string{"inner"}, keys)
	require.Equal(t, 2, outer.Runs())
}

// Of nested middlewares that share a cell, the outer one counts, even if there is
// another one between them.
func TestNestedMiddlewareAroundAnother(t *testing.T) {
	outer := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})
	between := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Scope: func(*http.Request) string { return "tenant" }})
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, nil)
	h := outer(between(outer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) }))))
	for _, want := range []string{"201 ", "replay 201 "} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
		got, _ := idemtest.Describe(t, w.Result())
		require.Equal(t, want, got)
	}
}

// A request may go on behind a TimeoutHandler that has answered in its place.
// Its inner middleware does not rely on the outer one, which has freed the key.
// It claims the key itself, so that a retry waits. A request that has a body is
// refused, as its body ended with the outer middleware.
func TestNestedMiddlewareThatOutlivesTheOuterOne(t *testing.T) {
	for name, row := range map[string]struct {
		body string
		get  []string
		runs int
	}{
		"no body": {"", []string{"503 too slow", "409 in_progress", "replay 201 "}, 1},
		"a body":  {"x", []string{"503 too slow", "503 too slow", "503 too slow"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mw := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
				runs := 0
				charge := mw(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					runs++
					time.Sleep(10 * time.Second)
					w.WriteHeader(http.StatusCreated)
				}))
				slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(2 * time.Second) // of authentication, say
					charge.ServeHTTP(w, r)
				})
				c := &idemtest.Client{Handler: mw(http.TimeoutHandler(slow, time.Second, "too slow"))}
				for _, want := range row.get {
					r := httptest.NewRequest("POST", "/charge", strings.NewReader(row.body))
					r.Header.Set("Idempotency-Key", "a")
					got, _ := idemtest.Describe(t, c.Do(r))
					require.Equal(t, want, got)
					time.Sleep(4 * time.Second)
				}
				time.Sleep(time.Minute) // the TimeoutHandler leaves goroutines behind
				require.Equal(t, row.runs, runs)
			})
		})
	}
}

// newServer serves handler behind the middleware on a real connection.
func newServer(t *testing.T, opts *idempotency.Options, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	return serve(t, idempotency.Middleware(idempotency.NewMemoryStore(), opts)(handler))
}

func serve(t *testing.T, handler http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// post sends one request, and returns the answer with its body read.
func post(ctx context.Context, s *httptest.Server, key string, body io.Reader) (*http.Response, string, error) {
	r, err := http.NewRequestWithContext(ctx, "POST", s.URL+"/charge", body)
	if err != nil {
		return nil, "", err
	}
	r.Header.Set("Idempotency-Key", key)
	resp, err := s.Client().Do(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// waitFor waits for a condition on this goroutine, so that it may count them.
func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			require.FailNow(t, "condition never satisfied")
		}
	}
}

// A client that gives up and comes back gets the answer of its first request.
func TestServerClientTimesOutAndRetries(t *testing.T) {
	var runs atomic.Int32
	running, finish := make(chan struct{}), make(chan struct{})
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		close(running)
		<-finish
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "charged")
	})
	ctx, giveUp := context.WithCancel(t.Context())
	go func() {
		<-running
		giveUp()
	}()
	_, _, err := post(ctx, s, "a", strings.NewReader("x"))
	require.ErrorIs(t, err, context.Canceled)
	close(finish)
	resp, body, err := post(t.Context(), s, "a", strings.NewReader("x"))
	require.NoError(t, err)
	require.Equal(t, "charged", body)
	require.Equal(t, http.StatusCreated, resp.StatusCode)
	require.Equal(t, "true", resp.Header.Get("Idempotent-Replayed"))
	require.EqualValues(t, 1, runs.Load())
}

func TestServerParallelDuplicates(t *testing.T) {
	const duplicates = 200
	var runs atomic.Int32
	arrived := make(chan struct{}, duplicates)
	s := serve(t, counting(arrived, newHandler(func(w http.ResponseWriter, r *http.Request) {
		for range duplicates { // all of them are there
			<-arrived
		}
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", runs.Add(1))
	})))
	answers := make(chan string, duplicates)
	var all sync.WaitGroup
	for range duplicates {
		all.Go(func() {
			resp, body, err := post(t.Context(), s, "a", strings.NewReader("x"))
			if err != nil {
				body = err.Error()
			} else {
				body = resp.Status + " " + body
			}
			answers <- body
		})
	}
	all.Wait()
	close(answers)
	for answer := range answers {
		require.Equal(t, "201 Created charge 1", answer)
	}
	require.EqualValues(t, 1, runs.Load())
}

func newHandler(h http.HandlerFunc) http.Handler {
	return idempotency.Middleware(idempotency.NewMemoryStore(), nil)(h)
}

// counting tells arrived of each request before it is served.
func counting(arrived chan<- struct{}, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		h.ServeHTTP(w, r)
	})
}

// Go's Transport sends a request with this header again by itself when an idle
// connection breaks without an answer. The handler must not run, and panic, for
// each of them.
func TestServerPanicRunsOnceThroughGoClient(t *testing.T) {
	var runs, requests atomic.Int32
	h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Idempotency-Key") == "panic" {
				runs.Add(1)
				panic("boom")
			}
		}))
	both := make(chan struct{})
	var once sync.Once
	var waiting atomic.Int32
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if strings.HasPrefix(r.Header.Get("Idempotency-Key"), "warm") {
			// Two requests at once leave two idle connections.
			if waiting.Add(1) == 2 {
				once.Do(func() { close(both) })
			}
			<-both
		}
		h.ServeHTTP(w, r)
	}))
	var warm sync.WaitGroup
	for i := range 2 {
		warm.Go(func() { _, _, _ = post(t.Context(), s, fmt.Sprint("warm", i), strings.NewReader("x")) })
	}
	warm.Wait()
	requests.Store(0)
	_, body, err := post(t.Context(), s, "panic", strings.NewReader("x"))
	require.NoError(t, err)
	require.Contains(t, body, "in_progress")
	require.Greater(t, requests.Load(), int32(1), "the Transport did send it again")
	require.EqualValues(t, 1, runs.Load())
}

// Load with every kind of key and answer: no race, no lost goroutine, and the
// memory comes back.
func TestServerLoad(t *testing.T) {
	total := 50_000
	if testing.Short() {
		total = 5_000
	}
	store := idempotency.NewMemoryStore()
	var runs atomic.Int64
	s := serve(t, idempotency.Middleware(store, &idempotency.Options{TTL: time.Second, Lease: time.Second})(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			runs.Add(1)
			b, err := io.ReadAll(r.Body)
			if err != nil {
				panic(err)
			}
			w.WriteHeader(http.StatusCreated)
			_, _ = w.Write(b)
		})))
	s.Client().Transport.(*http.Transport).MaxIdleConnsPerHost = 16
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	var next atomic.Int64
	errs := make(chan error, 16)
	for range 16 {
		all.Go(func() {
			for {
				i := int(next.Add(1))
				if i > total {
					return
				}
				body := fmt.Sprint("operation ", i/4) // each is sent four times
				resp, got, err := post(t.Context(), s, fmt.Sprint("key-", i/4), strings.NewReader(body))
				if err == nil && (resp.StatusCode != http.StatusCreated || got != body) {
					err = errors.New(resp.Status + " " + got)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	// A key may run again after its TTL of a second, if the machine is slow.
	require.GreaterOrEqual(t, runs.Load(), int64(total/4))

	s.Client().CloseIdleConnections()
	waitFor(t, func() bool { return runtime.NumGoroutine() <= before })
	waitFor(t, func() bool { return store.Len() == 0 && store.Bytes() == 0 })
}

// What a router inside finds out about a request is on the request afterwards,
// for tracing and metrics outside, as if the middleware were not there.
func TestPatternOfAnInnerRouter(t *testing.T) {
	inner := http.NewServeMux()
	inner.HandleFunc("POST /orders/{id}", func(http.ResponseWriter, *http.Request) {})
	inner.HandleFunc("POST /panic/{id}", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	inner.HandleFunc("POST /write/{id}", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, r.PathValue("id"))
	})
	copies := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(w, r.WithContext(r.Context())) // which hides it without the middleware, too
	})
	for _, row := range []struct {
		name, target, want string
		handler            http.Handler
	}{
		{"no word", "/orders/1", "POST /orders/{id}", inner},
		{"an answer", "/write/1", "POST /write/{id}", inner},
		{"a panic", "/panic/1", "POST /panic/{id}", inner},
		{"not found", "/nowhere", "", inner},
		{"another copy", "/orders/1", "", copies},
		{"no router", "/orders/1", "", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})},
	} {
		for _, mounted := range []bool{false, true} {
			for name, store := range map[string]idempotency.Store{
				"":           idempotency.NewMemoryStore(),
				", FailOpen": downStore(),
			} {
				t.Run(fmt.Sprint(row.name, ", mounted ", mounted, name), func(t *testing.T) {
					var event string
					h := idempotency.Middleware(store, &idempotency.Options{
						FailOpen: true, Logger: slog.New(slog.DiscardHandler),
						OnEvent: func(_ context.Context, e idempotency.Event) { event = e.Request.Pattern },
					})(row.handler)
					want := row.want
					if mounted {
						outer := http.NewServeMux()
						outer.Handle("/", h)
						h = outer
						if want == "" && row.name != "not found" {
							want = "/"
						}
					}
					c := &idemtest.Client{Handler: h}
					for _, key := range []string{"", "a"} {
						r := c.Request(idemtest.Exchange{Target: row.target, Key: key})
						c.Do(r)
						require.Equal(t, want, r.Pattern, "key %q", key)
					}
					require.Equal(t, want, event)
				})
			}
		}
	}
}

// downStore returns a store that is down.
func downStore() idempotency.Store {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	store.Fail("Acquire", idemtest.ErrDown)
	return store
}

// A replay runs no router. Outer middleware keeps what it had.
func TestPatternOfAReplay(t *testing.T) {
	inner := http.NewServeMux()
	inner.HandleFunc("POST /charge", func(http.ResponseWriter, *http.Request) {})
	outer := http.NewServeMux()
	outer.Handle("/", idempotency.Middleware(idempotency.NewMemoryStore(), nil)(inner))
	c := &idemtest.Client{Handler: outer}
	for _, want := range []string{"POST /charge", "/"} {
		r := c.Request(idemtest.Exchange{Key: "a"})
		c.Do(r)
		require.Equal(t, want, r.Pattern)
	}
}

// Outer middleware that sends its request through again sends the same one: a
// handler that changes the request, or parses its form, does not make another
// of it.
func TestRequestThatOuterMiddlewareRepeats(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, "1", r.FormValue("amount"))
		r.SetPathValue("id", "1")
		r.Method, r.RequestURI, r.RemoteAddr = "PATCH", "/elsewhere", "192.0.2.9"
		w.WriteHeader(http.StatusCreated)
	})
	r := c.Request(idemtest.Exchange{Key: "a", Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}})
	for _, want := range []string{"201 ", "replay 201 "} {
		r.Body = io.NopCloser(strings.NewReader("amount=1"))
		got, _ := idemtest.Describe(t, c.Do(r))
		require.Equal(t, want, got)
		require.Nil(t, r.Form)
		require.Nil(t, r.PostForm)
		require.Empty(t, r.PathValue("id"))
	}
}

// A goroutine that the handler left behind may go on with the request. That is
// no data race with the end of the request.
func TestRequestThatAGoroutineGoesOnWith(t *testing.T) {
	mux, done := http.NewServeMux(), make(chan struct{})
	release := make(chan struct{})
	mux.HandleFunc("POST /charge/{id}", func(w http.ResponseWriter, r *http.Request) {
		go func() {
			defer close(done)
			<-release
			_ = r.Pattern + r.PathValue("id")
			r.SetPathValue("id", "2")
			r.Pattern = "the goroutine's"
		}()
		w.WriteHeader(http.StatusCreated)
	})
	c := &idemtest.Client{Handler: idempotency.Middleware(idempotency.NewMemoryStore(), nil)(mux)}
	r := c.Request(idemtest.Exchange{Target: "/charge/1", Key: "a"})
	c.Do(r)
	close(release)
	require.Equal(t, "POST /charge/{id}", r.Pattern)
	<-done
	require.Equal(t, "POST /charge/{id}", r.Pattern)
}
