package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// A shape is a handler whose response is looked at on the wire three times:
// direct, from the handler without the middleware, which is the reference;
// first, through the middleware; and replayed, for the same key again. They
// must be equal, but for what first and replay list.
type shape struct {
	name    string
	handler func(w *probe, r *http.Request)
	outer   func(http.Handler) http.Handler // what is around the middleware
	opts    idempotency.Options
	request func(*http.Request) // changes what the client sends
	only    int                 // the major version of HTTP, 0: both
	first   []edit              // what makes the direct response the first
	replay  []edit              // what makes the first response the replay, see replayOf
}

// checkShapes is what the tables of response_recorder_shapes_test.go run
// through.
func checkShapes(t *testing.T, shapes []shape) {
	for _, s := range shapes {
		for _, proto := range []int{1, 2} {
			if s.only != 0 && s.only != proto {
				continue
			}
			t.Run(fmt.Sprintf("%s/HTTP%d", s.name, proto), func(t *testing.T) {
				t.Parallel()
				w := newWire(t, proto, s)
				direct, first, replay := w.direct(), w.kept("first"), w.kept("replay")
				require.Empty(t, direct.Err)
				require.Equal(t, direct.edited(s.first), first, "the first response is not the direct one")
				require.Equal(t, replayOf(first).edited(s.replay), replay, "the replay is not the first response")
			})
		}
	}
}

// An answer is what the client sees of a response, and what the handler saw of
// its ResponseWriter.
type answer struct {
	Proto    int
	Interim  []string // 1xx responses with their headers
	Status   string
	Header   http.Header // with names and values as HTTP/1.1 has them on the wire
	Length   int64
	Encoding []string // Transfer-Encoding
	Body     string
	BodyErr  string
	Trailer  http.Header
	Err      string // instead of a response
	Saw      []string
}

// replayOf returns the replay that a first answer should lead to: it says that
// it is one, has no 1xx responses, and no handler has seen anything.
func replayOf(first answer) answer {
	first.Header = maps.Clone(first.Header)
	first.Header["Idempotent-Replayed"] = []string{"true"}
	first.Interim, first.Saw = nil, nil
	return first
}

// An edit is one difference between two answers.
type edit func(*answer)

func (a answer) edited(edits []edit) answer {
	a.Header, a.Saw = maps.Clone(a.Header), slices.Clone(a.Saw)
	for _, e := range edits {
		e(&a)
	}
	return a
}

// set gives a header values; remove takes headers away.
func set(name string, values ...string) edit { return func(a *answer) { a.Header[name] = values } }

func remove(names ...string) edit {
	return func(a *answer) {
		for _, name := range names {
			delete(a.Header, name)
		}
	}
}

// length is for a body that has a Content-Length; unknownLength for one that
// has none.
func length(a *answer) {
	a.Length, a.Encoding = int64(len(a.Body)), nil
	a.Header["Content-Length"] = []string{strconv.Itoa(len(a.Body))}
	delete(a.Header, "Transfer-Encoding")
}

func unknownLength(a *answer) {
	a.Length = -1
	delete(a.Header, "Content-Length")
	if a.Proto == 1 {
		a.Encoding = []string{"chunked"}
		a.Header["Transfer-Encoding"] = []string{"chunked"}
	}
}

func trailer(name string, values ...string) edit {
	return func(a *answer) {
		a.Trailer = maps.Clone(a.Trailer)
		if a.Trailer == nil {
			a.Trailer = make(http.Header)
		}
		a.Trailer[name] = values
	}
}

// saw replaces what the handler saw in one place.
func saw(i int, text string) edit { return func(a *answer) { a.Saw[i] = text } }

// on limits edits to one version of HTTP.
func on(proto int, edits ...edit) edit {
	return func(a *answer) {
		if a.Proto == proto {
			*a = a.edited(edits)
		}
	}
}

// notStored is the whole answer to a retry whose response could not be kept.
func notStored(status int) edit {
	return func(a *answer) {
		*a = answer{Proto: a.Proto, Status: "409 Conflict", Header: http.Header{
			"Cache-Control":          {"no-store"},
			"Content-Language":       {"en"},
			"Content-Type":           {"application/problem+json"},
			"Date":                   {"now"},
			"X-Content-Type-Options": {"nosniff"},
		}}
		a.Body = `{"type":"about:blank","title":"The response to this request was not stored","status":409,` +
			`"detail":"The request with this key was processed and is not repeated, but its response could not be kept.",` +
			`"code":"response_not_stored","retryable":false,"original_status":` + strconv.Itoa(status) + "}\n"
		length(a)
	}
}

// A probe is the ResponseWriter of a handler, and its way to tell what it saw
// there.
type probe struct {
	http.ResponseWriter
	client <-chan int // how much of the body the client has; before that, see awaitClient
	mu     *sync.Mutex
	notes  *[]string
}

func (w *probe) saw(values ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*w.notes = append(*w.notes, strings.TrimSuffix(fmt.Sprintln(values...), "\n"))
}

// write writes body and notes what came of it.
func (w *probe) write(body string) {
	n, err := w.Write([]byte(body))
	w.saw("wrote", n, err)
}

func (w *probe) control() *http.ResponseController {
	return http.NewResponseController(w.ResponseWriter)
}

// interim for awaitClient is a 1xx response. 0 is the header.
const interim = -1

