package idempotency

import (
	"bytes"
	"context"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// A MemoryStore keeps records in the memory of one process. They are gone when
// the process ends, and no other process sees them. That suits a service of one
// replica which can do without protection across a restart.
//
// The zero value is ready to use. A MemoryStore is safe for concurrent use and
// must not be copied. It has no goroutine: each operation frees a few expired
// cells, and Len and Bytes free all of them. Among records of different TTLs,
// one that has expired may count for a quarter of its TTL longer. Time is
// monotonic, so a step of the wall clock has no effect.
//
// A middleware that was given the MemoryStore itself stores a large response in
// pieces. Record.Value then has only the first of them, and the Record has the
// others. So a Store that wraps a MemoryStore passes on each Record as it is.
type MemoryStore struct {
	// MaxBytes bounds the memory of all cells, in bytes. Zero or less means 256
	// MiB. When the store is full, new keys get [ErrStoreFull]. Nothing is
	// evicted, since a lost record is a handler that runs twice. Completing or
	// releasing a key may exceed the bound. MaxBytes must be set before the
	// first use.
	MaxBytes int64

	bytes  atomic.Int64 // what the cells and packed records of all shards cost
	shards [memoryShards]memoryShard
}

const (
	// memoryShards is far above the number of processors, so that two requests
	// seldom want the same lock.
	memoryShards    = 64
	defaultMaxBytes = 256 << 20

	// retireBatch is how many expired cells of one queue an operation frees. It
	// is more than one, so that the store catches up after an idle time, and
	// few enough that no request notices. retireQueues is how many queues it
	// looks at. Each costs a request about 100 ns when the queue is not in the
	// cache of the processor.
	retireBatch  = 16
	retireQueues = 2
)

var (
	_ Store     = (*MemoryStore)(nil)
	_ Watcher   = (*MemoryStore)(nil)
	_ Inspector = (*MemoryStore)(nil)
)

// NewMemoryStore returns an empty store, like new(MemoryStore).
func NewMemoryStore() *MemoryStore { return new(MemoryStore) }

// A memoryShard holds a part of the keys. A claim or a marker is a memoryCell,
// of which there are few. A completed record is packed into a slab without
// pointers, because a million cells with pointers cost the garbage collector
// over 100 ms each time, and slabs under 1 ms.
type memoryShard struct {
	mu sync.Mutex // guards all of the shard

	// A live key is in cells or in packed. It is in both when a record that has
	// expired was not dropped yet: then the cell counts.
	cells  map[string]*memoryCell
	packed packedRecords

	queues   []*memoryQueue // one for each class of TTLs in use
	turn     int            // index of the queue that retire looked at last
	watches  map[string]*memoryWatch
	peak     int         // largest len(cells) since the map was made
	freeCell *memoryCell // for the next claim, so that most allocate none

	_ [64]byte // keeps the next shard's lock off this one's cache line
}

// A cellState is the state of a memoryCell. An absent cell has none.
type cellState uint8

const (
	cellClaimed   cellState = iota
	cellReleased            // a marker: its attempt and its token count
	cellCompleted           // too large for a slab, or displaced by an equal hash
)

// A memoryCell is a claim, a marker, or a record that is not packed.
type memoryCell struct {
	key, token  string
	state       cellState
	once        bool
	attempt     int
	fingerprint []byte
	value       []byte
	parts       [][]byte // follow value
	leaseEnd    int64    // in the time of memoryNow, as expiry is
	expiry      int64

	// The queue of its class, and its neighbours there.
	queue      *memoryQueue
	prev, next *memoryCell
}

// cost is what a cell counts for in MaxBytes. A change to any of its slices or
// its token changes it, and must be counted in MemoryStore.bytes.
func (c *memoryCell) cost() int64 {
	const overhead = 256 // the struct and its place in the map
	return int64(overhead + len(c.key) + len(c.token) + len(c.fingerprint) + len(c.value) + sizeOf(c.parts))
}

// sizeOf returns the memory of parts: all of it, as the store keeps the slices
// themselves and not copies of what they hold.
func sizeOf(parts [][]byte) (n int) {
	for _, part := range parts {
		n += cap(part)
	}
	return n
}

// All stores of a process share a seed and an epoch. The seed makes hashes that
// no client can foresee, so that a client cannot choose keys that collide.
// Times count from the epoch.
var (
	memorySeed  = maphash.MakeSeed()
	memoryEpoch = time.Now()
)

// memoryNow is the store's clock: nanoseconds since the process began, because
// one integer is cheaper to keep and to compare than a time.Time.
func memoryNow() int64 { return int64(time.Since(memoryEpoch)) }

// lock returns the shard of key, locked and rid of some expired cells. Every
// operation locks, so a store in use keeps up with what expires and needs no
// goroutine.
func (s *MemoryStore) lock(key string, now int64) (sh *memoryShard, hash uint64) {
	hash = maphash.String(memorySeed, key)
	sh = &s.shards[hash%memoryShards]
	sh.mu.Lock()
	s.retire(sh, now, retireBatch, retireQueues)
	return sh, hash
}

// Acquire implements [Store]. Its only error is [ErrStoreFull]. It ignores its
// context: it waits for nothing but a lock that is held for microseconds.
func (s *MemoryStore) Acquire(_ context.Context, key string, c Claim) (Record, error) {
	return s.acquireAt(memoryNow(), key, c)
}

// acquireAt is Acquire for the middleware, which has read the clock just
// before: reading it takes as long as finding a record. A claim that waited for
// the lock ends early by as much.
func (s *MemoryStore) acquireAt(now int64, key string, c Claim) (Record, error) {
	rec, full := s.acquire(key, c, now)
	if full {
		s.retireAll(4 * retireBatch) // other shards may hold expired cells
		rec, full = s.acquire(key, c, now)
	}
	if full {
		return Record{}, ErrStoreFull
	}
	return rec, nil
}

// acquire decides about an absent cell and a packed record, and leaves every
// other to acquireCell.
func (s *MemoryStore) acquire(key string, c Claim, now int64) (rec Record, full bool) {
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	if cell != nil && cell.expiry <= now { // retire did not come to it
		s.remove(sh, cell)
		cell = nil
	}
	if cell != nil {
		return s.acquireCell(sh, cell, c, now), false
	}
	if b, ok := sh.packed.lookup(hash, key, now); ok {
		_, _, fingerprint, value := b.fields()
		return completedRecord(c, fingerprint, value, nil), false
	}
	// A renewal that finds nothing comes from a handler that is still running
	// although its record is gone: it keeps its attempt.
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

// acquireCell decides about a cell that is claimed, released or large. Its cases
// are the rows of the table of [Store], in their order.
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

// extend starts the lease and the TTL of a claim anew for its owner. A claim that
// is sent twice arrives here too, and may do so late: so only a renewal, which
// names its attempt, sets Once, and neither unsets it.
func (s *MemoryStore) extend(sh *memoryShard, cell *memoryCell, c Claim, now int64) Record {
	cell.leaseEnd = expiry(now, c.Lease)
	cell.once = cell.once || c.Once && c.Attempt > 0
	s.requeue(sh, cell, now, max(c.TTL, c.Lease))
	return Record{State: Acquired, Attempt: cell.attempt, Once: cell.once}
}

// takeOver makes a cell that is released, or whose lease is over, a claim of c.
func (s *MemoryStore) takeOver(sh *memoryShard, cell *memoryCell, c Claim, now int64) Record {
	s.bytes.Add(-cell.cost()) // the new token and fingerprint may cost more or less
	cell.attempt++
	cell.set(c, now)
	s.bytes.Add(cell.cost())
	s.requeue(sh, cell, now, max(c.TTL, c.Lease))
	return Record{State: Acquired, Attempt: cell.attempt}
}

// expiry returns when a lease or a TTL that begins now is over. Without the
// bound the sum could overflow, and what is to last forever would be over.
func expiry(now int64, ttl time.Duration) int64 { return now + int64(min(ttl, maxTTL)) }

// mismatch reports whether both fingerprints are known and different.
func mismatch(a, b []byte) bool { return len(a) > 0 && len(b) > 0 && !bytes.Equal(a, b) }

// completedRecord is the answer for a completed cell. The slices are not copied:
// the store never changes them, and does not reuse them when the cell is gone.
func completedRecord(c Claim, fingerprint, value []byte, parts [][]byte) Record {
	if mismatch(fingerprint, c.Fingerprint) {
		return Record{State: Mismatch}
	}
	if c.Attempt > 0 {
		return Record{State: Lost}
	}
	return Record{State: Completed, Fingerprint: fingerprint, Value: value, parts: parts}
}

// set makes the cell a claim of c, whose attempt and expiry are the caller's to
// set. A claim is never Once, whatever c says.
func (cell *memoryCell) set(c Claim, now int64) {
	cell.state, cell.token, cell.once = cellClaimed, c.Token, false
	cell.fingerprint = append(cell.fingerprint[:0], c.Fingerprint...)
	cell.leaseEnd = expiry(now, c.Lease)
}

// Complete implements [Store]. Its only error is [ErrLeaseLost]: the handler has
// run, so its result is stored even when the store is full.
func (s *MemoryStore) Complete(_ context.Context, key, token string, r Result) error {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	// That the lease is over does not matter: the owner has the result.
	if cell != nil && cell.expiry > now {
		switch {
		case cell.token != token || cell.state == cellReleased:
			return ErrLeaseLost
		case cell.state == cellCompleted:
			return nil
		}
	} else if b, ok := sh.packed.lookup(hash, key, now); ok {
		if _, owner, _, _ := b.fields(); string(owner) != token {
			return ErrLeaseLost
		}
		return nil
	}
	freed := int64(0) // counted with the new record: bytes is shared by all shards
	if cell != nil {
		freed = sh.detach(cell)
	}
	if sh.packed.add(sh.queue(r.TTL), hash, key, token, r, now) {
		s.bytes.Add(packedCost(key, token, r) - freed)
	} else {
		s.bytes.Add(-freed)
		// The cell is a new one and not the freeCell, whose fingerprint is
		// overwritten by its next user: what Acquire returns must stay valid.
		s.insert(sh, &memoryCell{
			key: key, token: token, state: cellCompleted,
			fingerprint: bytes.Clone(r.Fingerprint), value: bytes.Clone(r.Value), parts: r.parts,
		}, now, r.TTL)
	}
	sh.notify(key)
	return nil
}

// Release implements [Store]. It returns nil. It leaves a marker even when the
// store is full.
func (s *MemoryStore) Release(_ context.Context, key, token string, keep time.Duration) error {
	now := memoryNow()
	sh, hash := s.lock(key, now)
	defer sh.mu.Unlock()
	cell := sh.cells[key]
	if cell != nil && cell.expiry > now {
		// Another state or token stays as it is: a marker keeps its time.
		if cell.state == cellClaimed && cell.token == token {
			// The marker is the cell itself, fingerprint included. Most markers
			// are gone after a lease, so they are not worth making smaller.
			cell.state = cellReleased
			if cell.attempt == 1 || cell.expiry < expiry(now, keep) {
				s.requeue(sh, cell, now, keep)
			}
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
	// The claim may still be on its way. It finds a marker without attempts.
	cell = sh.newCell(key)
	cell.state, cell.token = cellReleased, token
	s.insert(sh, cell, now, keep)
	sh.notify(key)
	return nil
}

// Len returns the number of cells: claims, markers and records. It visits every
// shard, one after the other.
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

// Bytes returns about how many bytes of memory the cells take, as MaxBytes
// counts them. It visits every shard, one after the other.
func (s *MemoryStore) Bytes() int64 {
	s.retireAll(-1)
	return s.bytes.Load()
}

// maxBytes returns the bound. It is not resolved in NewMemoryStore, as the zero
// MemoryStore is ready to use.
func (s *MemoryStore) maxBytes() int64 {
	if s.MaxBytes > 0 {
		return s.MaxBytes
	}
	return defaultMaxBytes
}

// A memoryWatch is shared by all calls of Watch for one key.
type memoryWatch struct {
	changed  chan struct{}
	watchers int // whose context has not ended
}

// Watch implements [Watcher]. It never returns an error. It tells of every
// Complete, Release and Forget, whether or not an Acquire has found the cell
// InProgress.
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
	w.watchers++
	context.AfterFunc(ctx, func() {
		sh.mu.Lock()
		defer sh.mu.Unlock()
		// The key may have another watch by now, if this one was notified.
		if w.watchers--; w.watchers == 0 && sh.watches[key] == w {
			delete(sh.watches, key)
		}
	})
	return w.changed, nil
}

// notify closes the channel of the callers that watch key. The next call of
// Watch makes a new one.
func (sh *memoryShard) notify(key string) {
	if w := sh.watches[key]; w != nil {
		close(w.changed)
		delete(sh.watches, key)
	}
}
