package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// What a client has seen a retry must be able to see again.
func TestStoredBeforeSent(t *testing.T) {
	for _, status := range []int{201, 503} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			w := httptest.NewRecorder()
			settled := 0
			store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
				if method != "Acquire" {
					settled++
					require.Zero(t, w.Body.Len())
				}
			}}
			c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(status)
				_, err := io.WriteString(w, "the answer")
				idemtest.Must(err)
			})
			c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
			require.Equal(t, 1, settled)
			require.Equal(t, status, w.Code)
			require.Equal(t, "the answer", w.Body.String())
		})
	}
}

func TestCompleteFails(t *testing.T) {
	for name, row := range map[string]struct {
		fail  func(s *idemtest.FaultyStore)
		until time.Duration // the store is back
		then  string
		runs  int
		once  bool
	}{
		"until just before the lease ends": {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 29900 * time.Millisecond, then: "replay 201 charge 1", runs: 1},
		"longer, for an at-most-once key":  {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 5 * time.Minute, then: "replay 201 charge 1", runs: 1, once: true},
		"too long for an at-most-once key": {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 15 * time.Minute, then: "409 outcome_unknown", runs: 1, once: true},
		"for a moment":                     {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 200 * time.Millisecond, then: "replay 201 charge 1", runs: 1},
		"for a while":                      {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 20 * time.Second, then: "replay 201 charge 1", runs: 1},
		"but took effect":                  {fail: func(s *idemtest.FaultyStore) { s.FailAfter("Complete", idemtest.ErrDown) }, until: 20 * time.Second, then: "replay 201 charge 1", runs: 1},
		"for longer than the lease":        {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 40 * time.Second, then: "replay 201 charge 1", runs: 1},
		"too long":                         {fail: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) }, until: 15 * time.Minute, then: "201 charge 2", runs: 2},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{Wait: idempotency.NoWait, AtMostOnce: row.once}, nil, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				row.fail(s)
				go func() {
					time.Sleep(row.until)
					s.Fail("Complete", nil)
					s.FailAfter("Complete", nil)
				}()
				start := time.Now()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				require.LessOrEqual(t, time.Since(start), time.Second, "the client does not wait longer than StoreTimeout")
				if row.until > time.Second {
					require.ErrorIs(t, events.Last().Err, idemtest.ErrDown)
					got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
					require.NotContains(t, got, "charge 2", "the claim stands meanwhile")
				}
				time.Sleep(row.until + 10*time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.then})
				require.Equal(t, row.runs, c.Runs())
			})
		})
	}
}

// An owner that was told by Commit that another has the key does not answer
// beside that one, whatever becomes of its own Complete.
func TestStaleOwnerDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory, events := idempotency.NewMemoryStore(), &idemtest.EventLog{}
		store := &idemtest.FaultyStore{Store: memory}
		stale := idemtest.NewClient(store, &idempotency.Options{OnEvent: events.Add}, func(w http.ResponseWriter, r *http.Request) {
			store.Fail("Acquire", idemtest.ErrDown)
			time.Sleep(time.Minute) // it charges, and does not look at its context
			store.Fail("Acquire", nil)
			require.ErrorIs(t, idemtest.Execution(r).Commit(r.Context()), idempotency.ErrLeaseLost)
			store.Fail("Complete", idemtest.ErrDown)
			idemtest.Lasting(0)(w, r)
		})
		other := idemtest.NewClient(memory, &idempotency.Options{}, idemtest.Lasting(0))
		go func() {
			time.Sleep(45 * time.Second)
			other.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		}()
		stale.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, []string{"lease_lost 409"}, events.All())
		store.Fail("Complete", nil)
		stale.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	})
}

// An owner that learns late that another one has the key does not answer.
func TestLateAnswerThatNamesAnotherOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, down := time.Now(), errors.New("down")
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			switch {
			case n == 1:
				time.AfterFunc(30*time.Second+time.Millisecond, func() {
					_, err := s.MemoryStore.Acquire(context.Background(), key, idempotency.Claim{Token: "other", Lease: time.Minute, TTL: time.Hour})
					idemtest.Must(err)
				})
			case time.Since(start) < 27*time.Second:
				return idempotency.Record{}, down
			default:
				time.Sleep(3 * time.Second) // beyond the end of the lease
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		s.OnComplete = func(context.Context, string, string, idempotency.Result) error { return down }
		c := idemtest.NewClient(s, &idempotency.Options{StoreTimeout: 4 * time.Second}, idemtest.Lasting(40*time.Second))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
	})
}

