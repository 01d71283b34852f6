package idempotency_test

import (
	"net/http"
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
		`"a";v=%"b c"`:                         "a",
		long:                                   long,
		`"` + long + `"`:                       long,

		"":                "",
		" ":               "",
		`""`:              "",
		`"`:               "",
		`"a`:              "",
		`a"`:              "",
		`"a"b`:            "",
		`"a", "b"`:        "",
		`"a";x=1, "b"`:    "",
		`"a";x, "b"`:      "",
		`"a";,`:           "",
		`"a";`:            "",
		`"a";=1`:          "",
		`"a";x=`:          "",
		`"a";x="b`:        "",
		`"a";x=%"b`:       "",
		`"a\x"`:           "",
		`"a\`:             "",
		"a,b":             "",
		"a b":             "",
		"a\x00b":          "",
		"\"a\x7f\"":       "",
		"\"a\tb\"":        "",
		"schlüssel":       "",
		`"schlüssel"`:     "",
		long + "k":        "",
		`"` + long + `k"`: "",
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
