package idempotency_test

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// faultyStore fails as told, before or after an operation took effect.
type faultyStore struct {
	idempotency.Store
	honourContext bool

	mu    sync.Mutex
	fails map[string]error         // before the effect
	after map[string]error         // after the effect
	hangs map[string]chan struct{} // until closed, or the context ends
	lost  map[string]bool          // the next reply gets lost
	calls map[string]int
	key   string
	last  idempotency.Result
}

func (s *faultyStore) fail(method string, err error)      { s.set(&s.fails, method, err) }
func (s *faultyStore) failAfter(method string, err error) { s.set(&s.after, method, err) }

func (s *faultyStore) set(m *map[string]error, method string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *m == nil {
		*m = map[string]error{}
	}
	(*m)[method] = err
}

func (s *faultyStore) hang(method string, until chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hangs == nil {
		s.hangs = map[string]chan struct{}{}
	}
	s.hangs[method] = until
}

// replace puts another store in the place of the inner one.
func (s *faultyStore) replace(store idempotency.Store) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Store = store
}

func (s *faultyStore) inner() idempotency.Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Store
}

func (s *faultyStore) loseReply(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = map[string]bool{method: true}
}

func (s *faultyStore) lastKey() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.key
}

func (s *faultyStore) lastResult() idempotency.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

func (s *faultyStore) count(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// call runs op with the faults of method.
func (s *faultyStore) call(ctx context.Context, method, key string, op func() error) error {
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
	if s.honourContext && ctx.Err() != nil {
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

func (s *faultyStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (rec idempotency.Record, err error) {
	err = s.call(ctx, "Acquire", key, func() (err error) {
		rec, err = s.inner().Acquire(ctx, key, c)
		return err
	})
	if err != nil {
		rec = idempotency.Record{}
	}
	return rec, err
}

func (s *faultyStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	s.mu.Lock()
	s.last = r
	s.mu.Unlock()
	return s.call(ctx, "Complete", key, func() error { return s.inner().Complete(ctx, key, token, r) })
}

func (s *faultyStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.call(ctx, "Release", key, func() error { return s.inner().Release(ctx, key, token, keep) })
}

// eventLog collects "outcome status".
type eventLog struct {
	mu     sync.Mutex
	events []idempotency.Event
}

func (l *eventLog) add(_ context.Context, e idempotency.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
}

func (l *eventLog) all() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		lines = append(lines, fmt.Sprintf("%s %d", e.Outcome, e.Status))
	}
	return lines
}

func (l *eventLog) last() idempotency.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[len(l.events)-1]
}
