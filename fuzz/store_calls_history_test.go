package fuzz

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A callHistory is all that happened under one key, in its order: what the
// store was asked, when the handler ran, and what the clients were told.
type callHistory struct {
	flow    storeFlow
	store   *callStore
	first   *idemtest.Client // waits for a running execution
	another *idemtest.Client // a replica that does not wait, and gets the retries

	mu       sync.Mutex // guards what follows
	clock    int        // counts what happens
	calls    []storeCall
	runs     []*handlerRun
	answers  []*clientAnswer
	kept     []int // when a Complete took effect
	late     int   // how many claims, renewals and marks took effect after they had been given up
	running  int
	together bool // two runs at once were seen
}

// storeCall is what the store answered to one call.
type storeCall struct {
	name    string // "Acquire#2", or "" before the counting began
	request int
	began   int
	at      int // when it was answered
	state   idempotency.State
	err     error
	isDeaf  bool // it took deafness
}

// handlerRun is one run of the handler.
type handlerRun struct {
	number     int
	request    int
	start, end int // end 0: it panicked
	began      time.Time
	committed  bool
	notDone    bool // its answer says that nothing was done
	sent       string
}

// clientAnswer is one request and what the client got.
type clientAnswer struct {
	sent   int // when the request was
	at     int
	text   string // "201 run 1", "replay 201 run 1", "503 store_unavailable", "panic"
	status int
	replay bool
	run    string // X-Run, the handler's own header
	took   time.Duration
	events int
}

func newHistory(flow storeFlow) *callHistory {
	h := &callHistory{flow: flow}
	h.store = &callStore{fullStore: flow.newStore(), history: h}
	if flow.inner != nil {
		h.store.fullStore = flow.inner(h.store.fullStore)
	}
	asked := fullStore(h.store)
	if flow.outer != nil {
		asked = flow.outer(asked)
	}
	opts := flow.opts
	opts.OnEvent = h.event
	h.first = idemtest.NewClient(asked, &opts, h.handle)
	opts.Wait = idempotency.NoWait
	h.another = idemtest.NewClient(asked, &opts, h.handle)
	return h
}

type requestNumber struct{}

// send sends the request to c and waits for its answer.
func (h *callHistory) send(t *testing.T, c *idemtest.Client) *clientAnswer {
	h.mu.Lock()
	a := &clientAnswer{sent: h.tickLocked()}
	ctx := context.WithValue(context.Background(), requestNumber{}, len(h.answers))
	h.answers = append(h.answers, a)
	h.mu.Unlock()

	start := time.Now()
	resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
	h.mu.Lock()
	defer h.mu.Unlock()
	a.took = time.Since(start)
	if a.text = "panic"; resp != nil {
		a.text, _ = idemtest.Describe(t, resp)
		a.status, a.run = resp.StatusCode, resp.Header.Get("X-Run")
		a.replay = resp.Header.Get("Idempotent-Replayed") == "true"
	}
	a.at = h.tickLocked()
	return a
}

// handle is the handler. It notes that it runs.
func (h *callHistory) handle(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	run := &handlerRun{number: len(h.runs) + 1, request: requestOf(r.Context()), start: h.tickLocked(), began: time.Now()}
	h.runs = append(h.runs, run)
	h.running++
	h.together = h.together || h.running > 1
	h.mu.Unlock()

	returned := false
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.running--
		if returned {
			run.end = h.tickLocked()
		}
	}()
	h.flow.handler(w, r, run)
	returned = true
}

// answer is what a handler ends with: its number in a header and in the body.
func (run *handlerRun) answer(w http.ResponseWriter, status int) {
	w.Header().Set("X-Run", fmt.Sprint(run.number))
	w.WriteHeader(status)
	fmt.Fprintf(w, "run %d", run.number)
	run.sent = fmt.Sprintf("%d run %d", status, run.number)
}

func (h *callHistory) called(ctx context.Context, c storeCall) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.request, c.at = requestOf(ctx), h.tickLocked()
	h.calls = append(h.calls, c)
}

// arrived is told what became of a claim, a renewal or a mark that arrived late.
func (h *callHistory) arrived(state idempotency.State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if state == idempotency.Acquired {
		h.late++
	}
}

func (h *callHistory) stored() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kept = append(h.kept, h.tickLocked())
}

func (h *callHistory) event(ctx context.Context, _ idempotency.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers[requestOf(ctx)].events++
}

func (h *callHistory) tickLocked() int {
	h.clock++
	return h.clock
}

func (h *callHistory) tick() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tickLocked()
}

// callsAfter returns the calls that were counted after the first one of that
// name and before the retry.
func (h *callHistory) callsAfter(name string) (names []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	found := false
	for _, c := range h.calls {
		if c.request >= len(h.answers)-1-afterwards {
			break
		}
		if found && c.name != "" && c.name != name {
			names = append(names, c.name)
		}
		found = found || c.name == name
	}
	return names
}

func requestOf(ctx context.Context) int { return ctx.Value(requestNumber{}).(int) }
