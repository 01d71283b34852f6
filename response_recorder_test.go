package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestRecorderStatus(t *testing.T) {
	checkShapes(t, []shape{
		{name: "no write at all", handler: func(*probe) {}},
		{name: "WriteHeader only", handler: func(w *probe) { w.WriteHeader(202) }},
		{name: "a body with an implicit 200", handler: func(w *probe) { w.write("hello") }},
		{name: "a status and a body", handler: func(w *probe) {
			w.Header().Set("Location", "/charges/1")
			w.WriteHeader(201)
			w.write("charged")
		}},
		{name: "204", handler: func(w *probe) { w.WriteHeader(204) }},
		{name: "204 with a body is refused", handler: func(w *probe) {
			w.WriteHeader(204)
			w.write("no")
			w.saw(io.WriteString(w.ResponseWriter, "no"))
		}},
		{name: "204 with an empty body",
			handler: func(w *probe) {
				w.WriteHeader(204)
				w.write("")
			},
			// HTTP/2 of net/http refuses even that. Ours is as on HTTP/1.1.
			first: []edit{on(2, saw(0, "wrote 0 <nil>"))}},
		{name: "304 with an ETag", handler: func(w *probe) {
			w.Header().Set("ETag", `"v1"`)
			w.Header().Set("Content-Type", "text/plain") // not sent on HTTP/1.1
			w.WriteHeader(304)
			w.write("no")
		}},
		{name: "304 with the length of what was not sent",
			handler: func(w *probe) {
				w.Header().Set("Content-Length", "5")
				w.WriteHeader(304)
			},
			// A Content-Length that is not the body's is not kept. HTTP/1.1 does
			// not send it in the first place.
			replay: []edit{on(2, remove("Content-Length"), func(a *answer) { a.Length, a.BodyErr = 0, "" })}},
		{name: "the first WriteHeader wins", handler: func(w *probe) {
			w.WriteHeader(201)
			w.WriteHeader(500)
			w.write("created")
		}},
		{name: "WriteHeader after Write is too late", handler: func(w *probe) {
			w.write("fine")
			w.WriteHeader(409)
		}},
		{name: "an empty Write is a Write", handler: func(w *probe) {
			w.write("")
			w.Header().Set("X-Late", "1")
			w.WriteHeader(409)
		}},
		{name: "999", handler: func(w *probe) { w.WriteHeader(999) },
			opts: idempotency.Options{ShouldStore: func(int, http.Header) bool { return true }}},
		{name: "WriteHeader panics as in net/http", handler: func(w *probe) {
			for _, status := range []int{-1, 0, 99, 1000} {
				func() {
					defer func() { w.saw(recover()) }()
					w.WriteHeader(status)
				}()
			}
			w.WriteHeader(201)
			w.WriteHeader(1000) // does not panic any more
		}},
	})
}

func TestRecorderInformational(t *testing.T) {
	checkShapes(t, []shape{
		{name: "103 with a Link, then other headers", handler: func(w *probe) {
			w.set("Link", "</style.css>; rel=preload", "X-Both", "1")
			w.WriteHeader(103)
			w.Header().Del("Link")
			w.Header().Set("X-Final", "1")
			w.WriteHeader(201)
			w.write("hello")
		}},
		{name: "103 with what is around the middleware",
			outer: around("X-Outer", "1", "Link", "</outer>"),
			handler: func(w *probe) {
				w.Header().Add("Link", "</inner>")
				w.WriteHeader(103)
				w.Header().Del("X-Outer")
			}},
		{name: "100", handler: func(w *probe) {
			w.WriteHeader(100)
			body, err := io.ReadAll(w.request.Body)
			w.saw(string(body), err)
		}},
		// A final status on HTTP/1.1, one of the 1xx on HTTP/2, which has no use
		// for it.
		{name: "101", handler: func(w *probe) {
			w.Header().Set("Connection", "close")
			w.WriteHeader(101)
			w.write("no")
		}, replay: []edit{on(1, remove("Connection"))}},
		{name: "two 1xx", handler: func(w *probe) {
			w.Header().Set("Content-Length", "5") // not in a 1xx
			w.WriteHeader(102)
			w.Header().Set("X-More", "1")
			w.WriteHeader(103)
			w.write("hello")
		}},
		{name: "1xx after the final status is nothing", handler: func(w *probe) {
			w.WriteHeader(201)
			w.WriteHeader(103)
			w.write("hello")
			w.flush()
			w.WriteHeader(103)
		}, replay: []edit{length}},
		{name: "the client gets 1xx before the handler ends", handler: func(w *probe) {
			w.WriteHeader(103)
			w.awaitClient(interim)
			w.WriteHeader(201)
		}},
		{name: "Expect: 100-continue", request: expectContinue, handler: func(w *probe) {
			body, err := io.ReadAll(w.request.Body)
			w.saw(string(body), err)
		}, replay: []edit{continued}}, // the replay compares the body
		{name: "Expect: 100-continue and a body that is not read", request: expectContinue,
			handler: func(w *probe) { w.WriteHeader(400) },
			// The middleware reads the body before the handler runs, which then has
			// no reason to end the connection.
			first: []edit{continued, on(1, remove("Connection"))}, replay: []edit{continued}},
		{name: "Expect: 100-continue and a large body that is not read", request: expectContinue,
			opts:    idempotency.Options{MaxBufferedBody: 1},
			handler: func(w *probe) { w.WriteHeader(400) }},
	})
}

