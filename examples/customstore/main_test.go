package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// These make the test binary run the program instead of the tests: main as it
// is, or a process that kills itself (see crash_test.go).
const (
	asProgram = "CUSTOMSTORE_AS_PROGRAM"
	killAt    = "CUSTOMSTORE_KILL_AT"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(asProgram) != "":
		main()
	case os.Getenv(killAt) != "":
		doomed()
	default:
		os.Exit(m.Run())
	}
}

// An answer is what a client got.
type answer struct {
	status   int
	body     string
	replayed bool
}

// post returns an error when there is no answer.
func post(ctx context.Context, url, key, body string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/orders", strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	// A connection for each try: Go's Transport would send a request again by
	// itself when a used one breaks.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, string(text), res.Header.Get("Idempotent-Replayed") == "true"}, err
}

func mustPost(t *testing.T, url, key, body string) answer {
	t.Helper()
	a, err := post(t.Context(), url, key, body)
	require.NoError(t, err)
	return a
}

// requireOneOrder checks that the table has one order, the one in the body.
func requireOneOrder(t *testing.T, db *sql.DB, body string) {
	t.Helper()
	var ord order
	require.NoError(t, json.Unmarshal([]byte(body), &ord), body)
	require.Equal(t, 1, count(t, db, "orders"))
	const same = "orders WHERE id = $1 AND item = $2 AND quantity = $3"
	require.Equal(t, 1, count(t, db, same, ord.ID, ord.Item, ord.Quantity))
}

// newAPI serves the orders of db, with a handler around create.
func newAPI(
	t *testing.T, db *sql.DB, opts *idempotency.Options, around func(create http.HandlerFunc) http.HandlerFunc,
) string {
	t.Helper()
	_, err := db.ExecContext(t.Context(), ordersTable)
	require.NoError(t, err)
	store := newStore(t, db)
	o := &orders{db, store}
	srv := httptest.NewServer(idempotency.Middleware(store, opts)(around(o.create)))
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestProgram(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted there")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "orders.db")
	cmd := exec.CommandContext(t.Context(), self, "-addr", "127.0.0.1:0", "-db", path)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	url := start(t, cmd)

	first := mustPost(t, url, "order-17", "item=tea&quantity=2")
	require.Equal(t, answer{http.StatusCreated, `{"id":1,"item":"tea","quantity":2}` + "\n", false}, first)
	again := mustPost(t, url, "order-17", "item=tea&quantity=2")
	require.Equal(t, answer{first.status, first.body, true}, again)
	refused := mustPost(t, url, "order-17", "item=tea&quantity=9")
	require.Equal(t, http.StatusUnprocessableEntity, refused.status)
	require.Contains(t, refused.body, "key_reused")
	nonsense := mustPost(t, url, "order-18", "item=tea")
	require.Equal(t, http.StatusUnprocessableEntity, nonsense.status)

	res, err := http.Get(url + "/orders")
	require.NoError(t, err)
	defer res.Body.Close()
	var all []order
	require.NoError(t, json.NewDecoder(res.Body).Decode(&all))
	require.Equal(t, []order{{1, "tea", 2}}, all)

	http.DefaultClient.CloseIdleConnections()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), "SIGTERM ends the program in order")
	requireOneOrder(t, openFile(t, "sqlite", path), first.body)
}

// start starts the program and returns the URL that it tells.
func start(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // without effect unless the test failed
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if url := regexp.MustCompile(`http://[0-9.:]+`).FindString(lines.Text()); url != "" {
			go func() { _, _ = io.Copy(io.Discard, stdout) }()
			return url
		}
	}
	require.Fail(t, "the program says nothing")
	return ""
}

