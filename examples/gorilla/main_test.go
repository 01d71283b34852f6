package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/gorilla/mux"
	"github.com/stretchr/testify/require"
)

const (
	keyA = "0f0a1c1e-6a3f-4f0e-9a4e-2d8c4b1c7b11"
	keyB = "5b1e2b6c-0f57-4f5b-8f0e-0f3f7f1c2d3e"
)

func newServer(t *testing.T) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(newHandler(idempotency.NewMemoryStore(), nil))
	t.Cleanup(srv.Close)
	return srv
}

func send(t *testing.T, method, url, key, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	require.NoError(t, err)
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

func TestKeysThatAreRefused(t *testing.T) {
	tests := []struct{ name, key, code, detail string }{
		{"missing", "", "key_missing", ""},
		{"no UUID", "order-17", "key_invalid", "the key must be a UUID"},
		{"almost a UUID", keyA + "0", "key_invalid", "the key must be a UUID"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv := newServer(t)
			res, body := send(t, http.MethodPost, srv.URL+"/orders", tt.key, "")
			require.Equal(t, http.StatusBadRequest, res.StatusCode)
			require.Equal(t, "application/problem+json", res.Header.Get("Content-Type"))
			var problem struct{ Code, Detail string }
			require.NoError(t, json.Unmarshal([]byte(body), &problem))
			require.Equal(t, tt.code, problem.Code)
			require.Contains(t, problem.Detail, tt.detail)

			res, _ = send(t, http.MethodGet, srv.URL+"/orders/1", "", "")
			require.Equal(t, http.StatusNotFound, res.StatusCode, "no order was made")
		})
	}
}

func TestRetriesAreReplayed(t *testing.T) {
	srv := newServer(t)
	res, created := send(t, http.MethodPost, srv.URL+"/orders", keyA, "")
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Equal(t, "/orders/1", res.Header.Get("Location"))
	require.Empty(t, res.Header.Get("Idempotent-Replayed"))

	res, again := send(t, http.MethodPost, srv.URL+"/orders", `"`+keyA+`"`, "")
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Equal(t, "/orders/1", res.Header.Get("Location"))
	require.Equal(t, "true", res.Header.Get("Idempotent-Replayed"), "a quoted key is the same key")
	require.Equal(t, created, again)

	// A path is part of what a key means, so keyA is a new key here.
	for _, key := range []string{keyA, keyA, keyB, keyB} {
		res, _ = send(t, http.MethodPost, srv.URL+"/orders/1/items", key, `"book"`)
		require.Equal(t, http.StatusOK, res.StatusCode)
	}
	_, order := send(t, http.MethodGet, srv.URL+"/orders/1", "", "")
	require.JSONEq(t, `{"id":"1","items":["book","book"]}`, order, "two keys, two books")
}

func TestRoutesWithoutTheMiddleware(t *testing.T) {
	srv := newServer(t)
	res, _ := send(t, http.MethodPost, srv.URL+"/ping", "", "")
	require.Equal(t, http.StatusOK, res.StatusCode, "outside the subrouter no key is required")
	res, _ = send(t, http.MethodPost, srv.URL+"/orders/1/nothing", "", "")
	require.Equal(t, http.StatusNotFound, res.StatusCode, "the router's own answers need no key")
	res, _ = send(t, http.MethodDelete, srv.URL+"/orders/1/items", "", "")
	require.Equal(t, http.StatusMethodNotAllowed, res.StatusCode)
}

// Middleware outside finds out about the route whether the request has a key or
// not, as tracing and metrics need.
func TestRouteForMiddlewareOutside(t *testing.T) {
	var route, id string
	outside := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next.ServeHTTP(w, r)
			route, _ = mux.CurrentRoute(r).GetPathTemplate()
			id = mux.Vars(r)["id"]
		})
	}
	r := mux.NewRouter()
	r.Use(outside, idempotency.Middleware(idempotency.NewMemoryStore(), nil))
	r.HandleFunc("/orders/{id}", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
	srv := httptest.NewServer(r)
	defer srv.Close()
	for _, key := range []string{"", keyA} {
		route, id = "", ""
		res, _ := send(t, http.MethodPost, srv.URL+"/orders/1", key, "")
		require.Equal(t, http.StatusCreated, res.StatusCode)
		require.Equal(t, "/orders/{id}", route, "key %q", key)
		require.Equal(t, "1", id, "key %q", key)
	}
}
