package integration

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A soakDatabase is what the processes of a soak share.
type soakDatabase interface {
	addr() string
	kill()
	start() bool

	// use tells how many bytes the records take, and how many there are.
	use(ctx context.Context) (size uint64, records int, err error)
}

func startSoakDatabase(t *testing.T, kind string) soakDatabase {
	if kind == soakPostgres {
		// A minute between two vacuums is long for a short soak.
		server := idemtest.StartPostgres(t, "-c", "autovacuum_naptime=5s")
		return soakPostgresServer{server}
	}
	return soakRedisServer{idemtest.StartRedis(t, durable...)}
}

type soakRedisServer struct{ *idemtest.RedisServer }

func (s soakRedisServer) addr() string { return s.Addr }
func (s soakRedisServer) kill()        { s.Kill() }
func (s soakRedisServer) start() bool  { return s.Start() }

func (s soakRedisServer) use(ctx context.Context) (size uint64, records int, err error) {
	client := redis.NewClient(&redis.Options{Addr: s.Addr, ContextTimeoutEnabled: true})
	defer func() { _ = client.Close() }()
	info, err := client.InfoMap(ctx, "memory").Result()
	if err != nil {
		return 0, 0, err
	}
	_, err = fmt.Sscan(info["Memory"]["used_memory"], &size)
	return size, int(client.DBSize(ctx).Val()), err
}

type soakPostgresServer struct{ *idemtest.PostgresServer }

func (s soakPostgresServer) addr() string { return "127.0.0.1:" + s.Port }
func (s soakPostgresServer) kill()        { s.Crash() }
func (s soakPostgresServer) start() bool  { return s.Start() }

func (s soakPostgresServer) use(ctx context.Context) (size uint64, records int, err error) {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	err = conn.QueryRow(ctx, `SELECT pg_total_relation_size('idempotency'), count(*) FROM idempotency`).Scan(&size, &records)
	return size, records, err
}

func (s *soak) takeDatabase() (sample sample) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var err error
	sample.Heap, sample.Records, err = s.database.use(ctx)
	sample.alive, sample.at = err == nil, time.Since(s.began)
	return sample
}
