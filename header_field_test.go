package idempotency_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

const someDate = "Mon, 01 Jan 2001 00:00:00 GMT"

// around returns middleware that sets headers, given as names and values.
func around(headers ...string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i < len(headers); i += 2 {
				w.Header().Add(headers[i], headers[i+1])
			}
			next.ServeHTTP(w, r)
		})
	}
}

func TestRecorderHeaders(t *testing.T) {
	keepAll := idempotency.Options{ReplayHeader: func(string) bool { return true }}
	checkShapes(t, []shape{
		{name: "headers after WriteHeader are too late", handler: func(w *probe) {
			w.set("X-Set", "1", "X-Deleted", "1")
			w.WriteHeader(201)
			w.set("X-Set", "2", "X-Late", "1")
			w.Header().Del("X-Deleted")
			w.write("hello")
		}},
		{name: "the header map is changed in place after WriteHeader", handler: func(w *probe) {
			header := w.Header()
			header["X-List"] = []string{"a", "b"}
			list := header["X-List"]
			w.WriteHeader(201)
			list[0], header["X-List"][1] = "x", "y"
			clear(header)
		}},
		{name: "the header map is changed in place after Write", handler: func(w *probe) {
			header := w.Header()
			w.write("hello")
			header.Set("X-Late", "1")
		}},
		{name: "several values in their order", handler: func(w *probe) {
			for _, v := range []string{"b", "a", "c", "a", ""} {
				w.Header().Add("X-List", v)
			}
		}},
		{name: "a Date that is not sent", handler: func(w *probe) { w.Header()["Date"] = nil }},
		{name: "a Date of the handler's", handler: func(w *probe) { w.Header().Set("Date", someDate) }},
		{name: "a Content-Type that is not sent", handler: func(w *probe) {
			w.Header()["Content-Type"] = nil
			w.write("<html>")
		}},
		{name: "names that are not canonical", handler: func(w *probe) {
			w.Header()["x-LOWER-upper"] = []string{"1", "2"}
			w.Header()["X-Lower-Upper"] = []string{"3"}
			w.Header()["content-type"] = []string{"text/x-mine"}
			w.write("hello") // is sniffed all the same
		}},
		{name: "names and values that net/http does not send", handler: func(w *probe) {
			w.Header()["Not A Name"] = []string{"1"}
			w.Header()[""] = []string{"1"}
			w.set("X-Injected", "1\r\nX-Evil: 1", "X-Spaces", "  between  ")
		}},
		{name: "bytes that are not UTF-8", handler: func(w *probe) { w.set("X-Latin-1", "caf\xe9 \x80\xff") }},
		{name: "Set-Cookie is not replayed",
			outer: around("Set-Cookie", "outer=1"),
			handler: func(w *probe) {
				http.SetCookie(w, &http.Cookie{Name: "inner", Value: "1"})
				w.Header()["set-cookie"] = []string{"lower=1"}
			},
			replay: []edit{set("Set-Cookie", "outer=1"), remove("set-cookie")}},
		{name: "Set-Cookie is replayed by option", opts: keepAll, handler: func(w *probe) {
			http.SetCookie(w, &http.Cookie{Name: "a", Value: "1"})
			http.SetCookie(w, &http.Cookie{Name: "b", Value: "2"})
		}},
		{name: "headers that an option leaves out",
			opts:    idempotency.Options{ReplayHeader: func(name string) bool { return name != "X-Left-Out" }},
			handler: func(w *probe) { w.set("X-Left-Out", "1", "X-Kept", "1") },
			replay:  []edit{remove("X-Left-Out")}},

		// What belongs to the connection goes out first and is never kept.
		{name: "Connection: close", opts: keepAll, handler: func(w *probe) {
			w.Header().Set("Connection", "close")
			w.write("hello")
		}, replay: []edit{remove("Connection")}},
		{name: "headers of the connection", opts: keepAll, handler: func(w *probe) {
			w.Header().Set("Connection", "keep-alive, X-Hop")
			w.Header().Add("Connection", "x-other-hop")
			w.set("Keep-Alive", "timeout=5", "X-Hop", "1", "X-Other-Hop", "1", "X-Kept", "1")
		}, replay: []edit{remove("Connection", "Keep-Alive", "X-Hop", "X-Other-Hop")}},
		{name: "headers of the connection that it does not name", opts: keepAll, handler: func(w *probe) {
			w.set("Keep-Alive", "timeout=5", "Upgrade", "h2c", "TE", "trailers", "X-Kept", "1")
		}, replay: []edit{remove("Keep-Alive", "Upgrade", "Te")}},
		{name: "Connection is changed too late", handler: func(w *probe) {
			w.set("Connection", "X-Hop", "X-Hop", "1")
			w.WriteHeader(200)
			w.Header()["Connection"][0] = "X-Changed"
			w.Header().Del("Connection")
		}, replay: []edit{remove("Connection", "X-Hop")}},
		{name: "Upgrade", opts: keepAll, handler: func(w *probe) {
			w.set("Connection", "Upgrade", "Upgrade", "h2c")
			w.WriteHeader(426)
		}, replay: []edit{remove("Connection", "Upgrade")}},
		{name: "headers of a proxy", opts: keepAll, handler: func(w *probe) {
			w.set("Proxy-Authenticate", "Basic", "Proxy-Authentication-Info", "1", "Proxy-Authorization", "1")
			w.set("Proxy-Connection", "keep-alive", "Proxy-Status", "kept, it is end-to-end")
		}, replay: []edit{remove("Proxy-Authenticate", "Proxy-Authentication-Info", "Proxy-Authorization", "Proxy-Connection")}},
		{name: "Transfer-Encoding: chunked", opts: keepAll, handler: func(w *probe) {
			w.set("Transfer-Encoding", "chunked", "Content-Type", "text/x-mine")
			w.write("hello")
		}, replay: []edit{length}},
		{name: "Transfer-Encoding: chunked is not sniffed", handler: func(w *probe) {
			w.Header().Set("Transfer-Encoding", "chunked") // net/http on HTTP/1.1 does not sniff then
			w.write("<html>")
		}, replay: []edit{length}},
		{name: "Transfer-Encoding: identity", handler: func(w *probe) {
			w.Header().Set("Transfer-Encoding", "identity") // until the connection is closed
			w.Header().Set("Content-Type", "text/x-mine")
			w.write("hello")
		}, replay: []edit{remove("Connection"), length}},
		{name: "names that only look like the connection's", handler: func(w *probe) {
			w.set("X-Connection", "close", "Upgrade-Insecure-Requests", "1")
		}},

		{name: "headers under 64 KiB", handler: func(w *probe) { w.set("X-Large", strings.Repeat("x", 63<<10)) }},
		{name: "headers over 64 KiB", handler: func(w *probe) {
			w.Header().Set("X-Large", strings.Repeat("x", 64<<10))
			w.WriteHeader(201)
			w.write("hello")
		}, replay: []edit{notStored(201)}},
		{name: "headers and trailers over 64 KiB", handler: func(w *probe) {
			w.set("Trailer", "X-More", "X-Large", strings.Repeat("x", 40<<10))
			w.write("hello")
			w.Header().Set("X-More", strings.Repeat("x", 40<<10))
		}, replay: []edit{notStored(200)}},
	})
}