// Nor does one that says that nothing was done.
func TestReleaseAfterAnotherOwnerWasSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
			if n > 1 {
				return idempotency.Record{State: idempotency.InProgress, Remaining: time.Minute}, nil
			}
			return s.MemoryStore.Acquire(ctx, key, c)
		}
		log := new(idemtest.EventLog)
		c := idemtest.NewClient(s, &idempotency.Options{OnEvent: log.Add}, tooManyRequests(func(*http.Request) { time.Sleep(11 * time.Second) }))
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, idempotency.OutcomeLeaseLost, log.Last().Outcome)
	})
}

// What the store has rolled back is not tried again: there is nothing left to
// be committed, and the client is waiting.
func TestRolledBackIsFinal(t *testing.T) {
	for name, handler := range map[string]struct {
		status int
		method string
		get    string
	}{
		"Complete": {201, "Complete", "503 store_unavailable"},
		"Release":  {503, "Release", "503 "},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{}, idemtest.Answering(handler.status))
				store.Fail(handler.method, idempotency.ErrRolledBack)
				start := time.Now()
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: handler.get})
				require.Zero(t, time.Since(start))
				time.Sleep(time.Minute) // what goes on in the background ends
			})
		})
	}
}

// notKnown is what a client is told that must not take it that nothing was done.
const notKnown = "Whether the request was processed is not known. Repeat it later with the same key to find out."

// wasUndone is what a client is told whose handler ran in vain. The other detail
// of 503 says that the handler did not run.
const wasUndone = "This attempt was given up, and what it did was undone. Repeat it later with the same key."

func TestAttachedTransaction(t *testing.T) {
	attaching := func(commit bool, status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("transaction")
			if commit {
				idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
			}
			w.WriteHeader(status)
		}
	}
	for name, row := range map[string]struct {
		handler http.HandlerFunc
		err     error
		get     string
		detail  string
		event   string
		later   string // when the store is back, and the lease over
	}{
		"committed":                         {attaching(false, 201), nil, "201 ", "", "executed 201", "replay 201 "},
		"rolled back frees the key":         {attaching(false, 201), fmt.Errorf("serialization: %w", idempotency.ErrRolledBack), "503 store_unavailable", wasUndone, "store_unavailable 503", "201 "},
		"rolled back, the lease being lost": {attaching(false, 201), errors.Join(idempotency.ErrRolledBack, idempotency.ErrLeaseLost), "409 in_progress", "", "lease_lost 409", "201 "},
		"rolled back after Commit":          {attaching(true, 201), idempotency.ErrRolledBack, "503 store_unavailable", notKnown, "store_unavailable 503", "409 outcome_unknown"},
		"unknown is not answered":           {attaching(false, 201), idemtest.ErrDown, "503 store_unavailable", notKnown, "store_unavailable 503", "201 "},
	} {
		t.Run(name, func(t *testing.T) {
			withFaults(t, idempotency.Options{}, row.handler, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
				s.Fail("Complete", row.err)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: row.get, Detail: row.detail})
				require.Equal(t, 1, s.Count("Complete"), "a transaction ends only once")
				require.Equal(t, []string{row.event}, events.All())
				s.Fail("Complete", nil)
				if row.later == "201 " && errors.Is(row.err, idempotency.ErrRolledBack) && !errors.Is(row.err, idempotency.ErrLeaseLost) {
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 "}) // at once
					return
				}
				time.Sleep(31 * time.Second)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.later})
			})
		})
	}
}

// A transaction is ended in one try, which has the whole of StoreTimeout.
func TestTransactionThatTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
		s.OnComplete = func(ctx context.Context, key, token string, r idempotency.Result) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(900 * time.Millisecond):
				return s.MemoryStore.Complete(ctx, key, token, r)
			}
		}
		c := idemtest.NewClient(s, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Execution(r).Attach("a transaction")
			w.WriteHeader(http.StatusCreated)
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 "})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 "})
	})
}

