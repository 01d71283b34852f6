//go:build unix

package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/go-idempotency/idempotency/storetest"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// newStore returns a store with a table.
func newStore(t testing.TB, pool *pgxpool.Pool, opts *postgres.Options) *postgres.Store {
	store := postgres.NewStore(pool, opts)
	t.Cleanup(store.Close)
	require.NoError(t, store.Migrate(t.Context()))
	return store
}

func TestStore(t *testing.T) {
	pool := startServer(t).dial(8)
	var tables atomic.Int64
	storetest.Run(t, func(t *testing.T) idempotency.Store {
		return newStore(t, pool, &postgres.Options{Table: fmt.Sprint("cells ", tables.Add(1)), MaxConns: 16})
	})
}

func TestStoreIsolation(t *testing.T) {
	server := startServer(t)
	_, err := server.dial(1).Exec(t.Context(), `ALTER DATABASE postgres SET default_transaction_isolation = 'serializable'`)
	require.NoError(t, err)
	store := newStore(t, server.dial(8), &postgres.Options{MaxConns: 16})
	for i := range 20 {
		require.Equal(t, 1, race(t, store, fmt.Sprint("key", i), 16), "owners")
	}
}

func TestMigrateAtOnce(t *testing.T) {
	server := startServer(t)
	pool := server.dial(16)
	_, err := pool.Exec(t.Context(), `CREATE SCHEMA "My ""Schema"`)
	require.NoError(t, err)
	var all sync.WaitGroup
	for range 16 {
		store := postgres.NewStore(pool, &postgres.Options{Schema: `My "Schema`, Table: `Keys; DROP`})
		t.Cleanup(store.Close)
		all.Go(func() {
			if err := store.Migrate(t.Context()); err != nil {
				t.Error(err)
			}
			rec, err := store.Acquire(t.Context(), "key", claim("A", time.Minute))
			if err != nil || rec.State != idempotency.Acquired {
				t.Error(rec, err)
			}
		})
	}
	all.Wait()
	store := postgres.NewStore(pool, nil)
	t.Cleanup(store.Close)
	_, err = pool.Exec(t.Context(), store.SchemaSQL())
	require.NoError(t, err)
	require.NoError(t, store.Migrate(t.Context()))
}

// A table of something else is found out at the start, and not by requests.
func TestMigrateFindsAnotherTable(t *testing.T) {
	pool := startServer(t).dial(2)
	_, err := pool.Exec(t.Context(), `CREATE TABLE idempotency (key text PRIMARY KEY, response bytea)`)
	require.NoError(t, err)
	store := postgres.NewStore(pool, nil)
	t.Cleanup(store.Close)
	require.ErrorContains(t, store.Migrate(t.Context()), "other columns")
}

// A role that may only use the table can start, and a role that may use nothing
// gets an error.
func TestMigrateWithoutRights(t *testing.T) {
	server := startServer(t)
	owner := server.dial(2)
	newStore(t, owner, nil)
	_, err := owner.Exec(t.Context(), `CREATE ROLE app LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC;
		GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency TO app`)
	require.NoError(t, err)
	config := owner.Config()
	config.ConnConfig.User = "app"
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	require.Equal(t, 1, race(t, newStore(t, pool, nil), "key", 4))
	other := postgres.NewStore(pool, &postgres.Options{Table: "other"})
	t.Cleanup(other.Close)
	require.ErrorContains(t, other.Migrate(t.Context()), "permission denied")
}

// Another role has made operators that fit operands of the store better than
// those of PostgreSQL.
func TestOperatorsOfOthersAreNotUsed(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	for _, types := range [][3]string{{"bigint", "interval", "interval"}, {"numeric", "integer", "numeric"},
		{"double precision", "integer", "double precision"}} {
		function := fmt.Sprintf(`trap(a %s, b %s)`, types[0], types[1])
		_, err := pool.Exec(ctx, fmt.Sprintf(`CREATE FUNCTION %[1]s RETURNS %[4]s LANGUAGE plpgsql AS
			'BEGIN RAISE EXCEPTION ''trapped''; END';
			CREATE OPERATOR public.* (LEFTARG = %[2]s, RIGHTARG = %[3]s, FUNCTION = trap)`, function, types[0], types[1], types[2]))
		require.NoError(t, err)
	}
	for _, token := range []string{"A", "B"} {
		_, err := store.Acquire(ctx, "key", claim(token, time.Minute))
		require.NoError(t, err)
		_, err = store.Inspect(ctx, "key")
		require.NoError(t, err)
	}
	require.NoError(t, store.Release(ctx, "key", "A", time.Minute))
	_, err := store.Acquire(ctx, "key", claim("C", time.Minute))
	require.NoError(t, err)
	require.NoError(t, store.Complete(ctx, "key", "C", idempotency.Result{TTL: time.Hour}))
}

