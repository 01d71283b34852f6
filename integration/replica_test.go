package integration

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// A replicaConfig says what a server process is like.
type replicaConfig struct {
	Name   string
	Redis  string
	Ledger string
	Epoch  time.Time
	Lease  time.Duration
	Wait   time.Duration
	Bug    string // what to break on purpose
	TTL    time.Duration

	Soak     string // the kind of store, in a soak
	Database string // its address

	Provider string // who charges, in a deployment
}

// Headers of requests and answers.
const (
	opHeader  = "Op"  // names the request
	keyHeader = "Key" // names the key, for the ledger alone
	runHeader = "Run" // names the run that made the answer
)

// runReplica is the program of a server process. It serves until its standard
// input ends, which it does when the test is gone.
func runReplica(config replicaConfig) {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if config.Provider != "" {
		runDeployed(config)
		return
	}
	background := new(idempotency.Background)
	var handler http.Handler
	if config.Soak != "" {
		handler = newSoakService(config, background)
	} else {
		handler = newReplica(config)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("serving on %s\n", listener.Addr())
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)} // handlers panic on purpose
	terminated, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	context.AfterFunc(terminated, func() { finish(server, background) })
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			panic(err)
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// finish ends the process when all that it does is done.
func finish(server *http.Server, background *idempotency.Background) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	must(server.Shutdown(ctx))
	must(background.Wait(ctx))
	os.Exit(0)
}

// A replica is the service of the histories.
type replica struct {
	config replicaConfig
	ledger *ledgerClient
	store  idempotency.Store
	visits atomic.Int64
}

func newReplica(config replicaConfig) http.Handler {
	p := &replica{config: config, ledger: newLedgerClient(config.Ledger)}
	client := redis.NewClient(&redis.Options{Addr: config.Redis, ContextTimeoutEnabled: true, PoolSize: 64})
	p.store = plant(config.Bug, client, idempotency.NewRedisStore(client, nil))
	store := plantAbove(config.Bug, &journal{store: p.store, replica: p})
	mux := http.NewServeMux()
	for _, kind := range []string{
		history.Plain, history.Large, history.Once, history.Commit, history.Form, history.Event, history.Tenant, history.Head,
	} {
		opts := &idempotency.Options{
			Lease: config.Lease, Wait: config.Wait, AtMostOnce: kind == history.Once,
			TTL: recordTTL, MaxExecution: maxExecution, MaxBufferedBody: maxBufferedBody,
		}
		if kind == history.Once || kind == history.Commit {
			opts.AEAD = newAEAD()
		}
		setUp(opts, kind, config.Bug)
		protect := idempotency.Middleware(store, opts)
		mux.Handle("/"+kind, p.enter(kind, protect(http.HandlerFunc(p.handle))))
	}
	return mux
}

// Options of the server processes. For as long as a lease and MaxExecution a
// process tries to store its answer, and to free what it may have marked: longer
// than a history, so that no mark is left behind but by processes that die.
const (
	recordTTL       = time.Hour
	maxExecution    = time.Minute
	maxBufferedBody = 1 << 10
)

// newAEAD returns what all processes seal records with.
func newAEAD() cipher.AEAD {
	block, err := aes.NewCipher([]byte("a key that all of them have, 32."))
	must(err)
	aead, err := cipher.NewGCM(block)
	must(err)
	return aead
}

// A visit is one request that has arrived at this process.
type visit struct {
	calls atomic.Int64 // of Acquire and Release
	body  []byte       // that was hidden from the middleware on purpose

	mu       sync.Mutex  // guards what follows
	about    history.Row // what every row of it says
	storeKey string
	token    string
	sent     time.Duration // since then the claim may have been made
	unclear  bool          // a claim was sent, and its answer is not known
	returned time.Duration
	stores   string // the hash of what the store was told first to keep
}

// claimed notes a claim.
func (v *visit) claimed(key, token string, sent, returned time.Duration, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.unclear {
		v.sent = sent
	}
	v.unclear = v.unclear || err != nil
	v.storeKey, v.token, v.returned = key, token, returned
}

// completesAnother reports whether the store was told before to keep another value.
func (v *visit) completesAnother(value []byte) bool {
	hash := hashOf(string(value))
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stores == "" {
		v.stores = hash
	}
	return v.stores != hash
}

type visitKey struct{}

func visitOf(ctx context.Context) *visit { return ctx.Value(visitKey{}).(*visit) }

