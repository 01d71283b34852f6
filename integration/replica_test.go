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

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
	"github.com/go-idempotency/idempotency/postgres"
)

// A replicaConfig says what a server process is like.
type replicaConfig struct {
	Name     string
	Store    string // the kind of store
	Database string // its address
	Ledger   string
	Epoch    time.Time
	Lease    time.Duration
	Wait     time.Duration
	TTL      time.Duration
	Bug      string // what to break on purpose
	Soak     bool
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
	if config.Soak {
		handler = newSoakService(config, background)
	} else {
		handler = newReplica(config, background)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("serving on %s\n", listener.Addr())
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)} // handlers panic on purpose
	terminated, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	context.AfterFunc(terminated, func() { finish(server, background, config.Bug) })
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			panic(err)
		}
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// finish ends the process when all that it does is done.
func finish(server *http.Server, background *idempotency.Background, bug string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if bug == closesConnections {
		must(server.Close())
	}
	must(server.Shutdown(ctx))
	if bug != exitsAtOnce {
		must(background.Wait(ctx))
	}
	os.Exit(0)
}

// A replica is the service of the histories.
type replica struct {
	config   replicaConfig
	ledger   *ledgerClient
	store    idempotency.Store
	business *postgres.Store // nil if the store is another
	visits   atomic.Int64
}

func newReplica(config replicaConfig, background *idempotency.Background) http.Handler {
	p := &replica{config: config, ledger: newLedgerClient(config.Ledger)}
	if config.Store == onPostgres {
		p.business = openPostgres(config.Database)
		p.store = p.business
	} else {
		client := openRedis(config.Database)
		p.store = plant(config.Bug, client, idempotency.NewRedisStore(client, nil))
	}
	store := plantAbove(config.Bug, &journal{store: p.store, replica: p})
	mux := http.NewServeMux()
	for _, kind := range []string{
		history.Plain, history.Large, history.Once, history.Commit, history.Form, history.Event, history.Tenant, history.Head,
		history.Broken, history.Open, history.Begin, history.Attach,
	} {
		opts := &idempotency.Options{
			Lease: config.Lease, Wait: config.Wait, AtMostOnce: kind == history.Once,
			TTL: config.TTL, Background: background, MaxExecution: maxExecution, MaxBufferedBody: maxBufferedBody, FailOpen: kind == history.Open,
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

	request *watchedBody // as it came

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
		r.Body = &watchedBody{ReadCloser: r.Body, hides: p.config.Bug == hidesBreaks}
		v.request = r.Body.(*watchedBody)
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
		row.Unprotected = !e.Protected()
	})
	v.mu.Lock()
	v.about.Run, v.about.Attempt = begun.Run, e.Attempt()
	v.mu.Unlock()
	defer releaseAfterPanic(p, v)
	h := &handling{replica: p, visit: v, execution: e, ctx: r.Context(), w: w, rest: r.Body}
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
	rest      io.Reader // of the body

	yields, large, discarded, committed, attached bool

	streamed string // what has gone out
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
		if h.visit.about.Kind == history.Begin {
			return h.insert()
		}
		h.note(h.visit, history.RowEffect, nil)
	case doCommit:
		return h.commit()
	case doAttach:
		h.attached = true
		h.execution.Attach("an attachment")
	case doDiscard:
		h.discarded = true
		h.execution.Discard()
	case doFlush:
		h.readOn()
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

// insert writes the row that is the effect under a Begin key, and hands its
// transaction over. If it cannot, nothing was done.
func (h *handling) insert() (done bool) {
	ctx := h.ctx
	if h.config.Bug == commitsAlone {
		ctx = context.Background() // without the Execution, so Commit commits at once
	}
	tx, err := h.business.Begin(ctx)
	if err == nil {
		defer func() { _ = tx.Rollback(ctx) }()
		_, err = tx.Exec(ctx, `INSERT INTO charges VALUES ($1, $2)`, h.visit.about.Key, h.visit.about.Run)
	}
	if err == nil {
		err = tx.Commit(ctx)
	}
	if err != nil {
		h.answer(http.StatusServiceUnavailable)
		return true
	}
	h.attached = true
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
	h.readOn()
	body, cut := h.body(), h.visit.request.broken.Load()
	h.note(h.visit, history.RowEnd, func(row *history.Row) {
		row.Cut, row.Status, row.Hash, row.Attached = cut, status, hashOf(body), h.attached
		row.Discard, row.Committed = h.discarded, h.committed
	})
	h.head(status)
	_, _ = io.WriteString(h.w, body[len(h.streamed):])
}

// readOn reads the rest of a body that may break off. Its handler has read the head
// before it began.
func (h *handling) readOn() {
	if h.visit.about.Kind != history.Broken {
		return
	}
	buffer := make([]byte, 512)
	var err error // the row of the answer says how it ended
	for err == nil && !h.visit.request.broken.Load() {
		_, err = h.rest.Read(buffer)
	}
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
