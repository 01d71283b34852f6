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
	claim := func(token string, once bool) idempotency.Claim {
		return idempotency.Claim{Token: token, Fingerprint: []byte("print"), Lease: time.Minute, TTL: time.Hour, Once: once}
	}
	complete := func(t *testing.T, s miniStore, token string) {
		require.NoError(t, s.Complete(t.Context(), "key", token, idempotency.Result{TTL: time.Hour}))
	}
	for name, end := range map[string]func(t *testing.T, s miniStore, acquire func(token string, once bool) idempotency.State){
		"completed": func(t *testing.T, s miniStore, _ func(string, bool) idempotency.State) { complete(t, s, "A") },
		"released": func(t *testing.T, s miniStore, _ func(string, bool) idempotency.State) {
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
		},
		"renewed and completed": func(t *testing.T, s miniStore, acquire func(string, bool) idempotency.State) {
			require.Equal(t, idempotency.Acquired, acquire("A", false))
			require.Equal(t, idempotency.Acquired, acquire("A", true))
			complete(t, s, "A")
		},
		"taken over and completed": func(t *testing.T, s miniStore, acquire func(string, bool) idempotency.State) {
			s.mini.FastForward(time.Minute + time.Millisecond)
			require.Equal(t, idempotency.Acquired, acquire("C", false))
			complete(t, s, "C")
		},
		"expired and completed": func(t *testing.T, s miniStore, _ func(string, bool) idempotency.State) {
			s.mini.FastForward(2 * time.Hour)
			complete(t, s, "A")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newMiniStore(t, nil)
			acquire := func(token string, once bool) idempotency.State {
				rec, err := s.Acquire(t.Context(), "key", claim(token, once))
				require.NoError(t, err)
				return rec.State
			}
			messages := idemtest.DialRedis(t, s.mini.Addr()).Subscribe(t.Context(), "idem:key............................")
			t.Cleanup(func() { _ = messages.Close() })
			_, err := messages.Receive(t.Context())
			require.NoError(t, err)
			require.Equal(t, idempotency.Acquired, acquire("A", false))
			require.Equal(t, idempotency.InProgress, acquire("B", false))
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
		first := claimOf("A")
		first.Once = once
		_, err := s.Acquire(t.Context(), "key", first)
		require.NoError(t, err)
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
