package idempotency_test

import (
	"context"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// withFaults runs test in virtual time with a memory store that can fail.
func withFaults(t *testing.T, opts idempotency.Options, handler http.HandlerFunc, test func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s, events := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}, &idemtest.EventLog{}
		opts.OnEvent = events.Add
		test(t, s, idemtest.NewClient(s, &opts, handler), events)
		time.Sleep(time.Hour) // what goes on in the background ends
	})
}

func TestStoreDownBeforeTheHandler(t *testing.T) {
	for name, fail := range map[string]func(s *idemtest.FaultyStore){
		"and the claim was not made":       func(s *idemtest.FaultyStore) { s.Fail("Acquire", idemtest.ErrDown) },
		"and the claim was made unnoticed": func(s *idemtest.FaultyStore) { s.FailAfter("Acquire", idemtest.ErrDown) },
		"and it answers what is not a state": func(s *idemtest.FaultyStore) {
			s.Store = &idemtest.ScriptedStore{OnAcquire: func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
				return idempotency.Record{}, nil
			}, MemoryStore: s.Store.(*idempotency.MemoryStore)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				memory := s.Store
				fail(s)
				resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				require.Equal(t, "1", resp.Header.Get("Retry-After"))
				got, p := idemtest.Describe(t, resp)
				require.Equal(t, "503 store_unavailable", got)
				require.True(t, p.Retryable)
				require.NotContains(t, p.Detail, "secret-host")
				require.Equal(t, 2, s.Count("Acquire"), "tried once more with the same token")
				require.ErrorIs(t, events.Last().Err, idempotency.ErrStoreUnavailable)

				s.Store = memory
				s.Fail("Acquire", nil)
				s.FailAfter("Acquire", nil)
				time.Sleep(time.Second) // the uncertain claim is given back, long before its lease ends
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				require.Equal(t, 1, c.Runs())
			})
		})
	}
}

func TestLostReplyOfAClaimIsNotAStranger(t *testing.T) {
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		rec, err := s.MemoryStore.Acquire(ctx, key, c)
		if n == 1 {
			return idempotency.Record{}, idemtest.ErrDown
		}
		return rec, err
	}
	c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
}

// A call that hangs leaves time for another.
func TestOneLostReply(t *testing.T) {
	for _, method := range []string{"Acquire", "Complete", "Release"} {
		t.Run(method, func(t *testing.T) {
			withFaults(t, idempotency.Options{Wait: idempotency.NoWait}, idemtest.Answering(201, 500), func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				if method == "Release" {
					c.Check(t, 0, idemtest.Exchange{Key: "first", Get: "201 "})
				}
				s.LoseReply(method)
				start := time.Now()
				resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				require.Less(t, time.Since(start), time.Second)
				require.Less(t, resp.StatusCode, 502)
				require.NoError(t, events.Last().Err)
			})
		})
	}
}

// A claim that arrives after it was given up must not hold the key.
func TestDelayedClaim(t *testing.T) {
	withFaults(t, idempotency.Options{AtMostOnce: true}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		arrive := make(chan struct{})
		delayed := &delayingStore{Store: s.Store, arrive: arrive}
		s.Store = delayed
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable", Took: time.Second})
		time.Sleep(time.Second) // released in the background
		close(arrive)
		synctest.Wait()
		require.Equal(t, []idempotency.State{idempotency.Lost, idempotency.Lost}, delayed.late)
		delayed.arrive = nil
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// delayingStore times out while its commands are still on their way.
type delayingStore struct {
	idempotency.Store
	arrive chan struct{}
	mu     sync.Mutex
	late   []idempotency.State
}

func (s *delayingStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if s.arrive == nil {
		return s.Store.Acquire(ctx, key, c)
	}
	go func() {
		<-s.arrive
		rec, _ := s.Store.Acquire(context.Background(), key, c)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.late = append(s.late, rec.State)
	}()
	<-ctx.Done()
	return idempotency.Record{}, ctx.Err()
}

// A first try whose reply is lost may still arrive: after the second try has
// found someone else, and that one has left.
func TestGhostOfAClaim(t *testing.T) {
	withFaults(t, idempotency.Options{AtMostOnce: true, Wait: idempotency.NoWait}, idemtest.Answering(429, 201), func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		inner := s.Store
		ghost := &ghostStore{Store: inner}
		c.Check(t, 0, idemtest.Exchange{Key: "other", Get: "429 "})
		rec, err := inner.Acquire(t.Context(), storeKeyOfA, idempotency.Claim{Token: "first", Lease: time.Minute, TTL: time.Hour})
		require.NoError(t, err)
		require.Equal(t, idempotency.Acquired, rec.State)
		s.Replace(ghost)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		s.Replace(inner)
		require.NoError(t, inner.Release(t.Context(), storeKeyOfA, "first", time.Minute))
		time.Sleep(25 * time.Millisecond)
		ghost.arrive(t) // before the claim is given back
		time.Sleep(time.Second)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "201 "})
	})
}

