package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Options configure a [Store]. The zero Options are the defaults.
type Options struct {
	// Table is the name of the table, of at most 55 bytes. It is quoted, so it
	// is case-sensitive. The default is "idempotency".
	Table string

	// Schema is the schema of the table, quoted as well. It must exist. The
	// default is the first schema of the connection's search_path.
	Schema string

	// MaxConns bounds the connections of the store's own pool. They are opened
	// when they are needed. The default is half of the handlers' pool, and at
	// least 4.
	MaxConns int32
}

// A Store is an [idempotency.Store] in a table, an [idempotency.Watcher] and an
// [idempotency.Inspector].
//
// [NewStore] makes one. The zero Store is of no use, and a Store must not be
// copied. It is safe for concurrent use.
type Store struct {
	pool     *pgxpool.Pool // the handlers'
	maxConns int32
	sql      statements
	listener listener

	acquired atomic.Uint64 // counts claims until the next cleaning
	cleaning atomic.Bool

	attaching sync.Mutex // held by a Tx that looks whether it is the first, and attaches itself

	mu     sync.Mutex // guards what follows
	own    *pgxpool.Pool
	closed bool
}

var (
	_ idempotency.Store   = (*Store)(nil)
	_ idempotency.Watcher = (*Store)(nil)
)

// NewStore returns a store on the database of pool. It connects when it is first
// used, and needs the table that [Store.Migrate] makes. It panics when pool is
// nil or an option is invalid. Nil opts are the defaults.
func NewStore(pool *pgxpool.Pool, opts *Options) *Store {
	if pool == nil {
		panic("postgres: NewStore needs a pool; make one with pgxpool.New")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Table == "" {
		o.Table = "idempotency"
	}
	mustName("Table", o.Table, 55) // which leaves room for the suffix of the index
	if o.Schema != "" {
		mustName("Schema", o.Schema, 63)
	}
	if o.MaxConns < 0 {
		panic("postgres: Options.MaxConns is negative; leave it zero for the default")
	}
	if o.MaxConns == 0 {
		o.MaxConns = max(4, pool.Config().MaxConns/2)
	}
	s := &Store{pool: pool, maxConns: o.MaxConns, sql: newStatements(o.Schema, o.Table)}
	s.listener.store = s
	return s
}

// Close closes the connections of the store, once the calls that use them have
// ended. The pool that NewStore got stays open. A closed store returns errors.
func (s *Store) Close() {
	s.mu.Lock()
	own := s.own
	s.own, s.closed = nil, true
	s.mu.Unlock()
	if own != nil {
		own.Close()
	}
}

var errClosed = errors.New("postgres: store is closed")

// conns returns the store's own pool. The first call makes it, because a pool
// starts a goroutine, which a constructor must not.
func (s *Store) conns() (ownPool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ownPool{}, errClosed
	}
	if s.own != nil {
		return ownPool{s.own}, nil
	}
	config := s.pool.Config()
	config.MaxConns, config.MinConns, config.MinIdleConns = s.maxConns, 0, 0
	config.ConnConfig.OnNotice = markUnreplicated(config.ConnConfig.OnNotice)
	own, err := pgxpool.NewWithConfig(context.Background(), config)
	if err == nil {
		s.own = own
	}
	return ownPool{own}, err
}

// A querier is the store's own pool, or the transaction of a handler.
type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// maxTries bounds how often a statement is sent that lost a race. Each time its
// snapshot is a newer one, so more than two tries are rare.
const maxTries = 50

var errRaces = errors.New("postgres: the cell changed under every try")

// isRace reports whether the server gave a statement up for the sake of another
// one. It does so where the isolation level of the connections is above READ
// COMMITTED, and nothing was written.
func isRace(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (e.Code == "40001" || e.Code == "40P01")
}

