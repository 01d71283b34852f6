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
	"github.com/stretchr/testify/require"
)

// observe runs one request in virtual time and calls handler inside of it.
func observe(t *testing.T, store idempotency.Store, opts *idempotency.Options, handler http.HandlerFunc) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newAPI(store, opts, handler)
		c.do(c.request(exchange{key: k("a")}))
		require.Equal(t, 1, c.runs())
	})
}

func TestExecutionTellsTheHandlerWhatItIs(t *testing.T) {
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		e := execution(r)
		require.Equal(t, "a", e.Key())
		require.Equal(t, 1, e.Attempt())
		require.Nil(t, e.Attachment())
		e.Attach(42)
		require.Equal(t, 42, e.Attachment())
	})
	c.do(c.request(exchange{key: k(`"a"`)}))
	require.Equal(t, 1, c.runs())

	_, ok := idempotency.FromContext(t.Context())
	require.False(t, ok, "no key, no execution")
}

func TestDownstreamKey(t *testing.T) {
	keys := map[string]string{} // by request and name
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		e := execution(r)
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
	for _, x := range []exchange{{key: k("a")}, {key: k("a"), body: "other"}, {key: k("b")}, {key: k("a"), target: "/refund"}} {
		c.do(c.request(x))
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
		require.Equal(t, "099e852d-ab35-8973-8c89-0be42cd77bb1", execution(r).DownstreamKey("psp"))
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
				c := newAPI(idempotency.NewMemoryStore(), &row.opts, func(w http.ResponseWriter, r *http.Request) {
					inside = r.Context()
					hangUp()
					synctest.Wait()
					require.Equal(t, row.cancelled, inside.Err() != nil)
					require.Equal(t, "acme", inside.Value(tenantKey{}))
					w.WriteHeader(http.StatusCreated)
				})
				c.do(c.request(exchange{key: k("a")}).WithContext(ctx))
				require.Error(t, inside.Err(), "cancelled when the handler has returned")
				got, _ := describe(t, c.do(c.request(exchange{key: k("a")})))
				require.Equal(t, "replay 201 ", got, "the answer that nobody waited for was stored")
			})
		})
	}
}

func TestHandlerContextKeepsADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			_, ok := r.Context().Deadline()
			require.True(t, ok)
			<-r.Context().Done()
			require.ErrorIs(t, r.Context().Err(), context.DeadlineExceeded)
		})
		start := time.Now()
		c.do(c.request(exchange{key: k("a")}).WithContext(ctx))
		require.Equal(t, time.Minute, time.Since(start))
	})
}

func TestLeaseIsRenewedWhileTheHandlerRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait}, lasting(9*time.Minute))
		var first sync.WaitGroup
		first.Go(func() { c.check(t, 0, exchange{key: k("a"), get: "201 charge 1"}) })
		for range 8 { // each time the first lease is long over
			time.Sleep(time.Minute)
			c.check(t, 1, exchange{key: k("a"), get: "409 in_progress"})
		}
		first.Wait()
		require.Equal(t, 1, c.runs())
	})
}

func TestMaxExecution(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := idempotency.NewMemoryStore()
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if execution(r).Attempt() > 1 {
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
		stuck.Go(func() { c.check(t, 0, exchange{key: k("a"), get: "409 in_progress"}) })
		time.Sleep(10*time.Minute + 29*time.Second)
		c.check(t, 1, exchange{key: k("a"), get: "200 "}) // takes over within its Wait
		stuck.Wait()
		c.check(t, 2, exchange{key: k("a"), get: "replay 200 "})
		require.Equal(t, 2, c.runs())
	})
}

func TestLateHandlerThatNobodyTookOverIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, lasting(time.Hour))
		c.check(t, 0, exchange{key: k("a"), get: "201 charge 1"})
		c.check(t, 1, exchange{key: k("a"), get: "replay 201 charge 1"})
	})
}

