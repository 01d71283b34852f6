package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"
	"sync"

	"github.com/go-idempotency/idempotency"
)

// A Tx is a transaction of a handler, made by [Store.Begin]. It is used as any
// [sql.Tx]. What takes a *sql.Tx gets the field of that name, whose own Commit
// and Rollback are not for handlers.
type Tx struct {
	*sql.Tx
	db   *sql.DB                // of the transaction
	ctx  context.Context        // of Begin; the transaction is rolled back when it ends
	exec *idempotency.Execution // nil: the transaction commits itself

	mu    sync.Mutex // guards what follows
	ended bool       // for the handler, by Commit or Rollback
	after []func(context.Context)
}

// ErrSecondTx is what [Store.Begin] and [Tx.Commit] return when the request has
// handed over a transaction before. Two transactions cannot be committed as one.
var ErrSecondTx = errors.New("customstore: the request has handed over another transaction already")

// errTooLate is what [Tx.Commit] returns to a goroutine that goes on after its
// handler has returned: the store has committed what there was.
var errTooLate = errors.New("customstore: Tx.Commit after the handler returned; begin it with a context without the Execution")

// Begin begins a transaction for a handler, whose context ctx is. It reads as
// any other transaction:
//
//	tx, err := store.Begin(r.Context())
//	if err != nil { ... }
//	defer tx.Rollback()
//	// statements on tx
//	return tx.Commit()
//
// With an [idempotency.Execution] in ctx, Commit hands the transaction over, and
// the store commits it together with the response when the handler has returned.
// What the handler does between Commit and its return comes before the real
// commit. See [Tx.AfterCommit] for what must come after it.
//
// Nothing is written when the handler does not call Commit, panics, calls
// Discard, or answers with a status that frees the key. Nor is it when the claim
// went to another owner or the database refuses the commit: then the client gets
// 409 or 503, and not the handler's response.
//
// Without an Execution, in a request without a key, Commit commits. So it does in
// a run that is not protected ([idempotency.Options.FailOpen]).
//
// The deferred Rollback is needed even after an error that is answered with a
// final status. A transaction that is left open keeps SQLite's one connection, so
// the response cannot be stored until the transaction's context ends.
func (s *Store) Begin(ctx context.Context) (*Tx, error) {
	t := &Tx{db: s.db, ctx: ctx}
	if exec, ok := idempotency.FromContext(ctx); ok && exec.Protected() {
		t.exec = exec
		if exec.Attachment() != nil { // it keeps the connection, so BeginTx would wait for ever
			return nil, ErrSecondTx
		}
	}
	var err error
	t.Tx, err = s.db.BeginTx(ctx, nil)
	return t, err
}

// AfterCommit has f called when the transaction is committed, and otherwise not
// at all. The response waits for f, and f gets a context with the values of the
// request that is not cancelled. f is not called if the process dies after the
// commit, so a message that must not be missed belongs in a table, on the
// transaction (an outbox). A panic of f is logged.
func (t *Tx) AfterCommit(f func(ctx context.Context)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.after = append(t.after, f)
}

// end takes the transaction away from the handler. It reports whether the
// handler had it.
func (t *Tx) end() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	had := !t.ended
	t.ended = true
	return had
}

// Commit hands the transaction over to the store, or commits it where there is
// no Execution. See [Store.Begin].
func (t *Tx) Commit() error {
	if !t.end() {
		return sql.ErrTxDone
	}
	switch {
	case t.ctx.Err() != nil: // it is rolled back
		return t.ctx.Err()
	case t.exec == nil:
		err := t.Tx.Commit()
		if err == nil {
			t.committed(t.ctx)
		}
		return err
	case t.exec.Attachment() != nil:
		return errors.Join(ErrSecondTx, t.Tx.Rollback())
	}
	t.exec.Attach(t)
	if t.exec.Attachment() != any(t) {
		return errors.Join(errTooLate, t.Tx.Rollback())
	}
	return nil
}

// Rollback rolls the transaction back. After Commit it does nothing and returns
// [sql.ErrTxDone].
func (t *Tx) Rollback() error {
	if !t.end() {
		return sql.ErrTxDone
	}
	return t.Tx.Rollback()
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
					log.Print("customstore: a function of AfterCommit panicked: ", v)
				}
			}()
			f(ctx)
		}()
	}
}

// attached returns the transaction that the handler has handed over, or nil. Any
// other attachment is a mistake. Its transaction may have ended already, so the
// store cannot tell whether the handler's rows are there. attached ends it, since
// it may keep the connection. The error names the mistake, for the log.
func (s *Store) attached(ctx context.Context) (*Tx, error) {
	exec, ok := idempotency.FromContext(ctx)
	if !ok {
		return nil, nil
	}
	switch v := exec.Attachment().(type) {
	case nil:
		return nil, nil
	case *Tx:
		if v.db == s.db {
			return v, nil
		}
		_ = v.Tx.Rollback()
		return nil, fmt.Errorf("%w: customstore: the handler's transaction is not on the database of the middleware's store",
			idempotency.ErrRolledBack)
	case interface{ Rollback() error }:
		if err := v.Rollback(); err != nil {
			return nil, fmt.Errorf("customstore: the handler attached a %T, and has ended it itself, with a deferred Rollback, say; "+
				"let it use Store.Begin, after whose Commit a Rollback does nothing: %w", v, err)
		}
	}
	return nil, fmt.Errorf("%w: customstore: the handler attached a %T; let it use Store.Begin and Commit instead of Attach",
		idempotency.ErrRolledBack, exec.Attachment())
}
