package idempotency_test

import (
	"bufio"
	"io"
	"log"
	"net"
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

// A stuckWriter is that of a client who does not read. One call of it waits
// until the client goes on reading. The recorder keeps others from coming
// beside it.
type stuckWriter struct {
	*httptest.ResponseRecorder
	call    string        // the one that waits
	skip    int           // how many of them go through before
	entered chan struct{} // closed when it waits
	reads   chan struct{} // closed when the client reads again
}

func newStuckWriter(call string, skip int) *stuckWriter {
	return &stuckWriter{httptest.NewRecorder(), call, skip, make(chan struct{}), make(chan struct{})}
}

func (w *stuckWriter) enter(call string) {
	if call != w.call {
		return
	}
	if w.skip--; w.skip == -1 {
		close(w.entered)
		<-w.reads
	}
}

func (w *stuckWriter) WriteHeader(status int) {
	w.enter("WriteHeader")
	if status >= 200 {
		w.ResponseRecorder.WriteHeader(status)
	}
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	w.enter("Write")
	return w.ResponseRecorder.Write(p)
}

func (w *stuckWriter) Flush() {
	w.enter("Flush")
	w.ResponseRecorder.Flush()
}

// stuckCalls are all calls of a handler that a client can hold up.
var stuckCalls = []struct {
	name, call string
	skip       int
	do         func(w http.ResponseWriter)
	kept       string // what a retry gets of a handler that returns meanwhile
	original   int
}{
	{"Write", "Write", 0, func(w http.ResponseWriter) {
		w.(http.Flusher).Flush()
		_, _ = w.Write([]byte("hello"))
	}, "replay 200 hello", 0},
	{"WriteString", "Write", 1, func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "hello ")
		w.(http.Flusher).Flush()
		_, _ = io.WriteString(w, "you")
	}, "replay 200 hello you", 0},
	{"Flush", "Flush", 0, func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "hello")
		w.(http.Flusher).Flush()
	}, "replay 200 hello", 0},
	{"the body of the first Flush", "Write", 0, func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "hello")
		w.(http.Flusher).Flush()
	}, "replay 200 hello", 0},
	{"the header of the first Flush", "WriteHeader", 0, func(w http.ResponseWriter) {
		w.WriteHeader(201)
		w.(http.Flusher).Flush()
	}, "replay 201 ", 0},
	{"a 1xx", "WriteHeader", 0, func(w http.ResponseWriter) { w.WriteHeader(103) }, "replay 200 ", 0},
	{"the Write that is too much", "Write", 0, func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "hello")
		_, _ = io.WriteString(w, strings.Repeat("x", 100))
	}, "409 response_not_stored", 200},
	{"a Write behind the one that was too much", "Write", 2, func(w http.ResponseWriter) {
		_, _ = io.WriteString(w, "hello")
		_, _ = io.WriteString(w, strings.Repeat("x", 100))
		_, _ = io.WriteString(w, "more")
	}, "409 response_not_stored", 200},
}

// stuck starts do on a goroutine that the handler leaves behind, and returns
// when the client holds it up. Another goroutine waits for its turn.
func stuck(w http.ResponseWriter, writer *stuckWriter, do func(http.ResponseWriter)) (behind chan error) {
	behind = make(chan error, 1)
	go do(w)
	<-writer.entered
	go func() {
		_, err := w.Write([]byte("behind"))
		behind <- err
	}()
	return behind
}

// A panic goes on while another goroutine of the handler waits for the client.
func TestPanicWaitsForNoClient(t *testing.T) {
	for _, s := range stuckCalls {
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				writer := newStuckWriter(s.call, s.skip)
				var behind chan error
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxResponseBytes: 50}, func(w http.ResponseWriter, _ *http.Request) {
					behind = stuck(w, writer, s.do)
					panic("boom")
				})
				out := make(chan any, 1)
				go func() {
					defer func() { out <- recover() }()
					c.Handler.ServeHTTP(writer, c.Request(idemtest.Exchange{Key: "a"}))
				}()
				synctest.Wait()
				require.Len(t, out, 1, "the panic has come out")
				require.Equal(t, "boom", <-out)

				sent := writer.Body.Len()
				close(writer.reads)
				synctest.Wait()
				require.ErrorContains(t, <-behind, "after the handler returned")
				require.LessOrEqual(t, writer.Body.Len()-sent, 100, "only the Write that was on its way")
			})
		})
	}
}

