package idempotency_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

// A pausedStore stands for a process that is stopped (a virtual machine that is
// moved, a container out of CPU) when the answer to its claim has come.
type pausedStore struct {
	*idempotency.MemoryStore
	token string // of the process: the first that asks
	times int    // how often it is stopped
}

func (s *pausedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.MemoryStore.Acquire(ctx, key, c)
	if s.token == "" {
		s.token = c.Token
	}
	if s.token == c.Token && s.times > 0 {
		s.times--
		time.Sleep(3 * c.Lease)
	}
	return rec, err
}

// withPausedStore runs a test with a function that asks and returns the status,
// "replayed" after it where it is one. The first to ask is stopped.
func withPausedStore(t *testing.T, times int, opts idempotency.Options, test func(t *testing.T, ask func() string, runs *int)) {
	synctest.Test(t, func(t *testing.T) {
		store := &pausedStore{MemoryStore: idempotency.NewMemoryStore(), times: times}
		opts.Lease = time.Second
		runs := 0
		h := idempotency.Middleware(store, &opts)(http.HandlerFunc(
			func(w http.ResponseWriter, _ *http.Request) { runs++; w.WriteHeader(http.StatusCreated) }))
		test(t, func() string {
			r := httptest.NewRequest(http.MethodPost, "/charge", nil)
			r.Header.Set("Idempotency-Key", "key")
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Header().Get("Idempotent-Replayed") != "" {
				return w.Result().Status + ", replayed"
			}
			return w.Result().Status
		}, &runs)
	})
}

// A claim whose lease is over before the handler starts may belong to someone
// else by then: the handler does not start, and the answer is that of who ran.
func TestLateClaimDoesNotRun(t *testing.T) {
	withPausedStore(t, 1, idempotency.Options{}, func(t *testing.T, ask func() string, runs *int) {
		late := make(chan string)
		go func() { late <- ask() }()
		synctest.Wait()
		require.Equal(t, "201 Created", ask(), "takes over after the lease")
		require.Equal(t, "201 Created, replayed", <-late)
		require.Equal(t, 1, *runs)
	})
}

func TestLateClaimThatNobodyTookRuns(t *testing.T) {
	withPausedStore(t, 1, idempotency.Options{}, func(t *testing.T, ask func() string, runs *int) {
		require.Equal(t, "201 Created", ask())
		require.Equal(t, 1, *runs)
	})
}

// A process that is late again and again has no business with the key.
func TestLateClaimIsGivenBack(t *testing.T) {
	withPausedStore(t, 2, idempotency.Options{}, func(t *testing.T, ask func() string, runs *int) {
		require.Equal(t, "503 Service Unavailable", ask())
		require.Zero(t, *runs)
		time.Sleep(500 * time.Millisecond) // less than the lease
		require.Equal(t, "201 Created", ask())
		require.Equal(t, 1, *runs)
	})
}

// FailOpen is for a store that is down. This one is up, and knows who runs.
func TestLateClaimDoesNotFailOpen(t *testing.T) {
	withPausedStore(t, 2, idempotency.Options{FailOpen: true}, func(t *testing.T, ask func() string, runs *int) {
		late := make(chan string)
		go func() { late <- ask() }()
		time.Sleep(5 * time.Second) // it has renewed its claim, which is over again
		require.Equal(t, "201 Created", ask(), "takes over after the lease")
		require.Equal(t, "503 Service Unavailable", <-late)
		require.Equal(t, 1, *runs)
		time.Sleep(100 * time.Millisecond) // for the claim that it gives back
	})
}
