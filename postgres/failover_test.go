//go:build unix

package postgres_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// A pair is a primary with a standby.
type pair struct {
	t                *testing.T
	primary, standby *server
	admin            *pgxpool.Pool // of the primary
}

// startPair starts both. A synchronous standby has what the primary has
// answered. An asynchronous one may be behind.
func startPair(t *testing.T, mode string) *pair {
	p := &pair{t: t, primary: startServer(t)}
	p.standby = &server{p.primary.StartStandby()}
	p.admin = p.primary.dial(2)
	if mode == "sync" {
		for _, sql := range []string{`ALTER SYSTEM SET synchronous_standby_names = 'standby'`, `SELECT pg_reload_conf()`} {
			_, err := p.admin.Exec(t.Context(), sql)
			require.NoError(t, err)
		}
	}
	var state string
	require.Eventually(t, func() bool {
		err := p.admin.QueryRow(t.Context(), `SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'`).Scan(&state)
		return err == nil && state == mode
	}, patience, 5*time.Millisecond)
	return p
}

// config is that of a pool of at most n connections, to whichever server takes
// writes.
func (p *pair) config(n int) *pgxpool.Config {
	config, err := pgxpool.ParseConfig(fmt.Sprintf("postgres://test@127.0.0.1:%s,127.0.0.1:%s/postgres"+
		"?sslmode=disable&target_session_attrs=read-write&pool_max_conns=%d", p.primary.Port, p.standby.Port, n))
	require.NoError(p.t, err)
	return config
}

func (p *pair) dial(config *pgxpool.Config) *pgxpool.Pool {
	pool, err := pgxpool.NewWithConfig(p.t.Context(), config)
	require.NoError(p.t, err)
	p.t.Cleanup(pool.Close)
	return pool
}

// failOver kills the primary and promotes the standby.
func (p *pair) failOver() {
	p.primary.Crash()
	p.standby.Promote()
}

// stopStandby has the standby receive nothing until the function is called that
// it returns. The connection to it stays open.
func (p *pair) stopStandby(t testing.TB) (goOn func()) {
	var pid int
	require.NoError(t, p.standby.dial(1).QueryRow(t.Context(), `SELECT pid FROM pg_stat_wal_receiver`).Scan(&pid))
	receiver, err := os.FindProcess(pid)
	require.NoError(t, err)
	require.NoError(t, idemtest.Stop(receiver))
	goOn = sync.OnceFunc(func() { _ = idemtest.Continue(receiver) })
	t.Cleanup(goOn) // a process that is stopped does not end either
	return goOn
}

// postUntilCreated is a client that repeats its request.
func (s *shop) postUntilCreated(key string) (got string) {
	require.Eventually(s.t, func() bool {
		got = s.post(key)
		return strings.HasPrefix(got, "201")
	}, 4*patience, 20*time.Millisecond)
	return got
}

// A bank pays once for each key: those of the path /tx in the database, with
// the response, and those of other paths in a ledger of its own.
type bank struct {
	store *postgres.Store
	http.Handler

	mu    sync.Mutex        // guards what follows
	paid  map[string]int    // how often the ledger has a key
	seen  map[string]string // the first answer to a key
	wrong []string          // keys with different answers
}

// openBank opens a bank. The transactions are safe whatever the lease is. A
// payment in the ledger relies on a lease that is longer than the failover.
func openBank(t *testing.T, pool *pgxpool.Pool, background *idempotency.Background) *bank {
	b := &bank{store: newStore(t, pool, nil), paid: make(map[string]int), seen: make(map[string]string)}
	_, err := pool.Exec(t.Context(), `CREATE TABLE payments (key text)`)
	require.NoError(t, err)
	mux := http.NewServeMux()
	for path, lease := range map[string]time.Duration{"/tx": 3 * time.Second, "/ledger": 5 * time.Minute} {
		mux.Handle(path, idempotency.Middleware(b.store, &idempotency.Options{
			Lease: lease, Background: background, Logger: slog.New(slog.DiscardHandler),
		})(http.HandlerFunc(b.pay)))
	}
	b.Handler = mux
	return b
}

