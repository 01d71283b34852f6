package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// protocols are those of Connect's client.
var protocols = []struct {
	name    string
	options []connect.ClientOption
}{
	{"Connect", nil},
	{"gRPC", []connect.ClientOption{connect.WithGRPC()}},
	{"gRPC-Web", []connect.ClientOption{connect.WithGRPCWeb()}},
}

// A shop is a server and a client of it. It counts the runs.
type shop struct {
	client *connect.Client[wrapperspb.StringValue, wrapperspb.StringValue]
	key    string
	runs   int
	during func() // the next run
}

func newShop(t *testing.T, options ...connect.ClientOption) *shop {
	s := &shop{key: "k1"}
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		Wait: idempotency.NoWait, RequireKey: true, ErrorHandler: writeError,
	})
	server := httptest.NewUnstartedServer(newMux(func(next http.Handler) http.Handler {
		return once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.runs++
			if s.during != nil {
				s.during()
			}
			next.ServeHTTP(w, r)
		}))
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	s.client = connect.NewClient[wrapperspb.StringValue, wrapperspb.StringValue](server.Client(), server.URL+procedure, options...)
	return s
}

func (s *shop) charge(ctx context.Context, card string) (*connect.Response[wrapperspb.StringValue], error) {
	r := connect.NewRequest(wrapperspb.String(card))
	r.Header().Set("Idempotency-Key", s.key)
	return s.client.CallUnary(ctx, r)
}

func TestReplay(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			s := newShop(t, p.options...)
			for i := range 2 {
				answer, err := s.charge(t.Context(), "good")
				require.NoError(t, err)
				require.Equal(t, "charge 1", answer.Msg.GetValue())
				require.Equal(t, "1", answer.Header().Get("Charge-Id"))
				require.Equal(t, i == 1, answer.Header().Get("Idempotent-Replayed") == "true")
			}
			require.Equal(t, 1, s.runs)
		})
	}
}

func TestFinalErrorIsReplayed(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			s := newShop(t, p.options...)
			for range 2 {
				_, err := s.charge(t.Context(), "declined")
				require.Equal(t, connect.CodeFailedPrecondition, connect.CodeOf(err))
				require.ErrorContains(t, err, "the card was declined")
			}
			require.Equal(t, 1, s.runs)
		})
	}
}

// A unary error is in the HTTP status (Connect), in the trailers (gRPC) or in the
// header (gRPC-Web, whose body is empty then), so the middleware sees it.
func TestUnavailableRunsAgain(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			s := newShop(t, p.options...)
			for range 2 {
				_, err := s.charge(t.Context(), "down")
				require.Equal(t, connect.CodeUnavailable, connect.CodeOf(err))
			}
			require.Equal(t, 2, s.runs)
		})
	}
}

// Answers of the middleware's own have a code of the client's protocol.
func TestErrorsOfTheMiddleware(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			s := newShop(t, p.options...)
			_, err := s.charge(t.Context(), "good")
			require.NoError(t, err)
			_, err = s.charge(t.Context(), "another")
			require.Equal(t, connect.CodeFailedPrecondition, connect.CodeOf(err))
			require.ErrorContains(t, err, "key_reused: ")
			_, err = s.client.CallUnary(t.Context(), connect.NewRequest(wrapperspb.String("good")))
			require.Equal(t, connect.CodeInvalidArgument, connect.CodeOf(err))
			require.ErrorContains(t, err, "key_missing: ")

			s.during = func() {
				s.during = nil
				_, err := s.charge(t.Context(), "good")
				require.Equal(t, connect.CodeUnavailable, connect.CodeOf(err))
				require.ErrorContains(t, err, "in_progress: ")
			}
			s.key = "k2"
			_, err = s.charge(t.Context(), "good")
			require.NoError(t, err)
			require.Equal(t, 2, s.runs)
		})
	}
}

// The key of a panic keeps its lease, unless connect.WithRecover makes an error
// of it inside of the middleware. Then a retry runs.
func TestPanic(t *testing.T) {
	recovers := connect.WithRecover(func(context.Context, connect.Spec, http.Header, any) error {
		return connect.NewError(connect.CodeInternal, errors.New("a bug"))
	})
	for name, options := range map[string][]connect.HandlerOption{"without WithRecover": nil, "with WithRecover": {recovers}} {
		t.Run(name, func(t *testing.T) {
			runs := 0
			h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: -1})(connect.NewUnaryHandler(procedure,
				func(context.Context, *connect.Request[wrapperspb.StringValue]) (*connect.Response[wrapperspb.StringValue], error) {
					runs++
					panic("planned")
				}, options...))
			post := func() int {
				r := httptest.NewRequest(http.MethodPost, procedure, strings.NewReader(`"good"`))
				r.Header.Set("Content-Type", "application/json")
				r.Header.Set("Idempotency-Key", "k1")
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				return w.Code
			}
			if options == nil {
				require.PanicsWithValue(t, "planned", func() { post() })
				require.Equal(t, http.StatusConflict, post())
				require.Equal(t, 1, runs)
				return
			}
			require.Equal(t, http.StatusInternalServerError, post())
			require.Equal(t, http.StatusInternalServerError, post())
			require.Equal(t, 2, runs)
		})
	}
}
