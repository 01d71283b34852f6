package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add}, idemtest.Lasting(2*time.Second))
		r := c.Request(idemtest.Exchange{Key: "a"})
		c.Do(r)
		e := events.Last()
		require.Equal(t, idempotency.OutcomeExecuted, e.Outcome)
		require.Len(t, e.StoreKey, 27)
		require.Equal(t, 1, e.Attempt)
		require.Equal(t, 201, e.Status)
		require.Equal(t, 2*time.Second, e.Duration)
		require.Zero(t, e.Waited)
		require.NoError(t, e.Err)
		require.Same(t, r, e.Request)

		go c.Do(c.Request(idemtest.Exchange{Key: "b"}))
		synctest.Wait()
		time.Sleep(500 * time.Millisecond)
		c.Do(c.Request(idemtest.Exchange{Key: "b"}))
		e = events.Last()
		require.Equal(t, idempotency.OutcomeReplayed, e.Outcome)
		require.Equal(t, 1500*time.Millisecond, e.Waited)
		require.Zero(t, e.Attempt)

		c.Do(c.Request(idemtest.Exchange{})) // no key, no event
		c.Do(c.Request(idemtest.Exchange{Keys: []string{""}}))
		e = events.Last()
		require.Equal(t, idempotency.OutcomeKeyInvalid, e.Outcome)
		require.ErrorIs(t, e.Err, idempotency.ErrKeyInvalid)
		require.Len(t, events.All(), 4)
	})
}

// What a caller keeps of an event is not changed by what comes after it.
func TestEventsStayAsTheyWere(t *testing.T) {
	events := &idemtest.EventLog{}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add}, nil)
	var keys []string
	for i := range 50 {
		c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprint("k", i%10)}))
		keys = append(keys, strings.Clone(events.Last().StoreKey))
	}
	for i, e := range events.Events() {
		require.Equal(t, keys[i], e.StoreKey)
		require.Equal(t, keys[i%10], e.StoreKey)
	}
}

// Keys, tokens and bodies stay out of the log; the store's words stay in it.
func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "fine", Get: "201 charge 1"})
		c.Check(t, 1, idemtest.Exchange{Key: "fine", Get: "replay 201 charge 1"})
		require.Empty(t, log.String(), "warnings and errors only")
		store.Fail("Acquire", idemtest.ErrDown)
		c.Check(t, 2, idemtest.Exchange{Key: "private-key", Body: "private-body", Get: "503 store_unavailable"})
		require.Contains(t, log.String(), "secret-host")
		time.Sleep(time.Hour) // what goes on in the background ends
		require.NotContains(t, log.String(), "private")
	})
}

// The event of a response that is not stored says so.
func TestEventOfWhatIsNotStored(t *testing.T) {
	for name, opts := range map[string]idempotency.Options{
		"too large":          {MaxResponseBytes: 1},
		"an AEAD that fails": {AEAD: panickingAEAD{}},
	} {
		t.Run(name, func(t *testing.T) {
			events := &idemtest.EventLog{}
			opts.OnEvent = events.Add
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, nil)
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
			require.ErrorIs(t, events.Last().Err, idempotency.ErrResponseNotStored)
		})
	}
}

// An event of a failure has its cause.
func TestEventHasTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, events := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}, &idemtest.EventLog{}
		s.Fail("Acquire", idemtest.ErrDown)
		c := idemtest.NewClient(s, &idempotency.Options{OnEvent: events.Add}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "503 store_unavailable"})
		require.ErrorIs(t, events.Last().Err, idemtest.ErrDown)
		require.ErrorIs(t, events.Last().Err, idempotency.ErrStoreUnavailable)
		time.Sleep(time.Hour)
	})
}

