package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

const insertOrder = `INSERT INTO orders (item, quantity) VALUES ('tea', 1)`

// A shop is an API whose handler gets a store to begin transactions with.
type shop struct {
	t   *testing.T
	db  *sql.DB
	url string

	mu  sync.Mutex // guards log
	log strings.Builder
}

// Write takes what the middleware logs.
func (s *shop) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(line)
}

func (s *shop) logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

func openShop(t *testing.T, opts idempotency.Options, answer func(w http.ResponseWriter, r *http.Request, store *Store)) *shop {
	t.Helper()
	s := &shop{t: t, db: openFile(t, "watched", filepath.Join(t.TempDir(), "test.db"))}
	_, err := s.db.ExecContext(t.Context(), ordersTable)
	require.NoError(t, err)
	store := newStore(t, s.db)
	opts.Logger = slog.New(slog.NewTextHandler(s, nil))
	srv := httptest.NewServer(idempotency.Middleware(store, &opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, store)
	})))
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

// post returns the status and "replayed" if the answer is, or "none" if there is
// no answer.
func (s *shop) post(key string) string {
	s.t.Helper()
	a, err := post(s.t.Context(), s.url, key, "")
	switch {
	case err != nil:
		return "none"
	case a.replayed:
		return fmt.Sprint(a.status, " replayed")
	}
	return fmt.Sprint(a.status)
}

func (s *shop) orders() int { return count(s.t, s.db, "orders") }

// placeOrder inserts an order and commits it, as every handler does.
func placeOrder(ctx context.Context, store *Store, before ...func(*Tx)) error {
	tx, err := store.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.ExecContext(ctx, insertOrder); err != nil {
		return err
	}
	for _, f := range before {
		f(tx)
	}
	return tx.Commit()
}

func status(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

func TestTx(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request, store *Store)
		gets   string // a first request
		orders int    // after it
		again  string // a retry, if it is sent
	}{
		{"commits with the response", func(w http.ResponseWriter, r *http.Request, store *Store) {
			status(w, placeOrder(r.Context(), store))
		}, "201", 1, "201 replayed"},
		{"forgets Commit", func(w http.ResponseWriter, r *http.Request, store *Store) {
			tx, err := store.Begin(r.Context())
			if err == nil {
				defer func() { _ = tx.Rollback() }()
				_, err = tx.ExecContext(r.Context(), insertOrder)
			}
			status(w, err)
		}, "201", 0, "201 replayed"},
		{"fails after Commit", func(w http.ResponseWriter, r *http.Request, store *Store) {
			_ = placeOrder(r.Context(), store)
			w.WriteHeader(http.StatusServiceUnavailable)
		}, "503", 0, "503"},
		{"panics before Commit", func(_ http.ResponseWriter, r *http.Request, store *Store) {
			_ = placeOrder(r.Context(), store, func(*Tx) { panic(http.ErrAbortHandler) })
		}, "none", 0, ""},
		{"panics after Commit", func(_ http.ResponseWriter, r *http.Request, store *Store) {
			_ = placeOrder(r.Context(), store)
			panic(http.ErrAbortHandler)
		}, "none", 0, ""},
		{"discards", func(w http.ResponseWriter, r *http.Request, store *Store) {
			err := placeOrder(r.Context(), store)
			exec, _ := idempotency.FromContext(r.Context())
			exec.Discard()
			status(w, err)
		}, "201", 0, "201"},
		{"uses it after Commit", func(w http.ResponseWriter, r *http.Request, store *Store) {
			tx, err := store.Begin(r.Context())
			if err == nil {
				err = tx.Commit()
			}
			for _, closed := range []error{tx.Commit(), tx.Rollback(), tx.Rollback()} {
				if !errors.Is(closed, sql.ErrTxDone) {
					err = fmt.Errorf("want ErrTxDone, not %w", closed)
				}
			}
			_, exec := tx.ExecContext(r.Context(), insertOrder) // is before the real commit
			status(w, errors.Join(err, exec))
		}, "201", 1, "201 replayed"},
		{"commits after Rollback", func(w http.ResponseWriter, r *http.Request, store *Store) {
			err := placeOrder(r.Context(), store, func(tx *Tx) { _ = tx.Rollback() })
			if errors.Is(err, sql.ErrTxDone) {
				err = nil
			}
			status(w, err)
		}, "201", 0, "201 replayed"},
		{"begins a second transaction", func(w http.ResponseWriter, r *http.Request, store *Store) {
			err := placeOrder(r.Context(), store)
			if second := placeOrder(r.Context(), store); !errors.Is(second, ErrSecondTx) {
				err = fmt.Errorf("want ErrSecondTx, not %w", second)
			}
			status(w, err)
		}, "201", 1, "201 replayed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openShop(t, idempotency.Options{}, tc.answer)
			require.Equal(t, tc.gets, s.post("key"))
			require.Equal(t, tc.orders, s.orders())
			if tc.again != "" {
				require.Equal(t, tc.again, s.post("key"))
				require.Equal(t, tc.orders, s.orders())
			}
		})
	}
}