func (b *bank) pay(w http.ResponseWriter, r *http.Request) {
	ctx, key := r.Context(), r.Header.Get("Idempotency-Key")
	if r.URL.Path != "/tx" {
		b.mu.Lock()
		b.paid[key]++
		b.mu.Unlock()
	} else if err := b.payWithTx(ctx, key); err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusCreated)
	_, _ = fmt.Fprint(w, "payment ", rand.Text())
}

func (b *bank) payWithTx(ctx context.Context, key string) error {
	tx, err := b.store.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if _, err := tx.Exec(ctx, `INSERT INTO payments VALUES ($1)`, key); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// post sends one request, and reports whether it was answered by a payment.
func (b *bank) post(ctx context.Context, path, key string) (replayed, paid bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // as a server does
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader("100")).WithContext(ctx)
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	b.ServeHTTP(w, r)
	if w.Code != http.StatusCreated {
		return false, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if first, ok := b.seen[key]; !ok {
		b.seen[key] = w.Body.String()
	} else if first != w.Body.String() {
		b.wrong = append(b.wrong, key)
	}
	return w.Header().Get("Idempotent-Replayed") == "true", true
}

func (b *bank) answered() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.seen)
}

// pathOf is where a client sends its keys.
func pathOf(client int) string { return []string{"/tx", "/ledger"}[client%2] }

// The primary is killed under load, and the synchronous standby takes its place.
// Whatever was answered before that is replayed afterwards, and each key is paid
// once. Watchers go on at the new primary.
func TestPrimaryKilledUnderLoad(t *testing.T) {
	p := startPair(t, "sync")
	background := new(idempotency.Background)
	pool := p.dial(p.config(16))
	b := openBank(t, pool, background)
	woken, err := b.store.Watch(t.Context(), "watched")
	require.NoError(t, err)
	const clients = 64
	stop := make(chan struct{})
	var all sync.WaitGroup
	keys := make([]int, clients)
	for c := range clients {
		all.Go(func() {
			for t.Context().Err() == nil {
				select {
				case <-stop:
					return
				default:
				}
				key := fmt.Sprint(c, "-", keys[c])
				keys[c]++
				for _, paid := b.post(t.Context(), pathOf(c), key); !paid && t.Context().Err() == nil; {
					time.Sleep(20 * time.Millisecond) // as a client does
					_, paid = b.post(t.Context(), pathOf(c), key)
				}
			}
		})
	}
	awaitAnswers := func(n int) {
		require.Eventually(t, func() bool { return b.answered() >= n }, 4*patience, time.Millisecond)
	}
	awaitAnswers(4 * clients)
	p.failOver()
	awaitAnswers(b.answered() + 4*clients)
	close(stop)
	all.Wait()
	<-woken
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	require.NoError(t, background.Wait(ctx))
	inTx := 0
	for c := range clients {
		for k := range keys[c] {
			replayed, _ := b.post(ctx, pathOf(c), fmt.Sprint(c, "-", k))
			require.True(t, replayed, "client %d, key %d", c, k)
		}
		if pathOf(c) == "/tx" {
			inTx += keys[c]
		}
	}
	require.Empty(t, b.wrong)
	for key, n := range b.paid {
		require.Equal(t, 1, n, key)
	}
	var rows, distinct int
	require.NoError(t, pool.QueryRow(ctx, `SELECT count(*), count(DISTINCT key) FROM payments`).Scan(&rows, &distinct))
	require.Equal(t, []int{inTx, inTx}, []int{rows, distinct})
	notifies(t, b.store)
}

