package idempotency_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"sync"
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
		"and the claim was not made":         func(s *idemtest.FaultyStore) { s.Fail("Acquire", idemtest.ErrDown) },
		"and the claim was made unnoticed":   func(s *idemtest.FaultyStore) { s.FailAfter("Acquire", idemtest.ErrDown) },
		"and it answers what is not a state": func(s *idemtest.FaultyStore) { s.Store = zeroStateStore{s.Store} },
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

type zeroStateStore struct{ idempotency.Store }

func (s zeroStateStore) Acquire(context.Context, string, idempotency.Claim) (idempotency.Record, error) {
	return idempotency.Record{}, nil
}

func TestLostReplyOfAClaimIsNotAStranger(t *testing.T) {
	withFaults(t, idempotency.Options{Wait: idempotency.NoWait}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		lost := &oneLostReply{Store: s.Store}
		s.Store = lost
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		require.Equal(t, 1, lost.lost)
	})
}

// oneLostReply fails the first Acquire after it took effect.
type oneLostReply struct {
	idempotency.Store
	lost int
}

func (s *oneLostReply) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.Store.Acquire(ctx, key, c)
	if s.lost == 0 {
		s.lost++
		return idempotency.Record{}, idemtest.ErrDown
	}
	return rec, err
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

func TestCompleteFails(t *testing.T) {
	for name, row := range map[string]struct {
		fail  func(s *idemtest.FaultyStore)
		until time.Duration // the store is back
		then  string
		runs  int
		once  bool
	}{
		"until just before the lease ends": {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 29900 * time.Millisecond, then: "replay 201 charge 1", runs: 1},
		"longer, for an at-most-once key":  {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 5 * time.Minute, then: "replay 201 charge 1", runs: 1, once: true},
		"too long for an at-most-once key": {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 15 * time.Minute, then: "409 outcome_unknown", runs: 1, once: true},
		"for a moment":                     {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 200 * time.Millisecond, then: "replay 201 charge 1", runs: 1},
		"for a while":                      {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 20 * time.Second, then: "replay 201 charge 1", runs: 1},
		"but took effect":                  {fail: func(s *idemtest.FaultyStore) { s.FailAfter("Complete", idemtest.ErrDown) }, until: 20 * time.Second, then: "replay 201 charge 1", runs: 1},
		"for longer than the lease":        {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 40 * time.Second, then: "201 charge 2", runs: 2},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{Wait: idempotency.NoWait, AtMostOnce: row.once}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				row.fail(s)
				go func() {
					time.Sleep(row.until)
					s.Fail("Complete", nil)
					s.FailAfter("Complete", nil)
				}()
				start := time.Now()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				require.LessOrEqual(t, time.Since(start), time.Second, "the client does not wait longer than StoreTimeout")
				if row.until > time.Second {
					require.ErrorIs(t, events.Last().Err, idemtest.ErrDown)
					got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
					require.NotContains(t, got, "charge 2", "the claim stands meanwhile")
				}
				time.Sleep(row.until + 10*time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.then})
				require.Equal(t, row.runs, c.Runs())
			})
		})
	}
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

// A watch that always fires must not become a busy loop.
func TestBrokenWatch(t *testing.T) {
	for name, watch := range map[string]func() (<-chan struct{}, error){
		"fires at once": func() (<-chan struct{}, error) { c := make(chan struct{}); close(c); return c, nil },
		"never fires":   func() (<-chan struct{}, error) { return make(chan struct{}), nil },
		"fails":         func() (<-chan struct{}, error) { return nil, idemtest.ErrDown },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &fakeWatcher{FaultyStore: &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}, watch: watch}
				c := idemtest.NewClient(s, &idempotency.Options{Lease: 4 * time.Second}, idemtest.PanicOnce)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
				start := time.Now()
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 attempt 2"})
				require.InDelta(t, 4, time.Since(start).Seconds(), 0.1)
				require.Less(t, s.Count("Acquire"), 1000)
			})
		})
	}
}

type fakeWatcher struct {
	*idemtest.FaultyStore
	watch func() (<-chan struct{}, error)
}

func (s *fakeWatcher) Watch(context.Context, string) (<-chan struct{}, error) { return s.watch() }

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

