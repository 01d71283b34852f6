package idempotency_test

import (
	"context"
	"crypto/cipher"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// What an operator types leads to the cell that the middleware has used.
func TestStoreKeyOfWhatIsTyped(t *testing.T) {
	rows := []struct {
		name, method, target, header, scope string // as the client sent it
		asMethod, asPath, asKey             string // as the operator types it
	}{
		{"plain", "POST", "/charge", "order-17", "", "POST", "/charge", "order-17"},
		{"scope", "POST", "/charge", "order-17", "alice", "POST", "/charge", "order-17"},
		{"case of the method", "patch", "/charge", "order-17", "", "PATCH", "/charge", "order-17"},
		{"case of what is typed", "POST", "/charge", "order-17", "", "post", "/charge", "order-17"},
		{"quoted by the client", "POST", "/charge", `"order \"17\""`, "", "POST", "/charge", `order "17"`},
		{"query of the client", "POST", "/charge?a=1", "k", "", "POST", "/charge", "k"},
		{"query of an access log", "POST", "/charge?a=1", "k", "", "POST", "/charge?a=2", "k"},
		{"absolute form", "POST", "http://example.com/charge", "k", "", "POST", "/charge", "k"},
		{"URL that is typed", "POST", "/charge", "k", "", "POST", "https://example.com/charge", "k"},
		{"spelling", "POST", "/users/%7ebob", "k", "", "POST", "/users/~bob", "k"},
		{"bytes that no URI has", "POST", "/users/\xc3\xa4", "k", "", "POST", "/users/%c3%A4", "k"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			var used string
			opts := idempotency.Options{OnEvent: func(_ context.Context, e idempotency.Event) { used = e.StoreKey }}
			if row.scope != "" {
				opts.Scope = func(*http.Request) string { return row.scope }
			}
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, nil)
			c.Do(c.Request(idemtest.Exchange{Method: row.method, Target: row.target, Key: row.header}))
			require.NotEmpty(t, used)
			require.Equal(t, used, idempotency.StoreKey(row.scope, row.asMethod, row.asPath, row.asKey))
		})
	}
	same := idempotency.StoreKey("alice", "POST", "/charge", "order-17")
	for _, other := range []string{
		idempotency.StoreKey("", "POST", "/charge", "order-17"),
		idempotency.StoreKey("alice", "PUT", "/charge", "order-17"),
		idempotency.StoreKey("alice", "POST", "/charge/", "order-17"),
		idempotency.StoreKey("alice", "POST", "/charge", `"order-17"`),
	} {
		require.NotEqual(t, same, other)
	}
}

// storedBy runs handler once and returns the cell that it leaves.
func storedBy(t *testing.T, opts idempotency.Options, handler http.HandlerFunc) (key string, cell idempotency.Cell) {
	t.Helper()
	store := idempotency.NewMemoryStore()
	c := idemtest.NewClient(store, &opts, handler)
	outer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Request-Id", "outer")
		w.Header().Set("X-Gone", "outer")
		c.Handler.ServeHTTP(w, r)
	})
	outer.ServeHTTP(httptest.NewRecorder(), c.Request(idemtest.Exchange{Key: "a"}))
	key = idempotency.StoreKey("", "POST", "/charge", "a")
	cell, err := store.Inspect(t.Context(), key)
	require.NoError(t, err)
	require.Equal(t, idempotency.Completed, cell.State)
	return key, cell
}

// answeringAll has all that a response may have.
func answeringAll(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Add("X-A", "1")
		h.Add("X-A", "2")
		h.Del("X-Gone")
		h.Set("Set-Cookie", "session=1")
		h.Set("Trailer", "X-Declared")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(body))
		h.Set("X-Declared", "d")
		h.Set(http.TrailerPrefix+"X-Late", "l")
	}
}

func TestCellResponse(t *testing.T) {
	for name, aead := range map[string]cipher.AEAD{"in the clear": nil, "sealed": newAEAD(t, 'a')} {
		for size, body := range map[string]string{"small": "hello", "in parts": strings.Repeat("large ", 50_000)} {
			t.Run(name+", "+size, func(t *testing.T) {
				key, cell := storedBy(t, idempotency.Options{AEAD: aead}, answeringAll(body))
				resp, err := cell.Response(key, aead)
				require.NoError(t, err)
				require.Equal(t, idempotency.OutcomeReplayed, resp.Outcome)
				require.Equal(t, http.StatusCreated, resp.Status)
				require.Equal(t, []string{"1", "2"}, resp.Header["X-A"])
				for _, absent := range []string{"X-Request-Id", "X-Gone", "Set-Cookie"} {
					require.NotContains(t, resp.Header, absent)
				}
				require.Equal(t, http.Header{"X-Declared": {"d"}, "X-Late": {"l"}}, resp.Trailer)
				require.Equal(t, body, string(resp.Body))
			})
		}
	}
}

