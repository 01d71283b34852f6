// Command tracing puts what the middleware did into the OpenTelemetry span and
// into one log line of each request, from Options.OnEvent alone.
package main

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// newOnEvent returns a function for Options.OnEvent. Its context is that of the
// request as the middleware got it, so the span is the one that outer middleware
// began. The span gets the store key, which is a hash. The client's key can be a
// secret, so neither the span nor the log line has it.
//
// A replay gets no link to the span of the first execution: the store keeps the
// response and not the trace. The store key is what both have in common. The
// library's own warnings have it too, under the same name store_key.
func newOnEvent(logger *slog.Logger) func(context.Context, idempotency.Event) {
	return func(ctx context.Context, e idempotency.Event) {
		span := trace.SpanFromContext(ctx)
		span.SetAttributes(
			attribute.String("idempotency.outcome", string(e.Outcome)),
			attribute.String("idempotency.store_key", e.StoreKey),
			attribute.Bool("idempotency.replayed", e.Outcome == idempotency.OutcomeReplayed),
		)
		if e.Attempt > 0 { // the handler ran
			span.SetAttributes(attribute.Int("idempotency.attempt", e.Attempt))
		}
		if e.Err != nil {
			span.RecordError(e.Err)
		}
		logger.LogAttrs(ctx, slog.LevelInfo, "request",
			slog.String("outcome", string(e.Outcome)), slog.String("store_key", e.StoreKey),
			slog.Int("attempt", e.Attempt), slog.Int("status", e.Status),
			slog.String("trace_id", span.SpanContext().TraceID().String()))
	}
}

// traced begins the span of a request. A service has otelhttp in its place, also
// outside of the idempotency middleware: a replay is a request too.
func traced(tracer trace.Tracer, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, span := tracer.Start(r.Context(), "POST /charge", trace.WithSpanKind(trace.SpanKindServer))
		defer span.End()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

func newHandler(tracer trace.Tracer, logger *slog.Logger, background *idempotency.Background) http.Handler {
	idempotent := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		OnEvent:    newOnEvent(logger),
		Logger:     logger,
		Background: background,
	})
	mux := http.NewServeMux()
	mux.Handle("POST /charge", traced(tracer, idempotent(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The handler's context has the span of the request as the parent.
		_, span := tracer.Start(r.Context(), "charge the card")
		defer span.End()
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintln(w, "charged")
	}))))
	return mux
}

func main() {
	exporter, err := stdouttrace.New(stdouttrace.WithPrettyPrint())
	if err != nil {
		log.Fatal(err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))
	background := new(idempotency.Background)
	handler := newHandler(provider.Tracer("charges"), slog.New(slog.NewJSONHandler(os.Stderr, nil)), background)
	srv := &http.Server{Addr: "127.0.0.1:8080", Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		fmt.Println("curl -i http://127.0.0.1:8080/charge -H 'Idempotency-Key: order-17' -d amount=100")
		log.Println(srv.ListenAndServe())
		stop()
	}()
	<-interrupted.Done()
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	for _, end := range []func(context.Context) error{srv.Shutdown, background.Wait, provider.Shutdown} {
		if err := end(ctx); err != nil {
			log.Println(err)
		}
	}
}
