package idempotency_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// Two spellings that RFC 3986, section 6.2.2, calls equivalent name one cell,
// and one key for the next API. All others are two.
func TestSpellingsOfAURL(t *testing.T) {
	rows := []struct {
		first, second string
		want          string // of the second request
	}{
		{"/users/%7Ebob", "/users/~bob", "replay"},
		{"/users/%7ebob", "/users/%7Ebob", "replay"},
		{"/users/%c3%a4", "/users/%C3%A4", "replay"},
		{"/users/%C3%A4", "/users/\xc3\xa4", "replay"}, // no URI may contain it as it is
		{"/users/a%7Cb", "/users/a|b", "replay"},
		{"/users/%41%2d%5F", "/users/A-_", "replay"},
		{"/users/a?q=%7E", "/users/a?q=~", "replay"},
		{"/users/a?q=%c3%a4", "/users/a?q=\xc3\xa4", "replay"},
		{"/users/a%2Fb", "/users/a%2fb", "replay"},
		{"/users/a%2Fb", "/users/a/b", "run"},
		{"/users/%24", "/users/$", "run"},
		{"/users/a", "/users/a/", "run"},
		{"/users/a%25", "/users/a%2525", "run"},
		{"/users/a%257E", "/users/a~", "run"},
		{"/users/a", "/users/A", "run"},
		{"/users/a+b", "/users/a%20b", "run"},
		{"/users/a+b", "/users/a%2Bb", "run"},
		{"/users/a?q=+", "/users/a?q=%20", "422"},
		{"/users/a?q=%26", "/users/a?q=&", "422"},
		{"/users/a?q=1&p=2", "/users/a?p=2&q=1", "422"},
		{"/users/a?q=%", "/users/a?q=%25", "422"},
		{"/users/a?q=%7", "/users/a?q=%37", "422"},
		{"/users/a?q=%2%35", "/users/a?q=%25", "422"},
		{"/users/a?q=%%41", "/users/a?q=%A", "422"},
		{"/users/a", "/users/a?", "replay"},
	}
	for _, row := range rows {
		t.Run(row.first+" "+row.second, func(t *testing.T) {
			mux := http.NewServeMux()
			var keys []string
			mux.Handle("POST /users/{rest...}", idempotency.Middleware(idempotency.NewMemoryStore(), nil)(
				http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					e, _ := idempotency.FromContext(r.Context())
					keys = append(keys, e.DownstreamKey("psp"))
				})))
			var got string
			for _, target := range []string{row.first, row.second} {
				r := httptest.NewRequest("POST", target, strings.NewReader("x"))
				r.Header.Set("Idempotency-Key", "a")
				w := httptest.NewRecorder()
				runs := len(keys)
				mux.ServeHTTP(w, r)
				switch {
				case w.Header().Get("Idempotent-Replayed") != "":
					got = "replay"
				case w.Code == http.StatusUnprocessableEntity:
					got = "422"
				case w.Code == http.StatusOK && len(keys) == runs+1:
					got = "run"
				default:
					body, _ := io.ReadAll(w.Body)
					t.Fatalf("%d %s", w.Code, body)
				}
			}
			require.Equal(t, row.want, got)
			if row.want == "run" {
				require.NotEqual(t, keys[0], keys[1])
			}
		})
	}
}
