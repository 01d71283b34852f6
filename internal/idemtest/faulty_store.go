package idemtest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// ErrDown is what a store says that is out of reach. No client may read it.
var ErrDown = errors.New("secret-host:6379 is down")

// A FaultyStore fails as told, before or after an operation took effect.
type FaultyStore struct {
	idempotency.Store
	HonourContext bool // fail when the context has ended

	mu    sync.Mutex               // guards Store and what follows
	fails map[string]error         // before the effect
	after map[string]error         // after the effect
	hangs map[string]chan struct{} // until closed
	lost  map[string]bool          // the next reply gets lost
	calls map[string]int
	key   string
	last  idempotency.Result
}

// Fail has the calls of method fail before they have an effect. With nil they no
// longer do.
func (s *FaultyStore) Fail(method string, err error) { s.set(&s.fails, method, err) }

// FailAfter has the calls of method fail after they took effect. With nil they no
// longer do.
func (s *FaultyStore) FailAfter(method string, err error) { s.set(&s.after, method, err) }

func (s *FaultyStore) set(m *map[string]error, method string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *m == nil {
		*m = map[string]error{}
	}
	(*m)[method] = err
}

// Hang has the calls of method hang until a channel is closed.
func (s *FaultyStore) Hang(method string, until chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hangs == nil {
		s.hangs = map[string]chan struct{}{}
	}
	s.hangs[method] = until
}

// Replace puts another store in the place of the inner one.
func (s *FaultyStore) Replace(store idempotency.Store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Store = store
}

func (s *FaultyStore) inner() idempotency.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Store
}

// LoseReply has the next call of method take effect, and its reply get lost.
func (s *FaultyStore) LoseReply(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = map[string]bool{method: true}
}

// LastKey returns the key of the last call.
func (s *FaultyStore) LastKey() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.key
}

// LastResult returns the result of the last Complete.
func (s *FaultyStore) LastResult() idempotency.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// Count returns how often method was called.
func (s *FaultyStore) Count(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// call runs op with the faults of method.
func (s *FaultyStore) call(ctx context.Context, method, key string, op func() error) error {
	s.mu.Lock()
	if s.calls == nil {
		s.calls = map[string]int{}
	}
	s.calls[method]++
	s.key = key
	before, after, hang := s.fails[method], s.after[method], s.hangs[method]
	lost := s.lost[method]
	delete(s.lost, method)
	s.mu.Unlock()

	if hang != nil {
		<-hang // not even the context helps
	}
	if s.HonourContext && ctx.Err() != nil {
		return fmt.Errorf("%s: %w", method, ctx.Err())
	}
	if before != nil {
		return before
	}
	if err := op(); err != nil {
		return err
	}
	if lost {
		<-ctx.Done()
		return ctx.Err()
	}
	return after
}

// Acquire implements idempotency.Store.
func (s *FaultyStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (rec idempotency.Record, err error) {
	err = s.call(ctx, "Acquire", key, func() (err error) {
		rec, err = s.inner().Acquire(ctx, key, c)
		return err
	})
	if err != nil {
		rec = idempotency.Record{}
	}
	return rec, err
}

// Complete implements idempotency.Store.
func (s *FaultyStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	s.mu.Lock()
	s.last = r
	s.mu.Unlock()
	return s.call(ctx, "Complete", key, func() error { return s.inner().Complete(ctx, key, token, r) })
}

// Release implements idempotency.Store.
func (s *FaultyStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.call(ctx, "Release", key, func() error { return s.inner().Release(ctx, key, token, keep) })
}
