package idempotency

import (
	"encoding/binary"
	"math/bits"
	"slices"
	"time"
)

// A memoryQueue holds what a shard keeps for TTLs of one class. Cells of one TTL
// expire in the order they came, so the oldest are always in front: the store
// never searches or sweeps. A cell may expire before one of a longer TTL in front
// of it. It then stays in memory for a quarter of its TTL at most.
type memoryQueue struct {
	class       time.Duration
	first, last *memoryCell // linked, as a renewal takes a cell from the middle
	slabs       []*slab     // of packed records, which stay until they expire
}

// ttlClass returns the lower end of the class of ttl: its three highest bits.
// That makes four classes of an octave. A thousand TTLs between an hour and a
// day share 19 queues, so that they cost a request no more than one TTL does.
func ttlClass(ttl time.Duration) time.Duration {
	if low := bits.Len64(uint64(ttl)) - 3; low > 0 {
		return ttl >> low << low
	}
	return ttl
}

// empty reports whether the queue can go: the next cell of its class makes it
// anew.
func (q *memoryQueue) empty() bool { return q.first == nil && len(q.slabs) == 0 }

// queue returns the queue for ttl, and makes it if there is none. A search of a
// short slice is faster than a map.
func (sh *memoryShard) queue(ttl time.Duration) *memoryQueue {
	class := ttlClass(ttl)
	for _, q := range sh.queues {
		if q.class == class {
			return q
		}
	}
	q := &memoryQueue{class: class}
	sh.queues = append(sh.queues, q)
	return q
}

// insert adds a cell that expires after ttl. The map is made late: a store that
// sees few keys has most of its shards empty.
func (s *MemoryStore) insert(sh *memoryShard, cell *memoryCell, now int64, ttl time.Duration) {
	if sh.cells == nil {
		sh.cells = make(map[string]*memoryCell)
	}
	sh.cells[cell.key] = cell
	sh.peak = max(sh.peak, len(sh.cells))
	s.bytes.Add(cell.cost())
	sh.queue(ttl).push(cell, expiry(now, ttl))
}

// requeue starts the TTL of a cell anew, in the queue of that TTL: a marker, for
// one, is kept for another time than its claim.
func (s *MemoryStore) requeue(sh *memoryShard, cell *memoryCell, now int64, ttl time.Duration) {
	cell.unlink()
	sh.queue(ttl).push(cell, expiry(now, ttl))
}

// remove takes a cell out of the shard.
func (s *MemoryStore) remove(sh *memoryShard, cell *memoryCell) {
	s.bytes.Add(-sh.detach(cell))
}

// detach is remove for a caller that counts the bytes itself: it returns them.
func (sh *memoryShard) detach(cell *memoryCell) (cost int64) {
	cost = cell.cost()
	delete(sh.cells, cell.key)
	cell.unlink()
	sh.recycle(cell)
	return cost
}

// push puts a cell behind the others.
func (q *memoryQueue) push(cell *memoryCell, expiry int64) {
	cell.expiry = expiry
	cell.queue, cell.prev, cell.next = q, q.last, nil
	if q.last == nil {
		q.first = cell
	} else {
		q.last.next = cell
	}
	q.last = cell
}

// unlink takes a cell out of its queue.
func (cell *memoryCell) unlink() {
	q := cell.queue
	if cell.prev == nil {
		q.first = cell.next
	} else {
		cell.prev.next = cell.next
	}
	if cell.next == nil {
		q.last = cell.prev
	} else {
		cell.next.prev = cell.prev
	}
	cell.queue, cell.prev, cell.next = nil, nil, nil // keeps no other cell alive
}

// newCell returns a cell for key, the freeCell if there is one. Its fingerprint
// is empty and may have capacity.
func (sh *memoryShard) newCell(key string) *memoryCell {
	cell := sh.freeCell
	if cell == nil {
		cell = new(memoryCell)
	}
	sh.freeCell = nil
	cell.key = key
	return cell
}

// recycle keeps a cell for the next claim. A completed one is left alone: a
// caller may hold its slices.
func (sh *memoryShard) recycle(cell *memoryCell) {
	if cell.state != cellCompleted {
		*cell = memoryCell{fingerprint: cell.fingerprint[:0]}
		sh.freeCell = cell
	}
}

