package fuzz

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
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
	deaf                      // an error after deafness, whatever its context says
	tardy                     // the answer after that
	mute                      // a watch that tells nothing
	jumpy                     // a watch that tells at once, for nothing
)

// deafness is how long a store takes that ignores the end of its context, as
// go-redis does without ContextTimeoutEnabled: until its ReadTimeout.
const deafness = 3*time.Second + 3*time.Millisecond

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
	{name: "deaf, not executed", reply: deaf},
	{name: "deaf, executed", now: 1, reply: deaf},
	{name: "deaf, answers", now: 1, reply: tardy},
}

// watchWays are what is tried on a Watch, which has no effect to speak of.
var watchWays = []storeWay{
	{name: "fails", reply: fails},
	{name: "hangs", reply: hangs},
	{name: "deaf", reply: deaf},
	{name: "never tells", reply: mute},
	{name: "tells for nothing", reply: jumpy},
}

// A storeFault is a way in which one call goes wrong, or all from that one on.
type storeFault struct {
	call string // "Acquire#2"
	way  storeWay
	on   bool
}

// A fullStore is what a MemoryStore does.
type fullStore interface {
	idempotency.Store
	idempotency.Watcher
}

// A remoteStore keeps the key of one history in a store that it shares with
// others. It cannot watch.
type remoteStore struct {
	*idemtest.RemoteStore
	prefix string
}

func (s remoteStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	return s.RemoteStore.Acquire(ctx, s.prefix+key, c)
}

func (s remoteStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	return s.RemoteStore.Complete(ctx, s.prefix+key, token, r)
}

func (s remoteStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.RemoteStore.Release(ctx, s.prefix+key, token, keep)
}

func (s remoteStore) Watch(context.Context, string) (<-chan struct{}, error) {
	return nil, errors.ErrUnsupported
}

var histories atomic.Int64

// newStore returns the store of a history.
func (f storeFlow) newStore() fullStore {
	if f.remote == nil {
		return idempotency.NewMemoryStore()
	}
	return remoteStore{f.remote, fmt.Sprint(histories.Add(1), "-")}
}

// A callStore is a store whose calls are counted and can go wrong.
type callStore struct {
	fullStore
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
	if s.counts[method] > 10_000 { // or virtual time would stand still
		panic("a busy loop")
	}
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
func (s *callStore) call(ctx context.Context, method string, op func(context.Context) error) (c storeCall, err error) {
	call, way := s.next(method)
	c = storeCall{name: call, began: s.history.tick(), isDeaf: way != nil && (way.reply == deaf || way.reply == tardy)}
	if way == nil || way.reply == mute || way.reply == jumpy {
		return c, op(ctx)
	}
	for range way.now {
		err = op(ctx)
	}
	switch way.reply {
	case fails:
		err = idemtest.ErrDown
	case hangs:
		<-ctx.Done()
		err = ctx.Err()
	case deaf:
		time.Sleep(deafness)
		err = idemtest.ErrDown
	case tardy:
		time.Sleep(deafness)
	}
	if way.later > 0 {
		ctx := context.WithValue(context.WithoutCancel(ctx), isLate{}, true)
		time.AfterFunc(way.later, func() { _ = op(ctx) })
	}
	return c, err
}

func (s *callStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	c.Fingerprint = bytes.Clone(c.Fingerprint) // which the caller may reuse
	var rec idempotency.Record
	call, err := s.call(ctx, "Acquire", func(ctx context.Context) error {
		r, err := s.fullStore.Acquire(ctx, key, c)
		if ctx.Value(isLate{}) != nil {
			s.history.arrived(r.State)
			return err
		}
		rec = r
		return err
	})
	if err != nil {
		rec = idempotency.Record{}
	}
	call.state, call.err = rec.State, err
	s.history.called(ctx, call)
	return rec, err
}

func (s *callStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	r.Fingerprint, r.Value = bytes.Clone(r.Fingerprint), bytes.Clone(r.Value)
	call, err := s.call(ctx, "Complete", func(ctx context.Context) error {
		err := s.fullStore.Complete(ctx, key, token, r)
		if err == nil {
			s.history.stored()
		}
		return err
	})
	call.err = err
	s.history.called(ctx, call)
	return err
}

func (s *callStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	call, err := s.call(ctx, "Release", func(ctx context.Context) error {
		return s.fullStore.Release(ctx, key, token, keep)
	})
	call.err = err
	s.history.called(ctx, call)
	return err
}

// Watch implements idempotency.Watcher. It is told only what is new since now,
// whenever the fault lets it through.
func (s *callStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	call, way := s.next("Watch")
	changed, err := s.fullStore.Watch(ctx, key)
	switch {
	case way == nil:
	case way.reply == fails:
		err = idemtest.ErrDown
	case way.reply == hangs:
		<-ctx.Done()
		err = ctx.Err()
	case way.reply == deaf:
		time.Sleep(deafness)
		err = idemtest.ErrDown
	case way.reply == mute:
		changed = make(chan struct{})
	case way.reply == jumpy:
		told := make(chan struct{})
		close(told)
		changed = told
	}
	s.history.called(ctx, storeCall{name: call, began: s.history.tick(), err: err, isDeaf: way != nil && way.reply == deaf})
	return changed, err
}
