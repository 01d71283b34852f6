package main

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

func TestTLSByURL(t *testing.T) {
	client, err := newClient("rediss://redis.internal:6380/3", func(string) string { return "" })
	require.NoError(t, err)
	defer client.Close()
	opts := client.(*redis.Client).Options()
	require.NotNil(t, opts.TLSConfig)
	require.Equal(t, "redis.internal:6380", opts.Addr)
	require.Equal(t, 3, opts.DB)
	require.True(t, opts.ContextTimeoutEnabled)
}

// A customer is stuck, and the keys are in PostgreSQL, in a table and a schema
// that the service has named.
func TestPostgres(t *testing.T) {
	url := "postgres://test@127.0.0.1:" + idemtest.StartPostgres(t).Port + "/postgres"
	pool, err := pgxpool.New(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	_, err = pool.Exec(t.Context(), "CREATE SCHEMA shop")
	require.NoError(t, err)
	store := postgres.NewStore(pool, &postgres.Options{Schema: "shop", Table: "keys"})
	t.Cleanup(store.Close)
	require.NoError(t, store.Migrate(t.Context()))

	runs := 0
	opts := &idempotency.Options{
		AtMostOnce: true, Wait: idempotency.NoWait, Lease: 4 * time.Second, StoreTimeout: 2 * time.Second,
	}
	h := idempotency.Middleware(store, opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if runs++; runs == 1 {
			die(w, r)
		}
		charge(w, r)
	}))
	s := &service{handler: h}
	operate := func(args ...string) (code int, out string) {
		var stdout, stderr bytes.Buffer
		args = append(args, "POST", "/charge", "order-17", "-postgres", url, "-schema", "shop", "-table", "keys", "-yes")
		code = run(t.Context(), args, func(string) string { return "" }, strings.NewReader(""), &stdout, &stderr)
		return code, stdout.String() + stderr.String()
	}

	code, out := operate("show")
	require.Equal(t, exitNothing, code, out)
	require.Zero(t, s.post("order-17"))
	require.Eventually(t, func() bool { // the lease ends by the clock of PostgreSQL
		code, out = operate("show")
		return code == exitDone && strings.Contains(out, "state:        Abandoned")
	}, idemtest.Patience, 50*time.Millisecond)
	require.Equal(t, http.StatusConflict, s.post("order-17"))

	code, out = operate("forget")
	require.Equal(t, exitDone, code, out)
	require.Equal(t, http.StatusCreated, s.post("order-17"))
	code, out = operate("show")
	require.Equal(t, exitDone, code, out)
	require.Contains(t, out, "status:       201 Created\n")
	require.Equal(t, 2, runs)
}

func TestPostgresFails(t *testing.T) {
	for url, want := range map[string]int{
		"postgres://operator:hunter2@[bad":             exitUsage,
		"postgres://operator:hunter2@127.0.0.1:1/shop": exitFailed, // a port without a server
	} {
		var stdout, stderr bytes.Buffer
		args := []string{"show", "POST", "/charge", "order-17", "-postgres", url}
		require.Equal(t, want, run(t.Context(), args, func(string) string { return "" }, strings.NewReader(""), &stdout, &stderr))
		require.NotEmpty(t, stderr.String())
		require.NotContains(t, stderr.String(), "hunter2")
	}
}
