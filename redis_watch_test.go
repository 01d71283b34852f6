package idempotency_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A Pub/Sub connection over which nothing comes any more is noticed.
func TestRedisWatchConnectionFallsSilent(t *testing.T) {
	proxy := idemtest.StartProxy(t, idemtest.StartRedis(t).Addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
	changed, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	proxy.Set(func(idemtest.RedisCommand) idemtest.Verdict { return idemtest.Swallow })
	select {
	case <-changed:
	case <-time.After(idemtest.Patience):
		t.Fatal("the watch was not told")
	}
}

// A panic in the dialer ends no process.
func TestRedisWatchDialerPanics(t *testing.T) {
	var broken atomic.Bool
	addr := idemtest.StartRedis(t).Addr
	client := idemtest.DialRedis(t, addr, func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if broken.Load() {
				panic("a dialer")
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	})
	broken.Store(true)
	_, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "key")
	require.Error(t, err)
	broken.Store(false)
	changed, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "key")
	require.NoError(t, err)

	// The connection breaks, and go-redis dials again before it says so.
	broken.Store(true)
	require.NoError(t, idemtest.DialRedis(t, addr).ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	select {
	case <-changed:
	case <-time.After(idemtest.Patience):
		t.Fatal("the watch was not told")
	}
}
