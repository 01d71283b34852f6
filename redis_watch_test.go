package idempotency_test

import (
	"bytes"
	"context"
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
)

// redisSessions returns how many goroutines serve Pub/Sub connections.
func redisSessions() int {
	var stacks strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2)
	return strings.Count(stacks.String(), "idempotency.(*redisSession)")
}

// A key has one subscription, however many callers watch it, and none after the
// last of them.
func TestRedisWatchSubscriptions(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		watch := func(key string) context.CancelFunc {
			ctx, cancel := context.WithCancel(t.Context())
			_, err := store.Watch(ctx, key)
			require.NoError(t, err)
			return cancel
		}
		subscribed := func(n int) {
			t.Helper()
			idemtest.Await(t, "subscriptions", func() bool {
				return len(client.PubSubChannels(t.Context(), "*").Val()) == n
			})
		}
		leave := []context.CancelFunc{watch("one"), watch("one"), watch("two")}
		subscribed(2)
		for _, c := range client.PubSubChannels(t.Context(), "*").Val() {
			require.GreaterOrEqual(t, len(c), 36)
		}
		leave[0]()
		leave[2]()
		subscribed(1)
		again := watch("two")
		subscribed(2)
		leave[1]()
		again()
		subscribed(0)
		require.Equal(t, 3, proxy.Count("subscribe"))
	})
}

// A watch is told even if the mark of it was lost with the cell, or belonged to a
// claim that was taken over.
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

// Duplicates get the same answers when Pub/Sub does not work, only later.
func TestRedisWithoutPubSub(t *testing.T) {
	const requests = 20
	serve := func(t *testing.T, addr string, judge func(idemtest.RedisCommand) idemtest.Verdict, change ...func(*redis.Options)) {
		proxy := idemtest.StartProxy(t, addr)
		proxy.Set(judge)
		release := make(chan struct{})
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr(), change...),
			&idempotency.RedisOptions{Prefix: t.Name()})
		shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, r *http.Request) {
			<-release
			_, _ = io.WriteString(w, "charged")
		})
		go func() {
			for proxy.Count("subscribe") == 0 { // until a duplicate waits
				<-time.After(time.Millisecond)
			}
			close(release)
		}()
		require.Equal(t, map[string]int{"200 charged": requests}, crowd(requests, "key", shop))
		require.EqualValues(t, 1, shop.Runs.Load())
		idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
	}
	eachRedis(t, func(t *testing.T, addr string) {
		for name, v := range map[string]idemtest.Verdict{"refused": idemtest.CutBefore, "breaks": idemtest.CutAfter, "hangs": idemtest.Swallow} {
			t.Run(name, func(t *testing.T) {
				serve(t, addr, func(c idemtest.RedisCommand) idemtest.Verdict {
					if c.Is("subscribe") {
						return v
					}
					return idemtest.Pass
				})
			})
		}
	})
	t.Run("no permission", func(t *testing.T) {
		addr := idemtest.StartRedis(t).Addr
		admin := idemtest.DialRedis(t, addr)
		require.NoError(t, admin.Do(t.Context(), "acl", "setuser", "app", "on", ">secret", "~*", "resetchannels", "+@all").Err())
		as := func(o *redis.Options) { o.Username, o.Password = "app", "secret" }
		serve(t, addr, nil, as)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr, as), nil)
		for _, key := range []string{"one", "two"} {
			acquireAs(t, store, key, "A")
			acquireAs(t, store, key, "B")
		}
		require.NoError(t, store.Complete(t.Context(), "one", "A", idempotency.Result{TTL: time.Hour}))
		require.NoError(t, store.Release(t.Context(), "two", "A", time.Minute))
	})
}

// Watch is bounded in time whatever becomes of the connection, and works again as
// soon as the connection does.
func TestRedisWatchWhileConnectionsHang(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr(), hangsBriefly), nil)
		proxy.Set(func(idemtest.RedisCommand) idemtest.Verdict { return idemtest.Swallow })
		start := time.Now()
		_, err := store.Watch(t.Context(), "key")
		require.Error(t, err)
		require.Less(t, time.Since(start), time.Second)
		start = time.Now()
		for range 10 { // these do not try again
			_, err := store.Watch(t.Context(), "key")
			require.Error(t, err)
		}
		require.Less(t, time.Since(start), time.Second)
		proxy.Set(nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		idemtest.Await(t, "a watch", func() bool {
			_, err := store.Watch(ctx, "key")
			return err == nil
		})
		cancel()
		idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
	})
}

// hangsBriefly has go-redis wait for a new connection a little longer than Watch
// does.
func hangsBriefly(o *redis.Options) { o.ReadTimeout = 1500 * time.Millisecond }

