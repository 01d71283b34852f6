package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A program that stops waits for its store, and no longer: not for the pause of
// five seconds that a retry is in by then.
func TestWaitEndsSoonAfterTheOutage(t *testing.T) {
	for name, status := range map[string]int{"a response": http.StatusCreated, "a key": http.StatusInternalServerError} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, background := time.Now(), new(idempotency.Background)
				s := downFor(start, 25*time.Second)
				c := idemtest.NewClient(s, &idempotency.Options{Background: background, Wait: idempotency.NoWait}, idemtest.Answering(status))
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: fmt.Sprint(status, " ")})
				time.Sleep(20*time.Second - time.Since(start))
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
				require.NoError(t, background.Wait(t.Context()))
				took := time.Since(start)
				require.GreaterOrEqual(t, took, 25*time.Second)
				require.Less(t, took, 25*time.Second+250*time.Millisecond)
				if status == http.StatusCreated {
					c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 "})
				} else {
					c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "500 "})
				}
			})
		})
	}
}

// When the store is back already, Wait does not sit out the rest of a pause.
func TestWaitTriesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		background := new(idempotency.Background)
		var up atomic.Bool
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if !up.Load() {
				return idemtest.ErrDown
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		c := idemtest.NewClient(s, &idempotency.Options{Background: background}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		time.Sleep(12 * time.Second)
		for tries := s.Completed.Load(); s.Completed.Load() == tries; { // until a pause of 2.5s to 5s has just begun
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		up.Store(true)
		waits := time.Now()
		require.NoError(t, background.Wait(t.Context()))
		require.LessOrEqual(t, time.Since(waits), 50*time.Millisecond)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

// Nothing to wait for is no error, even when there is no time.
func TestWaitForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var background idempotency.Background
		over, cancel := context.WithCancel(t.Context())
		cancel()
		require.NoError(t, background.Wait(over))
		c := idemtest.NewClient(anyStore{idempotency.NewMemoryStore()}, &idempotency.Options{Background: &background}, idemtest.PanicOnce)
		for i, get := range []string{"panic", "201 attempt 2", "replay 201 attempt 2", "422 key_reused"} {
			x := idemtest.Exchange{Key: "a", Get: get}
			if i == 1 {
				time.Sleep(time.Minute) // the lease of the handler that panicked is over
			}
			if i == 3 {
				x.Body = "another"
			}
			c.Check(t, i, x)
			require.NoError(t, background.Wait(over), get)
		}
	})
}

// A handler goes on when http.TimeoutHandler has answered in its place, and when
// Shutdown has given up. Neither is lost.
func TestWaitForHandlers(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"that answer": idemtest.Lasting(7 * time.Second),
		"that panic":  func(http.ResponseWriter, *http.Request) { time.Sleep(7 * time.Second); panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, background := time.Now(), new(idempotency.Background)
				c := idemtest.NewClient(anyStore{idempotency.NewMemoryStore()}, &idempotency.Options{Background: background}, handler)
				w := httptest.NewRecorder()
				http.TimeoutHandler(c.Handler, time.Second, "").ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
				require.Equal(t, http.StatusServiceUnavailable, w.Code)

				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				err := background.Wait(ctx)
				require.ErrorIs(t, err, context.DeadlineExceeded)
				require.EqualError(t, err, "1 requests running, 0 responses not stored, 0 keys not freed: context deadline exceeded")

				require.NoError(t, background.Wait(t.Context()))
				require.Equal(t, 7*time.Second, time.Since(start))
				if name == "that answer" {
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
				}
			})
		})
	}
}

// From the handler to its response that waits to be stored there is no gap in
// which Wait would see neither.
func TestWaitForAHandlerWhoseResponseIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, background := time.Now(), new(idempotency.Background)
		c := idemtest.NewClient(downFor(start, 10*time.Second), &idempotency.Options{Background: background}, idemtest.Lasting(3*time.Second))
		go c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		synctest.Wait()
		require.NoError(t, background.Wait(t.Context()))
		require.GreaterOrEqual(t, time.Since(start), 10*time.Second)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

// storeKeys keeps the store keys of the lines that have message.
type storeKeys struct {
	message string

	mu   sync.Mutex // guards keys
	keys []string
}

func (*storeKeys) Enabled(context.Context, slog.Level) bool { return true }
func (k *storeKeys) WithAttrs([]slog.Attr) slog.Handler     { return k }
func (k *storeKeys) WithGroup(string) slog.Handler          { return k }
func (k *storeKeys) Handle(_ context.Context, r slog.Record) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if strings.HasPrefix(r.Message, k.message) {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "store_key" {
				k.keys = append(k.keys, a.Value.String())
			}
			return true
		})
	}
	return nil
}