// What a handler did is stored although one of its goroutines waits for the
// client: the lease would end, and the handler would run again. The answer
// itself waits.
func TestResultWaitsForNoClient(t *testing.T) {
	for _, s := range stuckCalls {
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				writer := newStuckWriter(s.call, s.skip)
				var behind chan error
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxResponseBytes: 50}, func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set(http.TrailerPrefix+"X-T", "1")
					behind = stuck(w, writer, s.do)
				})
				answered := make(chan struct{})
				go func() {
					defer close(answered)
					c.Handler.ServeHTTP(writer, c.Request(idemtest.Exchange{Key: "a"}))
				}()
				time.Sleep(time.Hour) // virtual: the lease and MaxExecution are over
				c.Check(t, 1, idemtest.Exchange{Key: "a", Get: s.kept, Original: s.original})
				require.Equal(t, 1, c.Runs())
				select {
				case <-answered:
					require.Fail(t, "the answer did not wait for its turn")
				default:
				}
				close(writer.reads)
				<-answered
				require.ErrorContains(t, <-behind, "after the handler returned")
				c.Check(t, 2, idemtest.Exchange{Key: "a", Get: s.kept, Original: s.original})
				if strings.HasPrefix(s.kept, "replay") {
					require.Equal(t, s.kept[len("replay 200 "):], writer.Body.String(), "the client got what is kept")
				}
			})
		})
	}
}

// A stream that is withheld is aborted at once. Another answer, which comes
// behind a 1xx, waits for that.
func TestWithheldAnswerWaitsForInformationOnly(t *testing.T) {
	for _, s := range stuckCalls {
		t.Run(s.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				writer := newStuckWriter(s.call, s.skip)
				store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
				c := idemtest.NewClient(store, &idempotency.Options{MaxResponseBytes: 50}, func(w http.ResponseWriter, _ *http.Request) {
					stuck(w, writer, s.do)
					store.Fail("Complete", idempotency.ErrLeaseLost)
				})
				out := make(chan any, 1)
				go func() {
					defer func() { out <- recover() }()
					c.Handler.ServeHTTP(writer, c.Request(idemtest.Exchange{Key: "a"}))
				}()
				synctest.Wait()
				if s.name == "a 1xx" {
					require.Empty(t, out)
					close(writer.reads)
					require.Nil(t, <-out)
					require.Equal(t, http.StatusConflict, writer.Code)
					return
				}
				require.Len(t, out, 1)
				require.Equal(t, http.ErrAbortHandler, <-out)
				close(writer.reads)
			})
		})
	}
}

// pipeListener hands out one connection, without buffers: a client that does
// not read holds up the first byte.
type pipeListener struct {
	net.Listener
	conns chan net.Conn
}

func (l *pipeListener) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l *pipeListener) Close() error   { return nil }
func (l *pipeListener) Addr() net.Addr { return &net.IPAddr{} }

// net/http lets a panic out while a goroutine of the handler waits for the
// client. With a key it comes out as well, and at the same time.
func TestServerPanicWaitsForNoClient(t *testing.T) {
	for _, key := range []string{"", "Idempotency-Key: a\r\n"} {
		t.Run("with "+key, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				out, ended := make(chan any, 1), make(chan struct{})
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
					go func() {
						defer close(ended)
						_, _ = w.Write(make([]byte, 2<<20))
					}()
					time.Sleep(time.Second)
					panic(http.ErrAbortHandler)
				})
				server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer func() {
						p := recover()
						out <- p
						<-ended // net/http flushes what the goroutine still writes to
						panic(p)
					}()
					c.Handler.ServeHTTP(w, r)
				})}
				theirs, ours := net.Pipe()
				l := &pipeListener{conns: make(chan net.Conn, 1)}
				l.conns <- ours
				served := make(chan error, 1)
				go func() { served <- server.Serve(l) }()
				start := time.Now()
				_, err := io.WriteString(theirs, "POST /charge HTTP/1.1\r\nHost: shop\r\n"+key+"Content-Length: 0\r\n\r\n")
				require.NoError(t, err)
				require.Equal(t, http.ErrAbortHandler, <-out)
				require.Equal(t, time.Second, time.Since(start))
				require.NoError(t, theirs.Close())
				<-ended
				close(l.conns)
				require.ErrorIs(t, <-served, net.ErrClosed)
			})
		})
	}
}

// A handler that returns while its goroutine waits for a client that reads in
// the end: the client gets all of it, as does a retry.
func TestServerAnswerComesBehindAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := strings.Repeat("0123456789abcdef", 4<<10)
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
			header := w.Header()
			w.(http.Flusher).Flush()
			go func() { _, _ = io.WriteString(w, body) }()
			time.Sleep(time.Second)
			header.Set(http.TrailerPrefix+"X-T", "1")
		})
		server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute, Handler: c.Handler}
		l := &pipeListener{conns: make(chan net.Conn, 2)}
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		send := func(wait time.Duration) *http.Response {
			theirs, ours := net.Pipe()
			l.conns <- ours
			_, err := io.WriteString(theirs, "POST /charge HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(theirs), nil)
			require.NoError(t, err)
			time.Sleep(wait)
			got, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.True(t, body == string(got), "%d bytes", len(got))
			return resp
		}
		first := send(time.Minute)
		replay := send(0)
		require.Equal(t, "true", replay.Header.Get("Idempotent-Replayed"))
		require.Equal(t, http.Header{"X-T": {"1"}}, first.Trailer)
		require.Equal(t, first.Trailer, replay.Trailer)
		close(l.conns)
		<-served
	})
}
