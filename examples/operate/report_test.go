package main

import (
	"bytes"
	"net/http"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

func TestClientKey(t *testing.T) {
	for header, want := range map[string]string{
		`order-17`: `order-17`, `"order-17"`: `order-17`, `"a\"b"`: `a"b`, `"a\\"`: `a\`, `"a\\\"b"`: `a\"b`,
		`"`: `"`, ``: ``, `""`: ``,
	} {
		require.Equal(t, want, clientKey(header), header)
	}
}

func TestShorten(t *testing.T) {
	rows := map[string]string{
		"":                           "",
		"text\n":                     "text\n",
		"\x1b[2Jgone":                "(8 bytes, binary)",
		"\xff\xfe":                   "(2 bytes, binary)",
		strings.Repeat("a", 5000):    strings.Repeat("a", maxBody) + "… (5000 bytes in all)",
		strings.Repeat("€", maxBody): strings.Repeat("€", maxBody/3) + "… (6144 bytes in all)",
	}
	for body, want := range rows {
		require.Equal(t, want, shorten([]byte(body)))
	}
}

// What a handler has set reaches a terminal as text only.
func TestHeadersArePrintable(t *testing.T) {
	var out bytes.Buffer
	printHeader(&out, "header", http.Header{"X-A": {"plain", "\x1b[2J"}})
	require.Equal(t, "header:       X-A: plain\nheader:       \"X-A: \\x1b[2J\"\n", out.String())
}

func TestEveryStateHasAMeaning(t *testing.T) {
	for _, state := range []idempotency.State{
		0, idempotency.InProgress, idempotency.Lapsed, idempotency.Abandoned, idempotency.Completed, idempotency.Released,
	} {
		require.NotEmpty(t, meanings[state], state)
	}
}