// An owner that was told by Commit that another has the key does not answer
// beside that one, whatever becomes of its own Complete.
func TestStaleOwnerDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory, events := idempotency.NewMemoryStore(), &idemtest.EventLog{}
		store := &idemtest.FaultyStore{Store: memory}
		stale := idemtest.NewClient(store, &idempotency.Options{OnEvent: events.Add}, func(w http.ResponseWriter, r *http.Request) {
			store.Fail("Acquire", idemtest.ErrDown)
			time.Sleep(time.Minute) // it charges, and does not look at its context
			store.Fail("Acquire", nil)
			require.ErrorIs(t, idemtest.Execution(r).Commit(r.Context()), idempotency.ErrLeaseLost)
			store.Fail("Complete", idemtest.ErrDown)
			idemtest.Lasting(0)(w, r)
		})
		other := idemtest.NewClient(memory, &idempotency.Options{}, idemtest.Lasting(0))
		go func() {
			time.Sleep(45 * time.Second)
			other.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		}()
		stale.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, []string{"lease_lost 409"}, events.All())
		store.Fail("Complete", nil)
		stale.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

func TestStoreFull(t *testing.T) {
	withFaults(t, idempotency.Options{}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		s.Store = &idempotency.MemoryStore{MaxBytes: 1}
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		require.ErrorIs(t, events.Last().Err, idempotency.ErrStoreFull)
		require.Zero(t, c.Runs())
	})
}

func TestAttachedTransaction(t *testing.T) {
	attaching := func(commit bool, status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("transaction")
			if commit {
				idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
			}
			w.WriteHeader(status)
		}
	}
	for name, row := range map[string]struct {
		handler http.HandlerFunc
		err     error
		get     string
		event   string
		later   string // when the store is back, and the lease over
	}{
		"committed":                         {attaching(false, 201), nil, "201 ", "executed 201", "replay 201 "},
		"rolled back frees the key":         {attaching(false, 201), fmt.Errorf("serialization: %w", idempotency.ErrRolledBack), "503 store_unavailable", "store_unavailable 503", "201 "},
		"rolled back, the lease being lost": {attaching(false, 201), errors.Join(idempotency.ErrRolledBack, idempotency.ErrLeaseLost), "409 in_progress", "lease_lost 409", "201 "},
		"rolled back after Commit":          {attaching(true, 201), idempotency.ErrRolledBack, "503 store_unavailable", "store_unavailable 503", "409 outcome_unknown"},
		"unknown is not answered":           {attaching(false, 201), idemtest.ErrDown, "503 store_unavailable", "store_unavailable 503", "201 "},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{}, row.handler, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				carrier := &contextStore{Store: s.Store}
				s.Store = carrier
				s.Fail("Complete", row.err)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: row.get})
				require.Equal(t, 1, s.Count("Complete"), "a transaction ends only once")
				require.Equal(t, []string{row.event}, events.All())
				s.Fail("Complete", nil)
				if row.later == "201 " && errors.Is(row.err, idempotency.ErrRolledBack) && !errors.Is(row.err, idempotency.ErrLeaseLost) {
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 "}) // at once
					return
				}
				time.Sleep(31 * time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.later})
			})
		})
	}
}

// A client must not be told that nothing was done when nobody knows.
func TestUnknownOutcomesAreNotCalledUnprocessed(t *testing.T) {
	for name, commit := range map[string]bool{"unknown": false, "rolled back after Commit": true} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
				idemtest.Execution(r).Attach("transaction")
				if commit {
					idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
				}
			}, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
				s.Fail("Complete", map[bool]error{false: idemtest.ErrDown, true: idempotency.ErrRolledBack}[commit])
				_, p := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
				require.Contains(t, p.Detail, "is not known")
			})
		})
	}
}

// A transaction is ended even when the key was lost.
func TestLostLeaseEndsTheTransaction(t *testing.T) {
	withFaults(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		idemtest.Execution(r).Attach("transaction")
		<-r.Context().Done()
		w.WriteHeader(http.StatusInternalServerError)
	}, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		carrier := &contextStore{Store: s.Store}
		s.Store = carrier
		time.AfterFunc(time.Second, func() { s.Fail("Acquire", idemtest.ErrDown) })
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, []string{"lease_lost 409"}, events.All())
		require.Equal(t, []string{"Release transaction"}, carrier.seen)
	})
}

func TestStoreSeesTheAttachment(t *testing.T) {
	withFaults(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		idemtest.Execution(r).Attach("transaction")
		w.WriteHeader([]int{0, 500, 201}[idemtest.Run(r)])
	}, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		carrier := &contextStore{Store: s.Store}
		s.Store = carrier
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 "})
		require.Equal(t, []string{"Release transaction", "Complete transaction"}, carrier.seen)
	})
}

// contextStore notes what it finds attached.
type contextStore struct {
	idempotency.Store
	seen []string
}