// The middleware around sets its headers anew for each request: on a replay
// those of the current request count, neither doubled nor stale.
func TestRecorderOuterHeaders(t *testing.T) {
	outer := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id := r.Header.Get("X-Request-Id") // direct, first, replay
			w.Header().Set("X-Request-Id", id)
			w.Header().Add("Vary", "Origin")
			w.Header().Set("Access-Control-Allow-Origin", "https://"+id+".example")
			w.Header().Set("Content-Type", "application/json")
			next.ServeHTTP(w, r)
		})
	}
	id := func(id string) edit {
		return func(a *answer) {
			*a = a.edited([]edit{set("X-Request-Id", id), set("Access-Control-Allow-Origin", "https://"+id+".example")})
		}
	}
	checkShapes(t, []shape{
		{name: "left alone", outer: outer, handler: func(w *probe) {
			w.saw(w.Header()["Vary"], w.Header()["Content-Type"])
			w.write("{}")
		}, first: []edit{id("first")}, replay: []edit{id("replay")}},
		{name: "set to what they are", outer: outer, handler: func(w *probe) {
			w.set("X-Request-Id", w.request.Header.Get("X-Request-Id"), "Content-Type", "application/json")
		}, first: []edit{id("first")}, replay: []edit{id("replay")}},
		{name: "added to", outer: outer, handler: func(w *probe) {
			w.Header().Add("X-Request-Id", "inner")
			w.Header().Add("Vary", "Accept")
			w.Header().Add("Vary", "Cookie")
		}, first: []edit{id("first"), set("X-Request-Id", "first", "inner")},
			replay: []edit{id("replay"), set("X-Request-Id", "replay", "inner")}},
		{name: "overridden", outer: outer, handler: func(w *probe) {
			w.set("X-Request-Id", "inner", "Vary", "*", "Content-Type", "text/csv")
			w.write("a,b")
		}, first: []edit{id("first"), set("X-Request-Id", "inner")},
			replay: []edit{id("replay"), set("X-Request-Id", "inner")}},
		{name: "deleted", outer: outer, handler: func(w *probe) {
			for _, name := range []string{"X-Request-Id", "Vary", "Access-Control-Allow-Origin", "Content-Type"} {
				w.Header().Del(name)
			}
			w.write("<html>")
		}},
		{name: "nil instead", outer: outer, handler: func(w *probe) {
			w.Header()["X-Request-Id"] = nil
			w.Header()["Access-Control-Allow-Origin"] = []string{}
			w.Header()["Vary"] = nil
			w.Header()["Content-Type"] = nil
			w.write("<html>")
		}},
		{name: "the first value only", outer: around("Vary", "Origin", "Vary", "Cookie"),
			handler: func(w *probe) { w.Header()["Vary"] = w.Header()["Vary"][:1] }},
		{name: "changed in place", outer: around("Vary", "Origin"),
			handler: func(w *probe) { w.Header()["Vary"][0] = "Accept" }},
		{name: "in front of them", outer: around("Vary", "Origin"),
			handler: func(w *probe) { w.Header()["Vary"] = []string{"Accept", "Origin"} }},
		{name: "nil outside, set inside", outer: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"], w.Header()["Content-Type"] = nil, nil
				next.ServeHTTP(w, r)
			})
		}, handler: func(w *probe) {
			w.Header().Set("Date", someDate)
			w.write("<html>")
		}},
		{name: "trailers from outside", outer: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Trailer", "Server-Timing")
				next.ServeHTTP(w, r)
				w.Header().Set("Server-Timing", r.Header.Get("X-Request-Id"))
			})
		}, handler: func(w *probe) {
			w.Header().Add("Trailer", "X-Sum")
			w.write("hello")
			w.Header().Set("X-Sum", "1")
		}, first: []edit{trailer("Server-Timing", "first")}, replay: []edit{trailer("Server-Timing", "replay")}},
		{name: "trailers from outside, set before", outer: idTrailer, handler: func(w *probe) { w.write("hello") },
			first:  []edit{set("X-Request-Id", "first"), trailer("X-Request-Id", "first")},
			replay: []edit{set("X-Request-Id", "replay"), trailer("X-Request-Id", "replay")}},
		{name: "trailers from outside, added to", outer: idTrailer, handler: func(w *probe) {
			w.Header().Add("X-Request-Id", "a")
			w.write("hello")
			w.Header().Add("X-Request-Id", "b")
		}, first: []edit{set("X-Request-Id", "first", "a"), trailer("X-Request-Id", "first", "a", "b")},
			replay: []edit{set("X-Request-Id", "replay", "a"), trailer("X-Request-Id", "replay", "a", "b")}},
		{name: "trailers from outside, added to after a flush", outer: idTrailer, handler: func(w *probe) {
			w.Header().Add("X-Request-Id", "a")
			w.flush()
			w.Header().Add("X-Request-Id", "b")
		}, first: []edit{set("X-Request-Id", "first", "a"), trailer("X-Request-Id", "first", "a", "b")},
			replay: []edit{on(2, length), set("X-Request-Id", "replay", "a"), trailer("X-Request-Id", "replay", "a", "b")}},
		{name: "trailers from outside, added to before", outer: idTrailer, handler: func(w *probe) {
			w.Header().Add("X-Request-Id", "a")
			w.write("hello")
		}, first: []edit{set("X-Request-Id", "first", "a"), trailer("X-Request-Id", "first", "a")},
			replay: []edit{set("X-Request-Id", "replay", "a"), trailer("X-Request-Id", "replay", "a")}},
		{name: "trailers from outside, deleted", outer: idTrailer, handler: func(w *probe) {
			w.write("hello")
			w.Header().Del("X-Request-Id")
		}, first: []edit{set("X-Request-Id", "first")}, replay: []edit{set("X-Request-Id", "replay")}},
	})
}

