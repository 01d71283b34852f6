// Command fiber serves a route of fiber v3 that is safe to retry.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/gofiber/fiber/v3/middleware/recover"
	"github.com/valyala/fasthttp"
)

// newApp has recover outside, so that the key of a panic keeps its lease. Without
// a recover, the panic of a handler ends the program: the server of fiber has
// none.
func newApp(once func(http.Handler) http.Handler) *fiber.App {
	app := fiber.New()
	app.Use(recover.New())
	app.Post("/charge", idempotent(once), charge)
	return app
}

// idempotent makes middleware of fiber. What comes behind it runs inside of once,
// which adaptor.HTTPMiddleware does not do: that runs it when once has returned.
// The context of fiber is the context of the request, so that Options.Scope finds
// what fiber's middleware has put into it, and a handler its Execution. A handler
// of fiber does not read the body of r, of which only what was read counts when a
// retry is compared.
func idempotent(once func(http.Handler) http.Handler) fiber.Handler {
	return func(c fiber.Ctx) error {
		ctx := c.Context()
		defer c.SetContext(ctx)
		inside := once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // from memory
			c.SetContext(r.Context())
			answer(c, w)
		}))
		return adaptor.HTTPHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			inside.ServeHTTP(w, r.WithContext(ctx))
		}))(c)
	}
}

// answer has the handlers behind answer the request, errors included, and moves
// their answer to w. Headers that were set outside stay out of it: a replay has
// those of its own request. A body that is streamed reaches the client whole, at
// the end. One that breaks off is a crash, and is not kept.
func answer(c fiber.Ctx, w http.ResponseWriter) {
	outside := fasthttp.AcquireResponse()
	defer fasthttp.ReleaseResponse(outside)
	c.Response().CopyTo(outside)
	defer outside.CopyTo(c.Response())
	c.Response().Reset()
	err := c.Next()
	if err != nil {
		err = c.App().ErrorHandler(c, err)
	}
	if err != nil {
		_ = c.SendStatus(http.StatusInternalServerError) // as fiber does
	}
	for name, value := range c.Response().Header.All() {
		w.Header().Add(string(name), string(value))
	}
	w.WriteHeader(c.Response().StatusCode())
	if err := c.Response().BodyWriteTo(w); err != nil {
		panic(err)
	}
}

func charge(c fiber.Ctx) error {
	if c.Query("card") == "declined" {
		return fiber.NewError(http.StatusPaymentRequired, "the card was declined")
	}
	c.Set("Location", "/charges/1")
	return c.Status(http.StatusCreated).JSON(fiber.Map{"charge": "1"})
}

func main() {
	background := new(idempotency.Background)
	app := newApp(idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background}))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- app.Listen("127.0.0.1:8080") }()
	select {
	case err := <-failed:
		log.Print(err)
	case <-ctx.Done():
	}
	// Responses that are not stored yet come after the running requests.
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if err := errors.Join(app.ShutdownWithContext(limit), background.Wait(limit)); err != nil {
		log.Print(err)
	}
}