// storeKeyOfA is the cell of POST /charge with key a.
const storeKeyOfA = "RQFyjOsKeHMIZkhk5cd63L7akO8"

// ghostStore keeps the first claim back.
type ghostStore struct {
	idempotency.Store
	kept *idempotency.Claim
}

func (s *ghostStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if s.kept == nil {
		s.kept = &c
		return idempotency.Record{}, idemtest.ErrDown
	}
	return s.Store.Acquire(ctx, key, c)
}

func (s *ghostStore) arrive(t *testing.T) {
	t.Helper()
	rec, err := s.Store.Acquire(t.Context(), storeKeyOfA, *s.kept)
	require.NoError(t, err)
	require.Equal(t, idempotency.Acquired, rec.State)
}

// What is refused for certain has made no claim, and none is given back.
func TestRefusalsCostNoRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, events := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}, &idemtest.EventLog{}
		c := idemtest.NewClient(store, &idempotency.Options{Wait: idempotency.NoWait, OnEvent: events.Add}, idemtest.Lasting(time.Second))
		var first sync.WaitGroup
		first.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		c.Check(t, 2, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
		first.Wait()
		store.Replace(&idempotency.MemoryStore{MaxBytes: 1})
		c.Check(t, 3, idemtest.Exchange{Key: "b", Get: "503 store_unavailable"})
		require.ErrorIs(t, events.Last().Err, idempotency.ErrStoreFull)
		time.Sleep(time.Hour)
		require.Zero(t, store.Count("Release"))
		require.Equal(t, 4, store.Count("Acquire"), "a full store is not asked twice")
	})
}

func TestFailOpen(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		e := idemtest.Execution(r)
		require.Equal(t, "a", e.Key())
		require.Equal(t, 1, e.Attempt())
		require.NotEmpty(t, e.DownstreamKey("psp"))
		require.ErrorIs(t, e.Commit(r.Context()), idempotency.ErrStoreUnavailable)
		idemtest.Lasting(0)(w, r)
	}
	withFaults(t, idempotency.Options{FailOpen: true}, handler, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		s.Fail("Acquire", idemtest.ErrDown)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 2"})
		require.Equal(t, []string{"unprotected 0", "unprotected 0"}, events.All())
		require.ErrorIs(t, events.Last().Err, idemtest.ErrDown)
	})
}

// The claim that was made unnoticed protects an unprotected run for a while.
func TestFailOpenKeepsAnUncertainClaim(t *testing.T) {
	withFaults(t, idempotency.Options{FailOpen: true, Wait: idempotency.NoWait}, idemtest.Lasting(10*time.Second), func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		s.FailAfter("Acquire", idemtest.ErrDown)
		go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		synctest.Wait()
		s.FailAfter("Acquire", nil)
		time.Sleep(5 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
	})
}

func TestFailOpenPanicIsReported(t *testing.T) {
	withFaults(t, idempotency.Options{FailOpen: true}, idemtest.PanicOnce, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		s.Fail("Acquire", idemtest.ErrDown)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
		require.Equal(t, []string{"panicked 0"}, events.All())
	})
}

// With FailOpen a store that goes down while a duplicate waits does not make it
// run beside the first.
func TestFailOpenDoesNotRunBesideAnother(t *testing.T) {
	withFaults(t, idempotency.Options{FailOpen: true}, idemtest.Lasting(3*time.Second), func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		first := make(chan struct{})
		go func() {
			defer close(first)
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		}()
		synctest.Wait()
		go func() {
			time.Sleep(time.Second)
			s.Fail("Acquire", idemtest.ErrDown)
		}()
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		<-first
		require.Equal(t, 1, c.Runs())
	})
}

// A pausedStore stands for a process that is stopped (a virtual machine that is
// moved, a container out of CPU) when the answer to its claim has come.
type pausedStore struct {
	*idempotency.MemoryStore
	token string // of the process: the first that asks
	times int    // how often it is stopped
}