// A cell is a row as the snapshot of a statement has it. The zero cell is
// absent, as an expired one is.
type cell struct {
	state              int16
	token              string
	attempt            int
	once               bool
	fingerprint, value []byte
	remaining          time.Duration // of the lease
	watched            bool          // a waiter wants to be notified
}

// Acquire implements [idempotency.Store]. Now and then it deletes some expired
// rows after a claim.
func (s *Store) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	own, err := s.conns()
	if err != nil {
		return idempotency.Record{}, err
	}
	for try := range maxTries {
		send := s.acquire
		if try == 0 && c.Attempt == 0 {
			send = s.claim
		}
		rec, old, err := send(ctx, own, key, c)
		switch {
		case isRace(err), err == nil && rec.State == 0:
			continue // claim may not write this cell, or another statement wrote it after the snapshot of this one
		case err != nil:
			return idempotency.Record{}, err
		case rec.State == idempotency.InProgress && !old.watched && s.listener.hasWaiter(key):
			// The owner notifies only if it finds the mark. The next try sees
			// whether the mark came in time.
			if _, err := own.Exec(ctx, s.sql.watch, key); err != nil && !isRace(err) {
				return idempotency.Record{}, err
			}
			continue
		case rec.State == idempotency.Acquired && c.Attempt == 0:
			s.clean(ctx, own)
		}
		return rec, nil
	}
	return idempotency.Record{}, errRaces
}

// claim sends the statement that most claims need. The State is zero when the
// cell is none for it: expired, claimed or released and free to take, or written
// by another claim at the same time.
func (s *Store) claim(ctx context.Context, q querier, key string, c idempotency.Claim) (rec idempotency.Record, old cell, err error) {
	var remaining int64
	err = q.QueryRow(ctx, s.sql.claim, key, c.Token, notNil(c.Fingerprint), micros(c.Lease), micros(max(c.TTL, c.Lease))).
		Scan(&old.state, &old.token, &old.attempt, &old.once, &old.fingerprint, &old.value, &remaining, &old.watched)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return rec, cell{}, nil
	case err != nil:
		return rec, cell{}, err
	case old.state == absent:
		return idempotency.Record{State: idempotency.Acquired, Attempt: 1}, old, nil
	}
	old.remaining = time.Duration(remaining) * time.Microsecond
	return refusal(old, c), old, nil
}

// acquire sends the statement for all cells once. The State is zero when it lost
// a race.
func (s *Store) acquire(ctx context.Context, q querier, key string, c idempotency.Claim) (rec idempotency.Record, old cell, err error) {
	var attempt *int
	var once *bool
	var remaining int64
	err = q.QueryRow(ctx, s.sql.acquire, key, c.Token, notNil(c.Fingerprint), c.Attempt, c.Once,
		micros(c.Lease), micros(max(c.TTL, c.Lease))).Scan(&attempt, &once, &old.state, &old.token, &old.attempt,
		&old.once, &old.fingerprint, &old.value, &remaining, &old.watched)
	if err != nil {
		return rec, old, err
	}
	old.remaining = time.Duration(remaining) * time.Microsecond
	if attempt != nil {
		return idempotency.Record{State: idempotency.Acquired, Attempt: *attempt, Once: *once}, old, nil
	}
	return refusal(old, c), old, nil
}

// refusal is the answer to a claim that has written nothing. It decides by the
// table of [idempotency.Store], in its order. The State is zero if the claim
// should have been written: then another one has changed the cell meanwhile.
func refusal(old cell, c idempotency.Claim) idempotency.Record {
	own, renewal := old.token == c.Token, c.Attempt > 0
	switch {
	case old.state == absent:
	case old.state == released && (own || renewal):
		return idempotency.Record{State: idempotency.Lost}
	case old.state == released:
	case len(old.fingerprint) > 0 && len(c.Fingerprint) > 0 && !bytes.Equal(old.fingerprint, c.Fingerprint):
		return idempotency.Record{State: idempotency.Mismatch}
	case old.state == completed && !renewal:
		return idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}
	case old.state == claimed && own && (!renewal || c.Attempt == old.attempt):
	case renewal:
		return idempotency.Record{State: idempotency.Lost}
	case old.remaining > 0:
		return idempotency.Record{State: idempotency.InProgress, Remaining: old.remaining}
	case old.once:
		return idempotency.Record{State: idempotency.Abandoned}
	}
	return idempotency.Record{}
}