func TestRedisWatchEndsWithItsContext(t *testing.T) {
	proxy := idemtest.StartProxy(t, miniredis.RunT(t).Addr())
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr(), hangsBriefly), nil)
	proxy.Set(func(idemtest.RedisCommand) idemtest.Verdict { return idemtest.Swallow })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := store.Watch(ctx, "key")
	require.Error(t, err)
	idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
}

// When the connection breaks, messages may be lost, so all watches are told of a
// change.
func TestRedisWatchConnectionBreaks(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		var watches []<-chan struct{}
		for _, key := range []string{"one", "two", "one"} {
			changed, err := store.Watch(t.Context(), key)
			require.NoError(t, err)
			watches = append(watches, changed)
		}
		proxy.Cut()
		for _, changed := range watches {
			select {
			case <-changed:
			case <-time.After(idemtest.Patience):
				t.Fatal("a watch was not told")
			}
		}
		_, err := store.Watch(t.Context(), "one")
		require.NoError(t, err, "the next one connects again")
	})
}

// The store notices a Pub/Sub connection over which nothing comes any more.
func TestRedisWatchConnectionIsDead(t *testing.T) {
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

// Watches are told before go-redis has given up connecting again.
func TestRedisWatchReconnectHangs(t *testing.T) {
	var hang atomic.Bool
	proxy := idemtest.StartProxy(t, idemtest.StartRedis(t).Addr)
	client := idemtest.DialRedis(t, proxy.Addr(), func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if hang.Load() {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	})
	changed, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "one")
	require.NoError(t, err)
	hang.Store(true)
	proxy.Cut()
	ctx, cancel := context.WithTimeout(t.Context(), client.Options().DialTimeout-time.Second)
	defer cancel()
	select {
	case <-changed:
	case <-ctx.Done():
		t.Fatal("a watch was not told")
	}
}

// A watch that was not confirmed leaves nothing behind.
func TestRedisWatchIsNotConfirmed(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, err := store.Watch(ctx, "one")
		require.NoError(t, err)
		proxy.Once(idemtest.Ignore, func(c idemtest.RedisCommand) bool { return c.Is("subscribe") })
		_, err = store.Watch(t.Context(), "two")
		require.Error(t, err)
		cancel()
		idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
	})
}

// A panic in the dialer, or in a connection that it made, ends no process.
func TestRedisWatchDialerPanics(t *testing.T) {
	var broken atomic.Bool
	client := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr, func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if broken.Load() {
				panic("a dialer")
			}
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			return panickingConn{conn, &broken}, err
		}
	})
	broken.Store(true)
	_, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "key")
	require.Error(t, err)
	broken.Store(false)
	store := idempotency.NewRedisStore(client, nil)
	changed, err := store.Watch(t.Context(), "key")
	require.NoError(t, err)
	broken.Store(true)
	_, _ = store.Watch(t.Context(), "other") // so that something is to be read
	select {
	case <-changed:
	case <-time.After(idemtest.Patience):
		t.Fatal("the watch was not told")
	}
	broken.Store(false)
	idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
}

// A panickingConn panics when it has something to read while it is broken.
type panickingConn struct {
	net.Conn
	broken *atomic.Bool
}

func (c panickingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.broken.Load() && n > 0 {
		panic("a connection")
	}
	return n, err
}

// A Cluster client learns its slots anew when a session fails, as it does when a
// command fails: its subscription may have gone to a server that is gone.
func TestRedisWatchReloadsSlots(t *testing.T) {
	server := idemtest.StartRedis(t)
	cluster := &fakeCluster{Client: idemtest.DialRedis(t, server.Addr)}
	store := idempotency.NewRedisStore(cluster, nil)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := store.Watch(ctx, "key")
	require.NoError(t, err)
	cancel()
	idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
	require.Zero(t, cluster.reloads.Load())

	server.Kill()
	_, err = store.Watch(t.Context(), "key")
	require.Error(t, err)
	idemtest.Await(t, "slots are loaded", func() bool { return cluster.reloads.Load() == 1 })
}

// A confirmation counts for the subscription that is next, and for no other:
// after go-redis has connected again by itself, confirmations of all channels come.
func TestRedisWatchOfAnotherSubscription(t *testing.T) {
	one, two := "idem:one............................", "idem:two............................"
	client := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr, func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			return replacingConn{conn, one, two}, err
		}
	})
	_, err := idempotency.NewRedisStore(client, nil).Watch(t.Context(), "one")
	require.Error(t, err)
	_, err = idempotency.NewRedisStore(client, nil).Watch(t.Context(), "two")
	require.NoError(t, err)
}

// A replacingConn replaces one text in what it reads by another of its length.
type replacingConn struct {
	net.Conn
	old, new string
}

