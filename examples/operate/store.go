package main

import (
	"context"
	"errors"
	"flag"
	"strings"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// A location is what the flags say about the store of the service.
type location struct {
	redis, prefix           string
	postgres, schema, table string
}

func (l *location) addTo(flags *flag.FlagSet) {
	flags.StringVar(&l.redis, "redis", "127.0.0.1:6379", "address, several of a Cluster with commas between them, or a redis:// or rediss:// (TLS) URL")
	flags.StringVar(&l.prefix, "prefix", "idem:", "RedisOptions.Prefix of the service")
	flags.StringVar(&l.postgres, "postgres", "", "postgres:// URL, for a service whose keys are in PostgreSQL")
	flags.StringVar(&l.schema, "schema", "", "postgres.Options.Schema of the service")
	flags.StringVar(&l.table, "table", "", "postgres.Options.Table of the service")
}

// open returns the store. It does not connect yet.
func (l *location) open(ctx context.Context, getenv func(string) string) (store idempotency.Inspector, closeStore func(), err error) {
	if l.postgres == "" {
		client, err := newClient(l.redis, getenv)
		if err != nil {
			return nil, nil, err
		}
		store = idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: l.prefix})
		return store, func() { _ = client.Close() }, nil
	}
	pool, err := pgxpool.New(ctx, l.postgres)
	if err != nil { // whose text may hold a password
		return nil, nil, errors.New("-postgres is no URL of a PostgreSQL")
	}
	records := postgres.NewStore(pool, &postgres.Options{Schema: l.schema, Table: l.table})
	return records, func() { records.Close(); pool.Close() }, nil
}

func newClient(addr string, getenv func(string) string) (redis.UniversalClient, error) {
	// Without ContextTimeoutEnabled, go-redis ignores the timeout of a call.
	opts := &redis.UniversalOptions{
		Addrs: strings.Split(addr, ","), Username: getenv("REDIS_USERNAME"), Password: getenv("REDIS_PASSWORD"),
		ContextTimeoutEnabled: true,
	}
	if strings.Contains(addr, "://") {
		url, err := redis.ParseURL(addr)
		if err != nil { // whose text may hold a password
			return nil, errors.New("-redis is no URL of a Redis")
		}
		opts.Addrs, opts.DB, opts.TLSConfig = []string{url.Addr}, url.DB, url.TLSConfig
		if opts.Username == "" {
			opts.Username = url.Username
		}
		if opts.Password == "" {
			opts.Password = url.Password
		}
	}
	return redis.NewUniversalClient(opts), nil
}
