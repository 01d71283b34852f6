package idempotency_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestKeyForms(t *testing.T) {
	long := strings.Repeat("k", 255)
	for line, want := range map[string]string{ // want "": refused
		"8e03978e-40d5-43dd-bc93-6894a57f9324": "8e03978e-40d5-43dd-bc93-6894a57f9324",
		`"8e03978e"`:                           "8e03978e",
		"  \t8e03978e ":                        "8e03978e",
		`"with space, comma"`:                  "with space, comma",
		`"a\"b\\c"`:                            `a"b\c`,
		`a\b;c=d`:                              `a\b;c=d`,
		`"a";v`:                                "a",
		`"a";v=1; w="x,\"y";z`:                 "a",
		`"a";v=:aGk=:`:                         "a",
		`"a";v=?1`:                             "a",
		`"a";v=%"b, c"`:                        "a",
		long:                                   long,
		`"` + long + `"`:                       long,

		"":                 "",
		" ":                "",
		`""`:               "",
		`"`:                "",
		`"a`:               "",
		`a"`:               "",
		`"a"b`:             "",
		`"a", "b"`:         "",
		`"a";x=1, "b"`:     "",
		`"a";x, "b"`:       "",
		`"a";,`:            "",
		`"a";`:             "",
		`"a";=1`:           "",
		`"a";x=`:           "",
		`"a";x="b`:         "",
		`"a";x=%"b`:        "",
		"\"a\";x=%\"\tb\"": "",
		`"a";x=%"ü"`:       "",
		`"a\x"`:            "",
		`"a\`:              "",
		"a,b":              "",
		"a b":              "",
		"a\x00b":           "",
		"\"a\x7f\"":        "",
		"\"a\tb\"":         "",
		"schlüssel":        "",
		`"schlüssel"`:      "",
		long + "k":         "",
		`"` + long + `k"`:  "",
	} {
		t.Run(line, func(t *testing.T) {
			var got string
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(_ http.ResponseWriter, r *http.Request) {
				got = idemtest.Execution(r).Key()
			})
			resp := c.Do(c.Request(idemtest.Exchange{Keys: []string{line}}))
			require.Equal(t, want, got)
			if want == "" {
				answer, p := idemtest.Describe(t, resp)
				require.Equal(t, "400 key_invalid", answer)
				require.NotEmpty(t, p.Detail)
			}
		})
	}
}

// A client may send as many parameters as the server takes header bytes. They
// cost no more than their bytes, which the allocations tell.
func TestKeyWithManyParameters(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	for _, parameter := range []string{";a", ";a=1", `;a="1"`, `;a=%"1, 2"`} {
		t.Run(parameter, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, nil)
			allocs := func(n int) float64 {
				key := `"a"` + strings.Repeat(parameter, n)
				return testing.AllocsPerRun(10, func() {
					require.Equal(t, http.StatusCreated, c.Do(c.Request(idemtest.Exchange{Key: key})).StatusCode)
				})
			}
			require.Less(t, allocs(5000), allocs(1)+8000)
			require.Equal(t, 1, c.Runs())
		})
	}
}

// storeKey returns the cell that a request reaches.
func storeKey(t *testing.T, opts *idempotency.Options, r *http.Request) string {
	t.Helper()
	s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	idemtest.NewClient(s, opts, nil).Do(r)
	require.NotEmpty(t, s.LastKey())
	return s.LastKey()
}

func TestStoreKey(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, nil)
	scope := &idempotency.Options{Scope: func(r *http.Request) string { return r.Header.Get("Tenant") }}
	key := storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "a"}))

	// A deployment must find the records that were stored before it.
	require.Equal(t, "RQFyjOsKeHMIZkhk5cd63L7akO8", key)

	same := map[string]*http.Request{
		"quoted":              c.Request(idemtest.Exchange{Key: `"a"`}),
		"another body":        c.Request(idemtest.Exchange{Key: "a", Body: "x"}),
		"another query":       c.Request(idemtest.Exchange{Key: "a", Target: "/charge?x"}),
		"the absolute form":   c.Request(idemtest.Exchange{Key: "a", Target: "http://other.example/charge"}),
		"an equivalent path":  c.Request(idemtest.Exchange{Key: "a", Target: "/%63harge"}),
		"another case":        c.Request(idemtest.Exchange{Key: "a", Method: "post"}),
		"a path that was cut": stripped(c.Request(idemtest.Exchange{Key: "a"})),
		"not from a server":   notFromServer(c.Request(idemtest.Exchange{Key: "a"})),
		"another host":        withHost(c.Request(idemtest.Exchange{Key: "a"}), "other.example"),
	}
	for name, r := range same {
		require.Equal(t, key, storeKey(t, nilOptions(), r), name)
	}
	different := map[string]string{
		"another key":    storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "b"})),
		"another path":   storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "a", Target: "/charge/"})),
		"other escapes":  storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "a", Target: "/charge%2F"})),
		"another method": storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "a", Method: "PUT"})),
		"a scope":        storeKey(t, scope, c.Request(idemtest.Exchange{Key: "a", Header: http.Header{"Tenant": {"t"}}})),
		"scope and key":  storeKey(t, scope, c.Request(idemtest.Exchange{Key: "ta", Header: http.Header{"Tenant": {""}}})),
		"the root":       storeKey(t, nilOptions(), c.Request(idemtest.Exchange{Key: "a", Target: "http://charge?"})),
	}
	seen := map[string]string{key: "the first"}
	for name, key := range different {
		require.Empty(t, seen[key], name)
		seen[key] = name
	}
}

func stripped(r *http.Request) *http.Request {
	r.URL.Path = "/"
	return r
}

func notFromServer(r *http.Request) *http.Request {
	r.RequestURI = ""
	return r
}

func withHost(r *http.Request, host string) *http.Request {
	r.Host = host
	return r
}

// The store learns neither the client's key nor a hash that confirms a guess of
// its body.
func TestStoreLearnsNoSecrets(t *testing.T) {
	fingerprint := func(key string) []byte {
		s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(s, nilOptions(), nil)
		c.Do(c.Request(idemtest.Exchange{Key: key, Header: auth("secret")}))
		require.NotContains(t, s.LastKey(), key)
		require.NotContains(t, string(s.LastResult().Value), key)
		require.Len(t, s.LastResult().Fingerprint, 16)
		return s.LastResult().Fingerprint
	}
	require.NotEqual(t, fingerprint("first-key"), fingerprint("other-key"))
}

// eventID is Options.Key of a receiver of webhooks: the id is in the body. What
// is too large has it in a header.
func eventID(r *http.Request, body []byte) (string, error) {
	if body == nil {
		return r.Header.Get("Webhook-Id"), nil
	}
	var event struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(body, &event); err != nil {
		return "", errors.New("the event is not JSON")
	}
	return event.ID, nil
}

// event is a webhook of Stripe's form.
func event(id string, amount int) string {
	return fmt.Sprintf(`{"id":%q,"object":"event","type":"charge.succeeded","data":{"object":{"amount":%d}}}`, id, amount)
}

func TestKeyFromTheBody(t *testing.T) {
	// JSON cannot carry every byte, so this one takes the body as it is.
	verbatim := func(_ *http.Request, body []byte) (string, error) { return string(body), nil }
	long := strings.Repeat("\xff", 255)
	for name, row := range map[string]struct {
		opts idempotency.Options
		send []idemtest.Exchange
		runs int
	}{
		"an event that is delivered twice": {
			send: []idemtest.Exchange{{Body: event("evt_1", 1), Get: "201 charge 1"}, {Body: event("evt_1", 1), Get: "replay 201 charge 1"}}, runs: 1},
		"two events": {
			send: []idemtest.Exchange{{Body: event("evt_1", 1), Get: "201 charge 1"}, {Body: event("evt_2", 1), Get: "201 charge 2"}}, runs: 2},
		"the header does not count": {
			send: []idemtest.Exchange{{Key: "a", Body: event("evt_1", 1), Get: "201 charge 1"}, {Key: "a", Body: event("evt_2", 1), Get: "201 charge 2"},
				{Keys: []string{""}, Body: event("evt_2", 1), Get: "replay 201 charge 2"}}, runs: 2},
		"another event under the id": {
			send: []idemtest.Exchange{{Body: event("evt_1", 1), Get: "201 charge 1"}, {Body: event("evt_1", 2), Get: "422 key_reused"}}, runs: 1},
		"an event without an id passes through": {
			send: []idemtest.Exchange{{Body: event("", 1), Get: "201 charge 1"}, {Body: event("", 1), Get: "201 charge 2"}}, runs: 2},
		"an id is required": {opts: idempotency.Options{RequireKey: true},
			send: []idemtest.Exchange{{Key: "a", Body: event("", 1), Get: "400 key_missing",
				Detail: "The request has no idempotency key, which this operation requires."}}},
		"an error, with its words": {
			send: []idemtest.Exchange{{Body: "{", Get: "400 key_invalid", Detail: "the event is not JSON"}}},
		"an error without words": {opts: idempotency.Options{Key: func(*http.Request, []byte) (string, error) { return "a", errors.New("") }},
			send: []idemtest.Exchange{{Get: "400 key_invalid", Detail: "This idempotency key is not valid."}}},
		"any bytes are a key": {opts: idempotency.Options{Key: verbatim},
			send: []idemtest.Exchange{{Body: "\x00 ,\"\n", Get: "201 charge 1"}, {Body: "\x00 ,\"\n", Get: "replay 201 charge 1"}}, runs: 1},
		"255 bytes": {opts: idempotency.Options{Key: verbatim}, send: []idemtest.Exchange{{Body: long, Get: "201 charge 1"}, {Body: long, Get: "replay 201 charge 1"}}, runs: 1},
		"256 bytes": {opts: idempotency.Options{Key: verbatim}, send: []idemtest.Exchange{{Body: long + "x", Get: "400 key_invalid",
			Detail: "The idempotency key of this request is longer than 255 bytes."}}},
		"ValidateKey": {opts: idempotency.Options{ValidateKey: func(key string) error {
			if key != "evt_1" {
				return errors.New("not an event of ours: " + key)
			}
			return nil
		}}, send: []idemtest.Exchange{{Body: event("evt_1", 1), Get: "201 charge 1"}, {Body: event("x", 1), Get: "400 key_invalid", Detail: "not an event of ours: x"}}, runs: 1},
		"a custom Fingerprint": {opts: idempotency.Options{Fingerprint: func(*http.Request, []byte) []byte { return nil }},
			send: []idemtest.Exchange{{Body: event("evt_1", 1), Get: "201 charge 1"}, {Body: event("evt_1", 2), Get: "replay 201 charge 1"}}, runs: 1},
		"other methods pass through": {
			send: []idemtest.Exchange{{Method: "GET", Body: event("evt_1", 1), Get: "201 charge 1"}, {Method: "GET", Body: "{", Get: "201 charge 2"}}, runs: 2},
	} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				if row.opts.Key == nil {
					row.opts.Key = eventID
				}
				var want string
				c := idemtest.NewClient(store, &row.opts, func(w http.ResponseWriter, r *http.Request) {
					body, err := io.ReadAll(r.Body)
					require.NoError(t, err)
					require.Equal(t, want, string(body))
					idemtest.Lasting(0)(w, r)
				})
				for i, x := range row.send {
					want = x.Body
					c.Check(t, i, x)
				}
				require.Equal(t, row.runs, c.Runs())
			})
		})
	}
}

// Key gets a body that may be empty, and nil in the place of one that is too
// large, whether the client has told its length or not.
func TestKeyOfALargeBody(t *testing.T) {
	for name, row := range map[string]struct {
		size    int
		unsized bool
		want    any // the length of what Key gets; nil: it gets nil
	}{
		"empty":           {0, false, 0},
		"empty, chunked":  {0, true, 0},
		"of the limit":    {64, false, 64},
		"chunked":         {64, true, 64},
		"larger":          {65, false, nil},
		"larger, chunked": {65, true, nil},
		"large, chunked":  {500, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got any
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64, Key: func(r *http.Request, body []byte) (string, error) {
				got = nil
				if body != nil {
					got = len(body)
				}
				return r.Header.Get("Webhook-Id"), nil
			}}, func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				require.NoError(t, err)
				require.Equal(t, strings.Repeat("x", row.size), string(body))
			})
			// Pools are empty after two collections, so this request gets a buffer
			// that no other has used.
			runtime.GC()
			runtime.GC()
			send := func(id string, fill string) string {
				r := httptest.NewRequest("POST", "/hooks", strings.NewReader(strings.Repeat(fill, row.size)))
				switch {
				case row.unsized:
					r.ContentLength = -1
				case row.size == 0:
					r.Body = http.NoBody // as a server has it
				}
				r.Header.Set("Webhook-Id", id)
				answer, _ := idemtest.Describe(t, c.Do(r))
				require.Equal(t, row.want, got)
				return answer
			}
			require.Equal(t, "200 ", send("evt_1", "x"))
			require.Equal(t, "replay 200 ", send("evt_1", "x"))
			require.Equal(t, 1, c.Runs())
			if row.size > 0 {
				require.Equal(t, "422 key_reused", send("evt_1", "y"))
			}
			require.Equal(t, "200 ", send("", "x"))
			require.Equal(t, 2, c.Runs())
		})
	}
}

// A key is the same wherever it comes from: a service that moves from one way to
// the other forgets nothing.
func TestKeyFromElsewhereIsTheSameKey(t *testing.T) {
	for name, body := range map[string]string{"small": "x", "large": upload(500, 'x')} {
		t.Run(name, func(t *testing.T) {
			store := idempotency.NewMemoryStore()
			fromHeader := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64}, reading(-1))
			fromKey := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64, Key: func(r *http.Request, _ []byte) (string, error) {
				return r.Header.Get("Idempotency-Key"), nil
			}}, reading(-1))
			fromHeader.Check(t, 1, idemtest.Exchange{Key: "a", Body: body, Get: "201 "})
			fromKey.Check(t, 2, idemtest.Exchange{Key: "a", Body: body, Get: "replay 201 "})
			fromKey.Check(t, 3, idemtest.Exchange{Key: "b", Body: body, Get: "201 "})
			fromHeader.Check(t, 4, idemtest.Exchange{Key: "b", Body: body, Get: "replay 201 "})
		})
	}
}

// A body that breaks off before Key could see it claims nothing.
func TestBodyThatBreaksOffBeforeItsKeyIsKnown(t *testing.T) {
	for name, row := range map[string]struct {
		err error
		get string
	}{
		"broken off":            {io.ErrUnexpectedEOF, "400 body_incomplete"},
		"at a limit of outside": {&http.MaxBytesError{Limit: 5}, "413 body_too_large"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
			asked := false
			c := idemtest.NewClient(s, &idempotency.Options{Key: func(*http.Request, []byte) (string, error) {
				asked = true
				return "a", nil
			}}, nil)
			r := c.Request(idemtest.Exchange{})
			r.Body = &brokenBody{strings.NewReader(`{"id`), row.err}
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, row.get, got)
			require.False(t, asked)
			require.Zero(t, s.Count("Acquire"))
			require.Zero(t, c.Runs())
		})
	}
}