// retire frees up to limit expired cells in each of so many queues, or all if
// limit is negative. The queues take turns. Cells and packed records share the
// limit, because a request pays for both.
func (s *MemoryStore) retire(sh *memoryShard, now int64, limit, queues int) {
	for queues = min(queues, len(sh.queues)); queues > 0; queues-- {
		sh.turn++
		if sh.turn >= len(sh.queues) {
			sh.turn = 0
		}
		s.retireQueue(sh, now, limit)
	}
	// One peak must not cost its memory for good. A rebuild is paid for by the
	// thousand removals before it.
	if isSparse(len(sh.cells), sh.peak) {
		sh.cells = rebuilt(sh.cells)
		sh.peak = len(sh.cells)
	}
}

// retireQueue is retire for the queue whose turn it is.
func (s *MemoryStore) retireQueue(sh *memoryShard, now int64, limit int) {
	q := sh.queues[sh.turn]
	for ; limit != 0 && q.first != nil && q.first.expiry <= now; limit-- {
		s.remove(sh, q.first)
	}
	s.bytes.Add(-sh.packed.retire(q, now, limit))
	if q.empty() { // the last one takes its index; their order does not matter
		last := len(sh.queues) - 1
		sh.queues[sh.turn] = sh.queues[last]
		sh.queues[last] = nil
		sh.queues = sh.queues[:last]
	}
}

// retireAll is retire for every shard. It holds one lock at a time, so other
// shards go on.
func (s *MemoryStore) retireAll(limit int) {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		s.retire(sh, memoryNow(), limit, len(sh.queues))
		sh.mu.Unlock()
	}
}

// isSparse reports whether a map of n entries, which once had peak, is worth
// rebuilding: Go's maps never shrink.
func isSparse(n, peak int) bool { return peak > 1024 && n < peak/8 }

// rebuilt returns a copy of m with room for as many entries again.
func rebuilt[K comparable, V any](m map[K]V) map[K]V {
	r := make(map[K]V, 2*len(m))
	for k, v := range m {
		r[k] = v
	}
	return r
}

// packedRecords are the completed records of a shard: an index by hash into
// slabs of bytes. Neither has a pointer for each record, so the garbage collector
// has nothing to follow. Two keys of one hash cannot both be indexed: the second
// stays a memoryCell.
type packedRecords struct {
	index  map[uint64]recordRef
	slabs  map[uint32]*slab
	nextID uint32
	peak   int // largest len(index) since the map was made
}

// A recordRef is where a record begins.
type recordRef struct{ slab, offset uint32 }

// A slab holds records one after the other, oldest first. Once written a record
// is never changed and its bytes are never reused, so that what a replay reads
// stays valid without a copy; the garbage collector takes a slab when the last
// reader is gone.
type slab struct {
	id      uint32
	data    []byte
	expired int // the offset of the first record that has not expired
}

const (
	// A slab is twice as large as the one before it, up to maxSlabSize: a shard
	// with few records wastes little, and one with many has few slabs.
	firstSlabSize = 4 << 10
	maxSlabSize   = 64 << 10

	// maxPacked keeps out records that would waste much of a slab's end. A
	// response of the middleware that is larger than one chunk is not packed
	// either, as its chunks would be copied.
	maxPacked = 16 << 10
)

// A packed record begins with numbers, little endian, and ends with the value:
//
//	expiry              8 bytes
//	hash                8
//	length              4, of the whole record
//	length of key       2
//	length of token     2
//	… of fingerprint    2
//	key, token, fingerprint, value
//
// Attempt and Once are not in it: they end with the claim.
const packedHeader = 26

// packedSize returns the length of a packed record.
func packedSize(key, token string, r Result) int {
	return packedHeader + len(key) + len(token) + len(r.Fingerprint) + len(r.Value)
}

// packedCost is what a record counts for in MaxBytes.
func packedCost(key, token string, r Result) int64 {
	return indexCost + int64(packedSize(key, token, r))
}

// indexCost is about what a record takes in the index: 16 bytes in a map that is
// half empty on the average.
const indexCost = 32

// record returns the record that begins at ref.
func (r *packedRecords) record(ref recordRef) packedRecord {
	b := r.slabs[ref.slab].data[ref.offset:]
	return packedRecord(b[:binary.LittleEndian.Uint32(b[16:])])
}

