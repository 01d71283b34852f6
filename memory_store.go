package idempotency

import (
	"bytes"
	"context"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// A MemoryStore keeps records in the memory of one process: they are gone when
// it ends, and no other process sees them. It is what a service of one replica
// needs, if it can do without protection across a restart.
//
// The zero value is ready to use. A MemoryStore is safe for concurrent use and
// must not be copied. It has no goroutine: expired cells are freed as the store
// is used, a few with each operation, and all of them by Len and Bytes. Time is
// monotonic, so a clock that is set does not matter.
//
// A middleware that was given the MemoryStore itself stores large responses in
// pieces, which only a Record as Acquire returned it holds together.
type MemoryStore struct {
	// MaxBytes bounds the memory of all cells. Default 256 MiB. When the store
	// is full new keys get [ErrStoreFull]; nothing is evicted, since a lost
	// record is a handler that runs twice. Completing a claim that was let in
	// may exceed the bound. It must be set before the first use.
	MaxBytes int64

	bytes  atomic.Int64
	shards [memoryShards]memoryShard
}

const (
	memoryShards    = 64
	defaultMaxBytes = 256 << 20

	// retireBatch is how many expired cells of one TTL an operation frees. More
	// than one, so that the store catches up after an idle time.
	retireBatch = 16
)

var (
	_ Store   = (*MemoryStore)(nil)
	_ Watcher = (*MemoryStore)(nil)
)

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore { return new(MemoryStore) }

// A memoryShard holds a part of the keys. What is claimed or released is a
// memoryCell, of which there are few. What is completed is packed into slabs
// without pointers, because a million cells with pointers cost the garbage
// collector over 100 ms each time, and slabs under 1 ms.
type memoryShard struct {
	mu      sync.Mutex             // guards all of the shard
	cells   map[string]*memoryCell // looked up first
	packed  packedRecords
	queues  []*memoryQueue // one for each TTL in use
	watches map[string]*memoryWatch
	peak    int         // largest len(cells) since the map was made
	spare   *memoryCell // for reuse
	_       [64]byte    // keeps neighbours off each other's cache lines
}

type cellState uint8

const (
	cellClaimed cellState = iota
	cellReleased
	cellCompleted // too large for a slab, or displaced by an equal hash
)

type memoryCell struct {
	key, token  string
	state       cellState
	once        bool
	attempt     int
	fingerprint []byte
	value       []byte
	parts       [][]byte
	leaseEnd    int64
	expiry      int64

	queue      *memoryQueue
	prev, next *memoryCell
}

// cost is what a cell counts for in MaxBytes.
func (c *memoryCell) cost() int64 {
	const overhead = 256 // the struct and its place in the map
	return int64(overhead + len(c.key) + len(c.token) + len(c.fingerprint) + len(c.value) + sizeOf(c.parts))
}

// sizeOf returns the memory of parts.
func sizeOf(parts [][]byte) (n int) {
	for _, part := range parts {
		n += cap(part)
	}
	return n
}

var (
	memorySeed  = maphash.MakeSeed()
	memoryEpoch = time.Now()
)

func memoryNow() int64 { return int64(time.Since(memoryEpoch)) }

// lock returns the shard of key, locked and rid of some expired cells.
func (s *MemoryStore) lock(key string, now int64) (sh *memoryShard, hash uint64) {
	hash = maphash.String(memorySeed, key)
	sh = &s.shards[hash%memoryShards]
	sh.mu.Lock()
	s.retire(sh, now, retireBatch)
	return sh, hash
}

// Acquire implements [Store]. Its only error is [ErrStoreFull].
func (s *MemoryStore) Acquire(_ context.Context, key string, c Claim) (Record, error) {
	return s.acquireAt(memoryNow(), key, c)
}

// acquireAt is for a caller that has just looked at the clock: that takes as
// long as to find a record. A claim made late ends early by as much.
func (s *MemoryStore) acquireAt(now int64, key string, c Claim) (Record, error) {
	rec, full := s.acquire(key, c, now)
	if full {
		s.retireAll(4 * retireBatch) // other shards may hold what has expired
		rec, full = s.acquire(key, c, now)
	}
	if full {
		return Record{}, ErrStoreFull
	}
	return rec, nil
}

func (s *MemoryStore) acquire(key string, c Claim, now int64) (rec Record, full bool) {
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	if cell != nil && cell.expiry <= now {
		s.remove(sh, cell)
		cell = nil
	}
	if cell != nil {
		return s.acquireCell(sh, cell, c, now), false
	}
	if b, ok := sh.packed.lookup(hash, key, now); ok {
		_, _, fingerprint, value := b.parts()
		return completedRecord(c, fingerprint, value, nil), false
	}
	cell = sh.newCell(key)
	cell.attempt = max(c.Attempt, 1)
	cell.set(c, now)
	if s.bytes.Load()+cell.cost() > s.maxBytes() {
		sh.recycle(cell)
		return Record{}, true
	}
	s.insert(sh, cell, now, max(c.TTL, c.Lease))
	return Record{State: Acquired, Attempt: cell.attempt}, false
}

// acquireCell decides about a cell that is claimed, released or large, by the
// table of [Store].
func (s *MemoryStore) acquireCell(sh *memoryShard, cell *memoryCell, c Claim, now int64) Record {
	own, renewal := cell.token == c.Token, c.Attempt > 0
	switch {
	case cell.state == cellReleased && (own || renewal):
		return Record{State: Lost}
	case cell.state == cellReleased:
		return s.takeOver(sh, cell, c, now)
	case mismatch(cell.fingerprint, c.Fingerprint):
		return Record{State: Mismatch}
	case cell.state == cellCompleted:
		return completedRecord(c, cell.fingerprint, cell.value, cell.parts)
	case own && (!renewal || c.Attempt == cell.attempt):
		return s.extend(sh, cell, c, now)
	case renewal:
		return Record{State: Lost}
	case cell.leaseEnd > now:
		return Record{State: InProgress, Remaining: time.Duration(cell.leaseEnd - now)}
	case cell.once:
		return Record{State: Abandoned}
	}
	return s.takeOver(sh, cell, c, now)
}

// extend starts the lease and the TTL of a claim anew for its owner.
func (s *MemoryStore) extend(sh *memoryShard, cell *memoryCell, c Claim, now int64) Record {
	cell.leaseEnd = expiry(now, c.Lease)
	cell.once = cell.once || c.Once && c.Attempt > 0
	s.requeue(sh, cell, now, max(c.TTL, c.Lease))
	return Record{State: Acquired, Attempt: cell.attempt, Once: cell.once}
}

// takeOver makes a cell that is free, or whose lease is over, a claim of c.
func (s *MemoryStore) takeOver(sh *memoryShard, cell *memoryCell, c Claim, now int64) Record {
	s.bytes.Add(-cell.cost())
	cell.attempt++
	cell.set(c, now)
	s.bytes.Add(cell.cost())
	s.requeue(sh, cell, now, max(c.TTL, c.Lease))
	return Record{State: Acquired, Attempt: cell.attempt}
}

// expiry returns when a cell of that ttl expires. A sum that overflows would
// have expired already.
func expiry(now int64, ttl time.Duration) int64 { return now + int64(min(ttl, maxTTL)) }

func mismatch(a, b []byte) bool { return len(a) > 0 && len(b) > 0 && !bytes.Equal(a, b) }

func completedRecord(c Claim, fingerprint, value []byte, parts [][]byte) Record {
	if mismatch(fingerprint, c.Fingerprint) {
		return Record{State: Mismatch}
	}
	if c.Attempt > 0 {
		return Record{State: Lost}
	}
	return Record{State: Completed, Fingerprint: fingerprint, Value: value, parts: parts}
}

// set makes the cell a claim of c. Its attempt is the caller's to set.
func (cell *memoryCell) set(c Claim, now int64) {
	cell.state, cell.token, cell.once = cellClaimed, c.Token, false
	cell.fingerprint = append(cell.fingerprint[:0], c.Fingerprint...)
	cell.leaseEnd = expiry(now, c.Lease)
}

// Complete implements [Store]. Its only error is [ErrLeaseLost].
func (s *MemoryStore) Complete(_ context.Context, key, token string, r Result) error {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	if cell != nil && cell.expiry > now {
		switch {
		case cell.token != token || cell.state == cellReleased:
			return ErrLeaseLost
		case cell.state == cellCompleted:
			return nil
		}
	} else if b, ok := sh.packed.lookup(hash, key, now); ok {
		if _, owner, _, _ := b.parts(); string(owner) != token {
			return ErrLeaseLost
		}
		return nil
	}
	freed := int64(0)
	if cell != nil {
		freed = sh.take(cell)
	}
	if sh.packed.add(sh.queue(r.TTL), hash, key, token, r, now) {
		s.bytes.Add(packedCost(key, token, r) - freed)
	} else {
		s.bytes.Add(-freed)
		// Not from the spare: what a completed cell returns stays valid.
		s.insert(sh, &memoryCell{
			key: key, token: token, state: cellCompleted,
			fingerprint: bytes.Clone(r.Fingerprint), value: bytes.Clone(r.Value), parts: r.parts,
		}, now, r.TTL)
	}
	sh.notify(key)
	return nil
}

// Release implements [Store]. It returns nil.
func (s *MemoryStore) Release(_ context.Context, key, token string, keep time.Duration) error {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	if cell != nil && cell.expiry > now {
		if cell.state == cellClaimed && cell.token == token {
			cell.state = cellReleased
			s.requeue(sh, cell, now, keep)
			sh.notify(key)
		}
		return nil
	}
	if _, ok := sh.packed.lookup(hash, key, now); ok {
		return nil
	}
	if cell != nil {
		s.remove(sh, cell)
	}
	cell = sh.newCell(key)
	cell.state, cell.token, cell.attempt = cellReleased, token, 0
	cell.fingerprint = cell.fingerprint[:0]
	s.insert(sh, cell, now, keep)
	sh.notify(key)
	return nil
}

// Len returns the number of cells: claims, released markers and records.
func (s *MemoryStore) Len() int {
	s.retireAll(-1)
	n := 0
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		n += len(sh.cells) + len(sh.packed.index)
		sh.mu.Unlock()
	}
	return n
}

