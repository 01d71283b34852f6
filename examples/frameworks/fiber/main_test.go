package main

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/stretchr/testify/require"
)

func middleware() func(http.Handler) http.Handler {
	return idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})
}

// serve serves app with fiber's own server, and returns its URL.
func serve(t *testing.T, app *fiber.App) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- app.Listener(listener, fiber.ListenConfig{DisableStartupMessage: true}) }()
	t.Cleanup(func() {
		require.NoError(t, app.Shutdown())
		require.NoError(t, <-served)
	})
	return "http://" + listener.Addr().String()
}

func post(t *testing.T, url, key string) try.Answer { return try.Send(t, try.Request(t, url, key)) }

func TestReplay(t *testing.T) {
	url := serve(t, newApp(middleware())) + "/charge"

	first := post(t, url, "k1")
	require.Equal(t, http.StatusCreated, first.Status)
	require.Equal(t, "/charges/1", first.Header.Get("Location"))
	require.Equal(t, "application/json; charset=utf-8", first.Header.Get("Content-Type"))
	require.JSONEq(t, `{"charge":"1"}`, first.Body)
	try.Same(t, first, post(t, url, "k1"))
	require.False(t, post(t, url, "k2").Replayed)
}

func TestErrorOfTheFramework(t *testing.T) {
	url := serve(t, newApp(middleware())) + "/charge?card=declined"

	first := post(t, url, "k1")
	require.Equal(t, http.StatusPaymentRequired, first.Status)
	require.Equal(t, "the card was declined", first.Body)
	try.Same(t, first, post(t, url, "k1"))
}

func TestUnavailableRunsAgain(t *testing.T) {
	once, runs := middleware(), 0
	app := newApp(once)
	app.Post("/down", idempotent(once), func(fiber.Ctx) error { runs++; return fiber.ErrServiceUnavailable })
	url := serve(t, app) + "/down"

	for range 2 {
		require.Equal(t, http.StatusServiceUnavailable, post(t, url, "k1").Status)
	}
	require.Equal(t, 2, runs)
}

func TestPanicKeepsTheKey(t *testing.T) {
	once, runs := middleware(), 0
	app := newApp(once)
	app.Post("/panic", idempotent(once), func(fiber.Ctx) error { runs++; panic("planned") })
	url := serve(t, app) + "/panic"

	require.Equal(t, http.StatusInternalServerError, post(t, url, "k1").Status)
	require.Equal(t, http.StatusConflict, post(t, url, "k1").Status)
	require.Equal(t, 1, runs)
}

func TestStream(t *testing.T) {
	once := middleware()
	app := newApp(once)
	app.Post("/stream", idempotent(once), func(c fiber.Ctx) error {
		return c.SendStreamWriter(func(w *bufio.Writer) {
			for _, part := range []string{"one ", "two"} {
				_, _ = w.WriteString(part)
				_ = w.Flush()
			}
		})
	})
	url := serve(t, app) + "/stream"

	first := post(t, url, "k1")
	require.Equal(t, "one two", first.Body)
	try.Same(t, first, post(t, url, "k1"))
}

// A body over MaxBufferedBody counts as far as the middleware has read it.
func TestLargeBody(t *testing.T) {
	once, runs := middleware(), 0
	app := newApp(once)
	app.Post("/upload", idempotent(once), func(c fiber.Ctx) error {
		runs++
		return c.SendString(strconv.Itoa(len(c.Body())))
	})
	url := serve(t, app) + "/upload"
	upload := func(body string) try.Answer {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
		require.NoError(t, err)
		r.Header.Set("Idempotency-Key", "k1")
		return try.Send(t, r)
	}
	large := strings.Repeat("a", 2<<20)

	first := upload(large)
	require.Equal(t, strconv.Itoa(2<<20), first.Body)
	try.Same(t, first, upload(large))
	require.Equal(t, http.StatusUnprocessableEntity, upload(large+"b").Status)
	require.Equal(t, http.StatusUnprocessableEntity, upload("b"+large).Status)
	require.Equal(t, 1, runs)
}

