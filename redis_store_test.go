package idempotency_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
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

// eachRedis runs a test on miniredis, and on a redis-server where there is one.
func eachRedis(t *testing.T, test func(t *testing.T, addr string)) {
	t.Run("miniredis", func(t *testing.T) { test(t, miniredis.RunT(t).Addr()) })
	t.Run("redis-server", func(t *testing.T) { test(t, idemtest.StartRedis(t).Addr) })
}

// A miniStore has the clock of its miniredis.
type miniStore struct {
	*idempotency.RedisStore
	mini *miniredis.Miniredis
}

func (s miniStore) Advance(d time.Duration) { s.mini.FastForward(d) }

func newMiniStore(t *testing.T, opts *idempotency.RedisOptions) miniStore {
	mini := miniredis.RunT(t)
	return miniStore{idempotency.NewRedisStore(idemtest.DialRedis(t, mini.Addr()), opts), mini}
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

// A watchedStore watches every key that is claimed, so that the script decides
// about it at once.
type watchedStore struct {
	*idempotency.RedisStore
	t *testing.T
}

func (s watchedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	idemtest.Await(s.t, "a watch", func() bool { // a busy machine may need another try
		_, err := s.Watch(s.t.Context(), key)
		return err == nil
	})
	return s.RedisStore.Acquire(ctx, key, c)
}

func TestNewRedisStorePanics(t *testing.T) {
	client := idemtest.DialRedis(t, "127.0.0.1:1")
	type inner struct{ redis.UniversalClient }
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
		{"a struct around a Ring", struct{ *redis.Ring }{ring}, idempotency.RedisOptions{}, "use Redis Cluster or Sentinel"},
		{"a struct around a client that is a Ring", &struct{ redis.UniversalClient }{ring}, idempotency.RedisOptions{}, "use Redis Cluster or Sentinel"},
		{"a Ring two structs deep", struct{ inner }{inner{ring}}, idempotency.RedisOptions{}, "use Redis Cluster or Sentinel"},
		{"a struct around an AutoPipeliner", struct{ *redis.AutoPipeliner }{pipeliner}, idempotency.RedisOptions{}, "use the client"},
		{"a nil pointer", (*redis.Client)(nil), idempotency.RedisOptions{}, "redis.NewUniversalClient"},
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

// deeper may be absent from a struct that embeds it.
type deeper struct{ *redis.Ring }

// A struct around a fit client is taken, whatever else it has.
func TestNewRedisStoreOfAWrapper(t *testing.T) {
	client := idemtest.DialRedis(t, miniredis.RunT(t).Addr())
	ring := redis.NewRing(&redis.RingOptions{})
	t.Cleanup(func() { _ = ring.Close() })
	type metered struct {
		*redis.Client
		old *redis.Ring
	}
	type optional struct {
		redis.UniversalClient
		*deeper // two levels down, so its methods do not count
	}
	rows := map[string]redis.UniversalClient{
		"a client":      struct{ *redis.Client }{client},
		"an interface":  struct{ redis.UniversalClient }{client},
		"a field":       metered{client, ring},
		"a pointer":     &metered{client, ring},
		"a nil pointer": optional{UniversalClient: client},
	}
	for name, wrapper := range rows {
		store := idempotency.NewRedisStore(wrapper, nil)
		require.Equal(t, idempotency.Acquired, acquireAs(t, store, name, "A").State, name)
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

// A renewal by the timer takes one command, also when others share questions.
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

// When Redis is full new keys are refused. A claim that was let in is still
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
	seen, err := store.Inspect(ctx, "done")
	require.NoError(t, err)
	require.NoError(t, store.Forget(ctx, "done", seen))
	require.Equal(t, 2, acquireAs(t, store, "done", "B").Attempt)

	shop := idemtest.OpenShop(t, store, nil, nil)
	require.Equal(t, "503 Service Unavailable", shop.Post("key"))
	require.Zero(t, shop.Runs.Load())
}

// A Cluster client loads its slots again after errors of the network, not of
// Redis, and not in a flood.
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

// A claim that too few replicas have is released before the handler runs.
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
	// is not released. An answer that changes nothing does not wait for replicas.
	replica.Kill()
	idemtest.Await(t, "no replica", func() bool {
		return strings.Contains(admin.Info(ctx, "replication").Val(), "connected_slaves:0")
	})
	_, err = store.Acquire(ctx, "taken", renewalOf("A", 1))
	require.ErrorIs(t, err, idempotency.ErrTooFewReplicas)
	require.Equal(t, idempotency.InProgress, acquireAs(t, store, "taken", "B").State)

	require.NoError(t, store.Complete(ctx, "taken", "A", idempotency.Result{TTL: time.Hour}))
	require.Equal(t, idempotency.Completed, acquireAs(t, store, "taken", "B").State)

	// The claim of a released key is released as well, and so is one that was
	// sent twice and finds its own cell.
	require.NoError(t, store.Release(ctx, "other", "A", time.Minute))
	acquireAs(t, idempotency.NewRedisStore(admin, nil), "twice", "B")
	for _, key := range []string{"other", "twice"} {
		_, err = store.Acquire(ctx, key, claimOf("B"))
		require.ErrorIs(t, err, idempotency.ErrTooFewReplicas)
		require.Equal(t, idempotency.Lost, acquireAs(t, store, key, "B").State)
	}
}

// The claim of a running handler is never released for lack of replicas, not even
// when Redis has lost it and the renewal makes it anew. Else the handler would
// run a second time.
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

// A large response gets to Redis in parts that are copied once, and sealed as a
// whole. A retry gets it as it was.
func TestRedisLargeResponses(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 16))
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	eachRedis(t, func(t *testing.T, addr string) {
		for name, opts := range map[string]idempotency.Options{"plain": {}, "sealed": {AEAD: aead}} {
			store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), &idempotency.RedisOptions{Prefix: name})
			for _, size := range []int{4096, 4097, 15 << 10, 36864, 36865, 1 << 20} {
				body := strings.Repeat("0123456789", size/10+1)[:size]
				c := idemtest.NewClient(store, &opts, func(w http.ResponseWriter, _ *http.Request) {
					for rest := body; rest != ""; {
						n := min(len(rest), 5000)
						_, err := io.WriteString(w, rest[:n])
						idemtest.Must(err)
						rest = rest[n:]
					}
				})
				key := fmt.Sprint("key", size)
				c.Check(t, 0, idemtest.Exchange{Key: key, Get: "200 " + body})
				c.Check(t, 1, idemtest.Exchange{Key: key, Get: "replay 200 " + body})
			}
		}
	})
}

// All bytes of responses that Redis does not take count, whatever they lie in.
func TestRedisUnstoredResponsesAreBounded(t *testing.T) {
	const mib, bound, requests = 1 << 20, 64, 68
	mini := miniredis.RunT(t)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, mini.Addr(), func(o *redis.Options) { o.MaxRetries = -1 }), nil)
	log := &storeKeys{message: "idempotency: a response is not kept"}
	large := make([]byte, mib-9000) // less than 1 MiB with its headers, in whole pages
	background := new(idempotency.Background)
	opts := idempotency.Options{Logger: slog.New(log), Background: background}
	var running, answered sync.WaitGroup
	running.Add(requests)
	c := idemtest.NewClient(store, &opts, func(w http.ResponseWriter, _ *http.Request) {
		running.Done()
		running.Wait()
		mini.SetError("ERR down")
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write(large)
	})
	for i := range requests {
		answered.Go(func() { c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprint(i)})) })
	}
	answered.Wait()
	require.Len(t, log.keys, requests-bound)
	mini.SetError("")
	require.NoError(t, background.Wait(t.Context()))
}
