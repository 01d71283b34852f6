package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
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
	require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: `"a"`})), "the handler panicked")
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

// The context of a handler, and whatever is derived from it, ends for the first
// of the reasons to end, and says so from then on: whether the handler listened
// at the time or asks later, with a deadline of the request's or without.
func TestHandlerContextTellsItsFirstCause(t *testing.T) {
	for name, row := range map[string]struct {
		deadline   time.Duration // of the request; 0: none
		opts       idempotency.Options
		down       bool // the store, so that the lease ends
		after      time.Duration
		cause, err error
	}{
		"the lease":                     {down: true, after: 30 * time.Second, cause: idempotency.ErrLeaseLost, err: context.Canceled},
		"the lease before the deadline": {deadline: 40 * time.Second, down: true, after: 30 * time.Second, cause: idempotency.ErrLeaseLost, err: context.Canceled},
		"the deadline before the lease": {deadline: 20 * time.Second, down: true, after: 20 * time.Second, cause: context.DeadlineExceeded, err: context.DeadlineExceeded},
		"MaxExecution": {opts: idempotency.Options{MaxExecution: 40 * time.Second},
			after: 40 * time.Second, cause: context.DeadlineExceeded, err: context.Canceled},
		"MaxExecution before the deadline": {deadline: time.Hour, opts: idempotency.Options{MaxExecution: 40 * time.Second},
			after: 40 * time.Second, cause: context.DeadlineExceeded, err: context.Canceled},
	} {
		for _, asks := range []time.Duration{0, 5 * time.Minute} {
			t.Run(fmt.Sprint(name, ", asked after ", asks), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var inside context.Context
					store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
					c := idemtest.NewClient(store, &row.opts, func(_ http.ResponseWriter, r *http.Request) {
						inside = r.Context()
						if row.down {
							store.Fail("Acquire", idemtest.ErrDown)
						}
						start := time.Now()
						time.Sleep(asks)
						_, ok := r.Context().Deadline()
						require.Equal(t, row.deadline > 0, ok)
						derived, cancel := context.WithCancel(r.Context())
						defer cancel()
						<-derived.Done()
						require.Equal(t, max(asks, row.after), time.Since(start))
						time.Sleep(5 * time.Minute) // for the other reasons to end
						for _, ctx := range []context.Context{r.Context(), derived} {
							require.Equal(t, row.err, ctx.Err())
							require.ErrorIs(t, context.Cause(ctx), row.cause)
						}
					})
					ctx := t.Context()
					if row.deadline > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, row.deadline)
						defer cancel()
					}
					c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
					require.Equal(t, 1, c.Runs())
					require.ErrorIs(t, context.Cause(inside), row.cause)
				})
			})
		}
	}
}

// A server that stops cancels its BaseContext with a cause, and then its
// handlers are told. A client that hangs up leaves the cause at
// context.Canceled, wrapped by outer middleware or not. The first of them
// counts: what comes after a hang-up cannot be seen.
func TestHandlerContextEndsWithTheServer(t *testing.T) {
	errStopping := errors.New("the server stops")
	hungUp := fmt.Errorf("client gone: %w", context.Canceled)
	for name, row := range map[string]struct {
		cancelled []error // the causes, one after the other
		deadline  time.Duration
		opts      idempotency.Options
		cause     error // nil: the handler goes on
	}{
		"the server stops":                       {cancelled: []error{errStopping}, cause: errStopping},
		"the server stops before the deadline":   {cancelled: []error{errStopping}, deadline: time.Hour, cause: errStopping},
		"the server stops for lack of time":      {cancelled: []error{context.DeadlineExceeded}, cause: context.DeadlineExceeded},
		"the client hangs up":                    {cancelled: []error{nil}},
		"outer middleware says who hung up":      {cancelled: []error{hungUp}},
		"the client hangs up before the server":  {cancelled: []error{nil, errStopping}},
		"the server stops before the client":     {cancelled: []error{errStopping, nil}, cause: errStopping},
		"the client counts":                      {cancelled: []error{hungUp}, opts: idempotency.Options{CancelOnDisconnect: true}, cause: hungUp},
		"the server counts, and the client does": {cancelled: []error{errStopping}, opts: idempotency.Options{CancelOnDisconnect: true}, cause: errStopping},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", asked late ", late), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					request, cancel := context.WithCancelCause(context.Background())
					if row.deadline > 0 {
						var stop context.CancelFunc
						request, stop = context.WithTimeout(request, row.deadline)
						defer stop()
					}
					h := idempotency.Middleware(idempotency.NewMemoryStore(), &row.opts)(http.HandlerFunc(
						func(w http.ResponseWriter, r *http.Request) {
							ctx := r.Context()
							if !late {
								require.NoError(t, ctx.Err())
							}
							for _, cause := range row.cancelled {
								cancel(cause)
								synctest.Wait()
							}
							derived, stop := context.WithCancel(ctx)
							defer stop()
							for _, ctx := range []context.Context{ctx, derived} {
								require.Equal(t, row.cause, context.Cause(ctx))
								require.Equal(t, row.cause != nil, ctx.Err() != nil)
								require.Equal(t, row.cause != nil, isDone(ctx))
							}
							w.WriteHeader(http.StatusCreated)
						}))
					w := httptest.NewRecorder()
					h.ServeHTTP(w, new(idemtest.Client).Request(idemtest.Exchange{Key: "a"}).WithContext(request))
					require.Equal(t, http.StatusCreated, w.Code)
				})
			})
		}
	}
}

