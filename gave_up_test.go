package idempotency_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// givesUp returns without a word when its context ends, as handlers do.
func givesUp(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// withDeadline is middleware that answers for a handler that has not.
func withDeadline(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		next.ServeHTTP(w, r.WithContext(ctx))
		if ctx.Err() != nil {
			w.WriteHeader(http.StatusGatewayTimeout)
		}
	})
}

// hangingUp is a client that leaves after a second.
func hangingUp(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		time.AfterFunc(time.Second, cancel)
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// A handler that returns without an answer when its context has ended has not
// said that it succeeded: nobody is told that it did, and it does not run again.
func TestHandlerThatGivesUp(t *testing.T) {
	commits := func(w http.ResponseWriter, r *http.Request) {
		idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
		givesUp(w, r)
	}
	const unknown, undone = "409 outcome_unknown", "503 store_unavailable"
	for name, row := range map[string]struct {
		outer   func(http.Handler) http.Handler
		opts    idempotency.Options
		handler http.HandlerFunc
		first   string
		retry   string
	}{
		"deadline outside":                      {outer: withDeadline, first: unknown, retry: unknown},
		"deadline outside, at most once":        {outer: withDeadline, opts: idempotency.Options{AtMostOnce: true}, first: unknown, retry: unknown},
		"MaxExecution":                          {first: unknown, retry: unknown},
		"MaxExecution, at most once":            {opts: idempotency.Options{AtMostOnce: true}, first: unknown, retry: unknown},
		"MaxExecution, sealed":                  {opts: idempotency.Options{AEAD: newAEAD(t, 1)}, first: unknown, retry: unknown},
		"MaxExecution, after Commit":            {handler: commits, first: unknown, retry: unknown},
		"the client hangs up":                   {outer: hangingUp, opts: idempotency.Options{CancelOnDisconnect: true}, first: unknown, retry: unknown},
		"the client hangs up on a patient one":  {outer: hangingUp, handler: idemtest.Lasting(2 * time.Second), first: "201 charge 1", retry: "replay 201 charge 1"},
		"the context has ended and was not met": {handler: func(http.ResponseWriter, *http.Request) { time.Sleep(time.Hour) }, first: "200 ", retry: "replay 200 "},
		"TimeoutHandler outside": {outer: func(next http.Handler) http.Handler { return http.TimeoutHandler(next, time.Second, "too late") },
			first: "503 too late", retry: unknown, handler: func(w http.ResponseWriter, r *http.Request) {
				givesUp(w, r)
				time.Sleep(time.Millisecond)
			}},
		"context.Cause says so": {outer: withDeadline, first: unknown, retry: unknown, handler: func(_ http.ResponseWriter, r *http.Request) {
			for context.Cause(r.Context()) == nil {
				time.Sleep(time.Second)
			}
		}},
		"Discard": {outer: withDeadline, first: undone, retry: undone, handler: func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Discard()
			givesUp(w, r)
		}},
		"an answer": {outer: withDeadline, first: "202 ", retry: "replay 202 ", handler: func(w http.ResponseWriter, r *http.Request) {
			givesUp(w, r)
			w.WriteHeader(http.StatusAccepted)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if row.handler == nil {
					row.handler = givesUp
				}
				if row.outer == nil {
					row.outer = func(next http.Handler) http.Handler { return next }
				}
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &row.opts, row.handler)
				c.Handler = row.outer(c.Handler)
				first, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
				require.Equal(t, row.first, first)
				time.Sleep(time.Minute)
				retry, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
				require.Equal(t, row.retry, retry)
				if row.retry != undone {
					require.Equal(t, 1, c.Runs())
				}
			})
		})
	}
}

// What a handler that gives up has attached is not committed.
func TestHandlerThatGivesUpItsTransaction(t *testing.T) {
	for name, row := range map[string]struct {
		atMostOnce, commit bool
		get                string
		called             []string
		outcome            idempotency.Outcome
	}{
		"rolled back, and the key freed": {false, false, "503 store_unavailable", []string{"Acquire", "Release a transaction"}, idempotency.OutcomeReleased},
		"at most once":                   {true, false, "409 outcome_unknown", []string{"Acquire", "Acquire", "Complete"}, idempotency.OutcomeOutcomeUnknown},
		"after Commit":                   {false, true, "409 outcome_unknown", []string{"Acquire", "Acquire", "Complete"}, idempotency.OutcomeOutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var called []string
				store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, method string) {
					if e, ok := idempotency.FromContext(ctx); ok && method != "Acquire" && e.Attachment() != nil {
						method += " " + e.Attachment().(string)
					}
					called = append(called, method)
				}}
				log := new(idemtest.EventLog)
				c := idemtest.NewClient(store, &idempotency.Options{OnEvent: log.Add, AtMostOnce: row.atMostOnce}, func(w http.ResponseWriter, r *http.Request) {
					idemtest.Execution(r).Attach("a transaction")
					if row.commit {
						idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
					}
					givesUp(w, r)
				})
				c.Handler = withDeadline(c.Handler)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: row.get})
				require.Equal(t, row.called, called)
				require.Equal(t, row.outcome, log.Last().Outcome)
				require.ErrorIs(t, log.Last().Err, context.DeadlineExceeded)
			})
		})
	}
}

