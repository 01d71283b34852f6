package idempotency_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func nilOptions() *idempotency.Options { return &idempotency.Options{} }

// brokenBody is a body that breaks off.
type brokenBody struct {
	io.Reader
	err error
}

func (b *brokenBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err == io.EOF {
		err = b.err
	}
	return n, err
}

func (b *brokenBody) Close() error { return nil }

// upload is a body over the limit of the tests below, with n bytes of fill.
func upload(n int, fill byte) string {
	return strings.Repeat("u", 100) + strings.Repeat(string(fill), n)
}

// reading reads n bytes of the body (all: -1) and answers 201 with what its
// last read came to.
func reading(n int64) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var err error
		if n < 0 {
			_, err = io.Copy(io.Discard, r.Body)
		} else {
			_, err = io.CopyN(io.Discard, r.Body, n)
		}
		w.WriteHeader(http.StatusCreated)
		if err != nil {
			_, _ = io.WriteString(w, err.Error())
		}
	}
}

func TestBodyThatBreaksOffBeforeTheClaim(t *testing.T) {
	s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	c := idemtest.NewClient(s, nilOptions(), nil)
	r := c.Request(idemtest.Exchange{Key: "a"})
	r.Body = &brokenBody{strings.NewReader(`{"amo`), io.ErrUnexpectedEOF}
	got, p := idemtest.Describe(t, c.Do(r))
	require.Equal(t, "400 body_incomplete", got)
	require.True(t, p.Retryable)
	require.Zero(t, s.Count("Acquire"))
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
}

func TestOuterMaxBytesReader(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), nil)
	r := c.Request(idemtest.Exchange{Key: "a"})
	r.Body = http.MaxBytesReader(nil, r.Body, 5)
	got, _ := idemtest.Describe(t, c.Do(r))
	require.Equal(t, "413 body_too_large", got)
	require.Zero(t, c.Runs())
}

func TestLargeBodies(t *testing.T) {
	small := idempotency.Options{MaxBufferedBody: 64}
	rows := map[string]struct {
		handler  http.HandlerFunc
		first    string
		retry    string
		unsized  bool // chunked, without Content-Length
		retryGet string
	}{
		"the same":                         {reading(-1), upload(500, 'x'), upload(500, 'x'), false, "replay 201 "},
		"the same, chunked":                {reading(-1), upload(500, 'x'), upload(500, 'x'), true, "replay 201 "},
		"another end":                      {reading(-1), upload(500, 'x'), upload(499, 'x') + "y", false, "422 key_reused"},
		"another end, chunked":             {reading(-1), upload(500, 'x'), upload(499, 'x') + "y", true, "422 key_reused"},
		"shorter":                          {reading(-1), upload(500, 'x'), upload(499, 'x'), false, "422 key_reused"},
		"longer":                           {reading(-1), upload(500, 'x'), upload(501, 'x'), false, "422 key_reused"},
		"longer, chunked":                  {reading(-1), upload(500, 'x'), upload(501, 'x'), true, "422 key_reused"},
		"all of the declared length":       {reading(600), upload(500, 'x'), upload(501, 'x'), false, "422 key_reused"},
		"small instead of large":           {reading(-1), upload(500, 'x'), "x", false, "422 key_reused"},
		"large instead of small":           {reading(-1), "x", upload(500, 'x'), false, "422 key_reused"},
		"the part that the handler read":   {reading(150), upload(500, 'x'), upload(50, 'x') + upload(400, 'y'), false, "replay 201 "},
		"not the part that it read":        {reading(151), upload(500, 'x'), upload(50, 'x') + upload(400, 'y'), false, "422 key_reused"},
		"shorter than the part":            {reading(150), upload(500, 'x'), upload(40, 'x'), false, "422 key_reused"},
		"nothing was read":                 {reading(0), upload(500, 'x'), upload(500, 'y'), false, "replay 201 "},
		"exactly what is buffered":         {reading(-1), strings.Repeat("x", 64), strings.Repeat("x", 64), true, "replay 201 "},
		"one more than what is buffered":   {reading(-1), strings.Repeat("x", 65), strings.Repeat("x", 65), true, "replay 201 "},
		"one more, with another last byte": {reading(-1), strings.Repeat("x", 65), strings.Repeat("x", 64) + "y", true, "422 key_reused"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := idemtest.NewClient(store, &small, row.handler)
				request := func(body string) *http.Request {
					r := c.Request(idemtest.Exchange{Key: "a", Body: body})
					if row.unsized {
						r.ContentLength = -1
					}
					return r
				}
				got, _ := idemtest.Describe(t, c.Do(request(row.first)))
				require.Equal(t, "201 ", got)
				retry := request(row.retry)
				got, _ = idemtest.Describe(t, c.Do(retry))
				require.Equal(t, row.retryGet, got)
				require.Equal(t, 1, c.Runs())
				rest, err := io.ReadAll(retry.Body)
				require.NoError(t, err)
				require.Empty(t, rest, "the rest was drained")
			})
		})
	}
}

