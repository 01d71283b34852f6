package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"net/url"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Open opens a database for a Store and the handlers that share it.
//
// SQLite has one writer at a time. A single connection makes those of this
// process queue for it in order, and no longer than their contexts allow; with
// several they would poll for the lock. Other processes on this machine are
// waited for as long as the busy timeout says, which is less than half of the
// default StoreTimeout. Every transaction takes the lock when it begins: what
// it reads is then what it writes on.
//
// synchronous(FULL) syncs each commit to the disk, so that not even a power
// failure takes back an answer that a client has seen.
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
// A handler that attaches a transaction on that database gets its own rows and
// the stored response committed together, or neither of them: see Complete.
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

	// A claim makes one cell at most and deletes up to four, so the table does
	// not grow, and no request pays for the cleaning of a whole night.
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

// acquire is the table in the documentation of [idempotency.Store]: the cases
// that return are the rows that refuse, in its order. The others say what the
// cell becomes.
func acquire(ctx context.Context, tx *sql.Tx, key string, c idempotency.Claim) (idempotency.Record, error) {
	old, err := load(ctx, tx, key)
	if err != nil {
		return idempotency.Record{}, err
	}
	// Only a renewal sets Once: a claim that did could arrive late, and would hold
	// the key until its TTL is over.
	next := cell{
		state: claimed, token: c.Token, attempt: old.attempt + 1,
		fingerprint: c.Fingerprint, remaining: millis(c.Lease),
	}
	own, renewal := old.token == c.Token, c.Attempt > 0
	switch {
	case old.state == absent: // to a renewal as well: the record of a running handler was lost
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
	case renewal: // of another attempt, or of what is another owner's by now
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

// Complete implements [idempotency.Store]. When the handler attached a *sql.Tx,
// the response is written on that transaction, and it is committed here: the
// handler's rows and the response, or neither.
func (s *Store) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	tx := attached(ctx)
	if tx == nil {
		return s.update(ctx, func(tx *sql.Tx) error { return complete(ctx, tx, key, token, r) })
	}
	if err := complete(ctx, tx, key, token, r); err != nil {
		_ = tx.Rollback() // if even that fails: what was not committed never is
		return errors.Join(idempotency.ErrRolledBack, err)
	}
	// A Commit that fails may have committed all the same, so its error is not
	// ErrRolledBack: the claim stands until its lease ends, and the retry finds
	// either the response or a lapsed claim.
	return tx.Commit()
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

// Release implements [idempotency.Store]. It rolls back what was attached.
func (s *Store) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if tx := attached(ctx); tx != nil {
		_ = tx.Rollback() // an error says that it was over already, or its connection is
	}
	return s.update(ctx, func(tx *sql.Tx) error {
		old, err := load(ctx, tx, key)
		if err != nil || old.state != absent && (old.state != claimed || old.token != token) {
			return err
		}
		marker := cell{state: released, token: token, attempt: old.attempt}
		if old.attempt > 1 {
			keep = max(keep, time.Duration(old.left)*time.Millisecond)
		}
		return save(ctx, tx, key, marker, keep)
	})
}

// attached returns the transaction that the handler attached, or nil.
func attached(ctx context.Context) *sql.Tx {
	exec, ok := idempotency.FromContext(ctx)
	if !ok {
		return nil
	}
	tx, _ := exec.Attachment().(*sql.Tx)
	return tx
}
