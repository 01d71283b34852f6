package storetest

import (
	"context"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A slowStore is a store on a machine that pauses for up to pause before and
// after each call.
type slowStore struct {
	realStore
	pause time.Duration
}

func (s slowStore) wait() { time.Sleep(rand.N(s.pause)) }

func (s slowStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	s.wait()
	defer s.wait()
	return s.realStore.Acquire(ctx, key, c)
}

func (s slowStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	s.wait()
	defer s.wait()
	return s.realStore.Complete(ctx, key, token, r)
}

func (s slowStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	s.wait()
	defer s.wait()
	return s.realStore.Release(ctx, key, token, keep)
}

func (s slowStore) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	s.wait()
	defer s.wait()
	return s.realStore.Inspect(ctx, key)
}

func (s slowStore) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	s.wait()
	defer s.wait()
	return s.realStore.Forget(ctx, key, seen)
}

// TestSlowMachine checks that no rule blames a store for a machine that pauses.
// The pauses are as long as leases and TTLs that a rule waits out.
func TestSlowMachine(t *testing.T) {
	t.Parallel()
	for name, r := range allRules() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, pause := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond} {
				for range 20 {
					synctest.Test(t, func(t *testing.T) {
						store := slowStore{struct{ realStore }{running(fault{})}, pause}
						if err := r.run(t.Context(), store, timingOf(store)); err != nil {
							t.Fatalf("with pauses of %v: %v", pause, err)
						}
					})
				}
			}
		})
	}
}
