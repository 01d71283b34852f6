package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A soak is two processes on a Redis and one with a MemoryStore, under load.
type soak struct {
	t       *testing.T
	began   time.Time
	length  time.Duration
	ledger  *soakLedger
	redis   *redisServer
	links   []*link
	servers []*server
	load    *soakLoad
	samples map[string][]sample
}

// TestSoak runs for as long as SOAK says, 10m for example, and not at all
// without it. SOAK_RATE is the number of requests a second.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK=10m runs it for ten minutes")
	}
	s := startSoak(t, length, float64(number(t, "SOAK_RATE", 2500)))
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
	s.judge(base)
}

func startSoak(t *testing.T, length time.Duration, rate float64) *soak {
	s := &soak{t: t, began: time.Now(), length: length, ledger: startSoakLedger(t), redis: startRedis(t),
		samples: make(map[string][]sample)}
	ttl := min(30*time.Second, max(4*time.Second, length/10))
	// A claim outlives its process for a TTL. After that even an at-most-once
	// key is free, so clients must have been told by then.
	config := replicaConfig{Ledger: s.ledger.addr, TTL: ttl, Lease: ttl / 4, Wait: 3 * time.Second}
	for n := range 2 {
		s.links = append(s.links, startLink(t, s.redis.addr))
		config.Name, config.Redis, config.Soak = fmt.Sprintf("redis-%d", n), s.links[n].addr(), soakRedis
		s.servers = append(s.servers, startServer(t, config))
	}
	config.Name, config.Soak = "memory", soakMemory
	s.servers = append(s.servers, startServer(t, config))
	s.load = &soakLoad{
		ledger: s.ledger, stores: [][]*server{s.servers[:2], s.servers[2:]}, ttl: ttl, rate: rate,
		http:    &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 256}},
		answers: make(map[string]int),
	}
	return s
}

// trouble cuts connections, kills the first process, and kills Redis, now and
// then. The second process lives as long as the soak, so that what it keeps can
// be compared.
func (s *soak) trouble(ctx context.Context) {
	r := newRand(number(s.t, "HISTORY_SEED", 1), "soak")
	pause := min(5*time.Second, s.length/20)
	for n := 1; pauseFor(ctx, between(r, pause/2, pause*3/2)); n++ {
		switch {
		case n%6 == 0:
			s.redis.kill()
			pauseFor(ctx, 200*time.Millisecond)
			if !s.redis.start() {
				s.t.Error("redis-server does not start again")
			}
		case n%3 == 0:
			server := s.servers[0]
			s.ledger.bury(server.config.Name)
			server.kill()
			pauseFor(ctx, 200*time.Millisecond)
			if err := server.start(); err != nil {
				s.t.Error(err)
			}
		default:
			s.links[r.IntN(2)].cut()
		}
	}
}

// watch reports every minute, or ten times if the soak is short.
func (s *soak) watch(ctx context.Context) {
	every := min(time.Minute, s.length/10)
	last, turned := int64(0), time.Now()
	for pauseFor(ctx, every-time.Since(s.began)%every) {
		var b strings.Builder
		sent := s.load.sent.Load()
		total, again, double := s.ledger.counts()
		s.load.mu.Lock()
		fmt.Fprintf(&b, "%v: %.0f requests/s, %v, %d wrong; %d effects, %d again after a kill, %d double\n",
			time.Since(s.began).Round(time.Second), float64(sent-last)/every.Seconds(), s.load.answers, len(s.load.wrong),
			total, again, len(double))
		s.load.mu.Unlock()
		last = sent
		for _, server := range s.servers {
			if sample := s.take(server); sample.alive {
				s.samples[server.name] = append(s.samples[server.name], sample)
				fmt.Fprintf(&b, "    %-8s heap %5.1f MiB, RSS %5.1f MiB, %4d goroutines, %d records\n", server.name,
					mib(sample.Heap), mib(sample.RSS), sample.Goroutines, sample.Records)
			}
		}
		if sample := s.takeRedis(); sample.alive {
			s.samples["redis"] = append(s.samples["redis"], sample)
			fmt.Fprintf(&b, "    %-8s uses %.1f MiB, %d records", "redis", mib(sample.Heap), sample.Records)
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

func (s *soak) takeRedis() (sample sample) {
	client := redis.NewClient(&redis.Options{Addr: s.redis.addr, ContextTimeoutEnabled: true})
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	info, err := client.InfoMap(ctx, "memory").Result()
	if err != nil {
		return sample
	}
	_, err = fmt.Sscan(info["Memory"]["used_memory"], &sample.Heap)
	sample.Records = int(client.DBSize(ctx).Val())
	sample.alive, sample.at = err == nil, time.Since(s.began)
	return sample
}

// judge wants nothing done twice, and nothing grown since all was warm.
func (s *soak) judge(base map[string]int) {
	s.load.http.CloseIdleConnections()
	for _, server := range s.servers {
		require.Eventually(s.t, func() bool {
			s.load.http.CloseIdleConnections()
			sample := s.take(server)
			return sample.alive && sample.Goroutines <= base[server.name]+2
		}, patience, 100*time.Millisecond, "%s keeps goroutines", server.name)
	}
	total, again, double := s.ledger.counts()
	s.t.Logf("%d requests, %v; %d effects, %d again after a kill", s.load.sent.Load(), s.load.answers, total, again)
	require.Empty(s.t, double, "double effects")
	require.Empty(s.t, s.load.wrong)
	for _, what := range []string{"record_unreadable", "response_not_stored", "key_invalid"} {
		require.Zero(s.t, s.load.answers[what], what)
	}
	for name, samples := range s.samples {
		s.judgeGrowth(name, samples)
	}
}

// judgeGrowth compares the end with the first sample that was taken when
// records had expired for a while.
func (s *soak) judgeGrowth(name string, samples []sample) {
	const slack = 8 << 20 // of a small heap
	last := samples[len(samples)-1]
	for _, early := range samples {
		if early.at < 4*s.load.ttl {
			continue
		}
		s.t.Logf("%s: heap %.1f and then %.1f MiB, RSS %.1f and then %.1f MiB", name,
			mib(early.Heap), mib(last.Heap), mib(early.RSS), mib(last.RSS))
		require.LessOrEqual(s.t, last.Heap, early.Heap*3/2+slack, "the heap of %s grows", name)
		require.LessOrEqual(s.t, last.RSS, early.RSS*3/2+4*slack, "the memory of %s grows", name)
		return
	}
	require.Fail(s.t, "too short to judge growth", name)
}