func (s *pausedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.MemoryStore.Acquire(ctx, key, c)
	if s.token == "" {
		s.token = c.Token
	}
	if s.token == c.Token && s.times > 0 {
		s.times--
		time.Sleep(3 * c.Lease)
	}
	return rec, err
}

// withPausedStore runs a test of a handler whose first client is stopped.
func withPausedStore(t *testing.T, times int, opts idempotency.Options, test func(t *testing.T, c *idemtest.Client)) {
	synctest.Test(t, func(t *testing.T) {
		opts.Lease = time.Second
		test(t, idemtest.NewClient(&pausedStore{MemoryStore: idempotency.NewMemoryStore(), times: times}, &opts, nil))
	})
}

// A claim whose lease is over before the handler starts may belong to someone
// else by then: the handler does not start, and the answer is that of who ran.
func TestLateClaimDoesNotRun(t *testing.T) {
	withPausedStore(t, 1, idempotency.Options{}, func(t *testing.T, c *idemtest.Client) {
		var late sync.WaitGroup
		late.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"}) })
		synctest.Wait()
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) // takes over after the lease
		late.Wait()
		require.Equal(t, 1, c.Runs())
	})
}

func TestLateClaimThatNobodyTookRuns(t *testing.T) {
	withPausedStore(t, 1, idempotency.Options{}, func(t *testing.T, c *idemtest.Client) {
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// A process that is late again and again has no business with the key.
func TestLateClaimIsGivenBack(t *testing.T) {
	withPausedStore(t, 2, idempotency.Options{}, func(t *testing.T, c *idemtest.Client) {
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		require.Zero(t, c.Runs())
		time.Sleep(500 * time.Millisecond) // less than the lease
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// FailOpen is for a store that is down. This one is up, and knows who runs.
func TestLateClaimDoesNotFailOpen(t *testing.T) {
	withPausedStore(t, 2, idempotency.Options{FailOpen: true}, func(t *testing.T, c *idemtest.Client) {
		var late sync.WaitGroup
		late.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"}) })
		time.Sleep(5 * time.Second)                                     // it has renewed its claim, which is over again
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) // takes over after the lease
		late.Wait()
		require.Equal(t, 1, c.Runs())
		time.Sleep(100 * time.Millisecond) // for the claim that it gives back
	})
}

// A command that arrives when its request is long over, and its marker with it,
// holds the key for one lease at the most: a claim, a renewal and a mark.
func TestCommandThatArrivesHoursLate(t *testing.T) {
	for name, atMostOnce := range map[string]bool{"plain": false, "at most once": true} {
		commands := captured(t, atMostOnce)
		require.Len(t, commands, 3, "a claim, a mark and a renewal; or a mark, a claim and a renewal")
		for i := range commands {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := idempotency.NewMemoryStore()
					c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: atMostOnce, Wait: idempotency.NoWait}, nil)
					time.Sleep(2 * time.Hour)
					rec, err := s.Acquire(t.Context(), commands[i].key, commands[i].claim)
					require.NoError(t, err)
					require.Equal(t, idempotency.Acquired, rec.State)
					c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
					time.Sleep(30 * time.Second)
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				})
			})
		}
	}
}

type command struct {
	key   string
	claim idempotency.Claim
}

// captured returns what a request with the key "a" asks a store for: to claim,
// to mark and to renew.
func captured(t *testing.T, atMostOnce bool) (all []command) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			all = append(all, command{key, c})
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
			if !atMostOnce {
				require.NoError(t, idemtest.Execution(r).Commit(r.Context()))
			}
			time.Sleep(11 * time.Second)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 "})
	})
	return all
}

// Two late commands of one token must not make a claim that is never taken over:
// the first claims the key anew, and the mark is that of the attempt before.
func TestMarkIsForItsAttemptOnly(t *testing.T) {
	commands := captured(t, true)
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		late := func(i int) {
			_, err := s.Acquire(t.Context(), commands[i].key, commands[i].claim)
			require.NoError(t, err)
		}
		late(0)
		require.NoError(t, s.Release(t.Context(), commands[0].key, commands[0].claim.Token, time.Hour))
		c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, idemtest.Answering(http.StatusServiceUnavailable, http.StatusCreated))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 "})
		late(0)
		late(1)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		time.Sleep(30 * time.Second)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "201 "})
	})
}

