package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime/pprof"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/storetest"
)

func TestRedisStoreContract(t *testing.T) {
	t.Run("miniredis", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) idempotency.Store { return newMiniStore(t, nil) })
	})
	// Real time is long, so the rest is parallel.
	stores := map[string]func(t *testing.T, client *redis.Client) idempotency.Store{
		"redis-server": func(_ *testing.T, client *redis.Client) idempotency.Store {
			return idempotency.NewRedisStore(client, nil)
		},
		"all keys are watched": func(t *testing.T, client *redis.Client) idempotency.Store {
			return watchedStore{idempotency.NewRedisStore(client, nil), t}
		},
	}
	for name, newStore := range stores {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr)
			storetest.Run(t, func(t *testing.T) idempotency.Store { return newStore(t, client) })
		})
	}
	t.Run("RESP2", func(t *testing.T) {
		t.Parallel()
		client := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr, func(o *redis.Options) { o.Protocol = 2 })
		storetest.Run(t, func(*testing.T) idempotency.Store { return idempotency.NewRedisStore(client, nil) })
	})
}

// In a watchedStore somebody waits for every key that is asked for, so that the
// script is asked at once.
type watchedStore struct {
	*idempotency.RedisStore
	t *testing.T
}

func (s watchedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if _, err := s.Watch(s.t.Context(), key); err != nil {
		s.t.Error(err)
	}
	return s.RedisStore.Acquire(ctx, key, c)
}

func TestNewRedisStorePanicsOnNonsense(t *testing.T) {
	client := idemtest.DialRedis(t, "127.0.0.1:1")
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	t.Cleanup(func() { _ = ring.Close() })
	pipeliner, err := client.AutoPipeline()
	require.NoError(t, err)
	rows := []struct {
		name   string
		client redis.UniversalClient
		opts   idempotency.RedisOptions
		fix    string
	}{
		{"no client", nil, idempotency.RedisOptions{}, "redis.NewUniversalClient"},
		{"a Ring", ring, idempotency.RedisOptions{}, "use Redis Cluster or Sentinel"},
		{"an AutoPipeliner", pipeliner, idempotency.RedisOptions{}, "use the client"},
		{"MinReplicas over any connection", struct{ redis.UniversalClient }{client}, idempotency.RedisOptions{MinReplicas: 1}, "use a *redis.Client"},
		{"negative MinReplicas", client, idempotency.RedisOptions{MinReplicas: -1}, "leave it zero"},
		{"negative ReplicaTimeout", client, idempotency.RedisOptions{ReplicaTimeout: -1}, "leave it zero for 500ms"},
		{"too short ReplicaTimeout", client, idempotency.RedisOptions{ReplicaTimeout: time.Microsecond}, "leave it zero for 500ms"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			defer func() { require.Contains(t, recover(), row.fix) }()
			idempotency.NewRedisStore(row.client, &row.opts)
		})
	}
}

func TestRedisRoundTrips(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		shop := idemtest.OpenShop(t, idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil), nil, nil)
		shop.Post("warm-up") // from here on the scripts are known to Redis

		proxy.Forget()
		require.Equal(t, "201 charge 2", shop.Post("key"))
		require.Len(t, proxy.Commands(), 2, "first execution")
		require.Equal(t, []int{1, 1}, []int{proxy.Count("set"), proxy.Count("evalsha")})

		proxy.Forget()
		require.Equal(t, "201 charge 2 replayed", shop.Post("key"))
		require.Len(t, proxy.Commands(), 1, "replay")
	})
}

func TestRedisRoundTripsOfRenewalAndCommit(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			proxy.Forget()
			if err := e.Commit(r.Context()); err != nil {
				t.Error(err)
			}
		})
		shop.Post("warm-up")
		shop.Post("key")
		require.Len(t, proxy.Commands(), 2, "Commit and Complete")
	})
}