func TestCellResponseThatWasNotKept(t *testing.T) {
	key, cell := storedBy(t, idempotency.Options{MaxResponseBytes: 3}, answeringAll("hello"))
	resp, err := cell.Response(key, nil)
	require.NoError(t, err)
	require.Equal(t, &idempotency.StoredResponse{Outcome: idempotency.OutcomeResponseNotStored, Status: 201}, resp)

	synctest.Test(t, func(t *testing.T) {
		opts := idempotency.Options{Lease: time.Second, MaxExecution: time.Second}
		key, cell := storedBy(t, opts, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		resp, err := cell.Response(key, nil)
		require.NoError(t, err)
		require.Equal(t, &idempotency.StoredResponse{Outcome: idempotency.OutcomeOutcomeUnknown}, resp)
	})
}

func TestCellResponseThatIsUnreadable(t *testing.T) {
	aead := newAEAD(t, 'a')
	key, sealed := storedBy(t, idempotency.Options{AEAD: aead}, nil)
	_, clear := storedBy(t, idempotency.Options{}, nil)
	moved := sealed
	moved.Fingerprint = []byte("another request")
	cut := clear
	cut.Value = cut.Value[:len(cut.Value)-1]
	newer := clear
	newer.Value = append([]byte{0xf1}, newer.Value[1:]...)
	empty := clear
	empty.Value = nil
	for name, row := range map[string]struct {
		cell idempotency.Cell
		key  string
		aead cipher.AEAD
	}{
		"sealed under another key":          {sealed, key, newAEAD(t, 'b')},
		"sealed, and no key":                {sealed, key, nil},
		"sealed for another cell":           {sealed, key + "x", aead},
		"sealed for another request":        {moved, key, aead},
		"in the clear, though there is one": {clear, key, aead},
		"damaged":                           {cut, key, nil},
		"newer":                             {newer, key, nil},
		"empty":                             {empty, key, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := row.cell.Response(row.key, row.aead)
			require.ErrorIs(t, err, idempotency.ErrRecordUnreadable)
		})
	}
	for _, state := range []idempotency.State{0, idempotency.InProgress, idempotency.Abandoned, idempotency.Released} {
		_, err := idempotency.Cell{State: state, Value: clear.Value}.Response(key, nil)
		require.Error(t, err)
		require.NotErrorIs(t, err, idempotency.ErrRecordUnreadable)
	}
}

// A process dies in the middle of an at-most-once request. The operator finds
// out that the provider was never asked, and lets the customer try again.
func TestForgetAfterTheOutcomeWasSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := idempotency.NewMemoryStore()
		var attempts []int
		c := idemtest.NewClient(store, &idempotency.Options{AtMostOnce: true}, func(w http.ResponseWriter, r *http.Request) {
			e, _ := idempotency.FromContext(r.Context())
			if attempts = append(attempts, e.Attempt()); len(attempts) == 1 {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(http.StatusCreated)
		})
		key := idempotency.StoreKey("", "POST", "/charge", "a")
		look := func(want idempotency.State) idempotency.Cell {
			cell, err := store.Inspect(t.Context(), key)
			require.NoError(t, err)
			require.Equal(t, want, cell.State)
			return cell
		}
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "panic"})
		require.ErrorIs(t, store.Forget(t.Context(), key, look(idempotency.InProgress)), idempotency.ErrInProgress)
		time.Sleep(time.Minute)
		c.Check(t, 2, idemtest.Exchange{Key: "a", Get: "409 outcome_unknown"})
		require.NoError(t, store.Forget(t.Context(), key, look(idempotency.Abandoned)))
		c.Check(t, 3, idemtest.Exchange{Key: "a", Body: `{"amount":2}`, Get: "201 "})
		require.Equal(t, []int{1, 2}, attempts, "the handler can tell that it is not the first")
		look(idempotency.Completed)
	})
}

// A handler that is thought dead was only stopped. What it has done counts, and
// no second run does it again.
func TestForgetWhileTheOwnerWasOnlyStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := idempotency.NewMemoryStore()
		key := idempotency.StoreKey("", "POST", "/charge", "a")
		stopped := make(chan struct{})
		c := idemtest.NewClient(store, &idempotency.Options{AtMostOnce: true, MaxExecution: time.Minute},
			func(w http.ResponseWriter, _ *http.Request) {
				<-stopped
				w.WriteHeader(http.StatusCreated)
			})
		first := make(chan *http.Response)
		go func() { first <- c.Do(c.Request(idemtest.Exchange{Key: "a"})) }()
		time.Sleep(10 * time.Minute)
		seen, err := store.Inspect(t.Context(), key)
		require.NoError(t, err)
		require.Equal(t, idempotency.Abandoned, seen.State)
		require.NoError(t, store.Forget(t.Context(), key, seen))
		close(stopped)
		<-first
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 "})
		require.Equal(t, 1, c.Runs())
	})
}
