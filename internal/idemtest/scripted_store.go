package idemtest

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A ScriptedStore does with the nth Acquire, Complete or Release what it is told
// to, in the place of what a MemoryStore does.
type ScriptedStore struct {
	*idempotency.MemoryStore

	// What the methods do, if it is not nil.
	OnAcquire  func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error)
	OnComplete func(ctx context.Context, key, token string, r idempotency.Result) error
	OnRelease  func(ctx context.Context, key, token string, keep time.Duration) error

	// How often the methods were called.
	Acquired  atomic.Int64
	Completed atomic.Int64
	Released  atomic.Int64
}

// Acquire implements idempotency.Store.
func (s *ScriptedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if n := s.Acquired.Add(1); s.OnAcquire != nil {
		return s.OnAcquire(int(n), ctx, key, c)
	}
	return s.MemoryStore.Acquire(ctx, key, c)
}

// Complete implements idempotency.Store.
func (s *ScriptedStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if s.Completed.Add(1); s.OnComplete != nil {
		return s.OnComplete(ctx, key, token, r)
	}
	return s.MemoryStore.Complete(ctx, key, token, r)
}

// Release implements idempotency.Store.
func (s *ScriptedStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if s.Released.Add(1); s.OnRelease != nil {
		return s.OnRelease(ctx, key, token, keep)
	}
	return s.MemoryStore.Release(ctx, key, token, keep)
}

// Late has the nth Acquire arrive later.
func (s *ScriptedStore) Late(nth int, by time.Duration) {
	s.OnAcquire = func(n int, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		if n == nth {
			time.Sleep(by)
		}
		return s.MemoryStore.Acquire(ctx, key, c)
	}
}
