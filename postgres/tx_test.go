//go:build unix

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
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

// A shop is an API whose handler gets a transaction and writes orders on it.
type shop struct {
	t       *testing.T
	pool    *pgxpool.Pool
	store   *postgres.Store
	handler http.Handler
}

// openShop puts handler behind the middleware. The pool of the handlers has n
// connections.
func openShop(t *testing.T, n int, opts *idempotency.Options, handler func(s *shop, w http.ResponseWriter, r *http.Request)) *shop {
	return openShopOn(t, startServer(t).dial(n), opts, handler)
}

// openShopOn is openShop on a database that has none yet.
func openShopOn(t *testing.T, pool *pgxpool.Pool, opts *idempotency.Options, handler func(s *shop, w http.ResponseWriter, r *http.Request)) *shop {
	s := &shop{t: t, pool: pool, store: newStore(t, pool, nil)}
	_, err := pool.Exec(t.Context(), `CREATE TABLE orders (item text)`)
	require.NoError(t, err)
	if opts == nil {
		opts = &idempotency.Options{}
	}
	s.handler = idempotency.Middleware(s.store, opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler(s, w, r) }))
	return s
}

// post sends an order. It returns the status and "replayed" if the answer is.
func (s *shop) post(key string) (got string) {
	r := httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader("tea"))
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel() // as a server does
	w := httptest.NewRecorder()
	defer func() {
		if v := recover(); v != nil {
			got = fmt.Sprint("panic ", v)
		}
	}()
	s.handler.ServeHTTP(w, r.WithContext(ctx))
	got = fmt.Sprint(w.Code)
	if w.Header().Get("Idempotent-Replayed") == "true" {
		got += " replayed"
	}
	return got
}

// orders counts the orders that are committed.
func (s *shop) orders() (n int) {
	require.NoError(s.t, s.pool.QueryRow(s.t.Context(), `SELECT count(*) FROM orders`).Scan(&n))
	return n
}

// allReturned waits until no connection of the handlers' pool is in use.
func (s *shop) allReturned() {
	require.Eventually(s.t, func() bool { return s.pool.Stat().AcquiredConns() == 0 }, patience, time.Millisecond)
}

// order writes an order and commits it, as every handler does.
func (s *shop) order(ctx context.Context, change ...func(*postgres.Tx)) error {
	tx, err := s.store.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if _, err := tx.Exec(ctx, `INSERT INTO orders VALUES ('tea')`); err != nil {
		return err
	}
	for _, c := range change {
		c(tx)
	}
	return tx.Commit(ctx)
}

