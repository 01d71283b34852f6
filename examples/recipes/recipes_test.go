// Package recipes tests what docs/recipes.md says.
package recipes

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// protect puts handler behind the middleware.
func protect(store idempotency.Store, opts idempotency.Options, handler http.HandlerFunc) http.Handler {
	opts.Logger = slog.New(slog.DiscardHandler)
	return idempotency.Middleware(store, &opts)(handler)
}

func request(body string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/charges", strings.NewReader(body))
	r.Header.Set("Idempotency-Key", "order-17")
	return r
}

// do returns what a request gets.
func do(h http.Handler, r *http.Request) (status int, body string, header http.Header) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String(), w.Result().Header
}

func execution(r *http.Request) *idempotency.Execution {
	e, _ := idempotency.FromContext(r.Context())
	return e
}

func TestDeadlineAroundTheHandler(t *testing.T) {
	for name, row := range map[string]struct {
		opts    idempotency.Options
		giveUp  http.HandlerFunc
		get     string // in the first answer, and in that of a retry
		retries string
	}{
		"in silence": {giveUp: func(http.ResponseWriter, *http.Request) {}, get: "outcome_unknown", retries: "outcome_unknown"},
		"with 503": {giveUp: func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "try again", http.StatusServiceUnavailable)
		}, get: "try again", retries: "charged"},
		"with 503, at most once": {opts: idempotency.Options{AtMostOnce: true}, giveUp: func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "try again", http.StatusServiceUnavailable)
		}, get: "try again", retries: "try again"},
		"with Discard": {giveUp: func(_ http.ResponseWriter, r *http.Request) { execution(r).Discard() },
			get: "store_unavailable", retries: "charged"},
		"with Discard, at most once": {opts: idempotency.Options{AtMostOnce: true}, giveUp: func(_ http.ResponseWriter, r *http.Request) {
			execution(r).Discard()
		}, get: "store_unavailable", retries: "charged"},
		"after Commit": {giveUp: func(_ http.ResponseWriter, r *http.Request) {
			_ = execution(r).Commit(r.Context())
			execution(r).Discard()
		}, get: "outcome_unknown", retries: "outcome_unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				runs := 0
				h := middleware.Timeout(time.Second)(protect(idempotency.NewMemoryStore(), row.opts, func(w http.ResponseWriter, r *http.Request) {
					if runs++; runs == 1 {
						<-r.Context().Done()
						row.giveUp(w, r)
						return
					}
					fmt.Fprint(w, "charged")
				}))
				_, body, _ := do(h, request(""))
				require.Contains(t, body, row.get)
				_, body, _ = do(h, request(""))
				require.Contains(t, body, row.retries)
			})
		})
	}
}

// events sends one event a second until its context ends or a write fails, and
// tells for how long.
func events(t *testing.T, opts idempotency.Options, discard bool) (lasted time.Duration, retry string) {
	synctest.Test(t, func(t *testing.T) {
		runs := 0
		h := protect(idempotency.NewMemoryStore(), opts, func(w http.ResponseWriter, r *http.Request) {
			runs++
			start := time.Now()
			for r.Context().Err() == nil {
				if _, err := fmt.Fprintf(w, "data: run %d\n\n", runs); err != nil {
					break
				}
				_ = http.NewResponseController(w).Flush()
				select {
				case <-time.After(time.Second):
				case <-r.Context().Done():
				}
				if runs == 2 {
					return
				}
			}
			lasted = time.Since(start)
			if discard {
				execution(r).Discard()
			}
		})
		ctx, hangUp := context.WithCancel(t.Context())
		time.AfterFunc(3500*time.Millisecond, hangUp)
		do(h, request("").WithContext(ctx))
		_, retry, _ = do(h, request(""))
	})
	return lasted, retry
}

func TestServerSentEvents(t *testing.T) {
	lasted, _ := events(t, idempotency.Options{}, false)
	require.Equal(t, 10*time.Minute, lasted, "MaxExecution")

	lasted, retry := events(t, idempotency.Options{CancelOnDisconnect: true}, false)
	require.Equal(t, 3500*time.Millisecond, lasted)
	require.Equal(t, 4, strings.Count(retry, "run 1"), "what was sent is replayed")

	_, retry = events(t, idempotency.Options{CancelOnDisconnect: true}, true)
	require.Equal(t, "data: run 2\n\n", retry)
}

// A write fails when its client has gone and the limit is passed, so an endless
// answer ends. That takes a real connection.
func TestWritesFailPastMaxResponseBytes(t *testing.T) {
	ended := make(chan int, 1)
	s := httptest.NewUnstartedServer(protect(idempotency.NewMemoryStore(), idempotency.Options{MaxResponseBytes: 64 << 10},
		func(w http.ResponseWriter, _ *http.Request) {
			for n := 0; ; n++ {
				if _, err := w.Write(make([]byte, 1024)); err != nil {
					ended <- n
					return
				}
				_ = http.NewResponseController(w).Flush()
			}
		}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	defer s.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, nil)
	require.NoError(t, err)
	r.Header.Set("Idempotency-Key", "order-17")
	res, err := s.Client().Do(r)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close()) // the client hangs up
	require.GreaterOrEqual(t, <-ended, 64)
}

