package integration

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/postgres"
)

// Kinds of stores.
const (
	onRedis    = "redis"
	onPostgres = "postgres"
	inMemory   = "memory"
)

// A database is what the processes of a service share.
type database interface {
	addr() string
	kill()
	start() bool
	process() *os.Process

	// use tells how many bytes the records take, and how many there are.
	use(ctx context.Context) (size uint64, records int, err error)
}

// startDatabase starts a database that loses nothing when it is killed. One of
// PostgreSQL has a table for what handlers do.
func startDatabase(t *testing.T, kind string) database {
	if kind != onPostgres {
		return redisDatabase{idemtest.StartRedis(t, durable...)}
	}
	// A minute between two vacuums is long for a short soak.
	d := postgresDatabase{idemtest.StartPostgres(t, "-c", "autovacuum_naptime=5s")}
	d.query(t, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `CREATE TABLE charges (key text, run text)`)
		return err
	})
	return d
}

type redisDatabase struct{ *idemtest.RedisServer }

func (s redisDatabase) addr() string { return s.Addr }
func (s redisDatabase) kill()        { s.Kill() }
func (s redisDatabase) start() bool  { return s.Start() }

func (s redisDatabase) process() *os.Process { return s.Process() }

func (s redisDatabase) use(ctx context.Context) (size uint64, records int, err error) {
	client := redis.NewClient(&redis.Options{Addr: s.Addr, ContextTimeoutEnabled: true})
	defer func() { _ = client.Close() }()
	info, err := client.InfoMap(ctx, "memory").Result()
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscan(info["Memory"]["used_memory"], &size)
	return size, int(client.DBSize(ctx).Val()), err
}

type postgresDatabase struct{ *idemtest.PostgresServer }

func (s postgresDatabase) addr() string { return "127.0.0.1:" + s.Port }
func (s postgresDatabase) kill()        { s.Crash() }
func (s postgresDatabase) start() bool  { return s.Start() }

func (s postgresDatabase) process() *os.Process { return s.Process() }

// query has f ask the database, which is up.
func (s postgresDatabase) query(t *testing.T, f func(context.Context, *pgx.Conn) error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.URL())
	require.NoError(t, err)
	defer func() { _ = conn.Close(ctx) }()
	require.NoError(t, f(ctx, conn))
}

// keptRows returns what handlers wrote into the database on transactions that were
// committed.
func keptRows(t *testing.T, d database) (rows []history.Row) {
	s, ok := d.(postgresDatabase)
	if !ok {
		return nil
	}
	s.query(t, func(ctx context.Context, conn *pgx.Conn) error {
		found, err := conn.Query(ctx, `SELECT key, run FROM charges`)
		if err != nil {
			return err
		}
		rows, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (r history.Row, err error) {
			r.Type, r.Kind = history.RowKept, history.Begin
			return r, row.Scan(&r.Key, &r.Run)
		})
		return err
	})
	return rows
}

// openRedis is how a server process reaches Redis.
func openRedis(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{Addr: addr, ContextTimeoutEnabled: true, PoolSize: 64})
}

// openPostgres is how a server process reaches PostgreSQL. It waits for a database
// that is down.
func openPostgres(addr string) *postgres.Store {
	pool, err := pgxpool.New(context.Background(), idemtest.PostgresURL(addr)+"&pool_max_conns=32")
	must(err)
	store := postgres.NewStore(pool, &postgres.Options{MaxConns: 16})
	for err = store.Migrate(context.Background()); err != nil; err = store.Migrate(context.Background()) {
		time.Sleep(100 * time.Millisecond)
	}
	return store
}

func (s postgresDatabase) use(ctx context.Context) (size uint64, records int, err error) {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	err = conn.QueryRow(ctx, `SELECT pg_total_relation_size('idempotency'), count(*) FROM idempotency`).Scan(&size, &records)
	return size, records, err
}
