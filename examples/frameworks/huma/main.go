// Command huma serves a huma operation that is safe to retry.
package main

import (
	"context"
	"log"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/server"
)

func main() {
	background := new(idempotency.Background)
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background})
	mux := http.NewServeMux()
	register(humago.New(mux, huma.DefaultConfig("Shop", "1.0.0")), once)
	if err := server.Run("127.0.0.1:8080", mux, background); err != nil {
		log.Fatal(err)
	}
}

func register(api huma.API, once func(http.Handler) http.Handler) {
	huma.Register(api, huma.Operation{
		OperationID:   "charge",
		Method:        http.MethodPost,
		Path:          "/charge",
		DefaultStatus: http.StatusCreated,
		Middlewares:   huma.Middlewares{idempotent(once)},
	}, charge)
}

// idempotent makes a middleware of huma, for an operation or for an API. The
// operation gets a context that is made of the request and the writer of the
// middleware. With huma.WithContext it would write around the middleware.
// With chi, the package humachi has the same two functions.
func idempotent(once func(http.Handler) http.Handler) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		r, w := humago.Unwrap(ctx)
		once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next(humago.NewContext(ctx.Operation(), r, w))
		})).ServeHTTP(w, r.WithContext(ctx.Context()))
	}
}

// A chargeInput puts the header into the OpenAPI document as well.
type chargeInput struct {
	Key  string `header:"Idempotency-Key" maxLength:"255" doc:"The same for every try of one charge"`
	Card string `query:"card" enum:"good,declined,down" default:"good"`
}

type chargeOutput struct {
	Location string `header:"Location"`
	Body     struct {
		Charge string `json:"charge"`
	}
}

func charge(_ context.Context, in *chargeInput) (*chargeOutput, error) {
	switch in.Card {
	case "declined":
		return nil, huma.NewError(http.StatusPaymentRequired, "the card was declined")
	case "down":
		return nil, huma.Error503ServiceUnavailable("try again")
	}
	out := &chargeOutput{Location: "/charges/1"}
	out.Body.Charge = "1"
	return out, nil
}
