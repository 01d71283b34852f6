package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// tooManyRequests says that nothing was done. The first run takes its time.
func tooManyRequests(first func(r *http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if idemtest.Run(r) == 1 {
			first(r)
		}
		w.WriteHeader(http.StatusTooManyRequests)
	}
}

// A renewal, a Commit or a first try may still be on its way when its run has
// freed the key, and arrive after another run has come and gone: nobody is there
// to end the claim that it makes. It is given back.
func TestClaimThatArrivesAfterItsRun(t *testing.T) {
	for name, row := range map[string]struct {
		store func(s *idemtest.ScriptedStore)
		first func(r *http.Request)
		alone bool // no other run comes and goes meanwhile
	}{
		"a renewal": {
			func(s *idemtest.ScriptedStore) { s.Late(2, 300*time.Millisecond) },
			func(*http.Request) { time.Sleep(10*time.Second + 100*time.Millisecond) },
			false,
		},
		"a Commit": {
			func(s *idemtest.ScriptedStore) { s.Late(2, 300*time.Millisecond) },
			func(r *http.Request) {
				e, ctx := idemtest.Execution(r), r.Context()
				go func() { _ = e.Commit(ctx) }()
				time.Sleep(time.Millisecond)
			},
			false,
		},
		"a first try": {
			func(s *idemtest.ScriptedStore) {
				s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if n == 1 {
						time.AfterFunc(700*time.Millisecond, func() { _, _ = s.MemoryStore.Acquire(context.Background(), key, c) })
						<-ctx.Done()
						return idempotency.Record{}, ctx.Err()
					}
					return s.MemoryStore.Acquire(ctx, key, c)
				}
			},
			func(*http.Request) {},
			false,
		},
		"the first of two tries of a Commit": {
			func(s *idemtest.ScriptedStore) {
				s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if n == 2 {
						time.AfterFunc(40*time.Second, func() { _, _ = s.MemoryStore.Acquire(context.Background(), key, c) })
						<-ctx.Done()
						return idempotency.Record{}, ctx.Err()
					}
					return s.MemoryStore.Acquire(ctx, key, c)
				}
			},
			func(r *http.Request) {
				e, ctx := idemtest.Execution(r), r.Context()
				go func() { _ = e.Commit(ctx) }()
				time.Sleep(time.Millisecond)
			},
			true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				row.store(s)
				c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true, Wait: idempotency.NoWait}, tooManyRequests(row.first))
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "429 "})
				if !row.alone {
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "429 "})
				}
				time.Sleep(2 * time.Minute)
				c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "429 "})
			})
		})
	}
}

// What is to be given back while the store is down takes little room, and leaves
// the store in peace.
func TestGivingBackDuringAnOutage(t *testing.T) {
	for name, outage := range map[string]func(ctx context.Context) error{
		"refused": func(context.Context) error { return errors.New("connection refused") },
		"hangs":   func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var up atomic.Bool
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					_, _ = s.MemoryStore.Acquire(ctx, key, c)
					return idempotency.Record{}, errors.New("the answer is lost")
				}
				s.OnRelease = func(ctx context.Context, key, token string) error {
					if !up.Load() {
						return outage(ctx)
					}
					return s.MemoryStore.Release(ctx, key, token, time.Minute)
				}
				giveBackDuring(t, s, func() { s.OnAcquire = nil; up.Store(true) })
			})
		})
	}
}

func giveBackDuring(t *testing.T, s *idemtest.ScriptedStore, end func()) {
	const (
		requests = 800
		few      = 50
	)
	c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true}, nil)
	before := runtime.NumGoroutine()
	for i := range requests {
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: "503 store_unavailable"})
	}
	for _, later := range []time.Duration{0, 60 * time.Millisecond, 30 * time.Second} {
		time.Sleep(later)
		synctest.Wait()
		require.Less(t, runtime.NumGoroutine()-before, few)
	}
	s.Released.Store(0)
	time.Sleep(10 * time.Second)
	require.LessOrEqual(t, s.Released.Load(), int64(10*100), "a hundred a second")

	end()
	time.Sleep(time.Minute)
	for i := range requests {
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: fmt.Sprintf("201 charge %d", i+1)})
	}
}

// An owner that learns late that another one has the key does not answer.
func TestLateAnswerThatNamesAnotherOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, down := time.Now(), errors.New("down")
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			switch {
			case n == 1:
				time.AfterFunc(30*time.Second+time.Millisecond, func() {
					_, err := s.MemoryStore.Acquire(context.Background(), key, idempotency.Claim{Token: "other", Lease: time.Minute, TTL: time.Hour})
					idemtest.Must(err)
				})
			case time.Since(start) < 27*time.Second:
				return idempotency.Record{}, down
			default:
				time.Sleep(3 * time.Second) // beyond the end of the lease
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		s.OnComplete = func(context.Context, string, string, idempotency.Result) error { return down }
		c := idemtest.NewClient(s, &idempotency.Options{StoreTimeout: 4 * time.Second}, idemtest.Lasting(40*time.Second))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
	})
}

