package idempotency_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

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

// Some effects cannot be taken back, and no other system makes them idempotent.
// Commit before such an effect makes the key at-most-once: if the process dies
// after Commit, no retry sends the letter again.
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

// A mapStore is a custom store in miniature: a map under one lock. It follows
// the whole contract, but an expired cell is in the map until its key is used
// again. A real store keeps its cells in a database and decides in one atomic
// statement or transaction, as that of examples/customstore does.
type mapStore struct {
	mu    sync.Mutex
	cells map[string]cell
}

const (
	cellAbsent = iota
	cellClaimed
	cellCompleted
	cellReleased
)

// A cell is what a mapStore keeps for a key. The zero cell is absent.
type cell struct {
	state, attempt     int
	token              string
	once               bool
	leaseEnd, expires  time.Time
	fingerprint, value []byte
}

// cell returns the cell of key.
func (s *mapStore) cell(key string, now time.Time) cell {
	if c := s.cells[key]; now.Before(c.expires) {
		return c
	}
	return cell{}
}

// Acquire is the table in the documentation of Store: the cases that return are
// the rows that refuse, and the others say what becomes of the cell.
func (s *mapStore) Acquire(_ context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	old := s.cell(key, now)
	own, renewal := old.token == c.Token, c.Attempt > 0
	known := len(old.fingerprint) > 0 && len(c.Fingerprint) > 0
	next := cell{state: cellClaimed, token: c.Token, attempt: old.attempt + 1, fingerprint: bytes.Clone(c.Fingerprint)}
	switch {
	case old.state == cellAbsent:
		next.attempt = max(c.Attempt, 1)
	case old.state == cellReleased && (own || renewal):
		return idempotency.Record{State: idempotency.Lost}, nil
	case old.state == cellReleased:
	case known && !bytes.Equal(old.fingerprint, c.Fingerprint):
		return idempotency.Record{State: idempotency.Mismatch}, nil
	case old.state == cellCompleted && !renewal:
		return idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}, nil
	case old.state == cellClaimed && own && (!renewal || c.Attempt == old.attempt):
		next = old
		next.once = old.once || renewal && c.Once
	case renewal:
		return idempotency.Record{State: idempotency.Lost}, nil
	case now.Before(old.leaseEnd):
		return idempotency.Record{State: idempotency.InProgress, Remaining: old.leaseEnd.Sub(now)}, nil
	case old.once:
		return idempotency.Record{State: idempotency.Abandoned}, nil
	}
	next.leaseEnd, next.expires = now.Add(c.Lease), now.Add(max(c.TTL, c.Lease))
	s.cells[key] = next
	return idempotency.Record{State: idempotency.Acquired, Attempt: next.attempt, Once: next.once}, nil
}

func (s *mapStore) Complete(_ context.Context, key, token string, r idempotency.Result) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch old := s.cell(key, now); {
	case old.state == cellReleased, old.state != cellAbsent && old.token != token:
		return idempotency.ErrLeaseLost
	case old.state != cellCompleted:
		s.cells[key] = cell{
			state: cellCompleted, token: token, expires: now.Add(r.TTL),
			fingerprint: bytes.Clone(r.Fingerprint), value: bytes.Clone(r.Value),
		}
	}
	return nil
}

