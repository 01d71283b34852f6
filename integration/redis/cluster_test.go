package redis_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/storetest"
)

// A redisCluster has three masters, and a replica of each: that of node n is
// node n+3.
type redisCluster struct {
	t      *testing.T
	nodes  []*idemtest.RedisServer
	admins []redis.UniversalClient // of each node
	client redis.UniversalClient
}

func startCluster(t *testing.T) *redisCluster {
	c := &redisCluster{t: t}
	var addrs, busPorts []string
	for range 6 {
		busPorts = append(busPorts, idemtest.FreePort(t))
		node := idemtest.StartRedis(t, "--cluster-enabled", "yes", "--cluster-port", busPorts[len(busPorts)-1],
			"--cluster-node-timeout", "500", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
		c.nodes, addrs = append(c.nodes, node), append(addrs, node.Addr)
		c.admins = append(c.admins, connectTo(t, node))
	}
	do := func(node int, args ...any) {
		idemtest.Await(t, fmt.Sprint(args...), func() bool { return c.admins[node].Do(t.Context(), args...).Err() == nil })
	}
	for n, slots := range [][2]int{{0, 5460}, {5461, 10922}, {10923, 16383}} {
		do(n, "cluster", "addslotsrange", slots[0], slots[1])
		do(n, "cluster", "set-config-epoch", n+1)
	}
	for n := range 6 {
		for other := range n {
			host, port, err := net.SplitHostPort(addrs[other])
			require.NoError(t, err)
			do(n, "cluster", "meet", host, port, busPorts[other])
		}
	}
	for n := range 3 { // a node that does not know this master yet refuses
		do(n+3, "cluster", "replicate", c.admins[n].Do(t.Context(), "cluster", "myid").Val())
	}
	c.client = connect(t, redis.UniversalOptions{Addrs: addrs})
	for n := range 6 {
		idemtest.Await(t, "the cluster", func() bool { return c.isWhole(n) })
	}
	for n := range 3 {
		idemtest.Await(t, "replicas", func() bool { return c.replication(n, "state=online") })
	}
	return c
}

// isWhole reports whether a node knows three masters, each with its replica.
func (c *redisCluster) isWhole(node int) bool {
	slots, err := c.admins[node].ClusterSlots(c.t.Context()).Result()
	for _, s := range slots {
		if len(s.Nodes) != 2 {
			return false
		}
	}
	return err == nil && len(slots) == 3 &&
		strings.Contains(c.admins[node].ClusterInfo(c.t.Context()).Val(), "cluster_state:ok")
}

// replication reports whether a node says so about its replication.
func (c *redisCluster) replication(node int, words ...string) bool {
	info := c.admins[node].Info(c.t.Context(), "replication").Val()
	for _, w := range words {
		if !strings.Contains(info, w) {
			return false
		}
	}
	return true
}

func TestRedisClusterContract(t *testing.T) {
	c := startCluster(t)

	check := idempotency.NewRedisStore(c.client, nil).Check
	require.NoError(t, check(t.Context()))
	require.NoError(t, c.admins[2].ConfigSet(t.Context(), "maxmemory-policy", "volatile-ttl").Err())
	require.ErrorContains(t, check(t.Context()), c.nodes[2].Addr, "one master is enough")
	require.NoError(t, c.admins[2].ConfigSet(t.Context(), "maxmemory-policy", "noeviction").Err())
	for node := range 3 { // the masters: the scripts are tried on each
		require.NoError(t, c.admins[node].Do(t.Context(), "acl", "setuser", "default", "-evalsha").Err())
		err := check(t.Context())
		require.ErrorContains(t, err, "NOPERM")
		require.ErrorContains(t, err, c.nodes[node].Addr)
		require.NoError(t, c.admins[node].Do(t.Context(), "acl", "setuser", "default", "+evalsha").Err())
	}
	oneSlot := idempotency.NewRedisStore(c.client, &idempotency.RedisOptions{Prefix: "{shop}:"})
	require.NoError(t, oneSlot.Check(t.Context()), "two masters have no key of it")

	for name, opts := range map[string]*idempotency.RedisOptions{"defaults": nil, "MinReplicas": {MinReplicas: 1}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storetest.Run(t, func(*testing.T) idempotency.Store { return idempotency.NewRedisStore(c.client, opts) })
		})
	}
}

// A master is killed among traffic. Its replica takes over, and later the
// killed one comes back as a replica: until then no claim of its slots can be
// replicated, so a store that insists on that refuses them.
func TestRedisClusterFailover(t *testing.T) {
	c := startCluster(t)
	const lease = 6 * time.Second // longer than a failover
	lax := startTraffic(t, idempotency.NewRedisStore(c.client, &idempotency.RedisOptions{Prefix: "lax:"}), lease)
	strict := startTraffic(t, idempotency.NewRedisStore(c.client,
		&idempotency.RedisOptions{Prefix: "strict:", MinReplicas: 1}), lease)
	lax.flows(200)
	strict.flows(200)
	require.Zero(t, lax.errors+strict.errors, "before anything happened")

	killed := time.Now()
	c.nodes[0].Kill()
	idemtest.Await(t, "the replica is master", func() bool { return c.replication(3, "role:master") })
	promoted := time.Now()
	lax.flows(300)
	recovered := time.Now()
	idemtest.Await(t, "a claim without a replica is refused", func() bool { return strict.errorsAfter(recovered) > 0 })
	c.nodes[0].Restart()
	idemtest.Await(t, "the old master is a replica", func() bool {
		return c.replication(0, "role:slave", "master_link_status:up") && c.replication(3, "state=online")
	})
	replicated := time.Now()
	strict.flows(300)

	require.NotZero(t, lax.errors, "the killed master was missed")
	t.Logf("after the kill: promoted %v, errors until %v, replicated %v, errors with MinReplicas until %v", promoted.Sub(killed),
		lax.errorsAfter(killed), replicated.Sub(killed), strict.errorsAfter(killed))
	inTime := lax.errorsAfter(killed) < lease && strict.errorsAfter(replicated) < lease/2
	for _, lost := range []loss{lax.judge(false), strict.judge(true)} {
		require.LessOrEqual(t, lost.ranAgain+lost.unknown, trafficClients, "keys whose record was lost")
		if inTime {
			require.Zero(t, lost.owed, "there was time to store them")
		}
	}
}