// isDone reports whether the channel of ctx says that it has ended.
func isDone(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return true
	default:
		return false
	}
}

// What came first counts, also for a handler that asks when all have come.
func TestHandlerContextEndsForTheFirstReason(t *testing.T) {
	errStopping := errors.New("the server stops")
	for name, row := range map[string]struct {
		stops, deadline, execution time.Duration
		cause                      error
	}{
		"the server":    {stops: 1, deadline: 2, execution: 3, cause: errStopping},
		"the deadline":  {stops: 2, deadline: 1, execution: 3, cause: context.DeadlineExceeded},
		"MaxExecution":  {stops: 3, deadline: 2, execution: 1, cause: context.DeadlineExceeded},
		"no deadline":   {stops: 1, execution: 2, cause: errStopping},
		"not even then": {stops: 2, execution: 1, cause: context.DeadlineExceeded},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", asked late ", late), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					request, stop := context.WithCancelCause(context.Background())
					if row.deadline > 0 {
						var cancel context.CancelFunc
						request, cancel = context.WithTimeout(request, row.deadline*time.Minute)
						defer cancel()
					}
					time.AfterFunc(row.stops*time.Minute, func() { stop(errStopping) })
					h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{MaxExecution: row.execution * time.Minute})(
						http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							if !late {
								<-r.Context().Done()
								require.Equal(t, row.cause, context.Cause(r.Context()))
							}
							time.Sleep(5 * time.Minute)
							require.Equal(t, row.cause, context.Cause(r.Context()))
							w.WriteHeader(http.StatusCreated)
						}))
					w := httptest.NewRecorder()
					h.ServeHTTP(w, new(idemtest.Client).Request(idemtest.Exchange{Key: "a"}).WithContext(request))
					require.Equal(t, http.StatusCreated, w.Code)
				})
			})
		}
	}
}

// A handler whose client has hung up is still bound by its deadline.
func TestDeadlineOutlivesTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		request, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			require.NoError(t, r.Context().Err())
			cancel()
			<-r.Context().Done()
			require.Equal(t, time.Minute, time.Since(start))
			require.Equal(t, context.DeadlineExceeded, r.Context().Err())
			w.WriteHeader(http.StatusGatewayTimeout)
		})
		resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(request))
		require.Equal(t, http.StatusGatewayTimeout, resp.StatusCode)
	})
}

// A baseContext lives as long as its server, and counts who waits for its end.
type baseContext struct {
	context.Context
	registered atomic.Int64
}

// AfterFunc is what package context calls.
func (c *baseContext) AfterFunc(f func()) (stop func() bool) {
	c.registered.Add(1)
	stopFunc := context.AfterFunc(c.Context, f)
	return func() bool {
		c.registered.Add(-1)
		return stopFunc()
	}
}

// Value hides the context inside, so that package context calls AfterFunc.
func (c *baseContext) Value(any) any { return nil }

