package idempotency_test

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// An answer that comes late is not taken for what is there now.
func TestRedisLateAnswerIsNotShared(t *testing.T) {
	addr := idemtest.StartRedis(t).Addr
	proxy, admin := idemtest.StartProxy(t, addr), idemtest.DialRedis(t, addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
	elsewhere := idempotency.NewRedisStore(admin, nil)
	warmUp(t, store)
	acquireAs(t, elsewhere, "key", "A")
	require.NoError(t, elsewhere.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
	_, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)

	asked := proxy.Once(idemtest.SlowReply, func(c idemtest.RedisCommand) bool { return c.Is("set", "evalsha") })
	var asking sync.WaitGroup
	asking.Go(func() { _, _ = store.Acquire(t.Context(), "key", claimOf("B")) })
	<-asked
	idemtest.Await(t, "its answer is on its way", func() bool { return admin.Del(t.Context(), "idem:key").Val() == 1 })
	acquireAs(t, elsewhere, "key", "C")
	streamed := claimOf("D")
	streamed.Fingerprint = nil // asks for itself
	rec, err := store.Acquire(t.Context(), "key", streamed)
	require.NoError(t, err)
	require.Equal(t, idempotency.InProgress, rec.State)
	asking.Wait()
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "E").State)
}

// A result is not shared for longer than its record is there, however late it was
// read.
func TestRedisResultIsNotOlderThanItsRecord(t *testing.T) {
	addr := idemtest.StartRedis(t).Addr
	admin := idemtest.DialRedis(t, addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), nil)
	_, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	acquireAs(t, store, "key", "A")
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "B").State)
	require.NoError(t, store.Complete(t.Context(), "key", "A", idempotency.Result{Fingerprint: []byte("print"), TTL: 2 * time.Second}))
	idemtest.Await(t, "the record is old", func() bool { return admin.PTTL(t.Context(), "idem:key").Val() < 500*time.Millisecond })
	acquireAs(t, store, "key", "B") // still there, unless the machine is very busy
	idemtest.Await(t, "the record is gone", func() bool { return admin.Exists(t.Context(), "idem:key").Val() == 0 })
	require.Equal(t, idempotency.Acquired, acquireAs(t, store, "key", "C").State)
}

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