// A handler of an at-most-once key starts when the store has answered that the
// claim is marked, and not before.
func TestHandlerStartsOnceItsClaimIsMarked(t *testing.T) {
	for name, row := range map[string]struct {
		mark func(s *idemtest.ScriptedStore, n int, c idempotency.Claim) (idempotency.Record, error)
		get  string
	}{
		"the mark is not answered": {
			func(*idemtest.ScriptedStore, int, idempotency.Claim) (idempotency.Record, error) {
				return idempotency.Record{}, idemtest.ErrDown
			}, "503 store_unavailable",
		},
		"the store loses the claim again and again": {
			func(s *idemtest.ScriptedStore, _ int, c idempotency.Claim) (idempotency.Record, error) {
				return idempotency.Record{State: idempotency.Acquired, Attempt: c.Attempt}, nil
			}, "503 store_unavailable",
		},
		"the store loses the claim once": {
			func(s *idemtest.ScriptedStore, marks int, c idempotency.Claim) (idempotency.Record, error) {
				return idempotency.Record{State: idempotency.Acquired, Attempt: c.Attempt, Once: marks > 1}, nil
			}, "201 charge 1",
		},
		"another owner has come": {
			func(*idemtest.ScriptedStore, int, idempotency.Claim) (idempotency.Record, error) {
				return idempotency.Record{State: idempotency.Lost}, nil
			}, "409 in_progress",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, marks := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, 0
				s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					require.Equal(t, c.Attempt > 0, c.Once, "only a renewal marks")
					if c.Attempt == 0 {
						return s.MemoryStore.Acquire(ctx, key, c)
					}
					marks++
					return row.mark(s, marks, c)
				}
				c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true, Wait: idempotency.NoWait}, nil)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: row.get})
				require.Equal(t, row.get == "201 charge 1", c.Runs() == 1)
			})
		})
	}
}

// Attempts count for as long as the key lives when a run may have got somewhere.
func TestAttemptsCountForTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var attempts []int
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			attempts = append(attempts, idemtest.Execution(r).Attempt())
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		start := time.Now()
		for i, at := range []time.Duration{0, time.Minute, time.Hour, 20 * time.Hour, 43 * time.Hour, 68 * time.Hour} {
			time.Sleep(time.Until(start.Add(at)))
			c.Check(t, i, idemtest.Exchange{Key: "a", Get: "503 "})
		}
		require.Equal(t, []int{1, 2, 3, 4, 5, 1}, attempts, "each run starts the TTL anew, and the last came after it")
	})
}

// What was refused leaves nothing behind after a lease, so that a flood of it
// fills no store. What may have got somewhere is remembered.
func TestMarkerOfARun(t *testing.T) {
	const ttl, lease = 24 * time.Hour, 30 * time.Second
	discard := func(w http.ResponseWriter, r *http.Request) { idemtest.Execution(r).Discard() }
	notFound := &idempotency.Options{ShouldStore: func(status int, _ http.Header) bool { return status != http.StatusNotFound }}
	for name, row := range map[string]struct {
		opts    *idempotency.Options
		handler http.HandlerFunc
		kept    time.Duration
	}{
		"401":                  {&idempotency.Options{}, idemtest.Answering(http.StatusUnauthorized), lease},
		"429":                  {&idempotency.Options{}, idemtest.Answering(http.StatusTooManyRequests), lease},
		"Discard":              {&idempotency.Options{}, discard, lease},
		"429, at most once":    {&idempotency.Options{AtMostOnce: true}, idemtest.Answering(http.StatusTooManyRequests), ttl}, // the mark may be on its way twice
		"500":                  {&idempotency.Options{}, idemtest.Answering(http.StatusInternalServerError), ttl},
		"404, for ShouldStore": {notFound, idemtest.Answering(http.StatusNotFound), ttl},
		"409 with Retry-After": {&idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusConflict)
		}, lease},
		"nothing, its transaction rolled back": {&idempotency.Options{CancelOnDisconnect: true}, func(_ http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("a transaction")
			<-r.Context().Done()
		}, ttl},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := idempotency.NewMemoryStore()
				for _, store := range []idempotency.Store{s, &idemtest.FaultyStore{Store: s}} {
					c := idemtest.NewClient(store, row.opts, row.handler)
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx)))
					time.Sleep(row.kept - time.Second)
					require.Equal(t, 1, s.Len())
					time.Sleep(time.Second)
					require.Zero(t, s.Len())
				}
			})
		})
	}
}

