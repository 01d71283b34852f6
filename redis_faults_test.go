package idempotency_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// What the network can do to one command.
var faults = map[string]idemtest.Verdict{
	"slow":              idemtest.Slow,
	"its reply is lost": idemtest.Swallow,
	"the connection breaks before it arrives":    idemtest.CutBefore,
	"the connection breaks before its reply":     idemtest.CutAfter,
	"it arrives late, when all is long finished": idemtest.KeepForLate,
}

// eachFault runs a test for every fault, with a client that sends a command
// again by itself, which is go-redis's default, and with one that does not.
func eachFault(t *testing.T, test func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore)) {
	eachRedis(t, func(t *testing.T, addr string) {
		for name, v := range faults {
			for again, retries := range map[string]int{"sent again by go-redis": 3, "sent once": -1} {
				t.Run(name+", "+again, func(t *testing.T) {
					t.Parallel()
					proxy := idemtest.StartProxy(t, addr)
					store := idempotency.NewRedisStore(
						idemtest.DialRedis(t, proxy.Addr(), func(o *redis.Options) { o.MaxRetries = retries }),
						&idempotency.RedisOptions{Prefix: t.Name()})
					warmUp(t, store)
					test(t, v, proxy, store)
				})
			}
		}
	})
}

// warmUp makes Redis know the scripts.
func warmUp(t *testing.T, store idempotency.Store) {
	for _, key := range []string{"warm-up 1", "warm-up 2"} {
		acquireAs(t, store, key, "A")
		acquireAs(t, store, key, "B")
	}
	require.NoError(t, store.Complete(t.Context(), "warm-up 1", "A", idempotency.Result{TTL: time.Hour}))
	require.NoError(t, store.Release(t.Context(), "warm-up 2", "A", time.Minute))
}

// faultOptions let the second try come soon.
var faultOptions = &idempotency.Options{StoreTimeout: 600 * time.Millisecond, Wait: idempotency.NoWait}

// writing matches commands that write a cell of this state, by a script or not.
func writing(state byte, names ...string) func(idemtest.RedisCommand) bool {
	return func(c idemtest.RedisCommand) bool { return c.Writes() == state && c.Is(names...) }
}

// finish delivers what is late, after which all must be as it was.
func finish(t *testing.T, v idemtest.Verdict, happened <-chan struct{}, proxy *idemtest.RedisProxy) {
	t.Helper()
	idemtest.Await(t, "the fault has happened", func() bool {
		select {
		case <-happened:
			return true
		default:
			return false
		}
	})
	if v == idemtest.KeepForLate {
		proxy.Deliver()
	}
}

func TestRedisFaultOfAClaim(t *testing.T) {
	eachFault(t, func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore) {
		shop := idemtest.OpenShop(t, store, faultOptions, nil)
		happened := proxy.Once(v, writing('C', "set"))
		require.Equal(t, "201 charge 1", shop.Post("key"))
		require.Equal(t, "201 charge 1 replayed", shop.Post("key"))
		finish(t, v, happened, proxy)
		require.Equal(t, "201 charge 1 replayed", shop.Post("key"))
	})
}

func TestRedisFaultOfACommit(t *testing.T) {
	eachFault(t, func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore) {
		shop := idemtest.OpenShop(t, store, faultOptions, func(w http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			if err := e.Commit(r.Context()); err != nil {
				t.Error(err)
			}
			_, _ = io.WriteString(w, "done")
		})
		happened := proxy.Once(v, writing('C', "evalsha"))
		require.Equal(t, "200 done", shop.Post("key"))
		finish(t, v, happened, proxy)
		require.Equal(t, "200 done replayed", shop.Post("key"))
		require.EqualValues(t, 1, shop.Runs.Load())
	})
}

// A renewal that fails is repeated before the lease ends.
func TestRedisFaultOfARenewal(t *testing.T) {
	opts := *faultOptions
	opts.Lease, opts.StoreTimeout = 1200*time.Millisecond, 200*time.Millisecond
	eachFault(t, func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore) {
		renewals := func() (n int) {
			for _, c := range proxy.Commands() {
				if writing('C', "evalsha")(c) {
					n++
				}
			}
			return n
		}
		proxy.Forget()
		shop := idemtest.OpenShop(t, store, &opts, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Await(t, "renewals", func() bool { return renewals() >= 2 })
			if err := context.Cause(r.Context()); err != nil {
				t.Error(err)
			}
			_, _ = io.WriteString(w, "done")
		})
		happened := proxy.Once(v, writing('C', "evalsha"))
		require.Equal(t, "200 done", shop.Post("key"))
		finish(t, v, happened, proxy)
		require.Equal(t, "200 done replayed", shop.Post("key"))
		require.EqualValues(t, 1, shop.Runs.Load())
	})
}

