package idempotency_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A framework keeps the ResponseWriter of a handler, and answers through it
// when all middleware has returned, as echo does for an error or, behind its
// Recover, for a panic.
type framework struct {
	w http.ResponseWriter // of the handler, if it ran
}

type frameworkKey struct{}

func answering(answer func(w http.ResponseWriter)) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			f := new(framework)
			func() {
				defer func() { _ = recover() }()
				next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), frameworkKey{}, f)))
			}()
			if f.w != nil {
				answer(f.w)
			}
		})
	}
}

// fails is a handler that leaves its answer to the framework.
func fails(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Handler", "1")
	r.Context().Value(frameworkKey{}).(*framework).w = w
}

func decline(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusPaymentRequired)
	_, _ = w.Write([]byte(`{"message":"declined"}`))
}

// empty is the replay of a handler that wrote nothing itself.
func empty(a *answer) {
	a.Status, a.Body, a.Length, a.Encoding, a.Trailer = "200 OK", "", 0, nil, nil
	a.Header = http.Header{"Content-Length": {"0"}, "Date": {"now"}, "Idempotent-Replayed": {"true"}, "X-Handler": {"1"}, "X-Outer": a.Header["X-Outer"]}
	if a.Header["X-Outer"] == nil {
		delete(a.Header, "X-Outer")
	}
}

// The client gets what it gets without the middleware.
func TestLateAnswer(t *testing.T) {
	handler := func(w *probe) { fails(w.ResponseWriter, w.request) }
	checkShapes(t, []shape{
		{name: "a status and a body", outer: answering(decline), handler: handler, replay: []edit{empty}},
		{name: "an error of net/http", outer: answering(func(w http.ResponseWriter) { http.Error(w, "declined", http.StatusPaymentRequired) }),
			handler: handler, replay: []edit{empty}},
		{name: "a body only", outer: answering(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "declined") }),
			handler: handler, replay: []edit{empty}},
		{name: "a stream", outer: answering(func(w http.ResponseWriter) {
			w.WriteHeader(103)
			w.WriteHeader(402)
			w.(http.Flusher).Flush()
			_, _ = io.WriteString(w, "decl")
			w.(http.Flusher).Flush()
			_, _ = io.WriteString(w, "ined")
		}), handler: handler, replay: []edit{empty}},
		{name: "below what an outer middleware sets", outer: func(next http.Handler) http.Handler {
			return around("X-Outer", "1")(answering(decline)(next))
		}, handler: handler, replay: []edit{empty}},
		{name: "after a 1xx", outer: answering(decline), handler: func(w *probe) {
			w.WriteHeader(103)
			fails(w.ResponseWriter, w.request)
		}, replay: []edit{empty}},
		{name: "a handler that has answered", outer: answering(decline), handler: func(w *probe) {
			fails(w.ResponseWriter, w.request)
			w.WriteHeader(204)
		}, // as in net/http, whose header may still be changed: it has gone out
		},
	})
}

// What an outer recover answers through the handler's writer reaches the client
// with the header as net/http would send it. The key keeps its lease.
func TestLateAnswerToAPanic(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		x := newWire(t, proto, shape{
			outer: answering(decline),
			opts:  idempotency.Options{Wait: idempotency.NoWait},
			handler: func(w *probe) {
				fails(w.ResponseWriter, w.request)
				panic("boom")
			},
		})
		direct := x.direct()
		require.Equal(t, "402 Payment Required", direct.Status)
		require.Equal(t, direct, x.kept("first"))
		require.Equal(t, "409 Conflict", x.kept("retry").Status)
	})
}

// An answer that a retry does not get is an Error in the log, once, whether it
// reached the client or not.
func TestLateAnswerInTheLog(t *testing.T) {
	for _, s := range []struct {
		name    string
		handler http.HandlerFunc
		ends    bool // the context of the request, when the middleware has returned
		first   string
		logged  bool
	}{
		{name: "kept as an empty 200", handler: fails, first: `402 {"message":"declined"}`, logged: true},
		{name: "the context has ended", handler: fails, ends: true, first: "200 ", logged: true},
		{name: "the key was freed", handler: func(w http.ResponseWriter, r *http.Request) {
			fails(w, r)
			idemtest.Execution(r).Discard()
		}, first: `402 {"message":"declined"}`},
		{name: "a panic", handler: func(w http.ResponseWriter, r *http.Request) {
			fails(w, r)
			panic("boom")
		}, first: `402 {"message":"declined"}`},
		{name: "a panic, and the context has ended", handler: func(w http.ResponseWriter, r *http.Request) {
			fails(w, r)
			panic("boom")
		}, ends: true, first: "200 "},
		{name: "a panic after a status", handler: func(w http.ResponseWriter, r *http.Request) {
			fails(w, r)
			w.WriteHeader(201)
			panic("boom")
		}, first: "200 "},
		{name: "the handler has answered", handler: func(w http.ResponseWriter, r *http.Request) {
			fails(w, r)
			_, _ = w.Write(nil)
		}, first: "200 "},
	} {
		t.Run(s.name, func(t *testing.T) {
			var logged bytes.Buffer
			c := idemtest.NewClient(idempotency.NewMemoryStore(),
				&idempotency.Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))}, s.handler)
			ctx, end := context.WithCancel(t.Context())
			defer end()
			w := httptest.NewRecorder()
			answering(func(w http.ResponseWriter) {
				if s.ends {
					end()
				}
				decline(w)
			})(c.Handler).ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
			got, _ := idemtest.Describe(t, w.Result())
			require.Equal(t, s.first, got)
			if !s.logged {
				require.Empty(t, logged.String())
				return
			}
			require.Equal(t, 1, strings.Count(logged.String(), "\n"))
			require.Contains(t, logged.String(), "level=ERROR")
			require.Contains(t, logged.String(), "docs/frameworks.md")
			require.Contains(t, logged.String(), "status=402")
			c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 200 "})
			require.Equal(t, 1, c.Runs())
		})
	}
}

// Between the end of the handler and its answer, and behind an answer of the
// middleware's own, nothing is let through.
func TestLateAnswerHasItsTime(t *testing.T) {
	var early error
	var left http.ResponseWriter
	faulty := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	store := &idemtest.ObservedStore{Store: faulty, Look: func(_ context.Context, method string) {
		if method == "Complete" {
			_, early = left.Write([]byte("early"))
		}
	}}
	c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		left = w
		fails(w, r)
	})
	handler := answering(decline)(c.Handler)
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
	require.ErrorContains(t, early, "after the handler returned")
	require.Equal(t, `{"message":"declined"}`, w.Body.String())

	faulty.Fail("Complete", idempotency.ErrLeaseLost)
	w = httptest.NewRecorder()
	handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "b"}))
	got, _ := idemtest.Describe(t, w.Result())
	require.Equal(t, "409 in_progress", got)
}