func TestTx(t *testing.T) {
	type answer func(s *shop, w http.ResponseWriter, r *http.Request)
	status := func(w http.ResponseWriter, err error) {
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	}
	for _, tc := range []struct {
		name   string
		answer answer
		gets   string // a first request
		orders int    // after it
	}{
		{"commits with the response", func(s *shop, w http.ResponseWriter, r *http.Request) {
			status(w, s.order(r.Context()))
		}, "201", 1},
		{"is not committed before the response", func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context())
			if n := s.orders(); n != 0 {
				err = errors.New("committed")
			}
			status(w, err)
		}, "201", 1},
		{"forgets Commit and Rollback", func(s *shop, w http.ResponseWriter, r *http.Request) {
			tx, err := s.store.Begin(r.Context())
			if err == nil {
				_, err = tx.Exec(r.Context(), `INSERT INTO orders VALUES ('tea')`)
			}
			status(w, err)
		}, "201", 0},
		{"fails after Commit", func(s *shop, w http.ResponseWriter, r *http.Request) {
			_ = s.order(r.Context())
			w.WriteHeader(http.StatusServiceUnavailable)
		}, "503", 0},
		{"panics after Commit", func(s *shop, _ http.ResponseWriter, r *http.Request) {
			_ = s.order(r.Context())
			panic("after")
		}, "panic after", 0},
		{"panics before Commit", func(s *shop, _ http.ResponseWriter, r *http.Request) {
			_ = s.order(r.Context(), func(*postgres.Tx) { panic("before") })
		}, "panic before", 0},
		{"discards", func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context())
			exec, _ := idempotency.FromContext(r.Context())
			exec.Discard()
			status(w, err)
		}, "201", 0},
		{"commits after a failed statement", func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context(), func(tx *postgres.Tx) { _, _ = tx.Exec(r.Context(), `SELECT 1/0`) })
			if !errors.Is(err, pgx.ErrTxCommitRollback) {
				err = nil
			}
			status(w, err)
		}, "500", 0},
		{"rolls a savepoint back", func(s *shop, w http.ResponseWriter, r *http.Request) {
			status(w, s.order(r.Context(), func(tx *postgres.Tx) {
				nested, err := tx.Begin(r.Context())
				if err == nil {
					_, _ = nested.Exec(r.Context(), `INSERT INTO orders VALUES ('milk')`)
					_, _ = nested.Exec(r.Context(), `SELECT 1/0`)
					_ = nested.Rollback(r.Context())
				}
			}))
		}, "201", 1},
		{"uses it after Commit", func(s *shop, w http.ResponseWriter, r *http.Request) {
			ctx := r.Context()
			tx, err := s.store.Begin(ctx)
			if err == nil {
				err = tx.Commit(ctx)
			}
			_, exec := tx.Exec(ctx, `INSERT INTO orders VALUES ('tea')`)
			_, query := tx.Query(ctx, `INSERT INTO orders VALUES ('tea')`)
			row := tx.QueryRow(ctx, `INSERT INTO orders VALUES ('tea') RETURNING 1`).Scan(new(int))
			batch := tx.SendBatch(ctx, new(pgx.Batch)).Close()
			_, begin := tx.Begin(ctx)
			for _, closed := range []error{exec, query, row, batch, begin, tx.Commit(ctx), tx.Rollback(ctx)} {
				if !errors.Is(closed, pgx.ErrTxClosed) {
					err = fmt.Errorf("want ErrTxClosed, not %w", closed)
				}
			}
			status(w, err)
		}, "201", 0},
		{"commits two transactions", func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context())
			if second := s.order(r.Context()); !errors.Is(second, postgres.ErrSecondCommit) {
				err = fmt.Errorf("want ErrSecondCommit, not %w", second)
			}
			status(w, err)
		}, "201", 1},
		{"limits the time of a part of it", func(s *shop, w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), time.Hour)
			err := s.order(ctx)
			cancel()
			_ = s.orders() // takes its time, as the rest of a handler does
			status(w, err)
		}, "201", 1},
		{"panics after Commit with a context that does not end", func(s *shop, _ http.ResponseWriter, r *http.Request) {
			_ = s.order(context.WithoutCancel(r.Context()))
			panic("after")
		}, "panic after", 0},
		{"commits where it cannot see the claim", func(s *shop, w http.ResponseWriter, r *http.Request) {
			_, _ = s.pool.Exec(r.Context(), `CREATE SCHEMA tenant; CREATE TABLE tenant.idempotency (LIKE idempotency INCLUDING ALL)`)
			status(w, s.order(r.Context(), func(tx *postgres.Tx) { _, _ = tx.Exec(r.Context(), `SET LOCAL search_path = tenant`) }))
		}, "503", 0},
		{"only reads", func(s *shop, w http.ResponseWriter, r *http.Request) {
			tx, err := s.store.BeginTx(r.Context(), pgx.TxOptions{AccessMode: pgx.ReadOnly})
			if err == nil {
				err = tx.Commit(r.Context())
			}
			status(w, err)
		}, "201", 0},
		{"has lost the claim", func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context())
			_, _ = s.pool.Exec(r.Context(), `UPDATE idempotency SET token = 'other'`)
			status(w, err)
		}, "409", 0},
		{"commits what a deferred constraint refuses", func(s *shop, w http.ResponseWriter, r *http.Request) {
			_, _ = s.pool.Exec(r.Context(), `CREATE TABLE IF NOT EXISTS refs (a int PRIMARY KEY, b int REFERENCES refs DEFERRABLE INITIALLY DEFERRED)`)
			status(w, s.order(r.Context(), func(tx *postgres.Tx) { _, _ = tx.Exec(r.Context(), `INSERT INTO refs VALUES (1, 2)`) }))
		}, "503", 0},
		{"loses its connection before the commit", func(s *shop, w http.ResponseWriter, r *http.Request) {
			status(w, s.order(r.Context(), func(tx *postgres.Tx) {
				_, _ = s.pool.Exec(r.Context(), `SELECT pg_terminate_backend($1)`, tx.Conn().PgConn().PID())
			}))
		}, "503", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := openShop(t, 4, &idempotency.Options{Lease: 3 * time.Second, Wait: idempotency.NoWait}, tc.answer)
			require.Equal(t, tc.gets, s.post("key"))
			s.allReturned()
			require.Equal(t, tc.orders, s.orders())
			if tc.gets == "201" && tc.name != "discards" {
				require.Equal(t, "201 replayed", s.post("key"))
				require.Equal(t, tc.orders, s.orders())
			}
			if tc.gets == "503" { // and the key is free: the handler runs again, and fails again
				require.Equal(t, "503", s.post("key"))
			}
		})
	}
}