func expectContinue(r *http.Request) { r.Header.Set("Expect", "100-continue") }

func continued(a *answer) { a.Interim = []string{"100 map[]"} }

func TestRecorderFlush(t *testing.T) {
	checkShapes(t, []shape{
		{name: "before any write", handler: func(w *probe) {
			w.Header().Set("X-Early", "1")
			w.flush()
			w.awaitClient(0)
			w.Header().Set("X-Late", "1")
			w.write("hello")
		}, replay: []edit{length}},
		{name: "after WriteHeader", handler: func(w *probe) {
			w.WriteHeader(202)
			w.flush()
			w.awaitClient(0)
		}, replay: []edit{length}},
		{name: "in the middle of the body", handler: func(w *probe) {
			w.WriteHeader(201)
			w.write("one ")
			w.flush()
			w.awaitClient(4)
			w.write("two ")
			w.flush()
			w.awaitClient(8)
			w.write("three")
		}, replay: []edit{length}},
		{name: "by http.Flusher", handler: func(w *probe) {
			w.write("one")
			w.ResponseWriter.(http.Flusher).Flush()
			w.awaitClient(3)
		}, replay: []edit{length}},
		{name: "by FlushError", handler: func(w *probe) {
			w.write("one")
			w.saw(w.ResponseWriter.(interface{ FlushError() error }).FlushError())
			w.awaitClient(3)
		}, replay: []edit{length}},
		{name: "with a Content-Length", handler: func(w *probe) {
			w.Header().Set("Content-Length", "6")
			w.write("one")
			w.flush()
			w.awaitClient(3)
			w.write("two")
		}},
		{name: "of a long body", handler: func(w *probe) {
			w.write(strings.Repeat("x", 10<<10))
			w.flush()
			w.awaitClient(10 << 10)
			w.write(strings.Repeat("y", 10<<10))
		}},
		{name: "204", handler: func(w *probe) {
			w.WriteHeader(204)
			w.flush()
			w.write("no")
		}, replay: []edit{on(2, func(a *answer) { a.Length = 0 })}}, // net/http's client knows then
		{name: "after more than is kept", opts: idempotency.Options{MaxResponseBytes: 10},
			handler: func(w *probe) {
				w.write("0123456789abcdef")
				w.flush()
				w.awaitClient(16)
				w.write("!")
			}, replay: []edit{notStored(200)}},
	})
}

