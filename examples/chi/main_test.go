package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// newAPI starts the API with the given provider and post.
func newAPI(t *testing.T, provider http.Handler, post func(context.Context, string) error) string {
	t.Helper()
	bank := httptest.NewServer(provider)
	t.Cleanup(bank.Close)
	api := httptest.NewServer(newHandler(idempotency.NewMemoryStore(), nil, &server{
		users: map[string]string{
			"Bearer alice-token": "alice", "Bearer alice-new-token": "alice", "Bearer bob-token": "bob",
		},
		provider: bank.URL,
		client:   bank.Client(),
		post:     post,
	}))
	t.Cleanup(api.Close)
	return api.URL
}

func send(t *testing.T, url, token, key, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(answer)
}

func TestKeysBelongToTheUser(t *testing.T) {
	api := newAPI(t, newProvider(), nil)
	const body = `{"amount":100}`

	res, _ := send(t, api+"/payments", "", "order-17", body)
	require.Equal(t, http.StatusUnauthorized, res.StatusCode)
	res, problem := send(t, api+"/payments", "alice-token", "", body)
	require.Equal(t, http.StatusBadRequest, res.StatusCode)
	require.Contains(t, problem, "key_missing")

	tests := []struct {
		name, token, charge string
		replayed            string
	}{
		{"first", "alice-token", "ch_1", ""},
		{"retry", "alice-token", "ch_1", "true"},
		{"retry with another token", "alice-new-token", "ch_1", "true"},
		{"another user", "bob-token", "ch_2", ""},
	}
	for _, tt := range tests { // the order counts
		res, answer := send(t, api+"/payments", tt.token, "order-17", body)
		require.Equal(t, http.StatusCreated, res.StatusCode, tt.name)
		require.JSONEq(t, `{"amount":100,"charge":"`+tt.charge+`"}`, answer, tt.name)
		require.Equal(t, tt.replayed, res.Header.Get("Idempotent-Replayed"), tt.name)
	}
}

// TestProviderIsAskedWithTheSameKey: the provider's answer is lost after the
// charge, as when this process dies in between. The retry runs the handler
// again, and the provider does not charge again.
func TestProviderIsAskedWithTheSameKey(t *testing.T) {
	var mu sync.Mutex
	var keys []string
	provider := newProvider()
	api := newAPI(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		keys = append(keys, r.Header.Get("Idempotency-Key"))
		lost := len(keys) == 1
		mu.Unlock()
		if lost {
			provider.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		provider.ServeHTTP(w, r)
	}), nil)

	res, _ := send(t, api+"/payments", "alice-token", "order-17", `{"amount":100}`)
	require.Equal(t, http.StatusBadGateway, res.StatusCode)
	res, answer := send(t, api+"/payments", "alice-token", "order-17", `{"amount":100}`)
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Empty(t, res.Header.Get("Idempotent-Replayed"), "the handler ran twice")
	require.JSONEq(t, `{"amount":100,"charge":"ch_1"}`, answer)

	_, answer = send(t, api+"/payments", "alice-token", "order-18", `{"amount":100}`)
	require.JSONEq(t, `{"amount":100,"charge":"ch_2"}`, answer, "ch_1 was the only charge before")

	mu.Lock()
	defer mu.Unlock()
	require.Len(t, keys, 3)
	require.Equal(t, keys[0], keys[1])
	require.NotEqual(t, keys[0], keys[2])
	require.NotContains(t, keys, "order-17", "the provider gets a key of its own")
}

func TestLetterIsPostedOnce(t *testing.T) {
	tests := []struct {
		name   string
		err    error
		status int
	}{
		{"posted", nil, http.StatusCreated},
		{"failed half-way", errors.New("paper jam"), http.StatusInternalServerError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var posted atomic.Int32
			api := newAPI(t, newProvider(), func(context.Context, string) error {
				posted.Add(1)
				return tt.err
			})
			for _, replayed := range []string{"", "true"} {
				res, _ := send(t, api+"/letters", "alice-token", "letter-1", `{"address":"1 Main Street"}`)
				require.Equal(t, tt.status, res.StatusCode)
				require.Equal(t, replayed, res.Header.Get("Idempotent-Replayed"))
			}
			require.EqualValues(t, 1, posted.Load())
		})
	}
}

