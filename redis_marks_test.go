package idempotency_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// Who was told that a key is in progress is told when that is over, whatever
// became of the claim meanwhile: the mark in the cell outlives renewals and
// take-overs.
func TestRedisMarkOfAWaiter(t *testing.T) {
	complete := func(t *testing.T, s miniStore, token string) {
		require.NoError(t, s.Complete(t.Context(), "key", token, idempotency.Result{TTL: time.Hour}))
	}
	for name, end := range map[string]func(t *testing.T, s miniStore, acquire func(token string) idempotency.State){
		"completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) { complete(t, s, "A") },
		"released": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
		},
		"renewed and completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			for _, once := range []bool{false, true} {
				renewal := renewalOf("A", 1)
				renewal.Once = once
				rec, err := s.Acquire(t.Context(), "key", renewal)
				require.NoError(t, err)
				require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 1, Once: once}, rec)
			}
			complete(t, s, "A")
		},
		"claimed twice and completed": func(t *testing.T, s miniStore, acquire func(string) idempotency.State) {
			require.Equal(t, idempotency.Acquired, acquire("A"))
			complete(t, s, "A")
		},
		"taken over and completed": func(t *testing.T, s miniStore, acquire func(string) idempotency.State) {
			s.mini.FastForward(time.Minute + time.Millisecond)
			require.Equal(t, idempotency.Acquired, acquire("C"))
			complete(t, s, "C")
		},
		"expired and completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			s.mini.FastForward(2 * time.Hour)
			complete(t, s, "A")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newMiniStore(t, nil)
			acquire := func(token string) idempotency.State { return acquireAs(t, s, "key", token).State }
			messages := idemtest.DialRedis(t, s.mini.Addr()).Subscribe(t.Context(), "idem:key............................")
			t.Cleanup(func() { _ = messages.Close() })
			_, err := messages.Receive(t.Context())
			require.NoError(t, err)
			require.Equal(t, idempotency.Acquired, acquire("A"))
			require.Equal(t, idempotency.InProgress, acquire("B"))
			end(t, s, acquire)
			_, err = messages.ReceiveTimeout(t.Context(), 10*time.Second)
			require.NoError(t, err)
		})
	}
}

// The mark does not unmark what must never be taken over, nor mark anything.
func TestRedisMarkOfAWaiterLeavesOnce(t *testing.T) {
	for _, once := range []bool{false, true} {
		s := newMiniStore(t, nil)
		acquireAs(t, s, "key", "A")
		mark := renewalOf("A", 1)
		mark.Once = once
		rec, err := s.Acquire(t.Context(), "key", mark)
		require.NoError(t, err)
		require.Equal(t, once, rec.Once)
		for range 2 { // the second finds the mark
			require.Equal(t, idempotency.InProgress, acquireAs(t, s, "key", "B").State)
		}
		s.mini.FastForward(2 * time.Minute)
		want := idempotency.Acquired
		if once {
			want = idempotency.Abandoned
		}
		require.Equal(t, want, acquireAs(t, s, "key", "C").State)
	}
}

// A lease holds to the millisecond, and no longer.
func TestRedisLeaseEndsToTheMillisecond(t *testing.T) {
	s := newMiniStore(t, nil)
	acquireAs(t, s, "key", "A")
	s.mini.FastForward(time.Minute)
	rec := acquireAs(t, s, "key", "B")
	require.Equal(t, idempotency.InProgress, rec.State, "Redis counts whole milliseconds: the last may have just begun")
	require.Equal(t, time.Millisecond, rec.Remaining)
	s.mini.FastForward(time.Millisecond)
	require.Equal(t, idempotency.Acquired, acquireAs(t, s, "key", "B").State)
}
