package integration

import (
	"context"
	"errors"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// A journal is a Store that tells the ledger what was asked of the store below
// it, and what that said. It changes nothing.
type journal struct {
	store   idempotency.Store
	replica *replica
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
	v := visitOf(ctx)
	number := int(v.calls.Add(1))
	j.replica.note(v, history.RowClaim, func(row *history.Row) { row.Call, row.Once = number, c.Once })
	sent := j.replica.now()
	rec, err := j.store.Acquire(ctx, key, c)
	returned := j.replica.now()
	running := v.claimed(key, c.Token, sent, returned, err)
	kind := history.RowClaimed
	if running && err == nil && rec.State == idempotency.Acquired {
		kind = history.RowRenew
	}
	j.replica.note(v, kind, func(row *history.Row) {
		row.Call, row.Once, row.Sent, row.Returned = number, c.Once, sent, returned
		if err != nil {
			row.Err = err.Error()
			return
		}
		row.Attempt, row.State = rec.Attempt, stateName(rec.State)
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

// Complete gets its row before the answer can go out.
func (j *journal) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	sent := j.replica.now()
	err := j.store.Complete(ctx, key, token, r)
	j.replica.note(visitOf(ctx), history.RowComplete, func(row *history.Row) {
		row.Sent, row.Returned = sent, j.replica.now()
		switch {
		case errors.Is(err, idempotency.ErrLeaseLost):
			row.Err = history.ErrLeaseLost
		case err != nil:
			row.Err = err.Error()
		}
	})
	return err
}

// Release gets its row before the key can be free: this process may not live to
// tell.
func (j *journal) Release(ctx context.Context, key, token string, keep time.Duration) error {
	j.replica.note(visitOf(ctx), history.RowRelease, nil)
	return j.store.Release(ctx, key, token, keep)
}

// Watch implements idempotency.Watcher.
func (j *journal) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	return j.store.(idempotency.Watcher).Watch(ctx, key)
}
