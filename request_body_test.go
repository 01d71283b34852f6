package idempotency_test

import (
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
