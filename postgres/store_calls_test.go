//go:build unix

package postgres_test

import (
	"testing"
	"time"

	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// The functions of a clock that the test sets hide those of PostgreSQL, because
// the search_path names their schema first.
const virtualClock = `
	CREATE SCHEMA virtual;
	CREATE TABLE virtual.clock AS SELECT pg_catalog.clock_timestamp() AS now;
	CREATE FUNCTION virtual.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT now FROM virtual.clock';
	CREATE FUNCTION virtual.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now FROM virtual.clock'`

// What a client sees when a call goes wrong is what the table of the library
// says, as with a MemoryStore.
func TestStoreCalls(t *testing.T) {
	server := startServer(t)
	admin := server.dial(1)
	_, err := admin.Exec(t.Context(), virtualClock)
	require.NoError(t, err)
	_, err = admin.Exec(t.Context(), `SET synchronous_commit = off`)
	require.NoError(t, err)
	pool, err := pgxpool.New(t.Context(), server.URL()+"&search_path=virtual,pg_catalog&synchronous_commit=off")
	require.NoError(t, err)
	defer pool.Close()
	store := newStore(t, pool, &postgres.Options{MaxConns: 2})
	idemtest.CheckStoreCalls(t, "..", store, func(now time.Time) {
		_, err := admin.Exec(t.Context(), `UPDATE virtual.clock SET now = $1`, now)
		idemtest.Must(err)
	})
}