// notifies checks that a watcher is told of a response.
func notifies(t *testing.T, store *postgres.Store) {
	ctx := t.Context()
	for _, token := range []string{"A", "B"} {
		_, err := store.Acquire(ctx, "watched", claim(token, time.Minute))
		require.NoError(t, err)
	}
	var changed <-chan struct{}
	require.Eventually(t, func() (ok bool) {
		var err error
		changed, err = store.Watch(ctx, "watched")
		return err == nil
	}, patience, 50*time.Millisecond)
	_, err := store.Acquire(ctx, "watched", claim("B", time.Minute))
	require.NoError(t, err)
	require.NoError(t, store.Complete(ctx, "watched", "A", idempotency.Result{TTL: time.Hour}))
	<-changed
}

// A standby that is promoted may be behind. An answer that a client has got is
// lost with an asynchronous one, and its handler runs again. With a synchronous
// one the client has not got the answer.
func TestPromotedStandbyIsBehind(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ mode, first, retry string }{
		{"async", "201", "201 replayed"},
		{"sync", "503", "503"},
	} {
		t.Run(row.mode, func(t *testing.T) {
			t.Parallel() // it waits most of the time
			p := startPair(t, row.mode)
			var crash sync.Once
			effects := 0 // outside of the database
			s := openShopOn(t, p.dial(p.config(4)), &idempotency.Options{
				Lease: 5 * time.Second, StoreTimeout: 2 * time.Second, Wait: idempotency.NoWait,
			}, func(s *shop, w http.ResponseWriter, r *http.Request) {
				crash.Do(p.standby.Crash)
				if err := s.order(r.Context()); err != nil {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				effects++
				w.WriteHeader(http.StatusCreated)
			})
			awaitReplay(t, p) // the table, which the asynchronous one may not have yet
			require.Equal(t, row.first, s.post("key"))
			awaitCancelled(t, p)
			require.Equal(t, row.retry, s.post("key"))
			p.primary.Crash()
			p.standby.Restart()
			p.standby.Promote()
			require.Equal(t, "201", s.postUntilCreated("key"))
			require.Equal(t, 2, effects)
			require.Equal(t, 1, s.orders(), "the effects in the database")
		})
	}
}

// awaitCancelled waits until no commit waits for the standby. PostgreSQL hears
// later than the client that the client has given up.
func awaitCancelled(t *testing.T, p *pair) {
	require.Eventually(t, func() (ok bool) {
		err := p.admin.QueryRow(t.Context(), `SELECT count(*) = 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'`).Scan(&ok)
		return err == nil && ok
	}, patience, 5*time.Millisecond)
}

// awaitReplay waits until the standby has what the primary has written.
func awaitReplay(t *testing.T, p *pair) {
	require.Eventually(t, func() (ok bool) {
		err := p.admin.QueryRow(t.Context(), `SELECT flush_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication`).Scan(&ok)
		return err == nil && ok
	}, patience, 5*time.Millisecond)
}

// While a synchronous standby is stopped, nothing is acknowledged that it does
// not have, although PostgreSQL commits it on the primary.
func TestStandbyStops(t *testing.T) {
	t.Parallel() // it waits most of the time
	p := startPair(t, "sync")
	stopsInHandler := func(t *testing.T, pool *pgxpool.Pool) (s *shop, goOn func(), runs *int) {
		runs = new(int)
		s = openShopOn(t, pool, &idempotency.Options{Lease: 5 * time.Second, StoreTimeout: 2 * time.Second, Wait: idempotency.NoWait},
			func(s *shop, w http.ResponseWriter, r *http.Request) {
				*runs++
				err := s.order(r.Context())
				if *runs == 1 {
					goOn = p.stopStandby(t)
				}
				if err != nil {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				w.WriteHeader(http.StatusCreated)
				_, _ = w.Write(make([]byte, 64<<10)) // so much that a replay begins to arrive before its commit
			})
		t.Cleanup(func() { _, _ = p.admin.Exec(context.Background(), `DROP TABLE orders, idempotency`) })
		t.Cleanup(func() { goOn() })
		require.Equal(t, "503", s.post("key"), "the transaction is not acknowledged")
		awaitCancelled(t, p)
		require.Equal(t, "503", s.post("key"), "nor may a retry tell what it has read on the primary")
		require.Equal(t, 1, *runs)
		return s, goOn, runs
	}
	t.Run("requests are refused and go on", func(t *testing.T) {
		s, goOn, runs := stopsInHandler(t, p.dial(p.config(4)))
		require.Equal(t, "503", s.post("another"), "a claim is not acknowledged")
		require.Equal(t, 1, *runs)
		goOn()
		require.Equal(t, "201 replayed", s.postUntilCreated("key"))
		require.Equal(t, 1, *runs)
		require.Equal(t, 1, s.orders())
		s.postUntilCreated("another")
	})
	// Such a pool asks PostgreSQL to cancel, and waits for what that answers: that
	// the statement was successful.
	t.Run("a pool that waits after it has cancelled", func(t *testing.T) {
		config := p.config(4)
		config.ConnConfig.RuntimeParams["client_min_messages"] = "error" // no warning
		config.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
			return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: patience}
		}
		s, goOn, runs := stopsInHandler(t, p.dial(config))
		goOn()
		require.Equal(t, "201 replayed", s.postUntilCreated("key"))
		require.Equal(t, 1, *runs)
	})
	t.Run("an operator cancels", func(t *testing.T) { operatorCancels(t, p) })
	t.Run("a claim that loses a race", func(t *testing.T) { claimLosesRace(t, p) })
}

