package main

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/storetest"
	"github.com/stretchr/testify/require"
)

// openFile opens a database as one process of a service does.
func openFile(t *testing.T, driver, path string) *sql.DB {
	t.Helper()
	db, err := Open(driver, path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

func openNew(t *testing.T) *sql.DB {
	t.Helper()
	return openFile(t, "sqlite", filepath.Join(t.TempDir(), "test.db"))
}

func newStore(t *testing.T, db *sql.DB) *Store {
	t.Helper()
	store, err := NewStore(t.Context(), db)
	require.NoError(t, err)
	return store
}

func count(t *testing.T, db *sql.DB, what string, args ...any) (n int) {
	t.Helper()
	require.NoError(t, db.QueryRowContext(t.Context(), "SELECT count(*) FROM "+what, args...).Scan(&n))
	return n
}

// A fleet is the stores of several processes on one file. Its calls go to each
// store in turn, so the contract has to hold across processes.
type fleet struct {
	stores []*Store
	calls  atomic.Int64
}

func (f *fleet) next() *Store { return f.stores[int(f.calls.Add(1))%len(f.stores)] }

func (f *fleet) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	return f.next().Acquire(ctx, key, c)
}

func (f *fleet) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	return f.next().Complete(ctx, key, token, r)
}

func (f *fleet) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return f.next().Release(ctx, key, token, keep)
}

func (f *fleet) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	return f.next().Inspect(ctx, key)
}

func (f *fleet) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	return f.next().Forget(ctx, key, seen)
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) idempotency.Store {
		path := filepath.Join(t.TempDir(), "a file?with%23 a name.db")
		return &fleet{stores: []*Store{
			newStore(t, unsynced(t, openFile(t, "sqlite", path))),
			newStore(t, unsynced(t, openFile(t, "sqlite", path))),
		}}
	})
}

// unsynced makes commits cheap. Tests need not survive a power failure.
func unsynced(t *testing.T, db *sql.DB) *sql.DB {
	t.Helper()
	_, err := db.ExecContext(t.Context(), "PRAGMA synchronous = OFF")
	require.NoError(t, err)
	return db
}

func TestExpiredCellsAreDeleted(t *testing.T) {
	db := openNew(t)
	store := newStore(t, db)
	const expired = 10
	for i := range expired {
		key := fmt.Sprint("old ", i)
		_, err := db.ExecContext(t.Context(), upsertCell, key, completed, "token", 1, false, nil, nil, 0, -i)
		require.NoError(t, err)
	}
	for i := 0; count(t, db, "idempotency WHERE expires <= "+now) > 0; i++ {
		require.Less(t, i, expired, "each claim deletes some")
		key := fmt.Sprint("new ", i)
		claim := idempotency.Claim{Token: "token", Lease: time.Hour, TTL: time.Hour}
		before := count(t, db, "idempotency")
		_, err := store.Acquire(t.Context(), key, claim)
		require.NoError(t, err)
		deleted := before + 1 - count(t, db, "idempotency")
		require.Positive(t, deleted)
		require.LessOrEqual(t, deleted, 4, "and not all at once")
		require.Equal(t, 1, count(t, db, "idempotency WHERE key = $1", key))
	}
}

// The driver's defaults are others.
func TestOpen(t *testing.T) {
	db := openNew(t)
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "busy_timeout": "400"} {
		var got string
		require.NoError(t, db.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got))
		require.Equal(t, want, got, pragma)
	}
}
