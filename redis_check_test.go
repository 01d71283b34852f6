package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

func checkRedis(t *testing.T, addr string, change ...func(*redis.Options)) error {
	t.Helper()
	return idempotency.NewRedisStore(idemtest.DialRedis(t, addr, change...), nil).Check(t.Context())
}

func TestRedisCheck(t *testing.T) {
	server := idemtest.StartRedis(t)
	admin := idemtest.DialRedis(t, server.Addr)
	require.NoError(t, checkRedis(t, server.Addr))
	idemtest.Await(t, "nothing is left", func() bool { return len(admin.Keys(t.Context(), "*").Val()) == 0 })

	require.NoError(t, admin.ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	err := checkRedis(t, server.Addr)
	require.ErrorContains(t, err, "set it to noeviction")
	require.ErrorContains(t, err, server.Addr)

	server.Kill()
	require.ErrorContains(t, checkRedis(t, server.Addr), server.Addr)
}

// The policy is told by INFO where CONFIG is renamed.
func TestRedisCheckWithoutConfig(t *testing.T) {
	for policy, want := range map[string]string{"volatile-lru": "volatile-lru", "noeviction": ""} {
		server := idemtest.StartRedis(t, "--rename-command", "CONFIG", "", "--maxmemory-policy", policy)
		err := checkRedis(t, server.Addr)
		if want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, want)
		require.NotErrorIs(t, err, idempotency.ErrEvictionUnknown)
	}
}

// What a user may not do is found, and what the user may not ask is told apart
// from it.
func TestRedisCheckOfAUser(t *testing.T) {
	server := idemtest.StartRedis(t)
	admin := idemtest.DialRedis(t, server.Addr)
	const all = "~* &* +@all "
	rows := []struct {
		rules, want string
		unknown     bool
	}{
		{rules: "~idem:* &idem:* +@connection +@read +@write +@scripting +@pubsub +wait +info +config|get"}, // as in the README
		{rules: all + "-config"},
		{rules: all + "-info"},
		{rules: all + "-info -config", unknown: true},
		{rules: all + "-@scripting", want: "a renewal: NOPERM"},
		{rules: all + "-set", want: "a claim: NOPERM"},
		{rules: "~shop:* &* +@all", want: "a claim: NOPERM"},
		{rules: "~shop:* &* +@all -info -config", want: "a claim: NOPERM"},
	}
	for _, row := range rows {
		rules := []any{"acl", "setuser", "app", "reset", "on", ">secret"}
		for rule := range strings.FieldsSeq(row.rules) {
			rules = append(rules, rule)
		}
		require.NoError(t, admin.Do(t.Context(), rules...).Err())
		err := checkRedis(t, server.Addr, func(o *redis.Options) { o.Username, o.Password = "app", "secret" })
		switch {
		case row.unknown:
			require.ErrorIs(t, err, idempotency.ErrEvictionUnknown, row.rules)
			require.ErrorContains(t, err, server.Addr)
		case row.want == "":
			require.NoError(t, err, row.rules)
		default:
			require.ErrorContains(t, err, row.want, row.rules)
			require.NotErrorIs(t, err, idempotency.ErrEvictionUnknown)
		}
	}
	require.ErrorContains(t, checkRedis(t, server.Addr, func(o *redis.Options) { o.Username, o.Password = "app", "wrong" }), "WRONGPASS")
}

// The error tells that Redis is full, or has too few replicas: a program may
// start nevertheless.
func TestRedisCheckOfWhatPasses(t *testing.T) {
	server := idemtest.StartRedis(t, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
	require.ErrorIs(t, checkRedis(t, server.Addr), idempotency.ErrStoreFull)
	alone := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr)
	store := idempotency.NewRedisStore(alone, &idempotency.RedisOptions{MinReplicas: 1})
	require.ErrorIs(t, store.Check(t.Context()), idempotency.ErrTooFewReplicas)
}

// A replica takes no claims.
func TestRedisCheckOfAReplica(t *testing.T) {
	host, port, _ := strings.Cut(idemtest.StartRedis(t).Addr, ":")
	replica := idemtest.StartRedis(t, "--replicaof", host+" "+port)
	require.ErrorContains(t, checkRedis(t, replica.Addr), "READONLY")
}

// A program can be tested on miniredis, which tells no policy.
func TestRedisCheckOnMiniredis(t *testing.T) {
	require.ErrorIs(t, checkRedis(t, miniredis.RunT(t).Addr()), idempotency.ErrEvictionUnknown)
}