// operatorCancels has an operator cancel the calls of the store that wait for a
// standby. PostgreSQL answers then that they were successful.
func operatorCancels(t *testing.T, p *pair) {
	config := p.config(4)
	var notices atomic.Int64 // of the program's own handler
	config.ConnConfig.OnNotice = func(*pgconn.PgConn, *pgconn.Notice) { notices.Add(1) }
	store := newStore(t, p.dial(config), nil)
	ctx := t.Context()
	_, err := store.Acquire(ctx, "completed", claim("A", time.Minute))
	require.NoError(t, err)
	goOn := p.stopStandby(t)
	for name, call := range map[string]func() error{
		"claim":    func() error { _, err := store.Acquire(ctx, "claimed", claim("A", time.Minute)); return err },
		"response": func() error { return store.Complete(ctx, "completed", "A", idempotency.Result{TTL: time.Hour}) },
	} {
		for range 2 { // as the middleware does, which asks again
			answer := make(chan error, 1)
			go func() { answer <- call() }()
			require.Eventually(t, func() (ok bool) {
				err := p.admin.QueryRow(ctx, `SELECT count(pg_cancel_backend(pid)) > 0 FROM pg_stat_activity
					WHERE wait_event = 'SyncRep'`).Scan(&ok)
				return err == nil && ok
			}, patience, 5*time.Millisecond)
			require.Error(t, <-answer, name)
		}
	}
	require.Positive(t, notices.Load())
	goOn()
	rec, err := store.Acquire(ctx, "completed", claim("B", time.Minute))
	require.NoError(t, err)
	require.Equal(t, idempotency.Completed, rec.State)
}

// claimLosesRace has the owner of a lapsed claim store a response, which the
// standby does not get, while another claim takes the key over.
func claimLosesRace(t *testing.T, p *pair) {
	ctx := t.Context()
	store := newStore(t, p.dial(p.config(4)), nil)
	_, err := store.Acquire(ctx, "raced", idempotency.Claim{Token: "A", Lease: time.Microsecond, TTL: time.Hour})
	require.NoError(t, err)
	goOn := p.stopStandby(t)
	config := p.config(4)
	config.ConnConfig.Tracer = &raceTracer{race: func() {
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.Error(t, store.Complete(short, "raced", "A", idempotency.Result{TTL: time.Hour}))
		awaitCancelled(t, p)
	}}
	other := postgres.NewStore(p.dial(config), nil)
	t.Cleanup(other.Close)
	short, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	_, err = other.Acquire(short, "raced", claim("B", time.Minute))
	require.Error(t, err)
	goOn()
	rec, err := other.Acquire(ctx, "raced", claim("B", time.Minute))
	require.NoError(t, err)
	require.Equal(t, idempotency.Completed, rec.State)
}