// A goroutine outlives its handler. Its Commit must not say that it has committed.
func TestCommitAfterTheHandler(t *testing.T) {
	returned, committed := make(chan struct{}), make(chan error)
	s := openShop(t, 4, nil, func(s *shop, w http.ResponseWriter, r *http.Request) {
		ctx := context.WithoutCancel(r.Context())
		go func() {
			<-returned
			committed <- s.order(ctx)
		}()
		w.WriteHeader(http.StatusAccepted)
	})
	require.Equal(t, "202", s.post("key"))
	close(returned)
	require.ErrorContains(t, <-committed, "after the handler returned")
	s.allReturned()
	require.Zero(t, s.orders())
}

// Of transactions that are committed at once, one is, and the others say that
// they are not.
func TestCommitsAtOnce(t *testing.T) {
	const keys, transactions = 20, 8
	var said atomic.Int64
	s := openShop(t, transactions, nil, func(s *shop, w http.ResponseWriter, r *http.Request) {
		var begun atomic.Int64
		var all sync.WaitGroup
		exec, _ := idempotency.FromContext(r.Context())
		all.Go(func() {
			for said.Load() == 0 || begun.Load() < 2*transactions {
				_ = exec.Attachment() // holds them up in the middle
			}
		})
		for range transactions {
			all.Go(func() {
				err := s.order(r.Context(), func(*postgres.Tx) {
					for begun.Add(1); begun.Load() < transactions; {
						runtime.Gosched() // a channel would wake them one by one
					}
				})
				begun.Add(1)
				if err == nil {
					said.Add(1)
				}
			})
		}
		all.Wait()
		w.WriteHeader(http.StatusCreated)
	})
	for i := range keys {
		require.Equal(t, "201", s.post(fmt.Sprint("key", i)))
	}
	require.EqualValues(t, s.orders(), said.Load(), "orders that are there, and that handlers were told of")
	require.EqualValues(t, keys, said.Load())
}

func TestTxWithoutAKeyCommits(t *testing.T) {
	var after int
	s := openShop(t, 4, nil, func(s *shop, _ http.ResponseWriter, r *http.Request) {
		require.NoError(s.t, s.order(r.Context(), func(tx *postgres.Tx) { tx.AfterCommit(func(context.Context) { after++ }) }))
		require.Equal(s.t, 1, s.orders())
	})
	require.Equal(t, "200", s.post(""))
	require.Equal(t, 1, after)
	s.allReturned()
}

func TestAfterCommit(t *testing.T) {
	for status, want := range map[int]string{201: "201 orders 1", 503: "503"} {
		var called strings.Builder
		s := openShop(t, 4, nil, func(s *shop, w http.ResponseWriter, r *http.Request) {
			err := s.order(r.Context(), func(tx *postgres.Tx) {
				tx.AfterCommit(func(context.Context) { panic("must not become a 503") })
				tx.AfterCommit(func(ctx context.Context) {
					require.NoError(s.t, ctx.Err())
					_, _ = fmt.Fprint(&called, " orders ", s.orders())
				})
			})
			require.NoError(s.t, err)
			require.Empty(s.t, called.String())
			w.WriteHeader(status)
		})
		require.Equal(t, want, s.post("key")+called.String())
	}
}

