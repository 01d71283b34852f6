package idemtest

import (
	"context"
	"time"

	"github.com/go-idempotency/idempotency"
)

// An ObservedStore calls Look with the context of every call.
type ObservedStore struct {
	idempotency.Store
	Look func(ctx context.Context, method string)
}

// Acquire implements idempotency.Store.
func (s *ObservedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	s.Look(ctx, "Acquire")
	return s.Store.Acquire(ctx, key, c)
}

// Complete implements idempotency.Store.
func (s *ObservedStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	s.Look(ctx, "Complete")
	return s.Store.Complete(ctx, key, token, r)
}

// Release implements idempotency.Store.
func (s *ObservedStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	s.Look(ctx, "Release")
	return s.Store.Release(ctx, key, token, keep)
}