func (s *mapStore) Release(_ context.Context, key, token string, keep time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	old := s.cell(key, now)
	if old.state == cellAbsent || old.state == cellClaimed && old.token == token {
		marker := cell{state: cellReleased, token: token, attempt: old.attempt, expires: now.Add(keep)}
		if old.attempt > 1 && old.expires.After(marker.expires) {
			marker.expires = old.expires
		}
		s.cells[key] = marker
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

// A webhook has its key in its body. Key checks the signature first, because
// every client that can send a key can occupy it. The sender may change other
// parts of the event between two deliveries, so the id is all that counts.
func ExampleOptions_key() {
	sign := func(body []byte) string {
		mac := hmac.New(sha256.New, []byte("secret"))
		mac.Write(body)
		return hex.EncodeToString(mac.Sum(nil))
	}
	opts := &idempotency.Options{
		RequireKey: true,
		Key: func(r *http.Request, body []byte) (string, error) {
			if !hmac.Equal([]byte(r.Header.Get("Signature")), []byte(sign(body))) {
				return "", errors.New("the signature is wrong")
			}
			var event struct{ ID string }
			if err := json.Unmarshal(body, &event); err != nil {
				return "", errors.New("the event is not JSON")
			}
			return event.ID, nil
		},
		Fingerprint: func(*http.Request, []byte) []byte { return nil },
	}
	h := idempotency.Middleware(idempotency.NewMemoryStore(), opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Printf("shipping for %s\n", body)
	}))

	deliver := func(event, signature string) {
		r := httptest.NewRequest("POST", "/webhooks", strings.NewReader(event))
		r.Header.Set("Signature", signature)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(w.Code, "replayed:", w.Header().Get("Idempotent-Replayed") == "true")
	}
	first, again := `{"id":"evt_1","pending_webhooks":2}`, `{"id":"evt_1","pending_webhooks":1}`
	deliver(first, "forged")
	deliver(first, sign([]byte(first)))
	deliver(again, sign([]byte(again)))
	// Output:
	// 400 replayed: false
	// shipping for {"id":"evt_1","pending_webhooks":2}
	// 200 replayed: false
	// 200 replayed: true
}

// Some APIs answer 409 to another payload under a key, as the Universal Commerce
// Protocol does. The code of the error stays key_reused, which tells it from a
// request that is still running.
func ExampleOptions_errorHandlerConflict() {
	opts := &idempotency.Options{
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err *idempotency.Error) {
			answer := *err // the Event of the request has the Error too
			if errors.Is(err, idempotency.ErrKeyReused) {
				answer.Status = http.StatusConflict
			}
			idempotency.WriteError(w, r, &answer)
		},
	}
	h := idempotency.Middleware(idempotency.NewMemoryStore(), opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusCreated)
	}))

	for _, body := range []string{`{"amount":100}`, `{"amount":200}`} {
		r := httptest.NewRequest("POST", "/checkout-sessions", strings.NewReader(body))
		r.Header.Set("Idempotency-Key", "a")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Header().Get("Content-Type"))
	}
	// Output:
	// 201 text/plain
	// 409 application/problem+json
}

// Some clients take a 409 for final, whatever its Retry-After says: urllib3 and
// go-retryablehttp do. Both repeat a request that is answered 503 with
// Retry-After, urllib3 only if it is told to repeat a POST.
func ExampleOptions_errorHandlerUnavailable() {
	opts := &idempotency.Options{
		Wait: idempotency.NoWait,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err *idempotency.Error) {
			answer := *err // the Event of the request has the Error too
			if errors.Is(err, idempotency.ErrInProgress) {
				answer.Status = http.StatusServiceUnavailable
			}
			idempotency.WriteError(w, r, &answer)
		},
	}
	var h http.Handler
	post := func(who string) {
		r := httptest.NewRequest("POST", "/charge", nil)
		r.Header.Set("Idempotency-Key", "a")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(who, w.Code, "Retry-After:", w.Header().Get("Retry-After"))
	}
	h = idempotency.Middleware(idempotency.NewMemoryStore(), opts)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		post("while it is running:") // a client that does not wait for the first answer
	}))
	post("the first:")
	// Output:
	// while it is running: 503 Retry-After: 1
	// the first: 200 Retry-After:
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

// Each service on a Redis has a Prefix of its own. With one prefix, an event
// that a dispatcher sends to two services would run in one of them only, and a
// gateway that passes a request on with its key would hold that key itself.
func ExampleNewRedisStore() {
	client := redis.NewUniversalClient(&redis.UniversalOptions{
		Addrs:                 []string{"redis:6379"},
		ContextTimeoutEnabled: true,
	})
	store := idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "shop:"})
	err := store.Check(context.Background())
	switch {
	case errors.Is(err, idempotency.ErrEvictionUnknown):
		log.Print(err) // the operator has looked at the policy where the Redis is rented
	case err != nil:
		log.Fatal(err)
	}
	http.Handle("POST /charge", idempotency.Middleware(store, nil)(http.NotFoundHandler()))
}
