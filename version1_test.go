package idempotency_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// The forms of version 1 are frozen: what keys and fingerprints are made of, how
// responses are stored, and the cells of Redis. A service that updates the
// library has records of the old one, and its clients retry across the update.
// A line of testdata/version1.txt is never changed, only lines are added. To add
// one, run the test with the new row: its message has the line.
func TestFormsOfVersion1(t *testing.T) {
	frozen, err := os.ReadFile("testdata/version1.txt")
	require.NoError(t, err)
	lines := append(requestForms(t), cellForms(t)...)
	require.Equal(t, strings.Split(strings.TrimSpace(string(frozen)), "\n"), lines, "\n%s", strings.Join(lines, "\n"))
}

// requestForms returns for each request its store key, fingerprint, downstream
// key, and the value of its stored response.
func requestForms(t *testing.T) (lines []string) {
	small := idempotency.Options{MaxBufferedBody: 64}
	form := "--AAAA\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--AAAA--\r\n"
	multipart := http.Header{"Content-Type": {"multipart/form-data; boundary=AAAA"}}
	long := strings.Repeat("x", 100)
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	for _, row := range []struct {
		name    string
		opts    idempotency.Options
		handler http.HandlerFunc
		request idemtest.Exchange
		before  func(r *http.Request)
	}{
		{name: "plain"},
		{name: "quoted", request: idemtest.Exchange{Key: `"a\"b"`}},
		{name: "method", request: idemtest.Exchange{Method: "patch"}},
		{name: "path", request: idemtest.Exchange{Target: "/%7Eb/%2f|/\u00e4"}},
		{name: "query", request: idemtest.Exchange{Target: "/charge?a=1&b=%7E"}},
		{name: "credentials", request: idemtest.Exchange{Header: http.Header{"Authorization": {"Bearer x"}, "Cookie": {"s=1"}}}},
		{name: "scope", opts: idempotency.Options{Scope: func(*http.Request) string { return "alice" }}},
		{name: "precondition", request: idemtest.Exchange{Header: http.Header{"If-Match": {`"v1"`}}}},
		{name: "header", opts: idempotency.Options{FingerprintHeaders: []string{"X-Tenant"}}, request: idemtest.Exchange{Header: http.Header{"X-Tenant": {"1", "2"}}}},
		{name: "fingerprint", opts: idempotency.Options{Fingerprint: func(_ *http.Request, body []byte) []byte { return body[:3] }}},
		{name: "key-in-body", opts: idempotency.Options{Key: func(_ *http.Request, body []byte) (string, error) { return string(body[2:8]), nil }}},
		{name: "large", opts: small, request: idemtest.Exchange{Body: long}, handler: answer(201, "ok")},
		{name: "form", request: idemtest.Exchange{Body: form, Header: multipart}},
		{name: "large-form", opts: small, request: idemtest.Exchange{Body: strings.Replace(form, "1", long, 1), Header: multipart}, handler: answer(201, "ok")},
		{name: "parsed", request: idemtest.Exchange{Body: "a=1&b=2", Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}},
			before: func(r *http.Request) { _ = r.ParseForm() }},
		{name: "parsed-form", request: idemtest.Exchange{Body: form, Header: multipart},
			before: func(r *http.Request) { _ = r.ParseMultipartForm(1 << 20) }},
		{name: "implicit", handler: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }},
		{name: "empty", handler: func(http.ResponseWriter, *http.Request) {}},
		{name: "no-content", handler: answer(204, "")},
		{name: "headers", handler: func(w http.ResponseWriter, r *http.Request) {
			w.Header()["X-List"] = []string{"1", "2"}
			w.Header().Set("Trailer", "X-After")
			w.WriteHeader(201)
			w.Header().Set("X-After", "3")
		}, opts: idempotency.Options{ReplayHeader: func(name string) bool { return name != "Trailer" }}},
		{name: "too-large", opts: idempotency.Options{MaxResponseBytes: 4}, handler: answer(201, "too large")},
	} {
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		downstream := ""
		c := idemtest.NewClient(s, &row.opts, func(w http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			downstream = e.DownstreamKey("psp")
			if row.handler == nil {
				row.handler = answer(201, "ok")
			}
			row.handler(w, r)
		})
		if row.request.Key == "" {
			row.request.Key = "a"
		}
		r := c.Request(row.request)
		if row.before != nil {
			row.before(r)
		}
		c.Do(r)
		result := s.LastResult()
		lines = append(lines, fmt.Sprintf("%s %s %x %s %x", row.name, s.LastKey(), result.Fingerprint, downstream, result.Value))
	}
	return lines
}

// cellForms returns the cells that a RedisStore writes.
func cellForms(t *testing.T) (lines []string) {
	server := miniredis.RunT(t)
	client := idemtest.DialRedis(t, server.Addr())
	store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "v1:"})
	ctx := t.Context()
	add := func(name, key string) {
		lines = append(lines, fmt.Sprintf("redis-%s %x", name, client.Get(ctx, "v1:"+key).Val()))
	}
	claim := idempotency.Claim{Token: "token", Fingerprint: []byte("print"), Lease: time.Minute, TTL: time.Hour}
	acquire := func(key string, c idempotency.Claim) {
		_, err := store.Acquire(ctx, key, c)
		require.NoError(t, err)
	}
	acquire("a", claim)
	add("claimed", "a")
	other := claim
	other.Token = "other"
	acquire("a", other)
	add("watched", "a")
	once := claim
	once.Attempt, once.Once = 1, true
	acquire("a", once)
	add("once", "a")
	require.NoError(t, store.Complete(ctx, "a", "token", idempotency.Result{Fingerprint: claim.Fingerprint, Value: []byte("value"), TTL: time.Hour}))
	add("completed", "a")
	acquire("b", claim)
	require.NoError(t, store.Release(ctx, "b", "token", time.Hour))
	add("released", "b")
	return lines
}

// Cells of version 1 that another release has written are read.
func TestCellsOfVersion1AreRead(t *testing.T) {
	frozen, err := os.ReadFile("testdata/version1.txt")
	require.NoError(t, err)
	cells := map[string]string{}
	for line := range strings.Lines(string(frozen)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && strings.HasPrefix(name, "redis-") {
			cell, err := hex.DecodeString(value)
			require.NoError(t, err)
			cells[name] = string(cell)
		}
	}
	for name, want := range map[string]idempotency.State{
		"redis-claimed":   idempotency.InProgress,
		"redis-watched":   idempotency.InProgress,
		"redis-once":      idempotency.InProgress,
		"redis-completed": idempotency.Completed,
		"redis-released":  idempotency.Acquired,
	} {
		t.Run(name, func(t *testing.T) {
			client := idemtest.DialRedis(t, miniredis.RunT(t).Addr())
			require.NotEmpty(t, cells[name], "the frozen cell")
			require.NoError(t, client.Set(t.Context(), "v1:a", cells[name], time.Hour).Err())
			store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "v1:"})
			rec, err := store.Acquire(t.Context(), "a", idempotency.Claim{
				Token: "new", Fingerprint: []byte("print"), Lease: time.Minute, TTL: time.Hour,
			})
			require.NoError(t, err)
			require.Equal(t, want, rec.State)
			if want == idempotency.Completed {
				require.True(t, bytes.Equal([]byte("value"), rec.Value))
			}
			if want == idempotency.Acquired {
				require.Equal(t, 2, rec.Attempt, "attempts go on counting")
			}
		})
	}
}
