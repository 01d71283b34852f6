package idempotency_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

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
				s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
					if !up.Load() {
						return outage(ctx)
					}
					return s.MemoryStore.Release(ctx, key, token, keep)
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

// What one middleware gives back has nothing to do with the execution of one
// around it.
func TestGivingBackInsideOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
			return idempotency.Record{}, errors.New("down")
		}
		s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
			_, ok := idempotency.FromContext(ctx)
			require.False(t, ok)
			return s.MemoryStore.Release(ctx, key, token, keep)
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

// A mark may stand until TTL, although no handler runs. So the key is released
// until the store answers, for as long as Lease and MaxExecution together. A claim
// that was not marked ends by itself.
func TestReleaseAfterAMark(t *testing.T) {
	for name, row := range map[string]struct {
		opts  idempotency.Options
		store func(s *idemtest.ScriptedStore, down func() bool)
		until time.Duration // releases go on
	}{
		"the mark of at-most-once": {idempotency.Options{AtMostOnce: true}, losesAnswersTo(true), 10*time.Minute + 30*time.Second},
		"a claim":                  {idempotency.Options{AtMostOnce: true}, losesAnswersTo(false), 30 * time.Second},
		"a plain claim":            {idempotency.Options{}, losesAnswersTo(false), 30 * time.Second},
	} {
		for _, outage := range []time.Duration{row.until - 10*time.Second, row.until + time.Hour} {
			t.Run(name+", an outage of "+outage.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					start, last := time.Now(), atomic.Int64{}
					down := func() bool { return time.Since(start) < outage }
					s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
					row.store(s, down)
					s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
						if last.Store(int64(time.Since(start))); down() {
							return idemtest.ErrDown
						}
						return s.MemoryStore.Release(ctx, key, token, keep)
					}
					c := idemtest.NewClient(s, &row.opts, nil)
					c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
					time.Sleep(2 * time.Hour)
					require.LessOrEqual(t, time.Duration(last.Load()), row.until+2*time.Second)
					if outage < row.until || row.until == 30*time.Second {
						c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
					} else {
						require.Greater(t, time.Duration(last.Load()), row.until-10*time.Second)
						c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
					}
				})
			})
		}
	}
}

// losesAnswersTo makes a store that answers no mark, or no claim, while it is
// down.
func losesAnswersTo(marks bool) func(s *idemtest.ScriptedStore, down func() bool) {
	return func(s *idemtest.ScriptedStore, down func() bool) {
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			rec, err := s.MemoryStore.Acquire(ctx, key, c)
			if down() && c.Once == marks {
				return idempotency.Record{}, idemtest.ErrDown
			}
			return rec, err
		}
	}
}

// The same after a Commit that was not answered, when the handler then says that
// nothing was done.
func TestReleaseAfterACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		down := func() bool { return time.Since(start) < 5*time.Minute }
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		losesAnswersTo(true)(s, down)
		s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
			if down() {
				return errors.New("down")
			}
			return s.MemoryStore.Release(ctx, key, token, keep)
		}
		c := idemtest.NewClient(s, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if idemtest.Run(r) == 1 {
				require.Error(t, idemtest.Execution(r).Commit(r.Context()))
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 "})
		time.Sleep(6 * time.Minute)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "200 "})
	})
}

func TestReleaseFailsForAWhile(t *testing.T) {
	withFaults(t, idempotency.Options{Wait: idempotency.NoWait}, idemtest.Answering(500, 201), func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		s.Fail("Release", idemtest.ErrDown)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		require.Equal(t, []string{"released 500"}, events.All())
		require.ErrorIs(t, events.Last().Err, idemtest.ErrDown)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		s.Fail("Release", nil)
		time.Sleep(6 * time.Second)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "201 "})
	})
}

