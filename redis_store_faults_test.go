package idempotency_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
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

// finish delivers commands that are late. They must change nothing.
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

// A claim that is not answered is released. When it arrives after that, it must
// not take the key.
func TestRedisClaimArrivesAfterItsRelease(t *testing.T) {
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

// A command that arrives when its owner has finished or has lost the key changes
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

// A Redis that keeps nothing is killed and started again while a handler runs.
// The claim is lost, but what the handler answers is stored all the same.
func TestRedisLosesTheClaimOfARunningHandler(t *testing.T) {
	server := idemtest.StartRedis(t)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, server.Addr), nil)
	shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, _ *http.Request) {
		server.Kill()
		server.Restart()
		_, _ = io.WriteString(w, "charged")
	})
	require.Equal(t, "200 charged", shop.Post("key"))
	require.Equal(t, "200 charged replayed", shop.Post("key"))
	require.EqualValues(t, 1, shop.Runs.Load())
}

// Redis fills up while a handler runs. Its answer is stored and replayed; new
// keys are refused until there is room again.
func TestRedisFillsUpWhileAHandlerRuns(t *testing.T) {
	const size = 64 << 10
	client := idemtest.DialRedis(t, idemtest.StartRedis(t, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction").Addr)
	var fillers []string
	fill := func() error {
		for len(fillers) < 1000 {
			name := fmt.Sprint("filler ", len(fillers))
			if err := client.Set(t.Context(), name, make([]byte, size), 0).Err(); err != nil {
				return err
			}
			fillers = append(fillers, name)
		}
		return nil
	}
	var events idemtest.EventLog
	opts := &idempotency.Options{OnEvent: events.Add, Logger: slog.New(slog.DiscardHandler)}
	shop := idemtest.OpenShop(t, idempotency.NewRedisStore(client, nil), opts, func(w http.ResponseWriter, r *http.Request) {
		if err := fill(); len(fillers) < 10 || !redis.HasErrorPrefix(err, "OOM") {
			t.Errorf("Redis is not full after %d: %v", len(fillers), err)
		}
		_, _ = io.WriteString(w, strings.Repeat("x", size))
	})
	require.Len(t, shop.Post("running"), len("200 ")+size)
	require.Len(t, shop.Post("running"), len("200 ")+size+len(" replayed"))
	require.Equal(t, "503 Service Unavailable", shop.Post("new"))
	refused := events.Last()
	require.Equal(t, idempotency.OutcomeStoreUnavailable, refused.Outcome)
	require.ErrorIs(t, refused.Err, idempotency.ErrStoreFull)
	require.EqualValues(t, 1, shop.Runs.Load())

	require.NoError(t, client.Del(t.Context(), fillers...).Err())
	require.Len(t, shop.Post("new"), len("200 ")+size)
	require.EqualValues(t, 2, shop.Runs.Load())
}
