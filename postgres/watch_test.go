//go:build unix

package postgres_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5"
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

// A connection that brings nothing any more, and does not break either, is found
// out. The waiters must not wait for it.
func TestWatchOverADeafConnection(t *testing.T) {
	server := startServer(t)
	proxy := startProxy(t, "127.0.0.1:"+server.Port)
	config := server.dial(4).Config()
	dial := config.ConnConfig.DialFunc
	var dialed atomic.Int64
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dialed.Add(1) == 2 { // the first one is of Migrate, in the pool of the store
			addr = proxy.addr
		}
		return dial(ctx, network, addr)
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	store := newStore(t, pool, nil)
	changed, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	proxy.deafen()
	select {
	case <-changed:
	case <-time.After(patience):
		require.Fail(t, "the waiter still waits")
	}
}

// A listener whose connection is in order goes on through silence.
func TestWatchThroughSilence(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err := store.Acquire(ctx, "key", claim("A", time.Minute))
	require.NoError(t, err)
	changed, err := store.Watch(ctx, "key")
	require.NoError(t, err)
	_, err = store.Acquire(ctx, "key", claim("B", time.Minute))
	require.NoError(t, err)
	other, err := store.Watch(ctx, "other")
	require.NoError(t, err)
	// The listener tests its connection. Another one in its place sees that.
	probes, err := pgx.ConnectConfig(ctx, pool.Config().ConnConfig)
	require.NoError(t, err)
	defer func() { _ = probes.Close(context.Background()) }()
	var listen string
	require.NoError(t, pool.QueryRow(ctx, `SELECT query FROM pg_stat_activity WHERE query LIKE 'LISTEN %'`).Scan(&listen))
	_, err = probes.Exec(ctx, listen)
	require.NoError(t, err)
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err = probes.WaitForNotification(waiting)
	require.NoError(t, err)
	require.NoError(t, store.Complete(ctx, "key", "A", idempotency.Result{TTL: time.Hour}))
	select {
	case <-changed:
	case <-waiting.Done():
		require.Fail(t, "the waiter still waits")
	}
	select {
	case <-other: // as all channels are when the connection is given up
		require.Fail(t, "the listener has not gone on")
	default:
	}
}

// A key that is completed while the connection is still tested has changed. The
// waiter learns that, and the end of the test is no failure.
func TestWatchIsToldBeforeItBegins(t *testing.T) {
	server := startServer(t)
	owner := newStore(t, server.dial(4), nil)
	_, err := owner.Watch(t.Context(), "key") // Complete notifies for it
	require.NoError(t, err)
	for _, token := range []string{"A", "B"} {
		_, err := owner.Acquire(t.Context(), "key", claim(token, time.Minute))
		require.NoError(t, err)
	}
	config := server.dial(4).Config()
	// The watch listens by now, and its test needs a connection of the pool.
	config.PrepareConn = func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		_, err := conn.Exec(ctx, "BEGIN") // so what it sends does not arrive
		return true, errors.Join(err, owner.Complete(ctx, "key", "A", idempotency.Result{TTL: time.Hour}))
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	changed, err := postgres.NewStore(pool, nil).Watch(t.Context(), "key")
	require.NoError(t, err)
	<-changed
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