// Nobody takes an at-most-once claim over, so that one whose handler said that
// nothing was done is freed whenever the store is back, and not only within the
// lease: else it would be said to be unknown for all of the TTL.
func TestReleaseFailsForLongerThanTheLease(t *testing.T) {
	commits := func(w http.ResponseWriter, r *http.Request) {
		if idemtest.Run(r) == 1 && idemtest.Execution(r).Commit(r.Context()) != nil { // the claim may be marked all the same
			w.WriteHeader(429)
		}
	}
	for name, row := range map[string]struct {
		once    bool
		handler http.HandlerFunc
		then    string
	}{
		"at most once":                        {true, idemtest.Answering(429, 201), "201 "},
		"after a Commit whose reply was lost": {false, commits, "200 "},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{AtMostOnce: row.once, Wait: idempotency.NoWait}, row.handler, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
				s.Fail("Release", idemtest.ErrDown)
				if !row.once {
					s.Replace(&lostCommits{Store: s.Store})
				}
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "429 "})
				time.Sleep(time.Minute)
				s.Fail("Release", nil)
				time.Sleep(10 * time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.then})
			})
		})
	}
}

// lostCommits loses the replies to claims that are marked as at-most-once.
type lostCommits struct{ idempotency.Store }

func (s *lostCommits) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.Store.Acquire(ctx, key, c)
	if c.Once {
		return idempotency.Record{}, idemtest.ErrDown
	}
	return rec, err
}

// Requests that follow each other share buffers. A response that is stored in
// the background, long after its request, is the one that was answered.
func TestBackgroundStoresWhatWasAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Key", idemtest.Execution(r).Key())
			w.WriteHeader(http.StatusCreated)
			_, err := io.Copy(w, r.Body)
			idemtest.Must(err)
		})
		store.Fail("Complete", errors.New("down"))
		body := func(i int) string { return strings.Repeat(fmt.Sprint("body ", i, " "), 10+200*i) }
		for i := range 10 {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: body(i), Get: "201 " + body(i)})
		}
		store.Fail("Complete", nil)
		time.Sleep(20 * time.Second)
		for i := range 10 {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: body(i), Get: "replay 201 " + body(i)})
		}
		require.Equal(t, 10, c.Runs())
	})
}

// A store may be up and refuse a response, one that is too large for an item,
// say. The handler has finished, so it does not run again: before the lease ends
// a small record takes the place of the response.
func TestStoreRefusesAResponse(t *testing.T) {
	for name, opts := range map[string]idempotency.Options{
		"plain": {}, "at most once": {AtMostOnce: true}, "sealed": {AEAD: newAEAD(t, 1)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
					if len(r.Value) > 1000 {
						return errors.New("the item is too large")
					}
					return s.MemoryStore.Complete(ctx, key, token, r)
				}
				var log bytes.Buffer
				opts.Wait, opts.Logger = idempotency.NoWait, slog.New(slog.NewTextHandler(&log, nil))
				c := idemtest.NewClient(s, &opts, func(w http.ResponseWriter, r *http.Request) {
					w.WriteHeader(http.StatusCreated)
					_, _ = w.Write(make([]byte, 2000))
				})
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 " + string(make([]byte, 2000))})
				time.Sleep(15 * time.Second) // the store may recover yet
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
				time.Sleep(14 * time.Second)
				c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 201})
				require.Equal(t, 1, strings.Count(log.String(), "the store refuses a response"))
				time.Sleep(time.Hour)
				c.Check(t, 3, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 201})
				require.Equal(t, 1, c.Runs())
			})
		})
	}
}

// So it is when there is no response: a retry learns that nothing is known, and
// not that the handler has answered.
func TestStoreRefusesAnUnknownOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, last, atOnce := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, time.Time{}, 0
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if !time.Now().Equal(last) {
				last, atOnce = time.Now(), 0
			}
			if atOnce++; atOnce < 2 { // the first is the response, the second what takes its place
				return errors.New("not now")
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		c := idemtest.NewClient(s, &idempotency.Options{MaxExecution: time.Second, Wait: idempotency.NoWait}, givesUp)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
		time.Sleep(15 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		time.Sleep(time.Hour)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
		require.Equal(t, 1, c.Runs())
	})
}

