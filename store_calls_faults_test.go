package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A storeWay is one way in which a store call goes wrong.
type storeWay struct {
	name  string
	now   int // how often the command is executed before the caller is told
	reply storeReply
	later time.Duration // when it is executed again, or for the first time
}

// storeReply is what the caller of a call that went wrong gets.
type storeReply int

const (
	answers storeReply = iota // as if nothing was wrong
	fails                     // an error at once
	hangs                     // the error of its context, when that ends
	mute                      // a watch that tells nothing
)

// storeWays are what is tried on each call. The delays are odd so that nothing
// happens at the same instant as something else: 17ms comes before the library
// repairs anything, 2s after it has, 45s when both the lease of the claim and
// the marker of a released key are over.
var storeWays = []storeWay{
	{name: "fails, not executed", reply: fails},
	{name: "fails, executed", now: 1, reply: fails},
	{name: "hangs, not executed", reply: hangs},
	{name: "hangs, executed", now: 1, reply: hangs},
	{name: "executed twice", now: 2},
	{name: "executed again 2s later", now: 1, later: 2*time.Second + 3*time.Millisecond},
	{name: "executed again 45s later", now: 1, later: 45*time.Second + 3*time.Millisecond},
	{name: "hangs, executed 17ms later", reply: hangs, later: 17 * time.Millisecond},
	{name: "hangs, executed 2s later", reply: hangs, later: 2*time.Second + 3*time.Millisecond},
	{name: "hangs, executed 45s later", reply: hangs, later: 45*time.Second + 3*time.Millisecond},
}

// watchWays are what is tried on a Watch, which has no effect to speak of.
var watchWays = []storeWay{
	{name: "fails", reply: fails},
	{name: "hangs", reply: hangs},
	{name: "never tells", reply: mute},
}

// A storeFault is a way in which one call goes wrong, or all from that one on.
type storeFault struct {
	call string // "Acquire#2"
	way  storeWay
	on   bool
}

// A callStore is a memory store whose calls are counted and can go wrong.
type callStore struct {
	*idempotency.MemoryStore
	history *callHistory

	mu     sync.Mutex
	faults []storeFault
	on     *storeWay // the fault that lasts
	met    int       // how many faults have been met
	counts map[string]int
}

// begin counts from one again and lets the faults come.
func (s *callStore) begin(faults []storeFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.counts = faults, map[string]int{}
}

// recover ends a fault that lasts.
func (s *callStore) recover() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = nil
}

// next numbers a call and returns its fault, or nil.
func (s *callStore) next(method string) (call string, way *storeWay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counts == nil {
		return "", nil // what happened before
	}
	s.counts[method]++
	call = fmt.Sprintf("%s#%d", method, s.counts[method])
	way = s.on
	for i := range s.faults {
		f := &s.faults[i]
		if f.call == call {
			s.met++
			way = &f.way
			if f.on {
				s.on = way
			}
		}
	}
	return call, way
}

// isLate marks the context of a command that arrives when its caller has gone.
type isLate struct{}

// call executes op with the fault of the call, if it has one.
func (s *callStore) call(ctx context.Context, method string, op func(context.Context) error) (call string, err error) {
	call, way := s.next(method)
	if way == nil || way.reply == mute {
		return call, op(ctx)
	}
	for range way.now {
		err = op(ctx)
	}
	switch way.reply {
	case fails:
		err = errDown
	case hangs:
		<-ctx.Done()
		err = ctx.Err()
	}
	if way.later > 0 {
		ctx := context.WithValue(context.WithoutCancel(ctx), isLate{}, true)
		time.AfterFunc(way.later, func() { _ = op(ctx) })
	}
	return call, err
}

func (s *callStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	c.Fingerprint = bytes.Clone(c.Fingerprint) // which the caller may reuse
	var rec idempotency.Record
	call, err := s.call(ctx, "Acquire", func(ctx context.Context) error {
		r, err := s.MemoryStore.Acquire(ctx, key, c)
		if ctx.Value(isLate{}) != nil {
			s.history.arrived(ctx, r.State)
			return err
		}
		rec = r
		return err
	})
	if err != nil {
		rec = idempotency.Record{}
	}
	s.history.called(ctx, storeCall{name: call, state: rec.State, err: err})
	return rec, err
}

func (s *callStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	r.Fingerprint, r.Value = bytes.Clone(r.Fingerprint), bytes.Clone(r.Value)
	call, err := s.call(ctx, "Complete", func(ctx context.Context) error {
		err := s.MemoryStore.Complete(ctx, key, token, r)
		if err == nil {
			s.history.stored()
		}
		return err
	})
	s.history.called(ctx, storeCall{name: call, err: err})
	return err
}

func (s *callStore) Release(ctx context.Context, key, token string) error {
	call, err := s.call(ctx, "Release", func(ctx context.Context) error {
		return s.MemoryStore.Release(ctx, key, token)
	})
	s.history.called(ctx, storeCall{name: call, err: err})
	return err
}

// Watch implements idempotency.Watcher. It is told only what is new since now,
// whenever the fault lets it through.
func (s *callStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	call, way := s.next("Watch")
	changed, err := s.MemoryStore.Watch(ctx, key)
	switch {
	case way == nil:
	case way.reply == fails:
		err = errDown
	case way.reply == hangs:
		<-ctx.Done()
		err = ctx.Err()
	case way.reply == mute:
		changed = make(chan struct{})
	}
	s.history.called(ctx, storeCall{name: call, err: err})
	return changed, err
}
