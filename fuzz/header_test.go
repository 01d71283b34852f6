package fuzz

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// headerNames are the names that FuzzHeaderDifference plays with: canonical or
// not, single or multiple, some with a meaning to net/http, and trailers.
var headerNames = []string{
	"X-A", "X-B", "x-c", "Vary", "Cache-Control", "Content-Type", "Set-Cookie", "Etag", "Content-Encoding",
	"X-T1", "X-T2", "Trailer:X-T3", "X-Content-Type-Options",
}

// headerValues are what they are set to. The last three are stored as a number
// under one name, and as they are under any other.
var headerValues = []string{"", "1", "2", "a, b", "\xff", "text/plain", " ", "no-store", "nosniff", "application/json"}

// headerOp is one change of a header.
type headerOp struct {
	kind         byte
	name         string
	value, extra string
}

func (o headerOp) apply(h http.Header) {
	switch o.kind {
	case 0:
		h.Set(o.name, o.value)
	case 1:
		h.Add(o.name, o.value)
	case 2:
		h[o.name] = append(h[o.name], o.value, o.extra)
	case 3:
		delete(h, o.name)
	case 4:
		h[o.name] = nil
	case 5:
		h[o.name] = []string{o.value}
	case 6:
		h[o.name] = []string{o.extra, o.value}
	case 7:
		if values := h[o.name]; len(values) > 0 {
			values[0] = o.value // in place
		}
	}
}

// decodeHeaderOps reads changes: what outer middleware sets, what the handler
// does before the body, and what it does after it.
func decodeHeaderOps(data []byte) (parts [3][]headerOp) {
	for ; len(data) >= 2; data = data[2:] {
		a, b := data[0], data[1]
		part := min(int(a>>6), 2)
		op := headerOp{
			kind: a & 7, name: headerNames[int(b)%len(headerNames)],
			value: headerValues[(int(a>>3&7)+int(b>>4))%len(headerValues)], extra: headerValues[int(b>>4)%len(headerValues)],
		}
		parts[part] = append(parts[part], op)
	}
	return parts
}

// exchanged is a response as the client of net/http sees it.
type exchanged struct {
	Status          int
	Header, Trailer http.Header
	Body            string
}

// wireWriter does what net/http does with headers: they are fixed by
// WriteHeader, the Content-Type is found out when the first bytes are sent, and
// trailers are what is declared or prefixed.
type wireWriter struct {
	header, sent http.Header
	status       int
	body         []byte
	flushed      bool
}

func (w *wireWriter) Header() http.Header { return w.header }

func (w *wireWriter) WriteHeader(status int) {
	if w.sent == nil {
		w.status, w.sent = status, w.header.Clone()
	}
}

func (w *wireWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	w.body = append(w.body, p...)
	return len(p), nil
}

func (w *wireWriter) Flush() {
	w.WriteHeader(http.StatusOK)
	_, typed := w.sent["Content-Type"]
	if !w.flushed && !typed && w.sent.Get("Content-Encoding") == "" && len(w.body) > 0 {
		w.sent["Content-Type"] = []string{http.DetectContentType(w.body)}
	}
	w.flushed = true
}

func (w *wireWriter) end() exchanged {
	w.Flush()
	trailer := http.Header{}
	for name, values := range w.header {
		if name, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
			trailer[name] = values
		}
	}
	for _, line := range w.sent["Trailer"] {
		for name := range strings.SplitSeq(line, ", ") {
			if values := w.header[name]; len(values) > 0 {
				trailer[name] = values
			}
		}
	}
	for name := range w.sent {
		if strings.HasPrefix(name, http.TrailerPrefix) {
			delete(w.sent, name)
		}
	}
	return exchanged{w.status, plain(w.sent), plain(trailer), string(w.body)}
}

