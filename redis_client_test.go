package idempotency_test

import (
	"context"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A panickingHook panics in one of the hooks.
type panickingHook string

func (h panickingHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if h == "dial" {
			panic("a hook")
		}
		return next(ctx, network, addr)
	}
}

func (h panickingHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h == "process" {
			panic("a hook")
		}
		return next(ctx, cmd)
	}
}

func (h panickingHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if h == "pipeline" {
			panic("a hook")
		}
		return next(ctx, cmds)
	}
}

// A panickingLimiter panics when it is asked.
type panickingLimiter struct{}

func (panickingLimiter) Allow() error       { panic("a limiter") }
func (panickingLimiter) ReportResult(error) { panic("a limiter") }

// A panic in what the client calls is an error of the store, on the goroutine
// of the caller, of a pipeline and of Pub/Sub.
func TestRedisClientPanics(t *testing.T) {
	addr := idemtest.StartRedis(t).Addr
	rows := map[string]struct {
		change func(*redis.Options)
		hook   panickingHook
	}{
		"Dialer": {change: func(o *redis.Options) {
			o.Dialer = func(context.Context, string, string) (net.Conn, error) { panic("a dialer") }
		}},
		"DialHook":            {hook: "dial"},
		"ProcessHook":         {hook: "process"},
		"ProcessPipelineHook": {hook: "pipeline"},
		"Limiter":             {change: func(o *redis.Options) { o.Limiter = panickingLimiter{} }},
		"OnConnect": {change: func(o *redis.Options) {
			o.OnConnect = func(context.Context, *redis.Conn) error { panic("on connect") }
		}},
		"CredentialsProvider": {change: func(o *redis.Options) {
			o.CredentialsProvider = func() (string, string) { panic("credentials") }
		}},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			client := idemtest.DialRedis(t, addr, func(o *redis.Options) {
				o.PoolSize, o.MaxRetries = 100, -1
				if row.change != nil {
					row.change(o)
				}
			})
			client.AddHook(row.hook)
			store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: t.Name()})
			var failed atomic.Int64
			var callers sync.WaitGroup
			for n := range 40 { // more than there are lanes
				callers.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), idemtest.Patience)
					defer cancel()
					if _, err := store.Acquire(ctx, strconv.Itoa(n), claimOf("A")); err != nil {
						failed.Add(1)
					}
				})
			}
			callers.Wait()
			require.EqualValues(t, 40, failed.Load())
			require.Error(t, store.Check(t.Context()))
			require.Error(t, store.Complete(t.Context(), "key", "A", idempotency.Result{Value: make([]byte, 17<<10), TTL: time.Hour}))
			_, err := store.Watch(t.Context(), "key")
			require.ErrorContains(t, err, "panic in the Redis client")
			idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
		})
	}
}

// Where go-redis panics while it connects again, it keeps a lock that Close
// would wait for. The goroutines of the session end nevertheless.
func TestRedisClientPanicsAgain(t *testing.T) {
	proxy := idemtest.StartProxy(t, idemtest.StartRedis(t).Addr)
	var broken atomic.Bool
	client := idemtest.DialRedis(t, proxy.Addr(), func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if broken.Load() {
				panic("a dialer")
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	})
	changed, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "key")
	require.NoError(t, err)
	broken.Store(true)
	proxy.Cut()
	select {
	case <-changed:
	case <-time.After(idemtest.Patience):
		t.Fatal("the watch was not told")
	}
	idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
}
