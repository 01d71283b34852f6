package idempotency_test

import (
	"io"
	"net/http"
	"net/http/httptest"
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

// A server of HTTP/1 closes a body that was read when the response goes out. A
// handler that streams and then drains the body once more meets an error. The
// body has not broken off, so a retry gets the response.
func TestLargeBodyThatIsReadAgainAfterItsEnd(t *testing.T) {
	var again error
	protect := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64})
	server := httptest.NewServer(protect(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		require.NoError(t, err)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "charged")
		require.NoError(t, http.NewResponseController(w).Flush())
		_, again = r.Body.Read(make([]byte, 1))
	})))
	defer server.Close()
	for _, want := range []string{"201 charged", "replay 201 charged"} {
		r, err := http.NewRequest(http.MethodPost, server.URL, strings.NewReader(strings.Repeat("x", 1000)))
		require.NoError(t, err)
		r.Header.Set("Idempotency-Key", "key")
		resp, err := server.Client().Do(r)
		require.NoError(t, err)
		got, _ := idemtest.Describe(t, resp)
		require.Equal(t, want, got)
	}
	require.ErrorIs(t, again, http.ErrBodyReadAfterClose)
}
