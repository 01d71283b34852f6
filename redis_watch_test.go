package idempotency_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

// A Pub/Sub connection over which nothing comes any more is noticed.
func TestRedisWatchConnectionFallsSilent(t *testing.T) {
	proxy := startProxy(t, startRedis(t).addr)
	store := idempotency.NewRedisStore(newClient(t, proxy.addr()), nil)
	changed, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	proxy.set(func(redisCommand) verdict { return swallow })
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatal("the watch was not told")
	}
}
