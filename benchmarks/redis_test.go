package benchmarks

import (
	"context"
	"net"
	"net/http"
	"regexp"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// redisContenders returns the named contenders, on one server that each finds
// empty. The benchmark is skipped where there is no redis-server.
func redisContenders(t testing.TB, names ...string) (list []contender, admin *redis.Client) {
	addr := idemtest.StartRedis(t).Addr
	admin = idemtest.DialRedis(t, addr)
	loadFloorScript(t, admin)
	client := idemtest.DialRedis(t, addr)
	floor := func(make func() floorClient) func(http.Handler) http.Handler {
		return func(next http.Handler) http.Handler {
			return &redisFloor{next: next, prefix: "floor:", client: make()}
		}
	}
	all := map[string]func(http.Handler) http.Handler{
		"floor-raw":       floor(func() floorClient { return newSerial(t, addr) }),
		"floor-pipelined": floor(func() floorClient { return newPipelined(t, addr) }),
		"floor-goredis":   floor(func() floorClient { return goRedisClient{client} }),
		"idempotency": func(next http.Handler) http.Handler {
			return idempotency.Middleware(idempotency.NewRedisStore(client, nil), nil)(next)
		},
	}
	for _, name := range names {
		wrap := all[name]
		list = append(list, contender{name, func(next http.Handler) http.Handler {
			require.NoError(t, admin.FlushDB(context.Background()).Err())
			return wrap(next)
		}})
	}
	return list, admin
}

// A tripCounter counts the round trips of a client.
type tripCounter struct{ trips atomic.Int64 }

func (c *tripCounter) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (c *tripCounter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.trips.Add(1)
		return next(ctx, cmd)
	}
}

func (c *tripCounter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		c.trips.Add(1)
		return next(ctx, cmds)
	}
}

// trips returns the round trips of a first execution and of a replay by the
// library.
func trips(t testing.TB) (first, replayed float64) {
	const requests = 50
	client := idemtest.DialRedis(t, idemtest.StartRedis(t).Addr)
	h := idempotency.Middleware(idempotency.NewRedisStore(client, nil), nil)(newCharge(smallBody))
	asking := newBenchClient(true)
	asking.do(h, keyAt(requests)) // the connection is open and the scripts are loaded
	counter := new(tripCounter)
	client.AddHook(counter)
	for _, n := range []*float64{&first, &replayed} {
		counter.trips.Store(0)
		for i := range requests {
			asking.do(h, keyAt(i))
		}
		*n = float64(counter.trips.Load()) / requests
	}
	asking.check(t, smallBody, true)
	return first, replayed
}

func BenchmarkRedisFirst(b *testing.B) {
	list, _ := redisContenders(b, "floor-raw", "floor-goredis", "idempotency")
	each(b, list, func(b *testing.B, c contender) {
		first(b, smallBody, c)
		if c.name == "idempotency" {
			n, _ := trips(b)
			b.ReportMetric(n, "trips/op")
		}
	})
}

func BenchmarkRedisReplay(b *testing.B) {
	list, _ := redisContenders(b, "floor-raw", "floor-goredis", "idempotency")
	each(b, list, func(b *testing.B, c contender) {
		replay(b, smallBody, c)
		if c.name == "idempotency" {
			_, n := trips(b)
			b.ReportMetric(n, "trips/op")
		}
	})
}

func BenchmarkRedisFirst64KiB(b *testing.B) {
	list, _ := redisContenders(b, "floor-raw", "floor-goredis", "idempotency")
	each(b, list, func(b *testing.B, c contender) { first(b, 64<<10, c) })
}

func BenchmarkRedisReplay64KiB(b *testing.B) {
	list, _ := redisContenders(b, "floor-raw", "floor-goredis", "idempotency")
	each(b, list, func(b *testing.B, c contender) { replay(b, 64<<10, c) })
}

// crowded sets how many goroutines RunParallel starts.
func crowded(b *testing.B) { b.SetParallelism(64 / runtime.GOMAXPROCS(0)) }

func BenchmarkRedisFirst64Goroutines(b *testing.B) {
	list, _ := redisContenders(b, "floor-goredis", "floor-pipelined", "idempotency")
	each(b, list, func(b *testing.B, c contender) {
		crowded(b)
		parallel(b, c, perProcessor)
	})
}

func BenchmarkRedisReplay64Goroutines(b *testing.B) {
	list, _ := redisContenders(b, "floor-goredis", "floor-pipelined", "idempotency")
	each(b, list, func(b *testing.B, c contender) {
		crowded(b)
		parallelReplay(b, c, perProcessor)
	})
}

// BenchmarkRedisMemory tells what a record takes. Bodies have 100 to 300 bytes,
// 200 on average: Redis's allocator rounds up by up to a fifth, and bodies of
// one size would measure where that size happens to lie. Run it with
// -benchtime=1x.
func BenchmarkRedisMemory(b *testing.B) {
	const records = 30_000
	list, admin := redisContenders(b, "floor-pipelined", "idempotency")
	each(b, list, func(b *testing.B, c contender) {
		for b.Loop() {
			charge := newCharge(300)
			whole := charge.body
			h := c.wrap(charge)
			client := newBenchClient(true)
			client.do(h, keyAt(records)) // buffers are allocated
			before := redisMemory(b, admin)
			for i := range records {
				charge.body = whole[:100+i%201]
				client.do(h, keyAt(i))
			}
			client.check(b, len(charge.body), false)
			require.EqualValues(b, records+1, admin.DBSize(b.Context()).Val())
			b.ReportMetric((redisMemory(b, admin)-before)/records, "B/record")
		}
	})
}

// redisMemory returns the bytes that the server has in use.
func redisMemory(t testing.TB, admin *redis.Client) float64 {
	info := admin.Info(t.Context(), "memory").Val()
	match := regexp.MustCompile(`used_memory:(\d+)`).FindStringSubmatch(info)
	require.NotNil(t, match, info)
	n, err := strconv.ParseFloat(match[1], 64)
	require.NoError(t, err)
	return n
}
