package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

func TestSpansAndLogLinesOfARetry(t *testing.T) {
	exporter := tracetest.NewInMemoryExporter()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter)).Tracer("test")
	var logged bytes.Buffer
	api := newHandler(tracer, slog.New(slog.NewJSONHandler(&logged, nil)), nil)
	for range 2 {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/charge", strings.NewReader("amount=1"))
		r.Header.Set("Idempotency-Key", "order-17")
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code)
	}

	spans := exporter.GetSpans()
	require.Len(t, spans, 3, "the handler's span, and two of requests")
	child, first, replay := spans[0], spans[1], spans[2]
	require.Equal(t, first.SpanContext.SpanID(), child.Parent.SpanID())
	require.Empty(t, replay.Links)
	require.NotEqual(t, first.SpanContext.TraceID(), replay.SpanContext.TraceID())

	of := func(span tracetest.SpanStub) map[attribute.Key]any {
		attributes := map[attribute.Key]any{}
		for _, a := range span.Attributes {
			attributes[a.Key] = a.Value.AsInterface()
		}
		return attributes
	}
	storeKey := of(first)["idempotency.store_key"]
	require.NotEmpty(t, storeKey)
	require.Equal(t, map[attribute.Key]any{
		"idempotency.outcome": "executed", "idempotency.store_key": storeKey,
		"idempotency.replayed": false, "idempotency.attempt": int64(1),
	}, of(first))
	require.Equal(t, map[attribute.Key]any{
		"idempotency.outcome": "replayed", "idempotency.store_key": storeKey, "idempotency.replayed": true,
	}, of(replay))

	require.NotContains(t, logged.String(), "order-17")
	lines := json.NewDecoder(&logged)
	for _, span := range []tracetest.SpanStub{first, replay} {
		var line map[string]any
		require.NoError(t, lines.Decode(&line))
		require.Equal(t, storeKey, line["store_key"])
		require.Equal(t, of(span)["idempotency.outcome"], line["outcome"])
		require.Equal(t, span.SpanContext.TraceID().String(), line["trace_id"])
	}
}
