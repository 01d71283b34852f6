package benchmarks

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A floor that does less than its job would make every ratio wrong.
func TestFloorsAnswer(t *testing.T) {
	rows := []struct {
		contender
		size, keys int // too many for one slab
	}{
		{contender{"map", newMapFloor}, smallBody, 500},
		{contender{"slab", newSlabFloor}, smallBody, 12_000},
		{contender{"map, 64 KiB", newMapFloor}, 64 << 10, 200},
		{contender{"slab, 64 KiB", newSlabFloor}, 64 << 10, 200},
		{contender{"map, 1 MiB", newMapFloor}, 1 << 20, 10},
		{contender{"idempotency", inMemory}, smallBody, 500},
		{contender{"idempotency, 1 MiB", inMemory}, 1 << 20, 10},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) { requireAnswers(t, row.wrap, row.size, row.keys) })
	}
	t.Run("Redis", func(t *testing.T) {
		list, _ := redisContenders(t, "floor-raw", "floor-pipelined", "floor-goredis", "idempotency")
		for _, c := range list {
			t.Run(c.name, func(t *testing.T) { requireAnswers(t, c.wrap, smallBody, 500) })
			t.Run(c.name+", 64 KiB", func(t *testing.T) { requireAnswers(t, c.wrap, 64<<10, 20) })
		}
	})
	t.Run("a large request", func(t *testing.T) {
		client, charge := newUpload(1<<20), newCharge(smallBody)
		h := newMapFloor(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			require.NoError(t, err)
			require.True(t, bytes.Equal(client.body.data, body), "what the handler read")
			charge.ServeHTTP(w, r)
			charge.closed = true
		}))
		for range 2 {
			client.do(h, keyAt(0))
			client.check(t, smallBody, true)
		}
		client.body.data[1<<19] = 'y'
		client.do(h, keyAt(0))
		require.Equal(t, http.StatusUnprocessableEntity, client.w.status)
	})
	t.Run("pass-through", func(t *testing.T) {
		r := httptest.NewRequest(http.MethodPost, benchPath, strings.NewReader("{}"))
		w := httptest.NewRecorder()
		newPassFloor(newCharge(smallBody)).ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code)
	})
}

// requireAnswers checks that the handler runs once for each key, that a repetition has
// the same answer, and that another request under the key has not.
func requireAnswers(t *testing.T, wrap func(http.Handler) http.Handler, size, keys int) {
	var mu sync.Mutex
	var bodies []string
	charge := newCharge(size)
	h := wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		body, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		bodies = append(bodies, string(body))
		w.Header()["Run"] = []string{string(body)}
		charge.ServeHTTP(w, r)
	}))
	ask := func(key, body string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodPost, benchPath, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Idempotency-Key", key)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		w.Header().Del("Idempotent-Replayed")
		return w
	}
	isCharge := func(i int, w *httptest.ResponseRecorder) {
		require.Equal(t, http.StatusCreated, w.Code)
		require.True(t, string(charge.body) == w.Body.String(), "the body")
		require.Equal(t, http.Header{
			"Content-Type": chargeType, "Location": chargeLocation, "Api-Version": chargeVersion, "Run": {keyAt(i)},
		}, w.Header())
	}
	for i := range keys {
		isCharge(i, ask(keyAt(i), keyAt(i)))
	}
	require.Len(t, bodies, keys)
	for i := range keys {
		require.Equal(t, keyAt(i), bodies[i], "what the handler read")
		isCharge(i, ask(keyAt(i), keyAt(i)))
		require.Equal(t, http.StatusUnprocessableEntity, ask(keyAt(i), "other").Code)
	}
	require.Len(t, bodies, keys, "nothing ran again")
}
