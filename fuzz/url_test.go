package fuzz

import (
	"bufio"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A character is a byte of a path or a query, and whether it stands for itself
// or is an escape that means something else than the byte.
type character struct {
	value   byte
	escaped bool
}

// spell reads a path or a query by RFC 3986, section 2, one character after the
// other. Equal characters are equivalent spellings (section 6.2.2). It returns
// the bytes as they are when a percent sign does not begin an escape: such a
// text has no equivalent spellings.
func spell(s string) (characters []character) {
	const (
		unreserved = digit + lower + upper + "-._~"
		reserved   = ":/?#[]@!$&'()*+,;="
	)
	valid := true
	for i := 0; i < len(s); i++ {
		c := character{value: s[i]}
		switch {
		case s[i] == '%':
			var value byte
			if i+2 >= len(s) || !isHex(s[i+1]) || !isHex(s[i+2]) {
				valid = false
				break
			}
			_, err := fmt.Sscanf(s[i+1:i+3], "%02x", &value)
			valid = valid && err == nil
			c = character{value, !strings.Contains(unreserved, string(rune(value))) || value >= 0x80}
			i += 2
		case s[i] >= 0x80 || !strings.Contains(unreserved+reserved, string(rune(s[i]))):
			c.escaped = true // no URI contains it, so it can only mean its escape
		}
		characters = append(characters, c)
	}
	if valid {
		return characters
	}
	characters = []character{{'%', false}} // of an escape, it would be escaped
	for _, c := range []byte(s) {
		characters = append(characters, character{value: c})
	}
	return characters
}

func isHex(c byte) bool { return strings.Contains(digit+"abcdefABCDEF", string(rune(c))) }

// parseTarget returns the request that a server makes of a target, or nil.
func parseTarget(target string) *http.Request {
	text := "POST " + target + " HTTP/1.1\r\nHost: example.com\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n"
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
	if err != nil || r.RequestURI != target {
		return nil
	}
	return r
}

// FuzzURL holds paths and queries against RFC 3986: two targets are one request
// if and only if their characters are equal.
func FuzzURL(f *testing.F) {
	for _, pair := range [][2]string{
		{"users/%7Ebob", "users/~bob"},
		{"a%2Fb", "a/b"},
		{"a%2fb?x=%c3%A9", "a%2Fb?x=é"},
		{"a|b?q=|", "a%7Cb?q=%7c"},
		{"a?q=%2%35", "a?q=%25"},
		{"a?q=%", "a?q=%25"},
		{"a?q=+", "a?q=%2B"},
		{"a?", "a"},
		{"a;b?x?y", "a%3Bb?x%3Fy"},
		{"%41/./%2E%2e", "A/./.."},
	} {
		f.Add(pair[0], pair[1])
	}
	f.Fuzz(func(t *testing.T, first, second string) {
		requests := [2]*http.Request{parseTarget("/" + first), parseTarget("/" + second)}
		if requests[0] == nil || requests[1] == nil {
			return
		}
		paths, queries := [2][]character{}, [2][]character{}
		for i, target := range []string{first, second} {
			path, query, _ := strings.Cut(target, "?")
			paths[i], queries[i] = spell(path), spell(query)
		}
		want := "new" // another path has a cell of its own
		if slices.Equal(paths[0], paths[1]) {
			want = "mismatch"
			if slices.Equal(queries[0], queries[1]) {
				want = "replayed"
			}
		}
		require.Equal(t, want, outcomeOfSecond(requests), "%q and %q", first, second)
	})
}

// outcomeOfSecond returns what becomes of the second request.
func outcomeOfSecond(requests [2]*http.Request) (result string) {
	handler := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) }
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, http.HandlerFunc(handler))
	for _, r := range requests {
		resp := c.Do(r)
		switch {
		case resp.StatusCode == http.StatusUnprocessableEntity:
			result = "mismatch"
		case resp.Header.Get("Idempotent-Replayed") == "true":
			result = "replayed"
		default:
			result = "new"
		}
	}
	return result
}