// Handlers of the standard library are the ones that know net/http's writers
// best.
func TestRecorderStandardHandlers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file.txt")
	modified := time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)
	require.NoError(t, os.WriteFile(file, []byte(strings.Repeat("0123456789", 1000)), 0o600))
	require.NoError(t, os.Chtimes(file, modified, modified))

	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Declared")
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(103)
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "1")
		w.Header().Set("Vary", "Accept")
		w.WriteHeader(201)
		_, _ = io.WriteString(w, "from behind")
		w.Header().Set("X-Declared", "1")
		w.Header().Set(http.TrailerPrefix+"X-Prefixed", "1")
	}))
	t.Cleanup(backend.Close)
	target, err := url.Parse(backend.URL)
	require.NoError(t, err)

	serve := func(h http.Handler) func(*probe) {
		return func(w *probe) { h.ServeHTTP(w.ResponseWriter, w.request) }
	}
	byRange := func(spec string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Range", spec) }
	}
	serveFile := func(w *probe) { http.ServeFile(w.ResponseWriter, w.request, file) }
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	// Had it returned when its time is over, it could still be in time.
	slow := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-over })

	checkShapes(t, []shape{
		{name: "Error", outer: around("X-Outer", "1"), handler: func(w *probe) {
			w.Header().Set("Content-Length", "5")
			http.Error(w, "bad", 400)
		}},
		{name: "NotFoundHandler", handler: serve(http.NotFoundHandler())},
		{name: "RedirectHandler", handler: serve(http.RedirectHandler("/elsewhere", http.StatusSeeOther))},
		{name: "ServeFile", handler: serveFile},
		{name: "ServeFile of a range", request: byRange("bytes=5-14"), handler: serveFile},
		{name: "ServeFile of a range that is not there", request: byRange("bytes=50000-"), handler: serveFile},
		{name: "TimeoutHandler in time", handler: serve(http.TimeoutHandler(http.NotFoundHandler(), time.Minute, "slow"))},
		{name: "TimeoutHandler too late", handler: serve(http.TimeoutHandler(slow, time.Millisecond, "slow")),
			opts: idempotency.Options{ShouldStore: func(int, http.Header) bool { return true }}},
		{name: "ReverseProxy", outer: around("Vary", "Origin"), handler: serve(httputil.NewSingleHostReverseProxy(target)),
			replay: []edit{on(2, length)}},
		{name: "MaxBytesReader", handler: func(w *probe) {
			_, err := io.ReadAll(http.MaxBytesReader(w.ResponseWriter, w.request.Body, 1))
			w.saw(err)
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
		},
			// The middleware has read the body, so that the connection need not be
			// closed to get rid of the rest.
			first: []edit{on(1, remove("Connection"))}},
	})
}

func TestRecorderCapabilities(t *testing.T) {
	checkShapes(t, []shape{
		{name: "what a ResponseWriter is", handler: func(w *probe) {
			_, flusher := w.ResponseWriter.(http.Flusher)
			_, flushErrorer := w.ResponseWriter.(interface{ FlushError() error })
			_, stringWriter := w.ResponseWriter.(io.StringWriter)
			w.saw(flusher, flushErrorer, stringWriter)
			_, hijacker := w.ResponseWriter.(http.Hijacker)
			_, readerFrom := w.ResponseWriter.(io.ReaderFrom)
			_, pusher := w.ResponseWriter.(http.Pusher)
			_, closeNotifier := w.ResponseWriter.(interface{ CloseNotify() <-chan bool })
			_, unwrapper := w.ResponseWriter.(interface{ Unwrap() http.ResponseWriter })
			w.saw(hijacker, readerFrom, pusher, closeNotifier, unwrapper)
		},
			// Hijack, ReadFrom and Push would bypass the record. CloseNotify is
			// deprecated, and tells of a cancellation that the handler is spared.
			first: []edit{saw(1, "false false false false false")}},
		{name: "Hijack is refused", handler: func(w *probe) {
			if w.request.Header.Get("X-Request-Id") == "direct" && w.request.ProtoMajor == 1 {
				w.saw(true) // net/http would do it
			} else {
				_, _, err := w.control().Hijack()
				w.saw(errors.Is(err, http.ErrNotSupported))
			}
			w.write("not hijacked")
		}},
		{name: "deadlines and full duplex", handler: func(w *probe) {
			for _, at := range []time.Time{time.Now().Add(time.Hour), {}} {
				w.saw(w.control().SetReadDeadline(at), w.control().SetWriteDeadline(at))
			}
			w.saw(w.control().EnableFullDuplex())
			w.write("hello")
		}},
	})
}

// What is around the middleware decides what the handler can do.
func TestRecorderOuterCapabilities(t *testing.T) {
	type noMore struct{ http.ResponseWriter }
	wrapped := func(wrap func(http.ResponseWriter) http.ResponseWriter) func(http.Handler) http.Handler {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(wrap(w), r) })
		}
	}
	handler := func(w *probe) {
		w.set("X-Early", "1")
		w.flush()
		w.set("X-Late", "1")
		w.WriteHeader(201)
		w.write("hello")
		w.saw(w.control().SetReadDeadline(time.Time{}), w.control().SetWriteDeadline(time.Time{}))
		w.saw(w.control().EnableFullDuplex())
	}
	checkShapes(t, []shape{
		{name: "nothing", handler: handler,
			outer: wrapped(func(w http.ResponseWriter) http.ResponseWriter { return noMore{w} })},
		{name: "what it unwraps to", handler: handler,
			outer:  wrapped(func(w http.ResponseWriter) http.ResponseWriter { return unwrapper{noMore{w}, w} }),
			replay: []edit{length}},
	})
}

