package integration

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A fleet is a service of several processes on one Redis, and its ledger.
type fleet struct {
	epoch   time.Time
	lease   time.Duration
	ledger  *ledger
	redis   *idemtest.RedisServer
	links   []*link
	servers []*server

	mu     sync.Mutex               // guards what follows
	killed map[string]time.Duration // when, by the name of the process
}

// A scenario is what happens in one history. All that is random about it
// depends on the seed.
type scenario struct {
	seed   uint64
	length time.Duration
	lease  time.Duration
	mix    faultMix
	load   workload
	settle time.Duration // how long at most a process is asked for a key in the end

	noneDied bool   // neither the schedule nor a plan ends a run
	bug      string // in the server processes
	volatile bool   // Redis forgets all when it is killed
}

const replicas = 3

func (s scenario) redisArgs() []string {
	if s.volatile {
		return nil
	}
	return durable
}

func startFleet(t *testing.T, s scenario) *fleet {
	plan := seededPlans(s.seed, s.lease)
	if s.load.plan != nil {
		plan = s.load.plan(s.lease)
	}
	f := &fleet{epoch: time.Now(), lease: s.lease, redis: idemtest.StartRedis(t, s.redisArgs()...),
		killed: make(map[string]time.Duration)}
	f.ledger = startLedger(t, f.epoch, plan)
	for n := range replicas {
		f.links = append(f.links, startLink(t, f.redis.Addr))
		f.servers = append(f.servers, startServer(t, replicaConfig{
			Name: fmt.Sprintf("replica-%d", n), Redis: f.links[n].addr(), Ledger: f.ledger.url, Epoch: f.epoch,
			Lease: s.lease, Wait: s.lease, Bug: s.bug,
		}))
	}
	return f
}

// places are for fleets that play at the same time: each is five processes, and
// what they do is about time. So two cores have one, however many tests go test
// runs in parallel.
var places = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))

// play returns the history of a scenario.
func play(t *testing.T, s scenario) (history.History, schedule) {
	places <- struct{}{}
	defer func() { <-places }()
	f := startFleet(t, s)
	c := newCrowd(f, s.seed, s.load)
	faults := newSchedule(s.seed, replicas, s.length, s.lease, s.mix)
	ctx, cancel := context.WithTimeout(t.Context(), s.length)
	defer cancel()
	ended := make(chan struct{})
	go func() { defer close(ended); faults.run(ctx, t, f) }()
	c.run(ctx)
	<-ended
	// What goes on in the background has until the end of a lease.
	pauseFor(t.Context(), s.lease)
	c.sweep(s.settle, s.noneDied)
	for n := range f.servers {
		f.kill(n) // or rows would come while the history is judged
	}
	return history.History{
		Lease: s.lease, TTL: recordTTL, MaxExecution: maxExecution, NoneDied: s.noneDied, Killed: f.killed, Ops: c.all(), Rows: f.ledger.all(),
	}, faults
}

// kill kills the nth process, which lived until the time that is noted.
func (f *fleet) kill(n int) {
	at := since(f.epoch)
	name := f.servers[n].kill()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.killed[name] = at
}

// TestHistories plays histories and judges them.
func TestHistories(t *testing.T) { playSeeds(t, mixedLoad) }

// playSeeds plays histories of a load with all faults. A failure prints its seed;
// HISTORY_SEED is the first seed to play, HISTORY_RUNS how many.
func playSeeds(t *testing.T, load workload) {
	first, runs := number(t, "HISTORY_SEED", 1), number(t, "HISTORY_RUNS", 3)
	for seed := first; seed < first+runs; seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			leases := []choice[time.Duration]{{1, 300 * time.Millisecond}, {1, 500 * time.Millisecond}, {1, 900 * time.Millisecond}}
			s := scenario{
				seed: seed, length: 6 * time.Second, settle: patienceOfSweep, mix: allFaults, load: load,
				lease: choose(newRand(seed, "lease"), leases),
			}
			h, faults := play(t, s)
			report := history.Check(h)
			t.Logf("seed %d, lease %v: %v", seed, s.lease, describe(h, faults, report))
			requireClean(t, seed, h, faults, report)
			require.NotZero(t, report.Replays, "nothing was tested")
		})
	}
}

// TestHistoriesOfRequests plays histories that are about what a request is: forms
// that are encoded anew for every try, a key in the body, tenants that use the
// same keys, and streamed bodies of which the handler reads the head alone.
func TestHistoriesOfRequests(t *testing.T) { playSeeds(t, requestLoad) }

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	require.NoError(t, err, name)
	return n
}

func describe(h history.History, faults schedule, r *history.Report) string {
	unknown, codes := 0, make(map[string]int)
	for _, op := range h.Ops {
		if op.Err != "" {
			unknown++
		} else if op.Code != "" {
			codes[op.Code]++
		}
	}
	return fmt.Sprintf("%d requests of %d keys (%d answers, %d of them replays; %d without an answer; %v), "+
		"%d runs, %d effects, %d faults; runs after a release %d, after a lease %d; "+
		"answers that were not kept %d, and then ran again %d",
		len(h.Ops), r.Keys, r.Answers, r.Replays, unknown, codes, r.Runs, r.Effects, faults.count(),
		r.AfterRelease, r.AfterLease, r.Unkept, r.UnkeptRuns)
}

// requireClean prints all that is known about a few keys that are not.
func requireClean(t *testing.T, seed uint64, h history.History, faults schedule, r *history.Report) {
	if len(r.Violations) == 0 {
		return
	}
	const few = 3
	var b strings.Builder
	shown := make(map[string]bool)
	for _, v := range r.Violations {
		fmt.Fprintln(&b, v)
	}
	fmt.Fprintf(&b, "\nHISTORY_SEED=%d HISTORY_RUNS=1, schedule:\n%v", seed, faults)
	for _, v := range r.Violations {
		if len(shown) < few && !shown[v.Key] {
			shown[v.Key] = true
			fmt.Fprintf(&b, "\n%s\n%s", v.Key, h.Lines(v.Key))
		}
	}
	t.Fatalf("the promise was broken\n%s", b.String())
}
