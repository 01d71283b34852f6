package neighbours

import (
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/gorilla/csrf"
	"github.com/stretchr/testify/require"
)

// A request of another site is refused before it can hold a key or see a replay.
func TestCrossOriginProtectionOutside(t *testing.T) {
	s := newShop(idempotency.Options{})
	addr := try.Serve(t, http.NewCrossOriginProtection().Handler(s.once(s.charge())))

	require.Equal(t, http.StatusForbidden, post(t, addr, "Sec-Fetch-Site", "cross-site").Status)
	try.Same(t, post(t, addr, "Sec-Fetch-Site", "same-origin"), post(t, addr, "Sec-Fetch-Site", "same-origin"))
	require.Equal(t, http.StatusForbidden, post(t, addr, "Sec-Fetch-Site", "cross-site").Status)
	require.EqualValues(t, 1, s.runs.Load())
}

// Inside, a refusal frees the key (403), but a replay is not checked.
func TestWrongCrossOriginProtectionInside(t *testing.T) {
	s := newShop(idempotency.Options{})
	addr := try.Serve(t, s.once(http.NewCrossOriginProtection().Handler(s.charge())))

	require.Equal(t, http.StatusForbidden, post(t, addr, "Sec-Fetch-Site", "cross-site").Status)
	require.Equal(t, http.StatusCreated, post(t, addr, "Sec-Fetch-Site", "same-origin").Status)
	require.True(t, post(t, addr, "Sec-Fetch-Site", "cross-site").Replayed)
}

// A form is a site with gorilla/csrf. Every GET of its page has another token in
// it.
type form struct {
	url    string
	cookie string
}

func newForm(t *testing.T, h http.Handler) *form {
	protect := csrf.Protect([]byte(strings.Repeat("k", 32)), csrf.Path("/"))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, csrf.Token(r)) })
	mux.Handle("POST /", h)
	protected := protect(mux)
	return &form{url: try.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protected.ServeHTTP(w, csrf.PlaintextHTTPRequest(r))
	}))}
}

// token loads the page.
func (f *form) token(t *testing.T) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.url, nil)
	require.NoError(t, err)
	r.Header.Set("Cookie", f.cookie)
	page := try.Send(t, r)
	if f.cookie == "" {
		f.cookie = cookieOf(t, page)
	}
	return page.Body
}

// post sends the form with a token in its body, or in the header.
func (f *form) post(t *testing.T, field, header string) try.Answer {
	t.Helper()
	body := url.Values{"amount": {"1"}}
	if field != "" {
		body.Set("gorilla.csrf.Token", field)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.url, strings.NewReader(body.Encode()))
	require.NoError(t, err)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Idempotency-Key", "k1")
	r.Header.Set("Cookie", f.cookie)
	r.Header.Set("X-CSRF-Token", header)
	return try.Send(t, r)
}

// A token in the header is not part of the request that a retry must repeat. One
// in the body is: the same bytes are replayed, a page that was loaded anew is
// another request.
func TestGorillaCSRFOutside(t *testing.T) {
	for name, inHeader := range map[string]bool{"in the header": true, "in the body": false} {
		t.Run(name, func(t *testing.T) {
			s := newShop(idempotency.Options{})
			f := newForm(t, s.once(s.charge()))
			post := func(token string) try.Answer {
				if inHeader {
					return f.post(t, "", token)
				}
				return f.post(t, token, "")
			}
			token, another := f.token(t), f.token(t)
			require.NotEqual(t, token, another)

			require.Equal(t, http.StatusForbidden, post("wrong").Status)
			first := post(token)
			require.Equal(t, http.StatusCreated, first.Status)
			try.Same(t, first, post(token))
			require.Equal(t, http.StatusForbidden, post("wrong").Status)
			reloaded := post(another)
			require.Equal(t, inHeader, reloaded.Replayed)
			require.Equal(t, !inHeader, reloaded.Status == http.StatusUnprocessableEntity)
			require.EqualValues(t, 1, s.runs.Load())
		})
	}
}

// A Fingerprint without the field makes a page that was loaded anew the same
// request.
func TestGorillaCSRFWithFingerprint(t *testing.T) {
	s := newShop(idempotency.Options{Fingerprint: func(r *http.Request, _ []byte) []byte {
		values := url.Values{}
		for name, value := range r.PostForm { // gorilla/csrf has parsed it
			if name != "gorilla.csrf.Token" {
				values[name] = value
			}
		}
		return []byte(values.Encode())
	}})
	f := newForm(t, s.once(s.charge()))
	token, another := f.token(t), f.token(t)

	try.Same(t, f.post(t, token, ""), f.post(t, another, ""))
	require.EqualValues(t, 1, s.runs.Load())
}