// A transaction that the store cannot commit is named in the log with what to do
// about it.
func TestTransactionThatIsNotTheStores(t *testing.T) {
	attach := func(end func(*sql.Tx) error) func(http.ResponseWriter, *http.Request, *Store) {
		return func(w http.ResponseWriter, r *http.Request, store *Store) {
			tx, err := store.db.BeginTx(r.Context(), nil)
			if err == nil {
				_, err = tx.ExecContext(r.Context(), insertOrder)
			}
			exec, _ := idempotency.FromContext(r.Context())
			exec.Attach(tx)
			status(w, errors.Join(err, end(tx)))
		}
	}
	for _, tc := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request, store *Store)
		again  string // the retry
		orders int
		log    string
	}{
		{"a raw one", attach(func(*sql.Tx) error { return nil }), "503", 0, "let it use Store.Begin and Commit instead of Attach"},
		{"with a deferred Rollback", attach((*sql.Tx).Rollback), "409", 0, "has ended it itself, with a deferred Rollback, say"},
		{"that is committed", attach((*sql.Tx).Commit), "409", 1, "has ended it itself, with a deferred Rollback, say"},
		{"that is committed around Tx", func(w http.ResponseWriter, r *http.Request, store *Store) {
			status(w, placeOrder(r.Context(), store, func(tx *Tx) { _ = tx.Tx.Commit() }))
		}, "409", 1, "has ended its transaction around Tx.Commit"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := openShop(t, idempotency.Options{Wait: idempotency.NoWait, Lease: time.Hour}, tc.answer)
			require.Equal(t, "503", s.post("key"))
			require.Equal(t, tc.orders, s.orders())
			require.Contains(t, s.logged(), tc.log)
			require.Equal(t, tc.again, s.post("key"), "frees the key only when it is known that nothing was done")
			require.Equal(t, tc.orders, s.orders())
		})
	}
}

// A handler with transactions on two databases cannot have both committed.
func TestTwoDatabases(t *testing.T) {
	other := openNew(t)
	_, err := other.ExecContext(t.Context(), ordersTable)
	require.NoError(t, err)
	otherStore := newStore(t, other)

	s := openShop(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request, store *Store) {
		status(w, placeOrder(r.Context(), store, func(*Tx) {
			if err := placeOrder(r.Context(), otherStore); err != nil {
				t.Error(err)
			}
		}))
	})
	require.Equal(t, "500", s.post("key"), "the second Commit fails")
	require.Zero(t, s.orders()+count(t, other, "orders"))

	s = openShop(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request, _ *Store) {
		status(w, placeOrder(r.Context(), otherStore))
	})
	require.Equal(t, "503", s.post("key"))
	require.Contains(t, s.logged(), "is not on the database of the middleware's store")
	require.Zero(t, s.orders()+count(t, other, "orders"))
	require.Zero(t, count(t, other, "idempotency"))
}