func TestRedisForgetsScripts(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		flush := func() { require.NoError(t, client.ScriptFlush(t.Context()).Err()) }
		flush()
		require.Equal(t, idempotency.Acquired, acquireAs(t, store, "key", "A").State)
		flush()
		require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "B").State)
		flush()
		require.NoError(t, store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
		flush()
		require.Equal(t, idempotency.Completed, acquireAs(t, store, "key", "B").State)

		acquireAs(t, store, "other", "A")
		flush()
		require.NoError(t, store.Release(t.Context(), "other", "A", time.Minute))
		require.Equal(t, 2, acquireAs(t, store, "other", "B").Attempt)
	})
}

func claimOf(token string) idempotency.Claim {
	return idempotency.Claim{Token: token, Fingerprint: []byte("print"), Lease: time.Minute, TTL: time.Hour}
}

func renewalOf(token string, attempt int) idempotency.Claim {
	c := claimOf(token)
	c.Attempt = attempt
	return c
}

func acquireAs(t *testing.T, store idempotency.Store, key, token string) idempotency.Record {
	t.Helper()
	rec, err := store.Acquire(t.Context(), key, claimOf(token))
	require.NoError(t, err)
	return rec
}

// What somebody else wrote under our key is never a free key, and stays.
func TestRedisForeignCells(t *testing.T) {
	valid := func(t *testing.T, store idempotency.Store, client *redis.Client) string {
		acquireAs(t, store, "valid", "A")
		return client.Get(t.Context(), "idem:valid").Val()
	}
	rows := map[string]func(t *testing.T, store idempotency.Store, client *redis.Client) any{
		"empty":       func(*testing.T, idempotency.Store, *redis.Client) any { return "" },
		"text":        func(*testing.T, idempotency.Store, *redis.Client) any { return strings.Repeat("text ", 20) },
		"truncated":   func(t *testing.T, s idempotency.Store, c *redis.Client) any { v := valid(t, s, c); return v[:len(v)-1] },
		"header only": func(t *testing.T, s idempotency.Store, c *redis.Client) any { return valid(t, s, c)[:21] },
		"no header":   func(t *testing.T, s idempotency.Store, c *redis.Client) any { return valid(t, s, c)[:3] },
		"newer": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			v := valid(t, s, c)
			return "\x1e" + v[1:]
		},
		"newer record": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			acquireAs(t, s, "valid", "A")
			require.NoError(t, s.Complete(t.Context(), "valid", "A", idempotency.Result{Fingerprint: []byte("print"), Value: []byte("v"), TTL: time.Hour}))
			v := c.Get(t.Context(), "idem:valid").Val()
			return "\x1e" + v[1:]
		},
		"longer claim of another request": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			other := claimOf("B")
			other.Fingerprint = []byte("other")
			_, err := s.Acquire(t.Context(), "valid", other)
			require.NoError(t, err)
			return c.Get(t.Context(), "idem:valid").Val() + "x"
		},
		"unknown state": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			v := valid(t, s, c)
			return v[:1] + "X" + v[2:]
		},
		"another type": nil,
	}
	eachRedis(t, func(t *testing.T, addr string) {
		for name, content := range rows {
			t.Run(name, func(t *testing.T) {
				client := idemtest.DialRedis(t, addr)
				store := idempotency.NewRedisStore(client, nil)
				require.NoError(t, client.FlushAll(t.Context()).Err())
				if content == nil {
					require.NoError(t, client.LPush(t.Context(), "idem:key", "value").Err())
				} else {
					require.NoError(t, client.Set(t.Context(), "idem:key", content(t, store, client), 0).Err())
				}
				before := client.Dump(t.Context(), "idem:key").Val()

				_, err := store.Acquire(t.Context(), "key", claimOf("A"))
				require.Error(t, err)
				_, err = store.Acquire(t.Context(), "key", renewalOf("A", 1))
				require.Error(t, err)
				err = store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour})
				require.Error(t, err)
				require.NotErrorIs(t, err, idempotency.ErrLeaseLost)
				require.Error(t, store.Release(t.Context(), "key", "A", time.Minute))
				require.Equal(t, before, client.Dump(t.Context(), "idem:key").Val())

				shop := idemtest.OpenShop(t, store, nil, nil)
				require.NoError(t, client.FlushAll(t.Context()).Err())
				require.Equal(t, "201 charge 1", shop.Post("key"), "a key of its own is not disturbed")
			})
		}
	})
}