// Nor does one that says that nothing was done.
func TestReleaseAfterAnotherOwnerWasSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if n > 1 {
				return idempotency.Record{State: idempotency.InProgress, Remaining: time.Minute}, nil
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		log := new(idemtest.EventLog)
		c := idemtest.NewClient(s, &idempotency.Options{OnEvent: log.Add}, tooManyRequests(func(*http.Request) { time.Sleep(11 * time.Second) }))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, idempotency.OutcomeLeaseLost, log.Last().Outcome)
	})
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
		s.OnRelease = func(context.Context, string, string) error { panic("nil map") }
		c := idemtest.NewClient(s, &idempotency.Options{}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		time.Sleep(time.Minute) // it is given back in the background
		require.Zero(t, c.Runs())
	})
}

// What is attached after the handler has returned is not for the store.
func TestAttachAfterTheHandlerReturned(t *testing.T) {
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
		e, _ := idempotency.FromContext(ctx)
		require.Nil(t, e.Attachment())
		return s.MemoryStore.Complete(ctx, key, token, r)
	}
	var e *idempotency.Execution
	c := idemtest.NewClient(s, &idempotency.Options{ShouldStore: func(int, http.Header) bool {
		e.Attach("late") // stands for a goroutine that the handler left behind
		return true
	}}, func(w http.ResponseWriter, r *http.Request) { e = idemtest.Execution(r) })
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 "})
	require.EqualValues(t, 1, s.Completed.Load())
}

// A Commit that failed may still arrive when its run has lost the key, and the
// one that took it over has freed it. The first run learns that it has lost it
// when it ends, or in the background.
func TestCommitThatArrivesAfterTheKeyWasLost(t *testing.T) {
	t.Run("at the end", func(t *testing.T) { commitThatArrivesLate(t, 40*time.Second, "409 in_progress") })
	t.Run("in the background", func(t *testing.T) { commitThatArrivesLate(t, 29*time.Second, "201 ") })
}

func commitThatArrivesLate(t *testing.T, runs time.Duration, get string) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		var down atomic.Bool
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if down.Load() {
				return errors.New("down")
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if !down.Load() {
				return s.MemoryStore.Acquire(ctx, key, c)
			}
			if c.Once {
				time.AfterFunc(time.Minute, func() { _, _ = s.MemoryStore.Acquire(context.Background(), key, c) })
			}
			return idempotency.Record{}, errors.New("down")
		}
		c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, func(w http.ResponseWriter, r *http.Request) {
			if idemtest.Run(r) == 1 {
				down.Store(true)
				require.Error(t, idemtest.Execution(r).Commit(r.Context()))
				time.Sleep(runs)
				w.WriteHeader(http.StatusCreated)
				return
			}
			down.Store(false)
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		time.AfterFunc(31*time.Second, func() { // its lease is over
			down.Store(false)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "503 "})
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: get})
		time.Sleep(2 * time.Minute)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "503 "})
	})
}

// What has to wait for others is given back twice all the same.
func TestGivingBackManyThings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		released := map[string]int{}
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
			return idempotency.Record{}, errors.New("down")
		}
		s.OnRelease = func(ctx context.Context, key, token string) error {
			mu.Lock()
			released[key]++
			n := released[key]
			mu.Unlock()
			time.Sleep(time.Duration(n) * 100 * time.Millisecond)
			return s.MemoryStore.Release(ctx, key, token, time.Minute)
		}
		c := idemtest.NewClient(s, &idempotency.Options{}, nil)
		const requests = 200
		for i := range requests {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: "503 store_unavailable"})
		}
		time.Sleep(20 * time.Minute)
		mu.Lock()
		defer mu.Unlock()
		require.Len(t, released, requests)
		for _, n := range released {
			require.Equal(t, 2, n)
		}
	})
}

// What one middleware gives back has nothing to do with the execution of one
// around it.
func TestGivingBackInsideOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
			return idempotency.Record{}, errors.New("down")
		}
		s.OnRelease = func(ctx context.Context, key, token string) error {
			_, ok := idempotency.FromContext(ctx)
			require.False(t, ok)
			return s.MemoryStore.Release(ctx, key, token, time.Minute)
		}
		inner := idempotency.Middleware(s, &idempotency.Options{Scope: func(*http.Request) string { return "inner" }})(http.NotFoundHandler())
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("the outer transaction")
			inner.ServeHTTP(w, r)
			time.Sleep(time.Minute)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		require.NotZero(t, s.Released.Load())
	})
}
