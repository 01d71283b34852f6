package idempotency_test

import (
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// The length of what was meant to be sent is not that of an error.
func TestErrorHasALengthOfItsOwn(t *testing.T) {
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, nil)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3")
		c.handler.ServeHTTP(w, r)
	}))
	defer server.Close()
	r, err := http.NewRequest(http.MethodPost, server.URL, nil)
	require.NoError(t, err)
	r.Header.Set("Idempotency-Key", "not, a key")
	resp, err := server.Client().Do(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	got, p := describe(t, resp)
	require.Equal(t, "400 key_invalid", got)
	require.NotEmpty(t, p.Title)
	require.NotEqual(t, "3", resp.Header.Get("Content-Length"))
	length, err := strconv.Atoi(resp.Header.Get("Content-Length"))
	require.NoError(t, err)
	require.Greater(t, length, 100)
}