func TestRedisFaultOfAComplete(t *testing.T) {
	eachFault(t, func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore) {
		shop := idemtest.OpenShop(t, store, faultOptions, nil)
		happened := proxy.Once(v, writing('D', "evalsha"))
		require.Equal(t, "201 charge 1", shop.Post("key"))
		require.Equal(t, "201 charge 1 replayed", shop.Post("key"))
		finish(t, v, happened, proxy)
		require.Equal(t, "201 charge 1 replayed", shop.Post("key"))
	})
}

func TestRedisFaultOfARelease(t *testing.T) {
	eachFault(t, func(t *testing.T, v idemtest.Verdict, proxy *idemtest.RedisProxy, store *idempotency.RedisStore) {
		var attempts []int
		shop := idemtest.OpenShop(t, store, faultOptions, func(w http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			attempts = append(attempts, e.Attempt())
			if len(attempts) == 1 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		happened := proxy.Once(v, writing('R', "evalsha"))
		require.Equal(t, "503 Service Unavailable", shop.Post("key"))
		require.Equal(t, "200 ", shop.Post("key"))
		finish(t, v, happened, proxy)
		require.Equal(t, "200  replayed", shop.Post("key"))
		require.Equal(t, []int{1, 2}, attempts)
	})
}

// A claim that neither arrives nor is answered is given up. When it arrives
// after that, it must not take the key.
func TestRedisClaimArrivesAfterItWasGivenUp(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		client := idemtest.DialRedis(t, proxy.Addr(), func(o *redis.Options) { o.MaxRetries = -1 })
		shop := idemtest.OpenShop(t, idempotency.NewRedisStore(client, nil), faultOptions, nil)
		released := make(chan struct{}, 8)
		proxy.Set(func(c idemtest.RedisCommand) idemtest.Verdict {
			if writing('C', "set")(c) {
				return idemtest.KeepForLate
			}
			if c.Writes() == 'R' && c.Is("eval") {
				released <- struct{}{}
			}
			return idemtest.Pass
		})
		require.Equal(t, "503 Service Unavailable", shop.Post("key"))
		<-released
		idemtest.Await(t, "the marker", func() bool { return client.DBSize(t.Context()).Val() == 1 })
		proxy.Set(nil)
		proxy.Deliver()
		require.Equal(t, "201 charge 1", shop.Post("key"))
	})
}

// lateCalls are the store calls that a network may deliver late.
var lateCalls = map[string]func(context.Context, idempotency.Store) error{
	"claim": func(ctx context.Context, s idempotency.Store) error {
		_, err := s.Acquire(ctx, "key", claimOf("A"))
		return err
	},
	"renewal": func(ctx context.Context, s idempotency.Store) error {
		c := renewalOf("A", 1)
		c.Once = true
		_, err := s.Acquire(ctx, "key", c)
		return err
	},
	"complete": func(ctx context.Context, s idempotency.Store) error {
		return s.Complete(ctx, "key", "A", idempotency.Result{Value: []byte("late"), TTL: time.Hour})
	},
	"release": func(ctx context.Context, s idempotency.Store) error {
		return s.Release(ctx, "key", "A", time.Minute)
	},
}

