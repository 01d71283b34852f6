//go:build unix

package postgres_test

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// patience is how long the tests wait for what must happen.
const patience = 30 * time.Second

// A server is a PostgreSQL of the test's own.
type server struct{ *idemtest.PostgresServer }

func startServer(t testing.TB) *server {
	t.Helper()
	return &server{idemtest.StartPostgres(t)}
}

// dial returns a pool of at most n connections.
func (s *server) dial(n int) *pgxpool.Pool {
	pool, err := pgxpool.New(context.Background(), s.URL()+"&pool_max_conns="+strconv.Itoa(n))
	require.NoError(s.T, err)
	s.T.Cleanup(pool.Close)
	return pool
}
