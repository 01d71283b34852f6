package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A ginWriter tells as much as gin's: a status, 200 from the beginning, goes
// out with the first byte of the body.
type ginWriter struct {
	http.ResponseWriter
	status, size int
}

func (w *ginWriter) Status() int            { return w.status }
func (w *ginWriter) Size() int              { return w.size }
func (w *ginWriter) Written() bool          { return w.size != -1 }
func (w *ginWriter) WriteHeader(status int) { w.status = status }
func (w *ginWriter) Write(p []byte) (int, error) {
	w.now()
	w.size += len(p)
	return w.ResponseWriter.Write(p)
}
func (w *ginWriter) now() {
	if w.size == -1 {
		w.size = 0
		w.ResponseWriter.WriteHeader(w.status)
	}
}

// A chiWriter tells as much as chi's: nothing until the status is written.
type chiWriter struct {
	http.ResponseWriter
	status, bytes int
}

func (w *chiWriter) Status() int       { return w.status }
func (w *chiWriter) BytesWritten() int { return w.bytes }
func (w *chiWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}
func (w *chiWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = 200
	}
	w.bytes += len(p)
	return w.ResponseWriter.Write(p)
}

// An echoWriter tells as much as echo's, in fields.
type echoWriter struct {
	http.ResponseWriter
	Status    int
	Committed bool
}

func (w *echoWriter) WriteHeader(status int) {
	w.Status, w.Committed = status, true
	w.ResponseWriter.WriteHeader(status)
}
func (w *echoWriter) Write(p []byte) (int, error) {
	if !w.Committed {
		w.WriteHeader(200)
	}
	return w.ResponseWriter.Write(p)
}

// A sizeWriter tells as much as that of gorilla/handlers.
type sizeWriter struct {
	http.ResponseWriter
	size int
}

func (w *sizeWriter) Status() int { return 200 }
func (w *sizeWriter) Size() int   { return w.size }
func (w *sizeWriter) Write(p []byte) (int, error) {
	w.size += len(p)
	return w.ResponseWriter.Write(p)
}

var frameworkWriters = map[string]func(w http.ResponseWriter) http.ResponseWriter{
	"gin":      func(w http.ResponseWriter) http.ResponseWriter { return &ginWriter{w, 200, -1} },
	"chi":      func(w http.ResponseWriter) http.ResponseWriter { return &chiWriter{ResponseWriter: w} },
	"echo":     func(w http.ResponseWriter) http.ResponseWriter { return &echoWriter{ResponseWriter: w} },
	"size":     func(w http.ResponseWriter) http.ResponseWriter { return &sizeWriter{ResponseWriter: w} },
	"net/http": func(w http.ResponseWriter) http.ResponseWriter { return w },
}

// outside is what a handler can reach around the middleware.
type outside struct {
	http.ResponseWriter
	end context.CancelFunc
}

type aroundKey struct{}

// goingAround has the handler of a framework write to the framework's writer.
// Between that and the middleware there may be a writer of another middleware.
func goingAround(framework string, wrap bool, before http.HandlerFunc, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w = frameworkWriters[framework](w)
		before(w, r)
		ctx, end := context.WithCancel(r.Context())
		defer end()
		r = r.WithContext(context.WithValue(ctx, aroundKey{}, outside{w, end}))
		given := w
		if wrap {
			given = unwrapper{w, w}
		}
		next.ServeHTTP(given, r)
		if gin, ok := w.(*ginWriter); ok {
			gin.now()
		}
	})
}

func outsideOf(r *http.Request) outside { return r.Context().Value(aroundKey{}).(outside) }