func exchangeHeaders(outer []headerOp, handler http.Handler) exchanged {
	w := &wireWriter{header: http.Header{}}
	for _, op := range outer {
		op.apply(w.header)
	}
	handler.ServeHTTP(w, &http.Request{Method: "POST", RequestURI: "/", ProtoMajor: 1, Header: http.Header{"Idempotency-Key": {"a"}}})
	return w.end()
}

// plain leaves out names without values, of which nothing is sent.
func plain(h http.Header) http.Header {
	sent := http.Header{}
	for name, values := range h {
		if len(values) > 0 {
			sent[name] = slices.Clone(values)
		}
	}
	return sent
}

// FuzzHeaderDifference lets outer middleware and the handler change headers and
// trailers as bytes say. The first answer must be that of the handler without
// the middleware; the replay within the same outer headers must be the first;
// and within other outer headers, what the handler did not touch must be that of
// the current request.
func FuzzHeaderDifference(f *testing.F) {
	f.Add(byte(0), []byte("\x00\x00\x08\x00\x41\x00"), []byte("\x10\x00"))
	f.Add(byte(1), []byte("\x02\x13\x43\x03\x41\x13"), []byte("\x00\x03"))
	f.Add(byte(2), []byte("\x44\x05\x80\x09\x85\x0a\x80\x0b"), []byte(""))
	f.Add(byte(5), []byte("\x0a\x00\x47\x00\x00\x09\xc3\x09"), []byte("\x08\x09"))
	f.Add(byte(0), []byte("\x78\x04\x78\x2c\x78\x19"), []byte("\x38\x04"))
	f.Add(byte(0), []byte("\x08\x03\x51\x03"), []byte("\x08\x03")) // and one that is added to
	f.Add(byte('N'), []byte("92292\x83\x83\x83"), []byte("0"))
	f.Fuzz(func(t *testing.T, flags byte, data, other []byte) {
		checkHeaders(t, idempotency.NewMemoryStore(), flags, data, other)
	})
}

func checkHeaders(t require.TestingT, store idempotency.Store, flags byte, data, other []byte) {
	ops := decodeHeaderOps(data)
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for _, op := range ops[1] {
			op.apply(w.Header())
		}
		if flags&1 != 0 {
			w.Header().Add("Trailer", "X-T1, X-T2")
		}
		if flags&2 != 0 {
			w.WriteHeader(http.StatusCreated)
		}
		_, _ = io.WriteString(w, strings.Repeat("<p>", int(flags>>6)))
		if flags&4 != 0 {
			idemtest.Must(http.NewResponseController(w).Flush())
		}
		for _, op := range ops[2] {
			op.apply(w.Header())
		}
	})
	opts := idempotency.Options{ReplayHeader: func(string) bool { return true }}
	kept := idemtest.NewClient(store, &opts, handler).Handler

	direct := exchangeHeaders(ops[0], handler)
	first := exchangeHeaders(ops[0], kept)
	require.Equal(t, direct, first, "with the middleware")
	replay := exchangeHeaders(ops[0], kept)
	require.Equal(t, []string{"true"}, replay.Header["Idempotent-Replayed"])
	delete(replay.Header, "Idempotent-Replayed")
	require.Equal(t, first, replay, "the replay")

	checkOuter(t, kept, slices.Concat(ops[1], ops[2]), decodeHeaderOps(other)[0])
}

// checkOuter replays within other outer headers.
func checkOuter(t require.TestingT, kept http.Handler, touched, outer []headerOp) {
	current := http.Header{}
	for _, op := range outer {
		op.apply(current)
	}
	replay := exchangeHeaders(outer, kept)
	for name, values := range plain(current) {
		if strings.HasPrefix(name, http.TrailerPrefix) || name == "Content-Type" {
			continue // not a header; and sniffed where there is none
		}
		if !slices.ContainsFunc(touched, func(o headerOp) bool { return strings.EqualFold(o.name, name) }) {
			require.Equal(t, values, replay.Header[name], "%s of the current request", name)
		}
	}
}