func TestOrdersAtOnce(t *testing.T) {
	db := openNew(t)
	// SQLite has one writer, for which a busy machine may have to wait.
	opts := &idempotency.Options{StoreTimeout: 10 * time.Second, Wait: time.Minute}
	url := newAPI(t, db, opts, func(create http.HandlerFunc) http.HandlerFunc { return create })
	const keys, each = 20, 3
	answers, errs := [keys][each]answer{}, [keys][each]error{}
	var done sync.WaitGroup
	for i := range keys {
		for j := range each {
			done.Go(func() {
				answers[i][j], errs[i][j] = post(t.Context(), url, fmt.Sprint("key-", i), "item=tea&quantity=1")
			})
		}
	}
	done.Wait()
	for i := range keys {
		for j := range each {
			require.NoError(t, errs[i][j])
			require.Equal(t, http.StatusCreated, answers[i][j].status, answers[i][j].body)
			require.Equal(t, answers[i][0].body, answers[i][j].body)
		}
	}
	require.Equal(t, keys, count(t, db, "orders"))
}

// Another owner has the key when the handler is done: it must not commit.
func TestLostLease(t *testing.T) {
	db := openNew(t)
	url := newAPI(t, db, nil, func(create http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if _, err := db.ExecContext(r.Context(), "UPDATE idempotency SET token = 'another', attempt = 2"); err != nil {
				t.Error(err)
			}
			create(w, r)
		}
	})
	a := mustPost(t, url, "key", "item=tea&quantity=1")
	require.Equal(t, http.StatusConflict, a.status)
	require.Contains(t, a.body, "in_progress")
	require.Zero(t, count(t, db, "orders"), "rolled back")
	left := count(t, db, "idempotency WHERE token = 'another' AND state = $1", claimed)
	require.Equal(t, 1, left, "the other's claim stands")
}

func TestReleaseRollsBack(t *testing.T) {
	db := openNew(t)
	var tries atomic.Int64
	url := newAPI(t, db, nil, func(create http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			create(w, r)
			if exec, _ := idempotency.FromContext(r.Context()); tries.Add(1) == 1 {
				exec.Discard()
			}
		}
	})
	require.Equal(t, http.StatusCreated, mustPost(t, url, "key", "item=tea&quantity=1").status)
	require.Zero(t, count(t, db, "orders"), "what is discarded is not ordered")
	require.Equal(t, 1, count(t, db, "idempotency WHERE state = $1", released), "at once")
	a := mustPost(t, url, "key", "item=tea&quantity=1")
	require.False(t, a.replayed)
	requireOneOrder(t, db, a.body)
}

// panickyWriter panics when the handler has attached its transaction.
type panickyWriter struct{ http.ResponseWriter }

func (panickyWriter) Write([]byte) (int, error) { panic(http.ErrAbortHandler) }

func TestPanicRollsBack(t *testing.T) {
	db := openNew(t)
	var tries atomic.Int64
	opts := &idempotency.Options{Lease: 500 * time.Millisecond}
	url := newAPI(t, db, opts, func(create http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if tries.Add(1) == 1 {
				w = panickyWriter{w}
			}
			create(w, r)
		}
	})
	_, err := post(t.Context(), url, "key", "item=tea&quantity=1")
	require.Error(t, err, "the connection breaks")
	require.Zero(t, count(t, db, "orders"), "and nobody holds the lock")
	requireOneOrder(t, db, mustPost(t, url, "key", "item=tea&quantity=1").body)
}

// A transaction that takes too long ends, and its key is free at once.
func TestOverstayingTransaction(t *testing.T) {
	db := openNew(t)
	overstay := newAPI(t, db, &idempotency.Options{MaxExecution: 3 * time.Second}, func(create http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			create(w, r)
			<-r.Context().Done()
		}
	})
	a := mustPost(t, overstay, "key", "item=tea&quantity=1")
	require.Equal(t, http.StatusServiceUnavailable, a.status)
	require.Contains(t, a.body, `"retryable":true`)
	require.Zero(t, count(t, db, "orders"))

	// The retry has the default limit of minutes, so it gets through on any machine.
	url := newAPI(t, db, nil, func(create http.HandlerFunc) http.HandlerFunc { return create })
	requireOneOrder(t, db, mustPost(t, url, "key", "item=tea&quantity=1").body)
}

