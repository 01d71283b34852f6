package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/go-idempotency/idempotency"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A Tx is a transaction of a handler, and a [pgx.Tx] that is used as any other.
// [Store.Begin] makes one. Like any pgx.Tx it is for one goroutine at a time, and
// it must not be copied.
type Tx struct {
	pgx.Tx // of conn
	store  *Store
	exec   *idempotency.Execution // nil: the transaction commits itself
	conn   *pgxpool.Conn
	stop   func() bool // stops following the context of Begin, or of the run

	mu    sync.Mutex // guards what follows
	state txState
	after []func(context.Context)
}

var _ pgx.Tx = (*Tx)(nil)

// A txState says who may use the connection: only the one that has changed the
// state away from txOpen or txHandedOver may end the transaction.
type txState uint8

const (
	txOpen       txState = iota // the handler
	txHandedOver                // the next Complete or Release
	txEnded                     // no one: the connection is given back or closed
)

// Begin begins a transaction for a handler. ctx is the context of the request,
// or one made from it. A handler uses the transaction as any other:
//
//	tx, err := store.Begin(r.Context())
//	if err != nil { ... }
//	defer tx.Rollback(r.Context())
//	// statements on tx
//	return tx.Commit(r.Context())
//
// With an [idempotency.Execution] in ctx, Commit hands the transaction over, and
// the store commits it together with the response when the handler has
// returned. So the rows and the response are there, or neither. What the handler
// does between Commit and its return comes before the real commit. See
// [Tx.AfterCommit] for what must come after it.
//
// Nothing is written when the handler does not call Commit, panics, calls
// Discard, or answers with a status that frees the key. Nothing is written
// either when the claim went to another owner or PostgreSQL refuses the commit.
// The client then gets 409 or 503, and not the handler's response. When the
// connection breaks during the commit, the store looks for the response. If it
// cannot, the client gets 503, and its retry finds out.
//
// Commit commits at once without an Execution, which is a request without a
// key, and in a run that is not protected ([idempotency.Options.FailOpen]). A
// transaction that only reads ([pgx.ReadOnly]) is committed at once too.
//
// A gin.Context and a fiber.Ctx are contexts without the values of the request,
// so Commit commits at once there too, although the request has a key. If the
// process then dies before the response is stored, a retry commits again. A
// handler passes c.Request.Context() of gin, and c.Context() of fiber.
//
// The middleware must use this store, perhaps wrapped: another one does not
// commit the transaction. Where handlers change the search_path or the role of a
// transaction, set [Options.Schema], and let the role write to the table.
// Otherwise the store does not find the claim there, and commits nothing.
//
// The transaction is rolled back when ctx ends before Commit, as in
// database/sql, and after Commit when the request ends without a result. Its
// connection is closed then.
func (s *Store) Begin(ctx context.Context) (*Tx, error) { return s.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx is Begin with options. On a level above READ COMMITTED PostgreSQL
// refuses the commit when the row of the claim was written since the snapshot of
// the transaction: by a renewal, or for the first duplicate that waits. So
// handlers there must be done within a third of the lease, and a client that
// repeats its request too early may get 503.
func (s *Store) BeginTx(ctx context.Context, opts pgx.TxOptions) (*Tx, error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	inner, err := conn.BeginTx(ctx, opts)
	if err != nil {
		conn.Release()
		return nil, err
	}
	t := &Tx{Tx: inner, store: s, conn: conn}
	if exec, ok := idempotency.FromContext(ctx); ok && exec.Protected() && opts.AccessMode != pgx.ReadOnly {
		t.exec = exec
	}
	t.stop = context.AfterFunc(ctx, t.abandon)
	return t, nil
}

// attached returns the transaction that the handler has handed over, or nil.
func (s *Store) attached(ctx context.Context) *Tx {
	exec, ok := idempotency.FromContext(ctx)
	if !ok {
		return nil
	}
	tx, _ := exec.Attachment().(*Tx)
	if tx == nil || tx.store != s {
		return nil
	}
	return tx
}

// AfterCommit has f called when the transaction is committed, and otherwise not
// at all. The response waits for f, and f gets a context with the values of the
// request that is not cancelled. f may not be called after a commit if the
// process dies or the connection breaks. A message that must not be missed
// belongs in a table, on the transaction (an outbox). A panic of f is logged.
func (t *Tx) AfterCommit(f func(ctx context.Context)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.after = append(t.after, f)
}

// move changes the state, if it is from.
func (t *Tx) move(from, to txState) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != from {
		return false
	}
	t.state = to
	return true
}

// ErrSecondCommit is what [Tx.Commit] returns when the handler has handed over
// another transaction before. The second one is rolled back: two transactions
// cannot be committed as one.
var ErrSecondCommit = errors.New("postgres: the request has another transaction already")

// Commit hands the transaction over to the store. See [Store.Begin]. After an
// error of a statement it rolls back and returns [pgx.ErrTxCommitRollback], as
// every pgx.Tx does. It also rolls back, and returns an error, when the handler
// has returned already. Without an Execution it commits.
func (t *Tx) Commit(ctx context.Context) error {
	if t.exec == nil {
		if !t.move(txOpen, txEnded) {
			return pgx.ErrTxClosed
		}
		err := t.Tx.Commit(ctx)
		t.end()
		if err == nil {
			t.committed(ctx)
		}
		return err
	}
	switch {
	case t.isClosed():
		return pgx.ErrTxClosed
	case ctx.Err() != nil:
		return errors.Join(ctx.Err(), t.rollBackInstead(ctx))
	case t.Conn().PgConn().TxStatus() != 'T':
		return errors.Join(pgx.ErrTxCommitRollback, t.rollBackInstead(ctx))
	}
	if err := t.handOver(); err != nil {
		return errors.Join(err, t.rollBackInstead(ctx))
	}
	return nil
}

