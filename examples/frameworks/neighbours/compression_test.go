package neighbours

import (
	"compress/gzip"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5/middleware"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/klauspost/compress/gzhttp"
	"github.com/stretchr/testify/require"
)

var compressors = map[string]func(http.Handler) http.Handler{
	"gzhttp": func(next http.Handler) http.Handler { return gzhttp.GzipHandler(next) },
	"chi":    middleware.Compress(5),
}

var document = strings.Repeat("charged ", 1000)

// document answers with a body that is worth compressing. With flush it is sent
// in two parts.
func (s *shop) document(flush bool) http.Handler {
	return s.counted(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, document[:4000])
		if flush {
			_ = http.NewResponseController(w).Flush()
		}
		_, _ = io.WriteString(w, document[4000:])
	})
}

// text returns the body of an answer as the client reads it.
func text(t *testing.T, a try.Answer) string {
	t.Helper()
	if a.Header.Get("Content-Encoding") == "" {
		return a.Body
	}
	require.Equal(t, "gzip", a.Header.Get("Content-Encoding"))
	r, err := gzip.NewReader(strings.NewReader(a.Body))
	require.NoError(t, err)
	body, err := io.ReadAll(r)
	require.NoError(t, err)
	return string(body)
}

// The body is stored plain. Each answer has the encoding that its own request
// accepts, and the same text.
func TestCompressionOutside(t *testing.T) {
	for name, compress := range compressors {
		for _, flush := range []bool{false, true} {
			for _, accepted := range [][2]string{{"gzip", "identity"}, {"identity", "gzip"}, {"gzip", "gzip"}} {
				t.Run(name+" "+strings.Join(accepted[:], " then "), func(t *testing.T) {
					s := newShop(idempotency.Options{})
					url := try.Serve(t, compress(s.once(s.document(flush))))
					for i, encoding := range accepted {
						answer := post(t, url, "Accept-Encoding", encoding)
						require.Equal(t, http.StatusCreated, answer.Status)
						require.Equal(t, i == 1, answer.Replayed)
						require.Equal(t, encoding == "gzip", answer.Header.Get("Content-Encoding") == "gzip")
						require.Equal(t, document, text(t, answer))
						require.Equal(t, []string{"text/plain"}, answer.Header.Values("Content-Type"))
						require.LessOrEqual(t, len(answer.Header.Values("Vary")), 1)
					}
					require.EqualValues(t, 1, s.runs.Load())
				})
			}
		}
	}
}

// Inside, a retry gets the encoding of the first request, which it may not
// accept.
func TestWrongCompressionInside(t *testing.T) {
	for name, compress := range compressors {
		t.Run(name, func(t *testing.T) {
			s := newShop(idempotency.Options{})
			url := try.Serve(t, s.once(compress(s.document(false))))

			first := post(t, url, "Accept-Encoding", "gzip")
			retry := post(t, url, "Accept-Encoding", "identity")
			require.True(t, retry.Replayed)
			require.Equal(t, "gzip", retry.Header.Get("Content-Encoding"))
			require.Equal(t, first.Body, retry.Body)
		})
	}
}
