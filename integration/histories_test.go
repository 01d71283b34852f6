package integration

import (
	"cmp"
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

// A fleet is a service of several processes on one database, and its ledger.
type fleet struct {
	epoch    time.Time
	lease    time.Duration
	ttl      time.Duration
	ledger   *ledger
	database database
	links    []*link
	servers  []*server

	mu      sync.Mutex               // guards what follows
	killed  map[string]time.Duration // when, by the name of the process
	stopped map[string][]history.Span
}

// A scenario is what happens in one history. All that is random about it
// depends on the seed.
type scenario struct {
	seed   uint64
	length time.Duration
	lease  time.Duration
	ttl    time.Duration // of records
	store  string        // the kind of store
	mix    faultMix
	load   workload
	settle time.Duration // how long at most a process is asked for a key in the end

	noneDied bool   // neither the schedule nor a plan ends a run
	bug      string // in the server processes
	volatile bool   // Redis forgets all when it is killed
}

const replicas = 3

func startFleet(t *testing.T, s scenario) *fleet {
	plan := seededPlans(s.seed, s.lease)
	if s.load.plan != nil {
		plan = s.load.plan(s.lease)
	}
	f := &fleet{epoch: time.Now(), lease: s.lease, ttl: s.ttl, killed: make(map[string]time.Duration),
		stopped: make(map[string][]history.Span)}
	if s.volatile {
		f.database = redisDatabase{idemtest.StartRedis(t)}
	} else {
		f.database = startDatabase(t, s.store)
	}
	f.ledger = startLedger(t, f.epoch, plan)
	for n := range replicas {
		f.links = append(f.links, startLink(t, f.database.addr()))
		f.servers = append(f.servers, startServer(t, replicaConfig{
			Name: fmt.Sprintf("replica-%d", n), Store: s.store, Database: f.links[n].addr(), Ledger: f.ledger.url, Epoch: f.epoch,
			Lease: s.lease, Wait: s.lease, TTL: s.ttl, Bug: s.bug,
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
	s.ttl, s.store = cmp.Or(s.ttl, recordTTL), cmp.Or(s.store, onRedis)
	f := startFleet(t, s)
	c := newCrowd(f, s.seed, s.load)
	faults := newSchedule(s.seed, replicas, s.length, s.lease, s.mix)
	ctx, cancel := context.WithTimeout(t.Context(), s.length)
	defer cancel()
	stalled := measureStalls(t.Context())
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
		Lease: s.lease, TTL: s.ttl, MaxExecution: maxExecution, NoneDied: s.noneDied, Killed: f.killed, Stopped: f.stopped, Stalled: stalled(),
		Ops:  c.all(),
		Rows: append(f.ledger.all(), keptRows(t, f.database)...),
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

// measureStalls measures for how long this process cannot run when it wants to. It
// returns a function that ends that, and returns the longest time.
func measureStalls(ctx context.Context) (longest func() time.Duration) {
	const often = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(ctx)
	result := make(chan time.Duration)
	go func() {
		var most time.Duration
		for last := time.Now(); pauseFor(ctx, often); last = time.Now() {
			most = max(most, time.Since(last)-often)
		}
		result <- most
	}()
	return func() time.Duration { cancel(); return <-result }
}

// stop stops the nth process for d, or until ctx ends.
func (f *fleet) stop(ctx context.Context, n int, d time.Duration) {
	from := since(f.epoch)
	process, _ := f.servers[n].current()
	f.servers[n].stopFor(ctx, d)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped[process] = append(f.stopped[process], history.Span{From: from, To: since(f.epoch)})
}

// TestHistories plays histories and judges them.
func TestHistories(t *testing.T) { playSeeds(t, func(*scenario) {}) }

// TestHistoriesOfExpiry plays histories in which the TTL of records ends, and
// their keys are used again.
func TestHistoriesOfExpiry(t *testing.T) {
	playSeeds(t, func(s *scenario) {
		s.load, s.ttl, s.length = expiringLoad, 4*s.lease, 10*time.Second
	})
}

// TestHistoriesOnPostgres plays histories on PostgreSQL. Handlers write a row on a
// transaction that the store commits with the answer. A claim has to be answered
// within a sixth of its lease, which includes a connection that is made for it.
// So leases are longer than on Redis.
func TestHistoriesOnPostgres(t *testing.T) {
	playSeeds(t, func(s *scenario) {
		s.load, s.store = databaseLoad, onPostgres
		s.lease, s.length = 3*s.lease, 10*time.Second
	})
}

// TestHistoriesOfDeployments plays histories in which processes are replaced while
// clients send: another one takes over, and the one before gets SIGTERM, ends its
// requests and waits for its Background.
func TestHistoriesOfDeployments(t *testing.T) {
	playSeeds(t, func(s *scenario) { s.mix = deployments })
}

// playSeeds plays histories with all faults, unless change says otherwise. A
// failure prints its seed; HISTORY_SEED is the first seed to play, HISTORY_RUNS
// how many.
func playSeeds(t *testing.T, change func(*scenario)) {
	first, runs := number(t, "HISTORY_SEED", 1), number(t, "HISTORY_RUNS", 3)
	for seed := first; seed < first+runs; seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			leases := []choice[time.Duration]{{1, 300 * time.Millisecond}, {1, 500 * time.Millisecond}, {1, 900 * time.Millisecond}}
			s := scenario{
				seed: seed, length: 6 * time.Second, settle: patienceOfSweep, mix: allFaults, load: mixedLoad,
				lease: choose(newRand(seed, "lease"), leases),
			}
			change(&s)
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
// same keys, streamed bodies of which the handler reads the head alone, bodies that
// break off, and handlers that run without a claim while Redis is down.
func TestHistoriesOfRequests(t *testing.T) { playSeeds(t, func(s *scenario) { s.load = requestLoad }) }

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
	return fmt.Sprintf("%d requests of %d keys in %d lives (%d answers, %d of them replays; %d without an answer; %v), "+
		"%d runs, %d effects, %d faults; runs after a release %d, after a lease %d; "+
		"answers that were not kept %d, and then ran again %d; runs without a claim %d; told that it is not stored %d",
		len(h.Ops), r.Keys, r.Lives, r.Answers, r.Replays, unknown, codes, r.Runs, r.Effects, faults.count(),
		r.AfterRelease, r.AfterLease, r.Unkept, r.UnkeptRuns, r.Exposed, r.NotStored)
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