func (s *contextStore) note(ctx context.Context, method string) {
	if e, ok := idempotency.FromContext(ctx); ok {
		s.seen = append(s.seen, fmt.Sprint(method, " ", e.Attachment()))
	}
	if _, ok := ctx.Deadline(); !ok {
		s.seen = append(s.seen, method+" without a deadline")
	}
}

func (s *contextStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	s.note(ctx, "Complete")
	return s.Store.Complete(ctx, key, token, r)
}

func (s *contextStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	s.note(ctx, "Release")
	return s.Store.Release(ctx, key, token, keep)
}

// A store that goes down, or hands the key to someone else, after the response
// began to stream: the client must not take what it has for a whole answer.
func TestWithheldStreamIsAborted(t *testing.T) {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte("half"))
		w.(http.Flusher).Flush()
		store.Fail("Complete", idempotency.ErrLeaseLost)
	})
	require.PanicsWithValue(t, http.ErrAbortHandler, func() {
		c.Handler.ServeHTTP(httptest.NewRecorder(), c.Request(idemtest.Exchange{Key: "a"}))
	})
}

func newAEAD(t *testing.T, fill byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(bytes.Repeat([]byte{fill}, 32))
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	return aead
}

func TestAEAD(t *testing.T) {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	sealed := idemtest.NewClient(store, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil)
	sealed.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	sealed.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	require.NotContains(t, string(store.LastResult().Value), "charge")

	// A value that was moved to another cell is as bad as one that was forged.
	value := store.LastResult().Value
	sealed.Check(t, 2, idemtest.Exchange{Key: "b", Get: "201 charge 2"})
	moved := idempotency.NewMemoryStore()
	require.NoError(t, moved.Complete(t.Context(), store.LastKey(), "x", idempotency.Result{
		Fingerprint: store.LastResult().Fingerprint, Value: value, TTL: time.Hour,
	}))

	for name, c := range map[string]*idemtest.Client{
		"sealed under another key": idemtest.NewClient(store, &idempotency.Options{AEAD: newAEAD(t, 2)}, nil),
		"sealed, but no AEAD":      idemtest.NewClient(store, &idempotency.Options{}, nil),
	} {
		t.Run(name, func(t *testing.T) {
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
			require.Zero(t, c.Runs())
		})
	}
	t.Run("moved to another cell", func(t *testing.T) {
		c := idemtest.NewClient(moved, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "b", Get: "500 record_unreadable"})
	})
	t.Run("not sealed, but AEAD", func(t *testing.T) {
		plain := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		idemtest.NewClient(plain, &idempotency.Options{}, nil).Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		idemtest.NewClient(plain, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil).Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
	})
}

// A callback that panics after the handler finished must not make it run again.
func TestPanickingCallbacks(t *testing.T) {
	for name, row := range map[string]struct {
		opts idempotency.Options
		then string
	}{
		"ShouldStore":          {idempotency.Options{ShouldStore: func(int, http.Header) bool { panic("bug") }}, "replay 201 charge 1"},
		"OnEvent":              {idempotency.Options{OnEvent: func(context.Context, idempotency.Event) { panic("bug") }}, "replay 201 charge 1"},
		"ReplayHeader":         {idempotency.Options{ReplayHeader: func(string) bool { panic("bug") }}, "409 response_not_stored"},
		"AEAD":                 {idempotency.Options{AEAD: panickingAEAD{}}, "409 response_not_stored"},
		"ReplayHeader, sealed": {idempotency.Options{AEAD: newAEAD(t, 1), ReplayHeader: func(string) bool { panic("bug") }}, "409 response_not_stored"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			row.opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
			store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
			c := idemtest.NewClient(store, &row.opts, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Some", "header")
				idemtest.Lasting(0)(w, r)
			})
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
			require.Contains(t, log.String(), "panic in")
			got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
			require.Equal(t, row.then, got)
			require.Equal(t, 1, c.Runs())
			if row.opts.AEAD != nil {
				require.NotContains(t, string(store.LastResult().Value), "charge")
			}
		})
	}
}

type panickingAEAD struct{ cipher.AEAD }

func (panickingAEAD) NonceSize() int { panic("bug") }