func TestAnswerAroundTheMiddleware(t *testing.T) {
	answers := func(status int, body string) http.HandlerFunc {
		return func(_ http.ResponseWriter, r *http.Request) {
			if status != 0 {
				outsideOf(r).WriteHeader(status)
			}
			if body != "" {
				_, _ = outsideOf(r).Write([]byte(body))
			}
		}
	}
	nothing := func(http.ResponseWriter, *http.Request) {}
	for _, s := range []struct {
		name       string
		frameworks string
		before     http.HandlerFunc // outside
		handler    http.HandlerFunc
		first      string
		retry      string
		original   int  // seen
		unknown    bool // seen, and no writer tells the status
	}{
		{name: "declined", frameworks: "gin chi echo", handler: answers(402, "declined"), first: "402 declined", original: 402},
		{name: "a status only", frameworks: "gin chi echo", handler: answers(402, ""), first: "402 ", original: 402},
		{name: "a body only", frameworks: "gin chi echo size", handler: answers(0, "fine"), first: "200 fine", original: 200},
		{name: "refused for now", frameworks: "gin chi echo", handler: answers(503, "later"), first: "503 later", original: 503},
		{name: "a status and an end of the context", frameworks: "gin chi echo", first: "402 declined", original: 402,
			handler: func(w http.ResponseWriter, r *http.Request) {
				outsideOf(r).end()
				<-r.Context().Done()
				answers(402, "declined")(w, r)
			}},
		{name: "a header and a body", frameworks: "net/http", first: "200 fine", unknown: true,
			handler: func(_ http.ResponseWriter, r *http.Request) {
				outsideOf(r).Header().Set("Content-Type", "text/x-fine")
				_, _ = outsideOf(r).Write([]byte("fine"))
			}},
		{name: "another value of a header", frameworks: "net/http", first: "402 declined", unknown: true,
			before: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "text/x-before") },
			handler: func(w http.ResponseWriter, r *http.Request) {
				outsideOf(r).Header().Set("Content-Type", "text/x-declined")
				answers(402, "declined")(w, r)
			}},
		{name: "a header before", frameworks: "gin chi echo size net/http", handler: nothing, first: "200 ", retry: "replay 200 ",
			before: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-Request-Id", "1") }},
		{name: "a header outside and an answer", frameworks: "net/http", first: "402 declined", retry: "replay 402 declined",
			handler: func(w http.ResponseWriter, r *http.Request) {
				outsideOf(r).Header().Set("X-Request-Id", "1")
				w.WriteHeader(402)
				_, _ = w.Write([]byte("declined"))
			}},
		{name: "nothing", frameworks: "gin chi echo size net/http", handler: nothing, first: "200 ", retry: "replay 200 "},
		{name: "what was written outside", frameworks: "gin chi size net/http", handler: nothing,
			before: func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("padding")) },
			first:  "200 padding", retry: "200 padding"}, // the header is out before that of a replay
		{name: "a status that was set outside", frameworks: "gin", handler: nothing,
			before: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(202) },
			first:  "202 ", retry: "replay 202 "},
		{name: "through the middleware", frameworks: "gin chi echo size net/http", first: "402 declined", retry: "replay 402 declined",
			handler: func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(402)
				_, _ = w.Write([]byte("declined"))
			}},
		{name: "discarded", frameworks: "gin chi echo", first: "402 declined", retry: "402 declined",
			handler: func(w http.ResponseWriter, r *http.Request) {
				idemtest.Execution(r).Discard()
				answers(402, "declined")(w, r)
			}},
	} {
		for _, framework := range strings.Fields(s.frameworks) {
			for _, wrap := range []bool{false, true} {
				name := framework + " " + s.name
				if wrap {
					name += ", wrapped"
				}
				t.Run(name, func(t *testing.T) {
					var logged bytes.Buffer
					var events idemtest.EventLog
					c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
						CancelOnDisconnect: true, OnEvent: events.Add, Logger: slog.New(slog.NewTextHandler(&logged, nil)),
					}, s.handler)
					if s.before == nil {
						s.before = nothing
					}
					c.Handler = goingAround(framework, wrap, s.before, c.Handler)
					c.Check(t, 0, idemtest.Exchange{Key: "a", Get: s.first})
					if s.original == 0 && !s.unknown {
						require.NoError(t, events.Last().Err)
						c.Check(t, 1, idemtest.Exchange{Key: "a", Get: s.retry})
						require.Equal(t, s.name == "discarded", logged.Len() > 0)
						return
					}
					require.ErrorIs(t, events.Last().Err, idempotency.ErrResponseNotStored)
					require.Equal(t, s.original, events.Last().Status)
					c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: s.original})
					require.Equal(t, 1, c.Runs())
					require.Equal(t, 1, strings.Count(logged.String(), "level=ERROR"))
					require.Contains(t, logged.String(), "docs/frameworks.md")
				})
			}
		}
	}
}

// What outer middleware does to the header of a 1xx is no answer.
func TestHeaderOfA1xxIsNoAnswer(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), new(idempotency.Options), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
	})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Request-Id", "1")
		c.Handler.ServeHTTP(hintingWriter{w}, r)
	}))
	defer server.Close()
	for i := range 2 {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, nil)
		require.NoError(t, err)
		r.Header.Set("Idempotency-Key", "a")
		resp, err := server.Client().Do(r)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Equal(t, i == 1, resp.Header.Get("Idempotent-Replayed") == "true")
	}
	require.Equal(t, 1, c.Runs())
}

// A hintingWriter adds a header when a 1xx goes out.
type hintingWriter struct{ http.ResponseWriter }

func (w hintingWriter) WriteHeader(status int) {
	if status < 200 {
		w.Header().Set("X-Hint", "1")
	}
	w.ResponseWriter.WriteHeader(status)
}

