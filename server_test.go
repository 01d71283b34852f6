package idempotency_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// newServer serves handler behind the middleware on a real connection.
func newServer(t *testing.T, opts *idempotency.Options, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	return serve(t, idempotency.Middleware(idempotency.NewMemoryStore(), opts)(handler))
}

func serve(t *testing.T, handler http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// post sends one request, and returns the answer with its body read.
func post(ctx context.Context, s *httptest.Server, key string, body io.Reader) (*http.Response, string, error) {
	r, err := http.NewRequestWithContext(ctx, "POST", s.URL+"/charge", body)
	if err != nil {
		return nil, "", err
	}
	r.Header.Set("Idempotency-Key", key)
	resp, err := s.Client().Do(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// A client that gives up and comes back gets the answer of its first request.
func TestServerClientTimesOutAndRetries(t *testing.T) {
	var runs atomic.Int32
	running, finish := make(chan struct{}), make(chan struct{})
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		close(running)
		<-finish
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "charged")
	})
	ctx, giveUp := context.WithCancel(t.Context())
	go func() {
		<-running
		giveUp()
	}()
	_, _, err := post(ctx, s, "a", strings.NewReader("x"))
	require.ErrorIs(t, err, context.Canceled)
	close(finish)
	resp, body, err := post(t.Context(), s, "a", strings.NewReader("x"))
	require.NoError(t, err)
	require.Equal(t, "charged", body)
	require.Equal(t, http.StatusCreated, resp.StatusCode)
	require.Equal(t, "true", resp.Header.Get("Idempotent-Replayed"))
	require.EqualValues(t, 1, runs.Load())
}

func TestServerParallelDuplicates(t *testing.T) {
	const duplicates = 200
	var runs atomic.Int32
	arrived := make(chan struct{}, duplicates)
	s := serve(t, counting(arrived, newHandler(func(w http.ResponseWriter, r *http.Request) {
		for range duplicates { // all of them are there
			<-arrived
		}
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", runs.Add(1))
	})))
	answers := make(chan string, duplicates)
	var all sync.WaitGroup
	for range duplicates {
		all.Go(func() {
			resp, body, err := post(t.Context(), s, "a", strings.NewReader("x"))
			if err != nil {
				body = err.Error()
			} else {
				body = resp.Status + " " + body
			}
			answers <- body
		})
	}
	all.Wait()
	close(answers)
	for answer := range answers {
		require.Equal(t, "201 Created charge 1", answer)
	}
	require.EqualValues(t, 1, runs.Load())
}

func newHandler(h http.HandlerFunc) http.Handler {
	return idempotency.Middleware(idempotency.NewMemoryStore(), nil)(h)
}

// counting tells arrived of each request before it is served.
func counting(arrived chan<- struct{}, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		h.ServeHTTP(w, r)
	})
}

// Go's Transport sends a request with this header again by itself when an idle
// connection breaks without an answer. The handler must not run, and panic, for
// each of them.
func TestServerPanicRunsOnceThroughGoClient(t *testing.T) {
	var runs, requests atomic.Int32
	h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Wait: idempotency.NoWait})(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Idempotency-Key") == "panic" {
				runs.Add(1)
				panic("boom")
			}
		}))
	both := make(chan struct{})
	var once sync.Once
	var waiting atomic.Int32
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if strings.HasPrefix(r.Header.Get("Idempotency-Key"), "warm") {
			// Two requests at once leave two idle connections.
			if waiting.Add(1) == 2 {
				once.Do(func() { close(both) })
			}
			<-both
		}
		h.ServeHTTP(w, r)
	}))
	var warm sync.WaitGroup
	for i := range 2 {
		warm.Go(func() { _, _, _ = post(t.Context(), s, fmt.Sprint("warm", i), strings.NewReader("x")) })
	}
	warm.Wait()
	requests.Store(0)
	_, body, err := post(t.Context(), s, "panic", strings.NewReader("x"))
	require.NoError(t, err)
	require.Contains(t, body, "in_progress")
	require.Greater(t, requests.Load(), int32(1), "the Transport did send it again")
	require.EqualValues(t, 1, runs.Load())
}

