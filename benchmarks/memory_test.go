// Package benchmarks compares the library with the least code that does the same
// job, and with no code at all.
package benchmarks

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// Most benchmarks run the bare handler, one or several floors, and the library in
// one process: what counts is the ratio. A floor is the least code that does the
// job; see floor_test.go. The script .ci/bench runs all benchmarks and compares
// the ratios with the goals.
//
// The workload is a request with 100 bytes of JSON and a key of 36 bytes, and a
// response with three headers and 200 bytes.

const (
	benchPath     = "/charge"
	benchKeyBytes = 36
	benchKeys     = 200_000
	smallBody     = 200
)

// chargeHandler reads its request and answers 201.
type chargeHandler struct {
	body   []byte
	closed bool // the handler must not run any more
}

var (
	chargeType     = []string{"application/json"}
	chargeLocation = []string{"/charges/ch_3MmlLr"}
	chargeVersion  = []string{"2"}
)

// ServeHTTP implements http.Handler. It writes a large body in pieces, as io.Copy
// and templates do.
func (h *chargeHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.closed {
		panic("the handler runs, and nothing should make it")
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		panic(err)
	}
	header := w.Header()
	header["Content-Type"] = chargeType
	header["Location"] = chargeLocation
	header["Api-Version"] = chargeVersion
	w.WriteHeader(http.StatusCreated)
	for body := h.body; len(body) > 0; {
		n := min(len(body), 32<<10)
		if _, err := w.Write(body[:n]); err != nil {
			panic(err)
		}
		body = body[n:]
	}
}

func newCharge(size int) *chargeHandler {
	return &chargeHandler{body: []byte(strings.Repeat(`{"id":"ch_3MmlLrLkdIwHu7"}`, size/26+1)[:size])}
}

// A nullWriter is a ResponseWriter that can be used again.
type nullWriter struct {
	header  http.Header
	status  int
	written int
}

func (w *nullWriter) Header() http.Header    { return w.header }
func (w *nullWriter) WriteHeader(status int) { w.status = status }
func (w *nullWriter) Write(p []byte) (int, error) {
	w.written += len(p)
	return len(p), nil
}

// A bodyReader is a request body that can be read again.
type bodyReader struct {
	data []byte
	off  int
}

func (b *bodyReader) Read(p []byte) (int, error) {
	if b.off == len(b.data) {
		return 0, io.EOF
	}
	n := copy(p, b.data[b.off:])
	b.off += n
	return n, nil
}

func (b *bodyReader) Close() error { return nil }

// A benchClient sends one request again and again, with a key that the caller
// chooses, and allocates nothing for it.
type benchClient struct {
	request *http.Request
	body    bodyReader
	lines   []string
	w       nullWriter
}

func newBenchClient(keyed bool) *benchClient {
	c := &benchClient{lines: []string{""}, w: nullWriter{header: make(http.Header)}}
	c.body.data = []byte(fmt.Sprintf("{%q:%q}", "memo", strings.Repeat("x", 89)))
	r, err := http.NewRequest(http.MethodPost, benchPath, &c.body)
	idemtest.Must(err)
	r.RequestURI = benchPath
	r.ContentLength = int64(len(c.body.data))
	r.Header["Content-Type"] = chargeType
	if keyed {
		r.Header["Idempotency-Key"] = c.lines
	}
	c.request = r
	return c
}

// setBody has the next requests send so many bytes.
func (c *benchClient) setBody(size int) {
	c.body.data = bytes.Repeat([]byte("x"), size)
	c.request.ContentLength = int64(size)
}

// do sends the request with a key. The answer is in c.w until the next call.
func (c *benchClient) do(h http.Handler, key string) {
	clear(c.w.header)
	c.w.status, c.w.written = 0, 0
	c.body.off = 0
	c.lines[0] = key
	h.ServeHTTP(&c.w, c.request)
}

