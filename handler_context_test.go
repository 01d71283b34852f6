package idempotency_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// forgetfulStore lets everything run and keeps nothing.
type forgetfulStore struct{}

func (forgetfulStore) Acquire(context.Context, string, idempotency.Claim) (idempotency.Record, error) {
	return idempotency.Record{State: idempotency.Acquired, Attempt: 1}, nil
}

func (forgetfulStore) Complete(context.Context, string, string, idempotency.Result) error { return nil }

func (forgetfulStore) Release(context.Context, string, string, time.Duration) error { return nil }

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

// A handler that asks late is told what came first.
func TestHandlerContextTellsTheFirstCause(t *testing.T) {
	for name, row := range map[string]struct {
		deadline time.Duration // of the request; the lease ends after 30s
		cause    error
	}{
		"the end of the lease": {deadline: 40 * time.Second, cause: idempotency.ErrLeaseLost},
		"the deadline":         {deadline: 20 * time.Second, cause: context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), row.deadline)
				defer cancel()
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
					store.Fail("Acquire", idemtest.ErrDown)
					time.Sleep(50 * time.Second)
					require.Equal(t, row.cause, context.Cause(r.Context()))
				})
				c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
				require.Equal(t, 1, c.Runs())
			})
		})
	}
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
