package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

func TestTracing(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	api := newHandler(sdk.NewTracerProvider(sdk.WithSpanProcessor(spans)), nil)
	for range 2 {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/charge", nil)
		r.Header.Set("Idempotency-Key", "a")
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code)
	}
	ended := spans.Ended()
	require.Len(t, ended, 3, "the provider was called once")
	child, first, replay := ended[0], ended[1], ended[2]
	require.Equal(t, "call provider", child.Name())
	require.Equal(t, first.SpanContext().SpanID(), child.Parent().SpanID())

	get := func(span sdk.ReadOnlySpan, name string) string {
		set := attribute.NewSet(span.Attributes()...)
		value, _ := set.Value(attribute.Key(name))
		return value.Emit()
	}
	require.Equal(t, "executed", get(first, "idempotency.outcome"))
	require.Equal(t, "1", get(first, "idempotency.attempt"))
	require.Equal(t, "replayed", get(replay, "idempotency.outcome"))
	require.Equal(t, "true", get(replay, "idempotency.replayed"))
	require.Equal(t, get(first, "idempotency.store_key"), get(replay, "idempotency.store_key"))
	require.Empty(t, replay.Links())
}

// A run that panicked is an error.
func TestTracingMarksErrors(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	tracer := sdk.NewTracerProvider(sdk.WithSpanProcessor(spans)).Tracer("test")
	for outcome, want := range map[idempotency.Outcome]codes.Code{
		idempotency.OutcomePanicked: codes.Error, idempotency.OutcomeLeaseLost: codes.Error, idempotency.OutcomeReplayed: codes.Unset,
	} {
		ctx, span := tracer.Start(t.Context(), "request")
		traceEvent(ctx, idempotency.Event{Outcome: outcome})
		span.End()
		ended := spans.Ended()
		require.Equal(t, want, ended[len(ended)-1].Status().Code, outcome)
	}
}
