package integration

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// A journal is a Store that tells the ledger what was asked of the store below
// it, and what that said. It changes nothing.
type journal struct {
	store   idempotency.Store
	replica *replica
	visits  sync.Map // by their tokens
}

var (
	_ idempotency.Store   = (*journal)(nil)
	_ idempotency.Watcher = (*journal)(nil)
)

// Acquire gets a row before the store can know of the claim, which this process
// may not live to tell of, and one with what came of it. It notes when the claim
// of a run can have been made: not before the first call whose answer is not
// known, if there was one.
func (j *journal) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	v, ok := ctx.Value(visitKey{}).(*visit)
	if ok {
		j.visits.Store(strings.Clone(c.Token), v)
	} else { // a renewal in the background
		v = j.visitOf(c.Token)
	}
	number := int(v.calls.Add(1))
	j.replica.note(v, history.RowClaim, func(row *history.Row) {
		row.Call, row.Asked, row.Once = number, c.Attempt, c.Once
	})
	sent := j.replica.now()
	rec, err := j.store.Acquire(ctx, key, c)
	returned := j.replica.now()
	kind := history.RowClaimed
	switch {
	case c.Attempt == 0:
		v.claimed(key, c.Token, sent, returned, err)
	case err == nil && rec.State == idempotency.Acquired:
		kind = history.RowRenew
	}
	j.replica.note(v, kind, func(row *history.Row) {
		row.Call, row.Asked, row.Sent, row.Returned = number, c.Attempt, sent, returned
		if err != nil {
			row.Err = err.Error()
			return
		}
		row.Attempt, row.Once, row.State = rec.Attempt, rec.Once, stateName(rec.State)
	})
	return rec, err
}

// stateName is what a row calls a state.
func stateName(state idempotency.State) string {
	if state == idempotency.Acquired {
		return history.StateAcquired
	}
	return state.String()
}

// Complete gets its row before the answer can go out. A small record gets one
// before the store can know of it, too. It is what differs from the answer that
// came first.
func (j *journal) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	v := j.visitOf(token)
	if v.completesAnother(r.Value) {
		j.replica.note(v, history.RowSmall, nil)
	}
	sent := j.replica.now()
	err := j.store.Complete(ctx, key, token, r)
	j.replica.note(v, history.RowComplete, func(row *history.Row) {
		row.Sent, row.Returned, row.RolledBack = sent, j.replica.now(), errors.Is(err, idempotency.ErrRolledBack)
		switch {
		case errors.Is(err, idempotency.ErrLeaseLost):
			row.Err = history.ErrLeaseLost
		case err != nil:
			row.Err = err.Error()
		}
	})
	return err
}

// Release gets a row before the key can be free, which this process may not live
// to tell, and one with what came of it.
func (j *journal) Release(ctx context.Context, key, token string, keep time.Duration) error {
	v := j.visitOf(token)
	number := int(v.calls.Add(1))
	j.replica.note(v, history.RowRelease, func(row *history.Row) { row.Call, row.Keep = number, keep })
	sent := j.replica.now()
	err := j.store.Release(ctx, key, token, keep)
	j.replica.note(v, history.RowReleased, func(row *history.Row) {
		row.Call, row.Sent, row.Returned = number, sent, j.replica.now()
		if err != nil {
			row.Err = err.Error()
		}
	})
	return err
}

// visitOf returns the visit that a token is for. What goes on in the background
// has no context of a request.
func (j *journal) visitOf(token string) *visit {
	v, _ := j.visits.Load(token)
	return v.(*visit)
}

// Watch implements idempotency.Watcher.
func (j *journal) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	return j.store.(idempotency.Watcher).Watch(ctx, key)
}