func TestFullDuplex(t *testing.T) {
	for name, row := range map[string]struct {
		declared int64
		atOnce   bool
	}{"in chunks": {-1, false}, "declared": {1000, false}, "declared over MaxBufferedBody": {1<<20 + 1, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				started := false
				h := protect(idempotency.NewMemoryStore(), idempotency.Options{}, func(http.ResponseWriter, *http.Request) { started = true })
				body, client := io.Pipe()
				r := request("")
				r.Body, r.ContentLength = body, row.declared
				var all sync.WaitGroup
				all.Go(func() { do(h, r) })
				synctest.Wait()
				require.Equal(t, row.atOnce, started, "the client has not sent its body yet")
				require.NoError(t, client.Close())
				all.Wait()
				require.True(t, started)
			})
		})
	}
}

func TestLogins(t *testing.T) {
	login := func(w http.ResponseWriter, _ *http.Request) {
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "secret"})
		fmt.Fprint(w, "welcome")
	}
	h := protect(idempotency.NewMemoryStore(), idempotency.Options{}, login)
	_, _, first := do(h, request("password"))
	_, body, replay := do(h, request("password"))
	require.NotEmpty(t, first["Set-Cookie"])
	require.Equal(t, "welcome", body)
	require.Empty(t, replay["Set-Cookie"])

	all := idempotency.Options{ReplayHeader: func(string) bool { return true }}
	h = protect(idempotency.NewMemoryStore(), all, login)
	do(h, request("password"))
	_, _, replay = do(h, request("password"))
	require.Equal(t, first["Set-Cookie"], replay["Set-Cookie"], "whoever has the key and the body gets the session")

	for name, scope := range map[string]func(*http.Request) string{"no scope": nil, "scope": func(*http.Request) string { return "user" }} {
		h = protect(idempotency.NewMemoryStore(), idempotency.Options{Scope: scope}, login)
		do(h, request("password"))
		loggedIn := request("password")
		loggedIn.Header.Set("Cookie", "session=secret")
		status, _, _ := do(h, loggedIn)
		require.Equal(t, scope == nil, status == http.StatusUnprocessableEntity, name)
	}
}

func TestChangedSettings(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	defer client.Close()
	for name, row := range map[string]struct {
		prefix string
		opts   idempotency.Options
		retry  string
	}{
		"none":               {"shop:", idempotency.Options{}, "run 1"},
		"Scope":              {"shop:", idempotency.Options{Scope: func(*http.Request) string { return "tenant" }}, "run 2"},
		"Prefix":             {"new:", idempotency.Options{}, "run 2"},
		"Fingerprint":        {"shop:", idempotency.Options{Fingerprint: func(_ *http.Request, b []byte) []byte { return b }}, "key_reused"},
		"FingerprintHeaders": {"shop:", idempotency.Options{FingerprintHeaders: []string{"X-Tenant"}}, "key_reused"},
		"MaxBufferedBody":    {"shop:", idempotency.Options{MaxBufferedBody: 5}, "key_reused"},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, client.FlushAll(t.Context()).Err())
			runs := 0
			send := func(prefix string, opts idempotency.Options) string {
				store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: prefix})
				r := request("amount=100")
				r.Header.Set("X-Tenant", "acme")
				_, body, _ := do(protect(store, opts, func(w http.ResponseWriter, _ *http.Request) {
					runs++
					fmt.Fprintf(w, "run %d", runs)
				}), r)
				return body
			}
			require.Equal(t, "run 1", send("shop:", idempotency.Options{}))
			require.Contains(t, send(row.prefix, row.opts), row.retry)
		})
	}
}

func TestGraphQL(t *testing.T) {
	for name, row := range map[string]struct {
		discard bool
		retry   string
	}{"kept": {false, "errors"}, "Discard": {true, "data"}} {
		t.Run(name, func(t *testing.T) {
			runs := 0
			h := protect(idempotency.NewMemoryStore(), idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
				if runs++; runs > 1 {
					fmt.Fprint(w, `{"data":{"pay":"ok"}}`)
					return
				}
				if row.discard {
					execution(r).Discard()
				}
				fmt.Fprint(w, `{"errors":[{"message":"busy"}]}`)
			})
			status, body, _ := do(h, request("mutation { pay }"))
			require.Equal(t, http.StatusOK, status)
			require.Contains(t, body, "errors")
			_, body, _ = do(h, request("mutation { pay }"))
			require.Contains(t, body, row.retry)
			if !row.discard {
				status, _, _ = do(h, request("mutation { refund }"))
				require.Equal(t, http.StatusUnprocessableEntity, status)
			}
		})
	}
}