// A deployment that changes the limit makes another request of a body between
// the old and the new one: it is refused, and does not run again.
func TestLimitChangesBetweenTries(t *testing.T) {
	store := idempotency.NewMemoryStore()
	large := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64}, reading(-1))
	small := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 4096}, reading(-1))
	for i, pair := range [][2]*idemtest.Client{{large, small}, {small, large}} {
		key := string(rune('a' + i))
		pair[0].Check(t, i, idemtest.Exchange{Key: key, Body: upload(500, 'x'), Get: "201 "})
		pair[1].Check(t, i, idemtest.Exchange{Key: key, Body: upload(500, 'x'), Get: "422 key_reused"})
		pair[0].Check(t, i, idemtest.Exchange{Key: key, Body: upload(500, 'x'), Get: "replay 201 "})
	}
}

// A stranger who learns the key of a run that died must not run in its place,
// whatever the size of the bodies.
func TestTakeOverByAnotherRequest(t *testing.T) {
	for name, bodies := range map[string][2]string{
		"large, large": {upload(500, 'x'), upload(500, 'x')},
		"large, small": {upload(500, 'x'), "x"},
		"small, large": {"x", upload(500, 'x')},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64}, idemtest.PanicOnce)
				c.Check(t, 0, idemtest.Exchange{Key: "a", Header: auth("alice"), Body: bodies[0], Get: "panic"})
				time.Sleep(time.Minute)
				c.Check(t, 1, idemtest.Exchange{Key: "a", Header: auth("mallory"), Body: bodies[1], Get: "422 key_reused"})
				c.Check(t, 2, idemtest.Exchange{Key: "a", Header: auth("alice"), Body: bodies[0], Get: "201 attempt 2"})
			})
		})
	}
}

// A form that an outer middleware parsed is not there to be read any more, but
// it still tells two requests apart.
func TestFormThatWasParsedOutside(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.PostFormValue("amount"))
	})
	send := func(body string) string {
		r := c.Request(idemtest.Exchange{Key: "a", Body: body, Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}})
		require.NoError(t, r.ParseForm())
		got, _ := idemtest.Describe(t, c.Do(r))
		return got
	}
	require.Equal(t, "200 1", send("amount=1"))
	require.Equal(t, "422 key_reused", send("amount=1000"))
	require.Equal(t, "replay 200 1", send("amount=1"))
}

// The credentials count for a large body as well.
func TestLargeBodyWithOtherCredentials(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64}, reading(-1))
	c.Check(t, 0, idemtest.Exchange{Key: "a", Body: upload(500, 'x'), Header: auth("alice"), Get: "201 "})
	c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(500, 'x'), Header: auth("mallory"), Get: "422 key_reused"})
}

