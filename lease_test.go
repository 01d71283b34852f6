package idempotency_test

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A lease is renewed every third of it, again and again.
func TestLeaseIsRenewedEveryThirdOfIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var asked []time.Duration
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
			if method == "Acquire" {
				asked = append(asked, time.Since(start))
			}
		}}
		c := idemtest.NewClient(store, &idempotency.Options{Lease: 3 * time.Minute}, idemtest.Lasting(4*time.Minute+time.Second))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		const m = time.Minute
		require.Equal(t, []time.Duration{0, m, 2 * m, 3 * m, 4 * m}, asked)
	})
}

// A store that lost the claim of a running handler has it again with the next
// renewal. Before that, for a third of the lease at most, a retry would run.
func TestRenewalClaimsALostKeyAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lease, moment = 3 * time.Minute, time.Millisecond
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		opts := idempotency.Options{Lease: lease, Wait: idempotency.NoWait}
		c := idemtest.NewClient(store, &opts, idemtest.Lasting(lease+time.Second))
		first := make(chan *http.Response, 1)
		go func() { first <- c.Do(c.Request(idemtest.Exchange{Key: "a"})) }()
		time.Sleep(lease/3 + moment) // it has just been renewed
		empty := idempotency.NewMemoryStore()
		store.Replace(empty)
		time.Sleep(lease/3 - 2*moment)
		require.Zero(t, empty.Len(), "until the next renewal")
		time.Sleep(2 * moment)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		answer, _ := idemtest.Describe(t, <-first)
		require.Equal(t, "201 charge 1", answer)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
		require.Equal(t, 1, c.Runs())
	})
}

// A renewal counts from the moment on at which it was sent, however long the
// store takes to answer: it may have come to the store at once.
func TestLeaseEndsWithTheLastRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent time.Time
		slow := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
			if method == "Acquire" {
				sent = time.Now()
				time.Sleep(300 * time.Millisecond)
			}
		}}
		store := &idemtest.FaultyStore{Store: slow}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			time.Sleep(25 * time.Second) // two renewals
			store.Fail("Acquire", errors.New("down"))
			<-r.Context().Done()
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			require.Equal(t, 30*time.Second, time.Since(sent))
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}

// A Commit is a renewal too.
func TestLeaseEndsWithTheLastCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			store.Fail("Acquire", errors.New("down"))
			time.Sleep(24 * time.Second)
			store.Fail("Acquire", nil)
			committed := time.Now()
			require.NoError(t, idemtest.Execution(r).Commit(r.Context()))
			store.Fail("Acquire", errors.New("down"))
			<-r.Context().Done()
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			require.Equal(t, 30*time.Second, time.Since(committed))
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}

func TestLeaseIsRenewedWhileTheHandlerRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait}, idemtest.Lasting(9*time.Minute))
		var first sync.WaitGroup
		first.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		for range 8 { // each time the first lease is long over
			time.Sleep(time.Minute)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		}
		first.Wait()
		require.Equal(t, 1, c.Runs())
	})
}

// The lease is renewed until the store has the answer in its hands.
func TestLeaseIsRenewedWhileShouldStoreThinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := &idempotency.Options{Wait: idempotency.NoWait, ShouldStore: func(int, http.Header) bool {
			time.Sleep(time.Minute)
			return true
		}}
		c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, nil)
		var first sync.WaitGroup
		first.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		time.Sleep(45 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		first.Wait()
	})
}

func TestMaxExecution(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := idempotency.NewMemoryStore()
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if idemtest.Execution(r).Attempt() > 1 {
				return
			}
			start := time.Now()
			<-r.Context().Done()
			require.Equal(t, 10*time.Minute, time.Since(start))
			require.ErrorIs(t, context.Cause(r.Context()), context.DeadlineExceeded)
			time.Sleep(time.Hour) // does not care
			w.WriteHeader(http.StatusCreated)
		})
		var stuck sync.WaitGroup
		stuck.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"}) })
		time.Sleep(10*time.Minute + 29*time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "200 "}) // takes over within its Wait
		stuck.Wait()
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 200 "})
		require.Equal(t, 2, c.Runs())
	})
}

func TestLateHandlerThatNobodyTookOverIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, idemtest.Lasting(time.Hour))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

// stealing lets a test take a key over, as another process would.
func steal(t *testing.T, store idempotency.Store, storeKey string) {
	t.Helper()
	fault := store.(*idemtest.FaultyStore)
	rec, err := fault.Store.Acquire(t.Context(), storeKey, idempotency.Claim{Token: "thief", Lease: time.Hour, TTL: time.Hour})
	require.NoError(t, err)
	require.Equal(t, idempotency.Acquired, rec.State)
	require.Equal(t, 2, rec.Attempt)
}

