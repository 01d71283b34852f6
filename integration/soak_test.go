package integration

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A soak is two processes on a database and one with a MemoryStore, under load.
type soak struct {
	t        *testing.T
	began    time.Time
	length   time.Duration
	ledger   *soakLedger
	database database
	links    []*link
	servers  []*server
	load     *soakLoad
	samples  map[string][]sample
	deployed int // how often the first process was replaced
}

// TestSoak runs for as long as SOAK says, 10m for example, and not at all
// without it. SOAK_RATE is the number of requests a second.
func TestSoak(t *testing.T) { runSoak(t, onRedis, 2500) }

// TestSoakPostgres has PostgreSQL in the place of Redis. Every record is flushed
// to the disk, so it sends fewer requests.
func TestSoakPostgres(t *testing.T) { runSoak(t, onPostgres, 250) }

func runSoak(t *testing.T, kind string, rate uint64) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK=10m runs it for ten minutes")
	}
	s := startSoak(t, kind, length, float64(number(t, "SOAK_RATE", rate)), "")
	base := make(map[string]int)
	for _, server := range s.servers {
		base[server.name] = s.take(server).Goroutines
	}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var background sync.WaitGroup
	background.Go(func() { s.load.run(ctx, 64) })
	background.Go(func() { s.trouble(ctx) })
	s.watch(ctx)
	background.Wait()
	s.judgeGoroutines(base)
	wrong := s.judge()
	require.Empty(t, wrong[:min(len(wrong), 20)], "%d things are wrong, of which these are the first", len(wrong))
	for name, samples := range s.samples {
		s.judgeGrowth(name, samples)
	}
}

// TestSoakFindsBugs shows that a soak finds what it is there to find, in a few
// seconds and without any trouble, and nothing else.
func TestSoakFindsBugs(t *testing.T) {
	const length, rate = 4 * time.Second, 400
	for _, row := range []struct{ bug, want string }{
		{"", ""},
		{soakStoreDown, "no lasting answer"},
		{soakSpoils, "damaged answer"},
		{soakRunsTwice, "double effect"},
		{soakForgetsTimes, "no process of it was killed"},
	} {
		t.Run(cmp.Or(row.bug, "nothing planted"), func(t *testing.T) {
			s := startSoak(t, onRedis, length, rate, row.bug)
			if row.bug != "" {
				s.load.patience = time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), length)
			defer cancel()
			s.load.run(ctx, 16)
			wrong := strings.Join(s.judge(), "\n")
			if row.want == "" {
				require.Empty(t, wrong)
			}
			require.Contains(t, wrong, row.want)
		})
	}
}

func startSoak(t *testing.T, kind string, length time.Duration, rate float64, bug string) *soak {
	ttl := min(30*time.Second, max(8*time.Second, length/10))
	// A claim outlives its process for a TTL. After that even an at-most-once
	// key is free, so clients must have been told by then.
	lease := ttl / 4
	s := &soak{t: t, began: time.Now(), length: length, ledger: startSoakLedger(t, lease),
		database: startDatabase(t, kind), samples: make(map[string][]sample)}
	config := replicaConfig{Ledger: s.ledger.addr, TTL: ttl, Lease: lease, Wait: 3 * time.Second, Bug: bug, Soak: true}
	for n := range 2 {
		s.links = append(s.links, startLink(t, s.database.addr()))
		config.Name, config.Database, config.Store = fmt.Sprintf("%s-%d", kind, n), s.links[n].addr(), kind
		s.servers = append(s.servers, startServer(t, config))
	}
	config.Name, config.Store = "memory", inMemory
	s.servers = append(s.servers, startServer(t, config))
	s.load = &soakLoad{
		ledger: s.ledger, stores: [][]*server{s.servers[:2], s.servers[2:]}, ttl: ttl, rate: rate,
		http:    &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 256}},
		answers: make(map[string]int), patience: patience,
	}
	return s
}

// trouble cuts connections, kills or replaces the first process, kills it while
// its answers wait to be stored, and kills the database, now and then. The second
// process lives as long as the soak, so that what it keeps can be compared.
func (s *soak) trouble(ctx context.Context) {
	r := newRand(number(s.t, "HISTORY_SEED", 1), "soak")
	pause := min(5*time.Second, s.length/20)
	for n := 1; pauseFor(ctx, between(r, pause/2, pause*3/2)); n++ {
		switch n % 6 {
		case 0:
			down := time.Now()
			s.database.kill()
			pauseFor(ctx, 200*time.Millisecond)
			if !s.database.start() {
				s.t.Error("the database does not start again")
			}
			s.ledger.away(down, time.Now())
		case 2:
			if err := s.servers[0].deploy(); err != nil {
				s.t.Error(err)
			}
			s.deployed++
		case 3:
			s.kill(ctx, 200*time.Millisecond)
		case 4: // while answers wait to be stored
			s.links[0].set(linkHollow, 0)
			pauseFor(ctx, s.ledger.lease/2)
			s.kill(ctx, 0)
		default:
			s.links[r.IntN(2)].cut()
		}
	}
}

// kill kills the first process, and starts another one after a while. That one
// needs its link.
func (s *soak) kill(ctx context.Context, while time.Duration) {
	server := s.servers[0]
	process, _ := server.current()
	s.ledger.bury(process)
	server.kill()
	s.links[0].set(linkUp, 0)
	pauseFor(ctx, while)
	if err := server.start(); err != nil {
		s.t.Error(err)
	}
}