// A body that broke off tells a handler to start again, unless it says that it
// has done what it was asked for.
func TestLargeBodyThatBreaksOff(t *testing.T) {
	answering := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if status > 0 {
				w.WriteHeader(status)
			}
		}
	}
	tooLarge := &http.MaxBytesError{Limit: 600}
	for name, row := range map[string]struct {
		atMostOnce  bool
		err         error // io.ErrUnexpectedEOF if nil
		handler     http.HandlerFunc
		first, then string
		original    int
	}{
		"done":                             {handler: reading(-1), first: "201 unexpected EOF", then: "409 response_not_stored", original: 201},
		"not done":                         {handler: answering(400), first: "400 ", then: "400 "},
		"no word":                          {handler: answering(0), first: "400 body_incomplete", then: "200 "},
		"at most once, done":               {atMostOnce: true, handler: reading(-1), first: "201 unexpected EOF", then: "replay 201 unexpected EOF"},
		"at most once, not done":           {atMostOnce: true, handler: answering(400), first: "400 ", then: "replay 400 "},
		"at most once, without word":       {atMostOnce: true, handler: answering(0), first: "409 outcome_unknown", then: "409 outcome_unknown"},
		"at a limit: every retry meets it": {err: tooLarge, handler: reading(-1), first: "201 " + tooLarge.Error(), then: "replay 201 " + tooLarge.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64, AtMostOnce: row.atMostOnce}, row.handler)
			r := c.Request(idemtest.Exchange{Key: "a", Body: upload(600, 'x')})
			if row.err == nil {
				row.err = io.ErrUnexpectedEOF
			}
			r.Body = &brokenBody{strings.NewReader(upload(500, 'x')), row.err}
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, row.first, got)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(600, 'x'), Get: row.then, Original: row.original})
			if row.original > 0 {
				c.Check(t, 2, idemtest.Exchange{Key: "a", Body: upload(600, 'y'), Get: "422 key_reused"})
			}
		})
	}
}

func TestRetryOfALargeBodyBreaksOff(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64}, reading(-1))
	c.Check(t, 0, idemtest.Exchange{Key: "a", Body: upload(500, 'x'), Get: "201 "})
	r := c.Request(idemtest.Exchange{Key: "a", Body: upload(500, 'x')})
	r.Body = &brokenBody{strings.NewReader(upload(400, 'x')), errors.New("connection reset")}
	got, _ := idemtest.Describe(t, c.Do(r))
	require.Equal(t, "400 body_incomplete", got)
	require.Equal(t, 1, c.Runs())
}

// A goroutine that a handler leaves behind reads nothing, least of all the body
// of the next request, whose bytes may lie in the same buffer.
func TestBodyAfterTheHandlerReturned(t *testing.T) {
	for name, body := range map[string]string{"small": "small", "large": upload(500, 'x')} {
		t.Run(name, func(t *testing.T) {
			var kept io.ReadCloser
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64}, func(w http.ResponseWriter, r *http.Request) {
				kept = r.Body
				_, err := r.Body.Read(make([]byte, 2))
				require.NoError(t, err)
			})
			c.Check(t, 0, idemtest.Exchange{Key: "a", Body: body, Get: "200 "})
			n, err := kept.Read(make([]byte, 10))
			require.Zero(t, n)
			require.ErrorIs(t, err, http.ErrBodyReadAfterClose)
		})
	}
}

// One that is reading while the handler returns gets nothing either, and what it
// would have read does not count.
func TestReadThatOutlivesTheHandler(t *testing.T) {
	in, out := io.Pipe()
	read := make(chan error, 1)
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64}, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.CopyN(io.Discard, r.Body, 100)
		idemtest.Must(err)
		started := make(chan struct{})
		go func() {
			close(started)
			_, err := r.Body.Read(make([]byte, 10))
			read <- err
		}()
		<-started
	})
	r := c.Request(idemtest.Exchange{Key: "a", Body: upload(500, 'x')})
	r.Body = in
	go func() { _, _ = io.WriteString(out, upload(0, 'x')) }()
	got, _ := idemtest.Describe(t, c.Do(r))
	require.Equal(t, "200 ", got)
	go func() { _, _ = io.WriteString(out, "more") }()
	require.ErrorIs(t, <-read, http.ErrBodyReadAfterClose)
	c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(500, 'y'), Get: "replay 200 "})
}

