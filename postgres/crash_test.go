//go:build unix

package postgres_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// What a process that is to die gets in its environment.
const (
	killAt  = "POSTGRES_TEST_KILL_AT"
	killURL = "POSTGRES_TEST_URL"
)

func TestMain(m *testing.M) {
	if os.Getenv(killAt) != "" {
		doomed()
		return
	}
	os.Exit(m.Run())
}

// A killer kills its process before and after statements, at the step of the
// given number.
type killer struct {
	last  int64
	steps atomic.Int64
}

func (k *killer) step() {
	if k.steps.Add(1) != k.last {
		return
	}
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Kill()
	}
	fmt.Fprintln(os.Stderr, err)
	select {} // not one step more
}

func (k *killer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	k.step()
	return ctx
}

func (k *killer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) { k.step() }

// orderHandler writes an order with the key as its item.
func orderHandler(store *postgres.Store) http.Handler {
	handle := func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		tx, err := store.Begin(ctx)
		if err == nil {
			defer func() { _ = tx.Rollback(ctx) }()
			_, err = tx.Exec(ctx, `INSERT INTO orders VALUES ($1)`, r.Header.Get("Idempotency-Key"))
		}
		if err == nil {
			err = tx.Commit(ctx)
		}
		if err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusCreated)
	}
	return idempotency.Middleware(store, &idempotency.Options{Lease: time.Second})(http.HandlerFunc(handle))
}

func send(ctx context.Context, h http.Handler, key string) int {
	r := httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader("tea")).WithContext(ctx)
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code
}

// sendUntilCreated is a client that repeats its request.
func sendUntilCreated(t *testing.T, h http.Handler, key string) {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithCancel(t.Context())
		code := send(ctx, h, key)
		cancel()
		if code == http.StatusCreated {
			return
		}
		if time.Now().After(end) {
			t.Errorf("%s still gets %d", key, code)
			return
		}
	}
}

// doomed serves one request in a process that kills itself.
func doomed() {
	last, err := strconv.ParseInt(os.Getenv(killAt), 10, 64)
	if err != nil {
		panic(err)
	}
	config, err := pgxpool.ParseConfig(os.Getenv(killURL))
	if err != nil {
		panic(err)
	}
	config.ConnConfig.Tracer = &killer{last: last}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		panic(err)
	}
	fmt.Print(send(context.Background(), orderHandler(postgres.NewStore(pool, nil)), fmt.Sprint("key", last)))
}

// A process is killed before and after each statement of a request. Its client
// repeats the request elsewhere, and there is one order.
func TestKilledAtEveryStep(t *testing.T) {
	server := startServer(t)
	pool := server.dial(4)
	h := orderHandler(newStore(t, pool, nil))
	_, err := pool.Exec(t.Context(), `CREATE TABLE orders (item text)`)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	step, survived := 1, false
	for ; !survived; step++ {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), killAt+"="+strconv.Itoa(step), killURL+"="+server.URL())
		out, err := cmd.Output()
		survived = err == nil
		if survived {
			require.Equal(t, "201", string(out))
		}
		sendUntilCreated(t, h, fmt.Sprint("key", step))
		var orders int
		require.NoError(t, pool.QueryRow(t.Context(), `SELECT count(*) FROM orders WHERE item = $1`, fmt.Sprint("key", step)).Scan(&orders))
		require.Equal(t, 1, orders, "orders after a kill at step %d", step)
	}
	require.Greater(t, step, 10) // claim, begin, insert, complete and commit have two steps each
}

// PostgreSQL is killed and started again under load. Every key has one order.
func TestServerKilled(t *testing.T) {
	server := startServer(t)
	pool := server.dial(8)
	h := orderHandler(newStore(t, pool, nil))
	_, err := pool.Exec(t.Context(), `CREATE TABLE orders (item text)`)
	require.NoError(t, err)
	var done atomic.Int64
	var all sync.WaitGroup
	const clients, keys = 8, 60
	for c := range clients {
		all.Go(func() {
			for k := range keys {
				sendUntilCreated(t, h, fmt.Sprint("key-", c, "-", k))
				done.Add(1)
			}
		})
	}
	for _, some := range []int64{clients * keys / 4, clients * keys / 2} {
		require.Eventually(t, func() bool { return done.Load() >= some }, patience, time.Millisecond)
		server.Crash()
		server.Restart()
	}
	all.Wait()
	var orders, items int
	require.NoError(t, pool.QueryRow(t.Context(), `SELECT count(*), count(DISTINCT item) FROM orders`).Scan(&orders, &items))
	require.Equal(t, clients*keys, items)
	require.Equal(t, items, orders)
}