// watch reports every minute, or ten times if the soak is short.
func (s *soak) watch(ctx context.Context) {
	every := min(time.Minute, s.length/10)
	last, turned := int64(0), time.Now()
	for pauseFor(ctx, every-time.Since(s.began)%every) {
		var b strings.Builder
		sent := s.load.sent.Load()
		total, again, unkept, double := s.ledger.counts()
		s.load.mu.Lock()
		fmt.Fprintf(&b, "%v: %.0f requests/s, %v, %d wrong; %d effects, %d again after a kill, %d after an answer that was not stored, %d double\n",
			time.Since(s.began).Round(time.Second), float64(sent-last)/every.Seconds(), s.load.answers, len(s.load.wrong),
			total, again, unkept, len(double))
		s.load.mu.Unlock()
		last = sent
		for _, server := range s.servers {
			if sample := s.take(server); sample.alive {
				s.samples[server.name] = append(s.samples[server.name], sample)
				fmt.Fprintf(&b, "    %-10s heap %5.1f MiB, RSS %5.1f MiB, %4d goroutines, %d records\n", server.name,
					mib(sample.Heap), mib(sample.RSS), sample.Goroutines, sample.Records)
			}
		}
		if sample := s.takeDatabase(); sample.alive {
			s.samples["database"] = append(s.samples["database"], sample)
			fmt.Fprintf(&b, "    database uses %.1f MiB, %d records", mib(sample.Heap), sample.Records)
		}
		s.t.Log(b.String())
		if time.Since(turned) > 2*s.load.ttl {
			turned = time.Now()
			s.ledger.turn()
		}
	}
}

func mib(n uint64) float64 { return float64(n) / (1 << 20) }

// take asks a server for a sample. One that was just killed has none.
func (s *soak) take(server *server) (sample sample) {
	resp, err := s.load.http.Get(server.address() + "/stats")
	if err != nil {
		return sample
	}
	defer func() { _ = resp.Body.Close() }()
	sample.alive = json.NewDecoder(resp.Body).Decode(&sample) == nil
	sample.at = time.Since(s.began)
	return sample
}

// takeDatabase asks the database for a sample. One that was just killed has none.
func (s *soak) takeDatabase() (sample sample) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var err error
	sample.Heap, sample.Records, err = s.database.use(ctx)
	sample.alive, sample.at = err == nil, time.Since(s.began)
	return sample
}

// judgeGoroutines wants the load to leave none.
func (s *soak) judgeGoroutines(base map[string]int) {
	for _, server := range s.servers {
		require.Eventually(s.t, func() bool {
			s.load.http.CloseIdleConnections()
			sample := s.take(server)
			return sample.alive && sample.Goroutines <= base[server.name]+2
		}, patience, 100*time.Millisecond, "%s keeps goroutines", server.name)
	}
}

// judge returns what is wrong: what happened twice or was answered differently,
// and if too little happened for that to mean anything.
func (s *soak) judge() (wrong []string) {
	total, again, unkept, double := s.ledger.counts()
	s.load.mu.Lock()
	defer s.load.mu.Unlock()
	sent, answers := int(s.load.sent.Load()), s.load.answers
	s.t.Logf("%d requests, %v; %d effects, %d again after a kill, %d after an answer that was not stored, %d deployments",
		sent, answers, total, again, unkept, s.deployed)
	for _, what := range double {
		wrong = append(wrong, "double effect: "+what)
	}
	wrong = append(wrong, s.load.wrong...)
	usual := []string{
		"first", "replayed", "failed as asked", "unkeyed", "key_reused", "in_progress", "store_unavailable", unknown,
		"broken", "no process",
	}
	for what, n := range answers {
		if !slices.Contains(usual, what) {
			wrong = append(wrong, fmt.Sprintf("%d answers %s", n, what))
		}
	}
	atLeast := func(what string, n, percent int) {
		if n*100 < sent*percent || n == 0 {
			wrong = append(wrong, fmt.Sprintf("only %d %s in %d requests", n, what, sent))
		}
	}
	atLeast("effects", total, 15)
	atLeast("first answers", answers["first"], 15)
	atLeast("replays", answers["replayed"], 20)
	atLeast("answers that help a client", answers["first"]+answers["replayed"]+answers["failed as asked"]+
		answers["unkeyed"]+answers["key_reused"], 90)
	return wrong
}

// judgeGrowth compares the end with the first sample that was taken when
// records had expired for a while.
func (s *soak) judgeGrowth(name string, samples []sample) {
	const heapSlack, rssSlack = 2 << 20, 4 << 20 // of small ones
	last := samples[len(samples)-1]
	for _, early := range samples {
		if early.at < 4*s.load.ttl {
			continue
		}
		s.t.Logf("%s: heap %.1f and then %.1f MiB, RSS %.1f and then %.1f MiB", name,
			mib(early.Heap), mib(last.Heap), mib(early.RSS), mib(last.RSS))
		require.LessOrEqual(s.t, last.Heap, early.Heap*3/2+heapSlack, "the heap of %s grows", name)
		require.LessOrEqual(s.t, last.RSS, early.RSS*3/2+rssSlack, "the memory of %s grows", name)
		return
	}
	require.Fail(s.t, "too short to judge growth", name)
}
