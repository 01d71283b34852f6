package idempotency_test

import (
	"bytes"
	"context"
	"errors"
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
	"sync/atomic"
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
	handler func(w *probe)
	outer   func(http.Handler) http.Handler // what is around the middleware
	opts    idempotency.Options
	request func(*http.Request) // changes what the client sends
	first   []edit              // what makes the direct response the first
	replay  []edit              // what makes the first response the replay, see replayOf
}

// checkShapes checks the shapes of a table.
func checkShapes(t *testing.T, shapes []shape) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			eachProto(t, func(t *testing.T, proto int) {
				newWire(t, proto, s).check(func() {})
			})
		})
	}
}

func eachProto(t *testing.T, test func(t *testing.T, proto int)) {
	for _, proto := range []int{1, 2} {
		t.Run(fmt.Sprintf("HTTP%d", proto), func(t *testing.T) {
			t.Parallel()
			test(t, proto)
		})
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

func (a answer) edited(edits []edit) answer {
	a.Header, a.Saw = maps.Clone(a.Header), slices.Clone(a.Saw)
	for _, e := range edits {
		e(&a)
	}
	return a
}

// read takes from resp what there is.
func (a *answer) read(resp *http.Response, client *progress) {
	defer resp.Body.Close()
	var body []byte
	for err := error(nil); err == nil; {
		buf := make([]byte, 32<<10)
		var n int
		n, err = resp.Body.Read(buf)
		body = append(body, buf[:n]...)
		client.reach(len(body))
		if err != nil && !errors.Is(err, io.EOF) {
			a.BodyErr = err.Error()
		}
	}
	a.Body = brief(string(body))
	a.Status, a.Header, a.Trailer = resp.Status, resp.Header, resp.Trailer
	a.Length, a.Encoding = resp.ContentLength, resp.TransferEncoding
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
			`"detail":"The request with this Idempotency-Key was processed and is not repeated, but its response could not be kept.",` +
			`"code":"response_not_stored","retryable":false,"original_status":` + strconv.Itoa(status) + "}\n"
		length(a)
	}
}

// A probe is the ResponseWriter of a handler, and its way to tell what it saw
// there.
type probe struct {
	http.ResponseWriter
	request *http.Request
	client  *progress
	mu      *sync.Mutex
	notes   *[]string
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

// set sets headers, given as names and values.
func (w *probe) set(headers ...string) {
	for i := 0; i < len(headers); i += 2 {
		w.Header().Set(headers[i], headers[i+1])
	}
}

func (w *probe) flush() { w.saw("flushed", w.control().Flush()) }

func (w *probe) control() *http.ResponseController {
	return http.NewResponseController(w.ResponseWriter)
}

// awaitClient returns when the client has n bytes of the body; see progress.
func (w *probe) awaitClient(n int) {
	timeout := time.After(10 * time.Second)
	for w.client.seen.Load() < int64(n) {
		select {
		case <-w.client.changed:
		case <-timeout:
			w.saw("the client did not get", n, "bytes in time")
			return
		}
	}
}

// progress is how much of the body the client has. 0 says that it has the
// header, interim that it has a 1xx response.
type progress struct {
	seen    atomic.Int64
	changed chan struct{}
}

func (p *progress) reach(n int) {
	p.seen.Store(int64(n))
	select {
	case p.changed <- struct{}{}:
	default: // is not known yet, or nobody waits
	}
}

const (
	interim = -1
	nothing = -2
)

func newProgress() *progress {
	p := &progress{changed: make(chan struct{}, 1)}
	p.seen.Store(nothing)
	return p
}

// A wire sends the requests of one shape.
type wire struct {
	t     *testing.T
	proto int
	shape shape
	store idempotency.Store
}

// check compares the three responses.
func (x *wire) check(beforeReplay func()) {
	direct, first := x.direct(), x.kept("first")
	beforeReplay()
	replay := x.kept("replay")
	require.Empty(x.t, direct.Err)
	require.Equal(x.t, direct.edited(x.shape.first), first, "the first response is not the direct one")
	require.Equal(x.t, replayOf(first).edited(x.shape.replay), replay, "the replay is not the first response")
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
	client, done := newProgress(), make(chan struct{})
	var mu sync.Mutex
	next := middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x.shape.handler(&probe{w, r, client, &mu, &a.Saw})
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
		client.reach(0)
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
	// Close of httptest would wait until a connection that was closed has lingered.
	x.t.Cleanup(func() { _ = server.Config.Close() })
	return server.URL, transport, received
}

func newWire(t *testing.T, proto int, s shape) *wire {
	return &wire{t: t, proto: proto, shape: s, store: idempotency.NewMemoryStore()}
}

// brief keeps a failure readable.
func brief(body string) string {
	if len(body) > 8<<10 {
		return fmt.Sprintf("%d bytes with CRC %08x", len(body), crc32.ChecksumIEEE([]byte(body)))
	}
	return body
}

// traced makes a note of 1xx responses.
func traced(ctx context.Context, a *answer, client *progress) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			a.Interim = append(a.Interim, fmt.Sprint(code, http.Header(header)))
			client.reach(interim)
			return nil
		},
	})
}

// bodyInParts makes the second part of the request's body wait for a value.
func bodyInParts(r *http.Request, first string, wait <-chan struct{}, second string) {
	r.ContentLength = -1
	r.Body = io.NopCloser(io.MultiReader(strings.NewReader(first), waitReader(wait), strings.NewReader(second)))
}

// waitReader has nothing to read, and tells so late.
type waitReader <-chan struct{}

func (r waitReader) Read([]byte) (int, error) {
	select {
	case <-r:
	case <-time.After(10 * time.Second):
	}
	return 0, io.EOF
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
	if len(c.tap.all) < 128<<10 { // no header is larger
		c.tap.all = append(c.tap.all, p[:n]...)
	}
	return n, err
}

// headerBytes returns the header of the final response in raw, byte by byte.
func headerBytes(raw []byte) http.Header {
	head, rest, _ := bytes.Cut(raw, []byte("\r\n\r\n"))
	for bytes.HasPrefix(head, []byte("HTTP/1.1 1")) && !bytes.HasPrefix(head, []byte("HTTP/1.1 101")) {
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
