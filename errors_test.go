package idempotency_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// Which errors are worth a retry, and when.
func TestWhatIsRetryable(t *testing.T) {
	for code, row := range map[string]struct {
		retryable  bool
		retryAfter time.Duration
		header     string
	}{
		"key_missing":         {},
		"key_invalid":         {},
		"key_reused":          {},
		"in_progress":         {true, time.Second, "1"},
		"outcome_unknown":     {},
		"response_not_stored": {},
		"record_unreadable":   {},
		"body_incomplete":     {true, 0, ""},
		"body_too_large":      {},
		"store_unavailable":   {true, 1500 * time.Millisecond, "2"},
	} {
		w := httptest.NewRecorder()
		idempotency.WriteError(w, nil, &idempotency.Error{Status: 409, Code: code, RetryAfter: row.retryAfter})
		_, p := idemtest.Describe(t, w.Result())
		require.Equal(t, row.retryable, p.Retryable, code)
		require.Equal(t, row.header, w.Header().Get("Retry-After"), code)
	}
}

func TestErrorBody(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, DocsURL: "https://docs.example/idempotency"}, nil)
	resp := c.Do(c.Request(idemtest.Exchange{}))
	require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
	require.Equal(t, "no-store", resp.Header.Get("Cache-Control"))
	require.Equal(t, "en", resp.Header.Get("Content-Language"))
	require.Equal(t, `<https://docs.example/idempotency>; rel="describedby"`, resp.Header.Get("Link"))
	got, p := idemtest.Describe(t, resp)
	require.Equal(t, "400 key_missing", got)
	require.Equal(t, "Idempotency-Key is missing", p.Title)
	require.Equal(t, "https://docs.example/idempotency", p.Type)

	var seen *idempotency.Error
	c = idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, ErrorHandler: func(w http.ResponseWriter, r *http.Request, err *idempotency.Error) {
		seen = err
		w.WriteHeader(http.StatusTeapot)
	}}, nil)
	require.Equal(t, http.StatusTeapot, c.Do(c.Request(idemtest.Exchange{})).StatusCode)
	require.ErrorIs(t, seen, idempotency.ErrKeyMissing)
	require.Equal(t, "about:blank", seen.Type)
}
