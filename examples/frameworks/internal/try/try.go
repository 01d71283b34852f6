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

// Serve starts a server that has only this handler, and returns its URL. Answers
// go over a connection, because a recorder of httptest would also take what
// net/http refuses.
func Serve(t *testing.T, h http.Handler) string {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

// Request makes a request with a key. Header is a list of names and values.
func Request(t *testing.T, url, key string, header ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("{}"))
	require.NoError(t, err)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return r
}

// Send sends a request, over a connection that no other request uses.
func Send(t *testing.T, r *http.Request) Answer {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Header.Del("Date")
	replayed := resp.Header.Get("Idempotent-Replayed") == "true"
	resp.Header.Del("Idempotent-Replayed")
	resp.Header.Del("Content-Length") // a replay of a stream knows its length
	resp.Header.Del("Connection")
	return Answer{resp.StatusCode, resp.Header, string(body), replayed}
}

// Post sends a request with a key to a server that has only this handler.
func Post(t *testing.T, h http.Handler, path, key string) Answer {
	t.Helper()
	return Send(t, Request(t, Serve(t, h)+path, key))
}

// Same requires that a retry gets what the first request got, as a replay.
func Same(t *testing.T, first, retry Answer) {
	t.Helper()
	require.False(t, first.Replayed)
	require.True(t, retry.Replayed, "the retry got %d %s", retry.Status, retry.Body)
	retry.Replayed = false
	require.Equal(t, first, retry)
}
