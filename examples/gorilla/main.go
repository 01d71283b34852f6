// Command gorilla is a small order API behind gorilla/mux that insists on keys,
// and on UUIDs as keys.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/gorilla/mux"
)

// newHandler applies the middleware to the subrouter of orders only. The router
// runs middleware only for requests that match a route, so its own 404 and 405
// claim no key.
func newHandler(store idempotency.Store, background *idempotency.Background) http.Handler {
	s := &orders{byID: map[string]order{}}
	r := mux.NewRouter()
	r.HandleFunc("/ping", ping).Methods(http.MethodPost)

	sub := r.PathPrefix("/orders").Subrouter()
	sub.Use(idempotency.Middleware(store, &idempotency.Options{
		RequireKey:  true,
		ValidateKey: uuidOnly,
		Background:  background,
	}))
	sub.HandleFunc("", s.create).Methods(http.MethodPost)
	sub.HandleFunc("/{id}", s.get).Methods(http.MethodGet) // a GET needs no key
	sub.HandleFunc("/{id}/items", s.addItem).Methods(http.MethodPost)
	return r
}

var uuid = regexp.MustCompile(`^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$`)

// uuidOnly refuses keys that are not random, such as an order number, which
// another client may use as well. The client sees the text of the error.
func uuidOnly(key string) error {
	if !uuid.MatchString(key) {
		return errors.New("the key must be a UUID")
	}
	return nil
}

// orders keeps the orders in memory.
type orders struct {
	mu   sync.Mutex // guards byID
	byID map[string]order
}

type order struct {
	ID    string   `json:"id"`
	Items []string `json:"items"`
}

func (s *orders) create(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	o := order{ID: strconv.Itoa(len(s.byID) + 1), Items: []string{}}
	s.byID[o.ID] = o
	s.mu.Unlock()
	w.Header().Set("Location", "/orders/"+o.ID)
	writeJSON(w, http.StatusCreated, o)
}

// addItem would add the item once more on every retry, were it not for the key.
func (s *orders) addItem(w http.ResponseWriter, r *http.Request) {
	var item string
	if err := json.NewDecoder(r.Body).Decode(&item); err != nil {
		http.Error(w, "an item is a JSON string", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	o, ok := s.byID[mux.Vars(r)["id"]]
	if ok {
		o.Items = append(slices.Clone(o.Items), item) // another handler may be reading the old slice
		s.byID[o.ID] = o
	}
	s.mu.Unlock()
	answer(w, o, ok)
}

func (s *orders) get(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	o, ok := s.byID[mux.Vars(r)["id"]]
	s.mu.Unlock()
	answer(w, o, ok)
}

func answer(w http.ResponseWriter, o order, found bool) {
	if !found {
		http.Error(w, "no such order", http.StatusNotFound)
		return
	}
	writeJSON(w, http.StatusOK, o)
}

func ping(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, "pong") }

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Print("response: ", err)
	}
}

func main() {
	const addr = "127.0.0.1:8080"
	fmt.Println(`Try this twice:
  curl -i http://` + addr + `/orders -X POST -H 'Idempotency-Key: 0f0a1c1e-6a3f-4f0e-9a4e-2d8c4b1c7b11'`)

	background := new(idempotency.Background)
	srv := &http.Server{Addr: addr, Handler: newHandler(idempotency.NewMemoryStore(), background)}
	stopped := make(chan error, 1)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(interrupted, func() {
		stop() // a second interrupt ends the program at once
		stopped <- shutDown(background, srv)
	})
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	if err := <-stopped; err != nil {
		log.Fatal(err)
	}
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
