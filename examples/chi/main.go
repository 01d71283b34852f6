// Command chi is a small payment API behind chi. It shows the order of
// middleware, keys that belong to a user, and the two ways to make an effect
// outside this process safe: DownstreamKey for a service that knows idempotency
// keys, and Commit for one that does not.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/go-idempotency/idempotency"
)

// A server has what the handlers need.
type server struct {
	users    map[string]string // by token
	provider string            // URL of a payment provider that knows idempotency keys
	client   *http.Client      // for the provider

	// post prints a letter and hands it to the mail. A letter cannot be taken
	// back, and post does not know which letters it has posted before.
	post func(ctx context.Context, address string) error
}

// newHandler puts the middleware in this order, from the outside in:
//
//  1. Recoverer. A panic passes the idempotency middleware first, which treats
//     it as a crash: the key stays claimed for the rest of its lease. The client
//     gets a 500 rather than a broken connection.
//  2. CORS. Its headers are about the current request, so a replay must have
//     the CORS headers of the retry.
//  3. Authentication. A request that is refused must not claim a key, and Scope
//     needs the user.
//  4. Idempotency, right around the handlers and in a group. Around the whole
//     router it would also store the router's 404 for an unknown path.
func newHandler(store idempotency.Store, background *idempotency.Background, s *server) http.Handler {
	r := chi.NewRouter()
	r.Use(middleware.Recoverer, cors)
	r.Group(func(r chi.Router) {
		r.Use(s.authenticate)
		r.Use(idempotency.Middleware(store, &idempotency.Options{
			// The user's tokens may change between two tries; the user does not.
			Scope:      func(r *http.Request) string { return user(r.Context()) },
			RequireKey: true,
			Background: background,
		}))
		r.Post("/payments", s.pay)
		r.Post("/letters", s.sendLetter)
	})
	return r
}

type payment struct {
	Amount int    `json:"amount"`
	Charge string `json:"charge,omitempty"`
}

// pay has its effect at a provider that knows idempotency keys. So pay needs no
// Commit: when it fails or its process dies, the next attempt may run all of it
// again, because the provider gets the same key again.
func (s *server) pay(w http.ResponseWriter, r *http.Request) {
	exec, ok := idempotency.FromContext(r.Context())
	if !ok {
		http.Error(w, "no idempotency middleware", http.StatusInternalServerError)
		return
	}
	var p payment
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil || p.Amount <= 0 {
		http.Error(w, "amount must be a positive number", http.StatusUnprocessableEntity)
		return
	}
	charge, err := s.charge(r.Context(), exec.DownstreamKey("charge"), p.Amount)
	if err != nil {
		// The provider may have charged. A 5xx frees the key, so that the
		// client's next try asks the provider again.
		log.Printf("charge, attempt %d: %v", exec.Attempt(), err)
		http.Error(w, "payment provider unavailable", http.StatusBadGateway)
		return
	}
	p.Charge = charge
	writeJSON(w, http.StatusCreated, p)
}

// charge asks the provider for a charge and returns its id.
func (s *server) charge(ctx context.Context, key string, amount int) (string, error) {
	body, err := json.Marshal(payment{Amount: amount})
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.provider+"/charges", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	res, err := s.client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var p payment
	if res.StatusCode != http.StatusCreated {
		return "", fmt.Errorf("provider: %s", res.Status)
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, 64<<10)).Decode(&p); err != nil {
		return "", err
	}
	return p.Charge, nil
}

// sendLetter has an effect that a second call would repeat. It commits right
// before the effect, which makes the key at-most-once: after a crash in the
// middle, retries get 409 outcome_unknown, and no second letter is posted.
func (s *server) sendLetter(w http.ResponseWriter, r *http.Request) {
	exec, ok := idempotency.FromContext(r.Context())
	if !ok {
		http.Error(w, "no idempotency middleware", http.StatusInternalServerError)
		return
	}
	var letter struct {
		Address string `json:"address"`
	}
	if err := json.NewDecoder(r.Body).Decode(&letter); err != nil || letter.Address == "" {
		http.Error(w, "address is missing", http.StatusUnprocessableEntity)
		return
	}
	if err := exec.Commit(r.Context()); err != nil {
		// Nothing has happened yet, so the client may try again.
		log.Print("commit: ", err)
		http.Error(w, "try again later", http.StatusServiceUnavailable)
		return
	}
	if err := s.post(r.Context(), letter.Address); err != nil {
		// After Commit this 500 is stored and replayed: a letter may be on its
		// way.
		log.Print("post: ", err)
		http.Error(w, "the letter may not have been posted", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusCreated, letter)
}

type userKey struct{}

// user returns the name of the authenticated user. It is empty if authenticate
// did not run.
func user(ctx context.Context) string {
	name, _ := ctx.Value(userKey{}).(string)
	return name
}

func (s *server) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := s.users[r.Header.Get("Authorization")]
		if !ok {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), userKey{}, name)))
	})
}

// cors stands for the CORS middleware of your choice. It lets a page send the
// key, and lets the page see that an answer is a replay.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "https://shop.example")
		h.Set("Access-Control-Expose-Headers", "Idempotent-Replayed, Retry-After")
		if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
			h.Set("Access-Control-Allow-Methods", http.MethodPost)
			h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, Idempotency-Key")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Print("response: ", err)
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program at once
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

// run serves the provider and the API until ctx ends.
func run(ctx context.Context) error {
	providerListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		return errors.Join(err, providerListener.Close())
	}
	provider := &http.Server{Handler: newProvider()}
	background := new(idempotency.Background)
	api := &http.Server{Handler: newHandler(idempotency.NewMemoryStore(), background, &server{
		users:    map[string]string{"Bearer alice-token": "alice", "Bearer bob-token": "bob"},
		provider: "http://" + providerListener.Addr().String(),
		client:   &http.Client{Timeout: 10 * time.Second},
		post: func(_ context.Context, address string) error {
			log.Print("a letter goes to ", address)
			return nil
		},
	})}
	fmt.Println(`Try this twice:
  curl -i http://127.0.0.1:8080/payments -H 'Authorization: Bearer alice-token' \
    -H 'Idempotency-Key: order-17' -H 'Content-Type: application/json' -d '{"amount":100}'`)

	stopped := make(chan error, 2)
	go func() { stopped <- provider.Serve(providerListener) }()
	go func() { stopped <- api.Serve(listener) }()
	select {
	case <-ctx.Done():
	case err = <-stopped:
	}
	// The API first: its running requests may need the provider.
	return errors.Join(err, shutDown(background, api, provider))
}

// shutDown lets running requests finish, and then waits for what goes on after
// their answers: with a store that was away for a moment, responses that were
// sent and are not stored yet. By default Kubernetes kills a program that is
// still running 30 seconds after SIGTERM.
func shutDown(background *idempotency.Background, servers ...*http.Server) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for _, server := range servers {
		err = errors.Join(err, server.Shutdown(ctx))
	}
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(err, background.Wait(ctx))
}
