package idempotency_test

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// The renewals of an at-most-once key say so again without a Commit, in case
// that the store has lost the record.
func TestRenewalRepeatsAtMostOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{AtMostOnce: true}, func(http.ResponseWriter, *http.Request) {
			store.Replace(idempotency.NewMemoryStore())
			time.Sleep(15 * time.Second)
			panic("boom")
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
		time.Sleep(time.Minute)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}

// Who polls for long still learns within a second that the key has changed, and
// does not ask much more often than that.
func TestPollingStaysPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lasts, duplicates = 5 * time.Minute, 10
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()} // cannot watch
		c := idemtest.NewClient(store, &idempotency.Options{Wait: time.Hour}, idemtest.Lasting(lasts))
		start := time.Now()
		var all sync.WaitGroup
		all.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		for i := range duplicates {
			all.Go(func() {
				c.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
				if late := time.Since(start) - lasts; late > time.Second {
					t.Errorf("duplicate %d was answered %v late", i, late)
				}
			})
		}
		all.Wait()
		// Half a second apart at least, but for the first few and the renewals.
		require.Less(t, store.Count("Acquire"), duplicates*(10+2*int(lasts/time.Second)))
	})
}

// What the store has rolled back is not tried again: there is nothing left to
// be committed, and the client is waiting.
func TestRolledBackIsFinal(t *testing.T) {
	for name, handler := range map[string]struct {
		status int
		method string
		get    string
	}{
		"Complete": {201, "Complete", "503 store_unavailable"},
		"Release":  {503, "Release", "503 "},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{}, idemtest.Answering(handler.status))
				store.Fail(handler.method, idempotency.ErrRolledBack)
				start := time.Now()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: handler.get})
				require.Zero(t, time.Since(start))
				time.Sleep(time.Minute) // what goes on in the background ends
			})
		})
	}
}

// A heldReply keeps the answers to claims back while hold is not nil.
type heldReply struct {
	idempotency.Store
	hold chan struct{}
}

func (s *heldReply) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.Store.Acquire(ctx, key, c)
	if s.hold != nil {
		<-s.hold
	}
	return rec, err
}

// The store has marked the claim, but by the time that Commit knows it the
// handler has ended and freed the key: nothing must be promised any more.
func TestCommitWhoseReplyComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &heldReply{Store: idempotency.NewMemoryStore()}
		result := make(chan error, 1)
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if e := idemtest.Execution(r); e.Attempt() == 1 {
				store.hold = make(chan struct{})
				go func() { result <- e.Commit(context.WithoutCancel(r.Context())) }()
				synctest.Wait()
			}
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		close(store.hold)
		require.Error(t, <-result)
		store.hold = nil
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 "})
		require.Equal(t, 2, c.Runs())
	})
}
