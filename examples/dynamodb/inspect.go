package main

import (
	"context"
	"crypto/rand"
	"time"

	"github.com/go-idempotency/idempotency"
)

var _ idempotency.Inspector = (*Store)(nil)

// Inspect implements [idempotency.Inspector].
func (s *Store) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	c, err := s.load(ctx, key)
	if err != nil {
		return idempotency.Cell{}, err
	}
	now := s.clock()
	return s.view(s.at(c, now), now), nil
}

// view returns a cell as an operator sees it.
func (s *Store) view(c cell, now time.Time) idempotency.Cell {
	if c.state == absent {
		return idempotency.Cell{}
	}
	v := idempotency.Cell{
		State: idempotency.Completed, Owner: c.token, TTL: s.left(c.expires, now),
		Fingerprint: c.fingerprint, Value: c.value,
	}
	if c.state == completed {
		return v
	}
	v.Attempt, v.Once = c.attempt, c.once
	switch lease := s.left(c.leaseEnd, now); {
	case c.state == released:
		v.State = idempotency.Released
	case lease > 0:
		v.State, v.Lease = idempotency.InProgress, lease
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
	var refusal error
	err := s.update(ctx, key, true, func(old cell, now time.Time) (next cell, write bool) {
		is := s.view(old, now)
		refusal = nil // of an earlier try, after which the cell has changed
		switch {
		case is.State == idempotency.InProgress:
			refusal = idempotency.ErrInProgress
			return cell{}, false
		case is.State != seen.State || is.Attempt != seen.Attempt || is.Owner != seen.Owner:
			refusal = idempotency.ErrCellChanged
			return cell{}, false
		case old.state == absent || old.state == released:
			return cell{}, false
		case old.state == completed:
			old = cell{state: released, attempt: 1, expires: old.expires}
		}
		old.once, old.fingerprint, old.rev = false, nil, rand.Text()
		return old, true
	})
	if err != nil {
		return err
	}
	return refusal
}