// A panic of Key goes on, and holds no key.
func TestKeyPanics(t *testing.T) {
	bug := errors.New("bug")
	panics := true
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Key: func(r *http.Request, body []byte) (string, error) {
		if panics {
			panic(bug)
		}
		return eventID(r, body)
	}}, nil)
	require.PanicsWithValue(t, bug, func() {
		c.Handler.ServeHTTP(httptest.NewRecorder(), c.Request(idemtest.Exchange{Body: event("evt_1", 1)}))
	})
	panics = false
	c.Check(t, 1, idemtest.Exchange{Body: event("evt_1", 1), Get: "201 charge 1"})
}

// Two middlewares may both look for the key of a request in its body.
func TestNestedMiddlewareWithKeys(t *testing.T) {
	store := idempotency.NewMemoryStore()
	keyed := &idempotency.Options{Key: eventID}
	for name, row := range map[string]struct {
		outer, inner *idempotency.Options
		id           string
		runs         int
	}{
		"both find it":       {keyed, keyed, "evt_1", 1},
		"neither finds it":   {keyed, keyed, "", 2},
		"the inner finds it": {keyed, nil, "", 1},
		"the outer finds it": {nil, keyed, "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			runs := 0
			h := idempotency.Middleware(store, row.outer)(idempotency.Middleware(store, row.inner)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				runs++
				body, err := io.ReadAll(r.Body)
				require.NoError(t, err)
				require.Equal(t, event(row.id, 1), string(body))
			})))
			for range 2 {
				r := httptest.NewRequest("POST", "/hooks/"+url.PathEscape(name), strings.NewReader(event(row.id, 1)))
				r.Header.Set("Idempotency-Key", "a")
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				require.Equal(t, http.StatusOK, w.Code)
			}
			require.Equal(t, row.runs, runs)
		})
	}
}

