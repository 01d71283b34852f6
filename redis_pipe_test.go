package idempotency_test

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A gate stands in for a Redis in which every key is free. Commands that come
// one by one wait until it opens.
type gate struct {
	open  chan struct{}
	store *idempotency.RedisStore // on it

	mu        sync.Mutex
	single    int
	pipelines []int     // their lengths
	deadline  time.Time // of the last pipeline
	broken    bool      // the hook panics
	refused   error     // of a pipeline, whose commands do not learn of it
	reply     string    // to a claim, if not empty
	replicas  int64     // that have what was written
	waits     int       // how often WAIT asked for them
	roundTrip time.Duration
	flying    int                  // commands and pipelines on their way
	successor atomic.Pointer[gate] // takes what comes from now on
	most      int                  // of them at a time
}

// fly is a round trip.
func (g *gate) fly() {
	g.mu.Lock()
	g.flying++
	g.most = max(g.most, g.flying)
	g.mu.Unlock()
	time.Sleep(g.roundTrip)
	g.mu.Lock()
	g.flying--
	g.mu.Unlock()
}

func (g *gate) DialHook(redis.DialHook) redis.DialHook {
	return func(context.Context, string, string) (net.Conn, error) { panic("no connection is needed") }
}

func (g *gate) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if next := g.successor.Load(); next != nil {
			return next.ProcessHook(nil)(ctx, cmd)
		}
		if table, ok := cmd.(*redis.CommandsInfoCmd); ok { // a Cluster's client asks once
			table.SetVal(map[string]*redis.CommandInfo{"set": {Name: "set", FirstKeyPos: 1, LastKeyPos: 1, StepCount: 1}})
			return nil
		}
		g.mu.Lock()
		g.single++
		g.mu.Unlock()
		<-g.open
		if g.broken {
			panic("a hook")
		}
		g.fly()
		return g.answer(cmd)
	}
}

func (g *gate) answer(cmd redis.Cmder) error {
	if reply, ok := cmd.(*redis.StringCmd); ok && g.reply != "" {
		reply.SetVal(g.reply)
		return nil
	}
	cmd.SetErr(redis.Nil)
	return redis.Nil
}

func (g *gate) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if next := g.successor.Load(); next != nil {
			return next.ProcessPipelineHook(nil)(ctx, cmds)
		}
		g.fly()
		g.mu.Lock()
		defer g.mu.Unlock()
		g.deadline, _ = ctx.Deadline()
		if g.pipelines = append(g.pipelines, len(cmds)); g.broken {
			panic("a hook")
		}
		if g.refused != nil {
			return g.refused
		}
		for _, cmd := range cmds {
			if wait, ok := cmd.(*redis.IntCmd); ok {
				g.waits++
				wait.SetVal(g.replicas)
				continue
			}
			_ = g.answer(cmd)
		}
		return cmds[0].Err()
	}
}

// claim claims a key within a second.
func (g *gate) claim(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := g.store.Acquire(ctx, "key"+strconv.Itoa(i), idempotency.Claim{
		Token: strconv.Itoa(i), Fingerprint: []byte{1}, Lease: time.Minute, TTL: time.Hour,
	})
	return err
}

// singles returns how many commands came one by one.
func (g *gate) singles() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.single
}

// withGate runs a test with a store behind a gate, and a function that claims
// so many keys at once, each with a deadline of a second. The channel brings their
// errors.
func withGate(t *testing.T, test func(t *testing.T, g *gate, claim func(from, to int) <-chan error)) {
	t.Helper()
	withGateOf(t, nil, test)
}

func withGateOf(t *testing.T, opts *idempotency.RedisOptions, test func(t *testing.T, g *gate, claim func(from, to int) <-chan error)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:0", PoolSize: 20})
		defer func() { require.NoError(t, client.Close()) }()
		client.AddHook(g)
		g.store = idempotency.NewRedisStore(client, opts)
		test(t, g, func(from, to int) <-chan error {
			results := make(chan error, to-from)
			for i := from; i < to; i++ {
				go func() { results <- g.claim(t.Context(), i) }()
			}
			synctest.Wait()
			return results
		})
	})
}

