package idempotency_test

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// eachRedis runs a test on miniredis, and on a redis-server where there is one.
func eachRedis(t *testing.T, test func(t *testing.T, addr string)) {
	t.Run("miniredis", func(t *testing.T) { test(t, miniredis.RunT(t).Addr()) })
	t.Run("redis-server", func(t *testing.T) { test(t, idemtest.StartRedis(t).Addr) })
}

// A miniStore has the clock of its miniredis.
type miniStore struct {
	*idempotency.RedisStore
	mini *miniredis.Miniredis
}

func (s miniStore) Advance(d time.Duration) { s.mini.FastForward(d) }

func newMiniStore(t *testing.T, opts *idempotency.RedisOptions) miniStore {
	mini := miniredis.RunT(t)
	return miniStore{idempotency.NewRedisStore(idemtest.DialRedis(t, mini.Addr()), opts), mini}
}

// A Redis that keeps nothing is killed and started again while a handler runs.
// The claim is lost, but what the handler answers is stored all the same.
func TestRedisLosesTheClaimOfARunningHandler(t *testing.T) {
	server := idemtest.StartRedis(t)
	store := idempotency.NewRedisStore(idemtest.DialRedis(t, server.Addr), nil)
	shop := idemtest.OpenShop(t, store, nil, func(w http.ResponseWriter, _ *http.Request) {
		server.Kill()
		server.Restart()
		_, _ = io.WriteString(w, "charged")
	})
	require.Equal(t, "200 charged", shop.Post("key"))
	require.Equal(t, "200 charged replayed", shop.Post("key"))
	require.EqualValues(t, 1, shop.Runs.Load())
}

// Redis fills up while a handler runs. Its answer is stored and replayed; new
// keys are refused until there is room again.
func TestRedisFillsUpWhileAHandlerRuns(t *testing.T) {
	const size = 64 << 10
	client := idemtest.DialRedis(t, idemtest.StartRedis(t, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction").Addr)
	var fillers []string
	fill := func() error {
		for len(fillers) < 1000 {
			name := fmt.Sprint("filler ", len(fillers))
			if err := client.Set(t.Context(), name, make([]byte, size), 0).Err(); err != nil {
				return err
			}
			fillers = append(fillers, name)
		}
		return nil
	}
	var events idemtest.EventLog
	opts := &idempotency.Options{OnEvent: events.Add, Logger: slog.New(slog.DiscardHandler)}
	shop := idemtest.OpenShop(t, idempotency.NewRedisStore(client, nil), opts, func(w http.ResponseWriter, r *http.Request) {
		if err := fill(); len(fillers) < 10 || !redis.HasErrorPrefix(err, "OOM") {
			t.Errorf("Redis is not full after %d: %v", len(fillers), err)
		}
		_, _ = io.WriteString(w, strings.Repeat("x", size))
	})
	require.Len(t, shop.Post("running"), len("200 ")+size)
	require.Len(t, shop.Post("running"), len("200 ")+size+len(" replayed"))
	require.Equal(t, "503 Service Unavailable", shop.Post("new"))
	refused := events.Last()
	require.Equal(t, idempotency.OutcomeStoreUnavailable, refused.Outcome)
	require.ErrorIs(t, refused.Err, idempotency.ErrStoreFull)
	require.EqualValues(t, 1, shop.Runs.Load())

	require.NoError(t, client.Del(t.Context(), fillers...).Err())
	require.Len(t, shop.Post("new"), len("200 ")+size)
	require.EqualValues(t, 2, shop.Runs.Load())
}
