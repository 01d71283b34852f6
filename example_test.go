package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A client repeats a request and gets the first answer again.
func Example() {
	charges := 0
	charge := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		charges++
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", charges)
	})

	mux := http.NewServeMux()
	mux.Handle("POST /charge", idempotency.Middleware(idempotency.NewMemoryStore(), nil)(charge))
	server := httptest.NewServer(mux)
	defer server.Close()

	for range 2 {
		r, _ := http.NewRequest("POST", server.URL+"/charge", strings.NewReader(`{"amount":100}`))
		r.Header.Set("Idempotency-Key", "chk_8e03978e-40d5-43dd-bc93-6894a57f9324")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			fmt.Println(err)
			return
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Println(resp.StatusCode, string(body), "replayed:", resp.Header.Get("Idempotent-Replayed") == "true")
	}
	// Output:
	// 201 charge 1 replayed: false
	// 201 charge 1 replayed: true
}

// A client uses one key for one operation, and the same key for every retry of
// it. Without an answer it does not know what happened: only the key makes the
// retry safe. The examples/client folder has one with backoff and Retry-After.
func Example_client() {
	charges := 0
	charge := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		charges++
		fmt.Fprintf(w, "charge %d", charges)
	}))
	server := httptest.NewServer(loseFirstAnswer(charge))
	defer server.Close()

	body := []byte(`{"amount":100}`)
	for try := 1; ; try++ {
		r, _ := http.NewRequest("POST", server.URL, bytes.NewReader(body))
		r.Header.Set("Idempotency-Key", "chk_8e03978e-40d5-43dd-bc93-6894a57f9324")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			fmt.Println("try", try, "no answer")
			continue
		}
		answer, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Println("try", try, string(answer))
		return
	}
	// Output:
	// try 1 no answer
	// try 2 charge 1
}

// loseFirstAnswer breaks the first connection after the request was served.
func loseFirstAnswer(next http.Handler) http.Handler {
	lost := false
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !lost {
			lost = true
			next.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	})
}

// Before an effect that nobody else can make idempotent, Commit makes the key
// at-most-once: if the process dies after it, nobody sends the letter again.
func ExampleExecution_Commit() {
	letter := func(w http.ResponseWriter, r *http.Request) {
		if e, ok := idempotency.FromContext(r.Context()); ok {
			if err := e.Commit(r.Context()); err != nil {
				http.Error(w, "try again", http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Println("sending the letter")
		panic("the process dies here")
	}
	h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		Lease: 30 * time.Millisecond, // for this example: a real one outlives a pause of the process
	})(http.HandlerFunc(letter))

	for range 2 {
		r := httptest.NewRequest("POST", "/letters", strings.NewReader("Dear customer"))
		r.Header.Set("Idempotency-Key", "letter-1")
		w := httptest.NewRecorder()
		func() {
			defer func() { _ = recover() }() // net/http does this
			h.ServeHTTP(w, r)
			fmt.Println(w.Code, w.Header().Get("Content-Type"))
		}()
	}
	// Output:
	// sending the letter
	// 409 application/problem+json
}

// mapStore is a custom store in miniature: a map under one lock, without
// expiry. A real one keeps its cells in a database and decides in one atomic
// statement or transaction; examples/customstore has one on SQL. Package
// storetest tells what such a store still does wrong.
type mapStore struct {
	mu    sync.Mutex
	cells map[string]cell
}

type cell struct {
	state       idempotency.State // InProgress, Completed, or Lost for released
	token       string
	attempt     int
	once        bool
	leaseEnd    time.Time
	fingerprint []byte
	value       []byte
}

func (s *mapStore) Acquire(_ context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	old, exists := s.cells[key]
	released := exists && old.state == idempotency.Lost
	known := len(old.fingerprint) > 0 && len(c.Fingerprint) > 0
	switch {
	case released && old.token == c.Token:
		return idempotency.Record{State: idempotency.Lost}, nil
	case exists && !released && known && !bytes.Equal(old.fingerprint, c.Fingerprint):
		return idempotency.Record{State: idempotency.Mismatch}, nil
	case exists && old.state == idempotency.Completed:
		return idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}, nil
	case exists && !released && old.token == c.Token: // renewed
		old.leaseEnd, old.once = now.Add(c.Lease), old.once || c.Once
		s.cells[key] = old
		return idempotency.Record{State: idempotency.Acquired, Attempt: old.attempt}, nil
	case exists && !released && now.Before(old.leaseEnd):
		return idempotency.Record{State: idempotency.InProgress, Remaining: old.leaseEnd.Sub(now)}, nil
	case exists && !released && old.once:
		return idempotency.Record{State: idempotency.Abandoned}, nil
	}
	s.cells[key] = cell{
		state: idempotency.InProgress, token: c.Token, attempt: old.attempt + 1, once: c.Once,
		leaseEnd: now.Add(c.Lease), fingerprint: bytes.Clone(c.Fingerprint),
	}
	return idempotency.Record{State: idempotency.Acquired, Attempt: old.attempt + 1}, nil
}

func (s *mapStore) Complete(_ context.Context, key, token string, r idempotency.Result) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, exists := s.cells[key]
	switch {
	case exists && (old.token != token || old.state == idempotency.Lost):
		return idempotency.ErrLeaseLost
	case old.state != idempotency.Completed:
		s.cells[key] = cell{
			state: idempotency.Completed, token: token,
			fingerprint: bytes.Clone(r.Fingerprint), value: bytes.Clone(r.Value),
		}
	}
	return nil
}

func (s *mapStore) Release(_ context.Context, key, token string, keep time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, exists := s.cells[key]
	if !exists || old.state == idempotency.InProgress && old.token == token {
		s.cells[key] = cell{state: idempotency.Lost, token: token, attempt: old.attempt}
	}
	return nil
}

// Three methods make a store.
func ExampleStore() {
	var store idempotency.Store = &mapStore{cells: map[string]cell{}}
	h := idempotency.Middleware(store, nil)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("the handler runs")
	}))
	for range 2 {
		r := httptest.NewRequest("POST", "/orders", nil)
		r.Header.Set("Idempotency-Key", "order-1")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(w.Code, "replayed:", w.Header().Get("Idempotent-Replayed") == "true")
	}
	// Output:
	// the handler runs
	// 200 replayed: false
	// 200 replayed: true
}

// What sets a header for every request belongs outside of Middleware. Inside it
// is part of what the handler did: a replay brings the request id of the first
// request back. It is worse with http.TimeoutHandler: inside, its 503 frees the
// key while the handler that it gave up on is still running.
func ExampleMiddleware_incorrect() {
	ids := 0
	requestID := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ids++
			w.Header().Set("X-Request-Id", fmt.Sprint(ids))
			next.ServeHTTP(w, r)
		})
	}
	once := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
	charge := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

	try := func(order string, h http.Handler) {
		for range 2 {
			r := httptest.NewRequest("POST", "/"+order, nil)
			r.Header.Set("Idempotency-Key", "a")
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			fmt.Println(order, "request", w.Header().Get("X-Request-Id"))
		}
	}
	try("wrong", once(requestID(charge)))
	try("right", requestID(once(charge)))
	// Output:
	// wrong request 1
	// wrong request 1
	// right request 2
	// right request 3
}
