package redis_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// processVariable holds the processConfig of a server process.
const processVariable = "IDEMPOTENCY_TEST_PROCESS"

// A processConfig says what a server process is like.
type processConfig struct {
	Redis, Username, Password string
	Ledger                    string // the Redis of its handlers
	Lease                     time.Duration
}

// A processEffect is a line of the ledger.
type processEffect struct {
	Key          string
	Attempt, PID int
	At           time.Time
}

// TestServerProcess is no test but the program of the server processes that the
// tests below start: this very binary. It serves until its standard input ends,
// which it does at the latest when the test that started it is gone.
func TestServerProcess(t *testing.T) {
	text := os.Getenv(processVariable)
	if text == "" {
		return
	}
	var config processConfig
	idemtest.Must(json.Unmarshal([]byte(text), &config))
	store := idempotency.NewRedisStore(connect(t, redis.UniversalOptions{
		Addrs: []string{config.Redis}, Username: config.Username, Password: config.Password}), nil)
	ledger := connect(t, redis.UniversalOptions{Addrs: []string{config.Ledger}, PoolSize: 500})
	mux := http.NewServeMux()
	for _, path := range []string{"/often", "/once", "/commit"} {
		opts := &idempotency.Options{Lease: config.Lease, Wait: idemtest.Patience, AtMostOnce: path == "/once"}
		mux.Handle(path, idempotency.Middleware(store, opts)(processHandler(ledger)))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	idemtest.Must(err)
	fmt.Printf("serving on %s\n", listener.Addr())
	go func() { idemtest.Must(http.Serve(listener, mux)) }()
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// processHandler writes a line into the ledger and works: for as long as the
// header Work says, or until the gate of this attempt is opened. Its answer is
// never the same twice.
func processHandler(ledger redis.UniversalClient) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e, _ := idempotency.FromContext(r.Context())
		if r.URL.Path == "/commit" {
			idemtest.Must(e.Commit(r.Context()))
		}
		ctx := context.WithoutCancel(r.Context()) // what is begun is ended, whoever has the lease
		line, err := json.Marshal(processEffect{e.Key(), e.Attempt(), os.Getpid(), time.Now()})
		idemtest.Must(err)
		n, err := ledger.RPush(ctx, "effects", line).Result()
		idemtest.Must(err)
		if work := r.Header.Get("Work"); work == "gated" {
			idemtest.Must(ledger.BLPop(ctx, 0, gateOf(e.Key(), e.Attempt())).Err())
		} else if d, err := time.ParseDuration(work); err == nil {
			<-time.After(d)
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "%s, attempt %d, effect %d in process %d", e.Key(), e.Attempt(), n, os.Getpid())
	})
}

func gateOf(key string, attempt int) string { return fmt.Sprintf("gate %s %d", key, attempt) }

// A serverProcess is one process of a fleet.
type serverProcess struct {
	cmd    *exec.Cmd
	url    string
	stderr strings.Builder
}

func (p *serverProcess) pid() int { return p.cmd.Process.Pid }

// kill ends the process, even one that is stopped, without a chance to finish
// anything.
func (p *serverProcess) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// A fleet is processes of one service on one Redis.
type fleet struct {
	t         *testing.T
	config    processConfig
	redis     *idemtest.RedisServer
	ledger    redis.UniversalClient
	browser   browser
	processes []*serverProcess
}

// startFleet starts n processes. change may change their configuration. On a
// machine that is busy, processes that live must not lose their leases, and
// duplicates must not stop waiting before the handlers are let go on.
func startFleet(t *testing.T, n int, change func(*fleet)) *fleet {
	f := &fleet{t: t, redis: idemtest.StartRedis(t), browser: newBrowser(t)}
	ledger := idemtest.StartRedis(t)
	f.ledger = connectTo(t, ledger)
	f.config = processConfig{Redis: f.redis.Addr, Ledger: ledger.Addr, Lease: 4 * time.Second}
	if change != nil {
		change(f)
	}
	for range n {
		f.processes = append(f.processes, f.start())
	}
	return f
}