func TestRecorderContentType(t *testing.T) {
	png := "\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
	checkShapes(t, []shape{
		{name: "html", handler: func(w *probe) { w.write("<html>") }},
		{name: "json", handler: func(w *probe) { w.write(`{"a":1}`) }},
		{name: "png", handler: func(w *probe) { w.write(png) }},
		{name: "nothing to sniff", handler: func(w *probe) { w.write("") }},
		{name: "one byte at a time", handler: func(w *probe) {
			for i := range png {
				w.write(png[i : i+1])
			}
		}},
		{name: "one byte, then a large write", handler: func(w *probe) {
			w.write("<")
			w.write("html>" + strings.Repeat("x", 8<<10))
		}},
		{name: "only the first 512 bytes count", handler: func(w *probe) {
			w.write(strings.Repeat("x", 512))
			w.write("\x00\x01")
		}},
		{name: "the first flushed byte decides", handler: func(w *probe) {
			w.write("<")
			w.flush()
			w.write("html>")
		}, replay: []edit{length}},
		{name: "what was flushed decides, in several writes", handler: func(w *probe) {
			w.write("<")
			w.write("html>")
			w.flush()
			w.write("\x00")
		}, replay: []edit{length}},
		{name: "flushed without a body", handler: func(w *probe) {
			w.flush()
			w.write("<html>")
		}, replay: []edit{length}},
		{name: "encoded content is not sniffed", handler: func(w *probe) {
			w.Header().Set("Content-Encoding", "br")
			w.write("<html>")
		}},
		{name: "encoded and flushed", handler: func(w *probe) {
			w.Header().Set("Content-Encoding", "br")
			w.write("<html>")
			w.flush()
		}, replay: []edit{length}},
		{name: "an empty Content-Encoding is none", handler: func(w *probe) {
			w.Header().Set("Content-Encoding", "")
			w.write("<html>")
			w.flush()
		}, replay: []edit{length}},
		{name: "Transfer-Encoding and flushed", handler: func(w *probe) {
			w.Header().Set("Transfer-Encoding", "chunked")
			w.write("<")
			w.flush()
			w.write("html>")
		}, replay: []edit{length}},
	})
}

