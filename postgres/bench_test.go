//go:build unix

package postgres_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// The store against the fewest statements that could do its work.

func bareTable(b *testing.B) *pgxpool.Pool {
	pool := startServer(b).dial(4)
	_, err := pool.Exec(b.Context(), `CREATE TABLE bare (key text COLLATE "C" PRIMARY KEY, token text, value bytea,
		lease_until timestamptz, expires_at timestamptz); CREATE INDEX ON bare (expires_at)`)
	require.NoError(b, err)
	return pool
}

var body = make([]byte, 512)

func BenchmarkFirstBare(b *testing.B) {
	pool := bareTable(b)
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprint("key", i)
		_, err := pool.Exec(b.Context(), `INSERT INTO bare VALUES ($1, $2, NULL, clock_timestamp() + interval '30 s',
			clock_timestamp() + interval '1 day') ON CONFLICT DO NOTHING`, key, "A")
		require.NoError(b, err)
		_, err = pool.Exec(b.Context(), `UPDATE bare SET value = $3, expires_at = clock_timestamp() + interval '1 day'
			WHERE key = $1 AND token = $2`, key, "A", body)
		require.NoError(b, err)
	}
}

func BenchmarkFirst(b *testing.B) {
	store := newStore(b, startServer(b).dial(4), nil)
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprint("key", i)
		_, err := store.Acquire(b.Context(), key, claim("A", 30*time.Second))
		require.NoError(b, err)
		require.NoError(b, store.Complete(b.Context(), key, "A", idempotency.Result{Value: body, TTL: 24 * time.Hour}))
	}
}

func BenchmarkReplayBare(b *testing.B) {
	pool := bareTable(b)
	_, err := pool.Exec(b.Context(), `INSERT INTO bare VALUES ('key', 'A', $1, clock_timestamp(), clock_timestamp() + interval '1 day')`, body)
	require.NoError(b, err)
	for b.Loop() {
		var token string
		var value []byte
		err := pool.QueryRow(b.Context(), `SELECT token, value FROM bare WHERE key = $1 AND expires_at > clock_timestamp()`, "key").Scan(&token, &value)
		require.NoError(b, err)
	}
}

func BenchmarkReplay(b *testing.B) {
	store := newStore(b, startServer(b).dial(4), nil)
	require.NoError(b, store.Complete(b.Context(), "key", "A", idempotency.Result{Value: body, TTL: 24 * time.Hour}))
	for b.Loop() {
		_, err := store.Acquire(b.Context(), "key", claim("B", 30*time.Second))
		require.NoError(b, err)
	}
}
