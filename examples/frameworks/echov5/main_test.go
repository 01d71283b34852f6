package main

import (
	"net/http"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/labstack/echo/v5"
	"github.com/stretchr/testify/require"
)

func TestReplay(t *testing.T) {
	e := newEcho(idempotency.Middleware(idempotency.NewMemoryStore(), nil))

	first := try.Post(t, e, "/charge", "k1")
	require.Equal(t, http.StatusCreated, first.Status)
	require.Equal(t, "/charges/1", first.Header.Get("Location"))
	try.Same(t, first, try.Post(t, e, "/charge", "k1"))
}

func TestErrorOfTheFramework(t *testing.T) {
	e := newEcho(idempotency.Middleware(idempotency.NewMemoryStore(), nil))

	first := try.Post(t, e, "/charge?card=declined", "k1")
	require.Equal(t, http.StatusPaymentRequired, first.Status)
	require.Contains(t, first.Body, "the card was declined")
	try.Same(t, first, try.Post(t, e, "/charge?card=declined", "k1"))
}

func TestUnavailableRunsAgain(t *testing.T) {
	once, runs := idempotency.Middleware(idempotency.NewMemoryStore(), nil), 0
	e := newEcho(once)
	e.POST("/down", func(*echo.Context) error { runs++; return echo.ErrServiceUnavailable },
		echo.WrapMiddleware(once), answerErrors)

	for range 2 {
		require.Equal(t, http.StatusServiceUnavailable, try.Post(t, e, "/down", "k1").Status)
	}
	require.Equal(t, 2, runs)
}

func TestPanicKeepsTheKey(t *testing.T) {
	once, runs := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: -1}), 0
	e := newEcho(once)
	e.POST("/panic", func(*echo.Context) error { runs++; panic("planned") }, echo.WrapMiddleware(once), answerErrors)

	require.Equal(t, http.StatusInternalServerError, try.Post(t, e, "/panic", "k1").Status)
	require.Equal(t, http.StatusConflict, try.Post(t, e, "/panic", "k1").Status)
	require.Equal(t, 1, runs)
}

func TestStream(t *testing.T) {
	once := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
	e := newEcho(once)
	e.POST("/stream", func(c *echo.Context) error {
		c.Response().WriteHeader(http.StatusOK)
		for _, part := range []string{"one ", "two"} {
			if _, err := c.Response().Write([]byte(part)); err != nil {
				return err
			}
			if err := http.NewResponseController(c.Response()).Flush(); err != nil {
				return err
			}
		}
		return nil
	}, echo.WrapMiddleware(once), answerErrors)

	first := try.Post(t, e, "/stream", "k1")
	require.Equal(t, "one two", first.Body)
	try.Same(t, first, try.Post(t, e, "/stream", "k1"))
}

// Without answerErrors the client gets the error and a retry an empty 200.
func TestWrongWithoutAnswerErrors(t *testing.T) {
	e := echo.New()
	e.POST("/charge", charge, echo.WrapMiddleware(idempotency.Middleware(idempotency.NewMemoryStore(), nil)))

	require.Equal(t, http.StatusPaymentRequired, try.Post(t, e, "/charge?card=declined", "k1").Status)
	retry := try.Post(t, e, "/charge?card=declined", "k1")
	require.Equal(t, http.StatusOK, retry.Status)
	require.Empty(t, retry.Body)
}
