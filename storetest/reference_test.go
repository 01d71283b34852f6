package storetest

import (
	"bytes"
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A reference is the contract in its plainest form: a map behind a mutex. Its
// fault makes it break the contract in one point.
type reference struct {
	fault fault

	mu      sync.Mutex
	cells   map[string]cell
	watches map[string][]chan struct{}
	watcher map[string][]context.Context // the contexts of the watches
	buffers map[string][]byte
	calls   int

	// The clock: what it was moved by, and the time since start. It only
	// moves by itself if start is set.
	moved time.Duration
	start time.Time
}

// A fault is what a broken store does differently. The zero fault breaks nothing.
type fault struct {
	key    func(string) string // folds keys
	before func(*call)         // changes a cell before the decision
	after  func(*call)         // changes the decision
	racy   func(*call) bool    // decides on a cell that was read earlier
	reuse  bool                // writes a value into the buffer of the last one
	silent func(*call) bool    // does not notify of a change
	drop   func(*call) bool    // drops the watches of the cell

	watch func(*reference, string) // called when a watch of this key has begun
}

type status int

const (
	absent status = iota
	claimed
	completed
	released
)

type cell struct {
	status             status
	token              string
	attempt            int
	former             string // the token before a take-over
	fingerprint, value []byte
	once               bool
	lease              time.Duration

	// Times of the store's clock: when the claim was made, when its lease is
	// over, and from when on the cell is absent.
	began, leaseEnd, expires time.Duration
}

// A call is one method call on its way through the store.
type call struct {
	store      *reference
	ctx        context.Context
	key, token string
	claim      *idempotency.Claim  // of Acquire
	result     *idempotency.Result // of Complete
	keep       time.Duration       // of Release, which has neither
	inspects   bool                // Inspect
	seen       *idempotency.Cell   // of Forget
	now        time.Duration

	old, cell cell // as it was found, and as it is left
	rec       idempotency.Record
	view      idempotency.Cell // of Inspect
	err       error
}

func newReference(f fault) *reference {
	return &reference{
		fault: f, cells: make(map[string]cell),
		watches: make(map[string][]chan struct{}), watcher: make(map[string][]context.Context),
		buffers: make(map[string][]byte),
	}
}

func (s *reference) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	done := s.do(&call{store: s, ctx: ctx, key: key, token: c.Token, claim: &c}, acquire)
	return done.rec, done.err
}

func (s *reference) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	return s.do(&call{store: s, ctx: ctx, key: key, token: token, result: &r}, complete).err
}

func (s *reference) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.do(&call{store: s, ctx: ctx, key: key, token: token, keep: keep}, release).err
}

func (s *reference) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	done := s.do(&call{store: s, ctx: ctx, key: key, inspects: true}, inspect)
	return done.view, done.err
}

func (s *reference) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	return s.do(&call{store: s, ctx: ctx, key: key, seen: &seen}, forget).err
}

func (s *reference) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moved += d
}

// do makes the call with the fault, if there is one.
func (s *reference) do(c *call, decide func(*call)) *call {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if s.fault.key != nil {
		c.key = s.fault.key(c.key)
	}
	c.now = s.moved
	if !s.start.IsZero() {
		c.now += time.Since(s.start)
	}
	c.cell = s.cells[c.key]
	if c.cell.expires <= c.now {
		c.cell = cell{}
	}
	c.old = c.cell
	if s.fault.before != nil {
		s.fault.before(c)
	}
	if s.fault.racy != nil && s.fault.racy(c) {
		s.letOthersIn()
	}
	decide(c)
	if s.fault.after != nil {
		s.fault.after(c)
	}
	if s.fault.reuse && c.old.status != completed && c.cell.status == completed {
		s.buffers[c.key] = append(s.buffers[c.key][:0], c.cell.value...)
		c.cell.value = s.buffers[c.key]
	}
	s.cells[c.key] = c.cell
	s.notify(c)
	return c
}

// letOthersIn gives up the lock until there was another call, or long enough
// to say that there is none.
func (s *reference) letOthersIn() {
	calls, deadline := s.calls, time.Now().Add(2*time.Millisecond)
	for s.calls == calls && time.Now().Before(deadline) {
		s.mu.Unlock()
		runtime.Gosched()
		s.mu.Lock()
	}
}

func (s *reference) notify(c *call) {
	if s.fault.drop != nil && s.fault.drop(c) {
		delete(s.watches, c.key)
	}
	freed := c.forgets() && c.err == nil
	if !freed && (c.cell.status == c.old.status || c.cell.status != completed && c.cell.status != released) {
		return
	}
	if s.fault.silent != nil && s.fault.silent(c) {
		return
	}
	for _, w := range s.watches[c.key] {
		close(w)
	}
	delete(s.watches, c.key)
}

