package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMetrics(t *testing.T) {
	api := newHandler(nil)
	charge := func(key, body string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/charge", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		return w.Code
	}
	require.Equal(t, http.StatusCreated, charge("", "amount=1"), "not counted: it has no key")
	require.Equal(t, http.StatusCreated, charge("a", "amount=1"))
	require.Equal(t, http.StatusCreated, charge("a", "amount=1"))
	require.Equal(t, http.StatusUnprocessableEntity, charge("a", "amount=2"))
	require.Equal(t, http.StatusBadRequest, charge("b", ""))
	require.Equal(t, http.StatusCreated, charge("b", "amount=1"))
	require.Equal(t, http.StatusBadRequest, charge("not a key", "amount=1"))

	w := httptest.NewRecorder()
	api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code)
	for _, line := range []string{
		`idempotency_requests_total{outcome="executed"} 2`,
		`idempotency_requests_total{outcome="released"} 1`,
		`idempotency_requests_total{outcome="replayed"} 1`,
		`idempotency_requests_total{outcome="key_reused"} 1`,
		`idempotency_requests_total{outcome="key_invalid"} 1`,
		`idempotency_requests_total{outcome="outcome_unknown"} 0`,
		`idempotency_request_duration_seconds_count{outcome="executed"} 2`,
		`idempotency_wait_seconds_count 0`,
		`idempotency_repeated_attempts_total 1`,
	} {
		require.Contains(t, w.Body.String(), line+"\n")
	}
}
