package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Open opens a database for a Store and the handlers that share it.
//
// SQLite has one writer at a time. With a single connection, the transactions of
// this process queue for it in order, and wait no longer than their contexts
// allow. With several connections they would poll for the lock. A transaction
// waits for other processes on this machine for the busy timeout, which is less
// than half of the default StoreTimeout. Every transaction takes the lock when it
// begins, so no other writer changes what it has read.
//
// synchronous(FULL) syncs each commit to the disk, so that a power failure does
// not take back an answer that a client has seen.
func Open(driver, path string) (*sql.DB, error) {
	db, err := sql.Open(driver, "file:"+(&url.URL{Path: path}).EscapedPath()+"?_txlock=immediate"+
		"&_pragma=busy_timeout(400)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err == nil {
		db.SetMaxOpenConns(1)
	}
	return db, err
}

// A Store is an [idempotency.Store] in a table of an SQL database.
//
// A handler that uses [Store.Begin] has its rows and the stored response committed
// together, or neither.
type Store struct{ db *sql.DB }

var _ idempotency.Store = (*Store)(nil)

// NewStore returns a store on db, which comes from Open, and makes its table.
func NewStore(ctx context.Context, db *sql.DB) (*Store, error) {
	_, err := db.ExecContext(ctx, schema)
	return &Store{db}, err
}

// All times are milliseconds. The clock is SQLite's, which is this machine's:
// the same for every process that can open the file.
const (
	schema = `
		CREATE TABLE IF NOT EXISTS idempotency (
			key         TEXT PRIMARY KEY,
			state       INTEGER NOT NULL,
			token       TEXT NOT NULL,
			attempt     INTEGER NOT NULL,
			once        BOOLEAN NOT NULL,
			fingerprint BLOB,
			value       BLOB,
			lease_end   INTEGER NOT NULL,
			expires     INTEGER NOT NULL
		);
		CREATE INDEX IF NOT EXISTS idempotency_expires ON idempotency (expires)`

	now = `CAST(round(1000 * unixepoch('subsec')) AS INTEGER)`

	selectCell = `
		SELECT state, token, attempt, once, fingerprint, value, lease_end - ` + now + `, expires - ` + now + `
		FROM idempotency WHERE key = $1 AND expires > ` + now

	upsertCell = `
		INSERT INTO idempotency (key, state, token, attempt, once, fingerprint, value, lease_end, expires)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8 + ` + now + `, $9 + ` + now + `)
		ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token,
			attempt = excluded.attempt, once = excluded.once, fingerprint = excluded.fingerprint,
			value = excluded.value, lease_end = excluded.lease_end, expires = excluded.expires`

	// A claim makes one cell at most and deletes up to four expired ones. So
	// expired cells do not pile up, and no single request deletes all of them.
	deleteExpired = `
		DELETE FROM idempotency WHERE key IN
			(SELECT key FROM idempotency WHERE expires <= ` + now + ` ORDER BY expires LIMIT 4)`
)

const (
	absent = iota
	claimed
	completed
	released
)

// A cell is one row. The zero cell is absent.
type cell struct {
	state, attempt     int
	token              string
	once               bool
	fingerprint, value []byte
	remaining, left    int64 // of the lease and of the TTL, in milliseconds
}

func load(ctx context.Context, tx *sql.Tx, key string) (c cell, err error) {
	err = tx.QueryRowContext(ctx, selectCell, key).Scan(
		&c.state, &c.token, &c.attempt, &c.once, &c.fingerprint, &c.value, &c.remaining, &c.left)
	if errors.Is(err, sql.ErrNoRows) {
		return cell{}, nil
	}
	return c, err
}

// save writes c and keeps it for ttl from now.
func save(ctx context.Context, tx *sql.Tx, key string, c cell, ttl time.Duration) error {
	_, err := tx.ExecContext(ctx, upsertCell,
		key, c.state, c.token, c.attempt, c.once, c.fingerprint, c.value, c.remaining, millis(ttl))
	return err
}

// millis rounds up, so that nothing ends early.
func millis(d time.Duration) int64 { return int64((d + time.Millisecond - 1) / time.Millisecond) }