func TestClosedBodyStaysClosed(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, r.Body.Close())
		_, err := r.Body.Read(make([]byte, 1))
		require.ErrorIs(t, err, http.ErrBodyReadAfterClose)
	})
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 "})
}

func TestRequestWithoutABody(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, http.NoBody, r.Body)
		require.Zero(t, r.ContentLength)
	})
	for name, r := range map[string]*http.Request{
		"NoBody": httptest.NewRequest("DELETE", "/charge/1", nil),
		"nil":    {Method: "DELETE", RequestURI: "/charge/2", Header: http.Header{}},
	} {
		r.Header.Set("Idempotency-Key", "a")
		got, _ := idemtest.Describe(t, c.Do(r))
		require.Equal(t, "200 ", got, name)
	}
	require.Equal(t, 2, c.Runs())
}

// Temporary files of a form that the handler parsed are removed.
func TestMultipartFilesAreRemoved(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	part, err := mw.CreateFormFile("f", "f.bin")
	require.NoError(t, err)
	_, err = part.Write(bytes.Repeat([]byte("x"), 1000))
	require.NoError(t, err)
	require.NoError(t, mw.Close())

	files := func() int {
		names, err := filepath.Glob(filepath.Join(os.TempDir(), "*"))
		require.NoError(t, err)
		return len(names)
	}
	for _, panics := range []bool{false, true} {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), nil)
		c.Handler = idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			require.NoError(t, r.ParseMultipartForm(0))
			require.Equal(t, 1, files())
			if panics {
				panic("boom")
			}
		}))
		r := c.Request(idemtest.Exchange{Key: "a", Body: form.String()})
		r.Header.Set("Content-Type", mw.FormDataContentType())
		c.Do(r)
		require.Zero(t, files())
	}
}

func TestCustomFingerprintSeesTheBody(t *testing.T) {
	var seen string
	opts := idempotency.Options{Fingerprint: func(r *http.Request, body []byte) []byte {
		seen = string(body)
		sum := sha256.Sum256(body)
		return sum[:]
	}}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = io.Copy(w, r.Body)
	})
	for i := range 10 { // with and without a buffer that has room
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: "payload", Get: "201 payload"})
	}
	require.Equal(t, "payload", seen)
}

// What the client was asked for with 100 Continue it sends, so it is read before
// an answer of the middleware's own.
func TestUploadThatWasAskedForIsDrained(t *testing.T) {
	for name, row := range map[string]struct {
		read int64
		left int
	}{"asked for": {100, 0}, "not asked for": {0, 600}} {
		t.Run(name, func(t *testing.T) {
			s := &idemtest.ScriptedStore{MemoryStore: idempotency.NewMemoryStore()}
			s.OnComplete = func(context.Context, string, string, idempotency.Result) error { return idempotency.ErrLeaseLost }
			c := idemtest.NewClient(s, &idempotency.Options{MaxBufferedBody: 64}, reading(row.read))
			sent := strings.NewReader(upload(500, 'x'))
			r := c.Request(idemtest.Exchange{Key: "a", Body: upload(500, 'x'), Header: http.Header{"Expect": {"100-continue"}}})
			r.Body = io.NopCloser(sent)
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, "409 in_progress", got)
			require.Equal(t, row.left, sent.Len())
		})
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

// A goroutine that the handler leaves behind reads nothing of the body from the
// moment on at which the response is put together: it may take the place of the
// body.
func TestBodyIsClosedBeforeTheResponseIsStored(t *testing.T) {
	for name, body := range map[string]string{"small": "small", "large": upload(500, 'x')} {
		t.Run(name, func(t *testing.T) {
			var left *http.Request
			looked := false
			store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
				if method == "Complete" {
					looked = true
					n, err := left.Body.Read(make([]byte, 10))
					require.Zero(t, n)
					require.ErrorIs(t, err, http.ErrBodyReadAfterClose)
				}
			}}
			c := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64}, func(_ http.ResponseWriter, r *http.Request) { left = r })
			c.Check(t, 0, idemtest.Exchange{Key: "a", Body: body, Get: "200 "})
			require.True(t, looked)
		})
	}
}