func TestRedisCheckOnValkey(t *testing.T) {
	binary, err := exec.LookPath("valkey-server")
	if err != nil {
		t.Skip("no valkey-server on the PATH")
	}
	server := idemtest.StartRedis(t)
	server.Kill()
	server.Args[0] = binary
	server.Restart()
	require.NoError(t, checkRedis(t, server.Addr))
}

// The version counts where it is told, and what the server can do everywhere.
func TestRedisCheckVersion(t *testing.T) {
	rows := []struct{ info, refuses, want string }{
		{"# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\n", "", "version 6.2.14"},
		{"# Server\r\nredis_version:7.0.15\r\n", "", ""},
		{"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.0\r\n", "", ""},
		{"# Server\r\nredis_version:10.0.0\r\n", "", ""},
		{"# Server\r\nredis_version:unstable\r\n", "", "unstable"},
		{"# Server\r\nredis_git_sha1:0\r\n", "", ""},
		{"# Server\r\nredis_version:255.255.255\r\n", "set", "a claim: ERR syntax error"},
		{"# Server\r\nredis_version:255.255.255\r\n", "evalsha", "a renewal: ERR syntax error"},
	}
	for _, row := range rows {
		client := idemtest.DialRedis(t, "127.0.0.1:1")
		client.AddHook(fakeRedis{row.info, row.refuses})
		err := idempotency.NewRedisStore(client, nil).Check(t.Context())
		if row.want == "" {
			require.NoError(t, err, row)
		} else {
			require.ErrorContains(t, err, row.want, row)
		}
	}
}

// A fakeRedis answers what Check asks, with this INFO, and refuses one command.
type fakeRedis struct{ info, refuses string }

func (f fakeRedis) DialHook(next redis.DialHook) redis.DialHook { return next }

func (f fakeRedis) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		if cmd.Name() == f.refuses {
			cmd.SetErr(redisError("ERR syntax error"))
			return cmd.Err()
		}
		switch cmd := cmd.(type) {
		case *redis.StringCmd:
			if cmd.Name() == "set" {
				cmd.SetErr(redis.Nil)
				return redis.Nil
			}
			cmd.SetVal(f.info)
		case *redis.MapStringStringCmd:
			cmd.SetVal(map[string]string{"maxmemory-policy": "noeviction"})
		case *redis.Cmd:
			if len(cmd.Args()) == 7 { // a renewal
				cmd.SetVal([]any{int64(1), int64(1), int64(1)})
			} else {
				cmd.SetVal(int64(1))
			}
		default:
			return fmt.Errorf("unexpected command %v", cmd)
		}
		return nil
	}
}

func (f fakeRedis) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// A redisError is what a server answered.
type redisError string

func (e redisError) Error() string { return string(e) }
func (redisError) RedisError()     {}

// Of several masters, what is certainly wrong with one counts more than what
// another does not tell. A panic on a goroutine of the client ends no process.
func TestRedisCheckOfMasters(t *testing.T) {
	quiet, evicting := idemtest.DialRedis(t, miniredis.RunT(t).Addr()), idemtest.DialRedis(t, idemtest.StartRedis(t).Addr)
	check := func(masters ...*redis.Client) error {
		return idempotency.NewRedisStore(&fakeMasters{quiet, masters}, nil).Check(t.Context())
	}
	require.NoError(t, check(evicting))
	require.ErrorIs(t, check(evicting, quiet), idempotency.ErrEvictionUnknown)
	require.NoError(t, evicting.ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	for _, masters := range [][]*redis.Client{{quiet, evicting}, {evicting, quiet}} {
		err := check(masters...)
		require.ErrorContains(t, err, evicting.Options().Addr)
		require.NotErrorIs(t, err, idempotency.ErrEvictionUnknown)
	}
	broken := idemtest.DialRedis(t, "127.0.0.1:1")
	broken.AddHook(panickingHook("process"))
	require.ErrorContains(t, check(quiet, broken), "panic")
}

// fakeMasters has several masters. Commands go to the first client.
type fakeMasters struct {
	*redis.Client
	masters []*redis.Client
}

func (c *fakeMasters) MasterForKey(_ context.Context, key string) (*redis.Client, error) {
	return c.masters[int(key[len(key)-1])%len(c.masters)], nil
}

func (c *fakeMasters) ForEachMaster(ctx context.Context, fn func(context.Context, *redis.Client) error) error {
	var errs []error
	for _, master := range c.masters {
		result := make(chan error)
		go func() { result <- fn(ctx, master) }()
		errs = append(errs, <-result)
	}
	return errors.Join(errs...)
}
