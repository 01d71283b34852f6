package fuzz

import (
	"bufio"
	"bytes"
	"encoding/json"
	"math"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// FuzzWriteError writes any Error as a problem: the body is one JSON object
// with the members that went in, and nothing gets out of its header field.
func FuzzWriteError(f *testing.F) {
	f.Add(409, "in_progress", "Repeat it later.", "https://docs.example/errors", int64(time.Second), 0)
	f.Add(409, "response_not_stored", "\"quoted\"\r\n</script>\u2028", "about:blank", int64(-1), 201)
	f.Add(503, "store_unavailable", "bad \xff\xfe UTF-8", "", int64(1), -5)
	f.Add(299, "", "", "x>; rel=\"stylesheet\"\r\nSet-Cookie: a=b\r\n\r\n", int64(math.MaxInt64), math.MaxInt)
	f.Add(503, "store_unavailable", "", "https://docs.example/#\x05", int64(0), 0)
	f.Fuzz(func(t *testing.T, status int, code, detail, typ string, retry int64, original int) {
		status = 200 + int(uint(status)%400)
		w := httptest.NewRecorder()
		w.Header().Set("Content-Length", "5")
		w.Header().Set("X-Outer", "kept")
		idempotency.WriteError(w, nil, &idempotency.Error{
			Status: status, Code: code, Detail: detail, Type: typ, RetryAfter: time.Duration(retry), OriginalStatus: original,
			Retryable: retry%2 != 0,
		})
		require.Equal(t, status, w.Code)
		checkProblem(t, w.Body.Bytes(), status, code, detail, typ, original, retry%2 != 0)

		want := http.Header{
			"X-Outer": {"kept"}, "Content-Type": {"application/problem+json"}, "Content-Language": {"en"},
			"Cache-Control": {"no-store"}, "X-Content-Type-Options": {"nosniff"},
		}
		if retry > 0 {
			seconds := (retry-1)/int64(time.Second) + 1
			want["Retry-After"] = []string{strconv.FormatInt(seconds, 10)}
		}
		if typ != "" && typ != "about:blank" {
			want["Link"] = []string{"<" + typ + `>; rel="describedby"`}
		}
		if isDocsURL(typ) {
			require.Equal(t, want, onTheWire(t, w.Header()))
			return
		}
		// Someone's own Error may have anything in it; it stays in its line.
		var b bytes.Buffer
		require.NoError(t, w.Header().Write(&b))
		lines := strings.Split(strings.TrimSuffix(b.String(), "\r\n"), "\r\n")
		require.LessOrEqual(t, len(lines), len(want))
		for _, line := range lines {
			name, _, _ := strings.Cut(line, ":")
			require.Contains(t, want, name)
			require.NotContains(t, line, "\n")
		}
	})
}

func checkProblem(t *testing.T, body []byte, status int, code, detail, typ string, original int, retryable bool) {
	var p map[string]any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	require.NoError(t, d.Decode(&p))
	require.False(t, d.More())
	valid := func(s string) string { return string([]rune(s)) } // each bad byte becomes U+FFFD
	want := map[string]any{
		"type": valid(typ), "status": json.Number(strconv.Itoa(status)), "code": valid(code),
		"title": p["title"], "retryable": retryable,
	}
	if detail != "" {
		want["detail"] = valid(detail)
	}
	if original != 0 {
		want["original_status"] = json.Number(strconv.Itoa(original))
	}
	require.Equal(t, want, p)
	require.IsType(t, "", p["title"])
}

// onTheWire returns the header as a client reads it.
func onTheWire(t *testing.T, h http.Header) http.Header {
	var b bytes.Buffer
	require.NoError(t, h.Write(&b))
	b.WriteString("\r\n")
	reader := bufio.NewReader(&b)
	got, err := textproto.NewReader(reader).ReadMIMEHeader()
	require.NoError(t, err)
	require.Zero(t, reader.Buffered(), "what follows the header")
	return http.Header(got)
}

// isDocsURL reports whether the middleware takes s as its DocsURL.
func isDocsURL(s string) (ok bool) {
	defer func() { ok = recover() == nil }()
	idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{DocsURL: s})
	return true
}