// update runs f in a transaction.
func (s *Store) update(ctx context.Context, f func(tx *sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // without effect after Commit
	if err := f(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// Acquire implements [idempotency.Store].
func (s *Store) Acquire(ctx context.Context, key string, c idempotency.Claim) (rec idempotency.Record, err error) {
	err = s.update(ctx, func(tx *sql.Tx) error {
		rec, err = acquire(ctx, tx, key, c)
		return err
	})
	return rec, err
}

// acquire decides by the table in the documentation of [idempotency.Store], in
// its order. The cases that return are the rows that refuse. The others say what
// the cell becomes.
func acquire(ctx context.Context, tx *sql.Tx, key string, c idempotency.Claim) (idempotency.Record, error) {
	old, err := load(ctx, tx, key)
	if err != nil {
		return idempotency.Record{}, err
	}
	// next is an ordinary claim. Only a renewal sets Once: a claim that set it
	// could arrive late, after its request has ended, and would hold the key until
	// the TTL is over.
	next := cell{
		state: claimed, token: c.Token, attempt: old.attempt + 1,
		fingerprint: c.Fingerprint, remaining: millis(c.Lease),
	}
	own, renewal := old.token == c.Token, c.Attempt > 0
	switch {
	case old.state == absent: // a renewal claims it as well: the store has lost the record of a running handler
		next.attempt = max(c.Attempt, 1)
	case old.state == released && (own || renewal):
		return idempotency.Record{State: idempotency.Lost}, nil
	case old.state == released:
	case len(old.fingerprint) > 0 && len(c.Fingerprint) > 0 && !bytes.Equal(old.fingerprint, c.Fingerprint):
		return idempotency.Record{State: idempotency.Mismatch}, nil
	case old.state == completed && !renewal:
		return idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}, nil
	case old.state == claimed && own && (!renewal || c.Attempt == old.attempt):
		next.attempt, next.fingerprint = old.attempt, old.fingerprint
		next.once = old.once || renewal && c.Once
	case renewal: // of another attempt, or of a cell that is not its own
		return idempotency.Record{State: idempotency.Lost}, nil
	case old.remaining > 0:
		remaining := time.Duration(old.remaining) * time.Millisecond
		return idempotency.Record{State: idempotency.InProgress, Remaining: remaining}, nil
	case old.once:
		return idempotency.Record{State: idempotency.Abandoned}, nil
	}
	if err := save(ctx, tx, key, next, max(c.TTL, c.Lease)); err != nil {
		return idempotency.Record{}, err
	}
	_, err = tx.ExecContext(ctx, deleteExpired)
	return idempotency.Record{State: idempotency.Acquired, Attempt: next.attempt, Once: next.once}, err
}

// Complete implements [idempotency.Store]. When the handler has handed over a
// [Tx], Complete writes the response on that transaction and commits it: the
// handler's rows and the response, or neither.
func (s *Store) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	tx, err := s.attached(ctx)
	switch {
	case err != nil:
		return err
	case tx == nil:
		return s.update(ctx, func(tx *sql.Tx) error { return complete(ctx, tx, key, token, r) })
	}
	err = complete(ctx, tx.Tx, key, token, r)
	switch {
	case errors.Is(err, sql.ErrTxDone) && tx.ctx.Err() == nil:
		return fmt.Errorf("customstore: the handler has ended its transaction around Tx.Commit, so the store cannot tell whether its rows are there: %w", err)
	case err != nil:
		_ = tx.Tx.Rollback() // without a commit nothing is written, even if this fails
		return errors.Join(idempotency.ErrRolledBack, err)
	}
	if err := tx.Tx.Commit(); err != nil {
		if err := s.failedCommit(ctx, key, token, err); err != nil {
			return err
		}
	}
	tx.committed(ctx)
	return nil
}

// failedCommit returns nil if the Commit that returned err has committed all the
// same. The cell tells: the transaction has ended, so a claim that still stands
// will not become a response.
//
// When the cell cannot be read either, or is no longer of this request, nothing
// is known. A claim stands until its lease ends then. The retry finds the
// response, or a claim whose lease is over.
func (s *Store) failedCommit(ctx context.Context, key, token string, err error) error {
	var c cell
	read := s.update(ctx, func(tx *sql.Tx) (err error) {
		c, err = load(ctx, tx, key)
		return err
	})
	switch {
	case read != nil:
		return errors.Join(err, read)
	case c.state == completed && c.token == token:
		return nil
	case c.state == claimed && c.token == token:
		return errors.Join(idempotency.ErrRolledBack, err)
	}
	return err
}

// complete returns ErrLeaseLost if the cell is not token's.
func complete(ctx context.Context, tx *sql.Tx, key, token string, r idempotency.Result) error {
	old, err := load(ctx, tx, key)
	switch {
	case err != nil:
		return err
	case old.state == absent:
	case old.state == released || old.token != token:
		return idempotency.ErrLeaseLost
	case old.state == completed:
		return nil
	}
	return save(ctx, tx, key, cell{
		state: completed, token: token, attempt: old.attempt, fingerprint: r.Fingerprint, value: r.Value,
	}, r.TTL)
}

// Release implements [idempotency.Store]. It rolls an attached transaction back.
func (s *Store) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if tx, _ := s.attached(ctx); tx != nil {
		_ = tx.Tx.Rollback() // fails when the transaction or its connection has ended, which does no harm
	}
	return s.update(ctx, func(tx *sql.Tx) error {
		old, err := load(ctx, tx, key)
		if err != nil || old.state != absent && (old.state != claimed || old.token != token) {
			return err
		}
		marker := cell{state: released, token: token, attempt: old.attempt}
		// The marker of an earlier attempt may stand for a run that had an effect,
		// so this one is kept for at least as long as that one would have been.
		if old.attempt > 1 {
			keep = max(keep, time.Duration(old.left)*time.Millisecond)
		}
		return save(ctx, tx, key, marker, keep)
	})
}
