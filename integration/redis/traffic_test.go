// Package redis_test has services on several Redis servers, or of several
// processes.
package redis_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// connect returns a client as the documentation recommends it: of one server,
// of a Cluster, or through Sentinel.
func connect(t testing.TB, opts redis.UniversalOptions) redis.UniversalClient {
	opts.ContextTimeoutEnabled = true
	client := redis.NewUniversalClient(&opts)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// connectTo is for a look at one server, behind the back of any store.
func connectTo(t testing.TB, s *idemtest.RedisServer) redis.UniversalClient {
	return connect(t, redis.UniversalOptions{Addrs: []string{s.Addr}})
}

// A browser sends requests with keys.
type browser struct{ client *http.Client }

func newBrowser(t *testing.T) browser {
	transport := &http.Transport{MaxIdleConnsPerHost: 500}
	t.Cleanup(transport.CloseIdleConnections)
	return browser{&http.Client{Transport: transport, Timeout: idemtest.Patience}}
}

// ask posts to url. It returns "status body", for a problem "status code", both
// after "replay " if it is one, and for no answer "broken: " and why.
func (b browser) ask(url, key string, headers ...string) string {
	r, err := http.NewRequest(http.MethodPost, url, strings.NewReader(`{"amount":1}`))
	if err != nil {
		return "broken: " + err.Error()
	}
	r.Header.Set("Idempotency-Key", key)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := b.client.Do(r)
	if err != nil {
		return "broken: " + err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "broken: " + err.Error()
	}
	var p idemtest.Problem
	if resp.StatusCode >= 400 && json.Unmarshal(body, &p) == nil {
		body = []byte(p.Code)
	}
	answer := fmt.Sprintf("%d %s", resp.StatusCode, body)
	if resp.Header.Get("Idempotent-Replayed") == "true" {
		answer = "replay " + answer
	}
	return answer
}

// An effect is what a handler did, whatever was answered.
type effect struct {
	attempt int
	at      time.Time
	answer  string
}

// traffic is many clients of one service. Each sends every key of its own twice
// at once, and repeats it until it has an answer that is no call to repeat it.
// Every second key runs at most once.
type traffic struct {
	t       *testing.T
	lease   time.Duration
	browser browser
	url     string
	stop    chan struct{}
	clients sync.WaitGroup

	mu        sync.Mutex // guards what follows
	effects   map[string][]effect
	sent      map[string]time.Time // when a key was sent first
	answers   map[string][]string
	owed      map[string]bool // executed, and not stored at first
	errors    int
	lastError time.Time
	streak    int // answers since then
	numbered  int
}

// trafficClients is also how many commands are on their way at most when a
// server is killed, and so how many keys a lost reply or record can concern.
const trafficClients = 8

func startTraffic(t *testing.T, store idempotency.Store, lease time.Duration) *traffic {
	x := &traffic{
		t: t, lease: lease, browser: newBrowser(t), stop: make(chan struct{}),
		effects: make(map[string][]effect), sent: make(map[string]time.Time), answers: make(map[string][]string), owed: make(map[string]bool),
	}
	mux := http.NewServeMux()
	for path, once := range map[string]bool{"/often": false, "/once": true} {
		mux.Handle(path, idempotency.Middleware(store, &idempotency.Options{
			Lease: lease, AtMostOnce: once, OnEvent: x.event, Logger: slog.New(slog.DiscardHandler),
		})(http.HandlerFunc(x.handle)))
	}
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	x.url = server.URL
	for n := range trafficClients {
		x.clients.Go(func() { x.send(n) })
	}
	t.Cleanup(x.end)
	return x
}

// end waits for the clients to have all their answers.
func (x *traffic) end() {
	x.mu.Lock()
	select {
	case <-x.stop:
	default:
		close(x.stop)
	}
	x.mu.Unlock()
	x.clients.Wait()
}

func (x *traffic) handle(w http.ResponseWriter, r *http.Request) {
	e, _ := idempotency.FromContext(r.Context())
	x.mu.Lock()
	x.numbered++
	answer := fmt.Sprintf("%s, effect %d", e.Key(), x.numbered)
	x.effects[e.Key()] = append(x.effects[e.Key()], effect{e.Attempt(), time.Now(), "201 " + answer})
	x.mu.Unlock()
	<-time.After(rand.N(10 * time.Millisecond)) // whatever happens, happens to some in here
	w.WriteHeader(http.StatusCreated)
	_, _ = io.WriteString(w, answer)
}

func (x *traffic) event(_ context.Context, e idempotency.Event) {
	if e.Outcome == idempotency.OutcomeExecuted && e.Err != nil {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.owed[e.Request.Header.Get("Idempotency-Key")] = true
	}
}

func (x *traffic) send(client int) {
	for n := 0; ; n++ {
		select {
		case <-x.stop:
			return
		default:
		}
		key := fmt.Sprintf("%s-%d-%d", []string{"often", "once"}[n%2], client, n)
		x.mu.Lock()
		x.sent[key] = time.Now()
		x.mu.Unlock()
		var pair sync.WaitGroup
		for range 2 {
			pair.Go(func() { x.insist(key) })
		}
		pair.Wait()
	}
}

// insist repeats a request until its answer is final.
func (x *traffic) insist(key string) string {
	path, _, _ := strings.Cut(key, "-")
	answer := ""
	for deadline := time.Now().Add(idemtest.Patience); time.Now().Before(deadline); {
		answer = strings.TrimPrefix(x.browser.ask(x.url+"/"+path, key), "replay ")
		if final := x.note(key, answer); final {
			return answer
		}
		<-time.After(rand.N(40 * time.Millisecond)) // as a client does
	}
	x.t.Errorf("%s is still answered %q", key, answer)
	return answer
}

// note reports whether the answer is final.
func (x *traffic) note(key, answer string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch answer {
	case "503 store_unavailable":
		x.errors++
		x.lastError, x.streak = time.Now(), 0
		return false
	case "409 in_progress":
		return false
	}
	x.streak++
	x.answers[key] = append(x.answers[key], answer)
	return true
}

// flows waits until so many answers came without an error in between: more than
// there can be while a part of the keys is out of reach.
func (x *traffic) flows(answers int) {
	x.t.Helper()
	x.mu.Lock()
	x.streak = 0
	x.mu.Unlock()
	idemtest.Await(x.t, "traffic flows", func() bool {
		x.mu.Lock()
		defer x.mu.Unlock()
		return x.streak >= answers
	})
}

// loss is how many keys ended in a way that only a lost record explains.
type loss struct {
	ranAgain int // taken over, or run as if never seen
	unknown  int // at-most-once keys whose answer is gone
	owed     int // of both, those that were not stored at first
	neverRan int // at-most-once keys whose claim nobody could give back in time
}

// judge ends the traffic, repeats every key twice and checks what became of it.
// replicated means that no claim can be lost: a key runs a second time only when
// it may, as attempt 2, and not before a lease has passed since it was sent.
func (x *traffic) judge(replicated bool) (lost loss) {
	x.t.Helper()
	x.end()
	final := x.repeatAll()
	again := x.repeatAll()
	require.Equal(x.t, final, again, "retries are answered equally")
	require.NotEmpty(x.t, final)
	for key, answer := range final {
		effects := x.effects[key]
		once := strings.HasPrefix(key, "once")
		if len(effects) == 0 {
			// Its claim was made, but nobody heard of it or could give it back
			// in time. That may be said of an at-most-once key.
			require.True(x.t, once && answer == "409 outcome_unknown", "%s was answered %q and never ran", key, answer)
			lost.neverRan++
			continue
		}
		var all []string
		for _, e := range effects {
			all = append(all, e.answer)
		}
		unknown := once && answer == "409 outcome_unknown"
		if unknown {
			lost.unknown++
		} else {
			require.Contains(x.t, all, answer, key)
		}
		for _, a := range x.answers[key] {
			// Unknown for a while: until an uncertain claim was given back, or an
			// answer stored in the background.
			require.True(x.t, slices.Contains(all, a) || once && a == "409 outcome_unknown", "%s was answered %q, its effects are %q", key, a, all)
		}
		if x.owed[key] && (unknown || len(effects) > 1) {
			lost.owed++
		}
		if len(effects) == 1 {
			continue
		}
		lost.ranAgain++
		require.Len(x.t, effects, 2, key)
		if replicated {
			require.False(x.t, once, "%s ran twice", key)
			require.Equal(x.t, []int{1, 2}, []int{effects[0].attempt, effects[1].attempt}, key)
			require.GreaterOrEqual(x.t, effects[1].at.Sub(x.sent[key]), x.lease, key)
			require.Equal(x.t, effects[1].answer, answer, key)
		}
	}
	x.t.Logf("%d keys, %d errors, %d not stored at first, lost %+v", len(final), x.errors, len(x.owed), lost)
	return lost
}

// repeatAll sends every key once more and returns the answers.
func (x *traffic) repeatAll() map[string]string {
	x.mu.Lock()
	keys := make(chan string, len(x.sent))
	for key := range x.sent {
		keys <- key
	}
	x.mu.Unlock()
	close(keys)
	final := make(map[string]string)
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range 2 * trafficClients {
		clients.Go(func() {
			for key := range keys {
				answer := x.insist(key)
				mu.Lock()
				final[key] = answer
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	return final
}

// errorsAfter returns for how long after an instant requests were refused.
func (x *traffic) errorsAfter(since time.Time) time.Duration {
	x.mu.Lock()
	defer x.mu.Unlock()
	return max(0, x.lastError.Sub(since))
}