// A small record takes the place of a response only when the store is up, and has
// refused the response twice since: it may have come back in between.
func TestStoreComesBackWhileItIsAsked(t *testing.T) {
	for name, row := range map[string]struct {
		err  error // of the second try
		then string
		runs int
	}{
		"and takes the response":     {nil, "replay 201 charge 1", 1},
		"and has given the key away": {idempotency.ErrLeaseLost, "201 charge 2", 2},
		"and has rolled it back":     {idempotency.ErrRolledBack, "201 charge 2", 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, up := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, atomic.Bool{}
				var renewals atomic.Int64
				s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if c.Attempt > 0 {
						if renewals.Add(1) == 1 {
							return idempotency.Record{}, idemtest.ErrDown
						}
						up.Store(true)
					}
					return s.MemoryStore.Acquire(ctx, key, c)
				}
				s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
					first, _ := idempotency.FromContext(ctx)
					switch {
					case !up.Load():
						return idemtest.ErrDown
					case row.err != nil && first.Attempt() == 1:
						return row.err
					}
					return s.MemoryStore.Complete(ctx, key, token, r)
				}
				var log bytes.Buffer
				c := idemtest.NewClient(s, &idempotency.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, nil)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				time.Sleep(time.Hour)
				synctest.Wait()
				require.True(t, up.Load())
				require.NotContains(t, log.String(), "the store refuses a response")
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.then})
				require.Equal(t, row.runs, c.Runs())
			})
		})
	}
}

// A store that has decided is not asked whether it is up.
func TestStoreDecidesBeforeTheLeaseEnds(t *testing.T) {
	for name, decision := range map[string]error{"stored": nil, "lost": idempotency.ErrLeaseLost} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, decided, asked := time.Now(), atomic.Bool{}, atomic.Bool{}
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if decided.Load() {
						asked.Store(true)
					}
					return s.MemoryStore.Acquire(ctx, key, c)
				}
				s.OnComplete = func(context.Context, string, string, idempotency.Result) error {
					if time.Since(start) < 21*time.Second {
						return idemtest.ErrDown
					}
					decided.Store(true)
					return decision
				}
				c := idemtest.NewClient(s, &idempotency.Options{}, nil)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				time.Sleep(time.Hour)
				require.True(t, decided.Load())
				require.False(t, asked.Load())
			})
		})
	}
}

// A store that cannot renew the claim is down, whatever else it does: the response
// keeps its place.
func TestStoreRefusesAResponseWhileItIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, memory := atomic.Bool{}, idempotency.NewMemoryStore()
		s := &idemtest.ScriptedStore{MemoryStore: memory}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if !up.Load() && c.Attempt > 0 {
				return idempotency.Record{}, idemtest.ErrDown
			}
			return memory.Acquire(ctx, key, c)
		}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if !up.Load() && len(r.Value) > 1000 {
				return idemtest.ErrDown
			}
			return memory.Complete(ctx, key, token, r)
		}
		large := strings.Repeat("large ", 500)
		c := idemtest.NewClient(s, &idempotency.Options{Wait: idempotency.NoWait}, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, large)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 " + large})
		time.Sleep(29 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		up.Store(true)
		time.Sleep(10 * time.Second)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 200 " + large})
	})
}

// A small record takes the place of a response, and not that of another run: the
// store, which refuses the response before it looks who owns the key, says at the
// renewal that the key is lost.
func TestStoreRefusesTheResponseOfALostKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if c.Attempt > 0 && time.Since(start) < 40*time.Second {
				return idempotency.Record{}, idemtest.ErrDown
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if len(r.Value) > 1000 {
				return errors.New("the item is too large")
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		var log bytes.Buffer
		opts := &idempotency.Options{Wait: idempotency.NoWait, Logger: slog.New(slog.NewTextHandler(&log, nil))}
		c := idemtest.NewClient(s, opts, func(w http.ResponseWriter, r *http.Request) {
			if idemtest.Run(r) == 1 {
				_, _ = w.Write(make([]byte, 2000))
				return
			}
			w.WriteHeader(http.StatusTooManyRequests)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 " + string(make([]byte, 2000))})
		time.Sleep(31 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "429 "})
		time.Sleep(time.Hour)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "429 "})
		require.Equal(t, 3, c.Runs())
		synctest.Wait()
		require.NotContains(t, log.String(), "the store refuses a response")
	})
}