// A store that panics has failed, wherever it was called from.
func TestStoreThatPanics(t *testing.T) {
	for name, broken := range map[string]func(s *idemtest.ScriptedStore){
		"a claim": func(s *idemtest.ScriptedStore) {
			s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
				if n == 1 {
					panic("nil map")
				}
				return s.MemoryStore.Acquire(ctx, key, c)
			}
		},
		"a renewal": func(s *idemtest.ScriptedStore) {
			s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
				if n == 2 || n == 3 {
					panic("nil map")
				}
				return s.MemoryStore.Acquire(ctx, key, c)
			}
		},
		"a Complete, at first and in the background": func(s *idemtest.ScriptedStore) {
			s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
				if s.Completed.Load() < 10 {
					panic("nil map")
				}
				return s.MemoryStore.Complete(ctx, key, token, r)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				broken(s)
				c := idemtest.NewClient(s, &idempotency.Options{}, idemtest.Lasting(15*time.Second))
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				time.Sleep(10 * time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) { panic("nil map") }
		s.OnRelease = func(context.Context, string, string, time.Duration) error { panic("nil map") }
		c := idemtest.NewClient(s, &idempotency.Options{}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		time.Sleep(time.Minute) // it is given back in the background
		require.Zero(t, c.Runs())
	})
}

// The client's end is not that of a store call, in whichever way a store, or
// what it is built on, looks at its context.
func TestStoreCallsOutliveTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var kept []context.Context
		seen := map[string]int{}
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, method string) {
			require.NoError(t, ctx.Err())
			require.NoError(t, context.Cause(ctx))
			require.Equal(t, "acme", ctx.Value(tenantKey{}))
			deadline, ok := ctx.Deadline()
			require.True(t, ok)
			require.LessOrEqual(t, time.Until(deadline), time.Second, "StoreTimeout")
			mu.Lock()
			defer mu.Unlock()
			seen[method]++
			kept = append(kept, ctx)
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
			time.Sleep(time.Minute) // renewals
			w.WriteHeader(http.StatusCreated)
		})
		ctx, hangUp := context.WithCancel(context.WithValue(t.Context(), tenantKey{}, "acme"))
		hangUp()
		c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		freeing := idemtest.NewClient(store, &idempotency.Options{}, idemtest.Answering(503))
		freeing.Do(freeing.Request(idemtest.Exchange{Key: "b"}).WithContext(ctx))
		require.Greater(t, seen["Acquire"], 4)
		require.Equal(t, 1, seen["Complete"])
		require.Equal(t, 1, seen["Release"])
		for _, ctx := range kept {
			require.ErrorIs(t, ctx.Err(), context.Canceled, "the call is over")
			<-ctx.Done()
		}
	})
}

// A store that waits for Done is let go in time, though it looked at its context
// before that.
func TestStoreCallsEndInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, _ string) {
			require.NoError(t, ctx.Err())
			start := time.Now()
			<-ctx.Done()
			require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
			require.ErrorIs(t, context.Cause(ctx), context.DeadlineExceeded)
			took = append(took, time.Since(start))
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, nil)
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		require.Equal(t, []time.Duration{time.Second / 2, time.Second / 2}, took)
	})
}

// So is one that hangs when a response is to be stored, or a key freed: the client
// waits for StoreTimeout, and the rest is done in the background.
func TestSettlingEndsInTime(t *testing.T) {
	for _, status := range []int{201, 500} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
				s.OnComplete = func(ctx context.Context, _, _ string, _ idempotency.Result) error { return hang(ctx) }
				s.OnRelease = func(ctx context.Context, _, _ string, _ time.Duration) error { return hang(ctx) }
				c := idemtest.NewClient(s, &idempotency.Options{}, idemtest.Answering(status))
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: strconv.Itoa(status) + " ", Took: time.Second})
				time.Sleep(time.Hour) // what goes on in the background ends
			})
		})
	}
}

// So is one that only asks now and then whether it may go on.
func TestStoreCallsKnowTheirEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, _ string) {
			deadline, _ := ctx.Deadline()
			time.Sleep(time.Until(deadline) - 1)
			require.NoError(t, ctx.Err())
			<-ctx.Done()
			require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// A process that is stopped after its claim may have been overtaken. When the
// store is down by then, FailOpen must not run the handler beside the other one.
func TestLateClaimDoesNotFailOpenWhenTheStoreIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		var down atomic.Bool
		s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if down.Load() {
				return idempotency.Record{}, idemtest.ErrDown
			}
			rec, err := s.MemoryStore.Acquire(ctx, key, c)
			if n == 1 {
				time.Sleep(40 * time.Second)
			}
			return rec, err
		}
		c := idemtest.NewClient(s, &idempotency.Options{FailOpen: true}, idemtest.Lasting(20*time.Second))
		var all sync.WaitGroup
		all.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"}) })
		time.Sleep(31 * time.Second)
		all.Go(func() { c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		time.Sleep(5 * time.Second)
		down.Store(true)
		time.Sleep(10 * time.Second)
		down.Store(false)
		all.Wait()
		require.Equal(t, 1, c.Runs())
	})
}