// Whatever arrives when its owner has finished, or has lost the key, changes
// nothing: not a byte of the cell, nor its expiry.
func TestRedisLateCommandsChangeNothing(t *testing.T) {
	done := func(value string) idempotency.Result {
		return idempotency.Result{Value: []byte(value), TTL: 2 * time.Hour}
	}
	meanwhile := map[string]func(t *testing.T, s miniStore){
		"completed": func(t *testing.T, s miniStore) {
			require.NoError(t, s.Complete(t.Context(), "key", "A", done("done")))
		},
		"released": func(t *testing.T, s miniStore) {
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
		},
		"released, claimed by another": func(t *testing.T, s miniStore) {
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
			require.Equal(t, idempotency.Acquired, acquireAs(t, s, "key", "B").State)
			acquireAs(t, s, "key", "C") // marks the claim, as a late one would
		},
		"taken over": func(t *testing.T, s miniStore) {
			s.Advance(2 * time.Minute)
			require.Equal(t, 2, acquireAs(t, s, "key", "B").Attempt)
			acquireAs(t, s, "key", "C")
		},
		"taken over and completed": func(t *testing.T, s miniStore) {
			s.Advance(2 * time.Minute)
			acquireAs(t, s, "key", "B")
			require.NoError(t, s.Complete(t.Context(), "key", "B", done("done by B")))
		},
		"taken over and released": func(t *testing.T, s miniStore) {
			s.Advance(2 * time.Minute)
			acquireAs(t, s, "key", "B")
			require.NoError(t, s.Release(t.Context(), "key", "B", time.Minute))
		},
	}
	for call, op := range lateCalls {
		for event, happen := range meanwhile {
			if event == "taken over and released" && call == "claim" {
				continue // the key is free, and a claim gets it
			}
			t.Run(call+" after the key was "+event, func(t *testing.T) {
				mini := miniredis.RunT(t)
				proxy := idemtest.StartProxy(t, mini.Addr())
				through := idempotency.NewRedisStore(
					idemtest.DialRedis(t, proxy.Addr(), func(o *redis.Options) { o.MaxRetries = -1 }), nil)
				direct := miniStore{idempotency.NewRedisStore(idemtest.DialRedis(t, mini.Addr()), nil), mini}
				warmUp(t, direct)
				acquireAs(t, direct, "key", "A")
				proxy.Once(idemtest.KeepForLate, func(c idemtest.RedisCommand) bool { return c.Writes() != 0 })
				require.Error(t, op(t.Context(), through))
				happen(t, direct)
				before, ttl := mini.Dump(), mini.TTL("idem:key")
				proxy.Deliver()
				require.Equal(t, before, mini.Dump())
				require.Equal(t, ttl, mini.TTL("idem:key"))
			})
		}
	}
}

// Duplicates are told as much when Pub/Sub does not work, only later.
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
			for proxy.Count("subscribe") == 0 { // somebody waits
				<-time.After(time.Millisecond)
			}
			close(release)
		}()
		require.Equal(t, map[string]int{"200 charged": requests}, crowd(requests, "key", shop))
		require.EqualValues(t, 1, shop.Runs.Load())
		idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })
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

// Watch is bounded in time whatever becomes of the connection, and comes back
// when that works again.
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
		idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })
	})
}

// hangsBriefly has go-redis give up a connection that it makes a little later
// than Watch does.
func hangsBriefly(o *redis.Options) { o.ReadTimeout = 1500 * time.Millisecond }

func TestRedisWatchEndsWithItsContext(t *testing.T) {
	proxy := idemtest.StartProxy(t, miniredis.RunT(t).Addr())
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr(), hangsBriefly), nil)
	proxy.Set(func(idemtest.RedisCommand) idemtest.Verdict { return idemtest.Swallow })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := store.Watch(ctx, "key")
	require.Error(t, err)
	idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })
}

// When the connection breaks, what was published since is lost: all who wait
// are told to look.
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

// Those who wait are told before go-redis has given up to connect again.
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
		idemtest.Await(t, "nobody watches", func() bool { return redisSessions() == 0 })
	})
}

// One subscription for a key, however many wait, and none when nobody does.
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

// Nothing is published, and no answer but the first costs two commands, unless
// somebody waits.
func TestRedisPublishesOnlyForWaiters(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		messages := client.Subscribe(t.Context(), "idem:key............................", "the end")
		t.Cleanup(func() { _ = messages.Close() })
		_, err := messages.Receive(t.Context())
		require.NoError(t, err)

		finish := func(token string) {
			require.NoError(t, store.Complete(t.Context(), "key", token, idempotency.Result{TTL: time.Hour}))
			require.NoError(t, client.Del(t.Context(), "idem:key").Err())
		}
		acquireAs(t, store, "key", "A")
		finish("A")
		acquireAs(t, store, "key", "A")
		acquireAs(t, store, "key", "B")
		finish("A")
		acquireAs(t, store, "key", "A")
		finish("A")
		require.NoError(t, client.Publish(t.Context(), "the end", "").Err())
		for _, channel := range []string{"idem:key............................", "the end"} {
			m, err := messages.ReceiveMessage(t.Context())
			require.NoError(t, err)
			require.Equal(t, channel, m.Channel)
		}
	})
}