func TestServerLargeUploadTakesBoundedMemory(t *testing.T) {
	const size = 20 << 20
	var runs atomic.Int32
	var peak atomic.Int64
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		base := heap()
		buf := make([]byte, 32<<10)
		var total int64
		for i := 0; ; i++ {
			n, err := r.Body.Read(buf)
			total += int64(n)
			if i%100 == 0 {
				peak.Store(max(peak.Load(), heap()-base))
			}
			if err != nil {
				break
			}
		}
		fmt.Fprint(w, total)
	})
	for i := range 2 {
		// The client does not hold the body either.
		resp, body, err := post(t.Context(), s, "a", io.LimitReader(zeros{}, size))
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(size), body)
		require.Equal(t, i == 1, resp.Header.Get("Idempotent-Replayed") == "true")
	}
	resp, _, err := post(t.Context(), s, "a", io.LimitReader(zeros{}, size-1))
	require.NoError(t, err)
	require.Equal(t, http.StatusUnprocessableEntity, resp.StatusCode)
	require.EqualValues(t, 1, runs.Load())
	require.Less(t, peak.Load(), int64(4<<20))
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestServerTrailersOfTheRequest(t *testing.T) {
	for name, size := range map[string]int{"small": 10, "large": 2 << 20} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				idemtest.Must(err)
				fmt.Fprint(w, r.Trailer.Get("X-Sum"))
			})
			r, err := http.NewRequest("POST", s.URL, io.LimitReader(zeros{}, int64(size)))
			require.NoError(t, err)
			r.Header.Set("Idempotency-Key", "a")
			r.Trailer = http.Header{"X-Sum": {"42"}}
			resp, err := s.Client().Do(r)
			require.NoError(t, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.Equal(t, "42", string(body))
		})
	}
}

// Trailers that nothing declared come with the end of the body, which the
// handler sees after its copy of the request was made.
func TestServerUndeclaredTrailersOfTheRequest(t *testing.T) {
	for name, size := range map[string]int{"small": 10, "large": 2 << 20} {
		t.Run(name, func(t *testing.T) {
			seen := make(chan string, 1)
			s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				idemtest.Must(err)
				seen <- r.Trailer.Get("X-Sum")
			})
			status, _ := raw(t, s, fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\r\nTransfer-Encoding: chunked\r\n\r\n"+
				"%x\r\n%s\r\n0\r\nX-Sum: 42\r\n\r\n", size, strings.Repeat("x", size)))
			require.Equal(t, "HTTP/1.1 200 OK", status)
			require.Equal(t, "42", <-seen)
		})
	}
}

// As with net/http, a handler may look at its request while another goroutine
// reads the body, as that of a proxy does. The race detector would tell.
func TestServerBodyIsReadElsewhere(t *testing.T) {
	s := newServer(t, nil, func(_ http.ResponseWriter, r *http.Request) {
		read := make(chan struct{})
		go func() {
			defer close(read)
			body, err := io.ReadAll(r.Body)
			if err != nil || string(body) != "hello" {
				t.Errorf("read %q, %v", body, err)
			}
		}()
		require.Empty(t, r.WithContext(r.Context()).Trailer)
		<-read
	})
	for _, key := range []string{"a", "b"} {
		_, _, err := post(t.Context(), s, key, strings.NewReader("hello"))
		require.NoError(t, err)
	}
}

// raw sends lines as they are and returns the first line that does not say
// 100 Continue, and whether one did.
func raw(t *testing.T, s *httptest.Server, send string) (status string, continued bool) {
	t.Helper()
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, send)
	require.NoError(t, err)
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		require.NoError(t, err)
		if strings.HasPrefix(line, "HTTP/1.1 100") {
			continued = true
			_, err = io.WriteString(conn, "body!")
			require.NoError(t, err)
			_, err = in.ReadString('\n')
			require.NoError(t, err)
			continue
		}
		return strings.TrimSpace(line), continued
	}
}