// A header that was set around the middleware does not answer for a handler that
// gave up.
func TestHeaderAroundAHandlerThatGivesUp(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{CancelOnDisconnect: true},
		func(_ http.ResponseWriter, r *http.Request) {
			outsideOf(r).Header().Set("X-Request-Id", "1")
			outsideOf(r).end()
			<-r.Context().Done()
		})
	c.Handler = goingAround("net/http", false, func(http.ResponseWriter, *http.Request) {}, c.Handler)
	for i := range 2 {
		c.Check(t, i, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
	}
	require.Equal(t, 1, c.Runs())
}

// An outer timeout answers while the handler, which has begun a transaction, is
// at work. The handler then gives up, and half of its work must not be
// committed. A failure that the handler wrote around the middleware itself is
// rolled back as well. What it did with success is not.
func TestTransactionOfAHandlerThatWasAnsweredFor(t *testing.T) {
	for name, row := range map[string]struct {
		status  int
		opts    idempotency.Options
		commit  bool
		called  []string
		outcome idempotency.Outcome
		retry   string
		seen    int // the original status in the answer to the retry
	}{
		"rolled back, and the key freed": {status: 503, called: []string{"Acquire", "Release a transaction"},
			outcome: idempotency.OutcomeReleased, retry: "503 "},
		"at most once": {status: 503, opts: idempotency.Options{AtMostOnce: true}, called: []string{"Acquire", "Acquire", "Complete"},
			outcome: idempotency.OutcomeOutcomeUnknown, retry: "409 outcome_unknown"},
		"after Commit": {status: 503, commit: true, called: []string{"Acquire", "Acquire", "Complete"},
			outcome: idempotency.OutcomeOutcomeUnknown, retry: "409 outcome_unknown"},
		"a success": {status: 201, called: []string{"Acquire", "Complete a transaction"},
			outcome: idempotency.OutcomeExecuted, retry: "409 response_not_stored", seen: 201},
	} {
		for _, framework := range []string{"gin", "chi", "echo"} {
			t.Run(framework+" "+name, func(t *testing.T) {
				var called []string
				store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, method string) {
					if e, ok := idempotency.FromContext(ctx); ok && method != "Acquire" && e.Attachment() != nil {
						method += " " + e.Attachment().(string)
					}
					called = append(called, method)
				}}
				var events idemtest.EventLog
				opts := row.opts
				opts.CancelOnDisconnect, opts.OnEvent, opts.Logger = true, events.Add, slog.New(slog.DiscardHandler)
				c := idemtest.NewClient(store, &opts, func(_ http.ResponseWriter, r *http.Request) {
					idemtest.Execution(r).Attach("a transaction")
					if row.commit {
						idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
					}
					outsideOf(r).end()
					<-r.Context().Done()
					outsideOf(r).WriteHeader(row.status) // the timeout, as far as the middleware can tell
				})
				c.Handler = goingAround(framework, false, func(http.ResponseWriter, *http.Request) {}, c.Handler)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Get: fmt.Sprint(row.status, " ")})
				require.Equal(t, row.called, called)
				require.Equal(t, row.outcome, events.Last().Outcome)
				require.Equal(t, row.status, events.Last().Status)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: row.retry, Original: row.seen})
			})
		}
	}
}

// A writerThatPanics is asked for its status once before the handler, and panics
// when it is asked again.
type writerThatPanics struct {
	http.ResponseWriter
	asked bool
}

func (w *writerThatPanics) Status() int {
	if w.asked {
		panic("bug")
	}
	w.asked = true
	return 0
}

// The handler has finished when its writer is asked, so a panic of the writer
// must not make it run again.
func TestOuterWriterThatPanics(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(http.ResponseWriter, *http.Request) {})
	for range 2 {
		w := &writerThatPanics{ResponseWriter: httptest.NewRecorder()}
		c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
	}
	require.Equal(t, 1, c.Runs())
}

// A headerThatPanics panics when it is asked for after the handler.
type headerThatPanics struct {
	http.ResponseWriter
	ran bool
}

func (w *headerThatPanics) Header() http.Header {
	if w.ran {
		panic("bug")
	}
	return w.ResponseWriter.Header()
}

// The result is stored before the panic comes out.
func TestHeaderOfTheOuterWriterThatPanics(t *testing.T) {
	var w *headerThatPanics
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(http.ResponseWriter, *http.Request) { w.ran = true })
	w = &headerThatPanics{ResponseWriter: httptest.NewRecorder()}
	require.PanicsWithValue(t, "bug", func() { c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"})) })
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 200 "})
	require.Equal(t, 1, c.Runs())
}