// A claim without expiry has lost its clock.
func TestRedisClaimWithoutExpiry(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		acquireAs(t, store, "key", "A")
		require.NoError(t, client.Persist(t.Context(), "idem:key").Err())
		_, err := store.Acquire(t.Context(), "key", claimOf("B"))
		require.Error(t, err)
	})
}

func TestRedisPrefix(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		one := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "one:"})
		acquireAs(t, one, "key", "A")
		acquireAs(t, idempotency.NewRedisStore(client, nil), "key", "A")
		keys := client.Keys(t.Context(), "*").Val()
		require.ElementsMatch(t, []string{"one:key", "idem:key"}, keys)
	})
}

// A cluster is asked for its slots after errors of the network, not of Redis,
// and not in a flood.
func TestRedisClusterIsReloaded(t *testing.T) {
	server := idemtest.StartRedis(t)
	cluster := &fakeCluster{Client: idemtest.DialRedis(t, server.Addr, func(o *redis.Options) { o.MaxRetries, o.DialerRetries = -1, 1 })}
	store := idempotency.NewRedisStore(cluster, nil)
	acquireAs(t, store, "key", "A")
	require.NoError(t, cluster.LPush(t.Context(), "idem:list", "value").Err())
	_, err := store.Acquire(t.Context(), "list", claimOf("A"))
	require.Error(t, err)
	require.Zero(t, cluster.reloads.Load())

	server.Kill()
	for range 50 {
		_, err := store.Acquire(t.Context(), "key", claimOf("A"))
		require.Error(t, err)
		require.NotZero(t, cluster.reloads.Load())
	}
	require.Less(t, cluster.reloads.Load(), int64(25))
}

// A fakeCluster counts what a ClusterClient would do.
type fakeCluster struct {
	*redis.Client
	reloads atomic.Int64
}

func (c *fakeCluster) ReloadState(context.Context) { c.reloads.Add(1) }

// A value that the store keeps has an expiry whatever happens to it.
func TestRedisKeysExpire(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		ttl := func() time.Duration { return client.PTTL(t.Context(), "idem:key").Val() }
		about := func(want time.Duration) {
			t.Helper()
			require.InDelta(t, want.Seconds(), ttl().Seconds(), 30)
		}
		acquireAs(t, store, "key", "A")
		about(time.Hour)
		acquireAs(t, store, "key", "B") // marks the cell
		about(time.Hour)
		require.NoError(t, store.Release(t.Context(), "key", "A", time.Minute))
		about(time.Minute)
		acquireAs(t, store, "key", "B")
		about(time.Hour)
		require.NoError(t, store.Complete(t.Context(), "key", "B", idempotency.Result{TTL: 2 * time.Hour}))
		about(2 * time.Hour)
		require.NoError(t, client.Del(t.Context(), "idem:key").Err())
		require.NoError(t, store.Release(t.Context(), "key", "C", time.Minute))
		about(time.Minute)
	})
}

func TestRedisDurationsAreRoundedUp(t *testing.T) {
	store := newMiniStore(t, nil)
	claim := claimOf("A")
	claim.Lease, claim.TTL = 1500*time.Microsecond, time.Nanosecond
	_, err := store.Acquire(t.Context(), "key", claim)
	require.NoError(t, err)
	require.Equal(t, 2*time.Millisecond, store.mini.TTL("idem:key"))
	require.NoError(t, store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Microsecond}))
	require.Equal(t, time.Millisecond, store.mini.TTL("idem:key"))
}