// However a handler ends, it leaves nothing behind on the context of the
// server, and a handler that does not look at its context registers nothing.
func TestNothingStaysRegisteredWithTheServer(t *testing.T) {
	for name, row := range map[string]struct {
		handler func(w http.ResponseWriter, r *http.Request)
		want    int64 // while the handler runs
	}{
		"looks at nothing": {func(_ http.ResponseWriter, r *http.Request) { _ = r.Context().Value(tenantKey{}) }, 0},
		"looks":            {func(_ http.ResponseWriter, r *http.Request) { _ = r.Context().Err() }, 1},
		"looks and fails": {func(w http.ResponseWriter, r *http.Request) {
			_ = r.Context().Err()
			w.WriteHeader(http.StatusInternalServerError)
		}, 1},
		"derives": {func(_ http.ResponseWriter, r *http.Request) {
			_, cancel := context.WithCancel(r.Context())
			t.Cleanup(cancel) // later than it should
		}, 1},
		"loses its lease": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 0},
	} {
		for _, panics := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", panics ", panics), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					server, stop := context.WithCancel(context.Background())
					defer stop()
					base := &baseContext{Context: server}
					var kept context.Context
					opts := &idempotency.Options{MaxExecution: time.Minute}
					c := &idemtest.Client{Handler: idempotency.Middleware(idempotency.NewMemoryStore(), opts)(
						http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							kept = r.Context()
							row.handler(w, r)
							require.Equal(t, row.want, base.registered.Load())
							if panics {
								panic("boom")
							}
						}))}
					resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(base))
					require.Equal(t, panics, resp == nil)
					require.Zero(t, base.registered.Load())
					require.Error(t, kept.Err(), "asked by a goroutine that the handler left behind")
					require.Zero(t, base.registered.Load())
				})
			})
		}
	}
}

// The end of the server and that of the lease come at once. One of them is the
// cause, for everyone who asks and for good.
func TestServerThatStopsWhileTheLeaseEnds(t *testing.T) {
	errStopping := errors.New("the server stops")
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			request, stop := context.WithCancelCause(t.Context())
			time.AfterFunc(time.Minute, func() { stop(errStopping) })
			var causes []error
			h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{MaxExecution: time.Minute})(
				http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					derived, cancel := context.WithCancel(r.Context())
					defer cancel()
					<-derived.Done()
					time.Sleep(time.Minute)
					causes = []error{context.Cause(r.Context()), context.Cause(derived)}
					w.WriteHeader(http.StatusServiceUnavailable)
				}))
			h.ServeHTTP(httptest.NewRecorder(), new(idemtest.Client).Request(idemtest.Exchange{Key: "a"}).WithContext(request))
			require.Contains(t, []error{errStopping, context.DeadlineExceeded}, causes[0])
			require.Equal(t, causes[0], causes[1])
		})
	}
}

// A server that has to stop tells its handlers by the cause of its BaseContext,
// or of the ConnContext of a connection, and Shutdown returns once they have
// answered. What a handler answers then decides about its key, as ever.
func TestShutdownOfAServerWhoseHandlerWaits(t *testing.T) {
	errStopping := errors.New("the server stops")
	for name, row := range map[string]struct {
		answer http.HandlerFunc
		first  int
		retry  string
	}{
		"answers that it was not done": {
			answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) },
			first:  http.StatusServiceUnavailable, retry: "200 again",
		},
		"returns without a word": {
			answer: func(http.ResponseWriter, *http.Request) {},
			first:  http.StatusConflict, retry: "409 outcome_unknown",
		},
	} {
		for _, ofConn := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", ConnContext ", ofConn), func(t *testing.T) {
				eachProto(t, func(t *testing.T, proto int) {
					store, started := idempotency.NewMemoryStore(), make(chan struct{})
					var cause error
					server := httptest.NewUnstartedServer(idempotency.Middleware(store, nil)(http.HandlerFunc(
						func(w http.ResponseWriter, r *http.Request) {
							close(started)
							<-r.Context().Done()
							cause = context.Cause(r.Context())
							row.answer(w, r)
						})))
					base, stop := context.WithCancelCause(context.Background())
					if ofConn {
						server.Config.ConnContext = func(context.Context, net.Conn) context.Context { return base }
					} else {
						server.Config.BaseContext = func(net.Listener) context.Context { return base }
					}
					server.EnableHTTP2 = proto == 2
					server.StartTLS()
					defer server.Close()

					status := make(chan int, 1)
					go func() {
						status <- postTo(server, context.Background())
					}()
					<-started
					down := make(chan error, 1)
					go func() { down <- server.Config.Shutdown(context.Background()) }()
					stop(errStopping)
					require.NoError(t, <-down)
					require.Equal(t, row.first, <-status)
					require.Equal(t, errStopping, cause)

					again := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
						_, _ = w.Write([]byte("again"))
					})
					again.Check(t, 0, idemtest.Exchange{Key: "a", Get: row.retry})
				})
			})
		}
	}
}