// awaitClient returns when the client has n bytes of the body.
func (w *probe) awaitClient(n int) {
	timeout := time.After(10 * time.Second)
	for {
		select {
		case seen := <-w.client:
			if seen >= n {
				return
			}
		case <-timeout:
			w.saw("the client did not get", n, "bytes in time")
			return
		}
	}
}

// A wire sends the requests of one shape.
type wire struct {
	t     *testing.T
	proto int
	shape shape
	store *idempotency.MemoryStore
}

func newWire(t *testing.T, proto int, s shape) *wire {
	return &wire{t: t, proto: proto, shape: s, store: idempotency.NewMemoryStore()}
}

// direct asks the handler without the middleware.
func (x *wire) direct() answer {
	return x.send("direct", func(next http.Handler) http.Handler { return next })
}

// kept asks through the middleware, always with the same key. The name reaches
// the server as X-Request-Id.
func (x *wire) kept(name string) answer {
	opts := x.shape.opts
	opts.Logger = slog.New(slog.DiscardHandler)
	return x.send(name, idempotency.Middleware(x.store, &opts))
}

func (x *wire) send(name string, middleware func(http.Handler) http.Handler) answer {
	a := answer{Proto: x.proto}
	client, done := make(chan int, 64), make(chan struct{})
	var mu sync.Mutex
	next := middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x.shape.handler(&probe{w, client, &mu, &a.Saw}, r)
	}))
	if x.shape.outer != nil {
		next = x.shape.outer(next)
	}
	url, transport, received := x.serve(func(w http.ResponseWriter, r *http.Request) {
		defer close(done)
		next.ServeHTTP(w, r)
	})
	defer transport.CloseIdleConnections()

	ctx, cancel := context.WithTimeout(x.t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(traced(ctx, &a, client), http.MethodPost, url, strings.NewReader("{}"))
	require.NoError(x.t, err)
	req.Header.Set("Idempotency-Key", "key")
	req.Header.Set("X-Request-Id", name)
	if x.shape.request != nil {
		x.shape.request(req)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		a.Err = err.Error()
	} else {
		client <- 0
		a.read(resp, client)
		if x.proto == 1 {
			a.Header = headerBytes(received.bytes())
		}
		hideClock(a.Header)
	}
	select {
	case <-done:
	case <-ctx.Done():
		require.Fail(x.t, "the handler did not return")
	}
	return a
}

// read takes from resp what there is.
func (a *answer) read(resp *http.Response, progress chan<- int) {
	defer resp.Body.Close()
	var body []byte
	for err := error(nil); err == nil; {
		buf := make([]byte, 32<<10)
		var n int
		n, err = resp.Body.Read(buf)
		body = append(body, buf[:n]...)
		select {
		case progress <- len(body):
		default: // nobody waits
		}
		if err != nil && err != io.EOF {
			a.BodyErr = err.Error()
		}
	}
	a.Body = string(body)
	if len(body) > 8<<10 {
		a.Body = fmt.Sprintf("%d bytes with CRC %08x", len(body), crc32.ChecksumIEEE(body))
	}
	a.Status, a.Header, a.Trailer = resp.Status, resp.Header, resp.Trailer
	a.Length, a.Encoding = resp.ContentLength, resp.TransferEncoding
}

// serve starts a server and returns what a client for one request needs.
// received is what comes over the connection.
func (x *wire) serve(handler http.HandlerFunc) (url string, transport *http.Transport, received *tap) {
	server := httptest.NewUnstartedServer(handler)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	received = &tap{}
	transport = &http.Transport{
		DisableCompression:    true,
		ExpectContinueTimeout: time.Minute, // until the server says something
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, addr)
			return &tappedConn{conn, received}, err
		},
	}
	if x.proto == 1 {
		server.Start()
	} else {
		server.EnableHTTP2 = true
		server.StartTLS()
		transport.TLSClientConfig = server.Client().Transport.(*http.Transport).TLSClientConfig
		transport.ForceAttemptHTTP2 = true
	}
	x.t.Cleanup(server.Close)
	return server.URL, transport, received
}

// traced makes a note of 1xx responses.
func traced(ctx context.Context, a *answer, progress chan<- int) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			a.Interim = append(a.Interim, fmt.Sprint(code, http.Header(header)))
			progress <- interim
			return nil
		},
	})
}

// tap collects the bytes that a connection receives.
type tap struct {
	mu  sync.Mutex
	all []byte
}

func (b *tap) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.all)
}

type tappedConn struct {
	net.Conn
	tap *tap
}

func (c *tappedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.tap.mu.Lock()
	defer c.tap.mu.Unlock()
	c.tap.all = append(c.tap.all, p[:n]...)
	return n, err
}

// headerBytes returns the header of the final response in raw, byte by byte.
func headerBytes(raw []byte) http.Header {
	head, rest, _ := bytes.Cut(raw, []byte("\r\n\r\n"))
	for bytes.HasPrefix(head, []byte("HTTP/1.1 10")) {
		head, rest, _ = bytes.Cut(rest, []byte("\r\n\r\n"))
	}
	header := make(http.Header)
	for _, line := range strings.Split(string(head), "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ": ")
		header[name] = append(header[name], value)
	}
	return header
}

// hideClock replaces a Date that net/http has set. Handlers set one of 2001.
func hideClock(header http.Header) {
	if date := header["Date"]; len(date) == 1 {
		if at, err := http.ParseTime(date[0]); err == nil && at.Year() > 2001 {
			header["Date"] = []string{"now"}
		}
	}
}
