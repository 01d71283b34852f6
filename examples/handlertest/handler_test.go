// Package handlertest shows how a service tests its own handler. docs/testing.md
// has these tests, word for word.
package handlertest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A bank is what the handler calls. Like a real one, it knows keys itself.
type bank struct {
	charged map[string]bool
	calls   int
	crash   bool // the process dies after the next charge
}

func (b *bank) charge(key string) {
	b.calls++
	b.charged[key] = true
	if b.crash {
		b.crash = false
		panic("the process dies here")
	}
}

// newService is the service under test: its routes, on a store of the test.
func newService(store idempotency.Store, b *bank) http.Handler {
	b.charged = map[string]bool{}
	mux := http.NewServeMux()
	once := idempotency.Middleware(store, &idempotency.Options{RequireKey: true})
	mux.Handle("POST /charge", once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e, _ := idempotency.FromContext(r.Context()) // RequireKey: there is a key
		b.charge(e.DownstreamKey("bank"))
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charged, attempt %d", e.Attempt())
	})))
	return mux
}

// post sends a charge. A panic of the handler ends here, as it does in net/http.
func post(h http.Handler, key string) (w *httptest.ResponseRecorder) {
	w = httptest.NewRecorder()
	r := httptest.NewRequest("POST", "/charge", strings.NewReader("amount=100"))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded") // or r.FormValue is empty
	r.Header.Set("Idempotency-Key", key)
	defer func() { _ = recover() }()
	h.ServeHTTP(w, r)
	return w
}

func TestRetryDoesNothing(t *testing.T) {
	b := new(bank)
	h := newService(idempotency.NewMemoryStore(), b)
	first, second := post(h, "order-17"), post(h, "order-17")

	require.Equal(t, 1, b.calls) // the effect, not the handler, is what counts
	require.Equal(t, 201, second.Code)
	require.Equal(t, first.Body.String(), second.Body.String())
	require.Equal(t, "true", second.Header().Get("Idempotent-Replayed"))
}

func TestCrashBetweenEffectAndAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &bank{crash: true}
		h := newService(idempotency.NewMemoryStore(), b)
		post(h, "order-17")
		require.Contains(t, post(h, "order-17").Body.String(), "in_progress")

		time.Sleep(30 * time.Second) // the lease ends
		require.Equal(t, "charged, attempt 2", post(h, "order-17").Body.String())
		require.Equal(t, 2, b.calls)
		require.Len(t, b.charged, 1) // the bank has seen one DownstreamKey
	})
}

func TestDuplicateWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(3 * time.Second)
			w.WriteHeader(http.StatusCreated)
		})
		h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(slow)
		go post(h, "order-17")
		synctest.Wait() // until the first is asleep in its handler

		start := time.Now()
		require.Equal(t, "true", post(h, "order-17").Header().Get("Idempotent-Replayed"))
		require.Equal(t, 3*time.Second, time.Since(start))
	})
}

// A forgetful store takes no response while it is down.
type forgetful struct {
	idempotency.Store
	down atomic.Bool
}

func (s *forgetful) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if s.down.Load() {
		return errors.New("the store is down")
	}
	return s.Store.Complete(ctx, key, token, r)
}

func TestAnswerThatIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, store := new(bank), &forgetful{Store: idempotency.NewMemoryStore()}
		h := newService(store, b)
		store.down.Store(true)
		require.Equal(t, 201, post(h, "order-17").Code) // the client has its answer
		require.Contains(t, post(h, "order-17").Body.String(), "in_progress")

		store.down.Store(false)
		time.Sleep(30 * time.Second) // it was stored in the background
		require.Equal(t, "true", post(h, "order-17").Header().Get("Idempotent-Replayed"))
		require.Equal(t, 1, b.calls)
	})
}

func TestOnRedis(t *testing.T) {
	mini := miniredis.RunT(t)
	client := redis.NewUniversalClient(&redis.UniversalOptions{
		Addrs: []string{mini.Addr()}, ContextTimeoutEnabled: true,
	})
	t.Cleanup(func() { _ = client.Close() })
	b := &bank{crash: true}
	h := newService(idempotency.NewRedisStore(client, nil), b)

	post(h, "order-17")
	mini.FastForward(31 * time.Second) // the clock of miniredis moves by hand
	require.Equal(t, "charged, attempt 2", post(h, "order-17").Body.String())

	mini.SetError("LOADING Redis is loading the dataset in memory")
	require.Equal(t, 503, post(h, "order-18").Code)
	require.Equal(t, 2, b.calls)
}

// The page has the tests of this file, so that what a reader copies has run.
func TestPageHasTheseTests(t *testing.T) {
	page, err := os.ReadFile("../../docs/testing.md")
	require.NoError(t, err)
	source, err := os.ReadFile("handler_test.go")
	require.NoError(t, err)
	blocks := strings.Split(string(page), "```go\n")[1:]
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		code, _, _ := strings.Cut(block, "```")
		require.Contains(t, string(source), code)
	}
}
