package redis_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// startSentinel starts one that watches a master with so many replicas, and
// returns its address when it knows all of them. It decides by itself: how long
// several take to agree is not for this package to test.
func startSentinel(t *testing.T, master *idemtest.RedisServer, replicas int) (addr string) {
	const conf = `port %s
bind 127.0.0.1
dir %s
logfile %s
sentinel monitor payments %s 1
sentinel down-after-milliseconds payments 500
sentinel failover-timeout payments 3000
`
	dir, port := t.TempDir(), idemtest.FreePort(t)
	s := &idemtest.RedisServer{T: t, Addr: "127.0.0.1:" + port, Log: filepath.Join(dir, "log")}
	file := filepath.Join(dir, "sentinel.conf")
	text := fmt.Sprintf(conf, port, dir, s.Log, strings.Replace(master.Addr, ":", " ", 1))
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	s.Args = []string{master.Args[0], file, "--sentinel"}
	require.True(t, s.Start(), "sentinel does not start")
	t.Cleanup(s.Kill)
	// It looks around every few seconds unless it is told to hurry, and takes a
	// master for dead that it has not looked at for so long.
	require.NoError(t, connectTo(t, s).Do(t.Context(), "sentinel", "debug",
		"ping-period", 100, "info-period", 200, "publish-period", 200).Err())
	sentinel := redis.NewSentinelClient(&redis.Options{Addr: s.Addr})
	t.Cleanup(func() { _ = sentinel.Close() })
	idemtest.Await(t, "the sentinel", func() bool {
		known, err := sentinel.Master(t.Context(), "payments").Result()
		return err == nil && known["num-slaves"] == fmt.Sprint(replicas)
	})
	return s.Addr
}

// The master is killed among traffic, and Sentinel makes a replica the master:
// of two that it reaches, the one that is ahead. That may cost answers.
func TestRedisSentinelFailover(t *testing.T) {
	const lease = 6 * time.Second // longer than a failover
	master := idemtest.StartRedis(t, "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
	host, port, err := net.SplitHostPort(master.Addr)
	require.NoError(t, err)
	for range 2 {
		idemtest.StartRedis(t, "--replicaof", host+" "+port, "--repl-diskless-sync-delay", "0")
	}
	idemtest.AwaitReplicas(t, connectTo(t, master), 2)
	sentinel := startSentinel(t, master, 2)
	client := connect(t, redis.UniversalOptions{MasterName: "payments", Addrs: []string{sentinel}})
	store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{MinReplicas: 1})
	require.NoError(t, store.Check(t.Context()))

	x := startTraffic(t, store, lease)
	x.flows(200)
	require.Zero(t, x.errors, "before anything happened")
	killed := time.Now()
	master.Kill()
	promoted := awaitPromotion(t, sentinel, master.Addr)
	x.flows(300)
	t.Logf("errors until %v after the kill, %v after the promotion", x.errorsAfter(killed), x.errorsAfter(<-promoted))
	require.NotZero(t, x.errors, "the killed master was missed")
	require.NoError(t, store.Check(t.Context()))
	lost := x.judge(true)
	require.LessOrEqual(t, lost.ranAgain+lost.unknown, 2*trafficClients, "keys whose answer was lost")
	if x.errorsAfter(killed) < lease/2 {
		require.Zero(t, lost.owed, "there was time to store them")
	}
}

// awaitPromotion sends when Sentinel has named another master than old.
func awaitPromotion(t *testing.T, sentinel, old string) <-chan time.Time {
	client := redis.NewSentinelClient(&redis.Options{Addr: sentinel})
	promoted := make(chan time.Time, 1)
	go func() {
		defer client.Close()
		for t.Context().Err() == nil {
			addr, err := client.GetMasterAddrByName(t.Context(), "payments").Result()
			if err == nil && net.JoinHostPort(addr[0], addr[1]) != old {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		promoted <- time.Now()
	}()
	return promoted
}

// A Redis that keeps what it acknowledged is killed and started again among
// traffic: nothing is lost.
func TestRedisRestartsAmongTraffic(t *testing.T) {
	server := idemtest.StartRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	store := idempotency.NewRedisStore(connectTo(t, server), nil)
	x := startTraffic(t, store, 3*time.Second)
	for range 3 {
		x.flows(200)
		server.Kill()
		server.Restart()
		restarted := time.Now()
		x.flows(200)
		require.Less(t, x.errorsAfter(restarted), 2*time.Second)
	}
	require.Zero(t, x.judge(true), "keys whose record was lost")
}

func TestRedisForgetsScriptsAmongTraffic(t *testing.T) {
	client := connectTo(t, idemtest.StartRedis(t))
	x := startTraffic(t, idempotency.NewRedisStore(client, nil), 30*time.Second)
	for range 50 {
		x.flows(10)
		require.NoError(t, client.ScriptFlush(t.Context()).Err())
	}
	require.Zero(t, x.judge(true))
	require.Zero(t, x.errors)
}