// An answer that is shared is no older than the question: who asks after
// Complete or Release has returned is never told that the key is in progress.
func TestRedisSharedAnswersAreNotStale(t *testing.T) {
	const rounds, askers = 30, 8
	eachRedis(t, func(t *testing.T, addr string) {
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), nil)
		for round := range rounds {
			key := "key " + time.Duration(round).String()
			acquireAs(t, store, key, "A")
			var finished atomic.Bool
			var asking sync.WaitGroup
			for i := range askers {
				asking.Go(func() {
					claim := claimOf(string(rune('B' + i)))
					for {
						before := finished.Load()
						rec, err := store.Acquire(t.Context(), key, claim)
						if err != nil || before && rec.State != idempotency.Completed {
							t.Errorf("after Complete: %v, %v", rec.State, err)
							return
						}
						if rec.State == idempotency.Completed {
							return
						}
					}
				})
			}
			if round%2 == 0 { // waiters change the way that a question takes
				_, err := store.Watch(t.Context(), key)
				require.NoError(t, err)
			}
			require.NoError(t, store.Complete(t.Context(), key, "A", idempotency.Result{TTL: time.Hour}))
			finished.Store(true)
			asking.Wait()
		}
	})
}

// What was on its way before the question may be old when it arrives.
func TestRedisAnswerFromBeforeTheQuestion(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		elsewhere := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), nil)
		warmUp(t, store)
		for _, key := range []string{"one", "two", "three"} {
			acquireAs(t, elsewhere, key, "A")
			asked := proxy.Once(idemtest.SlowReply, writing('C', "evalsha"))
			var asking sync.WaitGroup
			asking.Go(func() { _, _ = store.Acquire(t.Context(), key, claimOf("B")) })
			<-asked
			require.NoError(t, elsewhere.Complete(t.Context(), key, "A", idempotency.Result{TTL: time.Hour}))
			require.Equal(t, idempotency.Completed, acquireAs(t, store, key, "C").State)
			asking.Wait()
		}
	})
}

// What one duplicate found is judged by each for itself.
func TestRedisSharedAnswersAreJudgedByEach(t *testing.T) {
	const rounds = 10
	other := claimOf("C")
	other.Fingerprint = []byte("another")
	claims := []idempotency.Claim{claimOf("B"), other, claimOf("A"), claimOf("D"), claimOf("E"), claimOf("F"), other}
	want := []idempotency.State{idempotency.InProgress, idempotency.Mismatch, idempotency.Acquired,
		idempotency.InProgress, idempotency.InProgress, idempotency.InProgress, idempotency.Mismatch}
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		warmUp(t, store)
		acquireAs(t, store, "key", "A")
		for range rounds {
			// All ask while one question is on its way.
			first := proxy.Once(idemtest.Slow, func(c idemtest.RedisCommand) bool { return c.Is("set") })
			proxy.Forget()
			states := make([]idempotency.State, len(claims))
			var asking sync.WaitGroup
			for i, claim := range claims {
				asking.Go(func() {
					if i > 0 {
						<-first
					}
					rec, err := store.Acquire(t.Context(), "key", claim)
					states[i] = rec.State
					if err != nil || rec.State == idempotency.Acquired && rec.Attempt != 1 {
						t.Errorf("%+v, %v", rec, err)
					}
				})
			}
			asking.Wait()
			require.Equal(t, want, states)
			require.Less(t, len(proxy.Commands()), 2*len(claims), "they ask together")
		}
	})
}

// A question that hangs does not hold the other duplicates of its process.
func TestRedisHangingQuestionHoldsNobody(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		acquireAs(t, store, "key", "A")
		hangs := proxy.Once(idemtest.Swallow, func(c idemtest.RedisCommand) bool { return c.Is("set") })
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		hanging := make(chan error)
		go func() {
			_, err := store.Acquire(ctx, "key", claimOf("B"))
			hanging <- err
		}()
		<-hangs
		require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "C").State)
		require.NoError(t, ctx.Err())
		require.Error(t, <-hanging)
		require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "D").State)
	})
}