func TestNewStorePanics(t *testing.T) {
	pool, err := pgxpool.New(t.Context(), "postgres://test@127.0.0.1:1/none")
	require.NoError(t, err)
	defer pool.Close()
	require.Panics(t, func() { postgres.NewStore(nil, nil) })
	require.Panics(t, func() { postgres.NewStore(pool, &postgres.Options{Table: "a\x00"}) })
	require.Panics(t, func() { postgres.NewStore(pool, &postgres.Options{Table: fmt.Sprintf("%056d", 1)}) })
	require.Panics(t, func() { postgres.NewStore(pool, &postgres.Options{MaxConns: -1}) })
}

func TestReplayWritesNothing(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err := store.Acquire(ctx, "key", claim("A", time.Minute))
	require.NoError(t, err)
	require.NoError(t, store.Complete(ctx, "key", "A", idempotency.Result{Value: []byte("done"), TTL: time.Hour}))
	version := func() (v string) {
		require.NoError(t, pool.QueryRow(ctx, `SELECT ctid::text || xmin::text || xmax::text FROM idempotency`).Scan(&v))
		return v
	}
	before := version()
	for range 3 {
		rec, err := store.Acquire(ctx, "key", claim("B", time.Minute))
		require.NoError(t, err)
		require.Equal(t, idempotency.Completed, rec.State)
	}
	require.Equal(t, before, version())
}

func claim(token string, lease time.Duration) idempotency.Claim {
	return idempotency.Claim{Token: token, Lease: lease, TTL: lease}
}

// race has n owners claim a key at once, and returns how many have got it.
func race(t *testing.T, store *postgres.Store, key string, n int) int {
	var owners atomic.Int64
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			rec, err := store.Acquire(t.Context(), key, claim(fmt.Sprint("token", i), time.Minute))
			if err != nil {
				t.Error(err)
			}
			if rec.State == idempotency.Acquired {
				owners.Add(1)
			}
		})
	}
	all.Wait()
	return int(owners.Load())
}

// A raceTracer calls a function once, between the statement of a claim that
// reads and the one that writes.
type raceTracer struct {
	once sync.Once
	race func()
}

func (r *raceTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, q pgx.TraceQueryStartData) context.Context {
	if len(q.Args) == 7 { // the statement for all cells
		r.once.Do(r.race)
	}
	return ctx
}

