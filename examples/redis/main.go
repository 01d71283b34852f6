// Command redis runs replicas of one service that share a store in Redis. A
// request is executed once, and every replica answers a retry with the same
// response.
//
// By default two replicas run in this process, each with a Redis client and a
// store of its own, as on two machines. With one address in -listen the process
// is a single replica; start as many of them as you like.
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
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
)

// A replica has what the handler needs.
type replica struct {
	name   string
	client *redis.Client
	work   time.Duration
}

// newClient returns a client with the settings that matter to a store.
func newClient(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: addr,

		// Without it go-redis ignores the deadline of a call, and a Redis that
		// hangs would hold every request for seconds instead of StoreTimeout.
		ContextTimeoutEnabled: true,

		// This is the default, and enough for most services. A request holds a
		// connection only during its round trips: two for a first execution,
		// one for a replay. It holds none while the handler runs or while a
		// duplicate waits. So 5000 first executions a second, with round trips
		// of 1 ms, have 10 connections in use. Look at PoolStats().Timeouts
		// before you raise it.
		PoolSize: 10 * runtime.GOMAXPROCS(0),
	})
}

// newStore has a Prefix of this service. Another service on the same Redis needs
// another one: with one prefix, an event that is sent to both runs in one of
// them only, and a request that one passes on to the other with its key meets a
// key that is taken.
func newStore(client redis.UniversalClient) *idempotency.RedisStore {
	return idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "charges:"})
}

func newHandler(rep *replica, lease time.Duration, background *idempotency.Background) http.Handler {
	store := newStore(rep.client)
	idempotent := idempotency.Middleware(store, &idempotency.Options{Lease: lease, RequireKey: true, Background: background})
	mux := http.NewServeMux()
	mux.Handle("POST /charge", idempotent(http.HandlerFunc(rep.charge)))
	return mux
}

// ledger is a Redis list of all charges, by key and attempt. It stands for the
// effect that must happen once, at a payment provider say.
const ledger = "charges"

// charge has its effect first and takes its time afterwards. A replica that is
// killed in between has charged and not answered. A retry takes the key over
// when its lease is over, and attempt 2 charges again. So it does after an error
// of the provider: the charge may have happened and its answer be lost, and the
// 502 frees the key. To prevent both, use [idempotency.Execution.Commit] or
// DownstreamKey; the chi example shows both.
func (rep *replica) charge(w http.ResponseWriter, r *http.Request) {
	exec, ok := idempotency.FromContext(r.Context())
	if !ok {
		http.Error(w, "no idempotency middleware", http.StatusInternalServerError)
		return
	}
	amount, err := strconv.Atoi(r.PostFormValue("amount"))
	if err != nil || amount <= 0 {
		http.Error(w, "amount must be a positive number", http.StatusBadRequest)
		return
	}
	entry := fmt.Sprintf("%s attempt %d", exec.Key(), exec.Attempt())
	number, err := rep.client.RPush(r.Context(), ledger, entry).Result()
	if err != nil {
		log.Print("charge: ", err)
		http.Error(w, "payment provider unavailable", http.StatusBadGateway)
		return
	}
	select {
	case <-time.After(rep.work):
	case <-r.Context().Done(): // after MaxExecution, or when the lease is lost
	}
	w.WriteHeader(http.StatusCreated)
	if _, err := fmt.Fprintf(w, "charge %d: %d, by %s\n", number, amount, rep.name); err != nil {
		log.Print(err)
	}
}

// checkRedis returns an error if Redis cannot be reached or is not fit for a
// store. The error says how to start a Redis.
func checkRedis(ctx context.Context, addr string) error {
	client := newClient(addr)
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := client.Ping(ctx).Err(); err != nil {
		return fmt.Errorf(`no Redis at %s: %w
start one with one of
  redis-server --port 6379 --appendonly yes
  docker run --rm -p 127.0.0.1:6379:6379 redis:7 redis-server --appendonly yes
or say in REDIS_ADDR where it is, as host:port`, addr, err)
	}
	err := newStore(client).Check(ctx)
	if errors.Is(err, idempotency.ErrEvictionUnknown) {
		log.Print(err)
		return nil
	}
	return err
}

func main() {
	listen := flag.String("listen", "127.0.0.1:8081,127.0.0.1:8082", "addresses, one replica for each")
	lease := flag.Duration("lease", 30*time.Second, "how long a claim outlives a replica that died")
	work := flag.Duration("work", 200*time.Millisecond, "how long a charge takes")
	flag.Parse()
	addr := os.Getenv("REDIS_ADDR")
	if addr == "" {
		addr = "127.0.0.1:6379"
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program at once
	if err := run(ctx, addr, strings.Split(*listen, ","), *lease, *work); err != nil {
		log.Fatal(err)
	}
}

// run serves one replica on each of the addresses until ctx ends.
func run(ctx context.Context, redisAddr string, addrs []string, lease, work time.Duration) (err error) {
	if err := checkRedis(ctx, redisAddr); err != nil {
		return err
	}
	background := new(idempotency.Background) // of all replicas in this process
	var servers []*http.Server
	var urls []string
	stopped := make(chan error, len(addrs))
	for _, addr := range addrs {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return err // the program ends, and its other listeners with it
		}
		client := newClient(redisAddr)
		defer client.Close()
		rep := &replica{name: ln.Addr().String(), client: client, work: work}
		server := &http.Server{Handler: newHandler(rep, lease, background)}
		servers, urls = append(servers, server), append(urls, "http://"+rep.name+"/charge")
		go func() { stopped <- server.Serve(ln) }()
	}
	suggest(urls)
	select {
	case <-ctx.Done():
	case err = <-stopped:
	}
	return errors.Join(err, shutDown(background, servers...))
}

// suggest prints commands to try.
func suggest(urls []string) {
	const data = " -H 'Idempotency-Key: order-17' -d amount="
	first, last := "\n  curl -i "+urls[0]+data, "\n  curl -i "+urls[len(urls)-1]+data
	fmt.Println("The first request is executed:" + first + "100")
	fmt.Println("The same at another replica is replayed, with Idempotent-Replayed: true:" + last + "100")
	fmt.Println("Another body under the same key is refused with 422, by both:" + last + "999")
	fmt.Println("Two at once: one is executed, the other waits for its answer:" +
		strings.ReplaceAll(first+"100 &"+last+"100; wait", "order-17", "order-18"))
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
