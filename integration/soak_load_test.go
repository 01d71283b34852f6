package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A soakLoad is the clients of a soak.
type soakLoad struct {
	ledger *soakLedger
	http   *http.Client
	stores [][]*server // which serve the same keys
	ttl    time.Duration
	rate   float64 // requests a second
	began  time.Time
	sent   atomic.Int64
	keys   atomic.Int64

	mu      sync.Mutex // guards what follows
	answers map[string]int
	wrong   []string // what must not be
	old     []soakKey
}

// A soakKey is one whose answer is known.
type soakKey struct {
	key, kind, run string
	at             time.Time
	servers        []*server
}

// A soakReply is an answer, or why there is none.
type soakReply struct {
	what string // for counting
	run  string // of an answer of the handler's
}

// run works until ctx ends.
func (l *soakLoad) run(ctx context.Context, workers int) {
	l.began = time.Now()
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for ctx.Err() == nil {
				l.work(ctx)
			}
		})
	}
	all.Wait()
}

// pace keeps to the rate.
func (l *soakLoad) pace(ctx context.Context) {
	due := time.Duration(float64(l.sent.Add(1)) / l.rate * float64(time.Second))
	if wait := due - time.Since(l.began); wait > 0 {
		pauseFor(ctx, wait)
	}
}

// work is one operation of a client.
func (l *soakLoad) work(ctx context.Context) {
	servers := l.stores[0]
	if rand.IntN(3) == 0 {
		servers = l.stores[1]
	}
	k := soakKey{kind: history.Plain, servers: servers}
	if rand.IntN(2) == 0 {
		k.kind = history.Once
	}
	k.key = fmt.Sprintf("%s-%d", k.kind, l.keys.Add(1))
	switch n := rand.IntN(100); {
	case n < 15:
		l.ask(ctx, soakKey{kind: k.kind, servers: servers}, "payload", false)
	case n < 35:
		l.replayOld(ctx)
	case n < 50:
		var crowd sync.WaitGroup
		runs := make([]string, 4)
		for i := range runs {
			crowd.Go(func() { runs[i] = l.insist(ctx, k, false) })
		}
		crowd.Wait()
		for _, run := range runs {
			l.same(k, runs[0], run)
		}
	default:
		if k.run = l.insist(ctx, k, n < 52); k.run == "" {
			return
		}
		k.at = time.Now()
		l.same(k, k.run, l.insist(ctx, k, false))
		if n < 65 {
			if reply := l.ask(ctx, k, "another payload", false); reply.run != "" {
				l.blame("%s: another payload got the answer of %s", k.key, reply.run)
			}
		}
		l.keep(k)
	}
}

// same wants two answers under a key to be one, as far as they are known. The
// answer of a process that was killed may not have been kept.
func (l *soakLoad) same(k soakKey, first, second string) {
	if first != "" && second != "" && first != second && !l.ledger.isDead(processOf(first)) {
		l.blame("%s: answers of %s and %s", k.key, first, second)
	}
}

func (l *soakLoad) blame(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
}

const soakMemoryOfKeys = 5000

func (l *soakLoad) keep(k soakKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.old) < soakMemoryOfKeys {
		l.old = append(l.old, k)
	} else {
		l.old[rand.IntN(len(l.old))] = k
	}
}

// replayOld repeats a request whose record is not about to expire.
func (l *soakLoad) replayOld(ctx context.Context) {
	l.mu.Lock()
	var k soakKey
	if len(l.old) > 0 {
		k = l.old[rand.IntN(len(l.old))]
	}
	l.mu.Unlock()
	if k.key != "" && time.Since(k.at) < l.ttl/2 {
		l.same(k, k.run, l.insist(ctx, k, false))
	}
}

// insist asks until there is an answer that lasts, and returns the run that
// made it.
func (l *soakLoad) insist(ctx context.Context, k soakKey, fail bool) string {
	for try := 0; try < 100 && ctx.Err() == nil; try++ {
		reply := l.ask(ctx, k, "payload", fail)
		if reply.run != "" || reply.what == "outcome_unknown" {
			return reply.run
		}
		pauseFor(ctx, time.Duration(rand.Int64N(int64(100*time.Millisecond))))
	}
	return ""
}

func (l *soakLoad) ask(ctx context.Context, k soakKey, payload string, fail bool) soakReply {
	l.pace(ctx)
	reply := l.send(k, payload, fail)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[reply.what]++
	return reply
}

func (l *soakLoad) send(k soakKey, payload string, fail bool) soakReply {
	address := k.servers[rand.IntN(len(k.servers))].address()
	if address == "" {
		return soakReply{what: "no process"}
	}
	req, err := http.NewRequest(http.MethodPost, address+"/"+k.kind, strings.NewReader(payload))
	must(err)
	if k.key != "" {
		req.Header.Set("Idempotency-Key", k.key)
	}
	if fail {
		req.Header.Set(failHeader, "yes")
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return soakReply{what: "broken"}
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return soakReply{what: "broken"}
	}
	if resp.Header.Get("Content-Type") == "application/problem+json" {
		var problem struct{ Code string }
		must(json.Unmarshal(body, &problem))
		return soakReply{what: problem.Code}
	}
	reply := soakReply{what: "first", run: resp.Header.Get(runHeader)}
	switch {
	case k.key == "":
		return soakReply{what: "unkeyed"}
	case resp.StatusCode == http.StatusInternalServerError:
		reply.what = "failed as asked"
		if k.kind == history.Once {
			reply.run = "failed-" // this is its answer
		}
	case resp.Header.Get("Idempotent-Replayed") != "":
		reply.what = "replayed"
	}
	return reply
}