// The renewals of a claim whose response the store does not take claim a key anew
// that the store has lost, and mark it: for the same request, which never runs
// again.
func TestStoreLosesAKeyWhileItRefusesTheResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		s.Fail("Complete", idemtest.ErrDown)
		c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true, Wait: idempotency.NoWait}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		time.Sleep(25 * time.Second)
		s.Replace(idempotency.NewMemoryStore())
		time.Sleep(10 * time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Body: "another", Get: "422 key_reused"})
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		time.Sleep(time.Hour)
		c.Check(t, 3, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
		require.Equal(t, 1, c.Runs())
	})
}

// What goes on in the background knows its Execution, and nothing of the request.
func TestBackgroundHoldsNoRequest(t *testing.T) {
	type valueKey struct{}
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var late atomic.Int64
		s := &idemtest.ObservedStore{Store: downFor(start, time.Minute), Look: func(ctx context.Context, method string) {
			if time.Since(start) < 5*time.Second || method == "Acquire" {
				return
			}
			late.Add(1)
			require.Nil(t, ctx.Value(valueKey{}), method)
			e, ok := idempotency.FromContext(ctx)
			require.True(t, ok, method)
			require.Equal(t, "a", e.Key())
			require.Equal(t, 1, e.Attempt())
			require.Error(t, e.Commit(ctx))
		}}
		for _, status := range []int{http.StatusCreated, http.StatusTooManyRequests} {
			c := idemtest.NewClient(s, &idempotency.Options{}, idemtest.Answering(status))
			r := c.Request(idemtest.Exchange{Key: "a", Target: fmt.Sprint("/", status)})
			require.Equal(t, status, c.Do(r.WithContext(context.WithValue(r.Context(), valueKey{}, "large"))).StatusCode)
		}
		time.Sleep(2 * time.Minute)
		require.Greater(t, late.Load(), int64(2))
	})
}

// What goes on in the background keeps nothing of the request in memory, which may
// be large: not for a response, nor for a key, nor for a claim that was refused.
func TestBackgroundLetsGoOfTheRequest(t *testing.T) {
	type valueKey struct{}
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s := downFor(start, time.Minute).(*idemtest.ScriptedStore)
		for _, status := range []int{http.StatusCreated, http.StatusTooManyRequests, http.StatusServiceUnavailable} {
			if status == http.StatusServiceUnavailable {
				s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
					return idempotency.Record{}, idemtest.ErrDown
				}
			}
			background := new(idempotency.Background)
			c := idemtest.NewClient(s, &idempotency.Options{Background: background}, idemtest.Answering(status))
			value := func() weak.Pointer[[]byte] {
				large := make([]byte, 1<<20)
				r := c.Request(idemtest.Exchange{Key: "a", Target: fmt.Sprint("/", status)})
				resp := c.Do(r.WithContext(context.WithValue(r.Context(), valueKey{}, &large)))
				require.Equal(t, status, resp.StatusCode)
				return weak.Make(&large)
			}()
			// A timer that was stopped may hold it for a moment yet.
			for try := 0; value.Value() != nil; try++ {
				require.Less(t, try, 10, status)
				time.Sleep(time.Second)
				runtime.GC()
			}
			over, cancel := context.WithCancel(t.Context())
			cancel()
			require.Error(t, background.Wait(over), "it goes on")
		}
		time.Sleep(2 * time.Minute)
	})
}