// TestCrashDoesNotPostAgain: the panic passes the idempotency middleware, which
// leaves the key claimed, and becomes a 500 in Recoverer. Leases run in virtual
// time, so there is no network here.
func TestCrashDoesNotPostAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		posted := 0
		api := newHandler(idempotency.NewMemoryStore(), nil, &server{
			users: map[string]string{"Bearer alice-token": "alice"},
			post: func(context.Context, string) error {
				posted++
				panic("out of paper")
			},
		})
		send := func() *httptest.ResponseRecorder {
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/letters",
				strings.NewReader(`{"address":"1 Main Street"}`))
			req.Header.Set("Authorization", "Bearer alice-token")
			req.Header.Set("Idempotency-Key", "letter-1")
			rec := httptest.NewRecorder()
			api.ServeHTTP(rec, req)
			return rec
		}

		require.Equal(t, http.StatusInternalServerError, send().Code)
		res := send()
		require.Equal(t, http.StatusConflict, res.Code)
		require.Contains(t, res.Body.String(), "in_progress", "the lease is running")
		time.Sleep(30 * time.Second)
		res = send()
		require.Equal(t, http.StatusConflict, res.Code)
		require.Contains(t, res.Body.String(), "outcome_unknown", "the lease is over, and nobody takes over")
		require.Equal(t, 1, posted)
	})
}

func TestCORS(t *testing.T) {
	api := newAPI(t, newProvider(), nil)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, api+"/payments", nil)
	require.NoError(t, err)
	req.Header.Set("Access-Control-Request-Method", http.MethodPost)
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusNoContent, res.StatusCode, "a preflight needs neither a token nor a key")
	require.Contains(t, res.Header.Get("Access-Control-Allow-Headers"), "Idempotency-Key")

	for range 2 {
		res, _ = send(t, api+"/payments", "alice-token", "order-17", `{"amount":100}`)
		require.Len(t, res.Header.Values("Access-Control-Allow-Origin"), 1)
		require.Contains(t, res.Header.Get("Access-Control-Expose-Headers"), "Idempotent-Replayed")
	}
	require.Equal(t, "true", res.Header.Get("Idempotent-Replayed"))
}

func TestRefusalsAreAnswersToo(t *testing.T) {
	api := newAPI(t, newProvider(), nil)
	for path, body := range map[string]string{"/payments": `{"amount":-1}`, "/letters": `{}`} {
		for _, replayed := range []string{"", "true"} {
			res, _ := send(t, api+path, "alice-token", "key", body)
			require.Equal(t, http.StatusUnprocessableEntity, res.StatusCode)
			require.Equal(t, replayed, res.Header.Get("Idempotent-Replayed"))
		}
	}
}

// Middleware outside finds out about the route whether the request has a key or
// not, as tracing and metrics need.
func TestRouteForMiddlewareOutside(t *testing.T) {
	var pattern, route string
	outside := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() { pattern, route = r.Pattern, chi.RouteContext(r.Context()).RoutePattern() }()
			next.ServeHTTP(w, r)
		})
	}
	r := chi.NewRouter()
	r.Use(outside, idempotency.Middleware(idempotency.NewMemoryStore(), nil))
	r.Route("/orders", func(r chi.Router) {
		r.Post("/{id}", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
	})
	srv := httptest.NewServer(r)
	defer srv.Close()
	for _, key := range []string{"", "order-17"} {
		pattern, route = "", ""
		res, _ := send(t, srv.URL+"/orders/1", "", key, "")
		require.Equal(t, http.StatusCreated, res.StatusCode)
		require.Equal(t, "/orders/{id}", pattern, "key %q", key)
		require.Equal(t, "/orders/{id}", route, "key %q", key)
	}
}
