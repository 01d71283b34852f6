package neighbours

import (
	"net/http"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// spansOf sends two requests with one key and returns the status codes of their
// spans. The handler begins a span of its own, which does not count.
func spansOf(t *testing.T, order func(s *shop, provider *trace.TracerProvider, charge http.Handler) http.Handler) (statuses []int64) {
	recorder := tracetest.NewSpanRecorder()
	provider := trace.NewTracerProvider(trace.WithSpanProcessor(recorder))
	s := newShop(idempotency.Options{})
	url := try.Serve(t, order(s, provider, s.charge()))
	first := post(t, url)
	require.Equal(t, http.StatusCreated, first.Status)
	try.Same(t, first, post(t, url))
	require.EqualValues(t, 1, s.runs.Load())
	for _, span := range recorder.Ended() {
		for _, attribute := range span.Attributes() {
			if attribute.Key == "http.response.status_code" {
				statuses = append(statuses, attribute.Value.AsInt64())
			}
		}
	}
	return statuses
}

// Outside, a replay has a span with the status that its client got.
func TestOtelhttpOutside(t *testing.T) {
	require.Equal(t, []int64{201, 201}, spansOf(t, func(s *shop, provider *trace.TracerProvider, charge http.Handler) http.Handler {
		return otelhttp.NewHandler(s.once(charge), "charge", otelhttp.WithTracerProvider(provider))
	}))
}

// Inside, there is a span for a run of the handler and none for a replay.
func TestOtelhttpInside(t *testing.T) {
	require.Equal(t, []int64{201}, spansOf(t, func(s *shop, provider *trace.TracerProvider, charge http.Handler) http.Handler {
		return s.once(otelhttp.NewHandler(charge, "charge", otelhttp.WithTracerProvider(provider)))
	}))
}

// Outside, the span of the server is the parent of what the handler begins.
func TestOtelhttpContextReachesTheHandler(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := trace.NewTracerProvider(trace.WithSpanProcessor(recorder))
	s := newShop(idempotency.Options{})
	url := try.Serve(t, otelhttp.NewHandler(s.once(s.counted(func(_ http.ResponseWriter, r *http.Request) {
		_, span := provider.Tracer("shop").Start(r.Context(), "psp")
		span.End()
	})), "charge", otelhttp.WithTracerProvider(provider)))
	post(t, url)

	spans := recorder.Ended()
	require.Len(t, spans, 2)
	require.Equal(t, "psp", spans[0].Name())
	require.Equal(t, spans[1].SpanContext().SpanID(), spans[0].Parent().SpanID())
}
