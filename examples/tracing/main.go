// Command tracing puts what the middleware did on the span of each request, with
// OpenTelemetry. It prints the spans.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/go-idempotency/idempotency"
)

// traceEvent is an Options.OnEvent. Its context is that of the request, so the
// span is the one that otelhttp began outside. The store key joins the span with
// the log lines of the library, which name it store_key.
//
// A replay has no link to the span of the execution that it repeats: the record
// does not say which that was. Spans with one store key belong together.
func traceEvent(ctx context.Context, e idempotency.Event) {
	span := trace.SpanFromContext(ctx)
	span.SetAttributes(
		attribute.String("idempotency.outcome", string(e.Outcome)),
		attribute.String("idempotency.store_key", e.StoreKey),
		attribute.Bool("idempotency.replayed", e.Outcome == idempotency.OutcomeReplayed),
	)
	if e.Attempt > 0 { // the handler ran
		span.SetAttributes(attribute.Int("idempotency.attempt", e.Attempt))
	}
	if e.Waited > 0 {
		span.SetAttributes(attribute.Int64("idempotency.waited_ms", e.Waited.Milliseconds()))
	}
	switch e.Outcome {
	case idempotency.OutcomeStoreUnavailable, idempotency.OutcomeLeaseLost, idempotency.OutcomeRecordUnreadable,
		idempotency.OutcomePanicked:
		span.SetStatus(codes.Error, string(e.Outcome))
	}
}

// newHandler has otelhttp outside of the middleware, so that a replay has a span
// too. Spans that the handler begins are children of it: its context has the
// values of the request's.
func newHandler(provider trace.TracerProvider, background *idempotency.Background) http.Handler {
	tracer := provider.Tracer("charges")
	idempotent := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: traceEvent, Background: background})
	mux := http.NewServeMux()
	mux.Handle("POST /charge", idempotent(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, span := tracer.Start(r.Context(), "call provider")
		defer span.End()
		if e, ok := idempotency.FromContext(ctx); ok {
			span.SetAttributes(attribute.Int("idempotency.attempt", e.Attempt()))
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintln(w, "charged")
	})))
	return otelhttp.NewHandler(mux, "http", otelhttp.WithTracerProvider(provider))
}

func main() {
	exporter, err := stdouttrace.New()
	if err != nil {
		log.Fatal(err)
	}
	provider := sdk.NewTracerProvider(sdk.WithSyncer(exporter))
	background := new(idempotency.Background)
	srv := &http.Server{Addr: "127.0.0.1:8080", Handler: newHandler(provider, background), ReadHeaderTimeout: 10 * time.Second}
	fmt.Println(`Charge, retry, and look at the spans:
  curl -i http://127.0.0.1:8080/charge -H 'Idempotency-Key: order-17' -d amount=100`)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed := make(chan error, 1)
	go func() { failed <- srv.ListenAndServe() }()
	select {
	case err := <-failed:
		log.Print(err)
	case <-ctx.Done():
	}
	// Responses that are not stored yet come after the running requests, and the
	// spans of both come last.
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if err := errors.Join(srv.Shutdown(limit), background.Wait(limit), provider.Shutdown(limit)); err != nil {
		log.Print(err)
	}
}