// Scope may look into the form of a request whose body was read for Key. The
// handler gets the form whole, and no file of a copy stays on the disk. A body
// over MaxBufferedBody has no tenant for Scope, however the client sends it: a
// retry in chunks must find the cell of the first try.
func TestScopeThatParsesAForm(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	multi := func(tenant, pad string) (contentType, body string) {
		return `multipart/form-data; boundary="aaa"`, encode("aaa", field("tenant", tenant), field("amount", "5"),
			"Content-Disposition: form-data; name=\"f\"; filename=\"f.txt\"\r\n\r\n"+pad)
	}
	urlencoded := func(tenant, pad string) (contentType, body string) {
		return "application/x-www-form-urlencoded", url.Values{"tenant": {tenant}, "amount": {"5"}, "zzz": {pad}}.Encode()
	}
	for kind, form := range map[string]func(tenant, pad string) (contentType, body string){"multipart": multi, "urlencoded": urlencoded} {
		for name, row := range map[string]struct {
			size   int
			scopes []string // of requests of tenants a, a, and b
			second string   // what tenant b gets
		}{
			"small": {10, []string{"a", "a", "b"}, "200 b 5"},
			"large": {100 << 10, []string{"", "", ""}, "422 key_reused"},
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				var scopes []string
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
					MaxBufferedBody: 1 << 10,
					Key:             func(r *http.Request, _ []byte) (string, error) { return r.Header.Get("Webhook-Id"), nil },
					Scope: func(r *http.Request) string {
						_ = r.ParseMultipartForm(0)
						scopes = append(scopes, r.FormValue("tenant"))
						return r.FormValue("tenant")
					},
				}, func(w http.ResponseWriter, r *http.Request) {
					_, _ = fmt.Fprint(w, r.FormValue("tenant"), " ", r.FormValue("amount"))
				})
				send := func(tenant string, unsized bool) string {
					contentType, body := form(tenant, strings.Repeat("x", row.size))
					r := httptest.NewRequest("POST", "/hooks", strings.NewReader(body))
					r.Header.Set("Content-Type", contentType)
					r.Header.Set("Webhook-Id", "evt_1")
					if unsized {
						r.ContentLength = -1
					}
					answer, _ := idemtest.Describe(t, c.Do(r))
					return answer
				}
				require.Equal(t, "200 a 5", send("a", false))
				require.Equal(t, "replay 200 a 5", send("a", true))
				require.Equal(t, row.second, send("b", false))
				require.Equal(t, row.scopes, scopes)
				left, err := os.ReadDir(os.Getenv("TMPDIR"))
				require.NoError(t, err)
				require.Empty(t, left)
			})
		}
	}
}
