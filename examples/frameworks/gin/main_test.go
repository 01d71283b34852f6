package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/gin-gonic/gin"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/stretchr/testify/require"
)

func TestReplay(t *testing.T) {
	h := newHandler(newEngine(), idempotency.Middleware(idempotency.NewMemoryStore(), nil))

	first := try.Post(t, h, "/charge", "k1")
	require.Equal(t, http.StatusCreated, first.Status)
	require.Equal(t, "/charges/1", first.Header.Get("Location"))
	try.Same(t, first, try.Post(t, h, "/charge", "k1"))
}

func TestErrorOfTheFramework(t *testing.T) {
	h := newHandler(newEngine(), idempotency.Middleware(idempotency.NewMemoryStore(), nil))

	first := try.Post(t, h, "/charge?card=declined", "k1")
	require.Equal(t, http.StatusPaymentRequired, first.Status)
	try.Same(t, first, try.Post(t, h, "/charge?card=declined", "k1"))
}

// A status without a body goes out when gin's engine ends, inside of the
// middleware.
func TestBareStatus(t *testing.T) {
	engine := newEngine()
	engine.POST("/bare", func(c *gin.Context) { c.Status(http.StatusAccepted) })
	h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(engine)

	first := try.Post(t, h, "/bare", "k1")
	require.Equal(t, http.StatusAccepted, first.Status)
	try.Same(t, first, try.Post(t, h, "/bare", "k1"))
}

func TestPanicKeepsTheKey(t *testing.T) {
	runs := 0
	engine := newEngine()
	engine.POST("/panic", func(*gin.Context) { runs++; panic(http.ErrAbortHandler) })
	h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: -1})(engine)

	r := httptest.NewRequest(http.MethodPost, "/panic", nil)
	r.Header.Set("Idempotency-Key", "k1")
	require.Panics(t, func() { h.ServeHTTP(httptest.NewRecorder(), r) })
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	require.Equal(t, http.StatusConflict, w.Code)
	require.Equal(t, 1, runs)
}

func TestStream(t *testing.T) {
	engine := newEngine()
	engine.POST("/stream", func(c *gin.Context) {
		for _, part := range []string{"one ", "two"} {
			_, _ = c.Writer.WriteString(part)
			c.Writer.Flush()
		}
	})
	h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(engine)

	first := try.Post(t, h, "/stream", "k1")
	require.Equal(t, "one two", first.Body)
	try.Same(t, first, try.Post(t, h, "/stream", "k1"))
}

// A gin.Context is a context without the values of the request, so a handler
// finds no Execution in it, unless the engine is told to look there.
func TestContextOfGin(t *testing.T) {
	for _, fallback := range []bool{false, true} {
		engine := gin.New()
		engine.ContextWithFallback = fallback
		engine.POST("/charge", func(c *gin.Context) {
			_, inRequest := idempotency.FromContext(c.Request.Context())
			_, inGin := idempotency.FromContext(c)
			c.JSON(http.StatusOK, []bool{inRequest, inGin})
		})
		answer := try.Post(t, newHandler(engine, idempotency.Middleware(idempotency.NewMemoryStore(), nil)), "/charge", "k1")
		require.JSONEq(t, fmt.Sprintf("[true, %t]", fallback), answer.Body)
	}
}

// wrong is the adapter that is often seen: the handler writes to gin's own
// writer, around the middleware.
func wrong(once func(http.Handler) http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		once(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			c.Request = r
			c.Next()
		})).ServeHTTP(c.Writer, c.Request)
	}
}

func TestWrongWithNext(t *testing.T) {
	runs := 0
	engine := gin.New()
	engine.POST("/charge", wrong(idempotency.Middleware(idempotency.NewMemoryStore(), nil)), func(c *gin.Context) {
		runs++
		charge(c)
	})

	require.Equal(t, http.StatusCreated, try.Post(t, engine, "/charge", "k1").Status)
	retry := try.Post(t, engine, "/charge", "k1")
	require.Equal(t, http.StatusConflict, retry.Status)
	require.Contains(t, retry.Body, "response_not_stored")
	require.Equal(t, 2, runs, "without c.Abort gin runs the handler behind the refusal")
}