func TestRedisLongTokenIsAnError(t *testing.T) {
	store := newMiniStore(t, nil)
	_, err := store.Acquire(t.Context(), "key", claimOf(strings.Repeat("x", 256)))
	require.ErrorContains(t, err, "255 bytes")
	require.False(t, store.mini.Exists("idem:key"))
}

func TestRedisAttemptsCountFar(t *testing.T) {
	store := newMiniStore(t, nil)
	for n := 1; n <= 600; n++ { // over the edge of a byte, twice
		token := fmt.Sprint("token ", n)
		require.Equal(t, n, acquireAs(t, store, "key", token).Attempt)
		require.NoError(t, store.Release(t.Context(), "key", token, time.Minute))
	}
}

func TestRedisDown(t *testing.T) {
	server := idemtest.StartRedis(t)
	client := idemtest.DialRedis(t, server.Addr, func(o *redis.Options) { o.MaxRetries = -1 })
	shop := idemtest.OpenShop(t, idempotency.NewRedisStore(client, nil), nil, nil)
	require.Equal(t, "201 charge 1", shop.Post("key"))
	server.Kill()
	require.Equal(t, "503 Service Unavailable", shop.Post("key"))
	require.Equal(t, "503 Service Unavailable", shop.Post("other"))
	require.EqualValues(t, 1, shop.Runs.Load())
}

// A Redis that restarts without persistence has lost its records: the key runs
// again. With an append-only file it has not.
func TestRedisRestart(t *testing.T) {
	rows := map[string]struct {
		args []string
		want string
	}{
		"volatile":         {nil, "201 charge 2"},
		"append-only file": {[]string{"--appendonly", "yes", "--appendfsync", "always"}, "201 charge 1 replayed"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			server := idemtest.StartRedis(t, row.args...)
			store := idempotency.NewRedisStore(idemtest.DialRedis(t, server.Addr), nil)
			shop := idemtest.OpenShop(t, store, nil, nil)
			require.Equal(t, "201 charge 1", shop.Post("key"))
			server.Kill()
			server.Restart()
			require.Equal(t, row.want, shop.Post("key"))
		})
	}
}

// With an append-only file a claim outlives a restart too, in the middle of the
// handler, and its owner completes it.
func TestRedisRestartsWhileAHandlerRuns(t *testing.T) {
	server := idemtest.StartRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	client := idemtest.DialRedis(t, server.Addr)
	store := idempotency.NewRedisStore(client, nil)
	shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, r *http.Request) {
		server.Kill()
		server.Restart()
		rec, err := store.Acquire(r.Context(), idempotencyKey(client), claimOf("B"))
		if err != nil || rec.State != idempotency.Mismatch && rec.State != idempotency.InProgress {
			t.Errorf("the claim is %v after a restart (%v)", rec.State, err)
		}
		_, _ = io.WriteString(w, "done")
	})
	require.Equal(t, "200 done", shop.Post("key"))
	require.Equal(t, "200 done replayed", shop.Post("key"))
}

// idempotencyKey returns the store key of the only cell.
func idempotencyKey(client *redis.Client) string {
	keys := client.Keys(context.Background(), "idem:*").Val()
	if len(keys) != 1 {
		return fmt.Sprintf("one of %d keys", len(keys))
	}
	return strings.TrimPrefix(keys[0], "idem:")
}

