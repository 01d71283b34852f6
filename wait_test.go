package idempotency_test

import (
	"bytes"
	"context"
	"log/slog"
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