// check fails unless the last answer was the handler's, or a replay of it.
func (c *benchClient) check(t testing.TB, size int, replayed bool) {
	t.Helper()
	require.Equal(t, http.StatusCreated, c.w.status)
	require.Equal(t, size, c.w.written)
	require.Equal(t, chargeLocation, c.w.header["Location"])
	if !replayed {
		require.NotContains(t, c.w.header, "Idempotent-Replayed")
	}
}

// checkAny is check for one of many clients, which may have sent nothing.
func (c *benchClient) checkAny(t testing.TB, size int) {
	t.Helper()
	if c.lines[0] != "" {
		c.check(t, size, true)
	}
}

// keyList has all keys in one string, without pointers for the collector to
// follow.
var keyList = func() string {
	var b strings.Builder
	for i := range benchKeys {
		fmt.Fprintf(&b, "8e03978e-40d5-43e8-bc93-%012x", i)
	}
	return b.String()
}()

// keyAt returns the key of number i.
func keyAt(i int) string {
	i = i % benchKeys * benchKeyBytes
	return keyList[i : i+benchKeyBytes]
}

// A contender does the job. wrap returns it with an empty store.
type contender struct {
	name string
	wrap func(next http.Handler) http.Handler
}

func bare(next http.Handler) http.Handler { return next }

func inMemory(next http.Handler) http.Handler {
	store := &idempotency.MemoryStore{MaxBytes: 4 << 30}
	return idempotency.Middleware(store, nil)(next)
}

func memoryContenders() []contender {
	return []contender{
		{"bare", bare},
		{"floor", newSlabFloor},
		{"floor-map", newMapFloor},
		{"idempotency", inMemory},
	}
}

// largeContenders are the contenders that keep a large body as it was captured.
func largeContenders() []contender {
	return []contender{{"bare", bare}, {"floor", newMapFloor}, {"idempotency", inMemory}}
}

// each runs a benchmark for each contender. The order differs from run to run: the
// first may find the machine in another state than the last.
func each(b *testing.B, list []contender, run func(b *testing.B, c contender)) {
	for _, n := range rand.Perm(len(list)) {
		c := list[n]
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			run(b, c)
		})
	}
}

// reportCPU reports the processor time of an operation since start, the garbage
// collector's part included. On a machine that does other work too, it tells more
// than the clock. It is deferred in front of the loop of a benchmark.
func reportCPU(b *testing.B, start time.Duration) {
	b.ReportMetric(float64(processTime()-start)/float64(b.N), "cpu-ns/op")
}

// first is firstOf with the usual request.
func first(b *testing.B, size int, c contender) { firstOf(b, newBenchClient(true), size, c) }

// firstOf has the handler run under a new key each time. A full store is replaced
// by an empty one, and the collector takes the old one.
func firstOf(b *testing.B, client *benchClient, size int, c contender) {
	keys := min(benchKeys, max(1, 16<<20/size))
	charge := newCharge(size)
	var h http.Handler
	defer reportCPU(b, processTime())
	for i := 0; b.Loop(); i++ {
		if i%keys == 0 {
			h = c.wrap(charge)
		}
		client.do(h, keyAt(i%keys))
	}
	client.check(b, size, false)
}

// replay is replayOf with the usual request.
func replay(b *testing.B, size int, c contender) { replayOf(b, newBenchClient(true), size, c) }

// replayOf has the same answer sent again and again.
func replayOf(b *testing.B, client *benchClient, size int, c contender) {
	charge := newCharge(size)
	h := c.wrap(charge)
	client.do(h, keyAt(0))
	charge.closed = c.name != "bare"
	defer reportCPU(b, processTime())
	for b.Loop() {
		client.do(h, keyAt(0))
	}
	client.check(b, size, true)
}