// What could not be rolled back is not said to be.
func TestHandlerThatGivesUpWhileTheStoreIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down, log := errors.New("down"), new(idemtest.EventLog)
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnRelease = func(context.Context, string, string, time.Duration) error { return down }
		c := idemtest.NewClient(s, &idempotency.Options{OnEvent: log.Add}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("a transaction")
			givesUp(w, r)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable",
			Detail: "Whether the request was processed is not known. Repeat it later with the same key to find out."})
		require.ErrorIs(t, log.Last().Err, down)
		time.Sleep(time.Hour)
	})
}

// Who reads a value of the context does not learn of its end: not the handler,
// nor a store that does so while the lease is renewed.
func TestHandlerThatReadsAValueAndFinishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, _ string) { _ = ctx.Value(tenantKey{}) }}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
			_ = r.Context().Value(tenantKey{})
			time.Sleep(time.Hour)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 "})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 200 "})
	})
}

// A body that broke off tells a handler to start again, unless it says that it
// has done what it was asked for.
func TestAnswersToALargeBodyThatBreaksOff(t *testing.T) {
	answers := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if status > 0 {
				w.WriteHeader(status)
			}
		}
	}
	for name, row := range map[string]struct {
		atMostOnce  bool
		handler     http.HandlerFunc
		first, then string
		original    int
	}{
		"done":                       {false, answers(201), "201 ", "409 response_not_stored", 201},
		"not done":                   {false, answers(400), "400 ", "400 ", 0},
		"no word":                    {false, answers(0), "400 body_incomplete", "200 ", 0},
		"at most once, not done":     {true, answers(400), "400 ", "replay 400 ", 0},
		"at most once, without word": {true, answers(0), "409 outcome_unknown", "409 outcome_unknown", 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64, AtMostOnce: row.atMostOnce}, row.handler)
			r := c.Request(idemtest.Exchange{Key: "a", Body: upload(600, 'x')})
			r.Body = &brokenBody{strings.NewReader(upload(500, 'x')), io.ErrUnexpectedEOF}
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, row.first, got)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(600, 'x'), Get: row.then, Original: row.original})
			if row.original > 0 {
				c.Check(t, 2, idemtest.Exchange{Key: "a", Body: upload(600, 'y'), Get: "422 key_reused"})
			}
		})
	}
}

// It must be the handler that says so, in what goes out, and of a conflict.
func TestConflictIsFinal(t *testing.T) {
	accepted := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusAccepted)
	})
	accepted.Check(t, 0, idemtest.Exchange{Key: "a", Get: "202 "})
	accepted.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 202 "})
	for name, handler := range map[string]http.HandlerFunc{
		"outer middleware says when to come again": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusConflict) },
		"it is said too late": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusConflict)
			w.Header().Set("Retry-After", "1")
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, handler)
			if strings.HasPrefix(name, "outer") {
				c.Handler = around("Retry-After", "1")(c.Handler)
			}
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 "})
			c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 409 "})
		})
	}
}

// A conflict that says when to come again is what this middleware answers while
// a request is running. A handler may pass it on from another service.
func TestAnswerThatSaysWhenToComeAgain(t *testing.T) {
	for _, atMostOnce := range []bool{false, true} {
		busy := true
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{AtMostOnce: atMostOnce}, func(w http.ResponseWriter, _ *http.Request) {
			if busy {
				idempotency.WriteError(w, nil, &idempotency.Error{Status: 409, Code: "in_progress", RetryAfter: time.Second})
				return
			}
			w.WriteHeader(http.StatusCreated)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		busy = false
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 "})
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 "})
	}
}

// A body of a byte more than is buffered is the same whether its end comes
// together with that byte or after it.
func TestBodyOfAByteMoreThanIsBuffered(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 16}, reading(-1))
	for i, end := range []io.Reader{strings.NewReader("y"), io.MultiReader(strings.NewReader("y"), strings.NewReader(""))} {
		r := c.Request(idemtest.Exchange{Key: "a"})
		r.ContentLength = -1
		r.Body = io.NopCloser(io.MultiReader(strings.NewReader(strings.Repeat("x", 16)), &endsWithData{end, i == 0}))
		got, _ := idemtest.Describe(t, c.Do(r))
		require.Equal(t, []string{"201 ", "replay 201 "}[i], got)
	}
}

// endsWithData returns the end of a reader together with the last of it, or
// after that.
type endsWithData struct {
	io.Reader
	together bool
}

func (r *endsWithData) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if r.together && n > 0 {
		err = io.EOF
	}
	return n, err
}

// Of nested middlewares that share a cell, the outer one counts, even if there is
// another one between them.
func TestNestedMiddlewareAroundAnother(t *testing.T) {
	outer := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})
	between := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Scope: func(*http.Request) string { return "tenant" }})
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, nil)
	h := outer(between(outer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) }))))
	for _, want := range []string{"201 ", "replay 201 "} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
		got, _ := idemtest.Describe(t, w.Result())
		require.Equal(t, want, got)
	}
}
