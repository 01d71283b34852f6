package idempotency

import (
	"bytes"
	"context"
	"slices"
	"time"
)

// Inspect implements [Inspector]. It never returns an error.
func (s *MemoryStore) Inspect(_ context.Context, key string) (Cell, error) {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	cell, parts := sh.inspect(hash, key, now)
	sh.mu.Unlock()
	if len(parts) > 0 { // joined here: no request should wait for that
		cell.Value = slices.Concat(append([][]byte{cell.Value}, parts...)...)
	}
	return cell, nil
}

// inspect returns the cell of key, and the parts that follow its Value. The
// fingerprint of a claim is copied, because the next claim overwrites it. The
// slices of a result are never changed.
func (sh *memoryShard) inspect(hash uint64, key string, now int64) (c Cell, parts [][]byte) {
	if cell := sh.cells[key]; cell != nil && cell.expiry > now {
		c = Cell{
			State: Completed, Attempt: cell.attempt, Once: cell.once, Owner: cell.token,
			TTL: time.Duration(cell.expiry - now), Fingerprint: bytes.Clone(cell.fingerprint), Value: cell.value,
		}
		switch {
		case cell.state == cellCompleted:
			c.Attempt = 0
		case cell.state == cellReleased:
			c.State, c.Once = Released, false
		case cell.leaseEnd > now:
			c.State, c.Lease = InProgress, time.Duration(cell.leaseEnd-now)
		case cell.once:
			c.State = Abandoned
		default:
			c.State = Lapsed
		}
		return c, cell.parts
	}
	if b, ok := sh.packed.lookup(hash, key, now); ok {
		_, owner, fingerprint, value := b.fields()
		c = Cell{
			State: Completed, Owner: string(owner), TTL: time.Duration(b.expiry() - now),
			Fingerprint: fingerprint, Value: value,
		}
	}
	return c, nil
}

// Forget implements [Inspector]. Its only errors are [ErrInProgress] and
// [ErrCellChanged].
func (s *MemoryStore) Forget(_ context.Context, key string, seen Cell) error {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	is, _ := sh.inspect(hash, key, now)
	switch {
	case is.State == InProgress:
		return ErrInProgress
	case is.State != seen.State || is.Attempt != seen.Attempt || is.Owner != seen.Owner:
		return ErrCellChanged
	case is.State == 0 || is.State == Released:
		return nil
	case is.State == Completed:
		s.forgetResult(sh, hash, key, now)
	default:
		cell := sh.cells[key]
		s.bytes.Add(-int64(len(cell.fingerprint)))
		cell.once, cell.fingerprint = false, cell.fingerprint[:0]
	}
	sh.notify(key)
	return nil
}

// forgetResult puts a marker into the place of a completed cell. The marker has
// an attempt and no owner. The result itself may still be read by a replay, so
// nothing of it is used again.
func (s *MemoryStore) forgetResult(sh *memoryShard, hash uint64, key string, now int64) {
	if cell := sh.cells[key]; cell != nil && cell.expiry > now {
		s.bytes.Add(-cell.cost())
		cell.state, cell.token, cell.attempt = cellReleased, "", 1
		cell.fingerprint, cell.value, cell.parts = nil, nil, nil
		s.bytes.Add(cell.cost())
		return
	}
	// The bytes of a packed record count until its slab drops them, as its
	// memory is not free before.
	record, _ := sh.packed.lookup(hash, key, now)
	delete(sh.packed.index, hash)
	cell := sh.newCell(key)
	cell.state, cell.attempt = cellReleased, 1
	s.insert(sh, cell, now, time.Duration(record.expiry()-now))
}