// replayMany is replay among many keys, so that no cache has them all.
func replayMany(b *testing.B, c contender) {
	client, charge := newBenchClient(true), newCharge(smallBody)
	h := c.wrap(charge)
	for i := range benchKeys {
		client.do(h, keyAt(i))
	}
	charge.closed = c.name != "bare"
	defer reportCPU(b, processTime())
	for i := 0; b.Loop(); i += 7919 { // a prime, for another order
		client.do(h, keyAt(i))
	}
	client.check(b, smallBody, true)
}

// A crowd has goroutines work until next says that b.N operations are done.
type crowd func(b *testing.B, work func(next func() bool))

// perProcessor is a crowd of one goroutine for each processor, or as many as
// b.SetParallelism says.
func perProcessor(b *testing.B, work func(next func() bool)) {
	b.RunParallel(func(pb *testing.PB) { work(pb.Next) })
}

// parallel is first by a crowd.
func parallel(b *testing.B, c contender, run crowd) {
	charge := newCharge(smallBody)
	var handlers atomic.Pointer[http.Handler]
	fresh := func() {
		h := c.wrap(charge)
		handlers.Store(&h)
	}
	fresh()
	var keys atomic.Int64
	b.ResetTimer()
	defer reportCPU(b, processTime())
	run(b, func(next func() bool) {
		client := newBenchClient(true)
		for next() {
			i := int(keys.Add(1))
			if i%benchKeys == 0 {
				fresh()
			}
			client.do(*handlers.Load(), keyAt(i))
		}
		client.checkAny(b, smallBody)
	})
}

// parallelReplay is replayMany by a crowd.
func parallelReplay(b *testing.B, c contender, run crowd) {
	const keys = 1000
	charge := newCharge(smallBody)
	h := c.wrap(charge)
	client := newBenchClient(true)
	for i := range keys {
		client.do(h, keyAt(i))
	}
	charge.closed = c.name != "bare"
	b.ResetTimer()
	defer reportCPU(b, processTime())
	run(b, func(next func() bool) {
		client := newBenchClient(true)
		for i := 0; next(); i++ {
			client.do(h, keyAt(i%keys))
		}
		client.checkAny(b, smallBody)
	})
}

func BenchmarkPassThrough(b *testing.B) {
	list := []contender{{"bare", bare}, {"floor", newPassFloor}, {"idempotency", inMemory}}
	each(b, list, func(b *testing.B, c contender) {
		client := newBenchClient(false)
		h := c.wrap(newCharge(smallBody))
		defer reportCPU(b, processTime())
		for b.Loop() {
			client.do(h, "")
		}
		client.check(b, smallBody, false)
	})
}

func BenchmarkReplay(b *testing.B) {
	list := []contender{
		{"bare", bare}, {"floor", newMapFloor}, {"floor-slab", newSlabFloor}, {"idempotency", inMemory},
	}
	each(b, list, func(b *testing.B, c contender) { replay(b, smallBody, c) })
}

func BenchmarkReplayManyKeys(b *testing.B) {
	list := []contender{
		{"bare", bare}, {"floor", newMapFloor}, {"floor-slab", newSlabFloor}, {"idempotency", inMemory},
	}
	each(b, list, replayMany)
}

func BenchmarkReplayParallel(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { parallelReplay(b, c, perProcessor) })
}

func BenchmarkFirst(b *testing.B) {
	each(b, memoryContenders(), func(b *testing.B, c contender) { first(b, smallBody, c) })
}

func BenchmarkFirstParallel(b *testing.B) {
	each(b, memoryContenders(), func(b *testing.B, c contender) { parallel(b, c, perProcessor) })
}

func BenchmarkFirst64KiB(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { first(b, 64<<10, c) })
}

func BenchmarkFirst15KiB(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { first(b, 15<<10, c) })
}

func BenchmarkFirst1MiB(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { first(b, 1<<20, c) })
}

func BenchmarkReplay64KiB(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { replay(b, 64<<10, c) })
}

func BenchmarkReplay1MiB(b *testing.B) {
	each(b, largeContenders(), func(b *testing.B, c contender) { replay(b, 1<<20, c) })
}
