package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/jackc/pgx/v5"
)

var _ idempotency.Inspector = (*Store)(nil)

// load returns the cell of key, the zero cell if it is absent.
func (s *Store) load(ctx context.Context, q querier, key, lock string) (c cell, ttl time.Duration, err error) {
	var lease, left int64
	err = q.QueryRow(ctx, s.sql.inspect+lock, key).Scan(
		&c.state, &c.token, &c.attempt, &c.once, &c.fingerprint, &c.value, &lease, &left)
	if errors.Is(err, pgx.ErrNoRows) {
		return cell{}, 0, nil
	}
	c.remaining = time.Duration(lease) * time.Microsecond
	return c, time.Duration(left) * time.Microsecond, err
}

// view returns the cell as an operator sees it.
func (c cell) view(ttl time.Duration) idempotency.Cell {
	if c.state == absent {
		return idempotency.Cell{}
	}
	v := idempotency.Cell{
		State: idempotency.Completed, Owner: c.token, TTL: ttl, Fingerprint: c.fingerprint, Value: c.value,
	}
	if c.state == completed {
		return v
	}
	v.Attempt, v.Once = c.attempt, c.once
	switch {
	case c.state == released:
		v.State = idempotency.Released
	case c.remaining > 0:
		v.State, v.Lease = idempotency.InProgress, c.remaining
	case c.once:
		v.State = idempotency.Abandoned
	default:
		v.State = idempotency.Lapsed
	}
	return v
}

// Inspect implements [idempotency.Inspector].
func (s *Store) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	own, err := s.conns()
	if err != nil {
		return idempotency.Cell{}, err
	}
	c, ttl, err := s.load(ctx, own, key, "")
	if err != nil {
		return idempotency.Cell{}, err
	}
	return c.view(ttl), nil
}

// Forget implements [idempotency.Inspector]. The row is locked while Forget
// decides. A claim keeps its owner and attempt, and a result becomes a marker
// that no owner has.
func (s *Store) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	own, err := s.conns()
	if err != nil {
		return err
	}
	return pgx.BeginTxFunc(ctx, own, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		c, ttl, err := s.load(ctx, tx, key, " FOR UPDATE")
		if err != nil {
			return err
		}
		is := c.view(ttl)
		switch {
		case is.State == idempotency.InProgress:
			return idempotency.ErrInProgress
		case is.State != seen.State || is.Attempt != seen.Attempt || is.Owner != seen.Owner:
			return idempotency.ErrCellChanged
		case c.state == absent || c.state == released:
			return nil
		}
		_, err = tx.Exec(ctx, s.sql.forget, key)
		return err
	})
}