func TestTxWithoutAKeyCommits(t *testing.T) {
	after := 0
	s := openShop(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request, store *Store) {
		status(w, placeOrder(r.Context(), store, func(tx *Tx) { tx.AfterCommit(func(context.Context) { after++ }) }))
	})
	require.Equal(t, "201", s.post(""))
	require.Equal(t, "201", s.post(""))
	require.Equal(t, 2, s.orders())
	require.Equal(t, 2, after)
}

// The middleware does not ask the store to complete a run that it could not claim
// a key for, so Commit commits.
func TestTxOfAnUnprotectedRunCommits(t *testing.T) {
	s := openShop(t, idempotency.Options{FailOpen: true, StoreTimeout: 100 * time.Millisecond}, func(w http.ResponseWriter, r *http.Request, store *Store) {
		status(w, placeOrder(r.Context(), store))
	})
	watched.watch(func(step string) error {
		if step == "before SELECT state, token," {
			return errors.New("the table is gone")
		}
		return nil
	})
	t.Cleanup(func() { watched.watch(func(string) error { return nil }) })
	require.Equal(t, "201", s.post("key"))
	require.Equal(t, 1, s.orders())
}

// The functions of AfterCommit see the order, and they run exactly when it is
// there.
func TestAfterCommit(t *testing.T) {
	for _, tc := range []struct {
		name, fails   string // the step that fails
		answers       int    // the handler
		gets, reports string
	}{
		{"committed", "", 201, "201", "1 order"},
		{"committed, and the reply of the database was lost", "after commit", 201, "201", "1 order"},
		{"not committed", "before commit", 201, "503", ""},
		{"the handler failed", "", 500, "500", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var reports strings.Builder
			s := openShop(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request, store *Store) {
				err := placeOrder(r.Context(), store, func(tx *Tx) {
					tx.AfterCommit(func(context.Context) { panic("must not become a 503") })
					tx.AfterCommit(func(ctx context.Context) {
						fmt.Fprint(&reports, count(t, store.db, "orders"), " order")
						if _, limited := ctx.Deadline(); limited {
							fmt.Fprint(&reports, ", and no time")
						}
					})
				})
				if reports.Len() > 0 {
					err = errors.New("before the commit")
				}
				if err != nil {
					t.Error(err)
				}
				w.WriteHeader(tc.answers)
			})
			if tc.fails != "" {
				failOnce(t, tc.fails)
			}
			require.Equal(t, tc.gets, s.post("key"))
			require.Equal(t, tc.reports, reports.String())
		})
	}
}

// A context that ends rolls back, and Commit says so.
func TestTxWhoseContextHasEnded(t *testing.T) {
	s := openShop(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request, store *Store) {
		ctx, cancel := context.WithCancel(r.Context())
		err := placeOrder(ctx, store, func(*Tx) { cancel() })
		if !errors.Is(err, context.Canceled) {
			t.Error("Commit returned", err)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	require.Equal(t, "503", s.post("key"))
	require.Zero(t, s.orders())
}

// A goroutine that outlives its handler is not told that its transaction is
// committed.
func TestCommitAfterTheHandler(t *testing.T) {
	db := openNew(t)
	store := newStore(t, db)
	begin, committed := make(chan struct{}), make(chan error, 1)
	_, err := db.ExecContext(t.Context(), ordersTable)
	require.NoError(t, err)
	srv := httptest.NewServer(idempotency.Middleware(store, nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := context.WithoutCancel(r.Context())
		go func() {
			<-begin
			tx, err := store.Begin(ctx)
			if err == nil {
				err = tx.Commit()
			}
			committed <- err
		}()
		w.WriteHeader(http.StatusCreated)
	})))
	defer srv.Close()
	require.Equal(t, http.StatusCreated, mustPost(t, srv.URL, "key", "").status)
	close(begin)
	require.ErrorIs(t, <-committed, errTooLate)
	require.Equal(t, 0, count(t, db, "orders"), "and the connection is free")
}
