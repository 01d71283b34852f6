package idempotency_test

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// What is no cell of this package is neither shown as nothing nor touched.
func TestRedisInspectForeignKey(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		ctx := t.Context()
		for name, write := range map[string]func(name string) error{
			"text":    func(name string) error { return client.Set(ctx, name, "a session", 0).Err() },
			"empty":   func(name string) error { return client.Set(ctx, name, "", 0).Err() },
			"list":    func(name string) error { return client.LPush(ctx, name, "a").Err() },
			"another": func(name string) error { return client.Set(ctx, name, "\x1e0123456789", 0).Err() },
			"a claim without a TTL": func(name string) error {
				acquireAs(t, store, "a claim without a TTL", "A")
				return client.Persist(ctx, name).Err()
			},
		} {
			require.NoError(t, write("idem:"+name))
			before := client.Dump(ctx, "idem:"+name).Val()
			_, err := store.Inspect(ctx, name)
			require.Error(t, err, name)
			for _, state := range []idempotency.State{0, idempotency.Lapsed, idempotency.Completed} {
				err = store.Forget(ctx, name, idempotency.Cell{State: state})
				require.Error(t, err, name)
				require.NotErrorIs(t, err, idempotency.ErrInProgress, name)
			}
			require.Equal(t, before, client.Dump(ctx, "idem:"+name).Val(), name)
		}
	})
}

// A Cell of another store, with an Owner that is no digest, is not this one.
func TestRedisForgetWithAnotherStoresCell(t *testing.T) {
	s := newMiniStore(t, nil)
	require.NoError(t, s.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
	seen := idempotency.Cell{State: idempotency.Completed, Owner: "A"}
	require.ErrorIs(t, s.Forget(t.Context(), "key", seen), idempotency.ErrCellChanged)
	require.Equal(t, idempotency.Completed, acquireAs(t, s, "key", "B").State)
}

// Who has waited for a claim that lapsed is told, and the next run is waited
// for as well.
func TestRedisForgetKeepsTheWatch(t *testing.T) {
	s := newMiniStore(t, nil)
	ctx := t.Context()
	acquireAs(t, s, "key", "A")
	acquireAs(t, s, "key", "B") // is answered InProgress, which marks the cell
	s.Advance(2 * time.Minute)
	seen, err := s.Inspect(ctx, "key")
	require.NoError(t, err)
	require.NoError(t, s.Forget(ctx, "key", seen))
	require.Equal(t, 2, acquireAs(t, s, "key", "C").Attempt)
	changed, err := s.Watch(ctx, "key")
	require.NoError(t, err)
	require.NoError(t, s.Complete(ctx, "key", "C", idempotency.Result{TTL: time.Hour}))
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		t.Fatal("the watch was not told")
	}
}

// An operator uses the prefix of the service, and no other.
func TestRedisInspectUsesThePrefix(t *testing.T) {
	s := newMiniStore(t, &idempotency.RedisOptions{Prefix: "shop:"})
	require.NoError(t, s.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
	client := idemtest.DialRedis(t, s.mini.Addr())
	other := idempotency.NewRedisStore(client, nil)
	seen, err := s.Inspect(t.Context(), "key")
	require.NoError(t, err)
	require.Equal(t, idempotency.Completed, seen.State)
	nothing, err := other.Inspect(t.Context(), "key")
	require.NoError(t, err)
	require.Zero(t, nothing)
	require.ErrorIs(t, other.Forget(t.Context(), "key", seen), idempotency.ErrCellChanged)
}

func TestRedisInspectWithoutRedis(t *testing.T) {
	store := idempotency.NewRedisStore(redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1, DialerRetries: 1}), nil)
	_, err := store.Inspect(t.Context(), "key")
	require.Error(t, err)
	require.Error(t, store.Forget(t.Context(), "key", idempotency.Cell{}))
}
