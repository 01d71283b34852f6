package idempotency_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestRecorderBody(t *testing.T) {
	var shapes []shape
	// The buffers of net/http (2048 bytes on HTTP/1.1, 4096 on HTTP/2) and of
	// the recorder (4096, then 32768) end here; what fits into net/http's gets a
	// Content-Length.
	for _, size := range []int{1, 511, 512, 2047, 2048, 2049, 4095, 4096, 4097, 36863, 36864, 36865} {
		body := strings.Repeat("0123456789", size/10+1)[:size]
		shapes = append(shapes,
			shape{name: fmt.Sprint(size, " bytes"), handler: func(w *probe) { w.write(body) }},
			shape{name: fmt.Sprint(size, " bytes in two writes"), handler: func(w *probe) {
				w.write(body[:size/2])
				w.write(body[size/2:])
			}})
	}
	limit := func(n int64) idempotency.Options { return idempotency.Options{MaxResponseBytes: n} }
	checkShapes(t, append(shapes, []shape{
		{name: "all that is kept", opts: limit(10), handler: func(w *probe) {
			w.write("01234")
			w.write("56789")
		}},
		{name: "one byte more than is kept", opts: limit(10), handler: func(w *probe) {
			w.WriteHeader(201)
			w.write("0123456789")
			w.write("0")
			w.write("1")
		}, replay: []edit{notStored(201)}},
		{name: "more than is kept at once", opts: limit(10),
			handler: func(w *probe) { w.write("0123456789a") },
			replay:  []edit{notStored(200)}},
		{name: "more than is kept after a flush", opts: limit(10), handler: func(w *probe) {
			w.write("01234")
			w.flush()
			w.write("56789a")
		}, replay: []edit{notStored(200)}},
		{name: "5 MiB, over the default limit", handler: func(w *probe) {
			for range 5 {
				w.write(strings.Repeat("0123456789abcdef", 64<<10))
			}
			w.awaitClient(4 << 20) // streams
		}, replay: []edit{notStored(200)}},
		{name: "1 MiB, the default limit", handler: func(w *probe) {
			w.write(strings.Repeat("0123456789abcdef", 64<<10))
		}},
		{name: "WriteString", handler: func(w *probe) {
			w.saw(io.WriteString(w.ResponseWriter, "hello"))
			w.saw(w.ResponseWriter.(io.StringWriter).WriteString(", world"))
			w.saw(io.WriteString(w.ResponseWriter, ""))
		}},
		{name: "the handler reuses what it wrote", handler: func(w *probe) {
			buf := []byte("hello")
			w.saw(w.Write(buf))
			copy(buf, "XXXXX")
		}},
		{name: "io.Copy of a short body", handler: func(w *probe) {
			w.saw(io.Copy(w.ResponseWriter, io.LimitReader(strings.NewReader("hello"), 5)))
		}},
		{name: "io.Copy of a longer body",
			handler: func(w *probe) {
				_, fast := w.ResponseWriter.(io.ReaderFrom)
				w.saw(fast)
				w.saw(io.Copy(w.ResponseWriter, io.LimitReader(strings.NewReader(strings.Repeat("x", 1000)), 1000)))
			},
			// net/http on HTTP/1.1 sends the header early to be able to copy from
			// one file descriptor to the other, past any record.
			first: []edit{on(1, saw(0, "false"), length)}},
	}...))
}

// holdingWriter fails, and keeps what it was given, as HTTP/2 does for a while
// when a stream is reset.
type holdingWriter struct {
	http.ResponseWriter
	held []byte
}

func (w *holdingWriter) Write(p []byte) (int, error) {
	w.held = p
	return 0, errors.New("stream reset")
}

// What a client did not take must not turn into the answer for another.
func TestRecorderDoesNotReuseWhatAFailedWriteHolds(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(w, r.Body)
		idemtest.Must(err)
	})
	first := &holdingWriter{ResponseWriter: httptest.NewRecorder()}
	c.Handler.ServeHTTP(first, c.Request(idemtest.Exchange{Key: "first", Body: "the first answer"}))
	require.Equal(t, "the first answer", string(first.held))
	for i := range 100 {
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: "another's answer", Get: "200 another's answer"})
	}
	require.Equal(t, "the first answer", string(first.held))
}

// A response that is streamed because it is too large gives its buffer back
// once. Two who hold the same one would answer with each other's bytes.
func TestLargeResponsesDoNotShareBuffers(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 100}
	large := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			_, err := w.Write(make([]byte, 60))
			idemtest.Must(err)
		}
	})
	for i := range 20 {
		large.Do(large.Request(idemtest.Exchange{Key: fmt.Sprint(i)}))
	}
	depth := 0
	var c *idemtest.Client
	c = idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		key := idemtest.Execution(r).Key()
		_, err := io.WriteString(w, key+" begins, ")
		idemtest.Must(err)
		if depth++; depth < 20 { // another request on the same goroutine, in the middle of this one
			c.Check(t, depth, idemtest.Exchange{Key: fmt.Sprint("key", depth), Get: fmt.Sprintf("200 key%d begins, key%d ends", depth, depth)})
		}
		_, err = io.WriteString(w, key+" ends")
		idemtest.Must(err)
	})
	c.Check(t, 0, idemtest.Exchange{Key: "key0", Get: "200 key0 begins, key0 ends"})
	for i := range 20 {
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint("key", i), Get: fmt.Sprintf("replay 200 key%d begins, key%d ends", i, i)})
	}
	require.Equal(t, 20, c.Runs())
}

// What is kept of a large response is neither the buffer that the next one is
// captured in nor what the handler wrote from and goes on using.
func TestLargeAnswersStayAsTheyWere(t *testing.T) {
	for _, writes := range []int{1, 20} {
		t.Run(fmt.Sprint(writes, " writes"), func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					part := bytes.Repeat([]byte(idemtest.Execution(r).Key()), 20_000/writes)
					for range writes {
						_, err := w.Write(part)
						idemtest.Must(err)
					}
					clear(part)
				})
				answer := func(key string) string { return "200 " + strings.Repeat(key, 20_000) }
				keys := strings.Split("ab cd ef gh ij kl mn op", " ")
				for i, key := range keys {
					c.Check(t, i, idemtest.Exchange{Key: key, Get: answer(key)})
				}
				for i, key := range keys {
					c.Check(t, i, idemtest.Exchange{Key: key, Get: "replay " + answer(key)})
				}
			})
		})
	}
}
