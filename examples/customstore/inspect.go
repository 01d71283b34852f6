package main

import (
	"context"
	"database/sql"
	"time"

	"github.com/go-idempotency/idempotency"
)

var _ idempotency.Inspector = (*Store)(nil)

// Inspect implements [idempotency.Inspector].
func (s *Store) Inspect(ctx context.Context, key string) (c idempotency.Cell, err error) {
	err = s.update(ctx, func(tx *sql.Tx) error {
		row, err := load(ctx, tx, key)
		c = row.view()
		return err
	})
	return c, err
}

// view returns a row as an operator sees it.
func (c cell) view() idempotency.Cell {
	if c.state == absent {
		return idempotency.Cell{}
	}
	v := idempotency.Cell{
		State: idempotency.Completed, Owner: c.token, TTL: time.Duration(c.left) * time.Millisecond,
		Fingerprint: c.fingerprint, Value: c.value,
	}
	if c.state == completed {
		return v
	}
	v.Attempt, v.Once = c.attempt, c.once
	switch {
	case c.state == released:
		v.State = idempotency.Released
	case c.remaining > 0:
		v.State, v.Lease = idempotency.InProgress, time.Duration(c.remaining)*time.Millisecond
	case c.once:
		v.State = idempotency.Abandoned
	default:
		v.State = idempotency.Lapsed
	}
	return v
}

// Forget implements [idempotency.Inspector]. A claim keeps its owner and its
// attempt, so that a process that was only stopped may still complete it. A
// result becomes a marker that no owner has.
func (s *Store) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	return s.update(ctx, func(tx *sql.Tx) error {
		row, err := load(ctx, tx, key)
		if err != nil {
			return err
		}
		is := row.view()
		switch {
		case is.State == idempotency.InProgress:
			return idempotency.ErrInProgress
		case is.State != seen.State || is.Attempt != seen.Attempt || is.Owner != seen.Owner:
			return idempotency.ErrCellChanged
		case row.state == absent || row.state == released:
			return nil
		case row.state == completed:
			row = cell{state: released, attempt: max(row.attempt, 1)}
		}
		row.once, row.fingerprint = false, nil
		return save(ctx, tx, key, row, is.TTL)
	})
}