func TestLostLease(t *testing.T) {
	for name, handler := range map[string]func(w http.ResponseWriter){
		"a final answer is dropped":   func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated) },
		"a freeing answer is dropped": func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				events := &idemtest.EventLog{}
				c := idemtest.NewClient(store, &idempotency.Options{OnEvent: events.Add}, func(w http.ResponseWriter, r *http.Request) {
					// The store is out of reach until the lease is over, and comes
					// back with another owner.
					store.Fail("Acquire", errors.New("down"))
					<-r.Context().Done()
					require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
					require.ErrorIs(t, idemtest.Execution(r).Commit(r.Context()), idempotency.ErrStoreUnavailable)
					store.Fail("Acquire", nil)
					steal(t, store, store.LastKey())
					require.ErrorIs(t, idemtest.Execution(r).Commit(r.Context()), idempotency.ErrLeaseLost)
					handler(w)
				})
				start := time.Now()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
				require.Equal(t, 30*time.Second, time.Since(start), "counted from before the claim was sent")
				require.Equal(t, []string{"lease_lost 409"}, events.All())
			})
		})
	}
}

func TestRenewalNoticesAnotherOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			// Someone cleared the store, and the key was claimed anew.
			store.Replace(idempotency.NewMemoryStore())
			_, err := store.Store.Acquire(r.Context(), store.LastKey(), idempotency.Claim{Token: "other", Lease: time.Hour, TTL: time.Hour})
			require.NoError(t, err)
			start := time.Now()
			<-r.Context().Done()
			require.Equal(t, 10*time.Second, time.Since(start), "at the next renewal")
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
	})
}

// A store that never answers must not hide that the lease is over.
func TestHangingRenewalDoesNotHideALostLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			release := make(chan struct{})
			store.Hang("Acquire", release)
			start := time.Now()
			<-r.Context().Done()
			require.Equal(t, 30*time.Second, time.Since(start))
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			close(release)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	})
}

func TestRenewalSurvivesFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			for range 10 {
				store.Fail("Acquire", errors.New("down"))
				time.Sleep(15 * time.Second) // misses a renewal
				store.Fail("Acquire", nil)
				time.Sleep(15 * time.Second)
			}
			require.NoError(t, r.Context().Err())
			w.WriteHeader(http.StatusCreated)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 "})
	})
}

// A renewal says again that the key is at-most-once, by option or by Commit, in
// case that the store has lost the record.
func TestRenewalRepeatsOnce(t *testing.T) {
	for name, atMostOnce := range map[string]bool{"at most once": true, "after Commit": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{AtMostOnce: atMostOnce}, func(_ http.ResponseWriter, r *http.Request) {
					if !atMostOnce {
						idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
					}
					store.Replace(idempotency.NewMemoryStore())
					time.Sleep(15 * time.Second)
					panic("boom")
				})
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
				time.Sleep(time.Minute)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
				c.Check(t, 2, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
			})
		})
	}
}

// A run may end between two renewals.
func TestMaxExecutionBetweenRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxExecution: 25 * time.Second}, givesUp)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown", Took: 25 * time.Second})
	})
}

// Renewals of a plain key do not mark it.
func TestRenewedKeyRunsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if time.Sleep(15 * time.Second); idemtest.Run(r) == 1 {
				panic("boom")
			}
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
		time.Sleep(time.Minute)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "200 "})
	})
}

// Nothing is renewed once the answer is there.
func TestRenewalsEndWithTheRun(t *testing.T) {
	for _, status := range []int{http.StatusCreated, http.StatusTooManyRequests} {
		synctest.Test(t, func(t *testing.T) {
			s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
			c := idemtest.NewClient(s, &idempotency.Options{}, idemtest.Answering(status))
			require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
			time.Sleep(time.Hour)
			require.Equal(t, 1, s.Count("Acquire"))
		})
	}
}

// A Commit during a renewal extends the lease by itself.
func TestCommitDuringARenewal(t *testing.T) {
	for name, row := range map[string]struct {
		hangs, end time.Duration
	}{
		"that never ends":        {time.Hour, 50 * time.Second},
		"that is answered later": {10*time.Second + 10*time.Millisecond, 50 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if n > 3 {
						return idempotency.Record{}, idemtest.ErrDown
					}
					rec, err := s.MemoryStore.Acquire(ctx, key, c)
					if n == 2 {
						time.Sleep(row.hangs)
					}
					return rec, err
				}
				var took time.Duration
				c := idemtest.NewClient(s, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
					start := time.Now()
					time.Sleep(20 * time.Second)
					idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
					select {
					case <-r.Context().Done():
						require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
					case <-time.After(5 * time.Minute):
					}
					took = time.Since(start)
				})
				c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				require.Equal(t, row.end, took)
				time.Sleep(2 * time.Hour)
			})
		})
	}
}
