package idempotency

import (
	"encoding/binary"
	"slices"
	"time"
)

// A memoryQueue holds what a shard keeps for one TTL. Cells of one TTL expire
// in the order they came, so the oldest are always in front and nothing ever
// has to be searched or swept.
type memoryQueue struct {
	ttl         time.Duration
	first, last *memoryCell
	slabs       []*slab
}

func (q *memoryQueue) empty() bool { return q.first == nil && len(q.slabs) == 0 }

// queue returns the queue of ttl, and makes it if need be.
func (sh *memoryShard) queue(ttl time.Duration) *memoryQueue {
	for _, q := range sh.queues {
		if q.ttl == ttl {
			return q
		}
	}
	q := &memoryQueue{ttl: ttl}
	sh.queues = append(sh.queues, q)
	return q
}

// insert adds a cell that expires after ttl.
func (s *MemoryStore) insert(sh *memoryShard, cell *memoryCell, now int64, ttl time.Duration) {
	if sh.cells == nil {
		sh.cells = make(map[string]*memoryCell)
	}
	sh.cells[cell.key] = cell
	sh.peak = max(sh.peak, len(sh.cells))
	s.bytes.Add(cell.cost())
	sh.queue(ttl).push(cell, now)
}

// requeue starts the TTL of a cell anew.
func (s *MemoryStore) requeue(sh *memoryShard, cell *memoryCell, now int64, ttl time.Duration) {
	cell.unlink()
	sh.queue(ttl).push(cell, now)
}

// remove takes a cell out of the shard.
func (s *MemoryStore) remove(sh *memoryShard, cell *memoryCell) {
	s.bytes.Add(-sh.take(cell))
}

// take is remove for who counts the bytes that it returns.
func (sh *memoryShard) take(cell *memoryCell) (cost int64) {
	cost = cell.cost()
	delete(sh.cells, cell.key)
	cell.unlink()
	sh.recycle(cell)
	return cost
}

func (q *memoryQueue) push(cell *memoryCell, now int64) {
	cell.expiry = expiry(now, q.ttl)
	cell.queue, cell.prev, cell.next = q, q.last, nil
	if q.last == nil {
		q.first = cell
	} else {
		q.last.next = cell
	}
	q.last = cell
}

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
	cell.queue, cell.prev, cell.next = nil, nil, nil
}

// newCell returns a cell for key, the spare one if there is one.
func (sh *memoryShard) newCell(key string) *memoryCell {
	cell := sh.spare
	if cell == nil {
		cell = new(memoryCell)
	}
	sh.spare = nil
	cell.key = key
	return cell
}

// recycle keeps a cell for reuse, but not one whose slices a caller may have.
func (sh *memoryShard) recycle(cell *memoryCell) {
	if cell.state != cellCompleted {
		*cell = memoryCell{fingerprint: cell.fingerprint[:0]}
		sh.spare = cell
	}
}

// retire frees up to limit expired cells of each TTL, all of them if limit is
// negative.
func (s *MemoryStore) retire(sh *memoryShard, now int64, limit int) {
	for i := 0; i < len(sh.queues); i++ {
		q := sh.queues[i]
		n := limit
		for ; n != 0 && q.first != nil && q.first.expiry <= now; n-- {
			s.remove(sh, q.first)
		}
		s.bytes.Add(-sh.packed.retire(q, now, n))
		if q.empty() {
			last := len(sh.queues) - 1
			sh.queues[i] = sh.queues[last]
			sh.queues[last] = nil
			sh.queues = sh.queues[:last]
			i--
		}
	}
	if isSparse(len(sh.cells), sh.peak) {
		sh.cells = rebuilt(sh.cells)
		sh.peak = len(sh.cells)
	}
}

// retireAll is retire for every shard.
func (s *MemoryStore) retireAll(limit int) {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		s.retire(sh, memoryNow(), limit)
		sh.mu.Unlock()
	}
}

// isSparse reports whether a map that once had peak entries is worth to be
// rebuilt: Go's maps never shrink.
func isSparse(n, peak int) bool { return peak > 1024 && n < peak/8 }

func rebuilt[K comparable, V any](m map[K]V) map[K]V {
	r := make(map[K]V, 2*len(m))
	for k, v := range m {
		r[k] = v
	}
	return r
}

// packedRecords are the completed records of a shard: an index by hash into
// slabs of bytes. Neither has a pointer for each record.
type packedRecords struct {
	index  map[uint64]place
	slabs  map[uint32]*slab
	nextID uint32
	peak   int // largest len(index) since the map was made
}