// A Commit that is still on its way when its run frees the key, and finds nothing
// there since the store has lost it, does not mark what it has made.
func TestCommitAfterItsRun(t *testing.T) {
	for name, answer := range map[string]time.Duration{"which was freed": 0, "which is being freed": 11 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inner := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				s := &idemtest.ScriptedStore{OnComplete: inner.Complete}
				s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if n == 2 {
						time.Sleep(10 * time.Second)
						inner.Replace(idempotency.NewMemoryStore())
					}
					return inner.Acquire(ctx, key, c)
				}
				s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
					err := inner.Release(ctx, key, token, keep)
					time.Sleep(answer)
					return err
				}
				c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, func(w http.ResponseWriter, r *http.Request) {
					if idemtest.Run(r) == 1 {
						go func() { _ = idemtest.Execution(r).Commit(context.WithoutCancel(r.Context())) }()
						time.Sleep(time.Second)
						w.WriteHeader(http.StatusTooManyRequests)
					}
				})
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "429 "})
				time.Sleep(10 * time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
				time.Sleep(30 * time.Second)
				c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "200 "})
			})
		})
	}
}

// A claim without an attempt could not be renewed: the store has failed.
func TestStoreThatCountsNoAttempts(t *testing.T) {
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		rec, err := s.MemoryStore.Acquire(ctx, key, c)
		rec.Attempt = 0
		return rec, err
	}
	c := idemtest.NewClient(s, &idempotency.Options{}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
}

// A store that calls a claim Lost has a marker of its token: nobody runs.
func TestClaimThatWasReleased(t *testing.T) {
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
		return idempotency.Record{State: idempotency.Lost}, nil
	}
	c := idemtest.NewClient(s, &idempotency.Options{}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
	require.Zero(t, c.Runs())
}

// The answer to a mark may come when the lease is over. The claim, which is
// marked by then, is given back.
func TestLateMarkDoesNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, late := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, true
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			rec, err := s.MemoryStore.Acquire(ctx, key, c)
			if c.Once && late {
				time.Sleep(3 * c.Lease)
			}
			return rec, err
		}
		c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true, Lease: time.Second, Wait: idempotency.NoWait}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		require.Zero(t, c.Runs())
		late = false
		time.Sleep(500 * time.Millisecond)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// A waiter whose first mark came too late, and who gets the key after all, is as
// good an owner as any.
func TestMarkThatWasLostOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, marks := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, 0
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if c.Once {
				if marks++; marks == 1 {
					return idempotency.Record{State: idempotency.Lost}, nil
				}
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true}, idemtest.Answering(http.StatusTooManyRequests))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "429 "})
	})
}

// The marker of a claim that was never used is kept for one lease.
func TestMarkerOfAnAbandonedClaim(t *testing.T) {
	withFaults(t, idempotency.Options{}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		memory := s.Store.(*idempotency.MemoryStore)
		s.FailAfter("Acquire", idemtest.ErrDown)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		time.Sleep(time.Second)
		require.Equal(t, 1, memory.Len())
		time.Sleep(30 * time.Second)
		require.Zero(t, memory.Len())
	})
}

// An unprotected run is part of the executions around it.
func TestFailOpenInsideOfAnother(t *testing.T) {
	s := idempotency.NewMemoryStore()
	down := &idemtest.FaultyStore{Store: s}
	down.Fail("Acquire", idemtest.ErrDown)
	scoped := &idempotency.Options{FailOpen: true, Scope: func(*http.Request) string { return "other" }, Logger: slog.New(slog.DiscardHandler)}
	var leaked *idempotency.Execution
	innermost := idempotency.Middleware(s, nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusCreated) }))
	unprotected := idempotency.Middleware(down, scoped)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		leaked = idemtest.Execution(r)
		innermost.ServeHTTP(w, r)
	}))
	c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, unprotected.ServeHTTP)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 "})
	leaked.Attach("late")
	require.Nil(t, leaked.Attachment(), "the handler has returned")
}