// Complete implements [idempotency.Store]. It stores the response on the
// transaction that the handler has handed over with [Tx.Commit], if there is
// one, and commits both.
func (s *Store) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if tx := s.attached(ctx); tx != nil {
		return tx.complete(ctx, key, token, r)
	}
	own, err := s.conns()
	if err != nil {
		return err
	}
	for range maxTries {
		if _, err = s.complete(ctx, own, key, token, r); !isRace(err) {
			return err
		}
	}
	return err
}

// complete stores r, and reports whether there was no cell before. It returns
// ErrLeaseLost if the cell is not token's.
func (s *Store) complete(ctx context.Context, q querier, key, token string, r idempotency.Result) (fresh bool, err error) {
	var notified *string
	err = q.QueryRow(ctx, s.sql.completeOwn, key, token, notNil(r.Fingerprint), notNil(r.Value), micros(r.TTL)).Scan(&notified)
	if !errors.Is(err, pgx.ErrNoRows) {
		return false, err
	}
	for range maxTries { // a repeated Complete, or one of a cell that is not token's
		var written bool
		var old cell
		err := q.QueryRow(ctx, s.sql.complete, key, token, notNil(r.Fingerprint), notNil(r.Value), micros(r.TTL)).
			Scan(&written, &notified, &old.state, &old.token)
		switch {
		case err != nil:
			return false, err
		case written, old.state == completed && old.token == token:
			return old.state == absent, nil
		case old.state == released, old.state != absent && old.token != token:
			return false, idempotency.ErrLeaseLost
		}
	}
	return false, errRaces
}

// Release implements [idempotency.Store]. It rolls back the transaction that the
// handler has handed over.
func (s *Store) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if tx := s.attached(ctx); tx != nil {
		tx.undo(ctx)
	}
	own, err := s.conns()
	if err != nil {
		return err
	}
	for range maxTries {
		var notified *string
		err = own.QueryRow(ctx, s.sql.release, key, token, micros(keep)).Scan(&notified)
		if !isRace(err) {
			break
		}
	}
	if errors.Is(err, pgx.ErrNoRows) { // the cell is not token's to free
		return nil
	}
	return err
}

// A claim makes one row at most, so a batch in every cleanEvery claims keeps up
// with them and with what was left behind.
const (
	cleanEvery = 32
	cleanBatch = 256
	cleanTime  = 250 * time.Millisecond
)

// clean deletes a batch of expired rows in every cleanEvery claims. The claim
// stands, so an error changes nothing for it, and the next batch tries again.
func (s *Store) clean(ctx context.Context, own ownPool) {
	if s.acquired.Add(1)%cleanEvery != 0 || !s.cleaning.CompareAndSwap(false, true) {
		return
	}
	defer s.cleaning.Store(false)
	ctx, cancel := context.WithTimeout(ctx, cleanTime)
	defer cancel()
	_, _ = own.Exec(ctx, s.sql.clean, cleanBatch)
}

// micros rounds up, so that nothing ends early.
func micros(d time.Duration) int64 { return int64((d + time.Microsecond - 1) / time.Microsecond) }

// notNil keeps NULL out of the table.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// mustName panics unless name can be a quoted identifier of at most size bytes.
func mustName(option, name string, size int) {
	if len(name) > size {
		panic(fmt.Sprintf("postgres: Options.%s is longer than %d bytes, the limit of PostgreSQL", option, size))
	}
	if !isText(name) {
		panic(fmt.Sprintf("postgres: Options.%s is not valid UTF-8 or has a zero byte", option))
	}
}
