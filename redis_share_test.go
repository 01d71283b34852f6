package idempotency_test

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

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
			// This is about commands, whatever else the machine is doing.
			patient := &idempotency.Options{StoreTimeout: 10 * time.Second}
			shops = append(shops, idemtest.OpenShop(t, store, patient, handler))
		}
		crowd(20, "warm-up", shops...)
		before := shops[0].Runs.Load() + shops[1].Runs.Load()
		idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })

		proxy.Forget()
		start := time.Now()
		require.Equal(t, map[string]int{"200 charged": requests}, crowd(requests, "key", shops...))
		t.Logf("%d commands in %v for %d requests", len(proxy.Commands()), time.Since(start), requests)
		require.EqualValues(t, 1, shops[0].Runs.Load()+shops[1].Runs.Load()-before)
		require.LessOrEqual(t, len(proxy.Commands()), requests/2, "they ask together")
		require.LessOrEqual(t, proxy.Count("subscribe"), 10, "one for each process, and for stragglers")
		idemtest.Await(t, "no session", func() bool { return redisSessions() == 0 })
	})
}

// Duplicates that come one by one cannot share questions, only what they wait for.
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

// A countingStore counts the watches that have begun.
type countingStore struct {
	*idempotency.RedisStore
	waiting *atomic.Int64
}

func (s countingStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	changed, err := s.RedisStore.Watch(ctx, key)
	s.waiting.Add(1)
	return changed, err
}

// A key that is freed goes to one of the duplicates that wait. The others wait on.
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

// An answer that is shared is no older than the call: after Complete or Release
// has returned no claim is answered InProgress for it.
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
			if round%2 == 0 { // a watched key goes to the script at once
				_, err := store.Watch(t.Context(), key)
				require.NoError(t, err)
			}
			require.NoError(t, store.Complete(t.Context(), key, "A", idempotency.Result{TTL: time.Hour}))
			finished.Store(true)
			asking.Wait()
		}
	})
}

// A question that was on its way before the call began may bring an old answer.
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

// Each claim judges for itself what the answer to another means for it.
func TestRedisSharedAnswersAreJudgedByEach(t *testing.T) {
	const rounds = 10
	other := claimOf("C")
	other.Fingerprint = []byte("another")
	unknown := claimOf("G")
	unknown.Fingerprint = nil
	claims := []idempotency.Claim{claimOf("B"), other, claimOf("A"), claimOf("D"), claimOf("E"), unknown, other}
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

// One claim gets a free key, however many wait for the question that gets it.
func TestRedisSharedAnswersAcquireOnce(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		proxy, client := idemtest.StartProxy(t, addr), idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		elsewhere := idempotency.NewRedisStore(client, nil)
		warmUp(t, store)
		acquireAs(t, elsewhere, "key", "A")
		_, err := store.Watch(t.Context(), "key")
		require.NoError(t, err)
		asked := proxy.Once(idemtest.SlowReply, writing('C', "evalsha"))
		var asking sync.WaitGroup
		var acquired atomic.Int64
		for i := range 6 {
			asking.Go(func() {
				if i > 0 {
					<-asked
				}
				rec, err := store.Acquire(t.Context(), "key", claimOf("B"+strconv.Itoa(i)))
				if err != nil {
					t.Error(err)
				}
				if rec.State == idempotency.Acquired {
					acquired.Add(1)
				}
			})
		}
		idemtest.Await(t, "the first answer is on its way", func() bool {
			cell, err := client.Get(t.Context(), "idem:key").Bytes()
			return err == nil && cell[8]&2 != 0
		})
		require.NoError(t, elsewhere.Release(t.Context(), "key", "A", time.Minute))
		asking.Wait()
		require.EqualValues(t, 1, acquired.Load())
	})
}

// A question that hangs does not hold up the other duplicates of its process, and
// they share the next one.
func TestRedisHangingQuestionIsNotAwaited(t *testing.T) {
	const duplicates = 20
	eachRedis(t, func(t *testing.T, addr string) {
		proxy := idemtest.StartProxy(t, addr)
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, proxy.Addr()), nil)
		warmUp(t, store)
		acquireAs(t, store, "key", "A")
		hangs := proxy.Once(idemtest.Swallow, func(c idemtest.RedisCommand) bool { return c.Is("set") })
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		hanging := make(chan error)
		go func() {
			_, err := store.Acquire(ctx, "key", claimOf("B"))
			hanging <- err
		}()
		<-hangs
		proxy.Forget()
		var asking sync.WaitGroup
		for i := range duplicates {
			asking.Go(func() {
				rec, err := store.Acquire(ctx, "key", claimOf("C"+strconv.Itoa(i)))
				if err != nil || rec.State != idempotency.InProgress {
					t.Errorf("%v, %v", rec.State, err)
				}
			})
		}
		asking.Wait()
		require.NoError(t, ctx.Err())
		require.Less(t, len(proxy.Commands()), duplicates)
		require.Error(t, <-hanging)
		require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "D").State)
	})
}