// errTooLate is what Commit returns in a goroutine that outlives its handler.
// The response may be stored by then, so no one would commit the transaction.
var errTooLate = errors.New("postgres: Tx.Commit after the handler returned; begin it with a context without the Execution")

// handOver attaches the transaction. From then on it ends with the run. The
// context of Begin is often cancelled as soon as Commit has returned, by a
// function that has limited its time.
func (t *Tx) handOver() error {
	t.store.attaching.Lock()
	defer t.store.attaching.Unlock()
	if t.exec.Attachment() != nil {
		return ErrSecondCommit
	}
	if !t.stop() { // the context of Begin has ended, and abandon is running
		return pgx.ErrTxClosed
	}
	t.stop = context.AfterFunc(t.exec.Context(), t.abandon)
	t.move(txOpen, txHandedOver)
	t.exec.Attach(t)
	if t.exec.Attachment() != any(t) {
		t.move(txHandedOver, txOpen) // for the rollback, unless abandon has ended it
		return errTooLate
	}
	return nil
}

// rollBackInstead rolls back for Commit. A transaction whose context has ended
// meanwhile is rolled back already.
func (t *Tx) rollBackInstead(ctx context.Context) error {
	if err := t.Rollback(ctx); !errors.Is(err, pgx.ErrTxClosed) {
		return err
	}
	return nil
}

// Rollback rolls the transaction back. After Commit it does nothing and returns
// [pgx.ErrTxClosed].
func (t *Tx) Rollback(ctx context.Context) error {
	if !t.move(txOpen, txEnded) {
		return pgx.ErrTxClosed
	}
	defer t.end()
	return t.Tx.Rollback(ctx)
}

// end gives the connection back. The pool drops it if it is broken.
func (t *Tx) end() {
	t.stop()
	t.conn.Release()
}

// abandon ends the transaction when its context has ended. The handler may still
// be using the connection, so abandon touches nothing of it but the socket, and
// PostgreSQL rolls back what the socket leaves behind.
func (t *Tx) abandon() {
	open := t.move(txOpen, txEnded)
	if !open && !t.move(txHandedOver, txEnded) {
		return
	}
	conn := t.conn.Hijack()
	_ = conn.PgConn().Conn().Close()
	if !open {
		slog.Warn("postgres: a transaction is rolled back after Tx.Commit: its request ended without a result. " +
			"If its handler had answered, the middleware has another store.")
	}
}

// undo rolls back for Release.
func (t *Tx) undo(ctx context.Context) {
	if t.move(txHandedOver, txEnded) {
		_ = t.Tx.Rollback(ctx) // when it fails, the connection is closed, which rolls back
		t.end()
	}
}

// complete stores the response on the transaction and commits it.
func (t *Tx) complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if !t.move(txHandedOver, txEnded) {
		return errors.Join(idempotency.ErrRolledBack, pgx.ErrTxClosed)
	}
	fresh, err := t.store.complete(ctx, t.Tx, key, token, r)
	if err == nil && fresh {
		err = errNoClaim
	}
	if err != nil {
		_ = t.Tx.Rollback(ctx)
		t.end()
		return errors.Join(idempotency.ErrRolledBack, err)
	}
	err = t.Tx.Commit(ctx)
	t.end()
	if err == nil {
		err = ctx.Err() // see replicatedRow.Scan
	}
	if err != nil {
		err = t.findOut(ctx, key, token, err)
	}
	if err == nil {
		t.committed(ctx)
	}
	return err
}

// errNoClaim is why a transaction is rolled back whose statements do not reach
// the cell that the request has claimed. A response in another table would not
// keep a retry from running.
var errNoClaim = errors.New("postgres: the claim is not there in the transaction; " +
	"set Options.Schema if handlers change the search_path")

// findOut asks what became of a commit that failed. The answer may be lost, and
// an error tells little: a server that shuts down sends one after the commit,
// and so does a pooler that has lost the server. The transaction holds a lock on
// its cell until it has ended, so the statement waits for that. An answer is
// final then. Without an answer the outcome is not known.
func (t *Tx) findOut(ctx context.Context, key, token string, lost error) error {
	own, err := t.store.conns()
	if err != nil {
		return errors.Join(lost, err)
	}
	var found cell
	for range maxTries {
		err = own.QueryRow(ctx, t.store.sql.owner, key).Scan(&found.state, &found.token)
		if !isRace(err) { // with the end of the transaction that it has waited for
			break
		}
	}
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return lost // the cell has expired and is deleted, so it tells nothing
	case err != nil:
		return errors.Join(lost, err)
	case found.state == completed && found.token == token:
		return nil
	case found.state == claimed && found.token == token:
		return errors.Join(idempotency.ErrRolledBack, lost)
	}
	return lost
}

// committed calls the functions of AfterCommit. A panic must not become an error
// of Complete: the client would be told that nothing was done.
func (t *Tx) committed(ctx context.Context) {
	t.mu.Lock()
	after := t.after
	t.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	for _, f := range after {
		func() {
			defer func() {
				if v := recover(); v != nil {
					slog.ErrorContext(ctx, "postgres: a function of AfterCommit panicked", "panic", fmt.Sprint(v))
				}
			}()
			f(ctx)
		}()
	}
}
