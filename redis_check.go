package idempotency

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrEvictionUnknown: [RedisStore.Check] found nothing wrong, but the server
// does not tell its maxmemory-policy. Many rented servers refuse CONFIG. Look at
// the policy where the server is rented: the default of many is to evict, after
// which handlers run twice. A program may log this error and go on.
var ErrEvictionUnknown = errors.New("idempotency: Redis does not tell its maxmemory-policy; see that it is noeviction")

// Check returns an error if Redis cannot be reached, is older than 7.0, cannot
// do what the store needs, or may evict records. It tries the commands and the
// scripts of the store on a key of their own, which begins with the Prefix and
// "check:" and expires at once. Of a Cluster it asks every master, and tries a
// key of each. The error names the address of the server.
//
// The error is [ErrEvictionUnknown] only if nothing else is wrong. It wraps
// [ErrStoreFull] when Redis has no room for a new key, and [ErrTooFewReplicas]
// when fewer than MinReplicas acknowledge one. On miniredis, which tells no
// policy, it is ErrEvictionUnknown.
//
// Call Check at the start of a program and in health checks. It is safe for
// concurrent use. It takes about ten round trips.
func (s *RedisStore) Check(ctx context.Context) (err error) {
	defer containRedis(&err)
	cluster, ok := s.client.(interface {
		masterFinder
		ForEachMaster(context.Context, func(context.Context, *redis.Client) error) error
	})
	if !ok {
		return s.checkServer(ctx, s.client, s.trialKey())
	}
	var mu sync.Mutex
	var unknown error
	err = cluster.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) (err error) {
		defer containRedis(&err) // a goroutine of go-redis
		key, err := s.trialKeyOf(ctx, cluster, node)
		if err == nil {
			err = s.checkServer(ctx, node, key)
		}
		if errors.Is(err, ErrEvictionUnknown) { // another master may have worse to tell
			mu.Lock()
			defer mu.Unlock()
			unknown = err
			return nil
		}
		return err
	})
	if err == nil {
		err = unknown
	}
	return err
}

// trialKey returns a key that no other call of Check uses.
func (s *RedisStore) trialKey() string {
	token := newToken()
	return s.opts.Prefix + "check:" + base64.RawURLEncoding.EncodeToString(token[:])
}

// trialKeyOf returns a key that a master of a Cluster has. It is empty if there
// is none among many, because the Prefix puts all keys on another master.
func (s *RedisStore) trialKeyOf(ctx context.Context, cluster masterFinder, node *redis.Client) (string, error) {
	base := s.trialKey()
	for n := range 1 << 16 { // four times the number of slots
		key := base + ":" + strconv.Itoa(n)
		master, err := cluster.MasterForKey(ctx, key)
		if err != nil {
			return "", fmt.Errorf("redis at %s: looking for a key: %w", node.Options().Addr, err)
		}
		if master.Options().Addr == node.Options().Addr {
			return key, nil
		}
	}
	return "", nil
}

// checkServer checks one server, and tries the commands of the store on a key
// that it has. The eviction comes last: its check may return
// ErrEvictionUnknown, which must not hide another error.
func (s *RedisStore) checkServer(ctx context.Context, client redis.Cmdable, key string) error {
	err := checkRedisVersion(ctx, client)
	if err == nil && key != "" {
		if err = s.tryCommands(ctx, key); err != nil {
			err = fmt.Errorf("trying the commands of the store: %w", err)
		}
	}
	if err == nil {
		err = checkRedisEviction(ctx, client)
	}
	if err == nil {
		return nil
	}
	address := ""
	if c, ok := client.(interface{ Options() *redis.Options }); ok {
		address = " at " + c.Options().Addr
	}
	return fmt.Errorf("redis%s: %w", address, err)
}

// checkRedisVersion passes a server that does not tell its version. The
// commands are tried anyway: what a server calls itself says little.
func checkRedisVersion(ctx context.Context, client redis.Cmdable) error {
	info, err := client.Info(ctx, "server").Result()
	if err != nil && !isRedisRefusal(err) {
		return fmt.Errorf("asking for the version: %w", err)
	}
	version, found := infoField(info, "redis_version") // Valkey tells the Redis version that it is compatible with
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); found && (err != nil || n < 7) {
		return fmt.Errorf("it is version %s; 7.0 or newer is needed", version)
	}
	return nil
}

// tryCommands claims a key, renews it, stores a result that expires at once,
// and frees the key. A program that dies in the middle leaves a key for ten
// seconds.
func (s *RedisStore) tryCommands(ctx context.Context, key string) error {
	c := Claim{Token: "check", Fingerprint: []byte("check"), Lease: 10 * time.Second, TTL: 10 * time.Second}
	answer, err := s.claim(ctx, key, c, false)
	if err == nil && answer.State != Acquired {
		err = fmt.Errorf("a new key is %v", answer.State)
	}
	if err != nil {
		return fmt.Errorf("a claim: %w", err)
	}
	c.Attempt, c.Once = answer.Attempt, true
	answer, err = s.decide(ctx, key, c)
	if err == nil && (answer.State != Acquired || !answer.Once) {
		err = fmt.Errorf("a claimed key is %v", answer.State)
	}
	if err != nil {
		return fmt.Errorf("a renewal: %w", err)
	}
	result := redisCell{state: redisCompleted, token: c.Token, fingerprint: c.Fingerprint}
	stored, err := s.settle(ctx, completeScript, key, result, time.Millisecond)
	if err == nil && !stored {
		err = ErrLeaseLost
	}
	if err != nil {
		return fmt.Errorf("storing a result: %w", err)
	}
	if err := s.release(ctx, key, c.Token, time.Millisecond); err != nil {
		return fmt.Errorf("freeing a key: %w", err)
	}
	return nil
}

// checkRedisEviction asks CONFIG for the policy, and INFO where CONFIG is
// renamed or denied.
func checkRedisEviction(ctx context.Context, client redis.Cmdable) error {
	const name = "maxmemory-policy"
	config, err := client.ConfigGet(ctx, name).Result()
	policy := config[name]
	if err != nil && !isRedisRefusal(err) {
		return fmt.Errorf("asking for the %s: %w", name, err)
	}
	if policy == "" {
		info, err := client.Info(ctx, "memory").Result()
		if err != nil && !isRedisRefusal(err) {
			return fmt.Errorf("asking for the %s: %w", name, err)
		}
		policy, _ = infoField(info, "maxmemory_policy")
	}
	switch policy {
	case "noeviction":
		return nil
	case "":
		return ErrEvictionUnknown
	}
	return fmt.Errorf("its %s is %s, so it may drop records, after which handlers run twice; set it to noeviction", name, policy)
}

// infoField returns a field of what INFO answered.
func infoField(info, name string) (value string, found bool) {
	for line := range strings.Lines(info) {
		if value, found = strings.CutPrefix(line, name+":"); found {
			return strings.TrimSpace(value), true
		}
	}
	return "", false
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
