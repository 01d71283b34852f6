package postgres_test

import (
	"context"
	"log"
	"net/http"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The handler's row and the response are committed in one transaction.
func Example() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, "postgres://localhost/shop")
	if err != nil {
		log.Fatal(err)
	}
	store := postgres.NewStore(pool, nil)
	if err := store.Migrate(ctx); err != nil {
		log.Fatal(err)
	}
	create := func(ctx context.Context) error {
		tx, err := store.Begin(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback(ctx) }()
		if _, err := tx.Exec(ctx, `INSERT INTO orders (item) VALUES ('tea')`); err != nil {
			return err
		}
		tx.AfterCommit(func(context.Context) { log.Print("there is an order") })
		return tx.Commit(ctx)
	}
	idempotent := idempotency.Middleware(store, &idempotency.Options{RequireKey: true})
	http.Handle("POST /orders", idempotent(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := create(r.Context()); err != nil {
			http.Error(w, "try again later", http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})))
	log.Fatal(http.ListenAndServe("127.0.0.1:8080", nil))
}
