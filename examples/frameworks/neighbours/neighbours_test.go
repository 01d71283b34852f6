// Package neighbours has a test for each kind of middleware that people have
// beside this one: what is stored, and what a retry gets, with the neighbour
// outside and, where it goes wrong, inside. docs/frameworks.md has the list.
package neighbours

import (
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/stretchr/testify/require"
)

// A shop is a handler under a key. It counts the runs.
type shop struct {
	once func(http.Handler) http.Handler
	runs atomic.Int32
}

func newShop(opts idempotency.Options) *shop {
	opts.Wait = idempotency.NoWait
	return &shop{once: idempotency.Middleware(idempotency.NewMemoryStore(), &opts)}
}

// counted counts the runs of next.
func (s *shop) counted(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.runs.Add(1)
		next(w, r)
	}
}

// charge answers 201 with a body.
func (s *shop) charge() http.Handler {
	return s.counted(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte("charged"))
	})
}

// post sends a request with key k1 to url. Header is a list of names and values.
func post(t *testing.T, url string, header ...string) try.Answer {
	t.Helper()
	return try.Send(t, try.Request(t, url, "k1", header...))
}

// A request to a mux inside of the middleware meets no router when it is
// answered by a replay, so outer metrics see no Pattern. With the middleware
// around the handlers of a mux, they see it on every request.
func TestPatternOfAReplay(t *testing.T) {
	for name, want := range map[string]string{"around the mux": "", "in the mux": "POST /charge/{id}"} {
		t.Run(name, func(t *testing.T) {
			s, mux := newShop(idempotency.Options{}), http.NewServeMux()
			h := s.once(mux)
			if want == "" {
				mux.Handle("POST /charge/{id}", s.charge())
			} else {
				mux.Handle("POST /charge/{id}", s.once(s.charge()))
				h = mux
			}
			var patterns []string
			url := try.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				h.ServeHTTP(w, r)
				patterns = append(patterns, r.Pattern)
			}))

			try.Same(t, post(t, url+"/charge/1"), post(t, url+"/charge/1"))
			require.Equal(t, []string{"POST /charge/{id}", want}, patterns)
			require.EqualValues(t, 1, s.runs.Load())
		})
	}
}

// direct sends a request with key k1 to h in the time of a synctest bubble, which
// a connection would not follow.
func direct(h http.Handler) *httptest.ResponseRecorder {
	r, w := httptest.NewRequest(http.MethodPost, "/charge", nil), httptest.NewRecorder()
	r.Header.Set("Idempotency-Key", "k1")
	h.ServeHTTP(w, r)
	return w
}

// work takes d, or until the context ends when the handler listens to it.
func work(r *http.Request, d time.Duration, listens bool) (finished bool) {
	ended := r.Context().Done()
	if !listens {
		ended = nil
	}
	select {
	case <-time.After(d):
		return true
	case <-ended:
		return false
	}
}
