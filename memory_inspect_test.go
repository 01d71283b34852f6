package idempotency_test

import (
	"bytes"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// What Forget leaves is counted, and gone after the TTL: small records and large
// ones, results and claims.
func TestMemoryForgetIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := idempotency.NewMemoryStore()
		ctx := t.Context()
		const n = 300
		for i := range n {
			key := fmt.Sprint("key ", i)
			acquireAs(t, store, key, "A")
			switch i % 3 {
			case 0:
				require.NoError(t, store.Complete(ctx, key, "A", idempotency.Result{Value: []byte("small"), TTL: time.Hour}))
			case 1:
				large := bytes.Repeat([]byte("l"), 64<<10)
				require.NoError(t, store.Complete(ctx, key, "A", idempotency.Result{Value: large, TTL: time.Hour}))
			}
		}
		time.Sleep(30 * time.Minute)
		full := store.Bytes()
		for i := range n {
			key := fmt.Sprint("key ", i)
			seen, err := store.Inspect(ctx, key)
			require.NoError(t, err)
			require.NoError(t, store.Forget(ctx, key, seen))
			require.ErrorIs(t, store.Forget(ctx, key, idempotency.Cell{State: idempotency.Abandoned}), idempotency.ErrCellChanged)
		}
		require.Equal(t, n, store.Len())
		require.Less(t, store.Bytes(), full-n/3*60<<10, "a large result is not kept")
		for i := range n {
			rec, err := store.Acquire(ctx, fmt.Sprint("key ", i), idempotency.Claim{
				Token: "B", Fingerprint: []byte("two"), Lease: time.Minute, TTL: time.Hour,
			})
			require.NoError(t, err)
			require.Equal(t, 2, rec.Attempt)
		}
		time.Sleep(2 * time.Hour)
		require.Zero(t, store.Len())
		require.Zero(t, store.Bytes())
	})
}

// A replay may still read what is forgotten.
func TestMemoryForgetLeavesWhatWasReturned(t *testing.T) {
	store := idempotency.NewMemoryStore()
	ctx := t.Context()
	for _, size := range []int{10, 64 << 10} {
		key := fmt.Sprint(size)
		value := bytes.Repeat([]byte("v"), size)
		require.NoError(t, store.Complete(ctx, key, "A", idempotency.Result{Fingerprint: []byte("print"), Value: value, TTL: time.Hour}))
		rec := acquireAs(t, store, key, "B")
		seen, err := store.Inspect(ctx, key)
		require.NoError(t, err)
		require.NoError(t, store.Forget(ctx, key, seen))
		for i := range 10 {
			rec, err := store.Acquire(ctx, key, idempotency.Claim{
				Token: fmt.Sprint(i), Fingerprint: []byte("other"), Lease: time.Minute, TTL: time.Hour,
			})
			require.NoError(t, err)
			require.Equal(t, idempotency.Acquired, rec.State)
			require.NoError(t, store.Release(ctx, key, fmt.Sprint(i), time.Hour))
		}
		require.Equal(t, "print", string(rec.Fingerprint))
		require.Equal(t, value, rec.Value)
		require.Equal(t, "print", string(seen.Fingerprint))
		require.Equal(t, value, seen.Value)
	}
}