// When a store is down, 50,000 refused requests leave about 25 MiB behind, and
// none of what their contexts hold.
func TestRefusedRequestsTakeLittleRoom(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("it is about numbers")
	}
	type valueKey struct{}
	synctest.Test(t, func(t *testing.T) {
		const requests, bound, perContext = 50_000, 45 << 20, 4 << 10
		s, up := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, atomic.Bool{}
		s.OnAcquire = func(int, context.Context, string, idempotency.Claim) (idempotency.Record, error) {
			return idempotency.Record{}, idemtest.ErrDown
		}
		s.OnRelease = func(context.Context, string, string, time.Duration) error {
			if !up.Load() {
				return idemtest.ErrDown
			}
			return nil
		}
		background := new(idempotency.Background)
		c := idemtest.NewClient(s, &idempotency.Options{Background: background}, nil)
		before := heap()
		for i := range requests {
			r := c.Request(idemtest.Exchange{Key: fmt.Sprint(i)})
			large := make([]byte, perContext) // what an error tracker keeps there, say
			require.Equal(t, 503, c.Do(r.WithContext(context.WithValue(r.Context(), valueKey{}, large))).StatusCode)
		}
		after := heap()
		over, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorContains(t, background.Wait(over), "50000 keys not freed")
		t.Logf("%.1f MiB", float64(after-before)/(1<<20))
		require.Less(t, after-before, int64(bound))
		up.Store(true)
		require.NoError(t, background.Wait(t.Context()))
		require.Less(t, heap()-before, int64(bound/4))
	})
}

// A router reuses what it puts into a context, so a log line of the background
// that looked there would name the route of another request.
func TestLogHasNoOtherRequest(t *testing.T) {
	for name, row := range map[string]struct {
		status int
		work   time.Duration
		line   string
	}{
		"a response": {http.StatusCreated, 0, "storing a response failed"},
		"a key":      {http.StatusInternalServerError, 0, "freeing a key failed"},
		"a renewal":  {http.StatusCreated, 10*time.Second + time.Millisecond, ""}, // that fails when all is done
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := downFor(time.Now(), time.Hour).(*idemtest.ScriptedStore)
				s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
					if n > 1 {
						<-ctx.Done()
						return idempotency.Record{}, ctx.Err()
					}
					return s.MemoryStore.Acquire(ctx, key, c)
				}
				log := new(routeHandler)
				c := idemtest.NewClient(s, &idempotency.Options{Logger: slog.New(log), StoreTimeout: 5 * time.Second}, func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(row.work)
					w.WriteHeader(row.status)
				})
				if row.work > 0 {
					s.OnComplete = nil
				}
				route := &atomic.Value{}
				route.Store("/mine")
				r := c.Request(idemtest.Exchange{Key: "a"})
				resp := c.Do(r.WithContext(context.WithValue(r.Context(), routeKey{}, route)))
				require.Equal(t, row.status, resp.StatusCode)
				route.Store("/of another request")
				time.Sleep(2 * time.Hour)
				synctest.Wait()
				require.Contains(t, log.lines(), row.line)
				require.NotContains(t, log.lines(), "another")
			})
		})
	}
}

type routeKey struct{}

// A routeHandler logs the route of the request that the context is of.
type routeHandler struct {
	mu   sync.Mutex // guards text
	text strings.Builder
}

func (*routeHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h *routeHandler) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h *routeHandler) WithGroup(string) slog.Handler          { return h }
func (h *routeHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	fmt.Fprint(&h.text, r.Message)
	if route, ok := ctx.Value(routeKey{}).(*atomic.Value); ok {
		fmt.Fprint(&h.text, " ", route.Load())
	}
	h.text.WriteString("\n")
	return nil
}

func (h *routeHandler) lines() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text.String()
}

// downFor is a store that takes claims and fails everything else for d.
func downFor(start time.Time, d time.Duration) idempotency.Store {
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
		if time.Since(start) < d {
			return idemtest.ErrDown
		}
		return s.MemoryStore.Complete(ctx, key, token, r)
	}
	s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
		if time.Since(start) < d {
			return idemtest.ErrDown
		}
		return s.MemoryStore.Release(ctx, key, token, keep)
	}
	return s
}

