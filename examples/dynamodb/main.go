// Command dynamodb serves an API whose keys are in a DynamoDB table, so that any
// number of replicas can share them.
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
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/go-idempotency/idempotency"
)

// maxResponse leaves room for 64 KiB of headers and the other attributes in an
// item, which DynamoDB limits to 400 KB. The middleware streams a larger response
// and stores that it did not keep it, without sending it to DynamoDB first.
const maxResponse = 320 << 10

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "the address to serve on")
	table := flag.String("table", "charges-idempotency", "the table of this service")
	create := flag.Bool("create", false, "create the table")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program at once
	if err := run(ctx, *addr, *table, *create); err != nil {
		log.Fatal(err)
	}
}

// newStore takes the region, the credentials and the endpoint from the
// environment, as all programs that use the SDK do.
func newStore(ctx context.Context, table string, create bool) (*Store, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, err
	}
	client := NewClient(cfg)
	if create {
		if err := CreateTable(ctx, client, table); err != nil {
			return nil, err
		}
		if err := DeleteExpired(ctx, client, table); err != nil {
			log.Print("expired items stay in the table: ", err) // they do in some imitations of DynamoDB
		}
	}
	store := NewStore(client, table, nil)
	if _, err := store.Inspect(ctx, "start"); err != nil { // or every request would get 503
		return nil, fmt.Errorf("cannot read the table %s (-create makes it): %w", table, err)
	}
	return store, nil
}

func newHandler(store idempotency.Store, background *idempotency.Background, charge http.Handler) http.Handler {
	once := idempotency.Middleware(store, &idempotency.Options{
		RequireKey: true, MaxResponseBytes: maxResponse, Background: background,
	})
	mux := http.NewServeMux()
	mux.Handle("POST /charge", once(charge))
	return mux
}

// charge stands for the handler of a service.
func charge(w http.ResponseWriter, _ *http.Request) {
	log.Print("charging")
	w.WriteHeader(http.StatusCreated)
	if _, err := fmt.Fprintln(w, "charged at", time.Now().Format(time.RFC3339Nano)); err != nil {
		log.Print(err)
	}
}

// run serves on addr until ctx ends.
func run(ctx context.Context, addr, table string, create bool) error {
	store, err := newStore(ctx, table, create)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	background := new(idempotency.Background)
	server := &http.Server{Handler: newHandler(store, background, http.HandlerFunc(charge))}
	fmt.Printf("Try this twice:\n  curl -i http://%s/charge -H 'Idempotency-Key: order-17' -d amount=100\n", listener.Addr())
	stopped := make(chan error, 1)
	go func() { stopped <- server.Serve(listener) }()
	select {
	case <-ctx.Done():
	case err = <-stopped:
	}
	return errors.Join(err, shutDown(server, background))
}

// shutDown lets running requests finish, and then waits for answers that are
// not stored yet, if the store was away for a moment.
func shutDown(server *http.Server, background *idempotency.Background) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	err := server.Shutdown(ctx)
	ctx, cancel = context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(err, background.Wait(ctx))
}