// stealing lets a test take a key over, as another process would.
func steal(t *testing.T, store idempotency.Store, storeKey string) {
	t.Helper()
	fault := store.(*faultyStore)
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
				store := &faultyStore{Store: idempotency.NewMemoryStore()}
				events := &eventLog{}
				c := newAPI(store, &idempotency.Options{OnEvent: events.add}, func(w http.ResponseWriter, r *http.Request) {
					// The store is out of reach until the lease is over, and comes
					// back with another owner.
					store.fail("Acquire", errors.New("down"))
					<-r.Context().Done()
					require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
					require.ErrorIs(t, execution(r).Commit(r.Context()), idempotency.ErrStoreUnavailable)
					store.fail("Acquire", nil)
					steal(t, store, store.lastKey())
					require.ErrorIs(t, execution(r).Commit(r.Context()), idempotency.ErrLeaseLost)
					handler(w)
				})
				start := time.Now()
				c.check(t, 0, exchange{key: k("a"), get: "409 in_progress"})
				require.Equal(t, 30*time.Second, time.Since(start), "counted from before the claim was sent")
				require.Equal(t, []string{"lease_lost 409"}, events.all())
			})
		})
	}
}

func TestRenewalNoticesAnotherOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			// Someone cleared the store, and the key was claimed anew.
			store.replace(idempotency.NewMemoryStore())
			_, err := store.inner().Acquire(r.Context(), store.lastKey(), idempotency.Claim{Token: "other", Lease: time.Hour, TTL: time.Hour})
			require.NoError(t, err)
			start := time.Now()
			<-r.Context().Done()
			require.Equal(t, 10*time.Second, time.Since(start), "at the next renewal")
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
		})
		c.check(t, 0, exchange{key: k("a"), get: "409 in_progress"})
	})
}

// A store that never answers must not hide that the lease is over.
func TestHangingRenewalDoesNotHideALostLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			release := make(chan struct{})
			store.hang("Acquire", release)
			start := time.Now()
			<-r.Context().Done()
			require.Equal(t, 30*time.Second, time.Since(start))
			require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
			close(release)
		})
		c.check(t, 0, exchange{key: k("a"), get: "409 outcome_unknown"})
	})
}

func TestRenewalSurvivesFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			for range 10 {
				store.fail("Acquire", errors.New("down"))
				time.Sleep(15 * time.Second) // misses a renewal
				store.fail("Acquire", nil)
				time.Sleep(15 * time.Second)
			}
			require.NoError(t, r.Context().Err())
			w.WriteHeader(http.StatusCreated)
		})
		c.check(t, 0, exchange{key: k("a"), get: "201 "})
	})
}

func TestCommitFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		var leaked *idempotency.Execution
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			leaked = execution(r)
			down := errors.New("down")
			store.fail("Acquire", down)
			err := leaked.Commit(r.Context())
			require.ErrorIs(t, err, idempotency.ErrStoreUnavailable)
			require.ErrorIs(t, err, down)
			store.fail("Acquire", nil)
			w.WriteHeader(http.StatusInternalServerError) // the handler decides: not done
		})
		c.check(t, 0, exchange{key: k("a"), get: "500 "})
		require.Error(t, leaked.Commit(t.Context()), "after the handler returned")
		c.check(t, 1, exchange{key: k("a"), get: "500 "})
		require.Equal(t, 2, c.runs())
	})
}

// A goroutine that the handler left behind must not go on to its effect when
// the key has been freed meanwhile.
func TestCommitThatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		hold, result := make(chan struct{}), make(chan error, 1)
		c := newAPI(store, &idempotency.Options{Wait: idempotency.NoWait}, func(w http.ResponseWriter, r *http.Request) {
			e := execution(r)
			if e.Attempt() > 1 {
				return
			}
			store.hang("Acquire", hold)
			go func() { result <- e.Commit(context.WithoutCancel(r.Context())) }()
			synctest.Wait()
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.check(t, 0, exchange{key: k("a"), get: "500 "})
		close(hold)
		require.Error(t, <-result)
		c.check(t, 1, exchange{key: k("a"), get: "200 "})

		var leaked *idempotency.Execution
		c = newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			leaked = execution(r)
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.check(t, 2, exchange{key: k("b"), get: "500 "})
		time.Sleep(time.Minute) // the released marker is gone as well
		require.Error(t, leaked.Commit(t.Context()))
		c.check(t, 3, exchange{key: k("b"), get: "500 "})
	})
}