// A place is where a record begins.
type place struct{ slab, offset uint32 }

// A slab holds records one after the other, oldest first. Once written a record
// is never changed and its bytes are never reused, so that what a replay reads
// stays valid without a copy; the garbage collector takes a slab when the last
// reader is gone.
type slab struct {
	id   uint32
	data []byte
	done int // up to here records have expired
}

const (
	firstSlab = 4 << 10
	maxSlab   = 64 << 10
	maxPacked = 16 << 10 // larger records would waste much of a slab
)

// A packed record is expiry and hash (8 bytes each), its whole length (4), the
// lengths of key, token and fingerprint (2 each), these three, and the value.
const packedHeader = 26

func packedSize(key, token string, r Result) int {
	return packedHeader + len(key) + len(token) + len(r.Fingerprint) + len(r.Value)
}

func packedCost(key, token string, r Result) int64 {
	return indexCost + int64(packedSize(key, token, r))
}

// indexCost is about what a record takes in the index.
const indexCost = 32

// at returns the record at p.
func (r *packedRecords) at(p place) packedRecord {
	b := r.slabs[p.slab].data[p.offset:]
	return packedRecord(b[:binary.LittleEndian.Uint32(b[16:])])
}

type packedRecord []byte

func (b packedRecord) expiry() int64 { return int64(binary.LittleEndian.Uint64(b)) }
func (b packedRecord) hash() uint64  { return binary.LittleEndian.Uint64(b[8:]) }

func (b packedRecord) parts() (key, token, fingerprint, value []byte) {
	k := packedHeader + int(binary.LittleEndian.Uint16(b[20:]))
	t := k + int(binary.LittleEndian.Uint16(b[22:]))
	f := t + int(binary.LittleEndian.Uint16(b[24:]))
	return b[packedHeader:k:k], b[k:t:t], b[t:f:f], b[f:len(b):len(b)]
}

// lookup returns the live record of key.
func (r *packedRecords) lookup(hash uint64, key string, now int64) (packedRecord, bool) {
	p, ok := r.index[hash]
	if !ok {
		return nil, false
	}
	b := r.at(p)
	if b.expiry() <= now {
		return nil, false
	}
	k, _, _, _ := b.parts()
	return b, string(k) == key
}

// add packs a record behind the others of its queue. It is false when the
// record is too large, or its place in the index belongs to another key.
func (r *packedRecords) add(q *memoryQueue, hash uint64, key, token string, res Result, now int64) bool {
	size := packedSize(key, token, res)
	if size > maxPacked || len(res.parts) > 0 {
		return false
	}
	if p, ok := r.index[hash]; ok && r.at(p).expiry() > now {
		return false
	}
	sl := r.slabFor(q, size)
	p := place{sl.id, uint32(len(sl.data))}
	b := sl.data
	b = binary.LittleEndian.AppendUint64(b, uint64(expiry(now, q.ttl)))
	b = binary.LittleEndian.AppendUint64(b, hash)
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(key)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(token)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(res.Fingerprint)))
	b = append(append(append(b, key...), token...), res.Fingerprint...)
	sl.data = append(b, res.Value...)
	r.index[hash] = p
	r.peak = max(r.peak, len(r.index))
	return true
}

// slabFor returns a slab at the end of q with room for size bytes.
func (r *packedRecords) slabFor(q *memoryQueue, size int) *slab {
	room := firstSlab
	if n := len(q.slabs); n > 0 {
		last := q.slabs[n-1]
		if cap(last.data)-len(last.data) >= size {
			return last
		}
		room = min(2*cap(last.data), maxSlab)
	}
	if r.index == nil {
		r.index = make(map[uint64]place)
		r.slabs = make(map[uint32]*slab)
	}
	sl := &slab{id: r.nextID, data: make([]byte, 0, max(room, size))}
	r.nextID++
	r.slabs[sl.id] = sl
	q.slabs = append(q.slabs, sl)
	return sl
}

// retire drops up to limit expired records of q and returns what they cost.
func (r *packedRecords) retire(q *memoryQueue, now int64, limit int) (cost int64) {
	for ; limit != 0 && len(q.slabs) > 0; limit-- {
		sl := q.slabs[0]
		p := place{sl.id, uint32(sl.done)}
		b := r.at(p)
		if b.expiry() > now {
			break
		}
		if r.index[b.hash()] == p { // not written anew since
			delete(r.index, b.hash())
		}
		cost += indexCost + int64(len(b))
		if sl.done += len(b); sl.done == len(sl.data) {
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
