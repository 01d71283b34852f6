package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// Who polls for long still learns within a second that the key has changed, and
// does not ask much more often than that.
func TestPollingStaysPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lasts, duplicates = 5 * time.Minute, 10
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()} // cannot watch
		c := idemtest.NewClient(store, &idempotency.Options{Wait: time.Hour}, idemtest.Lasting(lasts))
		start := time.Now()
		var all sync.WaitGroup
		all.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		for i := range duplicates {
			all.Go(func() {
				c.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
				if late := time.Since(start) - lasts; late > time.Second {
					t.Errorf("duplicate %d was answered %v late", i, late)
				}
			})
		}
		all.Wait()
		// Half a second apart at least, but for the first few and the renewals.
		require.Less(t, store.Count("Acquire"), duplicates*(10+2*int(lasts/time.Second)))
	})
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

func TestClientThatHangsUpWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), idemtest.Lasting(time.Minute))
		go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		synctest.Wait()
		ctx, hangUp := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, hangUp)
		start := time.Now()
		got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx)))
		require.Equal(t, "409 in_progress", got)
		require.Equal(t, time.Second, time.Since(start))
		time.Sleep(time.Minute) // the first ends
	})
}

// A Watch that panics is one that fails: the duplicate polls.
func TestWatchPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(panickingWatch{anyStore{idempotency.NewMemoryStore()}}, &idempotency.Options{}, idemtest.Lasting(time.Second))
		go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		synctest.Wait()
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

type panickingWatch struct{ idempotency.Store }

func (panickingWatch) Watch(context.Context, string) (<-chan struct{}, error) { panic("nil map") }

// A waiter whose store cannot watch polls, and says so once.
func TestWatchThatFailsIsLogged(t *testing.T) {
	for reason, watch := range map[string]func() (<-chan struct{}, error){
		idemtest.ErrDown.Error():  func() (<-chan struct{}, error) { return nil, idemtest.ErrDown },
		"store panicked: nil map": func() (<-chan struct{}, error) { panic("nil map") },
	} {
		t.Run(reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				s := &fakeWatcher{FaultyStore: &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}, watch: watch}
				c := idemtest.NewClient(s, &idempotency.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, idemtest.Lasting(2*time.Second))
				go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				synctest.Wait()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
				require.Equal(t, 1, strings.Count(log.String(), "watching a key failed"), log.String())
				require.Contains(t, log.String(), reason)
			})
		})
	}
}

// What changed between the first question and the watch is not missed.
func TestWatchThatBeginsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := lateWatch{idempotency.NewMemoryStore()}
		c := idemtest.NewClient(s, &idempotency.Options{}, idemtest.Lasting(time.Second))
		var first sync.WaitGroup
		first.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1", Took: 2 * time.Second})
		first.Wait()
	})
}

// lateWatch takes its time to watch.
type lateWatch struct{ *idempotency.MemoryStore }

func (s lateWatch) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	time.Sleep(2 * time.Second)
	return s.MemoryStore.Watch(ctx, key)
}

// As many duplicates wait as MaxWaiting says. One more is answered at once, and
// each that leaves makes a place: with its answer, because its client has gone,
// or because it panicked.
func TestMaxWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		logger := slog.New(slog.DiscardHandler)
		opts := &idempotency.Options{MaxWaiting: 2, Wait: time.Hour, OnEvent: events.Add, Logger: logger}
		c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, idemtest.Lasting(time.Minute))
		var all sync.WaitGroup
		for key, get := range map[string]string{"a": "201 charge", "b": "201 charge"} {
			all.Go(func() {
				got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: key})))
				require.Contains(t, got, get)
			})
		}
		synctest.Wait()
		ctx, hangUp := context.WithCancel(t.Context())
		all.Go(func() { c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx)) })
		all.Go(func() {
			got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "b"})))
			require.Contains(t, got, "replay 201")
		})
		synctest.Wait()

		// The duplicates of all keys count together.
		refused := c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		require.Equal(t, "1", refused.Header.Get("Retry-After"))
		got, problem := idemtest.Describe(t, refused)
		require.Equal(t, "409 in_progress", got)
		require.True(t, problem.Retryable)
		require.ErrorIs(t, events.Last().Err, idempotency.ErrInProgress)
		require.ErrorContains(t, events.Last().Err, "MaxWaiting")
		require.Zero(t, events.Last().Waited)
		c.Check(t, 0, idemtest.Exchange{Key: "c", Body: "first of its key", Get: "201 charge 3", Took: time.Minute})
		all.Wait()

		hangUp()
		require.Equal(t, 3, c.Runs())
	})
}

// A place is free again however a wait ends, and before the handler of a
// duplicate that got the key starts.
func TestPlaceOfADuplicateIsFreedHoweverItsWaitEnds(t *testing.T) {
	for name, row := range map[string]struct {
		opts idempotency.Options
		wait func(c *idemtest.Client, r *http.Request)
	}{
		"its client hangs up": {wait: func(c *idemtest.Client, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), time.Second)
			defer cancel()
			c.Do(r.WithContext(ctx))
		}},
		"its Wait is over": {
			opts: idempotency.Options{Wait: time.Second},
			wait: func(c *idemtest.Client, r *http.Request) { c.Do(r) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				events := &idemtest.EventLog{}
				row.opts.MaxWaiting, row.opts.OnEvent = 1, events.Add
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &row.opts, idemtest.Lasting(time.Minute))
				go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				synctest.Wait()
				for range 3 {
					row.wait(c, c.Request(idemtest.Exchange{Key: "a"}))
				}
				for _, e := range events.Events() {
					require.NotContains(t, fmt.Sprint(e.Err), "MaxWaiting")
				}
				time.Sleep(time.Minute) // the first ends
			})
		})
	}
	t.Run("it gets the key", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := &idempotency.Options{MaxWaiting: 1, Wait: time.Hour, Lease: time.Second}
			c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, func(w http.ResponseWriter, r *http.Request) {
				if idemtest.Run(r) == 2 {
					time.Sleep(time.Minute)
				}
				idemtest.PanicOnce(w, r)
			})
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
			var all sync.WaitGroup
			all.Go(func() { c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 attempt 2"}) })
			time.Sleep(2 * time.Second) // its handler runs
			c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 attempt 2"})
			all.Wait()
		})
	})
}

// The middlewares of two routes have a limit each.
func TestMaxWaitingOfTwoMiddlewares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, opts := idempotency.NewMemoryStore(), &idempotency.Options{MaxWaiting: 1}
		var all sync.WaitGroup
		for range 2 {
			c := idemtest.NewClient(store, opts, idemtest.Lasting(time.Second))
			key := fmt.Sprintf("%p", c)
			all.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: key, Get: "201 charge 1"}) })
			synctest.Wait()
			all.Go(func() { c.Check(t, 1, idemtest.Exchange{Key: key, Get: "replay 201 charge 1"}) })
		}
		all.Wait()
	})
}