func TestRecorderContentLength(t *testing.T) {
	declared := func(length string, writes ...string) func(*probe) {
		return func(w *probe) {
			w.Header().Set("Content-Length", length)
			for _, s := range writes {
				w.write(s)
			}
		}
	}
	checkShapes(t, []shape{
		{name: "right", handler: declared("10", "hello", "world")},
		{name: "right and large", handler: declared("20480", strings.Repeat("x", 10<<10), strings.Repeat("y", 10<<10))},
		{name: "zero", handler: declared("0")},
		{name: "with a leading zero", handler: declared("05", "hello"), replay: []edit{length}},
		// The client sees that the response was cut short, and a retry must not
		// be told that this was all.
		{name: "too large", handler: declared("10", "hello"), replay: []edit{notStored(200)}},
		{name: "too large, no body at all", handler: declared("10"), replay: []edit{notStored(200)}},
		{name: "too large and flushed", handler: func(w *probe) {
			declared("10", "hello")(w)
			w.flush()
		}, replay: []edit{notStored(200)}},
		// HTTP/2 of net/http notices only what is written after the header has
		// gone out, and breaks the response off. Ours refuses it as on HTTP/1.1.
		{name: "too small", handler: declared("5", "hello", "!", ""), first: []edit{on(2,
			saw(1, "wrote 0 http: wrote more than the declared Content-Length"),
			func(a *answer) { a.Body, a.BodyErr = "hello", "" })}},
		{name: "too small, in one write", handler: declared("5", "hello!"), first: []edit{on(2,
			saw(0, "wrote 0 http: wrote more than the declared Content-Length"), remove("Content-Type"),
			func(a *answer) { a.Body, a.BodyErr = "", "unexpected EOF" })},
			replay: []edit{notStored(200)}},
		{name: "not sent", handler: func(w *probe) {
			w.Header()["Content-Length"] = nil
			w.write("hello")
		}},
		// net/http on HTTP/1.1 does not put the right one in its place.
		{name: "not a number", handler: declared("five", "hello"), replay: []edit{length}},
		{name: "negative", handler: declared("-5", "hello"), replay: []edit{length}},
		{name: "set around the middleware", outer: around("Content-Length", "5"),
			handler: func(w *probe) { w.write("hello") }},
		{name: "set around the middleware, wrongly, and deleted", outer: around("Content-Length", "5"),
			handler: func(w *probe) {
				w.Header().Del("Content-Length")
				w.write("hello world")
			}},
	})
}