// A transaction is ended even when the key was lost.
func TestLostLeaseEndsTheTransaction(t *testing.T) {
	withFaults(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		idemtest.Execution(r).Attach("transaction")
		<-r.Context().Done()
		w.WriteHeader(http.StatusInternalServerError)
	}, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, events *idemtest.EventLog) {
		var seen []string
		s.Store = transactions(t, s.Store, &seen)
		time.AfterFunc(time.Second, func() { s.Fail("Acquire", idemtest.ErrDown) })
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		require.Equal(t, []string{"lease_lost 409"}, events.All())
		require.Equal(t, []string{"Release transaction"}, seen)
	})
}

func TestStoreSeesTheAttachment(t *testing.T) {
	withFaults(t, idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		idemtest.Execution(r).Attach("transaction")
		w.WriteHeader([]int{0, 500, 201}[idemtest.Run(r)])
	}, func(t *testing.T, s *idemtest.FaultyStore, c *idemtest.Client, _ *idemtest.EventLog) {
		var seen []string
		s.Store = transactions(t, s.Store, &seen)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 "})
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 "})
		require.Equal(t, []string{"Release transaction", "Complete transaction"}, seen)
	})
}

// transactions returns a store that notes what is attached to its calls.
func transactions(t *testing.T, store idempotency.Store, seen *[]string) idempotency.Store {
	return &idemtest.ObservedStore{Store: store, Look: func(ctx context.Context, method string) {
		if e, ok := idempotency.FromContext(ctx); ok && method != "Acquire" {
			*seen = append(*seen, fmt.Sprint(method, " ", e.Attachment()))
		}
		_, ok := ctx.Deadline()
		require.True(t, ok, "%s has no deadline", method)
	}}
}

// A store that goes down, or hands the key to someone else, after the response
// began to stream: the client must not take what it has for a whole answer.
func TestWithheldStreamIsAborted(t *testing.T) {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte("half"))
		w.(http.Flusher).Flush()
		store.Fail("Complete", idempotency.ErrLeaseLost)
	})
	require.PanicsWithValue(t, http.ErrAbortHandler, func() {
		c.Handler.ServeHTTP(httptest.NewRecorder(), c.Request(idemtest.Exchange{Key: "a"}))
	})
}

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
			Detail: notKnown})
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

// A renewal that arrives just behind the Release of its own run finds the key
// freed. That is no other owner: the client gets the handler's answer.
func TestRenewalBehindItsOwnRelease(t *testing.T) {
	for name, flush := range map[string]bool{"held back": false, "streamed": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
				s.Late(2, 300*time.Millisecond) // the renewal after 10s
				s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
					err := s.MemoryStore.Release(ctx, key, token, keep)
					time.Sleep(400 * time.Millisecond) // until its answer comes
					return err
				}
				log := new(idemtest.EventLog)
				c := idemtest.NewClient(s, &idempotency.Options{OnEvent: log.Add}, func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(10100 * time.Millisecond)
					w.WriteHeader(http.StatusServiceUnavailable)
					if flush {
						w.(http.Flusher).Flush()
					}
				})
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 "})
				require.Equal(t, idempotency.OutcomeReleased, log.Last().Outcome)
			})
		})
	}
}

// A run that says that nothing was done does not make the attempts begin anew: the
// run before it may have got somewhere.
func TestAttemptsAfterARefusal(t *testing.T) {
	for name, first := range map[string]http.HandlerFunc{
		"a run that failed":   idemtest.Answering(http.StatusServiceUnavailable),
		"a run that panicked": func(http.ResponseWriter, *http.Request) { panic("in the middle of the payment") },
	} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				var attempts []int
				c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					attempts = append(attempts, idemtest.Execution(r).Attempt())
					if idemtest.Run(r) == 1 {
						first(w, r)
						return
					}
					w.WriteHeader(http.StatusTooManyRequests)
				})
				for range 3 {
					c.Do(c.Request(idemtest.Exchange{Key: "a"}))
					time.Sleep(time.Minute)
				}
				require.Equal(t, []int{1, 2, 3}, attempts)
			})
		})
	}
}

