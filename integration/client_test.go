package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A workload says what clients do.
type workload struct {
	clients int
	groups  int                               // of clients; each has keys of its own
	ahead   int                               // how many keys are in use at once
	limit   int                               // of keys; 0: none
	kinds   []string                          // of keys, in turn
	variant int                               // every how manieth request has another payload; 0: none
	hangUp  int                               // every how manieth request is given up early; 0: none
	pause   time.Duration                     // between two tries, at most
	plan    func(lease time.Duration) planner // nil: that of the seed
}

var mixedLoad = workload{
	clients: 16, groups: 4, ahead: 4, kinds: []string{history.Plain, history.Once, history.Large, history.Commit},
	variant: 12, hangUp: 12, pause: 40 * time.Millisecond,
}

// requestLoad is about what a request is: how its key and its body come.
var requestLoad = workload{
	clients: 16, groups: 4, ahead: 4, kinds: []string{
		history.Form, history.Event, history.Tenant, history.Head, history.Broken, history.Open,
	},
	variant: 8, hangUp: 12, pause: 40 * time.Millisecond,
}

// expiringLoad has few keys, which come again when their TTL is over.
var expiringLoad = workload{
	clients: 16, groups: 4, ahead: 4, limit: 12, kinds: mixedLoad.kinds,
	variant: 12, hangUp: 12, pause: 40 * time.Millisecond,
}

// databaseLoad is about a database that handlers share with the store.
var databaseLoad = workload{
	clients: 16, groups: 4, ahead: 4,
	kinds:   []string{history.Begin, history.Plain, history.Begin, history.Once, history.Begin, history.Attach},
	variant: 12, hangUp: 12, pause: 40 * time.Millisecond,
}

// patienceOfClient is how long a client waits that does not hang up early.
const patienceOfClient = time.Second

// A crowd is the clients, and what they saw.
type crowd struct {
	fleet *fleet
	seed  uint64
	load  workload
	http  *http.Client

	mu  sync.Mutex // guards what follows
	ops []history.Op
}

func newCrowd(f *fleet, seed uint64, load workload) *crowd {
	return &crowd{fleet: f, seed: seed, load: load, http: &http.Client{
		Transport: &http.Transport{MaxIdleConnsPerHost: 100},
	}}
}

// keyOf returns the nth key of a group.
func (c *crowd) keyOf(group, n int) (key, kind string) {
	if c.load.limit > 0 {
		n %= c.load.limit
	}
	kind = c.load.kinds[n%len(c.load.kinds)]
	if kind == history.Tenant { // groups share keys
		return fmt.Sprintf("tenant-%c/key-%d", 'a'+group, n), kind
	}
	return fmt.Sprintf("%s-%c%d", kind, 'a'+group, n), kind
}

// run has all clients work until ctx ends. All of a group go through the same
// keys, at about the same time.
func (c *crowd) run(ctx context.Context) {
	var clients sync.WaitGroup
	for n := range c.load.clients {
		clients.Go(func() {
			name := fmt.Sprintf("client-%d", n)
			for job := 0; ctx.Err() == nil; job++ {
				c.work(ctx, fmt.Sprintf("%s/%d", name, job), n%c.load.groups, job)
			}
		})
	}
	clients.Wait()
}

// work is one operation, with its retries until there is an answer that says
// more than to come again.
func (c *crowd) work(ctx context.Context, name string, group, job int) {
	const tries = 8
	r := newRand(c.seed, name)
	key, kind := c.keyOf(group, job+r.IntN(c.load.ahead))
	payload := "payload"
	if c.load.variant > 0 && r.IntN(c.load.variant) == 0 {
		payload = "another payload"
	}
	for try := range tries {
		timeout := patienceOfClient
		if c.load.hangUp > 0 && r.IntN(c.load.hangUp) == 0 {
			timeout = between(r, time.Millisecond, 80*time.Millisecond)
		}
		replica, pause := r.IntN(len(c.fleet.servers)), between(r, 0, c.load.pause)
		op, asked := c.ask(history.Op{
			ID: fmt.Sprintf("%s/%d", name, try), Key: key, Kind: kind, Payload: payload,
		}, c.fleet.servers[replica], timeout, kind == history.Broken && r.IntN(4) == 0)
		enough := asked && op.Err == "" && op.Code != "in_progress" && op.Code != "store_unavailable" &&
			op.Status != http.StatusUnauthorized && (op.Status < 500 || op.Replayed)
		if enough || !pauseFor(ctx, pause) {
			return
		}
	}
}

// ask sends a request. It does not when there is no process to send it to.
func (c *crowd) ask(op history.Op, s *server, timeout time.Duration, breaks bool) (_ history.Op, asked bool) {
	address := s.address()
	if address == "" {
		return op, false
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	req := newRequest(address, op, breaks).WithContext(ctx)
	req.Header.Set(opHeader, op.ID)
	req.Header.Set(keyHeader, op.Key)
	op.Replica, op.Start = s.name, since(c.fleet.epoch)
	c.receive(req, &op)
	op.End = since(c.fleet.epoch)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ops = append(c.ops, op)
	return op, true
}

func (c *crowd) receive(req *http.Request, op *history.Op) {
	resp, err := c.http.Do(req)
	var body []byte
	if err == nil {
		defer func() { _ = resp.Body.Close() }()
		body, err = io.ReadAll(resp.Body)
	}
	if err != nil {
		op.Err, op.HungUp = err.Error(), req.Context().Err() != nil
		return
	}
	op.Status = resp.StatusCode
	op.Replayed = resp.Header.Get("Idempotent-Replayed") == "true"
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		var problem struct{ Code string }
		must(json.Unmarshal(body, &problem))
		op.Code = problem.Code
		return
	}
	op.Run, op.Hash = resp.Header.Get(runHeader), hashOf(string(body))
}

// patienceOfSweep is how long all keys may take. A machine that is busy with
// other things for a while is no violation.
const patienceOfSweep = 2 * time.Minute

// sweep asks every process for every key, when all faults are over, until it
// gives an answer that lasts, or the limit for a key is over. When it has taken
// long, the other keys are asked for once.
func (c *crowd) sweep(limit time.Duration, noneDied bool) {
	keys, began := make(chan history.Op), time.Now()
	var sweepers sync.WaitGroup
	for range c.load.clients {
		sweepers.Go(func() {
			for op := range keys {
				for _, s := range c.fleet.servers {
					c.settle(op, s, min(limit, patienceOfSweep-time.Since(began)), noneDied)
				}
			}
		})
	}
	seen := make(map[string]bool)
	for _, op := range c.all() {
		if !seen[op.Key] {
			seen[op.Key] = true
			keys <- history.Op{ID: "sweep/" + op.Key, Key: op.Key, Kind: op.Kind, Payload: "payload", Sweep: true}
		}
	}
	close(keys)
	sweepers.Wait()
}

func (c *crowd) settle(op history.Op, s *server, limit time.Duration, noneDied bool) {
	id, pause := op.ID, c.fleet.lease/10
	for try, began := 0, time.Now(); try == 0 || time.Since(began) < limit; try++ {
		op.ID = fmt.Sprintf("%s/%s/%d", id, s.name, try)
		if got, _ := c.ask(op, s, patienceOfClient, false); got.Lasting(noneDied) {
			return
		}
		pauseFor(context.Background(), pause)
		// Each try may leave work to a store that has too much. But the next one has
		// to come while the record is there.
		pause = min(2*pause, time.Second, c.fleet.ttl/4)
	}
}

func (c *crowd) all() []history.Op {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.ops)
}
