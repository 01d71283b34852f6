package idempotency_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// The digest of a large body that is stored does not tell a reader of the store
// that two keys had the same body, nor confirm a guess of it.
func TestDigestOfALargeBodyDependsOnTheKey(t *testing.T) {
	for _, contentType := range []string{"text/plain", "multipart/form-data; boundary=aaa"} {
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(s, &idempotency.Options{MaxBufferedBody: 1}, reading(-1))
		values := map[string]bool{}
		for _, key := range []string{"a", "b"} {
			r := formRequest(c, contentType, encode("aaa", field("x", "1")), 100)
			r.Header.Set("Idempotency-Key", key)
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, "201 ", got)
			values[string(s.LastResult().Value)] = true
		}
		require.Len(t, values, 2, contentType)
	}
}

// Credentials and query lie before the body in one buffer, and may be longer
// than a pooled buffer is: net/http takes a header of 1 MiB.
func TestBodyAfterALongHeader(t *testing.T) {
	for _, size := range []int{63 << 10, 64 << 10, 65 << 10, 300 << 10} {
		for _, body := range []string{"x", strings.Repeat("x", 200<<10)} {
			var got string
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
				all, err := io.ReadAll(r.Body)
				idemtest.Must(err)
				got = string(all)
				w.WriteHeader(http.StatusCreated)
			})
			x := idemtest.Exchange{Key: "a", Body: body, Header: http.Header{"Cookie": {strings.Repeat("c", size)}}}
			for i, get := range []string{"201 ", "replay 201 "} {
				x.Get = get
				c.Check(t, i, x)
			}
			require.Equal(t, body, got)
		}
	}
}
