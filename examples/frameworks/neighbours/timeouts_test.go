package neighbours

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-chi/chi/v5/middleware"
	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// slow takes three seconds. With listens it gives up without an answer when its
// context ends.
func (s *shop) slow(listens bool) http.Handler {
	return s.counted(func(w http.ResponseWriter, r *http.Request) {
		if work(r, 3*time.Second, listens) {
			w.WriteHeader(http.StatusCreated)
			_, _ = w.Write([]byte("charged"))
		}
	})
}

func limited(next http.Handler) http.Handler {
	return http.TimeoutHandler(next, time.Second, "too late")
}

// Outside, the handler goes on behind the 503, and a retry is replayed what it
// came to.
func TestTimeoutHandlerOutside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(idempotency.Options{})
		h := limited(s.once(s.slow(false)))

		require.Equal(t, http.StatusServiceUnavailable, direct(h).Code)
		during := direct(h)
		require.Equal(t, http.StatusConflict, during.Code)
		require.Contains(t, during.Body.String(), "in_progress")
		time.Sleep(3 * time.Second)
		retry := direct(h)
		require.Equal(t, "true", retry.Header().Get("Idempotent-Replayed"))
		require.Equal(t, http.StatusCreated, retry.Code)
		require.Equal(t, "charged", retry.Body.String())
		require.EqualValues(t, 1, s.runs.Load())
	})
}

// A handler that gives up at the end of its context, without an answer, leaves a
// key whose outcome is not known.
func TestTimeoutHandlerOutsideOfAHandlerThatGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(idempotency.Options{})
		h := limited(s.once(s.slow(true)))

		require.Equal(t, http.StatusServiceUnavailable, direct(h).Code)
		synctest.Wait()
		retry := direct(h)
		require.Equal(t, http.StatusConflict, retry.Code)
		require.Contains(t, retry.Body.String(), "outcome_unknown")
		require.EqualValues(t, 1, s.runs.Load())
	})
}

// Inside, the 503 frees the key while the handler is running, and a retry runs
// beside it.
func TestWrongTimeoutHandlerInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(idempotency.Options{})
		h := s.once(limited(s.slow(false)))

		require.Equal(t, http.StatusServiceUnavailable, direct(h).Code)
		require.Equal(t, http.StatusServiceUnavailable, direct(h).Code)
		require.EqualValues(t, 2, s.runs.Load())
		time.Sleep(3 * time.Second)
	})
}

// chi's Timeout only ends the context. What a handler answers after that is
// stored and sent. One that gives up without an answer leaves a key whose outcome
// is not known, and the 504 comes too late.
func TestChiTimeoutOutside(t *testing.T) {
	for name, row := range map[string]struct {
		listens      bool
		first, retry string
	}{
		"goes on":  {false, "charged", "charged"},
		"gives up": {true, "outcome_unknown", "outcome_unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShop(idempotency.Options{})
				h := middleware.Timeout(time.Second)(s.once(s.slow(row.listens)))

				require.Contains(t, direct(h).Body.String(), row.first)
				require.Contains(t, direct(h).Body.String(), row.retry)
				require.EqualValues(t, 1, s.runs.Load())
			})
		})
	}
}

// Inside, chi's Timeout answers 504 for a handler that gave up, which frees the
// key however far the handler got. With AtMostOnce the 504 is replayed.
func TestWrongChiTimeoutInside(t *testing.T) {
	for name, row := range map[string]struct {
		atMostOnce bool
		runs       int
	}{
		"by default":   {false, 2},
		"at most once": {true, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShop(idempotency.Options{AtMostOnce: row.atMostOnce})
				h := s.once(middleware.Timeout(time.Second)(s.slow(true)))
				for range 2 {
					require.Equal(t, http.StatusGatewayTimeout, direct(h).Code)
				}
				require.EqualValues(t, row.runs, s.runs.Load())
			})
		})
	}
}
