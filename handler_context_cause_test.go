package idempotency_test

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// The context of a handler is made when somebody asks for it. What happened
// before is not lost, with a deadline of the request's or without.
func TestHandlerContextTellsWhatHappenedBefore(t *testing.T) {
	for name, withDeadline := range map[string]bool{"with a deadline": true, "without one": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{}, nil)
				ctx := t.Context()
				if withDeadline {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, time.Hour)
					defer cancel()
				}
				handler := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					store.Fail("Acquire", errors.New("down"))
					time.Sleep(time.Minute) // the lease ends, and nobody listens
					require.ErrorIs(t, r.Context().Err(), context.Canceled)
					require.ErrorIs(t, context.Cause(r.Context()), idempotency.ErrLeaseLost)
					<-r.Context().Done()
					derived, cancel := context.WithCancel(r.Context())
					defer cancel()
					require.ErrorIs(t, context.Cause(derived), idempotency.ErrLeaseLost)
				})
				handler.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
				require.Equal(t, 1, handler.Runs())
			})
		})
	}
}

// Why a context ended is why it ended first.
func TestHandlerContextKeepsItsFirstCause(t *testing.T) {
	for name, listens := range map[string]bool{"somebody listens": true, "nobody listens": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opts := idempotency.Options{MaxExecution: 40 * time.Second}
				var inside context.Context
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
					inside = r.Context()
					if listens {
						<-inside.Done()
					}
					time.Sleep(5 * time.Minute) // longer than the lease as well
				})
				c.Do(c.Request(idemtest.Exchange{Key: "a"}))
				require.ErrorIs(t, context.Cause(inside), context.DeadlineExceeded)
				require.ErrorIs(t, inside.Err(), context.Canceled)
			})
		})
	}
}

// The cause reaches contexts that the handler has derived, whether the request
// has a deadline or not.
func TestHandlerContextPassesItsCauseOn(t *testing.T) {
	for name, timeout := range map[string]time.Duration{"with a deadline": time.Hour, "without one": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := t.Context()
				if timeout > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, timeout)
					defer cancel()
				}
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxExecution: time.Minute},
					func(w http.ResponseWriter, r *http.Request) {
						derived, cancel := context.WithCancel(r.Context())
						defer cancel()
						start := time.Now()
						<-derived.Done()
						require.Equal(t, time.Minute, time.Since(start))
						require.ErrorIs(t, context.Cause(derived), context.DeadlineExceeded)
						require.ErrorIs(t, derived.Err(), context.Canceled)
					})
				c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
				require.Equal(t, 1, c.Runs())
			})
		})
	}
}

// Two middlewares that a request meets under different keys protect both.
func TestNestedMiddlewareOfAnotherKey(t *testing.T) {
	var keys []string
	inner := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Header: "Inner-Key"}, func(w http.ResponseWriter, r *http.Request) {
		keys = append(keys, idemtest.Execution(r).Key())
		w.WriteHeader(http.StatusCreated)
	})
	outer := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, inner.Handler.ServeHTTP)
	for _, key := range []string{"a", "b"} {
		outer.Do(outer.Request(idemtest.Exchange{Key: key, Header: http.Header{"Inner-Key": {"inner"}}}))
	}
	require.Equal(t, []string{"inner"}, keys)
	require.Equal(t, 2, outer.Runs())
}
