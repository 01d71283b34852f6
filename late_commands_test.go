package idempotency_test

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

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
				c := idemtest.NewClient(s, row.opts, row.handler)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx)))
				time.Sleep(row.kept - time.Second)
				require.Equal(t, 1, s.Len())
				time.Sleep(time.Second)
				require.Zero(t, s.Len())
			})
		})
	}
}