// When Redis is full new keys are refused, and what was let in goes on: it is
// renewed, waited for, completed, released and replayed.
func TestRedisFull(t *testing.T) {
	server := idemtest.StartRedis(t, "--maxmemory-policy", "noeviction")
	client := idemtest.DialRedis(t, server.Addr)
	store := idempotency.NewRedisStore(client, nil)
	ctx := t.Context()
	acquireAs(t, store, "running", "A")
	acquireAs(t, store, "failing", "A")
	acquireAs(t, store, "released", "A")
	require.NoError(t, store.Release(ctx, "released", "A", time.Minute))
	acquireAs(t, store, "done", "A")
	require.NoError(t, store.Complete(ctx, "done", "A", idempotency.Result{Value: []byte("one"), TTL: time.Hour}))
	require.NoError(t, client.ConfigSet(ctx, "maxmemory", "1").Err())

	_, err := store.Acquire(ctx, "new", claimOf("A"))
	require.ErrorIs(t, err, idempotency.ErrStoreFull)
	_, err = store.Acquire(ctx, "new", renewalOf("A", 1)) // of a record that Redis has lost
	require.ErrorIs(t, err, idempotency.ErrStoreFull)
	require.Zero(t, client.Exists(ctx, "idem:new").Val())

	require.Equal(t, idempotency.Completed, acquireAs(t, store, "done", "B").State)
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "running", "B").State)
	renewal := renewalOf("A", 1)
	renewal.Once = true // grows nothing, but Redis cannot know
	rec, err := store.Acquire(ctx, "running", renewal)
	require.NoError(t, err)
	require.Equal(t, idempotency.Acquired, rec.State)
	value := make([]byte, 1<<20)
	require.NoError(t, store.Complete(ctx, "running", "A", idempotency.Result{Value: value, TTL: time.Hour}))
	require.Len(t, acquireAs(t, store, "running", "B").Value, len(value))
	require.NoError(t, store.Release(ctx, "failing", "A", time.Minute))
	require.Equal(t, 2, acquireAs(t, store, "failing", "B").Attempt)
	require.Equal(t, 2, acquireAs(t, store, "released", "B").Attempt)

	shop := idemtest.OpenShop(t, store, nil, nil)
	require.Equal(t, "503 Service Unavailable", shop.Post("key"))
	require.Zero(t, shop.Runs.Load())
}

func TestRedisCheck(t *testing.T) {
	server := idemtest.StartRedis(t)
	admin := idemtest.DialRedis(t, server.Addr)
	ctx := t.Context()
	check := func(change ...func(*redis.Options)) error {
		return idempotency.NewRedisStore(idemtest.DialRedis(t, server.Addr, change...), nil).Check(ctx)
	}
	require.NoError(t, check())

	require.NoError(t, admin.ConfigSet(ctx, "maxmemory-policy", "allkeys-lru").Err())
	require.ErrorContains(t, check(), "set it to noeviction")

	// Who may not ask for the policy does not learn it.
	acl := []any{"acl", "setuser", "app", "on", ">secret", "~*", "&*", "+@all", "-config"}
	require.NoError(t, admin.Do(ctx, acl...).Err())
	as := func(password string) func(*redis.Options) {
		return func(o *redis.Options) { o.Username, o.Password = "app", password }
	}
	require.NoError(t, check(as("secret")))
	require.NoError(t, admin.Do(ctx, append(acl, "-info")...).Err())
	require.NoError(t, check(as("secret")))
	require.ErrorContains(t, check(as("wrong")), "WRONGPASS")

	server.Kill()
	require.Error(t, check())
}

// A program that checks its store at the start can be tested on miniredis.
func TestRedisCheckOnMiniredis(t *testing.T) {
	server := miniredis.RunT(t)
	require.NoError(t, idempotency.NewRedisStore(idemtest.DialRedis(t, server.Addr()), nil).Check(t.Context()))
}

func TestRedisCheckVersion(t *testing.T) {
	rows := map[string]string{
		"# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\n":                     "Redis is version 6.2.14",
		"# Server\r\nredis_version:7.0.15\r\n":                                              "",
		"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.0\r\n": "",
		"# Server\r\nredis_version:10.0.0\r\n":                                              "",
		"# Server\r\nredis_version:unstable\r\n":                                            "unstable",
		"# Server\r\nredis_git_sha1:0\r\n":                                                  "",
	}
	for info, want := range rows {
		client := idemtest.DialRedis(t, "127.0.0.1:1")
		client.AddHook(infoHook(info))
		err := idempotency.NewRedisStore(client, nil).Check(t.Context())
		if want == "" {
			require.NoError(t, err, info)
		} else {
			require.ErrorContains(t, err, want, info)
		}
	}
}

