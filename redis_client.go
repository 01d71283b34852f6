package idempotency

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/redis/go-redis/v9"
)

// requireRedisClient panics for a client that a RedisStore cannot use.
func requireRedisClient(client redis.UniversalClient, opts *RedisOptions) {
	v := reflect.ValueOf(client)
	if !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil() {
		panic("idempotency: NewRedisStore without a client; make one with redis.NewUniversalClient")
	}
	switch unfitRedisClient(v, maxEmbedding) {
	case reflect.TypeFor[redis.Ring]():
		panic("idempotency: NewRedisStore with a redis.Ring, which loses claims when a server is down; " +
			"use Redis Cluster or Sentinel")
	case reflect.TypeFor[redis.AutoPipeliner]():
		panic("idempotency: NewRedisStore with a redis.AutoPipeliner, which waits longer than a call may take; " +
			"use the client that it was made of")
	}
	_, oneServer := client.(*redis.Client)
	_, cluster := client.(masterFinder)
	if opts.MinReplicas > 0 && !oneServer && !cluster {
		panic("idempotency: RedisOptions.MinReplicas needs the connection that a claim went over; " +
			"use a *redis.Client or a *redis.ClusterClient")
	}
}

// maxEmbedding is how deep unfitRedisClient looks. A type may embed itself.
const maxEmbedding = 8

// unfitRedisClient returns the type of the redis.Ring or redis.AutoPipeliner
// that v is or embeds, and nil if there is none. A struct that embeds one, by
// itself or as an interface, sends its commands through it. Fields with a name
// do not count: a client may know a Ring and use it for something else.
func unfitRedisClient(v reflect.Value, depth int) reflect.Type {
	for v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct || depth == 0 { // a nil pointer has no kind
		return nil
	}
	switch t := v.Type(); t {
	case reflect.TypeFor[redis.Ring](), reflect.TypeFor[redis.AutoPipeliner]():
		return t
	case reflect.TypeFor[redis.Client](), reflect.TypeFor[redis.ClusterClient]():
		return nil
	}
	for i := range v.NumField() {
		if v.Type().Field(i).Anonymous {
			if unfit := unfitRedisClient(v.Field(i), depth-1); unfit != nil {
				return unfit
			}
		}
	}
	return nil
}

// errRedisPanic is the error for a panic in what the client calls.
var errRedisPanic = errors.New("idempotency: panic in the Redis client")

// containRedis is deferred around calls of the client. It makes a panic in a
// hook or a dialer an error, because on a goroutine of the store a panic would
// end the process.
func containRedis(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %v", errRedisPanic, p)
	}
}
