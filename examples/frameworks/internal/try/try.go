// Package try sends the requests of the tests in this module.
package try

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// An Answer is what a client sees of a response.
type Answer struct {
	Status   int
	Header   http.Header
	Body     string
	Replayed bool
}

// Post sends a request with a key to a server that has only this handler. It
// goes over a connection, because a recorder of httptest would also take what
// net/http refuses.
func Post(t *testing.T, h http.Handler, path, key string) Answer {
	t.Helper()
	server := httptest.NewServer(h)
	defer server.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+path, strings.NewReader("{}"))
	require.NoError(t, err)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	resp, err := server.Client().Do(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Header.Del("Date")
	replayed := resp.Header.Get("Idempotent-Replayed") == "true"
	resp.Header.Del("Idempotent-Replayed")
	resp.Header.Del("Content-Length") // a replay of a stream knows its length
	return Answer{resp.StatusCode, resp.Header, string(body), replayed}
}

// Same requires that a retry gets what the first request got, as a replay.
func Same(t *testing.T, first, retry Answer) {
	t.Helper()
	require.False(t, first.Replayed)
	require.True(t, retry.Replayed, "the retry got %d %s", retry.Status, retry.Body)
	retry.Replayed = false
	require.Equal(t, first, retry)
}