func (f *fleet) start() *serverProcess {
	config, err := json.Marshal(f.config)
	require.NoError(f.t, err)
	binary, err := os.Executable()
	require.NoError(f.t, err)
	p := &serverProcess{cmd: exec.Command(binary, "-test.run=^TestServerProcess$")}
	p.cmd.Env = append(os.Environ(), processVariable+"="+string(config))
	p.cmd.Stderr = &p.stderr
	_, err = p.cmd.StdinPipe() // ends with us
	require.NoError(f.t, err)
	stdout, err := p.cmd.StdoutPipe()
	require.NoError(f.t, err)
	require.NoError(f.t, p.cmd.Start())
	f.t.Cleanup(func() {
		p.kill()
		if f.t.Failed() {
			f.t.Logf("process %d: %s", p.pid(), p.stderr.String())
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(f.t, err, "the process does not serve")
	p.url = "http://" + strings.TrimPrefix(strings.TrimSpace(line), "serving on ")
	return p
}

// effects returns the ledger, by key.
func (f *fleet) effects() map[string][]processEffect {
	effects := make(map[string][]processEffect)
	for _, line := range f.ledger.LRange(context.Background(), "effects", 0, -1).Val() {
		var e processEffect
		idemtest.Must(json.Unmarshal([]byte(line), &e))
		effects[e.Key] = append(effects[e.Key], e)
	}
	return effects
}

// open lets the gated handler of an attempt go on.
func (f *fleet) open(key string, attempt int) {
	require.NoError(f.t, f.ledger.RPush(f.t.Context(), gateOf(key, attempt), "").Err())
}

// A crowdOf is requests that are on their way: those of each key, by process.
type crowdOf struct {
	asking  sync.WaitGroup
	mu      sync.Mutex // guards what follows
	sent    map[string]time.Time
	answers map[string]map[*serverProcess]string
}

func newCrowd() *crowdOf {
	return &crowdOf{sent: make(map[string]time.Time), answers: make(map[string]map[*serverProcess]string)}
}

// send sends a gated request with the key to p. The path is what the key
// begins with.
func (f *fleet) send(c *crowdOf, key string, p *serverProcess) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answers[key] == nil {
		c.sent[key], c.answers[key] = time.Now(), make(map[*serverProcess]string)
	}
	c.asking.Go(func() {
		answer := f.ask(p, key, "gated")
		c.mu.Lock()
		defer c.mu.Unlock()
		c.answers[key][p] = answer
	})
}

func (f *fleet) ask(p *serverProcess, key, work string) string {
	path, _, _ := strings.Cut(key, "/")
	return strings.TrimPrefix(f.browser.ask(p.url+"/"+path, key, "Work", work), "replay ")
}

// Three processes are killed in turn, each in the middle of handlers, while the
// same keys are sent to all of them at once.
func TestRedisProcessesAreKilled(t *testing.T) {
	f := startFleet(t, 3, nil)
	for round := range 3 {
		victim := f.processes[round]
		f.killAmong(fmt.Sprintf("round-%d", round), victim)
		f.processes[round] = f.start()
	}
}

func (f *fleet) killAmong(round string, victim *serverProcess) {
	const each = 4
	t, c := f.t, newCrowd()
	keys := func(name string) (list []string) {
		for _, path := range []string{"often", "once", "commit"} {
			for n := range each {
				list = append(list, fmt.Sprintf("%s/%s/%s/%d", path, round, name, n))
			}
		}
		return list
	}
	// Of some keys the victim has the handlers for certain. Of the others
	// anybody may have them.
	doomed := keys("doomed")
	for _, key := range doomed {
		f.send(c, key, victim)
	}
	idemtest.Await(t, "the victim to be inside", func() bool { return len(f.insideOf(round, victim)) == len(doomed) })
	for _, key := range append(keys("open"), doomed...) {
		for _, p := range f.processes {
			if p != victim || !slices.Contains(doomed, key) {
				f.send(c, key, p)
			}
		}
	}
	idemtest.Await(t, "all to be inside", func() bool { return len(f.insideOf(round, f.processes...)) == len(c.sent) })

	lost := f.insideOf(round, victim)
	victim.kill()
	idemtest.Await(t, "the take-over", func() bool {
		effects := f.effects()
		return !slices.ContainsFunc(lost, func(key string) bool { return strings.HasPrefix(key, "often") && len(effects[key]) < 2 })
	})
	for key := range c.sent {
		f.open(key, 1)
		f.open(key, 2)
	}
	c.asking.Wait()
	f.judge(c, lost, victim)
}

// insideOf returns the keys of the round whose first handler is in one of the
// processes.
func (f *fleet) insideOf(round string, processes ...*serverProcess) (keys []string) {
	for key, effects := range f.effects() {
		for _, p := range processes {
			if strings.Contains(key, round) && effects[0].PID == p.pid() {
				keys = append(keys, key)
			}
		}
	}
	return keys
}

// judge checks all keys of a crowd after a process was killed in the handlers
// of those that are lost.
func (f *fleet) judge(c *crowdOf, lost []string, victim *serverProcess) {
	t, effects := f.t, f.effects()
	for key, sent := range c.sent {
		of, want := effects[key], 1
		unknown := slices.Contains(lost, key) && !strings.HasPrefix(key, "often")
		if slices.Contains(lost, key) && !unknown {
			want = 2
		}
		require.Len(t, of, want, key)
		for n, e := range of {
			require.Equal(t, n+1, e.Attempt, key)
		}
		answers := make(map[string]int)
		for p, answer := range c.answers[key] {
			if p == victim {
				require.Contains(t, answer, "broken: ", key)
				continue
			}
			answers[answer]++
			answers[f.ask(p, key, "")]++ // a retry
		}
		require.Len(t, answers, 1, "%s: the same answer everywhere, %v", key, answers)
		for answer := range answers {
			if unknown {
				require.Equal(t, "409 outcome_unknown", answer, key)
				continue
			}
			last := of[want-1]
			require.True(t, strings.HasPrefix(answer, fmt.Sprintf("201 %s, attempt %d, effect ", key, want)), answer)
			require.True(t, strings.HasSuffix(answer, fmt.Sprintf(" in process %d", last.PID)), answer)
		}
		if want == 2 {
			require.NotEqual(t, victim.pid(), of[1].PID, key)
			require.GreaterOrEqual(t, of[1].At.Sub(sent), f.config.Lease, "%s was taken over early", key)
		}
	}
	require.Len(t, f.effects(), len(effects), "retries run nothing")
}

// A process that is stopped for longer than its lease loses the key to another.
// Its late answer is dropped, whether the other still runs or has answered. A
// key that runs at most once is not taken over: there the late answer stands.
func TestRedisProcessIsStopped(t *testing.T) {
	f, c := startFleet(t, 2, nil), newCrowd()
	stopped, other := f.processes[0], f.processes[1]
	answered := func(key string, p *serverProcess) {
		idemtest.Await(t, "an answer", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.answers[key][p] != ""
		})
	}
	keys := []string{"once", "often/answered", "often/running"}
	for _, key := range keys {
		f.send(c, key, stopped)
	}
	idemtest.Await(t, "all to be inside", func() bool { return len(f.insideOf("", stopped)) == len(keys) })
	require.NoError(t, idemtest.Stop(stopped.cmd.Process))
	require.Equal(t, "409 outcome_unknown", f.ask(other, "once", ""))
	for _, key := range keys[1:] {
		f.send(c, key, other)
		idemtest.Await(t, "the take-over", func() bool { return len(f.effects()[key]) == 2 })
	}
	f.open("often/answered", 2)
	answered("often/answered", other)

	require.NoError(t, idemtest.Continue(stopped.cmd.Process))
	for _, key := range keys {
		f.open(key, 1)
		answered(key, stopped)
	}
	f.open("often/running", 2)
	c.asking.Wait()
	require.Contains(t, c.answers["once"][stopped], "201 once, attempt 1")
	for _, key := range keys[1:] {
		require.Equal(t, "409 in_progress", c.answers[key][stopped], key)
		require.Contains(t, c.answers[key][other], "201 "+key+", attempt 2")
	}
	for _, p := range f.processes {
		require.Equal(t, c.answers["once"][stopped], f.ask(p, "once", ""))
		for _, key := range keys[1:] {
			require.Equal(t, c.answers[key][other], f.ask(p, key, ""))
		}
	}
	effects := f.effects()
	require.Equal(t, []int{1, 2, 2}, []int{len(effects["once"]), len(effects[keys[1]]), len(effects[keys[2]])})
}

func TestRedisDuplicatesAcrossProcesses(t *testing.T) {
	const requests, handling = 200, 50 * time.Millisecond
	rows := map[string]struct {
		change func(*fleet)
		limit  int64 // of commands
	}{
		"Pub-Sub": {func(*fleet) {}, 2*requests + 10},
		"no permission": {func(f *fleet) {
			admin := connectTo(f.t, f.redis)
			require.NoError(f.t, admin.Do(f.t.Context(), "acl", "setuser", "app", "on", ">secret", "~*", "resetchannels", "+@all").Err())
			f.config.Username, f.config.Password = "app", "secret"
		}, 10 * requests},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			f := startFleet(t, 2, func(f *fleet) {
				f.config.Lease = time.Minute // who is not told, and does not poll, gets no answer
				row.change(f)
			})
			f.crowd(requests, "often/warm-up", handling.String()) // connections and scripts are there from now on
			admin := connectTo(t, f.redis)
			idemtest.Await(t, "nobody watches", func() bool { return len(admin.PubSubChannels(context.Background(), "*").Val()) == 0 })
			require.NoError(t, admin.ConfigResetStat(t.Context()).Err())

			start := time.Now()
			answers := f.crowd(requests, "often/key", handling.String())
			last := time.Since(start)
			commands, calls := idemtest.CommandsSent(t, admin)
			t.Logf("%d commands, last answer after %v; %v", commands, last, calls)
			require.Len(t, answers, 1, "%v", answers)
			for answer, n := range answers {
				require.Contains(t, answer, "201 often/key, attempt 1, effect ")
				require.Equal(t, requests, n)
			}
			require.Len(t, f.effects()["often/key"], 1)
			require.LessOrEqual(t, commands, row.limit)
			require.GreaterOrEqual(t, last, handling)
		})
	}
}

// crowd sends n requests with one key, all at once and to the processes in
// turn. It returns how often each answer came.
func (f *fleet) crowd(n int, key, work string) map[string]int {
	answers := make(chan string, n)
	for i := range n {
		go func() { answers <- f.ask(f.processes[i%len(f.processes)], key, work) }()
	}
	count := make(map[string]int)
	for range n {
		count[<-answers]++
	}
	return count
}
