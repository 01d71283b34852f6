//go:build unix

package postgres_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// startPgBouncer starts a pooler in transaction mode, and returns its URL.
func startPgBouncer(t *testing.T, s *server) string {
	binary, err := exec.LookPath("pgbouncer")
	if err != nil && os.Getenv("POSTGRES_REQUIRED") == "1" {
		t.Fatal("POSTGRES_REQUIRED=1, but there is no pgbouncer on the PATH")
	}
	if err != nil {
		t.Skip("no pgbouncer on the PATH")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, listener.Close())
	ini := fmt.Sprintf("[databases]\npostgres = host=127.0.0.1 user=test port=%s\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"+
		"listen_port = %s\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 4\n", s.Port, port)
	require.NoError(t, os.WriteFile(s.Dir+"/pgbouncer.ini", []byte(ini), 0o644))
	cmd := exec.Command(binary, s.Dir+"/pgbouncer.ini")
	s.Demote(cmd)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return "postgres://test@127.0.0.1:" + port + "/postgres?sslmode=disable"
}

// Prepared statements and notifications do not get through.
func TestPgBouncer(t *testing.T) {
	server := startServer(t)
	config, err := pgxpool.ParseConfig(startPgBouncer(t, server))
	require.NoError(t, err)
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	defer pool.Close()
	require.Eventually(t, func() bool { return pool.Ping(t.Context()) == nil }, patience, 20*time.Millisecond)
	store := newStore(t, pool, &postgres.Options{MaxConns: 16})
	for i := range 10 {
		require.Equal(t, 1, race(t, store, fmt.Sprint("key", i), 16))
	}
	_, err = pool.Exec(t.Context(), `CREATE TABLE orders (item text)`)
	require.NoError(t, err)
	h := orderHandler(store)
	for range 2 {
		require.Equal(t, 201, send(t.Context(), h, "order"))
	}
	var orders int
	require.NoError(t, pool.QueryRow(t.Context(), `SELECT count(*) FROM orders`).Scan(&orders))
	require.Equal(t, 1, orders)
	_, err = store.Watch(t.Context(), "key1")
	require.Error(t, err, "a duplicate would wait for a notification that does not come")
	rec, err := store.Acquire(t.Context(), "key1", claim("late", time.Minute))
	require.NoError(t, err)
	require.Equal(t, idempotency.InProgress, rec.State)
}
