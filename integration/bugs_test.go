package integration

import (
	"context"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
)

// plant returns the store, broken as bug says.
func plant(bug string, client *redis.Client, store *idempotency.RedisStore) idempotency.Store {
	_ = context.Background
	return store
}

func releaseAfterPanic(p *replica, v *visit) {}