func requireErrors(t *testing.T, results <-chan error, want error) {
	t.Helper()
	for range cap(results) {
		require.ErrorIs(t, <-results, want)
	}
}

// Commands go together while eight others are on their way.
func TestRedisCommandsShareAPipeline(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		results := claim(0, 300)
		require.Equal(t, 8, g.single)
		close(g.open)
		requireErrors(t, results, nil)
		require.Equal(t, 8, g.single)
		require.ElementsMatch(t, []int{128, 128, 300 - 8 - 2*128}, g.pipelines)

		requireErrors(t, claim(300, 301), nil)
		require.Equal(t, 9, g.single, "by itself again")
	})
}

// A claim whose caller has returned at its deadline is not sent.
func TestRedisPipelineLeavesOutExpiredCalls(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		first := claim(0, 8)
		requireErrors(t, claim(8, 11), context.DeadlineExceeded)
		time.Sleep(time.Minute)
		second := claim(11, 13)
		close(g.open)
		requireErrors(t, first, nil)
		requireErrors(t, second, nil)
		require.Equal(t, []int{2}, g.pipelines)
	})
}

// The deadline of a pipeline is the latest of its calls.
func TestRedisPipelineDeadline(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		first := claim(0, 8)
		second := claim(8, 9)
		time.Sleep(time.Second / 2)
		third := claim(9, 10)
		last := time.Now().Add(time.Second)
		fourth := claim(10, 11)
		close(g.open)
		for _, results := range []<-chan error{first, second, third, fourth} {
			requireErrors(t, results, nil)
		}
		require.Equal(t, []int{3}, g.pipelines)
		require.Equal(t, last, g.deadline)
	})
}

// A large reply does not keep the commands of others from going together.
func TestRedisCommandsShareAPipelineAfterALargeReply(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		close(g.open)
		g.reply = strings.Repeat("x", 1<<20)
		require.Error(t, <-claim(0, 1), "no record")
		g.reply, g.open, g.single = "", make(chan struct{}), 0
		results := claim(0, 8+128)
		require.Equal(t, 8, g.single)
		close(g.open)
		requireErrors(t, results, nil)
		require.Equal(t, []int{128}, g.pipelines)
	})
}

// A pipeline that brought back much is followed by shorter ones, and one that
// brought back little by longer ones.
func TestRedisPipelineLengthFollowsWhatTheyMove(t *testing.T) {
	rows := []struct {
		claims, reply int
		want          []int // pipelines
	}{
		{8 + 128, 17 << 10, []int{128}}, // 2 MiB
		{8 + 100, 1 << 10, []int{64, 36}},
		{8 + 128, 2 << 10, []int{128}},   // 256 KiB, and what was sent
		{8 + 64, 4<<10 - 200, []int{64}}, // a little less
		{8 + 128, 0, []int{128}},
	}
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		for _, row := range rows {
			g.open, g.reply = make(chan struct{}), ""
			close(g.open)
			for range 500 { // the store forgets how many there were
				require.NoError(t, g.claim(t.Context(), 0))
			}
			g.pipelines, g.reply, g.open = nil, strings.Repeat("x", row.reply), make(chan struct{})
			results := claim(0, row.claims)
			close(g.open)
			for range row.claims {
				<-results
			}
			synctest.Wait()
			require.ElementsMatch(t, row.want, g.pipelines, row)
		}
	})
}

// Commands with large values have connections of their own, which are few.
func TestRedisLargeCommandsHaveLanesOfTheirOwn(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		const completes = 20
		results := make(chan error, completes)
		for range completes {
			go func() {
				results <- g.store.Complete(t.Context(), "key", "A", idempotency.Result{Value: make([]byte, 17<<10), TTL: time.Hour})
			}()
		}
		synctest.Wait()
		require.Equal(t, 4, g.single)
		small := claim(0, 8+10)
		require.Equal(t, 4+8, g.single)
		close(g.open)
		requireErrors(t, small, nil)
		requireErrors(t, results, redis.Nil)
		sent := 0
		for _, n := range g.pipelines {
			require.LessOrEqual(t, n, 16)
			sent += n
		}
		require.Equal(t, completes-4+10, sent)
	})
}

