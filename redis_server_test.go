package idempotency_test

import (
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

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
