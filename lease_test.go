package idempotency_test

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A lease is renewed every third of it, again and again.
func TestLeaseIsRenewedEveryThirdOfIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var asked []time.Duration
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
			if method == "Acquire" {
				asked = append(asked, time.Since(start))
			}
		}}
		c := idemtest.NewClient(store, &idempotency.Options{Lease: 3 * time.Minute}, idemtest.Lasting(4*time.Minute+time.Second))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		const m = time.Minute
		require.Equal(t, []time.Duration{0, m, 2 * m, 3 * m, 4 * m}, asked)
	})
}

// A store that lost the claim of a running handler has it again with the next
// renewal. Before that, for a third of the lease at most, a retry would run.
func TestRenewalClaimsALostKeyAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lease, moment = 3 * time.Minute, time.Millisecond
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		opts := idempotency.Options{Lease: lease, Wait: idempotency.NoWait}
		c := idemtest.NewClient(store, &opts, idemtest.Lasting(lease+time.Second))
		first := make(chan *http.Response, 1)
		go func() { first <- c.Do(c.Request(idemtest.Exchange{Key: "a"})) }()
		time.Sleep(lease/3 + moment) // it has just been renewed
		empty := idempotency.NewMemoryStore()
		store.Replace(empty)
		time.Sleep(lease/3 - 2*moment)
		require.Zero(t, empty.Len(), "until the next renewal")
		time.Sleep(2 * moment)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		answer, _ := idemtest.Describe(t, <-first)
		require.Equal(t, "201 charge 1", answer)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
		require.Equal(t, 1, c.Runs())
	})
}

// A renewal counts from the moment on at which it was sent, however long the
// store takes to answer: it may have come to the store at once.
func TestLeaseEndsWithTheLastRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent time.Time
		slow := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
			if method == "Acquire" {
				sent = time.Now()
				time.Sleep(300 * time.Millisecond)
			}
		}}
		store := &idemtest.FaultyStore{Store: slow}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			time.Sleep(25 * time.Second) // two renewals
			store.Fail("Acquire", errors.New("down"))
			<-r.Context().Done()
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			require.Equal(t, 30*time.Second, time.Since(sent))
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}

// A Commit is a renewal too.
func TestLeaseEndsWithTheLastCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			store.Fail("Acquire", errors.New("down"))
			time.Sleep(24 * time.Second)
			store.Fail("Acquire", nil)
			committed := time.Now()
			require.NoError(t, idemtest.Execution(r).Commit(r.Context()))
			store.Fail("Acquire", errors.New("down"))
			<-r.Context().Done()
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			require.Equal(t, 30*time.Second, time.Since(committed))
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}