// The request whose commit fails finds out whether it happened all the same.
func TestFailedCommit(t *testing.T) {
	for step, status := range map[string]int{"before commit": 503, "after commit": 201} {
		t.Run(step, func(t *testing.T) {
			db := openFile(t, "watched", filepath.Join(t.TempDir(), "test.db"))
			failOnce(t, step)
			url := newAPI(t, db, nil, func(create http.HandlerFunc) http.HandlerFunc { return create })
			a := mustPost(t, url, "key", "item=tea&quantity=1")
			require.Equal(t, status, a.status)
			require.NotContains(t, a.body, "not known")
			a = mustPost(t, url, "key", "item=tea&quantity=1")
			require.Equal(t, http.StatusCreated, a.status)
			require.Equal(t, step == "after commit", a.replayed)
			requireOneOrder(t, db, a.body)
		})
	}
}

// When nothing can be read after a commit that fails, the retry finds out.
func TestFailedCommitThatNothingIsKnownOf(t *testing.T) {
	for _, step := range []string{"before commit", "after commit"} {
		t.Run(step, func(t *testing.T) {
			db := openFile(t, "watched", filepath.Join(t.TempDir(), "test.db"))
			failOnce(t, step, "before begin")
			opts := &idempotency.Options{Lease: 500 * time.Millisecond}
			url := newAPI(t, db, opts, func(create http.HandlerFunc) http.HandlerFunc { return create })
			a := mustPost(t, url, "key", "item=tea&quantity=1")
			require.Equal(t, http.StatusServiceUnavailable, a.status)
			require.Contains(t, a.body, "not known")
			a = mustPost(t, url, "key", "item=tea&quantity=1")
			require.Equal(t, http.StatusCreated, a.status)
			require.Equal(t, step == "after commit", a.replayed)
			requireOneOrder(t, db, a.body)
		})
	}
}

// failOnce has each of the steps fail once, in this order, after the first
// INSERT INTO orders.
func failOnce(t *testing.T, steps ...string) {
	var mu sync.Mutex
	ordered := false
	watched.watch(func(name string) error {
		mu.Lock()
		defer mu.Unlock()
		ordered = ordered || name == "before INSERT INTO orders"
		if !ordered || len(steps) == 0 || name != steps[0] {
			return nil
		}
		steps = steps[1:]
		return errors.New("the connection to the database broke")
	})
	t.Cleanup(func() { watched.watch(func(string) error { return nil }) })
}

// A context that ends just before the commit takes the transaction with it, and
// the key is free at once.
func TestContextThatEndsBeforeTheCommit(t *testing.T) {
	db := openFile(t, "watched", filepath.Join(t.TempDir(), "test.db"))
	var ordered atomic.Bool
	var cancel context.CancelFunc
	url := newAPI(t, db, nil, func(create http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if ordered.Load() { // the retry
				create(w, r)
				return
			}
			var ctx context.Context
			ctx, cancel = context.WithCancel(r.Context())
			create(w, r.WithContext(ctx))
		}
	})
	watched.watch(func(name string) error {
		switch {
		case name == "before INSERT INTO orders":
			ordered.Store(true)
		case name == "before INSERT INTO idempotency" && ordered.Load() && cancel != nil:
			cancel()
			cancel = nil
		}
		return nil
	})
	t.Cleanup(func() { watched.watch(func(string) error { return nil }) })
	a := mustPost(t, url, "key", "item=tea&quantity=1")
	require.Equal(t, http.StatusServiceUnavailable, a.status)
	require.NotContains(t, a.body, "not known")
	require.Zero(t, count(t, db, "orders"))
	a = mustPost(t, url, "key", "item=tea&quantity=1")
	require.False(t, a.replayed)
	requireOneOrder(t, db, a.body)
}
