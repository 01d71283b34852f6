// Command customstore takes orders into a SQLite database that also keeps the
// idempotency records. An order and the response to it are committed in one
// transaction, so that a crash at any moment leaves both or neither. The part
// to copy is store.go.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
	_ "modernc.org/sqlite" // the driver "sqlite", in pure Go
)

type order struct {
	ID       int64  `json:"id"`
	Item     string `json:"item"`
	Quantity int    `json:"quantity"`
}

type orders struct {
	db    *sql.DB
	store *Store
}

const ordersTable = `
	CREATE TABLE IF NOT EXISTS orders (
		id       INTEGER PRIMARY KEY AUTOINCREMENT,
		item     TEXT NOT NULL,
		quantity INTEGER NOT NULL
	)`

// newHandler makes the tables, if need be, and the API. A zero lease is the
// library's default.
func newHandler(ctx context.Context, db *sql.DB, lease time.Duration, background *idempotency.Background) (http.Handler, error) {
	store, err := NewStore(ctx, db)
	if err != nil {
		return nil, err
	}
	if _, err := db.ExecContext(ctx, ordersTable); err != nil {
		return nil, err
	}
	o := &orders{db, store}
	idempotent := idempotency.Middleware(store, &idempotency.Options{
		RequireKey: true,
		Lease:      lease,
		Background: background,

		// A handler that hangs in its transaction keeps all other requests from
		// writing. MaxExecution cancels its context, which rolls the transaction
		// back.
		MaxExecution: 10 * time.Second,
	})
	mux := http.NewServeMux()
	mux.Handle("POST /orders", idempotent(http.HandlerFunc(o.create)))
	mux.HandleFunc("GET /orders", o.list)
	return mux, nil
}

// create inserts an order on a transaction that the store commits together
// with the response.
func (o *orders) create(w http.ResponseWriter, r *http.Request) {
	ord := order{Item: r.PostFormValue("item")}
	var err error
	if ord.Quantity, err = strconv.Atoi(r.PostFormValue("quantity")); err != nil || ord.Item == "" || ord.Quantity <= 0 {
		http.Error(w, "an order needs an item and a quantity", http.StatusUnprocessableEntity)
		return
	}

	// Slow work belongs here. From Begin on no other transaction can write, not
	// even that of the store which renews this request's lease.
	tx, err := o.store.Begin(r.Context())
	if err != nil {
		unavailable(w, err)
		return
	}
	defer func() { _ = tx.Rollback() }() // without effect after Commit
	res, err := tx.ExecContext(r.Context(), `INSERT INTO orders (item, quantity) VALUES ($1, $2)`, ord.Item, ord.Quantity)
	if err == nil {
		ord.ID, err = res.LastInsertId()
	}
	if err == nil {
		err = tx.Commit() // hands tx over: the store commits it with the response
	}
	if err != nil {
		unavailable(w, err)
		return
	}
	writeJSON(w, http.StatusCreated, ord)
}

// list waits for the writer, because there is one connection. A service that
// reads a lot opens the file a second time for reading: in WAL mode readers do
// not wait.
func (o *orders) list(w http.ResponseWriter, r *http.Request) {
	rows, err := o.db.QueryContext(r.Context(), `SELECT id, item, quantity FROM orders ORDER BY id`)
	if err != nil {
		unavailable(w, err)
		return
	}
	defer rows.Close()
	all := []order{}
	for rows.Next() {
		var ord order
		if err := rows.Scan(&ord.ID, &ord.Item, &ord.Quantity); err != nil {
			unavailable(w, err)
			return
		}
		all = append(all, ord)
	}
	if err := rows.Err(); err != nil {
		unavailable(w, err)
		return
	}
	writeJSON(w, http.StatusOK, all)
}

// unavailable answers 503, which frees the key: nothing was committed.
func unavailable(w http.ResponseWriter, err error) {
	log.Print("database: ", err)
	w.Header().Set("Retry-After", "1")
	http.Error(w, "try again later", http.StatusServiceUnavailable)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Print("response: ", err)
	}
}

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to listen on")
	path := flag.String("db", filepath.Join(os.TempDir(), "orders.db"), "SQLite database; made if it is not there")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt ends the program at once
	if err := run(ctx, "sqlite", *path, *addr, 0); err != nil {
		log.Fatal(err)
	}
}

// run serves the API until ctx ends.
func run(ctx context.Context, driver, path, addr string, lease time.Duration) error {
	db, err := Open(driver, path)
	if err != nil {
		return err
	}
	defer db.Close()
	background := new(idempotency.Background)
	handler, err := newHandler(ctx, db, lease, background)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	url := "http://" + ln.Addr().String() + "/orders"
	try := "\n  curl -i " + url + " -H 'Idempotency-Key: order-17' -d item=tea -d quantity="
	fmt.Println("The database is " + path)
	fmt.Println("The first request is executed:" + try + "2")
	fmt.Println("The same again is replayed, also after a kill -9 and a restart:" + try + "2")
	fmt.Println("Another body under the same key is refused with 422:" + try + "9")
	fmt.Println("So this lists one order:\n  curl " + url)

	srv := &http.Server{Handler: handler}
	stopped := make(chan error, 1)
	context.AfterFunc(ctx, func() { stopped <- shutDown(background, srv) })
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
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