// enter is outside of the middleware.
func (p *replica) enter(kind string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := &visit{about: history.Row{
			Key: keyOf(kind, r), Kind: kind, Op: r.Header.Get(opHeader), Process: p.config.Name,
			Visit: fmt.Sprintf("%s-%d", p.config.Name, p.visits.Add(1)),
		}}
		hideBody(p.config.Bug, v, r)
		next.ServeHTTP(withoutMarks(p.config.Bug, w), r.WithContext(context.WithValue(r.Context(), visitKey{}, v)))
	})
}

func (p *replica) now() time.Duration {
	return time.Duration(time.Now().UnixNano() - p.config.Epoch.UnixNano())
}

// note writes a row about v.
func (p *replica) note(v *visit, kind string, change func(*history.Row)) begun {
	v.mu.Lock()
	row := v.about
	v.mu.Unlock()
	row.Type = kind
	if change != nil {
		change(&row)
	}
	return p.ledger.add(row)
}

// handle does what the plan of this run says.
func (p *replica) handle(w http.ResponseWriter, r *http.Request) {
	e, _ := idempotency.FromContext(r.Context())
	v := visitOf(r.Context())
	payload, err := readPayload(v.about.Kind, p.config.Bug, r)
	if err != nil { // the client has hung up in the middle of it
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if v.body != nil {
		payload = strings.TrimSpace(string(v.body))
	}
	begun := p.note(v, history.RowBegin, func(row *history.Row) {
		row.Payload, row.Attempt, row.Sent, row.Returned = payload, e.Attempt(), v.sent, v.returned
	})
	v.mu.Lock()
	v.about.Run, v.about.Attempt = begun.Run, e.Attempt()
	v.mu.Unlock()
	defer releaseAfterPanic(p, v)
	h := &handling{replica: p, visit: v, execution: e, ctx: r.Context(), w: w}
	for _, s := range begun.Plan {
		if done := h.do(s); done {
			return
		}
	}
}

// A handling is a run of the handler.
type handling struct {
	*replica
	visit     *visit
	execution *idempotency.Execution
	ctx       context.Context
	w         http.ResponseWriter

	yields, large, discarded, committed bool
	streamed                            string // what has gone out
}

// do is true when the handler is to return.
func (h *handling) do(s step) (done bool) {
	switch s.Do {
	case doYield:
		h.yields = true
	case doLarge:
		h.large = true
	case doWork:
		return h.work(s.For)
	case doEffect:
		h.note(h.visit, history.RowEffect, nil)
	case doCommit:
		return h.commit()
	case doDiscard:
		h.discarded = true
		h.execution.Discard()
	case doFlush:
		body := h.body()
		h.streamed = body[:len(body)/2]
		h.head(http.StatusCreated)
		_, _ = io.WriteString(h.w, h.streamed)
		_ = http.NewResponseController(h.w).Flush()
	case doCrash:
		h.note(h.visit, history.RowEnd, func(row *history.Row) { row.Panic = true })
		panic("as planned")
	case doAnswer:
		h.answer(s.Status)
		return true
	}
	return false
}

func (h *handling) work(d time.Duration) (done bool) {
	var ended <-chan struct{}
	if h.yields {
		ended = h.ctx.Done()
	}
	select {
	case <-time.After(d):
		return false
	case <-ended:
	}
	h.answer(http.StatusServiceUnavailable)
	return true
}

func (h *handling) commit() (done bool) {
	h.note(h.visit, history.RowCommit, nil)
	if err := h.execution.Commit(h.ctx); err != nil {
		h.answer(http.StatusInternalServerError)
		return true
	}
	h.note(h.visit, history.RowCommits, nil)
	h.committed = true
	return false
}

func (h *handling) head(status int) {
	h.w.Header().Set(runHeader, h.visit.about.Run)
	h.w.WriteHeader(status)
}

// answer writes the row before the answer.
func (h *handling) answer(status int) {
	if h.streamed != "" {
		status = http.StatusCreated
	}
	body := h.body()
	h.note(h.visit, history.RowEnd, func(row *history.Row) {
		row.Status, row.Hash, row.Discard, row.Committed = status, hashOf(body), h.discarded, h.committed
	})
	h.head(status)
	_, _ = io.WriteString(h.w, body[len(h.streamed):])
}

// body is different in every run.
func (h *handling) body() string {
	line := "run " + h.visit.about.Run + " in process " + h.config.Name + "\n"
	if !h.large {
		return line
	}
	return strings.Repeat(line, (64<<10)/len(line)+1)
}

func hashOf(body string) string {
	sum := sha256.Sum256([]byte(body))
	return hex.EncodeToString(sum[:6])
}