// infoHook answers INFO with itself.
type infoHook string

func (h infoHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h infoHook) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		switch cmd := cmd.(type) {
		case *redis.StringCmd:
			cmd.SetVal(string(h))
		case *redis.MapStringStringCmd:
			cmd.SetVal(map[string]string{"maxmemory-policy": "noeviction"})
		default:
			return errors.New("unexpected command")
		}
		return nil
	}
}

func (h infoHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// crowd sends a request with one key to each of the shops in turn, n in all and
// all at once, and returns the answers and how often each came.
func crowd(n int, key string, shops ...*idemtest.Shop) map[string]int {
	answers := make(chan string, n)
	start := make(chan struct{})
	for i := range n {
		go func() {
			<-start
			answers <- strings.TrimSuffix(shops[i%len(shops)].Post(key), " replayed")
		}()
	}
	close(start)
	count := make(map[string]int)
	for range n {
		count[<-answers]++
	}
	return count
}

func TestRedisDuplicatesOverTwoProcesses(t *testing.T) {
	const requests, handling = 200, 50 * time.Millisecond
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		handler := func(w http.ResponseWriter, r *http.Request) {
			<-time.After(handling)
			_, _ = io.WriteString(w, "charged")
		}
		var shops []*idemtest.Shop
		for range 2 {
			store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
			shops = append(shops, idemtest.OpenShop(t, store, nil, handler))
		}
		crowd(20, "warm-up", shops...)
		before := shops[0].Runs.Load() + shops[1].Runs.Load()
		idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })

		proxy.Forget()
		start := time.Now()
		require.Equal(t, map[string]int{"200 charged": requests}, crowd(requests, "key", shops...))
		t.Logf("%d commands in %v for %d requests", len(proxy.Commands()), time.Since(start), requests)
		require.EqualValues(t, 1, shops[0].Runs.Load()+shops[1].Runs.Load()-before)
		require.LessOrEqual(t, len(proxy.Commands()), 2*requests+10)
		require.LessOrEqual(t, proxy.Count("subscribe"), 10, "one for each process, and for stragglers")
		idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })
	})
}

// redisSessions returns how many goroutines serve Pub/Sub connections.
func redisSessions() int {
	var stacks strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2)
	return strings.Count(stacks.String(), "idempotency.(*redisSession)")
}

// A claim that too few replicas have is given back before the handler runs.
func TestRedisMinReplicas(t *testing.T) {
	master := idemtest.StartRedis(t, "--repl-diskless-sync-delay", "0")
	admin := idemtest.DialRedis(t, master.Addr)
	proxy := idemtest.StartProxy(t, master.Addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()),
		&idempotency.RedisOptions{MinReplicas: 1, ReplicaTimeout: 50 * time.Millisecond})
	ctx := t.Context()

	for range 2 {
		_, err := store.Acquire(ctx, "key", claimOf("A"))
		require.ErrorIs(t, err, idempotency.ErrTooFewReplicas)
		require.Equal(t, idempotency.Lost, acquireAs(t, store, "key", "A").State, "it was released")
		require.NoError(t, admin.Del(ctx, "idem:key").Err())
	}
	shop := idemtest.OpenShop(t, store, nil, nil)
	require.Equal(t, "503 Service Unavailable", shop.Post("post"))
	require.Zero(t, shop.Runs.Load())

	host, port, err := net.SplitHostPort(master.Addr)
	require.NoError(t, err)
	replica := idemtest.StartRedis(t, "--replicaof", host+" "+port)
	idemtest.AwaitReplicas(t, admin, 1)
	require.Equal(t, "201 charge 1", shop.Post("post"))
	proxy.Forget()
	require.Equal(t, "201 charge 2", shop.Post("another"))
	require.Equal(t, []int{1, 1, 1, 3}, []int{proxy.Count("set"), proxy.Count("wait"), proxy.Count("evalsha"), len(proxy.Commands())})
	require.Equal(t, idempotency.Acquired, acquireAs(t, store, "taken", "A").State)
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "taken", "B").State)

	// A renewal that no replica has fails, but the claim of a running handler
	// is not released. What changes nothing is answered all the same.
	replica.Kill()
	idemtest.Await(t, "no replica", func() bool {
		return strings.Contains(admin.Info(ctx, "replication").Val(), "connected_slaves:0")
	})
	_, err = store.Acquire(ctx, "taken", renewalOf("A", 1))
	require.ErrorIs(t, err, idempotency.ErrTooFewReplicas)
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "taken", "B").State)

	require.NoError(t, store.Complete(ctx, "taken", "A", idempotency.Result{TTL: time.Hour}))
	require.Equal(t, idempotency.Completed, acquireAs(t, store, "taken", "B").State)

	// A key that is free again waits as well, and so does a claim that was sent
	// twice and finds its own cell.
	require.NoError(t, store.Release(ctx, "other", "A", time.Minute))
	acquireAs(t, idempotency.NewRedisStore(admin, nil), "twice", "B")
	for _, key := range []string{"other", "twice"} {
		_, err = store.Acquire(ctx, key, claimOf("B"))
		require.ErrorIs(t, err, idempotency.ErrTooFewReplicas)
		require.Equal(t, idempotency.Lost, acquireAs(t, store, key, "B").State)
	}
}