// Small commands do not wait for a connection that large ones hold: the lanes
// together have no more connections than the client, except that each kind has
// one.
func TestRedisLargeLanesByPoolSize(t *testing.T) {
	for poolSize, want := range map[int]int{1: 1, 8: 1, 9: 1, 10: 2, 100: 4} {
		synctest.Test(t, func(t *testing.T) {
			g := &gate{open: make(chan struct{})}
			client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:0", PoolSize: poolSize})
			defer func() { require.NoError(t, client.Close()) }()
			client.AddHook(g)
			store := idempotency.NewRedisStore(client, nil)
			for range 10 {
				go func() {
					_ = store.Complete(t.Context(), "key", "A", idempotency.Result{Value: make([]byte, 17<<10), TTL: time.Hour})
				}()
			}
			synctest.Wait()
			require.Equal(t, want, g.single, "of %d connections", poolSize)
			close(g.open)
		})
	}
}

// A call without a deadline leaves its pipeline without one.
func TestRedisPipelineWithoutADeadline(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		first := claim(0, 8)
		second := claim(8, 10)
		result := make(chan error, 1)
		go func() {
			claim := idempotency.Claim{Token: "1", Fingerprint: []byte{1}, Lease: time.Minute, TTL: time.Hour}
			_, err := g.store.Acquire(t.Context(), "key", claim)
			result <- err
		}()
		synctest.Wait()
		close(g.open)
		requireErrors(t, first, nil)
		requireErrors(t, second, nil)
		require.NoError(t, <-result)
		require.Equal(t, []int{3}, g.pipelines)
		require.Zero(t, g.deadline)
	})
}

// overdue is a context at the moment when Err tells its end and Done not yet.
type overdue struct{ context.Context }

func (overdue) Err() error { return context.DeadlineExceeded }

// A command that is left out has not been answered by Redis.
func TestRedisPipelineTellsExpiredCalls(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		first := claim(0, 8)
		result := make(chan error, 1)
		go func() {
			claim := idempotency.Claim{Token: "1", Fingerprint: []byte{1}, Lease: time.Minute, TTL: time.Hour}
			_, err := g.store.Acquire(overdue{t.Context()}, "key", claim)
			result <- err
		}()
		synctest.Wait()
		close(g.open)
		requireErrors(t, first, nil)
		require.ErrorIs(t, <-result, context.DeadlineExceeded)
		require.Equal(t, 8, g.single)
		require.Equal(t, []int(nil), g.pipelines)
	})
}

// A panic in a hook is an error of the call, whether its command goes by itself
// or in a pipeline that has a goroutine of its own.
func TestRedisHookPanics(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		g.broken = true
		first := claim(0, 8)
		second := claim(8, 10)
		close(g.open)
		for range 8 {
			require.ErrorContains(t, <-first, "panic")
		}
		for range 2 {
			require.ErrorContains(t, <-second, "panic")
		}
		g.broken = false
		requireErrors(t, claim(10, 30), nil)
	})
}

// When a hook refuses a whole pipeline, or Redis its connection, all calls in it
// return that error.
func TestRedisPipelineThatIsRefused(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		g.refused = errors.New("the circuit is open")
		first, second := claim(0, 8), claim(8, 20)
		close(g.open)
		requireErrors(t, first, nil)
		requireErrors(t, second, g.refused)
	})
}

// Many callers share as many lanes as are needed that none waits for more than
// 100 microseconds, and at least two; few callers have one each.
func TestRedisLanesFollowTheRoundTrip(t *testing.T) {
	rows := []struct {
		callers   int
		roundTrip time.Duration
		lanes     int
	}{
		{8, 50 * time.Microsecond, 8},
		{64, 50 * time.Microsecond, 2},
		{8, 50 * time.Microsecond, 8}, // again
		{64, 450 * time.Microsecond, 4},
		{64, 20 * time.Millisecond, 8},
	}
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		close(g.open)
		for _, row := range rows {
			g.roundTrip = row.roundTrip
			most := 0
			var done sync.WaitGroup
			for i := range row.callers {
				done.Go(func() {
					for n := range 300 {
						if err := g.claim(t.Context(), i); err != nil {
							t.Error(err)
						}
						g.mu.Lock()
						switch {
						case i == 0 && n == 100: // the store knows the round trip by now
							g.most = 0
						case i == 0 && n == 200: // the others go on
							most = g.most
						}
						g.mu.Unlock()
					}
				})
			}
			done.Wait()
			require.Equal(t, row.lanes, most, row)
		}
	})
}