// When the store stays away, Wait ends with its context. It says how much is
// left, of all middlewares that share the Background, and the log names each
// response. All of it goes on, and Wait may be called again.
func TestWaitGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, background, calls := time.Now(), new(idempotency.Background), atomic.Int64{}
		s := &idemtest.ObservedStore{Store: downFor(start, time.Minute), Look: func(context.Context, string) { calls.Add(1) }}
		log, events := &storeKeys{message: "idempotency: a response is not stored yet"}, new(idemtest.EventLog)
		opts := &idempotency.Options{Background: background, Logger: slog.New(log), OnEvent: events.Add}
		charge := idemtest.NewClient(s, opts, idemtest.Answering(201))
		busy := idemtest.NewClient(s, opts, idemtest.Answering(429))
		for i := range 2 {
			charge.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Get: "201 "})
		}
		for i := range 3 {
			busy.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Target: "/busy", Get: "429 "})
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, errors.New("no time"))
		defer cancel()
		err := background.Wait(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualError(t, err, "0 requests running, 2 responses not stored, 3 keys not freed: context deadline exceeded")
		var unstored []string
		for _, e := range events.Events()[:2] {
			unstored = append(unstored, e.StoreKey)
		}
		require.ElementsMatch(t, unstored, log.keys)

		// A program that does not exit spares its store again.
		time.Sleep(5 * time.Second)
		calls.Store(0)
		time.Sleep(10 * time.Second)
		require.Less(t, calls.Load(), int64(100), "a pause of 0.2s at most would make 250")

		require.NoError(t, background.Wait(t.Context()))
		require.Less(t, time.Since(start), time.Minute+250*time.Millisecond)
		charge.Check(t, 9, idemtest.Exchange{Key: "0", Get: "replay 201 "})
	})
}

// Several may wait while work begins and ends, and while a try is on its way.
// Each retry makes one try at a time.
func TestWaitByMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const requests, waiters = 40, 5
		start, background := time.Now(), new(idempotency.Background)
		var trying sync.Map
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if c.Attempt > 0 && time.Since(start) < 20*time.Second {
				return idempotency.Record{}, idemtest.ErrDown
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			_, twice := trying.LoadOrStore(key, true)
			require.False(t, twice, "two tries at once")
			defer trying.Delete(key)
			time.Sleep(100 * time.Millisecond)
			if time.Since(start) < 20*time.Second {
				return idemtest.ErrDown
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		c := idemtest.NewClient(s, &idempotency.Options{Background: background}, nil)
		var requested, waited sync.WaitGroup
		for i := range requests {
			requested.Go(func() {
				time.Sleep(time.Duration(i) * 300 * time.Millisecond)
				c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprint(i)}))
			})
		}
		for i := range waiters {
			waited.Go(func() {
				time.Sleep(time.Duration(i) * 2 * time.Second)
				if err := background.Wait(t.Context()); i > 0 && err != nil {
					panic(err)
				}
				if i > 0 && time.Since(start) < 20*time.Second {
					panic("too early")
				}
			})
		}
		requested.Wait()
		waited.Wait()
		require.Less(t, time.Since(start), 21*time.Second)
		require.Equal(t, requests, c.Runs())
		for i := range requests {
			resp := c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprint(i)}))
			got, _ := idemtest.Describe(t, resp)
			require.True(t, strings.HasPrefix(got, "replay 201 charge "), got)
		}
	})
}

// A store that is up and refuses a response would take a small record in its
// place before the lease ends. The program exits before that, so the small record
// is stored while Wait waits.
func TestWaitForAResponseThatTheStoreRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		background := new(idempotency.Background)
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			if len(r.Value) > 1000 {
				return errors.New("the item is too large")
			}
			return s.MemoryStore.Complete(ctx, key, token, r)
		}
		large := strings.Repeat("large ", 500)
		c := idemtest.NewClient(s, &idempotency.Options{Background: background}, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, large)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 " + large})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.NoError(t, background.Wait(ctx))
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 200})
		time.Sleep(time.Minute)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 200})
	})
}

// The responses that wait to be stored take a bounded amount of memory. A handler
// whose response has no room does not run again, and the log says so. What was
// stored makes room again.
func TestUnstoredResponsesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const mib, bound, requests = 1 << 20, 64, 70
		store := &idemtest.FaultyStore{Store: anyStore{&idempotency.MemoryStore{MaxBytes: 1 << 30}}}
		log := &storeKeys{message: "idempotency: a response is not kept"}
		large := make([]byte, mib-1000) // with its headers less than 1 MiB
		c := idemtest.NewClient(store, &idempotency.Options{Logger: slog.New(log)}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = w.Write(large)
		})
		for round := range 2 {
			store.Fail("Complete", idemtest.ErrDown)
			for i := range requests {
				c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprintf("%d-%d", round, i)}))
				time.Sleep(time.Millisecond)
			}
			store.Fail("Complete", nil)
			time.Sleep(10 * time.Second)
			for i := range requests {
				resp := c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprintf("%d-%d", round, i)}))
				want := http.StatusOK
				if i >= bound {
					want = http.StatusConflict
				}
				require.Equal(t, want, resp.StatusCode, i)
			}
			require.Len(t, log.keys, (round+1)*(requests-bound))
		}
		require.Equal(t, 2*requests, c.Runs())
	})
}
