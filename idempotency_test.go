package idempotency_test

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
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

func k(key string) []string         { return []string{key} }
func auth(token string) http.Header { return http.Header{"Authorization": {token}} }