// The context ends under a statement of a handler that never rolls back. The
// connection leaves the pool, and PostgreSQL rolls back.
func TestTxWhoseContextEnds(t *testing.T) {
	for _, handOver := range []bool{false, true} {
		s := openShop(t, 2, &idempotency.Options{MaxExecution: 300 * time.Millisecond}, func(s *shop, w http.ResponseWriter, r *http.Request) {
			ctx := r.Context()
			tx, err := s.store.Begin(ctx)
			require.NoError(s.t, err)
			_, err = tx.Exec(ctx, `INSERT INTO orders VALUES ('tea')`)
			require.NoError(s.t, err)
			if handOver {
				require.NoError(s.t, tx.Commit(ctx))
				<-ctx.Done()
				w.WriteHeader(http.StatusCreated)
				return
			}
			_, err = tx.Exec(context.WithoutCancel(ctx), `SELECT pg_sleep(1)`)
			require.Error(s.t, err)
			w.WriteHeader(http.StatusInternalServerError)
		})
		answer := s.post("key")
		s.allReturned()
		require.Eventually(t, func() bool {
			var n int
			require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() AND backend_type = 'client backend'`).Scan(&n))
			return n == 0
		}, patience, 5*time.Millisecond)
		// The commit of what was handed over may come before the end of the
		// context is noticed. Then the client is told so.
		want := 0
		if handOver && answer == "201" {
			want = 1
		}
		require.Equal(t, want, s.orders(), answer)
	}
}

// downStore is a store whose Acquire fails.
type downStore struct{ *postgres.Store }

func (downStore) Acquire(context.Context, string, idempotency.Claim) (idempotency.Record, error) {
	return idempotency.Record{}, errors.New("down")
}

// A run that is not protected has nobody to commit for it.
func TestTxOfAnUnprotectedRun(t *testing.T) {
	s := openShop(t, 2, nil, nil)
	s.handler = idempotency.Middleware(downStore{s.store}, &idempotency.Options{FailOpen: true})(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			require.NoError(s.t, s.order(r.Context()))
			w.WriteHeader(http.StatusCreated)
		}))
	require.Equal(t, "201", s.post("key"))
	require.Equal(t, 1, s.orders())
}

// The commit gets through, and the connection breaks before its answer, or a
// pooler that has lost the server answers: the store finds the response.
func TestCommitWhoseAnswerIsLost(t *testing.T) {
	server := startServer(t)
	proxy := startProxy(t, "127.0.0.1:"+server.Port)
	pool, err := pgxpool.New(t.Context(), "postgres://test@"+proxy.addr+"/postgres?sslmode=disable")
	require.NoError(t, err)
	defer pool.Close()
	store := newStore(t, pool, nil)
	_, err = pool.Exec(t.Context(), `CREATE TABLE orders (item text)`)
	require.NoError(t, err)
	s := &shop{t: t, pool: pool, store: store}
	after := 0
	s.handler = idempotency.Middleware(store, nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, s.order(r.Context(), func(tx *postgres.Tx) { tx.AfterCommit(func(context.Context) { after++ }) }))
		w.WriteHeader(http.StatusCreated)
	}))
	for i, how := range []cut{cutAfter, cutWithError, cutBefore} {
		proxy.cutCommit(how)
		want, orders := "201", i+1
		if how == cutBefore { // PostgreSQL never got the COMMIT
			want, orders = "503", i
		}
		require.Equal(t, want, s.post(fmt.Sprint("key", i)))
		require.Equal(t, orders, s.orders())
		require.Equal(t, orders, after)
		require.True(t, proxy.hasCut())
	}
	require.Equal(t, "201", s.post("key2"))
	require.Equal(t, 3, s.orders())
}

// Handlers hold every connection of their pool for longer than a lease, and keep
// their keys: the store renews over connections of its own.
func TestExhaustedPool(t *testing.T) {
	const handlers = 3
	var running sync.WaitGroup
	running.Add(handlers)
	s := openShop(t, handlers, &idempotency.Options{Lease: time.Second}, func(s *shop, w http.ResponseWriter, r *http.Request) {
		err := s.order(r.Context(), func(tx *postgres.Tx) {
			running.Done()
			running.Wait() // every connection is taken
			_, err := tx.Exec(r.Context(), `SELECT pg_sleep(2)`)
			require.NoError(s.t, err)
		})
		require.NoError(s.t, err)
		w.WriteHeader(http.StatusCreated)
	})
	var all sync.WaitGroup
	for i := range handlers {
		all.Go(func() {
			if got := s.post(fmt.Sprint("key", i)); got != "201" {
				t.Error(got)
			}
		})
	}
	all.Wait()
	require.Equal(t, handlers, s.orders())
}

// 64 clients send one key. One run, one order, one response.
func TestManyClientsOneKey(t *testing.T) {
	s := openShop(t, 4, &idempotency.Options{Wait: patience}, func(s *shop, w http.ResponseWriter, r *http.Request) {
		require.NoError(s.t, s.order(r.Context()))
		w.WriteHeader(http.StatusCreated)
	})
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if got := s.post("key"); got != "201" && got != "201 replayed" {
				t.Error(got)
			}
		})
	}
	all.Wait()
	require.Equal(t, 1, s.orders())
}

// The connection breaks while PostgreSQL commits. The store waits for the end of
// that before it says what has become of the transaction.
func TestCommitThatGoesOn(t *testing.T) {
	server := startServer(t)
	proxy := startProxy(t, "127.0.0.1:"+server.Port)
	pool, err := pgxpool.New(t.Context(), "postgres://test@"+proxy.addr+"/postgres?sslmode=disable")
	require.NoError(t, err)
	defer pool.Close()
	s := &shop{t: t, pool: pool, store: newStore(t, pool, nil)}
	opts := &idempotency.Options{StoreTimeout: patience, Lease: 2 * patience}
	s.handler = idempotency.Middleware(s.store, opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, s.order(r.Context()))
		w.WriteHeader(http.StatusCreated)
	}))
	_, err = pool.Exec(t.Context(), `
		CREATE TABLE orders (item text);
		CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END';
		CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
	require.NoError(t, err)
	proxy.cutCommit(cutDuring)
	require.Equal(t, "201", s.post("key"))
	require.True(t, proxy.hasCut())
	require.Equal(t, "201 replayed", s.post("key"))
	require.Equal(t, 1, s.orders())
}

// A response is kept for the TTL from when it is stored, not from when the
// handler's transaction began.
func TestTTLBeginsWithTheResponse(t *testing.T) {
	var late time.Time // in the transaction, after it began
	s := openShop(t, 2, &idempotency.Options{TTL: time.Hour}, func(s *shop, w http.ResponseWriter, r *http.Request) {
		require.NoError(s.t, s.order(r.Context(), func(tx *postgres.Tx) {
			require.NoError(s.t, tx.QueryRow(r.Context(), `SELECT clock_timestamp()`).Scan(&late))
		}))
		w.WriteHeader(http.StatusCreated)
	})
	require.Equal(t, "201", s.post("key"))
	var expires time.Time
	require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT expires_at FROM idempotency`).Scan(&expires))
	require.False(t, expires.Before(late.Add(time.Hour)), "the response expires %v too early", late.Add(time.Hour).Sub(expires))
}

// A run whose transaction is rolled back leaves its connection in the pool.
func TestReleaseReturnsTheConnection(t *testing.T) {
	s := openShop(t, 1, nil, func(s *shop, w http.ResponseWriter, r *http.Request) {
		require.NoError(s.t, s.order(r.Context()))
		w.WriteHeader(http.StatusInternalServerError)
	})
	require.Equal(t, "500", s.post("key"))
	opened := s.pool.Stat().NewConnsCount()
	for range 3 {
		require.Equal(t, "500", s.post("key"))
	}
	require.Equal(t, opened, s.pool.Stat().NewConnsCount())
	require.Equal(t, 0, s.orders())
}