// Bytes returns about how much memory the cells take, as MaxBytes counts it.
func (s *MemoryStore) Bytes() int64 {
	s.retireAll(-1)
	return s.bytes.Load()
}

func (s *MemoryStore) maxBytes() int64 {
	if s.MaxBytes > 0 {
		return s.MaxBytes
	}
	return defaultMaxBytes
}

// memoryWatch is shared by all who watch one key.
type memoryWatch struct {
	changed chan struct{}
	users   int
}

// Watch implements [Watcher]. It does not fail.
func (s *MemoryStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	sh, _ := s.lock(key, memoryNow())
	defer sh.mu.Unlock()
	w := sh.watches[key]
	if w == nil {
		w = &memoryWatch{changed: make(chan struct{})}
		if sh.watches == nil {
			sh.watches = make(map[string]*memoryWatch)
		}
		sh.watches[key] = w
	}
	w.users++
	context.AfterFunc(ctx, func() {
		sh.mu.Lock()
		defer sh.mu.Unlock()
		if w.users--; w.users == 0 && sh.watches[key] == w {
			delete(sh.watches, key)
		}
	})
	return w.changed, nil
}

// notify tells those who watch key that it changed.
func (sh *memoryShard) notify(key string) {
	if w := sh.watches[key]; w != nil {
		close(w.changed)
		delete(sh.watches, key)
	}
}
