package idempotency_test

import (
	"context"
	"net/http"
	"sync"
	"testing"
)

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
