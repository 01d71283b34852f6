package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// failHeader asks the handler to answer 500 and to do nothing in its first
// attempt.
const failHeader = "Fail"

// Bugs that a soak is started with on purpose.
const (
	soakStoreDown    = "the store is down"
	soakSpoils       = "the end of each stored answer is overwritten"
	soakRunsTwice    = "every twentieth replay runs the handler"
	soakForgetsTimes = "every twentieth stored answer is forgotten"
)

// A brokenSoakStore is a store with a bug.
type brokenSoakStore struct {
	idempotency.Store
	bug   string
	calls atomic.Int64
}

func (s *brokenSoakStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if s.bug == soakStoreDown {
		return idempotency.Record{}, errors.New("down")
	}
	rec, err := s.Store.Acquire(ctx, key, c)
	if err != nil || rec.State != idempotency.Completed {
		return rec, err
	}
	switch {
	case s.bug == soakSpoils:
		rec.Value = slices.Clone(rec.Value)
		for i := max(0, len(rec.Value)-100); i < len(rec.Value); i++ {
			rec.Value[i] = 'x'
		}
	case s.bug == soakRunsTwice && s.calls.Add(1)%20 == 0:
		return idempotency.Record{State: idempotency.Acquired, Attempt: 2}, nil
	case s.bug == soakForgetsTimes && s.calls.Add(1)%20 == 0:
		return idempotency.Record{State: idempotency.Abandoned}, nil
	}
	return rec, nil
}

// newSoakStore returns the store of the soak's kind.
func newSoakStore(config replicaConfig, memory *idempotency.MemoryStore) idempotency.Store {
	switch config.Store {
	case onRedis:
		return idempotency.NewRedisStore(openRedis(config.Database), nil)
	case onPostgres:
		return openPostgres(config.Database)
	}
	return memory
}

// newSoakService returns the service of a soak. It tells its effects to a
// ledger as lines on one connection: there are thousands a second.
func newSoakService(config replicaConfig, background *idempotency.Background) http.Handler {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the faults are known, and many
	ledger, err := net.Dial("tcp", config.Ledger)
	must(err)
	memory := idempotency.NewMemoryStore()
	store := newSoakStore(config, memory)
	if config.Bug != "" {
		store = &brokenSoakStore{Store: store, bug: config.Bug}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/stats", func(w http.ResponseWriter, _ *http.Request) {
		must(json.NewEncoder(w).Encode(takeSample(memory)))
	})
	h := &soakHandler{name: config.Name, ledger: ledger}
	told := func(_ context.Context, e idempotency.Event) {
		if e.Outcome == idempotency.OutcomeExecuted && e.Err != nil {
			h.tell(notYetStored, e.Request.Context().Value(soakRunKey{}).(*soakRun).name)
		}
	}
	for _, kind := range []string{history.Plain, history.Once} {
		mux.Handle("/"+kind, withSoakRun(idempotency.Middleware(store, &idempotency.Options{
			TTL: config.TTL, Lease: config.Lease, Wait: config.Wait, AtMostOnce: kind == history.Once,
			Background: background, OnEvent: told,
		})(h)))
	}
	return mux
}

// A soakRun is around the middleware. The handler writes the name of its run into it.
type soakRun struct{ name string }

type soakRunKey struct{}

func withSoakRun(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), soakRunKey{}, new(soakRun))))
	})
}

type soakHandler struct {
	name   string
	runs   atomic.Int64
	mu     sync.Mutex // guards the connection
	ledger net.Conn
}

// soakBody is the answer of a run. Clients know what it has to be.
func soakBody(run string) string {
	size := 200
	if numberOf(run)%32 == 0 {
		size = 16 << 10
	}
	line := run + "\n"
	return strings.Repeat(line, size/len(line)+1)
}

// numberOf returns which run of its process it is.
func numberOf(run string) (n int64) {
	n, _ = strconv.ParseInt(run[strings.LastIndexByte(run, '-')+1:], 10, 64)
	return n
}

// tell writes a line into the ledger.
func (h *soakHandler) tell(key, run string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := fmt.Fprintf(h.ledger, "%s %s\n", key, run)
	must(err)
}

// ServeHTTP reads the body, has an effect, and answers with what names it.
func (h *soakHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	run := fmt.Sprintf("%s-%d", h.name, h.runs.Add(1))
	r.Context().Value(soakRunKey{}).(*soakRun).name = run
	status := http.StatusCreated
	e, keyed := idempotency.FromContext(r.Context())
	switch {
	case !keyed:
	case e.Attempt() == 1 && r.Header.Get(failHeader) != "":
		status = http.StatusInternalServerError
	default:
		if n := numberOf(run) % 32; n == 1 || n == 2 { // some work, so that a kill finds somebody in the middle of it
			defer pauseFor(r.Context(), 100*time.Millisecond)
		}
		h.tell(e.Key(), run)
	}
	w.Header().Set(runHeader, run)
	w.WriteHeader(status)
	_, _ = io.WriteString(w, soakBody(run))
}

// A sample is what a server process needs.
type sample struct {
	Heap, RSS  uint64
	Goroutines int
	Records    int // in the store

	at    time.Duration
	alive bool
}

func takeSample(memory *idempotency.MemoryStore) sample {
	s := sample{Goroutines: runtime.NumGoroutine(), Records: memory.Len()}
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	s.Heap = stats.HeapAlloc
	var total, resident uint64
	if text, err := os.ReadFile("/proc/self/statm"); err == nil {
		_, _ = fmt.Sscan(string(text), &total, &resident)
	}
	s.RSS = resident * uint64(os.Getpagesize())
	return s
}