func TestServerExpectContinue(t *testing.T) {
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		if string(b) != "body!" {
			panic(fmt.Sprintf("body is %q", b))
		}
		w.WriteHeader(http.StatusCreated)
	})
	const head = "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n"
	status, continued := raw(t, s, head+"Idempotency-Key: a\r\n\r\n")
	require.Equal(t, "HTTP/1.1 201 Created", status)
	require.True(t, continued)
	status, continued = raw(t, s, head+"Idempotency-Key: \r\n\r\n")
	require.Equal(t, "HTTP/1.1 400 Bad Request", status)
	require.False(t, continued, "a body that is not wanted is not asked for")
}

// The client of a large upload that is refused sees the answer, not a reset.
func TestServerDrainsARefusedUpload(t *testing.T) {
	s := newServer(t, nil, func(http.ResponseWriter, *http.Request) {})
	for range 20 {
		resp, body, err := post(t.Context(), s, "", bytes.NewReader(make([]byte, 1<<20)))
		require.NoError(t, err)
		require.Equal(t, http.StatusBadRequest, resp.StatusCode)
		require.Contains(t, body, "key_invalid")
	}
}

func TestServerStreams(t *testing.T) {
	next := make(chan struct{})
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintf(w, "event %d\n", i)
			idemtest.Must(http.NewResponseController(w).Flush())
			<-next
		}
	})
	r, err := http.NewRequest("POST", s.URL+"/charge", strings.NewReader("x"))
	require.NoError(t, err)
	r.Header.Set("Idempotency-Key", "a")
	resp, err := s.Client().Do(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	for i := range 3 {
		line, err := lines.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("event %d\n", i), line, "it comes while the handler runs")
		next <- struct{}{}
	}
	_, err = lines.ReadByte()
	require.ErrorIs(t, err, io.EOF)
	_, body, err := post(t.Context(), s, "a", strings.NewReader("x"))
	require.NoError(t, err)
	require.Equal(t, "event 0\nevent 1\nevent 2\n", body)
}

// An endless stream ends when its client is gone and it is not kept any more.
func TestServerEndlessStreamEnds(t *testing.T) {
	ended := make(chan error, 1)
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		chunk := make([]byte, 64<<10)
		for {
			if _, err := w.Write(chunk); err != nil {
				ended <- err
				return
			}
		}
	})
	ctx, hangUp := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "POST", s.URL+"/charge", strings.NewReader("x"))
	require.NoError(t, err)
	r.Header.Set("Idempotency-Key", "a")
	resp, err := s.Client().Do(r)
	require.NoError(t, err)
	hangUp()
	resp.Body.Close()
	require.Error(t, <-ended)
}

// Load with every kind of key and answer: no race, no lost goroutine, and the
// memory comes back.
func TestServerLoad(t *testing.T) {
	total := 50_000
	if testing.Short() {
		total = 5_000
	}
	store := idempotency.NewMemoryStore()
	var runs atomic.Int64
	s := serve(t, idempotency.Middleware(store, &idempotency.Options{TTL: time.Second, Lease: time.Second})(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			runs.Add(1)
			b, err := io.ReadAll(r.Body)
			if err != nil {
				panic(err)
			}
			w.WriteHeader(http.StatusCreated)
			_, _ = w.Write(b)
		})))
	s.Client().Transport.(*http.Transport).MaxIdleConnsPerHost = 16
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	var next atomic.Int64
	errs := make(chan error, 16)
	for range 16 {
		all.Go(func() {
			for {
				i := int(next.Add(1))
				if i > total {
					return
				}
				body := fmt.Sprint("operation ", i/4) // each is sent four times
				resp, got, err := post(t.Context(), s, fmt.Sprint("key-", i/4), strings.NewReader(body))
				if err == nil && (resp.StatusCode != http.StatusCreated || got != body) {
					err = errors.New(resp.Status + " " + got)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	// A key may run again after its TTL of a second, if the machine is slow.
	require.GreaterOrEqual(t, runs.Load(), int64(total/4))

	s.Client().CloseIdleConnections()
	waitFor(t, func() bool { return runtime.NumGoroutine() <= before })
	waitFor(t, func() bool { return store.Len() == 0 && store.Bytes() == 0 })
}

// waitFor waits for a condition on this goroutine, so that it may count them.
func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			require.FailNow(t, "condition never satisfied")
		}
	}
}