func (c replacingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	copy(b, bytes.ReplaceAll(b[:n], []byte(c.old), []byte(c.new)))
	return n, err
}

// waiting returns how many duplicates wait.
func waiting() int {
	var stacks strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2)
	return strings.Count(stacks.String(), "idempotency.sleepUntil(")
}

// newsOf has 30 duplicates wait for an answer, and returns the answers and what
// was asked of Redis since the answer was there.
func newsOf(t *testing.T, addr string, judge func(idemtest.RedisCommand) idemtest.Verdict) (map[string]int, *idemtest.RedisProxy) {
	const requests = 31
	proxy := idemtest.StartProxy(t, addr)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
	answer := make(chan struct{})
	opts := &idempotency.Options{StoreTimeout: 10 * time.Second, Wait: time.Minute}
	shop := idemtest.OpenShop(t, store, opts, func(w http.ResponseWriter, _ *http.Request) {
		<-answer
		_, _ = io.WriteString(w, "charged")
	})
	answers := make(chan map[string]int)
	go func() { answers <- crowd(requests, "key", shop) }()
	// One whose watch was not confirmed in time polls once, and watches then.
	asked, since := 0, time.Now()
	idemtest.Await(t, "all duplicates wait", func() bool {
		if n := proxy.Count("set", "evalsha"); n != asked {
			asked, since = n, time.Now()
		}
		return waiting() == requests-1 && time.Since(since) > 300*time.Millisecond
	})
	proxy.Forget()
	proxy.Set(judge)
	close(answer)
	return <-answers, proxy
}

// Duplicates that wait are told the response, so they need not ask for it.
func TestRedisDuplicatesAreToldTheResponse(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		answers, proxy := newsOf(t, addr, nil)
		require.Equal(t, map[string]int{"200 charged": 31}, answers)
		require.Equal(t, 1, proxy.Count("getex"))
		require.Equal(t, 1, proxy.Count("evalsha"), "the response is stored")
		require.Zero(t, proxy.Count("set"))
	})
}

// When nobody can tell the response, the duplicates ask for it.
func TestRedisDuplicatesOfAResponseThatCannotBeRead(t *testing.T) {
	for name, verdict := range map[string]idemtest.Verdict{"no reply": idemtest.Swallow, "no connection": idemtest.CutAfter} {
		t.Run(name, func(t *testing.T) {
			eachRedis(t, func(t *testing.T, addr string) {
				start := time.Now()
				answers, _ := newsOf(t, addr, func(c idemtest.RedisCommand) idemtest.Verdict {
					if c.Is("getex") {
						return verdict
					}
					return idemtest.Pass
				})
				require.Equal(t, map[string]int{"200 charged": 31}, answers)
				require.Less(t, time.Since(start), 30*time.Second, "they did not wait for their lease")
			})
		})
	}
}

// readingAfter has the news of a watch read after begin is closed. limit is for
// how long the store would wait for them.
type readingAfter struct {
	begin <-chan struct{}
	limit *atomic.Int64
}

func (h readingAfter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h readingAfter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "getex" {
			if deadline, ok := ctx.Deadline(); ok {
				h.limit.Store(int64(time.Until(deadline)))
			}
			<-h.begin
		}
		return next(ctx, cmd)
	}
}

func (h readingAfter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// A duplicate is not told the response to another request that has taken its
// key meanwhile.
func TestRedisNewsAreJudgedByEach(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		fail, taken := make(chan struct{}), make(chan struct{})
		limit := new(atomic.Int64)
		limit.Store(int64(time.Hour))
		client.AddHook(readingAfter{taken, limit})
		store := idempotency.NewRedisStore(client, nil)
		shop := idemtest.OpenShop(t, store, &idempotency.Options{Wait: time.Minute}, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.RawQuery == "" {
				<-fail
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		post := func(query string) int {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, shop.URL+query, http.NoBody)
			if err != nil {
				return 0
			}
			req.Header.Set("Idempotency-Key", "key")
			resp, err := shop.Client().Do(req)
			if err != nil {
				return 0
			}
			_ = resp.Body.Close()
			return resp.StatusCode
		}
		owner, duplicate := make(chan int, 1), make(chan int, 1)
		go func() { owner <- post("") }()
		idemtest.Await(t, "the handler runs", func() bool { return shop.Runs.Load() == 1 })
		go func() { duplicate <- post("") }()
		idemtest.Await(t, "the duplicate waits", func() bool { return waiting() == 1 })
		close(fail)
		require.Equal(t, http.StatusServiceUnavailable, <-owner)
		require.Equal(t, http.StatusOK, post("?another"))
		close(taken)
		require.Equal(t, http.StatusUnprocessableEntity, <-duplicate)
		require.LessOrEqual(t, time.Duration(limit.Load()), 200*time.Millisecond)
	})
}