type unwrapper struct {
	http.ResponseWriter
	inner http.ResponseWriter
}

func (w unwrapper) Unwrap() http.ResponseWriter { return w.inner }

// In full duplex the client may hold back its body until it has the beginning
// of the answer.
func TestRecorderFullDuplex(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		rest := make(chan struct{}, 1)
		newWire(t, proto, shape{
			opts:    idempotency.Options{MaxBufferedBody: 1},
			request: func(r *http.Request) { bodyInParts(r, "ab", rest, "cd") },
			handler: func(w *probe) {
				w.saw(w.control().EnableFullDuplex())
				w.flush()
				w.awaitClient(0)
				rest <- struct{}{}
				body, err := io.ReadAll(w.request.Body)
				w.saw(string(body), err)
			},
			replay: []edit{length},
		}).check(func() { close(rest) }) // a replay has to compare the whole body first
	})
}

func TestRecorderReadDeadline(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		never := make(chan struct{})
		defer close(never)
		x := newWire(t, proto, shape{
			opts:    idempotency.Options{MaxBufferedBody: 1},
			request: func(r *http.Request) { bodyInParts(r, "ab", never, "cd") },
			handler: func(w *probe) {
				w.saw(w.control().SetReadDeadline(time.Unix(1, 0)))
				_, err := io.ReadAll(w.request.Body)
				w.saw(errors.Is(err, os.ErrDeadlineExceeded))
				w.WriteHeader(408) // frees the key
			},
		})
		direct := x.direct()
		require.Equal(t, []string{"<nil>", "true"}, direct.Saw)
		require.Equal(t, direct, x.kept("first"))
		require.Equal(t, direct, x.kept("second"))
	})
}

// The client does not get the answer in time, and comes again for it.
func TestRecorderWriteDeadline(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		x := newWire(t, proto, shape{handler: func(w *probe) {
			w.saw(w.control().SetWriteDeadline(time.Unix(1, 0)))
			w.write("hello")
		}})
		direct, first, replay := x.direct(), x.kept("first"), x.kept("replay")
		require.NotEmpty(t, direct.Err)
		require.NotEmpty(t, first.Err)
		require.Equal(t, direct.Saw, first.Saw)
		require.Equal(t, "200 OK", replay.Status)
		require.Equal(t, "hello", replay.Body)
	})
}

// A goroutine that the handler leaves behind writes between the end of the
// handler and the answer, when the response is being stored, and after it.
func TestRecorderRefusesWritesAfterTheHandler(t *testing.T) {
	const refused = "idempotency: write after the handler returned"
	for _, flushed := range []bool{false, true} {
		t.Run(fmt.Sprintf("flushed %v", flushed), func(t *testing.T) {
			eachProto(t, func(t *testing.T, proto int) {
				var left *probe
				x := newWire(t, proto, shape{handler: func(w *probe) {
					left = w
					w.write("hello")
					if flushed {
						w.flush()
					}
				}})
				late := func() {
					_, err := left.Write([]byte("late"))
					left.saw(err)
					_, err = io.WriteString(left.ResponseWriter, "late")
					left.saw(err)
					left.saw(left.control().Flush())
					left.ResponseWriter.(http.Flusher).Flush()
					left.WriteHeader(103)
					left.WriteHeader(500)
				}
				direct := x.direct()
				x.store = &idemtest.ObservedStore{Store: x.store, Look: func(_ context.Context, method string) {
					if method == "Complete" {
						done := make(chan struct{})
						go func() { defer close(done); late() }()
						<-done
					}
				}}
				first := x.kept("first")
				late()
				replay := x.kept("replay")

				direct.Saw = append(direct.Saw, refused, refused, refused)
				require.Equal(t, direct, first)
				require.Equal(t, append(direct.Saw, refused, refused, refused), *left.notes)
				length(&first)
				require.Equal(t, replayOf(first), replay)
			})
		})
	}
}