func (s *reference) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := make(chan struct{})
	s.watches[key] = append(s.watches[key], w)
	s.watcher[key] = append(s.watcher[key], ctx)
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watches[key] = slices.DeleteFunc(s.watches[key], func(c chan struct{}) bool { return c == w })
	})
	if s.fault.watch != nil {
		s.fault.watch(s, key)
	}
	return w, nil
}

// acquire is the table of Store.Acquire.
func acquire(c *call) {
	old, lapsed := c.cell, c.cell.leaseEnd <= c.now
	own, renewal := old.token == c.token, c.claim.Attempt != 0
	known := len(old.fingerprint) > 0 && len(c.claim.Fingerprint) > 0
	switch {
	case old.status == absent:
		c.take(max(c.claim.Attempt, 1))
	case old.status == released && (own || renewal):
		c.rec.State = idempotency.Lost
	case old.status == released:
		c.take(old.attempt + 1)
	case known && !bytes.Equal(old.fingerprint, c.claim.Fingerprint):
		c.rec.State = idempotency.Mismatch
	case old.status == completed && renewal:
		c.rec.State = idempotency.Lost
	case old.status == completed:
		c.rec = idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}
	case own && (!renewal || c.claim.Attempt == old.attempt):
		c.extend(old.once || renewal && c.claim.Once)
	case renewal:
		c.rec.State = idempotency.Lost
	case !lapsed:
		c.rec = idempotency.Record{State: idempotency.InProgress, Remaining: old.leaseEnd - c.now}
	case old.once:
		c.rec.State = idempotency.Abandoned
	default:
		c.take(old.attempt + 1)
	}
}

// take makes the cell a claim.
func (c *call) take(attempt int) {
	c.cell = cell{
		status: claimed, token: c.token, former: c.cell.token, attempt: attempt,
		fingerprint: bytes.Clone(c.claim.Fingerprint), began: c.now,
	}
	c.extend(false)
}

// extend starts the lease and the TTL of the claim anew.
func (c *call) extend(once bool) {
	c.cell.once, c.cell.lease = once, c.claim.Lease
	c.cell.leaseEnd, c.cell.expires = c.now+c.claim.Lease, c.now+max(c.claim.TTL, c.claim.Lease)
	c.rec = idempotency.Record{State: idempotency.Acquired, Attempt: c.cell.attempt, Once: once}
}

func complete(c *call) {
	switch owner := c.cell.token == c.token; {
	case c.cell.status == absent, c.cell.status == claimed && owner:
		c.cell = cell{
			status: completed, token: c.token, attempt: c.cell.attempt, expires: c.now + c.result.TTL,
			fingerprint: bytes.Clone(c.result.Fingerprint), value: bytes.Clone(c.result.Value),
		}
	case c.cell.status == completed && owner:
	default:
		c.err = idempotency.ErrLeaseLost
	}
}

func release(c *call) {
	switch {
	case c.cell.status == absent:
		c.cell = cell{status: released, token: c.token, expires: c.now + c.keep}
	case c.cell.status == claimed && c.cell.token == c.token:
		c.cell.status, c.cell.expires = released, c.now+c.keep
		if c.cell.attempt > 1 {
			c.cell.expires = max(c.cell.expires, c.old.expires)
		}
	}
}

// inspect shows the cell.
func inspect(c *call) {
	is := c.cell
	if is.status == absent {
		return
	}
	c.view = idempotency.Cell{
		State: idempotency.Completed, Attempt: is.attempt, Once: is.once, Owner: is.token, TTL: is.expires - c.now,
		Fingerprint: is.fingerprint, Value: is.value,
	}
	switch {
	case is.status == completed:
		c.view.Attempt = 0
	case is.status == released:
		c.view.State, c.view.Once = idempotency.Released, false
	case is.leaseEnd > c.now:
		c.view.State, c.view.Lease = idempotency.InProgress, is.leaseEnd-c.now
	case is.once:
		c.view.State = idempotency.Abandoned
	default:
		c.view.State = idempotency.Lapsed
	}
}

// forget frees the cell, if it is the one that was seen.
func forget(c *call) {
	inspect(c)
	is, seen := c.view, c.seen
	switch {
	case is.State == idempotency.InProgress:
		c.err = idempotency.ErrInProgress
	case is.State != seen.State || is.Attempt != seen.Attempt || is.Owner != seen.Owner:
		c.err = idempotency.ErrCellChanged
	case c.cell.status == claimed:
		c.cell.once, c.cell.fingerprint = false, nil
	case c.cell.status == completed:
		c.cell = cell{status: released, attempt: max(c.cell.attempt, 1), expires: c.cell.expires}
	}
}