// What goes wrong is logged, without secrets and whether or not the client is
// still there; what clients do wrong is not.
func TestLogOfFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		logger := slog.New(liveHandler{slog.NewTextHandler(&log, nil)})
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(s, &idempotency.Options{Logger: logger}, idemtest.Answering(201, 429))
		c.Check(t, 0, idemtest.Exchange{Keys: []string{""}, Get: "400 key_invalid"})
		require.Empty(t, log.String())
		s.Fail("Complete", idemtest.ErrDown)
		s.Fail("Release", idemtest.ErrDown)
		c.Check(t, 1, idemtest.Exchange{Key: "private-key-1", Get: "201 "})
		c.Check(t, 2, idemtest.Exchange{Key: "private-key-2", Get: "429 "})
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Contains(t, log.String(), "storing a response failed")
		require.Contains(t, log.String(), "freeing a key failed")

		log.Reset()
		s.Fail("Acquire", idemtest.ErrDown)
		c = idemtest.NewClient(s, &idempotency.Options{Logger: logger, FailOpen: true}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "private-key-3"}).WithContext(ctx)))
		require.Contains(t, log.String(), "running unprotected")
		require.NotContains(t, log.String(), "private")
	})
}

// liveHandler logs nothing for a context that has ended.
type liveHandler struct{ slog.Handler }

func (h liveHandler) Handle(ctx context.Context, r slog.Record) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return h.Handler.Handle(ctx, r)
}

// A panic in a callback is logged with the name of the cell.
func TestCallbackThatPanics(t *testing.T) {
	for callback, opts := range map[string]idempotency.Options{
		"OnEvent":      {OnEvent: func(context.Context, idempotency.Event) { panic("is broken") }},
		"ShouldStore":  {ShouldStore: func(int, http.Header) bool { panic("is broken") }},
		"ReplayHeader": {ReplayHeader: func(string) bool { panic("is broken") }},
		"AEAD":         {AEAD: panickingAEAD{}},
	} {
		t.Run(callback, func(t *testing.T) {
			var log bytes.Buffer
			opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
			handler := func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Location", "/charges/1") }
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, http.HandlerFunc(handler))
			r := c.Request(idemtest.Exchange{Key: "a"})
			c.Do(r)
			require.Contains(t, log.String(), "panic in "+callback)
			require.Contains(t, log.String(), "store_key="+idempotency.StoreKey("", r.Method, r.URL.Path, "a"))
		})
	}
}

// panickingLog is a log that panics on every line.
type panickingLog struct{ slog.Handler }

func (panickingLog) Enabled(context.Context, slog.Level) bool  { return true }
func (panickingLog) Handle(context.Context, slog.Record) error { panic("log is broken") }

// A log that panics must not undo a handler that has finished. On the goroutine
// of a timer it would end the process.
func TestLoggerThatPanics(t *testing.T) {
	for name, row := range map[string]struct {
		opts    idempotency.Options
		handler func(s *idemtest.FaultyStore) // before it answers
		after   func(s *idemtest.FaultyStore)
	}{
		"between the handler and the store": {
			opts: idempotency.Options{ShouldStore: func(int, http.Header) bool { panic("bug") }},
		},
		"on the timer of a lease": {
			handler: func(s *idemtest.FaultyStore) {
				s.Fail("Acquire", idemtest.ErrDown)
				time.Sleep(11 * time.Second)
				s.Fail("Acquire", nil)
			},
		},
		"in the background": {
			opts:    idempotency.Options{MaxExecution: time.Minute},
			handler: func(s *idemtest.FaultyStore) { s.Fail("Complete", idemtest.ErrDown) },
			after: func(s *idemtest.FaultyStore) {
				time.Sleep(5 * time.Minute) // storing is given up, which is logged
				s.Fail("Complete", nil)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				row.opts.Logger = slog.New(panickingLog{slog.DiscardHandler})
				c := idemtest.NewClient(s, &row.opts, func(w http.ResponseWriter, r *http.Request) {
					if row.handler != nil && idemtest.Run(r) == 1 {
						row.handler(s)
					}
					idemtest.Lasting(0)(w, r)
				})
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
				if row.after != nil {
					row.after(s)
					return
				}
				time.Sleep(time.Hour)
				c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			})
		})
	}
}
