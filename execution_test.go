package idempotency_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// observe runs one request in virtual time and calls handler inside of it.
func observe(t *testing.T, store idempotency.Store, opts *idempotency.Options, handler http.HandlerFunc) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(store, opts, handler)
		c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		require.Equal(t, 1, c.Runs())
	})
}

func TestExecutionTellsTheHandlerWhatItIs(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		e := idemtest.Execution(r)
		require.Equal(t, "a", e.Key())
		require.Equal(t, 1, e.Attempt())
		require.Nil(t, e.Attachment())
		e.Attach(42)
		require.Equal(t, 42, e.Attachment())
	})
	c.Do(c.Request(idemtest.Exchange{Key: `"a"`}))
	require.Equal(t, 1, c.Runs())

	_, ok := idempotency.FromContext(t.Context())
	require.False(t, ok, "no key, no execution")
}

func TestDownstreamKey(t *testing.T) {
	keys := map[string]string{} // by request and name
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		e := idemtest.Execution(r)
		for _, name := range []string{"psp", "mail"} {
			id := r.URL.Path + e.Key() + name
			key := e.DownstreamKey(name)
			require.Regexp(t, regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`), key)
			if e.Attempt() > 1 {
				require.Equal(t, keys[id], key, "the same in every attempt, whatever the payload")
			}
			keys[id] = key
		}
		w.WriteHeader(503)
	})
	for _, x := range []idemtest.Exchange{{Key: "a"}, {Key: "a", Body: "other"}, {Key: "b"}, {Key: "a", Target: "/refund"}} {
		c.Do(c.Request(x))
	}
	distinct := map[string]bool{}
	for _, key := range keys {
		distinct[key] = true
	}
	require.Len(t, keys, 6)
	require.Len(t, distinct, 6)
}

// A deployment must not change the keys that were handed on before it.
func TestDownstreamKeyIsStableAcrossReleases(t *testing.T) {
	observe(t, idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, "87ca02e2-7a4e-8a57-8e63-96edad8b29f7", idemtest.Execution(r).DownstreamKey("psp"))
	})
}

type tenantKey struct{}

func TestHandlerContext(t *testing.T) {
	for name, row := range map[string]struct {
		opts      idempotency.Options
		cancelled bool
	}{
		"the client's cancellation is kept off": {},
		"CancelOnDisconnect":                    {opts: idempotency.Options{CancelOnDisconnect: true}, cancelled: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, hangUp := context.WithCancel(context.WithValue(t.Context(), tenantKey{}, "acme"))
				var inside context.Context
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &row.opts, func(w http.ResponseWriter, r *http.Request) {
					inside = r.Context()
					hangUp()
					synctest.Wait()
					require.Equal(t, row.cancelled, inside.Err() != nil)
					require.Equal(t, "acme", inside.Value(tenantKey{}))
					w.WriteHeader(http.StatusCreated)
				})
				c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
				require.Error(t, inside.Err(), "cancelled when the handler has returned")
				got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
				require.Equal(t, "replay 201 ", got, "the answer that nobody waited for was stored")
			})
		})
	}
}

func TestHandlerContextKeepsADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			_, ok := r.Context().Deadline()
			require.True(t, ok)
			<-r.Context().Done()
			require.ErrorIs(t, r.Context().Err(), context.DeadlineExceeded)
		})
		start := time.Now()
		c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		require.Equal(t, time.Minute, time.Since(start))
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

func TestCommitFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		var leaked *idempotency.Execution
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			leaked = idemtest.Execution(r)
			down := errors.New("down")
			store.Fail("Acquire", down)
			err := leaked.Commit(r.Context())
			require.ErrorIs(t, err, idempotency.ErrStoreUnavailable)
			require.ErrorIs(t, err, down)
			store.Fail("Acquire", nil)
			w.WriteHeader(http.StatusInternalServerError) // the handler decides: not done
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		require.Error(t, leaked.Commit(t.Context()), "after the handler returned")
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 "})
		require.Equal(t, 2, c.Runs())
	})
}

// A goroutine that the handler left behind must not go on to its effect when
// the key has been freed meanwhile.
func TestCommitThatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		hold, result := make(chan struct{}), make(chan error, 1)
		c := idemtest.NewClient(store, &idempotency.Options{Wait: idempotency.NoWait}, func(w http.ResponseWriter, r *http.Request) {
			e := idemtest.Execution(r)
			if e.Attempt() > 1 {
				return
			}
			store.Hang("Acquire", hold)
			go func() { result <- e.Commit(context.WithoutCancel(r.Context())) }()
			synctest.Wait()
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		close(hold)
		require.Error(t, <-result)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "200 "})

		var leaked *idempotency.Execution
		c = idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			leaked = idemtest.Execution(r)
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.Check(t, 2, idemtest.Exchange{Key: "b", Get: "500 "})
		time.Sleep(time.Minute) // the released marker is gone as well
		require.Error(t, leaked.Commit(t.Context()))
		c.Check(t, 3, idemtest.Exchange{Key: "b", Get: "500 "})
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

// A renewal says again that the key is at-most-once, in case that the store has
// lost the record.
func TestRenewalRepeatsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
			store.Replace(idempotency.NewMemoryStore())
			time.Sleep(15 * time.Second)
			panic("boom")
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "panic"})
		time.Sleep(time.Minute)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
		c.Check(t, 2, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
	})
}

// The client's cancellation affects no store call.
func TestCommitOutlivesTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore(), HonourContext: true}
		c := idemtest.NewClient(store, &idempotency.Options{CancelOnDisconnect: true}, nil)
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		require.Equal(t, http.StatusCreated, resp.StatusCode)
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

// Goexit ends the request's goroutine; the key is left to its lease.
func TestGoexitIsACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add, Wait: idempotency.NoWait},
			func(w http.ResponseWriter, r *http.Request) {
				if idemtest.Run(r) == 1 {
					runtime.Goexit()
				}
			})
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		}()
		<-done
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		time.Sleep(30 * time.Second)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "200 "})
		require.Equal(t, []string{"panicked 0", "in_progress 409", "executed 200"}, events.All())
	})
}

// The panic that the server sees is the one that the handler threw.
func TestPanicGoesOnUntouched(t *testing.T) {
	value := errors.New("boom")
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(http.ResponseWriter, *http.Request) { panicDeepInside(value) })
	defer func() {
		require.Equal(t, value, recover())
		stack := make([]byte, 1<<16)
		stack = stack[:runtime.Stack(stack, false)]
		require.Contains(t, string(stack), "panicDeepInside", "nobody recovered and panicked again")
	}()
	c.Handler.ServeHTTP(httptest.NewRecorder(), c.Request(idemtest.Exchange{Key: "a"}))
}

func panicDeepInside(v any) { panic(v) }

// A panicking handler leaves nothing of its response behind for an outer
// middleware that recovers.
func TestPanicLeavesTheWriterClean(t *testing.T) {
	w := httptest.NewRecorder()
	var kept http.ResponseWriter
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Secret", "half done")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte("half"))
		kept = w
		panic("boom")
	})
	require.Panics(t, func() { c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"})) })
	require.Error(t, http.NewResponseController(kept).Flush(), "a goroutine that the handler left behind")
	http.Error(w, "recovered", http.StatusInternalServerError)
	require.Equal(t, http.StatusInternalServerError, w.Code)
	require.Empty(t, w.Header().Get("X-Secret"))
	require.Equal(t, "recovered\n", w.Body.String())
}

func TestNestedMiddlewareRunsOnce(t *testing.T) {
	store := idempotency.NewMemoryStore()
	mw := idempotency.Middleware(store, nil)
	runs := 0
	h := mw(mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		runs++
		w.WriteHeader(http.StatusCreated)
	})))
	for range 2 {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("POST", "/charge", strings.NewReader("x"))
		r.Header.Set("Idempotency-Key", "a")
		h.ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code)
	}
	require.Equal(t, 1, runs)
}

// The request that outer middleware holds is not changed.
func TestRequestIsCopied(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("X-Seen", "yes")
		r.URL.Path = "/elsewhere"
		var b bytes.Buffer
		_, err := b.ReadFrom(r.Body)
		require.NoError(t, err)
		require.Equal(t, `{"amount":1}`, b.String())
	})
	r := c.Request(idemtest.Exchange{Key: "a"})
	body, ctx := r.Body, r.Context()
	c.Do(r)
	require.Equal(t, body, r.Body)
	require.Equal(t, ctx, r.Context())
}