// A packedRecord is the bytes of one record. Its methods check no bounds: only
// add writes records, and they never leave the process.
type packedRecord []byte

// The first two fields of a record. An expiry is in the time of memoryNow.
func (b packedRecord) expiry() int64 { return int64(binary.LittleEndian.Uint64(b)) }
func (b packedRecord) hash() uint64  { return binary.LittleEndian.Uint64(b[8:]) }

// fields returns what a record holds.
func (b packedRecord) fields() (key, token, fingerprint, value []byte) {
	k := packedHeader + int(binary.LittleEndian.Uint16(b[20:]))
	t := k + int(binary.LittleEndian.Uint16(b[22:]))
	f := t + int(binary.LittleEndian.Uint16(b[24:]))
	// No capacity beyond each field: an append must not write over the next.
	return b[packedHeader:k:k], b[k:t:t], b[t:f:f], b[f:len(b):len(b)]
}

// lookup returns the live record of key. One that has expired may still be in
// the index, and one of another key may have the same hash.
func (r *packedRecords) lookup(hash uint64, key string, now int64) (packedRecord, bool) {
	ref, ok := r.index[hash]
	if !ok {
		return nil, false
	}
	b := r.record(ref)
	if b.expiry() <= now {
		return nil, false
	}
	k, _, _, _ := b.fields()
	return b, string(k) == key // which does not allocate
}

// add packs a record behind the others of its queue. It returns false, and the
// record becomes a memoryCell, when the record is too large for a slab or is in
// parts, or when the index has a live record of another key with this hash.
func (r *packedRecords) add(q *memoryQueue, hash uint64, key, token string, res Result, now int64) bool {
	size := packedSize(key, token, res)
	if size > maxPacked || len(res.parts) > 0 {
		return false
	}
	if ref, ok := r.index[hash]; ok && r.record(ref).expiry() > now {
		return false
	}
	sl := r.slabFor(q, size)
	ref := recordRef{sl.id, uint32(len(sl.data))}
	b := sl.data
	b = binary.LittleEndian.AppendUint64(b, uint64(expiry(now, res.TTL)))
	b = binary.LittleEndian.AppendUint64(b, hash)
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(key)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(token)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(res.Fingerprint)))
	b = append(append(append(b, key...), token...), res.Fingerprint...)
	sl.data = append(b, res.Value...)
	r.index[hash] = ref
	r.peak = max(r.peak, len(r.index))
	return true
}

// slabFor returns the last slab of q if it has size bytes left, or a new one.
func (r *packedRecords) slabFor(q *memoryQueue, size int) *slab {
	capacity := firstSlabSize
	if n := len(q.slabs); n > 0 {
		last := q.slabs[n-1]
		if cap(last.data)-len(last.data) >= size {
			return last
		}
		capacity = min(2*cap(last.data), maxSlabSize)
	}
	if r.index == nil {
		r.index = make(map[uint64]recordRef)
		r.slabs = make(map[uint32]*slab)
	}
	// An id comes again after 2^32 slabs, when the first has long expired.
	sl := &slab{id: r.nextID, data: make([]byte, 0, max(capacity, size))}
	r.nextID++
	r.slabs[sl.id] = sl
	q.slabs = append(q.slabs, sl)
	return sl
}

// retire drops up to limit expired records of q and returns what they cost. The
// memory of a slab comes back when its last record is dropped.
func (r *packedRecords) retire(q *memoryQueue, now int64, limit int) (cost int64) {
	for ; limit != 0 && len(q.slabs) > 0; limit-- {
		sl := q.slabs[0]
		ref := recordRef{sl.id, uint32(sl.expired)}
		b := r.record(ref)
		if b.expiry() > now {
			break
		}
		if r.index[b.hash()] == ref { // else a later record has taken the hash
			delete(r.index, b.hash())
		}
		cost += indexCost + int64(len(b))
		if sl.expired += len(b); sl.expired == len(sl.data) {
			delete(r.slabs, sl.id)
			q.slabs = slices.Delete(q.slabs, 0, 1)
		}
	}
	if isSparse(len(r.index), r.peak) {
		r.index = rebuilt(r.index)
		r.peak = len(r.index)
	}
	return cost
}