// What fiber's middleware outside sets is that of the current request, and what
// it puts into the context is there for Scope and the handler.
func TestMiddlewareOutside(t *testing.T) {
	type user struct{}
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		Scope: func(r *http.Request) string { return r.Context().Value(user{}).(string) },
	})
	app, requests := fiber.New(), 0
	app.Use(func(c fiber.Ctx) error {
		requests++
		c.Set("X-Request-Id", strconv.Itoa(requests))
		c.SetContext(context.WithValue(c.Context(), user{}, c.Get("X-User")))
		return c.Next()
	})
	app.Post("/charge", idempotent(once), func(c fiber.Ctx) error {
		e, _ := idempotency.FromContext(c.Context())
		c.Cookie(&fiber.Cookie{Name: "a", Value: "1"})
		return c.SendString(c.Context().Value(user{}).(string) + " " + e.Key() + " " + e.DownstreamKey("psp"))
	})
	url := serve(t, app) + "/charge"
	as := func(name string) try.Answer { return try.Send(t, try.Request(t, url, "k1", "X-User", name)) }

	first, retry, other := as("alice"), as("alice"), as("bob")
	require.Contains(t, first.Body, "alice k1 ")
	require.Equal(t, []string{"1"}, first.Header.Values("X-Request-Id"))
	require.True(t, retry.Replayed)
	require.Equal(t, first.Body, retry.Body)
	require.Equal(t, []string{"2"}, retry.Header.Values("X-Request-Id"))
	require.NotEmpty(t, first.Header.Get("Set-Cookie"))
	require.Empty(t, retry.Header.Get("Set-Cookie"))
	require.False(t, other.Replayed)
	require.Contains(t, other.Body, "bob k1 ")
}

// A fiber.Ctx is a context without the values of the request, so a handler finds
// its Execution in c.Context() alone.
func TestContextOfFiber(t *testing.T) {
	app, once := fiber.New(), middleware()
	app.Post("/charge", idempotent(once), func(c fiber.Ctx) error {
		_, inRequest := idempotency.FromContext(c.Context())
		_, inFiber := idempotency.FromContext(c)
		return c.JSON([]bool{inRequest, inFiber})
	})
	require.JSONEq(t, "[true, false]", post(t, serve(t, app)+"/charge", "k1").Body)
}

// Duplicates at the same time run the handler once.
func TestDuplicatesAtOnce(t *testing.T) {
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: time.Minute})
	var runs atomic.Int32
	app := newApp(once)
	app.Post("/count", idempotent(once), func(c fiber.Ctx) error {
		return c.SendString(strconv.Itoa(int(runs.Add(1))))
	})
	url := serve(t, app) + "/count"

	t.Run("all", func(t *testing.T) {
		for range 8 {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				require.Equal(t, "1", post(t, url, "k1").Body)
			})
		}
	})
	require.EqualValues(t, 1, runs.Load())
}

// A handler of net/http needs no more than the adaptor.
func TestHandlerOfNetHTTP(t *testing.T) {
	app, runs := fiber.New(), 0
	app.Post("/charge", adaptor.HTTPHandler(middleware()(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		runs++
		http.Error(w, "the card was declined", http.StatusPaymentRequired)
	}))))
	url := serve(t, app) + "/charge"

	first := post(t, url, "k1")
	require.Equal(t, http.StatusPaymentRequired, first.Status)
	try.Same(t, first, post(t, url, "k1"))
	require.Equal(t, 1, runs)
}

// adaptor.HTTPMiddleware runs the handler when the middleware has returned. An
// empty 200 is stored before the handler starts: a duplicate gets it while the
// handler runs, and a retry gets it whatever the handler answered.
func TestWrongWithHTTPMiddleware(t *testing.T) {
	app := fiber.New()
	var during try.Answer
	var url string
	app.Post("/charge", adaptor.HTTPMiddleware(middleware()), func(c fiber.Ctx) error {
		during = post(t, url, "k1")
		return charge(c)
	})
	url = serve(t, app) + "/charge?card=declined"

	require.Equal(t, http.StatusPaymentRequired, post(t, url, "k1").Status)
	for _, answer := range []try.Answer{during, post(t, url, "k1")} {
		require.True(t, answer.Replayed)
		require.Equal(t, http.StatusOK, answer.Status)
		require.Empty(t, answer.Body)
	}
}
