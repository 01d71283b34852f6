// Command quickstart charges once, however often the same request arrives.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
)

func newHandler(background *idempotency.Background) http.Handler {
	var with, without atomic.Int64 // charges with the middleware, and without it
	idempotent := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background})
	mux := http.NewServeMux()
	mux.Handle("POST /charge", loseAnswers(idempotent(charge(&with))))
	mux.Handle("POST /unprotected/charge", loseAnswers(charge(&without)))
	mux.HandleFunc("GET /{$}", servePage)
	mux.HandleFunc("GET /charges", showCharges(&with, &without))
	return mux
}

func charge(charges *atomic.Int64) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		amount, err := strconv.Atoi(r.PostFormValue("amount"))
		if err != nil || amount <= 0 {
			http.Error(w, "amount must be a positive number", http.StatusBadRequest)
			return
		}
		id := charges.Add(1) // the effect that must happen once
		w.WriteHeader(http.StatusCreated)
		if _, err := fmt.Fprintf(w, "charge %d: %d\n", id, amount); err != nil {
			log.Print(err)
		}
	}
}

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to listen on")
	flag.Parse()
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		log.Fatal(err) // the port may be in use
	}
	try := "\n  curl -i http://" + ln.Addr().String() + "/charge -H 'Idempotency-Key: order-17' -d amount="
	fmt.Println("The first request is executed:" + try + "100")
	fmt.Println("The same again is replayed, with Idempotent-Replayed: true:" + try + "100")
	fmt.Println("Another body under the same key is refused with 422:" + try + "999")
	fmt.Println("In a browser, with and without the middleware:\n  http://" + ln.Addr().String() + "/")

	background := new(idempotency.Background)
	srv := &http.Server{Handler: newHandler(background)}
	stopped := make(chan error, 1)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(interrupted, func() {
		stop() // a second interrupt ends the program at once
		stopped <- shutDown(background, srv)
	})
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
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