// What a goroutine writes while the handler returns is sent and kept exactly as
// far as it was accepted.
func TestRecorderAcceptsWritesUntilTheHandlerReturns(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		started, accepted := make(chan struct{}, 1), make(chan []byte, 1)
		x := newWire(t, proto, shape{opts: idempotency.Options{MaxResponseBytes: 1 << 30}, handler: func(w *probe) {
			go func() {
				var body []byte
				for n := 0; ; n++ {
					part := fmt.Append(nil, n, " ")
					if _, err := w.Write(part); err != nil {
						break
					}
					if body = append(body, part...); n == 3 {
						started <- struct{}{}
					}
				}
				accepted <- body
			}()
			<-started
		}})
		first := x.kept("first")
		require.Equal(t, brief(string(<-accepted)), first.Body)
		require.Equal(t, replayOf(first), x.kept("replay"))
	})
}

// Without a key, or with a method that needs none, the handler gets what the
// middleware got.
func TestRecorderStaysOut(t *testing.T) {
	for _, request := range []struct{ method, key string }{
		{"GET", "key"}, {"HEAD", "key"}, {"OPTIONS", "key"}, {"TRACE", "key"}, {"CONNECT", "key"}, {"POST", ""},
	} {
		t.Run(request.method, func(t *testing.T) {
			ran := false
			w, r := httptest.NewRecorder(), httptest.NewRequest(request.method, "http://example.com/", nil)
			if request.key != "" {
				r.Header.Set("Idempotency-Key", request.key)
			}
			idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(
				func(gotW http.ResponseWriter, gotR *http.Request) {
					ran = true
					require.Same(t, w, gotW)
					require.Same(t, r, gotR)
				})).ServeHTTP(w, r)
			require.True(t, ran)
		})
	}
}

// An outerWriter is what middleware around this one may put around the
// ResponseWriter.
type outerWriter struct {
	http.ResponseWriter
	sent    bool
	onSend  func(h http.Header)              // before the header goes out
	onWrite func(h http.Header, body []byte) // before the first byte, unless WriteHeader was called
}

func (w *outerWriter) WriteHeader(status int) {
	if !w.sent && status >= 200 {
		w.sent = true
		if w.onSend != nil {
			w.onSend(w.Header())
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *outerWriter) Write(p []byte) (int, error) {
	if !w.sent {
		if w.onWrite != nil {
			w.onWrite(w.Header(), p)
		}
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}

func (w *outerWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func wrapped(template outerWriter) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			outer := template
			outer.ResponseWriter = w
			next.ServeHTTP(&outer, r)
		})
	}
}

// An outerHook is what middleware around this one shares with the handler.
type outerHook struct {
	header http.Header         // of the outer ResponseWriter
	inner  http.ResponseWriter // that of the handler
}

type outerHookKey struct{}

func hookOf(w *probe) *outerHook { return w.request.Context().Value(outerHookKey{}).(*outerHook) }

// hooked is middleware that sets headers while the handler runs, or when the
// header goes out, on the ResponseWriter of the handler.
func hooked(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hook := &outerHook{header: w.Header()}
		w.Header().Set("X-Outer", "old")
		outer := &outerWriter{ResponseWriter: w, onSend: func(http.Header) {
			if hook.inner != nil {
				hook.inner.Header().Set("X-Before", "1")
			}
		}}
		next.ServeHTTP(outer, r.WithContext(context.WithValue(r.Context(), outerHookKey{}, hook)))
	})
}

// early is middleware that sets a header with the first response, be it a 1xx.
func early(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(&earlyWriter{w}, r) })
}

type earlyWriter struct{ http.ResponseWriter }