// The lease is renewed until the store has the answer in its hands.
func TestLeaseIsRenewedWhileShouldStoreThinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := &idempotency.Options{Wait: idempotency.NoWait, ShouldStore: func(int, http.Header) bool {
			time.Sleep(time.Minute)
			return true
		}}
		c := newAPI(idempotency.NewMemoryStore(), opts, nil)
		var first sync.WaitGroup
		first.Go(func() { c.check(t, 0, exchange{key: k("a"), get: "201 charge 1"}) })
		time.Sleep(45 * time.Second)
		c.check(t, 1, exchange{key: k("a"), get: "409 in_progress"})
		first.Wait()
	})
}

// A renewal says again that the key is at-most-once, in case that the store has
// lost the record.
func TestRenewalRepeatsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			must(execution(r).Commit(r.Context()))
			store.replace(idempotency.NewMemoryStore())
			time.Sleep(15 * time.Second)
			panic("boom")
		})
		c.check(t, 0, exchange{key: k("a"), get: "panic"})
		time.Sleep(time.Minute)
		c.check(t, 1, exchange{key: k("a"), get: "409 outcome_unknown"})
		c.check(t, 2, exchange{key: k("a"), body: "other", get: "422 key_reused"})
	})
}

// The client's cancellation affects no store call.
func TestCommitOutlivesTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore(), honourContext: true}
		c := newAPI(store, &idempotency.Options{CancelOnDisconnect: true}, nil)
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		resp := c.do(c.request(exchange{key: k("a")}).WithContext(ctx))
		require.Equal(t, http.StatusCreated, resp.StatusCode)
		c.check(t, 1, exchange{key: k("a"), get: "replay 201 charge 1"})
	})
}

// Goexit ends the request's goroutine; the key is left to its lease.
func TestGoexitIsACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &eventLog{}
		c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.add, Wait: idempotency.NoWait},
			func(w http.ResponseWriter, r *http.Request) {
				if run(r) == 1 {
					runtime.Goexit()
				}
			})
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.do(c.request(exchange{key: k("a")}))
		}()
		<-done
		c.check(t, 1, exchange{key: k("a"), get: "409 in_progress"})
		time.Sleep(30 * time.Second)
		c.check(t, 2, exchange{key: k("a"), get: "200 "})
		require.Equal(t, []string{"panicked 0", "in_progress 409", "executed 200"}, events.all())
	})
}

// The panic that the server sees is the one that the handler threw.
func TestPanicGoesOnUntouched(t *testing.T) {
	value := errors.New("boom")
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(http.ResponseWriter, *http.Request) { panicDeepInside(value) })
	defer func() {
		require.Equal(t, value, recover())
		stack := make([]byte, 1<<16)
		stack = stack[:runtime.Stack(stack, false)]
		require.Contains(t, string(stack), "panicDeepInside", "nobody recovered and panicked again")
	}()
	c.handler.ServeHTTP(httptest.NewRecorder(), c.request(exchange{key: k("a")}))
}

func panicDeepInside(v any) { panic(v) }

// A panicking handler leaves nothing of its response behind for an outer
// middleware that recovers.
func TestPanicLeavesTheWriterClean(t *testing.T) {
	w := httptest.NewRecorder()
	var kept http.ResponseWriter
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Secret", "half done")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte("half"))
		kept = w
		panic("boom")
	})
	require.Panics(t, func() { c.handler.ServeHTTP(w, c.request(exchange{key: k("a")})) })
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
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("X-Seen", "yes")
		r.URL.Path = "/elsewhere"
		var b bytes.Buffer
		_, err := b.ReadFrom(r.Body)
		require.NoError(t, err)
		require.Equal(t, `{"amount":1}`, b.String())
	})
	r := c.request(exchange{key: k("a")})
	body, ctx := r.Body, r.Context()
	c.do(r)
	require.Equal(t, body, r.Body)
	require.Equal(t, ctx, r.Context())
}
