package idempotency_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A labelWriter sets headers when the first WriteHeader comes, be it for a 1xx,
// as compressing middlewares do.
type labelWriter struct {
	http.ResponseWriter
	label string
	done  bool
}

func (w *labelWriter) WriteHeader(status int) {
	if !w.done {
		w.done = true
		w.Header().Set("X-Label", w.label)
		w.Header().Add("Vary", "Accept-Encoding")
		w.Header().Del("X-Internal")
	}
	if status >= 200 { // a ResponseRecorder takes every status for the final one
		w.ResponseWriter.WriteHeader(status)
	}
}

// What is around the middleware is not stored, even if it sets its headers only
// when the first bytes go out, which may be those of a 1xx response.
func TestOuterHeadersOfAnInformationalResponse(t *testing.T) {
	for _, outer := range []string{"", "of the outer"} {
		t.Run("outer header "+outer, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X-Handler", "1")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Add("Vary", "Accept")
				w.WriteHeader(http.StatusCreated)
			})
			for i := range 2 {
				w := httptest.NewRecorder()
				if outer != "" {
					w.Header().Set("X-Internal", outer)
				}
				label := fmt.Sprint("request ", i)
				c.Handler.ServeHTTP(&labelWriter{ResponseWriter: w, label: label}, c.Request(idemtest.Exchange{Key: "a"}))
				h := w.Result().Header
				require.Equal(t, []string{label}, h["X-Label"])
				require.ElementsMatch(t, []string{"Accept-Encoding", "Accept"}, h["Vary"])
				require.Equal(t, "1", h.Get("X-Handler"))
				require.NotContains(t, h, "X-Internal")
			}
			require.Equal(t, 1, c.Runs())
		})
	}
}

// goneWriter is that of a client who has hung up.
type goneWriter struct {
	*httptest.ResponseRecorder
	gone bool
}

func (w *goneWriter) Write(p []byte) (int, error) {
	if w.gone {
		return 0, errors.New("broken pipe")
	}
	return w.ResponseRecorder.Write(p)
}

// As long as the response is kept a client who leaves does not stop the
// handler, which streams to him.
func TestStreamGoesOnWithoutItsClient(t *testing.T) {
	writer := &goneWriter{ResponseRecorder: httptest.NewRecorder()}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxResponseBytes: 20}, func(w http.ResponseWriter, _ *http.Request) {
		_, err := io.WriteString(w, "one ")
		require.NoError(t, err)
		require.NoError(t, http.NewResponseController(w).Flush())
		writer.gone = true
		for _, part := range []string{"two ", "three "} {
			n, err := io.WriteString(w, part)
			require.NoError(t, err)
			require.Equal(t, len(part), n)
		}
	})
	c.Handler.ServeHTTP(writer, c.Request(idemtest.Exchange{Key: "a"}))
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 200 one two three "})
	require.Equal(t, 1, c.Runs())
}