// idTrailer is middleware that declares a header as a trailer.
func idTrailer(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Request-Id")
		w.Header().Set("X-Request-Id", r.Header.Get("X-Request-Id"))
		next.ServeHTTP(w, r)
	})
}

func TestRecorderTrailers(t *testing.T) {
	const prefix = http.TrailerPrefix
	checkShapes(t, []shape{
		{name: "declared", handler: func(w *probe) {
			w.Header().Set("Trailer", "X-Sum, x-count")
			w.Header().Add("Trailer", "X-Never")
			w.write("hello")
			w.Header().Set("X-Sum", "1")
			w.Header().Add("X-Count", "1")
			w.Header().Add("X-Count", "2")
			w.Header().Set("X-Undeclared", "1")
		}},
		{name: "declared, without a body", handler: func(w *probe) {
			w.Header().Set("Trailer", "X-Sum")
			w.WriteHeader(201)
			w.Header().Set("X-Sum", "1")
		}},
		{name: "declared, and never set", handler: func(w *probe) {
			w.Header().Set("Trailer", "X-Sum")
			w.write("hello")
		}},
		{name: "declared too late", handler: func(w *probe) {
			w.write("hello")
			w.set("Trailer", "X-Sum", "X-Sum", "1")
		}},
		{name: "declared, of names that must not be trailers", handler: func(w *probe) {
			w.Header().Set("Trailer", "Content-Type, Cache-Control, X-Sum")
			w.write("hello")
			w.set("Content-Type", "text/x-mine", "Cache-Control", "no-store", "X-Sum", "1")
		}},
		{name: "declared, and flushed", handler: func(w *probe) {
			w.Header().Set("Trailer", "X-Sum")
			w.write("hello")
			w.flush()
			w.Header().Set("X-Sum", "1")
		}, replay: []edit{on(2, length)}},
		{name: "set before WriteHeader", handler: func(w *probe) {
			w.set("Trailer", "X-Same, X-Changed", "X-Same", "1", "X-Changed", "1", prefix+"X-Prefixed", "1")
			w.write("hello")
			w.Header().Set("X-Changed", "2")
		}},
		{name: "set before WriteHeader and deleted after", handler: func(w *probe) {
			w.set("Trailer", "X-Sum", "X-Sum", "1")
			w.write("hello")
			w.Header().Del("X-Sum")
		}},
		{name: "prefixed, set before WriteHeader and deleted after", handler: func(w *probe) {
			w.set(prefix+"X-Sum", "1")
			w.write("hello")
			delete(w.Header(), prefix+"X-Sum")
		}},
		{name: "set before a flush and deleted after", handler: func(w *probe) {
			w.set("Trailer", "X-Declared", "X-Declared", "1", prefix+"X-Prefixed", "1")
			w.flush()
			w.Header().Del("X-Declared")
			delete(w.Header(), prefix+"X-Prefixed")
		}, replay: []edit{on(2, length)}},
		{name: "set between WriteHeader and a flush", handler: func(w *probe) {
			w.Header().Set("Trailer", "X-Sum")
			w.write("hello")
			w.set("X-Sum", "1", prefix+"X-Prefixed", "1", "X-Late", "1")
			w.flush()
			w.write(" world")
		}, replay: []edit{on(2, length)}},
		{name: "and headers changed in place after a flush", handler: func(w *probe) {
			w.set("Trailer", "X-Sum", "X-Sum", "1", "X-Kept", "1", "Content-Type", "text/x-mine")
			w.write("hello")
			w.flush()
			for _, values := range w.Header() {
				values[0] = "2"
			}
		}, replay: []edit{on(2, length)}},
		{name: "not kept by option",
			opts: idempotency.Options{ReplayHeader: func(name string) bool { return name != "X-Secret" }},
			handler: func(w *probe) {
				w.set("Trailer", "X-Sum", prefix+"X-Secret", "1")
				w.write("hello")
				w.Header().Set("X-Sum", "1")
			},
			replay: []edit{func(a *answer) { a.Trailer = http.Header{"X-Sum": {"1"}} }}},
		{name: "prefixed, after a flush", handler: func(w *probe) {
			w.write("hello")
			w.flush()
			w.Header()[prefix+"X-Sum"] = []string{"1", "2"}
		}, replay: []edit{on(2, length)}},
		{name: "prefixed, after a large body", handler: func(w *probe) {
			w.write(strings.Repeat("x", 10<<10))
			w.Header().Set(prefix+"X-Sum", "1")
		}},
		{name: "prefixed, after more than is kept", opts: idempotency.Options{MaxResponseBytes: 9 << 10},
			handler: func(w *probe) {
				w.write(strings.Repeat("x", 10<<10))
				w.Header().Set(prefix+"X-Sum", "1")
			}, replay: []edit{notStored(200)}},
		{name: "prefixed, after a short body", handler: func(w *probe) {
			w.write("hello")
			w.Header().Set(prefix+"X-Sum", "1")
		},
			// net/http on HTTP/1.1 has given the body a Content-Length by then, and
			// drops the trailer. Ours still has the choice.
			first: []edit{on(1, unknownLength, trailer("X-Sum", "1"))}},
		{name: "with a Content-Length", handler: func(w *probe) {
			w.set("Content-Length", "5", "Trailer", "X-Sum")
			w.write("hello")
			w.set("X-Sum", "1", prefix+"X-Other", "1")
		}},
		{name: "with 204", handler: func(w *probe) {
			w.WriteHeader(204)
			w.Header().Set(prefix+"X-Sum", "1")
		}},
		{name: "of the request", request: func(r *http.Request) {
			r.Body = io.NopCloser(strings.NewReader("hello"))
			r.ContentLength = -1
			r.Trailer = http.Header{"X-Sum": {"1"}}
		}, handler: func(w *probe) {
			_, announced := w.request.Trailer["X-Sum"]
			body, err := io.ReadAll(w.request.Body)
			w.saw(announced, string(body), err, w.request.Trailer)
		}},
	})
}

