// Command metrics counts requests with an idempotency key by their outcome, for
// Prometheus. The comment on newMetrics says which outcomes are worth an alert.
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

	"github.com/go-idempotency/idempotency"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// outcomes are those that alerts count.
var outcomes = []idempotency.Outcome{
	idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeKeyReused,
	idempotency.OutcomeStoreUnavailable, idempotency.OutcomeUnprotected, idempotency.OutcomeOutcomeUnknown,
	idempotency.OutcomeLeaseLost, idempotency.OutcomePanicked, idempotency.OutcomeRecordUnreadable,
}

// newMetrics registers the metrics and returns a function for Options.OnEvent.
//
// The label has few values: an outcome is one of sixteen. A label with a key, or
// with a path that has an id in it, would make a series for each request.
//
// Worth an alert:
//
//   - store_unavailable: requests are refused because the store is down;
//   - unprotected: handlers run without a claim because the store is down and
//     Options.FailOpen is set;
//   - lease_lost and panicked: a handler may have run in part, and the key may
//     run again;
//   - outcome_unknown: a person has to find out what the request came to;
//   - record_unreadable: this deployment cannot read what another one stored;
//   - a high share of replayed: clients time out too early, or the API is slow;
//   - key_reused: a client has a bug, or the service needs Options.Scope.
func newMetrics(reg prometheus.Registerer) func(context.Context, idempotency.Event) {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "idempotency_requests_total",
		Help: "Requests with an idempotency key, by outcome.",
	}, []string{"outcome"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "idempotency_request_duration_seconds",
		Help:    "Time in the middleware and the handler, by outcome.",
		Buckets: prometheus.DefBuckets,
	}, []string{"outcome"})
	waited := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "idempotency_wait_seconds",
		Help:    "Time that duplicates waited for the first request.",
		Buckets: prometheus.DefBuckets,
	})
	again := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "idempotency_repeated_attempts_total",
		Help: "Executions under a key that an earlier run died under, or freed.",
	})
	reg.MustRegister(requests, seconds, waited, again)
	// increase() sees no increase in a series that begins at 1, so the first
	// outcome_unknown of a process would raise no alert.
	for _, outcome := range outcomes {
		requests.WithLabelValues(string(outcome))
	}

	return func(_ context.Context, e idempotency.Event) {
		requests.WithLabelValues(string(e.Outcome)).Inc()
		seconds.WithLabelValues(string(e.Outcome)).Observe(e.Duration.Seconds())
		if e.Waited > 0 {
			waited.Observe(e.Waited.Seconds())
		}
		if e.Attempt > 1 {
			again.Inc()
		}
	}
}

func newHandler(background *idempotency.Background) http.Handler {
	reg := prometheus.NewRegistry()
	idempotent := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		OnEvent:    newMetrics(reg),
		Background: background,
	})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.Handle("POST /charge", idempotent(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.PostFormValue("amount") == "" {
			// Nothing was done, so the client may use the key again for a
			// request that is right.
			if e, ok := idempotency.FromContext(r.Context()); ok {
				e.Discard()
			}
			http.Error(w, "amount is missing", http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintln(w, "charged")
	})))
	return mux
}

func main() {
	fmt.Println(`Charge, retry, and look at the numbers:
  curl -i http://127.0.0.1:8080/charge -H 'Idempotency-Key: order-17' -d amount=100
  curl -s http://127.0.0.1:8080/metrics | grep requests_total`)
	background := new(idempotency.Background)
	srv := &http.Server{Addr: "127.0.0.1:8080", Handler: newHandler(background), ReadHeaderTimeout: 10 * time.Second}
	stopped := make(chan error, 1)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(interrupted, func() {
		stop() // a second interrupt ends the program at once
		stopped <- shutDown(background, srv)
	})
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	if err := <-stopped; err != nil {
		log.Fatal(err)
	}
}

// shutDown lets running requests finish, and then waits for what goes on after
// their answers: with a store that was away for a moment, responses that were
// sent and are not stored yet. By default Kubernetes kills a program that is
// still running 30 seconds after SIGTERM.
func shutDown(background *idempotency.Background, servers ...*http.Server) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for _, server := range servers {
		err = errors.Join(err, server.Shutdown(ctx))
	}
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(err, background.Wait(ctx))
}