// Keys, tokens and bodies stay out of the log; the store's words stay in it.
func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "fine", Get: "201 charge 1"})
		c.Check(t, 1, idemtest.Exchange{Key: "fine", Get: "replay 201 charge 1"})
		require.Empty(t, log.String(), "warnings and errors only")
		store.Fail("Acquire", idemtest.ErrDown)
		c.Check(t, 2, idemtest.Exchange{Key: "private-key", Body: "private-body", Get: "503 store_unavailable"})
		require.Contains(t, log.String(), "secret-host")
		time.Sleep(time.Hour) // what goes on in the background ends
		require.NotContains(t, log.String(), "private")
	})
}

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add}, idemtest.Lasting(2*time.Second))
		r := c.Request(idemtest.Exchange{Key: "a"})
		c.Do(r)
		e := events.Last()
		require.Equal(t, idempotency.OutcomeExecuted, e.Outcome)
		require.Len(t, e.StoreKey, 27)
		require.Equal(t, 1, e.Attempt)
		require.Equal(t, 201, e.Status)
		require.Equal(t, 2*time.Second, e.Duration)
		require.Zero(t, e.Waited)
		require.NoError(t, e.Err)
		require.Same(t, r, e.Request)

		go c.Do(c.Request(idemtest.Exchange{Key: "b"}))
		synctest.Wait()
		time.Sleep(500 * time.Millisecond)
		c.Do(c.Request(idemtest.Exchange{Key: "b"}))
		e = events.Last()
		require.Equal(t, idempotency.OutcomeReplayed, e.Outcome)
		require.Equal(t, 1500*time.Millisecond, e.Waited)
		require.Zero(t, e.Attempt)

		c.Do(c.Request(idemtest.Exchange{})) // no key, no event
		c.Do(c.Request(idemtest.Exchange{Keys: []string{""}}))
		e = events.Last()
		require.Equal(t, idempotency.OutcomeKeyInvalid, e.Outcome)
		require.ErrorIs(t, e.Err, idempotency.ErrKeyInvalid)
		require.Len(t, events.All(), 4)
	})
}

func TestErrorBody(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, DocsURL: "https://docs.example/idempotency"}, nil)
	resp := c.Do(c.Request(idemtest.Exchange{}))
	require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
	require.Equal(t, "no-store", resp.Header.Get("Cache-Control"))
	require.Equal(t, "en", resp.Header.Get("Content-Language"))
	require.Equal(t, `<https://docs.example/idempotency>; rel="describedby"`, resp.Header.Get("Link"))
	got, p := idemtest.Describe(t, resp)
	require.Equal(t, "400 key_missing", got)
	require.Equal(t, "Idempotency-Key is missing", p.Title)
	require.Equal(t, "https://docs.example/idempotency", p.Type)

	var seen *idempotency.Error
	c = idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, ErrorHandler: func(w http.ResponseWriter, r *http.Request, err *idempotency.Error) {
		seen = err
		w.WriteHeader(http.StatusTeapot)
	}}, nil)
	require.Equal(t, http.StatusTeapot, c.Do(c.Request(idemtest.Exchange{})).StatusCode)
	require.ErrorIs(t, seen, idempotency.ErrKeyMissing)
	require.Equal(t, "about:blank", seen.Type)
}

func TestOptionsThatAreNonsense(t *testing.T) {
	for fix, opts := range map[string]idempotency.Options{
		"TTL is negative":                     {TTL: -1},
		"over 100 years":                      {TTL: math.MaxInt64},
		"MaxBufferedBody is negative or over": {MaxBufferedBody: math.MaxInt64},
		"Lease is under 1ms":                  {Lease: -1},
		"exceeds Options.TTL":                 {Lease: time.Hour, TTL: time.Minute},
		"use NoWait":                          {Wait: -2},
		"MaxExecution is negative":            {MaxExecution: -1},
		"StoreTimeout is negative":            {StoreTimeout: -1},
		"exceeds half of":                     {StoreTimeout: 20 * time.Second},
		"is not a header name":                {Header: "Idempotency Key"},
		"needs no idempotency key":            {Methods: []string{"POST", "GET"}},
		"upper-case":                          {Methods: []string{"post"}},
		"MaxBufferedBody is negative":         {MaxBufferedBody: -1},
		"MaxResponseBytes is negative":        {MaxResponseBytes: -1},
		"is not a URL":                        {DocsURL: "https://x/>"},
	} {
		t.Run(fix, func(t *testing.T) {
			defer func() { require.Contains(t, recover(), fix) }()
			idempotency.Middleware(idempotency.NewMemoryStore(), &opts)
		})
	}
	require.Panics(t, func() { idempotency.Middleware(nil, nil) })
	require.Panics(t, func() { idempotency.Middleware(idempotency.NewMemoryStore(), nil)(nil) })
}