// The claim of a running handler is not released, not even when Redis has lost
// it and the renewal makes it anew: the handler would run a second time.
func TestRedisMinReplicasOfARunningHandler(t *testing.T) {
	master := idemtest.StartRedis(t, "--repl-diskless-sync-delay", "0")
	admin := idemtest.DialRedis(t, master.Addr)
	host, port, err := net.SplitHostPort(master.Addr)
	require.NoError(t, err)
	replica := idemtest.StartRedis(t, "--replicaof", host+" "+port)
	idemtest.AwaitReplicas(t, admin, 1)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, master.Addr),
		&idempotency.RedisOptions{MinReplicas: 1, ReplicaTimeout: 50 * time.Millisecond})
	commit := make(chan error, 1)
	shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, r *http.Request) {
		replica.Kill()
		idemtest.Await(t, "no replica", func() bool {
			return strings.Contains(admin.Info(r.Context(), "replication").Val(), "connected_slaves:0")
		})
		_ = admin.FlushAll(r.Context())
		commit <- idemtest.Execution(r).Commit(r.Context())
		w.WriteHeader(http.StatusCreated)
	})
	require.Equal(t, "201", strings.TrimSpace(shop.Post("key")))
	require.ErrorIs(t, <-commit, idempotency.ErrTooFewReplicas)
	require.Contains(t, shop.Post("key"), "replayed")
	require.EqualValues(t, 1, shop.Runs.Load())
}

// A refusal for lack of replicas is final, and FailOpen is no way around it.
func TestRedisMinReplicasIsARefusal(t *testing.T) {
	addr := idemtest.StartRedis(t).Addr
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr),
		&idempotency.RedisOptions{MinReplicas: 1, ReplicaTimeout: 20 * time.Millisecond})
	events := &idemtest.EventLog{}
	shop := idemtest.OpenShop(t, store, &idempotency.Options{FailOpen: true, OnEvent: events.Add}, nil)
	require.Equal(t, "503 Service Unavailable", shop.Post("key"))
	require.ErrorIs(t, events.Last().Err, idempotency.ErrTooFewReplicas)
	require.Zero(t, shop.Runs.Load())
}