// Marked keys whose store comes back are all freed, though only a few at a time.
func TestGivingBackManyMarkedKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const requests = 500
		start, releases := time.Now(), map[time.Duration]bool{}
		down := func() bool { return time.Since(start) < time.Minute }
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		losesAnswersTo(true)(s, down)
		var mu sync.Mutex
		s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
			mu.Lock()
			releases[time.Since(start)] = true
			mu.Unlock()
			if down() {
				<-ctx.Done()
				return ctx.Err()
			}
			time.Sleep(10 * time.Millisecond)
			return s.MemoryStore.Release(ctx, key, token, keep)
		}
		c := idemtest.NewClient(s, &idempotency.Options{AtMostOnce: true, Lease: 2 * time.Second}, nil)
		for i := range requests {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: "503 store_unavailable"})
		}
		require.True(t, down())
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Greater(t, len(releases), requests/2, "one after the other")
		for i := range requests {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: fmt.Sprintf("201 charge %d", i+1)})
		}
	})
}

// The number of keys that wait is bounded, and those that do not get in leave no
// trace.
func TestReleasesAreBounded(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("it is about numbers")
	}
	synctest.Test(t, func(t *testing.T) {
		const bound = 50_000
		s, up := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}, atomic.Bool{}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			return idempotency.Record{}, idemtest.ErrDown
		}
		s.OnRelease = func(context.Context, string, string, time.Duration) error {
			if !up.Load() {
				return idemtest.ErrDown
			}
			return nil
		}
		var stay countingHandler
		c := idemtest.NewClient(s, &idempotency.Options{
			Logger: slog.New(&stay), ErrorHandler: func(http.ResponseWriter, *http.Request, *idempotency.Error) {},
		}, nil)
		w, r := httptest.NewRecorder(), c.Request(idemtest.Exchange{Key: "a"})
		refused := func(n int) (keys int64) {
			before := stay.Load()
			for range n {
				r.Body = http.NoBody
				c.Handler.ServeHTTP(w, r)
			}
			return stay.Load() - before
		}
		require.Zero(t, refused(bound))
		require.EqualValues(t, bound, refused(bound))
		up.Store(true)
		time.Sleep(time.Hour)
		require.Zero(t, refused(10))
		time.Sleep(time.Hour)
	})
}

// countingHandler counts the keys that stay claimed.
type countingHandler struct{ atomic.Int64 }

func (*countingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *countingHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h *countingHandler) WithGroup(string) slog.Handler { return h }

func (h *countingHandler) Handle(_ context.Context, r slog.Record) error {
	if strings.HasSuffix(r.Message, "a key stays claimed") {
		h.Add(1)
	}
	return nil
}

// In the background the store gets the Execution, and nothing of the request.
// Tries become rarer, and end with an answer.
func TestCallsInTheBackground(t *testing.T) {
	for name, status := range map[string]int{"Complete": 201, "Release": 500} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, calls, since := time.Now(), 0, time.Duration(0)
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				look := func(ctx context.Context) error {
					calls++
					e, ok := idempotency.FromContext(ctx)
					require.True(t, ok)
					if name == "Release" {
						require.Equal(t, "a transaction", e.Attachment())
					}
					since = time.Since(start)
					if since < time.Second {
						return idemtest.ErrDown
					}
					require.Nil(t, ctx.Value(tenantKey{}))
					if since < 29*time.Second {
						return idemtest.ErrDown
					}
					return idempotency.ErrLeaseLost
				}
				s.OnComplete = func(ctx context.Context, _, _ string, _ idempotency.Result) error { return look(ctx) }
				s.OnRelease = func(ctx context.Context, _, _ string, _ time.Duration) error { return look(ctx) }
				c := idemtest.NewClient(s, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					if name == "Release" {
						idemtest.Execution(r).Attach("a transaction")
					}
					w.WriteHeader(status)
				})
				ctx := context.WithValue(t.Context(), tenantKey{}, "acme")
				require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx)))
				time.Sleep(time.Hour)
				synctest.Wait()
				require.Less(t, calls, 40)
				require.Less(t, since, 36*time.Second, "that the key is lost is final")
			})
		})
	}
}
