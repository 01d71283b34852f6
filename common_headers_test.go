package idempotency_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// What a header says is replayed byte by byte, whether many say the same, or
// something much like it, or nobody else does.
func TestCommonHeadersAreReplayedVerbatim(t *testing.T) {
	names := []string{"Content-Type", "Cache-Control", "X-Content-Type-Options", "Access-Control-Allow-Origin",
		"Location", "Etag", "X-Request-Id", "X-Nobody-Elses", "content-type", "LOCATION"}
	values := []string{"application/json", "application/jsom", "Application/JSON", "application/json; charset=utf-8",
		"application/json; charset=UTF-8", "application/json; charset=utf-9", "application/problem+json",
		"text/html; charset=utf-8", "text/HTML; charset=utf-8", "no-store", "no-cache", "NO-STORE", "nosniff", "nosniFF",
		"*", "!", "", " ", "x", "\xff\xfe", strings.Repeat("long", 100)}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			for i, value := range values {
				for _, list := range [][]string{{value}, {value, "second"}, {"first", value}, {value, value}} {
					c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
						w.Header()[name] = list
						w.WriteHeader(http.StatusCreated)
					})
					for range 2 {
						w := httptest.NewRecorder()
						c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
						require.Equal(t, list, w.Header()[name], "value %d", i)
					}
					require.Equal(t, 1, c.Runs())
				}
			}
		})
	}
}