// Renewals by the timer take one command each.
func TestRedisRenewalIsOneCommand(t *testing.T) {
	proxy := idemtest.StartProxy(t, idemtest.StartRedis(t).Addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
	shop := idemtest.OpenShop(t, store, &idempotency.Options{Lease: 300 * time.Millisecond}, func(w http.ResponseWriter, r *http.Request) {
		proxy.Forget()
		idemtest.Await(t, "three renewals", func() bool { return proxy.Count("evalsha") >= 3 })
		w.WriteHeader(http.StatusCreated)
	})
	require.Equal(t, "201", strings.TrimSpace(shop.Post("key")))
	require.Zero(t, proxy.Count("set"))
}

// Duplicates that come one by one cannot ask together, only wait together.
func TestRedisDuplicatesOneByOne(t *testing.T) {
	const duplicates = 60
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		warmUp(t, store)
		release := make(chan struct{})
		var waiting atomic.Int64
		shop := idemtest.OpenShop(t, countingStore{store, &waiting}, nil, func(w http.ResponseWriter, r *http.Request) {
			<-release
			_, _ = io.WriteString(w, "charged")
		})
		proxy.Forget()
		answers := make(chan string, duplicates+1)
		for i := range duplicates + 1 {
			go func() { answers <- shop.Post("key") }()
			idemtest.Await(t, "it waits", func() bool { return waiting.Load() >= int64(i) && shop.Runs.Load() == 1 })
		}
		require.LessOrEqual(t, len(proxy.Commands()), 2*duplicates+5)
		proxy.Forget()
		close(release)
		for range duplicates + 1 {
			require.Contains(t, <-answers, "200 charged")
		}
		t.Logf("%d commands when the key is completed", len(proxy.Commands()))
		require.LessOrEqual(t, len(proxy.Commands()), duplicates/2, "they ask together")
	})
}

// countingStore counts the watches that have begun.
type countingStore struct {
	*idempotency.RedisStore
	waiting *atomic.Int64
}

func (s countingStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	changed, err := s.RedisStore.Watch(ctx, key)
	s.waiting.Add(1)
	return changed, err
}

// A key that is freed goes to one of those who wait, and the others wait on.
func TestRedisDuplicatesOfARequestThatFails(t *testing.T) {
	const requests, failures = 20, 3
	eachRedis(t, func(t *testing.T, addr string) {
		var runs atomic.Int64
		handler := func(w http.ResponseWriter, r *http.Request) {
			<-time.After(20 * time.Millisecond)
			e, _ := idempotency.FromContext(r.Context())
			if n := runs.Add(1); int(n) != e.Attempt() {
				t.Errorf("run %d is attempt %d", n, e.Attempt())
			}
			if e.Attempt() <= failures {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}
		var shops []*idemtest.Shop
		for range 2 {
			store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), nil)
			shops = append(shops, idemtest.OpenShop(t, store, nil, handler))
		}
		want := map[string]int{"503 Service Unavailable": failures, "200 ": requests - failures}
		require.Equal(t, want, crowd(requests, "key", shops...))
		require.EqualValues(t, failures+1, runs.Load())
	})
}

// Who waits is told even if the mark that somebody waits was lost with the cell,
// or belonged to a claim that was taken over.
func TestRedisWatchOfALostCell(t *testing.T) {
	ends := map[string]func(t *testing.T, s miniStore){
		"completed when lost": func(t *testing.T, s miniStore) {
			s.mini.Del("idem:key")
			require.NoError(t, s.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
		},
		"released when lost": func(t *testing.T, s miniStore) {
			s.mini.Del("idem:key")
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
		},
		"completed when taken over": func(t *testing.T, s miniStore) {
			s.Advance(2 * time.Minute)
			require.Equal(t, 2, acquireAs(t, s, "key", "C").Attempt)
			require.NoError(t, s.Complete(t.Context(), "key", "C", idempotency.Result{TTL: time.Hour}))
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			store := newMiniStore(t, nil)
			acquireAs(t, store, "key", "A")
			changed, err := store.Watch(t.Context(), "key")
			require.NoError(t, err)
			require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "B").State)
			end(t, store)
			select {
			case <-changed:
			case <-time.After(idemtest.Patience):
				t.Fatal("not told")
			}
		})
	}
}
