package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// TestTransportSendsAgainByItself is what README.md says about net/http: the
// client below makes a single call and has no retries of its own.
func TestTransportSendsAgainByItself(t *testing.T) {
	protect := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
	unprotected := func(next http.Handler) http.Handler { return next }
	tests := []struct {
		name       string
		header     string
		middleware func(http.Handler) http.Handler
		reused     bool
		fails      bool
		executed   int32
	}{
		{name: "server without idempotency", header: "Idempotency-Key", middleware: unprotected, reused: true, executed: 2},
		{name: "other spelling", header: "X-Idempotency-Key", middleware: unprotected, reused: true, executed: 2},
		{name: "server with idempotency", header: "Idempotency-Key", middleware: protect, reused: true, executed: 1},
		{name: "no key", header: "X-Other", middleware: unprotected, reused: true, fails: true, executed: 1},
		{name: "new connection", header: "Idempotency-Key", middleware: unprotected, fails: true, executed: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var executed atomic.Int32
			handler := tt.middleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				executed.Add(1)
				w.WriteHeader(http.StatusCreated)
			}))
			mux := http.NewServeMux()
			mux.HandleFunc("GET /", func(http.ResponseWriter, *http.Request) {})
			mux.Handle("POST /", first(1, loseAnswer)(handler))
			srv := httptest.NewServer(mux)
			defer srv.Close()
			client := srv.Client()

			if tt.reused {
				res, err := client.Get(srv.URL) // leaves an idle connection
				require.NoError(t, err)
				require.NoError(t, res.Body.Close())
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, strings.NewReader("amount=100"))
			require.NoError(t, err)
			req.Header.Set(tt.header, NewKey())
			res, err := client.Do(req)
			require.Equal(t, tt.executed, executed.Load())
			if tt.fails {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			require.NoError(t, res.Body.Close())
			require.Equal(t, http.StatusCreated, res.StatusCode)
		})
	}
}
