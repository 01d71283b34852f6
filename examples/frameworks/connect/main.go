// Command connect serves a Connect procedure that is safe to retry.
package main

import (
	"context"
	"errors"
	"log"
	"net/http"

	"connectrpc.com/connect"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/server"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func main() {
	background := new(idempotency.Background)
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		Background: background, ErrorHandler: writeError,
	})
	if err := server.Run("127.0.0.1:8080", newMux(once), background); err != nil {
		log.Fatal(err)
	}
}

// newMux puts the middleware around the handler of one procedure. Generated code
// returns a path and a handler for the whole service, which goes in its place.
// There is no connect.WithRecover: inside of the middleware it would turn a
// panic into an error, which frees the key.
func newMux(once func(http.Handler) http.Handler) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle(procedure, once(connect.NewUnaryHandler(procedure, charge)))
	return mux
}

// writeError answers what the middleware answers itself, a duplicate that is
// still running, say, as an error of the client's protocol. A problem of RFC 9457
// has only its HTTP status for these clients, of which 409 and 422 become Unknown
// and 400 becomes Internal.
func writeError(w http.ResponseWriter, r *http.Request, e *idempotency.Error) {
	code := connect.CodeFailedPrecondition // not to be tried again
	switch {
	case e.Retryable:
		code = connect.CodeUnavailable
	case e.Status == http.StatusBadRequest:
		code = connect.CodeInvalidArgument
	}
	if err := connect.NewErrorWriter().Write(w, r, connect.NewError(code, errors.New(e.Code+": "+e.Detail))); err != nil {
		log.Print(err)
	}
}

const procedure = "/shop.v1.Shop/Charge"

func charge(_ context.Context, r *connect.Request[wrapperspb.StringValue]) (*connect.Response[wrapperspb.StringValue], error) {
	switch r.Msg.GetValue() {
	case "declined":
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the card was declined"))
	case "down":
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("try again"))
	}
	response := connect.NewResponse(wrapperspb.String("charge 1"))
	response.Header().Set("Charge-Id", "1")
	return response, nil
}