// A labelWriter sets headers when the first WriteHeader comes, be it for a 1xx,
// as compressing middlewares do.
type labelWriter struct {
	http.ResponseWriter
	label string
	done  bool
}

func (w *labelWriter) WriteHeader(status int) {
	if !w.done {
		w.done = true
		w.Header().Set("X-Label", w.label)
		w.Header().Add("Vary", "Accept-Encoding")
		w.Header().Del("X-Internal")
	}
	if status >= 200 { // a ResponseRecorder takes every status for the final one
		w.ResponseWriter.WriteHeader(status)
	}
}

// What is around the middleware is not stored, even if it sets its headers only
// when the first bytes go out, which may be those of a 1xx response.
func TestOuterHeadersOfAnInformationalResponse(t *testing.T) {
	for _, outer := range []string{"", "of the outer"} {
		t.Run("outer header "+outer, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X-Handler", "1")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Add("Vary", "Accept")
				w.WriteHeader(http.StatusCreated)
			})
			for i := range 2 {
				w := httptest.NewRecorder()
				if outer != "" {
					w.Header().Set("X-Internal", outer)
				}
				label := fmt.Sprint("request ", i)
				c.Handler.ServeHTTP(&labelWriter{ResponseWriter: w, label: label}, c.Request(idemtest.Exchange{Key: "a"}))
				h := w.Result().Header
				require.Equal(t, []string{label}, h["X-Label"])
				require.ElementsMatch(t, []string{"Accept-Encoding", "Accept"}, h["Vary"])
				require.Equal(t, "1", h.Get("X-Handler"))
				require.NotContains(t, h, "X-Internal")
			}
			require.Equal(t, 1, c.Runs())
		})
	}
}

// Behind a proxy another service decides how many headers a response has, and
// how many names its headers list. They cost what their bytes do: a search of
// the list for each header would take minutes here, and takes a tenth of a
// second.
func TestHeadersThatNameVeryMany(t *testing.T) {
	const n = 100_000
	var names strings.Builder
	for i := range n {
		fmt.Fprintf(&names, "Named-%d,", i)
	}
	for _, list := range []string{"Trailer", "Connection"} {
		t.Run(list, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
				for i := range n {
					w.Header()[fmt.Sprintf("X-%d", i)] = []string{""}
				}
				w.Header().Set(list, names.String())
				w.WriteHeader(http.StatusCreated)
			})
			start := time.Now()
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 "})
			c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: http.StatusCreated})
			require.Less(t, time.Since(start), time.Minute)
		})
	}
}
