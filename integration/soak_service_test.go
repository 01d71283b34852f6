package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// Kinds of stores in a soak.
const (
	soakRedis  = "redis"
	soakMemory = "memory"
)

// failHeader asks the handler to answer 500 and to do nothing in its first
// attempt.
const failHeader = "Fail"

// newSoakService returns the service of a soak. It tells its effects to a
// ledger as lines on one connection: there are thousands a second.
func newSoakService(config replicaConfig) http.Handler {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the faults are known, and many
	ledger, err := net.Dial("tcp", config.Ledger)
	must(err)
	var store idempotency.Store
	memory := idempotency.NewMemoryStore()
	store = memory
	if config.Soak == soakRedis {
		store = idempotency.NewRedisStore(redis.NewClient(&redis.Options{
			Addr: config.Redis, ContextTimeoutEnabled: true, PoolSize: 64,
		}), nil)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/stats", func(w http.ResponseWriter, _ *http.Request) {
		must(json.NewEncoder(w).Encode(takeSample(memory)))
	})
	h := &soakHandler{name: config.Name, ledger: ledger}
	for _, kind := range []string{history.Plain, history.Once} {
		mux.Handle("/"+kind, idempotency.Middleware(store, &idempotency.Options{
			TTL: config.TTL, Lease: config.Lease, Wait: config.Wait, AtMostOnce: kind == history.Once,
		})(h))
	}
	return mux
}

type soakHandler struct {
	name   string
	runs   atomic.Int64
	mu     sync.Mutex // guards the connection
	ledger net.Conn
}

// ServeHTTP reads the body, has an effect, and answers with what names it.
func (h *soakHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	size := 200
	run := fmt.Sprintf("%s-%d", h.name, h.runs.Add(1))
	if e, ok := idempotency.FromContext(r.Context()); ok {
		if e.Attempt() == 1 && r.Header.Get(failHeader) != "" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		switch h.runs.Load() % 32 {
		case 0:
			size = 16 << 10
		case 1, 2: // some work, so that a kill finds somebody in the middle of it
			defer pauseFor(r.Context(), 100*time.Millisecond)
		}
		h.mu.Lock()
		_, err := fmt.Fprintf(h.ledger, "%s %s\n", e.Key(), run)
		h.mu.Unlock()
		must(err)
	}
	w.Header().Set(runHeader, run)
	w.WriteHeader(http.StatusCreated)
	_, _ = io.WriteString(w, strings.Repeat("x", size))
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