// ShouldStore is not asked when Commit, Discard or the end of the context has
// decided.
func TestShouldStoreDecidesLast(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"Commit":  func(_ http.ResponseWriter, r *http.Request) { idemtest.Must(idemtest.Execution(r).Commit(r.Context())) },
		"Discard": func(_ http.ResponseWriter, r *http.Request) { idemtest.Execution(r).Discard() },
	} {
		t.Run(name, func(t *testing.T) {
			opts := &idempotency.Options{ShouldStore: func(int, http.Header) bool { panic("not to be called") }}
			opts.Logger = slog.New(failingHandler{t})
			c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, handler)
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 "})
		})
	}
}

// A failingHandler fails a test that logs.
type failingHandler struct{ t *testing.T }

func (failingHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h failingHandler) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h failingHandler) WithGroup(string) slog.Handler          { return h }
func (h failingHandler) Handle(_ context.Context, r slog.Record) error {
	h.t.Error(r.Message)
	return nil
}

// A handler that looks at its context, and finds that it goes on, has not given
// up; one that only asks for Err has.
func TestHandlerThatLooksAtItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxExecution: time.Minute}, func(_ http.ResponseWriter, r *http.Request) {
			idemtest.Must(r.Context().Err())
			if idemtest.Execution(r).Key() == "polls" {
				for r.Context().Err() == nil {
					time.Sleep(time.Second)
				}
			}
		})
		c.Check(t, 0, idemtest.Exchange{Key: "finishes", Get: "200 "})
		c.Check(t, 1, idemtest.Exchange{Key: "polls", Get: "409 outcome_unknown"})
	})
}

// A transaction that was left to its context is rolled back before the store is
// asked, and storing that nothing is known goes on.
func TestTransactionThatIsLeftToItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var transaction context.Context
		inner := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		inner.Fail("Complete", idemtest.ErrDown)
		store := &idemtest.ObservedStore{Store: inner, Look: func(_ context.Context, method string) {
			if method == "Complete" {
				require.Error(t, transaction.Err())
			}
		}}
		c := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64, AtMostOnce: true}, func(_ http.ResponseWriter, r *http.Request) {
			transaction = r.Context()
			idemtest.Execution(r).Attach("a transaction")
			_, _ = io.Copy(io.Discard, r.Body)
		})
		r := c.Request(idemtest.Exchange{Key: "a", Body: upload(600, 'x')})
		r.Body = &brokenBody{strings.NewReader(upload(500, 'x')), io.ErrUnexpectedEOF}
		got, _ := idemtest.Describe(t, c.Do(r))
		require.Equal(t, "409 outcome_unknown", got)
		inner.Fail("Complete", nil)
		time.Sleep(10 * time.Second) // less than the lease
		c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(600, 'x'), Get: "409 outcome_unknown"})
	})
}

// What a run may have got somewhere with is remembered for the TTL.
func TestMarkerOfARunThatGotSomewhere(t *testing.T) {
	var kept time.Duration
	s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
	s.OnRelease = func(ctx context.Context, key, token string, keep time.Duration) error {
		kept = keep
		return s.MemoryStore.Release(ctx, key, token, keep)
	}
	c := idemtest.NewClient(s, &idempotency.Options{MaxBufferedBody: 64}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusUnauthorized)
	})
	r := c.Request(idemtest.Exchange{Key: "a", Body: upload(600, 'x')})
	r.Body = &brokenBody{strings.NewReader(upload(500, 'x')), io.ErrUnexpectedEOF}
	require.NotNil(t, c.Do(r))
	require.Equal(t, 24*time.Hour, kept, "refused a part of its body")

	s.OnComplete = func(context.Context, string, string, idempotency.Result) error { return idempotency.ErrRolledBack }
	kept = 0
	c = idemtest.NewClient(s, &idempotency.Options{}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "b", Get: "503 store_unavailable"})
	require.Equal(t, 24*time.Hour, kept, "rolled back")
}
