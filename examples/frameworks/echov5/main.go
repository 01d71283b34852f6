// Command echov5 serves a route of echo v5 that is safe to retry.
package main

import (
	"log"
	"net/http"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/server"
	"github.com/labstack/echo/v5"
	"github.com/labstack/echo/v5/middleware"
)

func main() {
	background := new(idempotency.Background)
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background})
	if err := server.Run("127.0.0.1:8080", newEcho(once), background); err != nil {
		log.Fatal(err)
	}
}

func newEcho(once func(http.Handler) http.Handler) *echo.Echo {
	e := echo.New()
	e.Use(middleware.Recover()) // outside, so that the key of a panic keeps its lease
	e.POST("/charge", charge, echo.WrapMiddleware(once), answerErrors)
	return e
}

// answerErrors answers the error of a handler while the middleware outside of it
// records. Echo itself answers an error when all middleware has returned, and
// then a retry would get an empty 200.
func answerErrors(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c *echo.Context) error {
		if err := next(c); err != nil {
			c.Echo().HTTPErrorHandler(c, err)
		}
		return nil
	}
}

func charge(c *echo.Context) error {
	if c.QueryParam("card") == "declined" {
		return echo.NewHTTPError(http.StatusPaymentRequired, "the card was declined")
	}
	c.Response().Header().Set("Location", "/charges/1")
	return c.JSON(http.StatusCreated, map[string]string{"charge": "1"})
}