func (w *earlyWriter) WriteHeader(status int) {
	if w.Header()["X-Early"] == nil {
		w.Header().Set("X-Early", "of the outer")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *earlyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// noFlush has the method and cannot do it.
type noFlush struct{ http.ResponseWriter }

func (w *noFlush) FlushError() error { return http.ErrNotSupported }

// What middleware around this one does to a response is done to the first answer
// and to the replay as it would be done to the handler's own.
func TestRecorderUnderOtherWriters(t *testing.T) {
	compressor := wrapped(outerWriter{onWrite: func(h http.Header, body []byte) {
		h["Content-Type"] = []string{http.DetectContentType(body)}
		h["X-Encoded"] = []string{"yes"}
	}})
	inPlace := wrapped(outerWriter{onSend: func(h http.Header) {
		for i := range h["X-List"] {
			h["X-List"][i] += "; outer"
		}
	}})
	trailing := wrapped(outerWriter{onSend: func(h http.Header) { h.Set(http.TrailerPrefix+"X-Outer", "1") }})
	fallback := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			outer := &outerWriter{ResponseWriter: w}
			next.ServeHTTP(outer, r)
			if !outer.sent {
				outer.WriteHeader(http.StatusNotFound)
			}
		})
	}
	checkShapes(t, []shape{
		{name: "a header that is only implied", outer: compressor, handler: func(w *probe) { w.write("<html>hello") }},
		{name: "a header that is implied by a flush", outer: compressor,
			handler: func(w *probe) {
				w.write("<html>hello")
				w.flush()
				w.write("again")
			},
			replay: []edit{length}},
		{name: "a header that is not implied", outer: compressor, handler: func(w *probe) {
			w.WriteHeader(200)
			w.write("<html>hello")
		}},
		{name: "no answer", outer: fallback, handler: func(w *probe) { w.set("X-Handler", "1") }},
		{name: "values that are changed in place", outer: inPlace, handler: func(w *probe) {
			w.set("X-List", "a")
			w.write("hello")
		}},
		{name: "values that are changed in place at a flush", outer: inPlace,
			handler: func(w *probe) {
				w.set("X-List", "a")
				w.write("hello")
				w.flush()
			},
			replay: []edit{length}},
		{name: "a trailer of the outer one", outer: trailing,
			handler: func(w *probe) {
				w.WriteHeader(200)
				w.flush()
			},
			replay: []edit{on(2, length)}},
		{name: "values of a 1xx that are changed in place", outer: early,
			handler: func(w *probe) {
				w.WriteHeader(103)
				w.Header()["X-Early"][0] = "of the handler"
				w.WriteHeader(201)
			}},
		{name: "headers that are set meanwhile", outer: hooked,
			handler: func(w *probe) {
				h := hookOf(w).header
				h.Set("X-Outer", "new")
				h.Add("X-Meanwhile", "1")
				w.write("hello")
			},
			replay: []edit{set("X-Outer", "old"), remove("X-Meanwhile")}},
		{name: "a header that is set when all goes out", outer: hooked,
			handler: func(w *probe) {
				hookOf(w).inner = w.ResponseWriter
				w.WriteHeader(201)
			},
			replay: []edit{remove("X-Before")}},
		{name: "a write of nothing", outer: fallback, handler: func(w *probe) { w.write("") }},
		{name: "a write of nothing and a trailer",
			handler: func(w *probe) {
				w.set("Trailer", "X-T")
				w.write("")
				w.set("X-T", "1")
			}},
		{name: "a flush of nothing", outer: fallback,
			handler: func(w *probe) { w.flush() },
			replay:  []edit{length}},
		{name: "a flush that is not supported",
			outer: func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(&noFlush{w}, r) })
			},
			handler: func(w *probe) {
				w.write("hello")
				w.flush()
			}},
	})
}

// As in net/http, a goroutine that flushes may meet one that sets trailers.
func TestFlushWhileTrailersAreSet(t *testing.T) {
	eachProto(t, func(t *testing.T, proto int) {
		newWire(t, proto, shape{
			handler: func(w *probe) {
				w.WriteHeader(201)
				header := w.Header() // net/http, too, must be asked for it before
				var flushing sync.WaitGroup
				flushing.Go(func() {
					for range 100 {
						_ = w.control().Flush()
					}
				})
				for range 100 {
					header.Set(http.TrailerPrefix+"X-T", "1")
				}
				flushing.Wait()
				w.write("hello")
			},
			replay: []edit{on(2, length)},
		}).check(func() {})
	})
}

// goneWriter is that of a client who has hung up.
type goneWriter struct {
	*httptest.ResponseRecorder
	gone bool
}

func (w *goneWriter) Write(p []byte) (int, error) {
	if w.gone {
		return 0, errors.New("broken pipe")
	}
	return w.ResponseRecorder.Write(p)
}

// As long as the response is kept a client who leaves does not stop the
// handler, which streams to him.
func TestStreamGoesOnWithoutItsClient(t *testing.T) {
	writer := &goneWriter{ResponseRecorder: httptest.NewRecorder()}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxResponseBytes: 20}, func(w http.ResponseWriter, _ *http.Request) {
		_, err := io.WriteString(w, "one ")
		require.NoError(t, err)
		require.NoError(t, http.NewResponseController(w).Flush())
		writer.gone = true
		for _, part := range []string{"two ", "three "} {
			n, err := io.WriteString(w, part)
			require.NoError(t, err)
			require.Equal(t, len(part), n)
		}
	})
	c.Handler.ServeHTTP(writer, c.Request(idemtest.Exchange{Key: "a"}))
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 200 one two three "})
	require.Equal(t, 1, c.Runs())
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
