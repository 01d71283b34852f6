//go:build unix

package postgres_test

import (
	"context"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

func listeners(t *testing.T, pool *pgxpool.Pool) (n int) {
	require.NoError(t, pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'`).Scan(&n))
	return n
}

func TestWatchSharesOneConnection(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 5 {
		_, err := store.Watch(ctx, "key")
		require.NoError(t, err)
	}
	require.Equal(t, 1, listeners(t, pool))
	cancel()
	require.Eventually(t, func() bool { return listeners(t, pool) == 0 }, patience, 5*time.Millisecond)
}

// A waiter is woken when its connection breaks, and the next one polls.
func TestWatchLosesItsConnection(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	changed, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	_, err = pool.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'`)
	require.NoError(t, err)
	select {
	case <-changed:
	case <-time.After(patience):
		require.Fail(t, "the waiter still waits")
	}
	_, err = store.Watch(t.Context(), "key")
	require.Error(t, err)
}

// Only a cell that a waiter has found in progress is marked: the others cost
// their owners no notification.
func TestOnlyWatchedCellsAreMarked(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err := store.Watch(ctx, "watched")
	require.NoError(t, err)
	for _, key := range []string{"watched", "unwatched"} {
		for _, token := range []string{"A", "B"} {
			_, err := store.Acquire(ctx, key, claim(token, time.Minute))
			require.NoError(t, err)
		}
		require.NoError(t, store.Complete(ctx, key, "A", idempotency.Result{TTL: time.Hour}))
	}
	var marked string
	require.NoError(t, pool.QueryRow(ctx, `SELECT string_agg(key, ',') FROM idempotency WHERE watched`).Scan(&marked))
	require.Equal(t, "watched", marked)
}
