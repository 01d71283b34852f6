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
	paced  atomic.Int64 // requests that were due
	sent   atomic.Int64 // and had a process to be sent to
	keys   atomic.Int64

	patience time.Duration // with a key that has no lasting answer

	mu      sync.Mutex // guards what follows
	answers map[string]int
	wrong   []string // what must not be
	old     []soakKey
}

// A soakKey is one that requests are sent under.
type soakKey struct {
	key, kind string
	servers   []*server
	asked     *sync.Map // processes that gave no lasting answer

	first soakReply // once it is known
	at    time.Time
}

// A soakReply is an answer, or why there is none.
type soakReply struct {
	what    string // for counting
	run     string // of an answer of the handler's
	lasting string // what all other lasting answers have to be; "" if it is none
}

// unknown is the lasting answer when nobody knows what became of a run.
const unknown = "outcome_unknown"

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
	due := time.Duration(float64(l.paced.Add(1)) / l.rate * float64(time.Second))
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
	k := soakKey{kind: history.Plain, servers: servers, asked: new(sync.Map)}
	if rand.IntN(2) == 0 {
		k.kind = history.Once
	}
	n := rand.IntN(100)
	if n < 15 {
		l.ask(ctx, k, "payload", false)
		return
	}
	if n < 35 {
		l.replayOld(ctx)
		return
	}
	k.key = fmt.Sprintf("%s-%d", k.kind, l.keys.Add(1))
	if n < 50 {
		l.storm(ctx, k)
		return
	}
	k.first = l.insist(ctx, k, n < 52)
	k.at = time.Now()
	l.same(k, l.insist(ctx, k, false))
	if k.first.lasting == "" || k.first.lasting == unknown {
		return
	}
	if n < 65 {
		if reply := l.ask(ctx, k, "another payload", false); reply.run != "" {
			l.blame("%s: another payload got the answer of %s", k.key, reply.run)
		}
	}
	l.keep(k)
}

// storm sends four requests at a time.
func (l *soakLoad) storm(ctx context.Context, k soakKey) {
	var crowd sync.WaitGroup
	replies := make([]soakReply, 4)
	for i := range replies {
		crowd.Go(func() { replies[i] = l.insist(ctx, k, false) })
	}
	crowd.Wait()
	k.first = replies[0]
	for _, reply := range replies {
		l.same(k, reply)
	}
}

// same wants two lasting answers under a key to be one. An answer that goes out
// was stored before, unless the service has said otherwise. So the death of its
// process alone is no excuse.
func (l *soakLoad) same(k soakKey, second soakReply) {
	known := k.first.lasting != "" && second.lasting != ""
	becomesKnown := (k.first.lasting == unknown || second.lasting == unknown) && l.ledger.wasUnstored(k.key)
	if known && k.first.lasting != second.lasting && !becomesKnown && !l.ledger.mayBeLost(k.key) {
		l.blame("%s: answers %s, and then %s", k.key, k.first.lasting, second.lasting)
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
		l.same(k, l.insist(ctx, k, false))
	}
}

// insist asks until there is an answer that lasts, also when the soak is over
// meanwhile: all faults are healed then.
func (l *soakLoad) insist(ctx context.Context, k soakKey, fail bool) soakReply {
	ctx = context.WithoutCancel(ctx)
	seen := make(map[string]int)
	for began := time.Now(); time.Since(began) < l.patience; {
		reply := l.ask(ctx, k, "payload", fail)
		if reply.lasting == unknown && !l.mayBeUnknown(k) {
			l.blame("%s: outcome_unknown, and no process of it was killed", k.key)
		}
		if reply.lasting != "" {
			return reply
		}
		seen[reply.what]++
		pauseFor(ctx, time.Duration(rand.Int64N(int64(100*time.Millisecond))))
	}
	l.blame("%s: no lasting answer within %v, but %v", k.key, l.patience, seen)
	return soakReply{}
}

// mayBeUnknown reports whether an at-most-once key may have lost its process: the
// one that had its effect, or one that may have claimed it and never said. Or its
// answer waits to be stored.
func (l *soakLoad) mayBeUnknown(k soakKey) bool {
	dead := k.kind == history.Once && (l.ledger.isDeadOwner(k.key) || l.ledger.mayBeLost(k.key) || l.ledger.wasUnstored(k.key))
	k.asked.Range(func(process, _ any) bool {
		dead = dead || k.kind == history.Once && l.ledger.isDead(process.(string))
		return !dead
	})
	return dead
}

func (l *soakLoad) ask(ctx context.Context, k soakKey, payload string, fail bool) soakReply {
	l.pace(ctx)
	process, address := k.servers[rand.IntN(len(k.servers))].current()
	reply := soakReply{what: "no process"}
	if address != "" {
		l.sent.Add(1)
		reply = l.send(address, k, payload, fail)
	}
	if reply.lasting == "" {
		k.asked.Store(process, true)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[reply.what]++
	return reply
}

func (l *soakLoad) send(address string, k soakKey, payload string, fail bool) soakReply {
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
		if problem.Code == unknown {
			return soakReply{what: unknown, lasting: unknown}
		}
		return soakReply{what: problem.Code}
	}
	return l.judge(k, resp, string(body))
}

// judge makes a reply of a handler's answer, and wants it to be whole.
func (l *soakLoad) judge(k soakKey, resp *http.Response, body string) soakReply {
	reply := soakReply{what: "first", run: resp.Header.Get(runHeader)}
	failed := resp.StatusCode == http.StatusInternalServerError
	if !strings.Contains(reply.run, "-") || body != soakBody(reply.run) || !failed && resp.StatusCode != http.StatusCreated {
		l.blame("%s: a damaged answer of %q: %d, %d bytes", k.key, reply.run, resp.StatusCode, len(body))
		return soakReply{what: "damaged"}
	}
	reply.lasting = fmt.Sprintf("%d of %s, body %s", resp.StatusCode, reply.run, hashOf(body))
	switch {
	case k.key == "":
		return soakReply{what: "unkeyed"}
	case failed && k.kind == history.Plain:
		reply.what, reply.lasting = "failed as asked", ""
	case resp.Header.Get("Idempotent-Replayed") != "":
		reply.what = "replayed"
	case failed:
		reply.what = "failed as asked"
	}
	if reply.lasting != "" {
		l.ledger.answer(reply.run)
	}
	return reply
}
