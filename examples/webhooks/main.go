// Command webhooks receives events and handles each of them once, however often
// it is delivered. It shows a sender whose key is in a header (Standard
// Webhooks), one whose key is in the body (Stripe), and signatures that are
// checked before a request can hold a key.
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

	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
)

// usage has commands for the operator that sign as the senders do.
const usage = `Deliver each of these twice, from a shell that has the same variables:

  t=$(date +%%s); body='{"id":"evt_1","type":"invoice.paid","data":{}}'
  curl -i http://%[1]s/webhooks/stripe -d "$body" -H "Stripe-Signature: t=$t,v1=$(
    printf %%s "$t.$body" | openssl dgst -sha256 -r -hmac "$STRIPE_SECRET" | cut -d' ' -f1)"

  t=$(date +%%s); body='{"type":"invoice.paid","data":{}}'
  key=$(printf %%s "${STANDARD_SECRET#whsec_}" | base64 -d | od -An -vtx1 | tr -d ' \n')
  curl -i http://%[1]s/webhooks/standard -d "$body" -H "webhook-id: msg_1" -H "webhook-timestamp: $t" \
    -H "webhook-signature: v1,$(printf %%s "msg_1.$t.$body" |
      openssl dgst -sha256 -binary -mac HMAC -macopt "hexkey:$key" | base64)"
`

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "the address to serve on")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program at once
	if err := run(ctx, *addr); err != nil {
		log.Fatal(err)
	}
}

// newReceiver reads the secrets of the senders.
func newReceiver(getenv func(string) string) (*receiver, error) {
	key, err := standardKey(getenv("STANDARD_SECRET"))
	if err != nil || getenv("STRIPE_SECRET") == "" {
		return nil, errors.Join(err, errors.New(`the secrets are missing; for a try, set them to random ones:
  export STRIPE_SECRET=whsec_$(openssl rand -hex 24)
  export STANDARD_SECRET=whsec_$(openssl rand -base64 24)`))
	}
	return &receiver{
		stripe:   sender{name: "stripe", keys: [][]byte{stripeKey(getenv("STRIPE_SECRET"))}},
		standard: []sender{{name: "acme", keys: [][]byte{key}}},
		process: func(_ context.Context, key string, e event) error {
			log.Printf("handling %s under the key %s", e.Type, key)
			return nil
		},
	}, nil
}

// newStore returns a Redis store when REDIS_ADDR is set. The memory store
// forgets all events when the program ends, and a delivery that comes later is
// handled again, so it is for a try only.
func newStore(ctx context.Context, redisAddr string) (idempotency.Store, error) {
	if redisAddr == "" {
		return idempotency.NewMemoryStore(), nil
	}
	client := redis.NewClient(&redis.Options{Addr: redisAddr, ContextTimeoutEnabled: true})
	store := newRedisStore(client, "billing")
	err := store.Check(ctx)
	if errors.Is(err, idempotency.ErrEvictionUnknown) {
		log.Print(err)
		err = nil
	}
	return store, err
}

// run serves on addr until ctx ends.
func run(ctx context.Context, addr string) error {
	rec, err := newReceiver(os.Getenv)
	if err != nil {
		return err
	}
	store, err := newStore(ctx, os.Getenv("REDIS_ADDR"))
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	background := new(idempotency.Background)
	server := &http.Server{
		Handler:     newHandler(store, background, rec),
		ReadTimeout: 10 * time.Second, // a stranger may send a body, but not slowly
	}
	fmt.Printf(usage, listener.Addr())
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