func (*raceTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// A claim finds a key that it may take. Before it takes the key, the owner of the
// lapsed claim or another one changes that.
func TestClaimLosesRace(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	lapsed := func(token string) idempotency.Claim {
		return idempotency.Claim{Token: token, Lease: time.Microsecond, TTL: time.Hour}
	}
	mustAcquire := func(key string, c idempotency.Claim) {
		rec, err := store.Acquire(ctx, key, c)
		require.NoError(t, err)
		require.Equal(t, idempotency.Acquired, rec.State)
	}
	for name, row := range map[string]struct {
		race func(key string)
		want idempotency.State
	}{
		"the owner has marked it": {func(key string) {
			mark := lapsed("A")
			mark.Attempt, mark.Once = 1, true
			mustAcquire(key, mark)
		}, idempotency.Abandoned},
		"the claim has come before and was released": {func(key string) {
			mustAcquire(key, lapsed("B"))
			require.NoError(t, store.Release(ctx, key, "B", time.Hour))
		}, idempotency.Lost},
		"another request has claimed it": {func(key string) {
			other := lapsed("C")
			other.Fingerprint = []byte("one")
			mustAcquire(key, other)
		}, idempotency.Mismatch},
		"the owner has stored a response": {func(key string) {
			require.NoError(t, store.Complete(ctx, key, "A", idempotency.Result{TTL: time.Hour}))
		}, idempotency.Completed},
	} {
		t.Run(name, func(t *testing.T) {
			mustAcquire(name, lapsed("A"))
			config := pool.Config()
			config.ConnConfig.Tracer = &raceTracer{race: func() { row.race(name) }}
			racing, err := pgxpool.NewWithConfig(ctx, config)
			require.NoError(t, err)
			defer racing.Close()
			other := postgres.NewStore(racing, nil)
			defer other.Close()
			c := lapsed("B")
			c.Fingerprint = []byte("two")
			rec, err := other.Acquire(ctx, name, c)
			require.NoError(t, err)
			require.Equal(t, row.want, rec.State)
		})
	}
}

// Expired rows are deleted under load while other owners revive them. Every
// round has one owner for each key.
func TestOneOwnerWhileExpiredRowsAreDeleted(t *testing.T) {
	server := startServer(t)
	pool := server.dial(8)
	stores := make([]*postgres.Store, 4) // four replicas
	for i := range stores {
		stores[i] = newStore(t, pool, &postgres.Options{MaxConns: 8})
	}
	ctx := t.Context()
	const keys, owners = 81, 8
	for round := range 6 {
		// The rows of the last round have expired, and some more.
		_, err := pool.Exec(ctx, `UPDATE idempotency SET expires_at = clock_timestamp() - interval '1 hour',
			lease_until = clock_timestamp() - interval '1 hour'`)
		require.NoError(t, err)
		var held [keys]atomic.Int64
		var all sync.WaitGroup
		for o := range owners {
			all.Go(func() {
				for _, k := range rand.Perm(keys) {
					rec, err := stores[o%len(stores)].Acquire(ctx, fmt.Sprint("key", k), claim(fmt.Sprint(round, "-", o), time.Minute))
					if err != nil {
						t.Error(err)
					}
					if rec.State == idempotency.Acquired {
						held[k].Add(1)
					}
				}
			})
		}
		all.Wait()
		for k := range keys {
			require.EqualValues(t, 1, held[k].Load(), "owners of key %d in round %d", k, round)
		}
	}
}

// Owners with tiny leases claim, renew, complete and release while rows expire
// and are deleted. The ledger knows when an owner holds its key for certain: from
// the answer until the lease is over that began no earlier than the call.
func TestManyOwnersAgainstALedger(t *testing.T) {
	pool := startServer(t).dial(8)
	store := newStore(t, pool, &postgres.Options{MaxConns: 16})
	var ledger [5]ledgerCell
	var all sync.WaitGroup
	var held, takeovers atomic.Int64
	stop := time.Now().Add(4 * time.Second)
	for o := range 24 {
		all.Go(func() {
			for i := 0; time.Now().Before(stop); i++ {
				k := rand.IntN(len(ledger))
				run := ledgerRun{store: store, cell: &ledger[k], key: fmt.Sprint("key", k), token: fmt.Sprint(o, "-", i)}
				attempt := run.acquire(t, 0)
				if attempt == 0 {
					continue
				}
				held.Add(1)
				if attempt > 1 {
					takeovers.Add(1)
				}
				run.goOn(t, attempt)
			}
		})
	}
	all.Wait()
	require.Positive(t, takeovers.Load(), "the leases are too long for the test to mean anything")
	require.Greater(t, held.Load(), takeovers.Load(), "no claim of an absent cell")
}

const tinyLease = 40 * time.Millisecond

// A ledgerRun is one owner of a key.
type ledgerRun struct {
	store      *postgres.Store
	cell       *ledgerCell
	key, token string
}

// acquire claims or renews, and returns the attempt, or 0.
func (r *ledgerRun) acquire(t *testing.T, attempt int) int {
	c := claim(r.token, tinyLease)
	c.Attempt = attempt
	before := time.Now()
	rec, err := r.store.Acquire(context.Background(), r.key, c)
	if err != nil {
		t.Error(err)
	}
	if rec.State != idempotency.Acquired {
		return 0
	}
	if other := r.cell.hold(r.token, before.Add(tinyLease)); other != "" {
		t.Errorf("%s has %s while %s holds it", r.token, r.key, other)
	}
	return rec.Attempt
}

// goOn does what an owner may do next, or dies.
func (r *ledgerRun) goOn(t *testing.T, attempt int) {
	ctx := context.Background()
	switch rand.IntN(4) {
	case 1:
		r.cell.leave(r.token)
		if err := r.store.Release(ctx, r.key, r.token, tinyLease/2); err != nil {
			t.Error(err)
		}
	case 2:
		r.acquire(t, attempt)
	case 3:
		if rand.IntN(2) == 0 {
			time.Sleep(tinyLease) // a late owner
		}
		other, until := r.cell.leave(r.token)
		err := r.store.Complete(ctx, r.key, r.token, idempotency.Result{TTL: tinyLease / 4})
		if err != nil && !errors.Is(err, idempotency.ErrLeaseLost) {
			t.Error(err)
		}
		if err == nil && other != "" && time.Now().Before(until) {
			t.Errorf("%s completed %s while %s held it", r.token, r.key, other)
		}
	}
}

// A ledgerCell knows who holds a key for certain.
type ledgerCell struct {
	mu    sync.Mutex
	token string
	until time.Time
}

// hold notes a holder. It returns another one whose lease is running.
func (c *ledgerCell) hold(token string, until time.Time) (other string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if !now.Before(until) {
		return "" // it may have lost the key already
	}
	if c.token != "" && c.token != token && now.Before(c.until) {
		other = c.token
	}
	c.token, c.until = token, until
	return other
}

// leave notes that the holder gives the key up. It returns another one.
func (c *ledgerCell) leave(token string) (other string, until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == token {
		c.token = ""
	}
	return c.token, c.until
}

func TestExpiredRowsAreDeleted(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err := pool.Exec(ctx, `INSERT INTO idempotency SELECT 'old' || i, 2, 'A', 1, false, false,
		clock_timestamp() - interval '1 s', clock_timestamp() - interval '1 s', '', '' FROM generate_series(1, 300) AS i`)
	require.NoError(t, err)
	for i := range 64 {
		_, err := store.Acquire(ctx, fmt.Sprint("new", i), claim("A", time.Minute))
		require.NoError(t, err)
	}
	var old, fresh int
	require.NoError(t, pool.QueryRow(ctx, `SELECT count(*) FILTER (WHERE key LIKE 'old%'),
		count(*) FILTER (WHERE key LIKE 'new%') FROM idempotency`).Scan(&old, &fresh))
	require.Equal(t, 0, old)
	require.Equal(t, 64, fresh)
}

// A batch reads no more expired rows than it deletes, however many there are.
func TestCleaningReadsOneBatch(t *testing.T) {
	config := startServer(t).dial(4).Config()
	config.ConnConfig.RuntimeParams["plan_cache_mode"] = "force_generic_plan" // to which a statement comes in time
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err = pool.Exec(ctx, `INSERT INTO idempotency SELECT 'key' || i, 2, 'A', 1, false, false, clock_timestamp(),
		clock_timestamp() + sign(i - 20000.5) * interval '1 hour', '', repeat('x', 300)::bytea FROM generate_series(1, 40000) AS i`)
	require.NoError(t, err)
	_, err = pool.Exec(ctx, `ANALYZE idempotency`)
	require.NoError(t, err)
	for i := range 64 { // two batches
		_, err := store.Acquire(ctx, fmt.Sprint("new", i), claim("A", time.Minute))
		require.NoError(t, err)
	}
	store.Close() // a connection reports what it has read when it ends
	var deleted, read int
	require.Eventually(t, func() bool {
		err := pool.QueryRow(ctx, `SELECT n_tup_del, idx_tup_read FROM pg_stat_user_tables
			JOIN pg_stat_user_indexes USING (relid) WHERE indexrelname = 'idempotency_expires'`).Scan(&deleted, &read)
		return err == nil && read > 0
	}, patience, 20*time.Millisecond)
	require.Less(t, read, 2000)
	require.Positive(t, deleted)
}

// A handler's transaction may hold an expired row, which is not waited for.
func TestCleaningSkipsLockedRows(t *testing.T) {
	pool := startServer(t).dial(4)
	store := newStore(t, pool, nil)
	ctx := t.Context()
	_, err := pool.Exec(ctx, `INSERT INTO idempotency SELECT 'old' || i, 2, 'A', 1, false, false,
		clock_timestamp() - interval '1 s', clock_timestamp() - interval '1 s', '', '' FROM generate_series(1, 100) AS i`)
	require.NoError(t, err)
	tx, err := pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(ctx) }()
	_, err = tx.Exec(ctx, `SELECT FROM idempotency WHERE key = 'old1' FOR UPDATE`)
	require.NoError(t, err)
	claims, left := 0, 100
	for end := time.Now().Add(patience); left > 1 && time.Now().Before(end); claims++ {
		_, err := store.Acquire(ctx, fmt.Sprint("new", claims), claim("A", time.Minute))
		require.NoError(t, err)
		require.NoError(t, pool.QueryRow(ctx, `SELECT count(*) FROM idempotency WHERE key LIKE 'old%'`).Scan(&left))
	}
	require.Equal(t, 1, left)
}