// postTo sends the request of key a and returns the status, or 0.
func postTo(server *httptest.Server, ctx context.Context) int {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/charge", strings.NewReader(`{"amount":1}`))
	idemtest.Must(err)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", "a")
	resp, err := server.Client().Do(r)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// net/http gives no cause to the hang-up of a client, by which the middleware
// knows it. The handler finishes and the retry gets its answer.
func TestHangUpOnTheWire(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		var outer context.Context
		started, ended := make(chan struct{}), make(chan error, 1)
		h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				_ = r.Context().Done() // it listens from here on
				close(started)
				<-outer.Done() // the client has hung up
				ended <- r.Context().Err()
				w.WriteHeader(http.StatusCreated)
			}))
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if outer == nil {
				outer = r.Context()
			}
			h.ServeHTTP(w, r)
		}))
		server.EnableHTTP2 = proto == 2
		server.StartTLS()
		defer server.Close()

		ctx, hangUp := context.WithCancel(context.Background())
		first := make(chan int, 1)
		go func() { first <- postTo(server, ctx) }()
		<-started
		hangUp()
		require.Zero(t, <-first)
		require.NoError(t, <-ended)
		require.Equal(t, context.Canceled, context.Cause(outer))
		require.Equal(t, http.StatusCreated, postTo(server, context.Background()))
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

// A heldReply keeps the answers to claims back while hold is not nil.
type heldReply struct {
	idempotency.Store
	hold chan struct{}
}

func (s *heldReply) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.Store.Acquire(ctx, key, c)
	if s.hold != nil {
		<-s.hold
	}
	return rec, err
}

// The store has marked the claim, but by the time that Commit knows it the
// handler has ended and freed the key: nothing must be promised any more.
func TestCommitWhoseReplyComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &heldReply{Store: idempotency.NewMemoryStore()}
		result := make(chan error, 1)
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if e := idemtest.Execution(r); e.Attempt() == 1 {
				store.hold = make(chan struct{})
				go func() { result <- e.Commit(context.WithoutCancel(r.Context())) }()
				synctest.Wait()
			}
			w.WriteHeader(http.StatusInternalServerError)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		close(store.hold)
		require.Error(t, <-result)
		store.hold = nil
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 "})
		require.Equal(t, 2, c.Runs())
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

// forgetfulStore lets everything run and keeps nothing.
type forgetfulStore struct{}

func (forgetfulStore) Acquire(context.Context, string, idempotency.Claim) (idempotency.Record, error) {
	return idempotency.Record{State: idempotency.Acquired, Attempt: 1}, nil
}

func (forgetfulStore) Complete(context.Context, string, string, idempotency.Result) error { return nil }
func (forgetfulStore) Release(context.Context, string, string, time.Duration) error       { return nil }

// What works on in the background with the values of its request must not keep
// the response in memory.
func TestKeptContextKeepsNoResponse(t *testing.T) {
	const requests, size = 20, 1 << 20
	body := []byte(strings.Repeat("x", size))
	var kept []context.Context
	h := idempotency.Middleware(forgetfulStore{}, nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kept = append(kept, context.WithoutCancel(r.Context()))
		w.WriteHeader(http.StatusCreated)
		_, err := w.Write(body)
		require.NoError(t, err)
	}))
	client := new(idemtest.Client)
	before := heap()
	for i := range requests {
		w := new(httptest.ResponseRecorder) // without a body, which the context may well keep
		h.ServeHTTP(w, client.Request(idemtest.Exchange{Key: fmt.Sprint(i)}))
		require.Equal(t, http.StatusCreated, w.Code)
	}
	require.Less(t, heap()-before, int64(requests*size/10))
	runtime.KeepAlive(kept)
}

// printingStore prints its contexts, as mocks do.
type printingStore struct {
	forgetfulStore
	printed *[]string
}

func (s printingStore) Complete(ctx context.Context, _, _ string, _ idempotency.Result) error {
	*s.printed = append(*s.printed, printed(ctx))
	return nil
}

// printed prints ctx while someone else uses it.
func printed(ctx context.Context) string {
	used := make(chan struct{})
	go func() {
		defer close(used)
		_, _ = ctx.Done(), ctx.Err()
	}()
	defer func() { <-used }()
	return fmt.Sprint(ctx)
}

