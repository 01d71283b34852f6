package idempotency

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Check returns an error if Redis cannot be reached, is older than 7.0, or may
// evict records. Of a Cluster it asks every master. Call it at the start of a
// program and in health checks. It is safe for concurrent use, and changes
// nothing in Redis. Where the Redis user may not ask, or the server does not
// tell, that part of the check passes.
func (s *RedisStore) Check(ctx context.Context) error {
	if cluster, ok := s.client.(interface {
		ForEachMaster(context.Context, func(context.Context, *redis.Client) error) error
	}); ok {
		return cluster.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) error {
			if err := checkRedis(ctx, node); err != nil {
				return fmt.Errorf("%s: %w", node.Options().Addr, err)
			}
			return nil
		})
	}
	return checkRedis(ctx, s.client)
}

// checkRedis checks one server. An answer that says nothing passes: many hosted
// services refuse CONFIG, and stand-ins such as miniredis do not know all of
// INFO. An error there would keep programs from starting on a server that
// works.
func checkRedis(ctx context.Context, client redis.Cmdable) error {
	info, err := client.Info(ctx, "server").Result()
	if err != nil && !isRedisRefusal(err) {
		return fmt.Errorf("idempotency: asking Redis for its version: %w", err)
	}
	_, version, found := strings.Cut(info, "redis_version:") // Valkey tells the Redis version that it is compatible with
	version, _, _ = strings.Cut(version, "\r\n")
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); found && (err != nil || n < 7) {
		return fmt.Errorf("idempotency: Redis is version %s; 7.0 or newer is needed", version)
	}
	config, err := client.ConfigGet(ctx, "maxmemory-policy").Result()
	if err != nil && !isRedisRefusal(err) {
		return fmt.Errorf("idempotency: asking Redis for its maxmemory-policy: %w", err)
	}
	if policy := config["maxmemory-policy"]; policy != "" && policy != "noeviction" {
		return fmt.Errorf("idempotency: Redis has maxmemory-policy %s and may drop records, "+
			"after which handlers run twice; set it to noeviction", policy)
	}
	return nil
}

// isRedisRefusal reports whether Redis is there and only does not tell. The
// user may not ask, or the command is renamed, unknown, or (in miniredis) known
// in part.
func isRedisRefusal(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return false
	}
	text := reply.Error()
	return strings.HasPrefix(text, "NOPERM") || strings.HasPrefix(text, "ERR") || strings.HasSuffix(text, "is not supported")
}