// The request that outer middleware holds is not changed.
func TestRequestIsCopied(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("X-Seen", "yes")
		r.URL.Path = "/elsewhere"
		var b bytes.Buffer
		_, err := b.ReadFrom(r.Body)
		require.NoError(t, err)
		require.Equal(t, `{"amount":1}`, b.String())
	})
	r := c.Request(idemtest.Exchange{Key: "a"})
	body, ctx := r.Body, r.Context()
	c.Do(r)
	require.Equal(t, body, r.Body)
	require.Equal(t, ctx, r.Context())
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

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
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

// Trailers come with the end of the body, which the handler sees after its copy
// of the request was made; those that nothing declared, too.
func TestServerTrailersOfTheRequest(t *testing.T) {
	for name, declared := range map[string]string{"declared": "Trailer: X-Sum\r\n", "undeclared": ""} {
		for _, size := range []int{10, 2 << 20} {
			t.Run(fmt.Sprint(name, " after ", size, " bytes"), func(t *testing.T) {
				seen := make(chan string, 1)
				s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
					_, err := io.Copy(io.Discard, r.Body)
					idemtest.Must(err)
					seen <- r.Trailer.Get("X-Sum")
				})
				status, _ := raw(t, s, fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\r\nTransfer-Encoding: chunked\r\n%s\r\n"+
					"%x\r\n%s\r\n0\r\nX-Sum: 42\r\n\r\n", declared, size, strings.Repeat("x", size)))
				require.Equal(t, "HTTP/1.1 200 OK", status)
				require.Equal(t, "42", <-seen)
			})
		}
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

// What outer middleware has parsed is its own to remove.
func TestMultipartFilesOfOuterMiddlewareStay(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	part, err := mw.CreateFormFile("f", "f.bin")
	require.NoError(t, err)
	_, err = part.Write(bytes.Repeat([]byte("x"), 1000))
	require.NoError(t, err)
	require.NoError(t, mw.Close())
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), nil)
	r := c.Request(idemtest.Exchange{Key: "a", Body: form.String()})
	r.Header.Set("Content-Type", mw.FormDataContentType())
	require.NoError(t, r.ParseMultipartForm(0))
	require.NotNil(t, c.Do(r))
	f, err := r.MultipartForm.File["f"][0].Open()
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, r.MultipartForm.RemoveAll())
}

// Browsers send a method as the page has written it.
func TestMethodsInLowerCase(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true}, nil)
	for i, x := range []idemtest.Exchange{
		{Method: "patch", Get: "400 key_missing"},
		{Method: "patch", Key: "a", Get: "201 charge 1"},
		{Method: "PATCH", Key: "a", Get: "replay 201 charge 1"},
		{Method: "Patch", Key: "a", Get: "replay 201 charge 1"},
		{Method: "get", Key: "a", Get: "201 charge 2"},
		{Method: "get", Key: "a", Get: "201 charge 3"},
	} {
		c.Check(t, i, x)
	}
}

