package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/stretchr/testify/require"
)

// newMux has the operation of the program and one of the test, "POST /test".
func newMux(handler func(context.Context, *struct{}) (*huma.StreamResponse, error), middlewares func(once func(http.Handler) http.Handler) huma.Middlewares) *http.ServeMux {
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})
	mux := http.NewServeMux()
	api := humago.New(mux, huma.DefaultConfig("Shop", "1.0.0"))
	register(api, once)
	if handler != nil {
		huma.Register(api, huma.Operation{Method: http.MethodPost, Path: "/test", Middlewares: middlewares(once)}, handler)
	}
	return mux
}

// right is the middleware of the program.
func right(once func(http.Handler) http.Handler) huma.Middlewares {
	return huma.Middlewares{idempotent(once)}
}

func TestReplay(t *testing.T) {
	mux := newMux(nil, nil)

	first := try.Post(t, mux, "/charge", "k1")
	require.Equal(t, http.StatusCreated, first.Status)
	require.Equal(t, "/charges/1", first.Header.Get("Location"))
	require.Contains(t, first.Body, `"charge":"1"`)
	retry := try.Post(t, mux, "/charge", "k1")
	require.True(t, retry.Replayed)
	require.Equal(t, first.Status, retry.Status)
}

// Errors that a handler returns and errors of huma's validation are kept alike.
func TestErrorOfTheFramework(t *testing.T) {
	url := try.Serve(t, newMux(nil, nil))
	for card, status := range map[string]int{"declined": http.StatusPaymentRequired, "nonsense": http.StatusUnprocessableEntity} {
		first := try.Send(t, try.Request(t, url+"/charge?card="+card, card))
		require.Equal(t, status, first.Status)
		require.Equal(t, "application/problem+json", first.Header.Get("Content-Type"))
		try.Same(t, first, try.Send(t, try.Request(t, url+"/charge?card="+card, card)))
	}
}

func TestUnavailableRunsAgain(t *testing.T) {
	url := try.Serve(t, newMux(nil, nil))
	for range 2 {
		answer := try.Send(t, try.Request(t, url+"/charge?card=down", "k1"))
		require.Equal(t, http.StatusServiceUnavailable, answer.Status)
		require.False(t, answer.Replayed)
	}
}

// Huma has no recover of its own. The panic goes through the middleware, and the
// key keeps its lease.
func TestPanicKeepsTheKey(t *testing.T) {
	runs := 0
	mux := newMux(func(context.Context, *struct{}) (*huma.StreamResponse, error) { runs++; panic("planned") }, right)

	post := func() int {
		r, w := httptest.NewRequest(http.MethodPost, "/test", nil), httptest.NewRecorder()
		r.Header.Set("Idempotency-Key", "k1")
		mux.ServeHTTP(w, r)
		return w.Code
	}
	require.PanicsWithValue(t, "planned", func() { post() })
	require.Equal(t, http.StatusConflict, post())
	require.Equal(t, 1, runs)
}

func TestStream(t *testing.T) {
	url := try.Serve(t, newMux(func(context.Context, *struct{}) (*huma.StreamResponse, error) {
		return &huma.StreamResponse{Body: func(ctx huma.Context) {
			for _, part := range []string{"one ", "two"} {
				_, _ = ctx.BodyWriter().Write([]byte(part))
				ctx.BodyWriter().(http.Flusher).Flush()
			}
		}}, nil
	}, right))

	first := try.Send(t, try.Request(t, url+"/test", "k1"))
	require.Equal(t, "one two", first.Body)
	try.Same(t, first, try.Send(t, try.Request(t, url+"/test", "k1")))
}

// The handler finds its Execution.
func TestExecution(t *testing.T) {
	var key string
	mux := newMux(func(ctx context.Context, _ *struct{}) (*huma.StreamResponse, error) {
		if e, ok := idempotency.FromContext(ctx); ok {
			key = e.Key()
		}
		return nil, nil
	}, right)
	require.Less(t, try.Post(t, mux, "/test", "k1").Status, 300)
	require.Equal(t, "k1", key)
}

// With huma.WithContext the operation writes to the writer of the server, around
// the middleware. The Content-Type that huma sets gives that away. Retries of an
// answer without a header would get an empty 200.
func TestWrongWithContext(t *testing.T) {
	mux := newMux(func(context.Context, *struct{}) (*huma.StreamResponse, error) {
		return nil, huma.NewError(http.StatusPaymentRequired, "the card was declined")
	}, func(once func(http.Handler) http.Handler) huma.Middlewares {
		return huma.Middlewares{func(ctx huma.Context, next func(huma.Context)) {
			r, w := humago.Unwrap(ctx)
			once(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				next(huma.WithContext(ctx, r.Context()))
			})).ServeHTTP(w, r)
		}}
	})

	require.Equal(t, http.StatusPaymentRequired, try.Post(t, mux, "/test", "k1").Status)
	retry := try.Post(t, mux, "/test", "k1")
	require.Equal(t, http.StatusConflict, retry.Status)
	require.Contains(t, retry.Body, "response_not_stored")
}