// To print a context is no data race, and does not tell what is in it.
func TestContextsPrint(t *testing.T) {
	var all []string
	h := idempotency.Middleware(printingStore{printed: &all}, nil)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		all = append(all, printed(r.Context()))
	}))
	h.ServeHTTP(httptest.NewRecorder(), new(idemtest.Client).Request(idemtest.Exchange{Key: "a"}))
	require.Equal(t, "idempotency.handlerContext", all[0])
	require.Regexp(t, `^idempotency\.handlerContext\.WithoutCancel\.WithDeadline\([^()]*\)$`, all[1])
}

// Who asks a context for its end only when the handler has returned is told.
func TestContextAfterTheHandlerReturned(t *testing.T) {
	var kept context.Context
	// Not through idemtest.NewClient, whose handler derives a context and so asks.
	h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(
		func(_ http.ResponseWriter, r *http.Request) { kept = r.Context() }))
	h.ServeHTTP(httptest.NewRecorder(), new(idemtest.Client).Request(idemtest.Exchange{Key: "a"}))
	require.ErrorIs(t, kept.Err(), context.Canceled)
	<-kept.Done()
}

// A Commit that does not mark has failed; on a lost key it asks once.
func TestCommitThatDoesNotMark(t *testing.T) {
	for name, row := range map[string]struct {
		state idempotency.State
		want  error
		asked int64
	}{
		"the store never marks": {idempotency.Acquired, idempotency.ErrStoreUnavailable, 3},
		"the key is lost":       {idempotency.Lost, idempotency.ErrLeaseLost, 2},
	} {
		t.Run(name, func(t *testing.T) {
			s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
			s.OnAcquire = func(_ int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
				if c.Once {
					return idempotency.Record{State: row.state, Attempt: c.Attempt}, nil
				}
				return s.MemoryStore.Acquire(ctx, key, c)
			}
			var err error
			c := idemtest.NewClient(s, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
				err = idemtest.Execution(r).Commit(r.Context())
			})
			c.Do(c.Request(idemtest.Exchange{Key: "a"}))
			require.ErrorIs(t, err, row.want)
			require.Equal(t, row.asked, s.Acquired.Load())
		})
	}
}

// An execution that has ended asks the store for nothing.
func TestCommitAfterTheEnd(t *testing.T) {
	for name, end := range map[string]func(w http.ResponseWriter){
		"by panic":  func(http.ResponseWriter) { panic("boom") },
		"by return": func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) },
	} {
		t.Run(name, func(t *testing.T) {
			s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
			var leaked *idempotency.Execution
			c := idemtest.NewClient(s, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
				leaked = idemtest.Execution(r)
				end(w)
			})
			c.Do(c.Request(idemtest.Exchange{Key: "a"}))
			require.Error(t, leaked.Commit(t.Context()))
			require.Equal(t, 1, s.Count("Acquire"))
		})
	}
}

// Only FailOpen makes a run that does not hold its key.
func TestProtected(t *testing.T) {
	for _, down := range []bool{false, true} {
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		if down {
			s.Fail("Acquire", errors.New("down"))
		}
		var protected bool
		c := idemtest.NewClient(s, &idempotency.Options{FailOpen: true}, func(_ http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			protected = e.Protected()
		})
		require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
		require.Equal(t, !down, protected)
	}
}

// The context of the run does not end with one that the handler derives from it,
// and ends with the run, even if the handler panics.
func TestContextOfTheRun(t *testing.T) {
	for _, panics := range []bool{false, true} {
		var run context.Context
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithCancel(r.Context())
			cancel()
			e, _ := idempotency.FromContext(ctx)
			run = e.Context()
			require.NoError(t, run.Err())
			again, _ := idempotency.FromContext(run)
			require.Same(t, e, again)
			if panics {
				panic("crash")
			}
		})
		c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		require.ErrorIs(t, run.Err(), context.Canceled)
	}
}

func TestContextOfAnUnprotectedRun(t *testing.T) {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	store.Fail("Acquire", idemtest.ErrDown)
	c := idemtest.NewClient(store, &idempotency.Options{FailOpen: true}, func(_ http.ResponseWriter, r *http.Request) {
		e := idemtest.Execution(r)
		again, _ := idempotency.FromContext(e.Context())
		require.Same(t, e, again)
	})
	c.Do(c.Request(idemtest.Exchange{Key: "a"}))
	require.Equal(t, 1, c.Runs())
}