// What a header says a request is about is part of the request.
func TestHeadersOfTheFingerprint(t *testing.T) {
	scope := func(*http.Request) string { return "shop" }
	print := func(*http.Request, []byte) []byte { return nil }
	for name, row := range map[string]struct {
		opts          idempotency.Options
		first, second http.Header
		get           string
	}{
		"a corrected precondition":       {idempotency.Options{}, http.Header{"If-Match": {`"v1"`}}, http.Header{"If-Match": {`"v2"`}}, "422 key_reused"},
		"the same precondition":          {idempotency.Options{}, http.Header{"If-Match": {`"v1"`}}, http.Header{"If-Match": {`"v1"`}}, "replay 201 charge 1"},
		"a precondition that is dropped": {idempotency.Options{}, http.Header{"If-None-Match": {"*"}}, nil, "422 key_reused"},
		"a precondition that is added":   {idempotency.Options{}, nil, http.Header{"If-Unmodified-Since": {"x"}}, "422 key_reused"},
		"another precondition":           {idempotency.Options{}, http.Header{"If-Match": {"*"}}, http.Header{"If-None-Match": {"*"}}, "422 key_reused"},
		"If-Modified-Since":              {idempotency.Options{}, http.Header{"If-Modified-Since": {"x"}}, http.Header{"If-Modified-Since": {"y"}}, "422 key_reused"},
		"in a scope":                     {idempotency.Options{Scope: scope}, http.Header{"If-Match": {`"v1"`}}, http.Header{"If-Match": {`"v2"`}}, "422 key_reused"},
		"with a custom fingerprint":      {idempotency.Options{Fingerprint: print}, http.Header{"If-Match": {`"v1"`}}, http.Header{"If-Match": {`"v2"`}}, "422 key_reused"},
		"another tenant": {idempotency.Options{FingerprintHeaders: []string{"x-tenant-id"}},
			http.Header{"X-Tenant-Id": {"1"}}, http.Header{"X-Tenant-Id": {"2"}}, "422 key_reused"},
		"another tenant, in a scope": {idempotency.Options{FingerprintHeaders: []string{"X-Tenant-Id"}, Scope: scope},
			http.Header{"X-Tenant-Id": {"1"}}, http.Header{"X-Tenant-Id": {"2"}}, "422 key_reused"},
		"the same tenant": {idempotency.Options{FingerprintHeaders: []string{"X-Tenant-Id", "Stripe-Account"}},
			http.Header{"X-Tenant-Id": {"1"}}, http.Header{"X-Tenant-Id": {"1"}}, "replay 201 charge 1"},
		"values of two headers changed places": {idempotency.Options{FingerprintHeaders: []string{"X-A", "X-B"}},
			http.Header{"X-A": {"1"}, "X-B": {"2"}}, http.Header{"X-A": {"2"}, "X-B": {"1"}}, "422 key_reused"},
		"a header that nobody named": {idempotency.Options{}, http.Header{"X-Trace": {"1"}}, http.Header{"X-Trace": {"2"}}, "replay 201 charge 1"},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &row.opts, nil)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Header: row.first, Get: "201 charge 1"})
			c.Check(t, 2, idemtest.Exchange{Key: "a", Header: row.second, Get: row.get})
		})
	}
}