// Claims that wait for replicas share a pipeline, and one WAIT.
func TestRedisClaimsShareAWait(t *testing.T) {
	withGateOf(t, &idempotency.RedisOptions{MinReplicas: 2}, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		close(g.open)
		g.roundTrip, g.replicas = time.Millisecond, 2
		requireErrors(t, claim(0, 108), nil)
		require.Equal(t, 9, g.waits, "8 claims by themselves, and 100 together")
		g.replicas = 1
		requireErrors(t, claim(0, 108), idempotency.ErrTooFewReplicas)
	})
}

// In a Cluster, commands to one node share pipelines. A node that does not
// answer holds up nothing that goes to the others.
func TestRedisNodesHavePipesOfTheirOwn(t *testing.T) {
	silent, other := &gate{open: make(chan struct{})}, &gate{open: make(chan struct{})}
	nodes := map[string]*gate{"silent:1": silent, "other:1": other}
	client := redis.NewClusterClient(&redis.ClusterOptions{
		ClusterSlots: func(context.Context) ([]redis.ClusterSlot, error) {
			return []redis.ClusterSlot{
				{Start: 0, End: 8191, Nodes: []redis.ClusterNode{{Addr: "silent:1"}}},
				{Start: 8192, End: 16383, Nodes: []redis.ClusterNode{{Addr: "other:1"}}},
			}, nil
		},
	})
	defer func() { require.NoError(t, client.Close()) }()
	client.OnNewNode(func(node *redis.Client) { node.AddHook(nodes[node.Options().Addr]) })
	store := idempotency.NewRedisStore(client, nil)
	claim := func(key string) error {
		_, err := store.Acquire(t.Context(), key, idempotency.Claim{
			Token: key, Fingerprint: []byte{1}, Lease: time.Minute, TTL: time.Hour,
		})
		return err
	}
	answers := map[*gate]chan error{silent: make(chan error, 400), other: make(chan error, 400)}
	asked := map[*gate]int{}
	for i := range 400 {
		key := "key" + strconv.Itoa(i)
		node, err := client.MasterForKey(t.Context(), "idem:"+key)
		require.NoError(t, err)
		g := nodes[node.Options().Addr]
		asked[g]++
		go func() { answers[g] <- claim(key) }()
	}
	require.Eventually(t, func() bool { return silent.singles() == 8 && other.singles() == 8 }, idemtest.Patience, time.Millisecond)
	close(other.open)
	for range asked[other] {
		require.NoError(t, <-answers[other])
	}
	require.NotEmpty(t, other.pipelines)
	require.Equal(t, 8, silent.singles())
	require.Empty(t, answers[silent])
	close(silent.open)
	for range asked[silent] {
		require.NoError(t, <-answers[silent])
	}
	require.NotEmpty(t, silent.pipelines)
}

// Connections that hang do not hold up a crowd, which otherwise has two lanes.
func TestRedisCrowdGoesAroundLanesThatHang(t *testing.T) {
	withGate(t, func(t *testing.T, g *gate, claim func(from, to int) <-chan error) {
		hanging := claim(0, 3)
		require.Equal(t, 3, g.single)
		answering := &gate{open: make(chan struct{}), roundTrip: 50 * time.Microsecond}
		close(answering.open)
		g.successor.Store(answering)
		time.Sleep(20 * time.Millisecond)
		var done sync.WaitGroup
		for i := range 64 {
			done.Go(func() {
				for range 100 {
					if err := g.claim(t.Context(), 10+i); err != nil {
						t.Error(err)
					}
				}
			})
		}
		done.Wait()
		close(g.open)
		requireErrors(t, hanging, nil)
	})
}
