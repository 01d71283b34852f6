package integration

import (
	"context"
	"errors"

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

// Acquire notes when the claim can have been made: not before the first call
// whose answer is not known, if there was one. A renewal gets a row.
func (j *journal) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	v := visitOf(ctx)
	sent := j.replica.now()
	rec, err := j.store.Acquire(ctx, key, c)
	returned := j.replica.now()
	v.mu.Lock()
	if running := v.running; running {
		v.mu.Unlock()
		if err == nil && rec.State == idempotency.Acquired {
			j.replica.note(v, history.RowRenew, func(row *history.Row) {
				row.Run, row.Attempt = "", rec.Attempt
				row.Sent, row.Returned, row.Once = sent, returned, c.Once
			})
		}
		return rec, err
	}
	defer v.mu.Unlock()
	if !v.unclear {
		v.sent = sent
	}
	v.unclear = v.unclear || err != nil
	v.storeKey, v.token, v.returned = key, c.Token, returned
	return rec, err
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
func (j *journal) Release(ctx context.Context, key, token string) error {
	j.replica.note(visitOf(ctx), history.RowRelease, nil)
	return j.store.Release(ctx, key, token)
}

// Watch implements idempotency.Watcher.
func (j *journal) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	return j.store.(idempotency.Watcher).Watch(ctx, key)
}