// A request in which Key finds no key passes through. Its handler, and what is
// outside of the middleware, see of the request what they see without it.
func TestServerPassesThroughWhatHasNoKey(t *testing.T) {
	readAll := func(r *http.Request) string {
		body, err := io.ReadAll(r.Body)
		return fmt.Sprint(len(body), " ", sha256.Sum256(body), " ", err)
	}
	nothing := func(r *http.Request) string { return "nothing" }
	chunks := func(trailer string, sizes ...int) string {
		s := "Transfer-Encoding: chunked\r\n\r\n"
		for _, n := range sizes {
			s += fmt.Sprintf("%x\r\n%s\r\n", n, strings.Repeat("x", n))
		}
		return s + "0\r\n" + trailer + "\r\n"
	}
	for name, row := range map[string]struct {
		send    string
		handler func(r *http.Request) string
	}{
		"small":                           {"Content-Length: 5\r\n\r\nhello", readAll},
		"none":                            {"\r\n", readAll},
		"empty":                           {chunks(""), readAll},
		"large":                           {"Content-Length: 500\r\n\r\n" + strings.Repeat("x", 500), readAll},
		"chunked":                         {chunks("", 10), readAll},
		"chunked, of the limit":           {chunks("", 64), readAll},
		"chunked, a byte more":            {chunks("", 64, 1), readAll},
		"chunked, large":                  {chunks("", 30, 500, 70000), readAll},
		"a declared trailer":              {"Trailer: X-Sum\r\n" + chunks("X-Sum: 42\r\n", 10), readAll},
		"a trailer after what is large":   {"Trailer: X-Sum\r\n" + chunks("X-Sum: 42\r\n", 500), readAll},
		"an undeclared trailer":           {chunks("X-Sum: 42\r\n", 10), readAll},
		"an undeclared one, large":        {chunks("X-Sum: 42\r\n", 500), readAll},
		"broken off, declared":            {"Content-Length: 500\r\n\r\n" + strings.Repeat("x", 100), readAll},
		"broken off, chunked":             {"Transfer-Encoding: chunked\r\n\r\n64\r\n" + strings.Repeat("x", 100) + "\r\n64\r\nxxx", readAll},
		"malformed, chunked":              {"Transfer-Encoding: chunked\r\n\r\n64\r\n" + strings.Repeat("x", 100) + "\r\nnonsense\r\n", readAll},
		"large, not asked for":            {"Expect: 100-continue\r\nContent-Length: 500\r\n\r\n", nothing},
		"not read":                        {chunks("", 500), nothing},
		"read in part by what is outside": {chunks("", 500), func(r *http.Request) string { _, err := io.CopyN(io.Discard, r.Body, 20); return fmt.Sprint(err) }},
		"closed":                          {chunks("", 50), closeEarly},
		"closed, large":                   {chunks("", 500), closeEarly},
		"parsed":                          {"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\na=1", func(r *http.Request) string { return r.FormValue("a") }},
	} {
		t.Run(name, func(t *testing.T) {
			see := func(middleware func(http.Handler) http.Handler) (saw string) {
				seen := make(chan string, 1)
				inner := middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					r.Pattern = "/the/route"
					seen <- fmt.Sprintln(row.handler(r), r.ContentLength, r.TransferEncoding, r.Trailer)
				}))
				s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					inner.ServeHTTP(w, r)
					rest, err := io.ReadAll(r.Body)
					seen <- <-seen + fmt.Sprintln("outside:", len(rest), err, r.Pattern, r.Form, r.Trailer)
				}))
				conn, err := net.Dial("tcp", s.Listener.Addr().String())
				require.NoError(t, err)
				defer conn.Close()
				_, err = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\n"+row.send)
				require.NoError(t, err)
				require.NoError(t, conn.(*net.TCPConn).CloseWrite())
				answer, err := io.ReadAll(conn)
				require.NoError(t, err)
				line, _, _ := strings.Cut(string(answer), "\r\n")
				return <-seen + line
			}
			none := func(*http.Request, []byte) (string, error) { return "", nil }
			want := see(func(h http.Handler) http.Handler { return h })
			require.Equal(t, want, see(idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64, Key: none})))
		})
	}
}

// closeEarly reads a little, closes the body, and tries to read on.
func closeEarly(r *http.Request) string {
	n, err := io.ReadFull(r.Body, make([]byte, 2))
	closed := r.Body.Close()
	after, late := r.Body.Read(make([]byte, 10))
	return fmt.Sprint(n, err, closed, after, late)
}

// A goroutine that a handler leaves behind reads its own body, and not that of a
// request that comes after it.
func TestBodyThatWentThroughIsItsOwn(t *testing.T) {
	var bodies []io.Reader
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
		Key: func(*http.Request, []byte) (string, error) { return "", nil },
	}, func(_ http.ResponseWriter, r *http.Request) { bodies = append(bodies, r.Body) })
	for i := range 10 {
		c.Check(t, i, idemtest.Exchange{Body: fmt.Sprint("body ", i), Get: "200 "})
	}
	for i, body := range bodies {
		b, err := io.ReadAll(body)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint("body ", i), string(b))
	}
}
