package benchmarks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash/maphash"
	"io"
	"net/http"
	"sync"
	"time"
	"unsafe"
)

// The floors are the least code that does the job correctly in memory: claim the
// key, run the handler, keep the answer until it expires, and replay it to the
// same request. They check the key, and store only a hash of it. The handler gets
// a header map of its own, and each answer has header values of its own: a
// goroutine of the handler, or outer middleware, may change what it was given. No
// correct implementation can save these steps, so the floors have them.
//
// They have no panic safety, no limits, no leases, no waiting, no streaming, and
// free nothing that has expired. TestFloorsAnswer checks that they do what they
// are measured for.

// passFloor looks for a key and does nothing else.
type passFloor struct{ next http.Handler }

func newPassFloor(next http.Handler) http.Handler { return &passFloor{next} }

func (f *passFloor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, ok := r.Header["Idempotency-Key"]; ok || r.Method != http.MethodPost {
		panic("not a floor for that")
	}
	f.next.ServeHTTP(w, r)
}

// A floorRequest is what tells a request apart: cell is the hash of the method,
// the path and the key, and sum is that of all of these, of all else that counts,
// and of the body. It is also the body that the handler reads.
type floorRequest struct {
	bodyReader
	buffer []byte
	cell   floorCell
	sum    [sha256.Size]byte
	now    int64 // when the request arrived, since floorEpoch
}

// A floorCell is as long as the library's store keys.
type floorCell [20]byte

const floorLasts = int64(24 * time.Hour)

var floorEpoch = time.Now()

// isFloorKey reports whether a key is visible ASCII, as the header wants it.
func isFloorKey(key string) bool {
	for i := range len(key) {
		if c := key[i]; c <= ' ' || c > '~' || c == '"' || c == ',' {
			return false
		}
	}
	return key != "" && len(key) <= 255
}

const largestPooled = 64 << 10

var floorRequests = sync.Pool{New: func() any { return &floorRequest{buffer: make([]byte, 0, 1024)} }}

// readFloorRequest reads the whole body. All that is hashed lies in one buffer,
// which has room for the body from the start, and for the end to be seen. A large
// buffer is not used again: one large request would pin it for good.
func readFloorRequest(r *http.Request) *floorRequest {
	q := floorRequests.Get().(*floorRequest)
	lines := r.Header["Idempotency-Key"]
	if len(lines) != 1 || !isFloorKey(lines[0]) {
		panic("not a floor for that")
	}
	b := append(q.buffer[:0], r.Method...)
	b = append(append(b, 0), r.URL.Path...)
	b = append(append(b, 0), lines[0]...)
	cell := sha256.Sum256(b)
	copy(q.cell[:], cell[:])
	b = append(append(b, 0), r.URL.RawQuery...)
	for _, list := range [...][]string{r.Header["Content-Type"], r.Header["Authorization"], r.Header["Cookie"]} {
		b = append(b, 0)
		for _, s := range list {
			b = append(append(b, 1), s...)
		}
	}
	b = append(b, 0)
	head := len(b)
	if size := head + int(r.ContentLength) + 1; size > cap(b) {
		b = append(make([]byte, 0, size), b...)
	}
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Body.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			break
		} else if err != nil {
			panic(err)
		}
	}
	if cap(b) <= largestPooled {
		q.buffer = b
	}
	q.sum, q.now = sha256.Sum256(b), int64(time.Since(floorEpoch))
	q.data, q.off = b[head:], 0
	return q
}

// run runs the handler with a copy of the request, as handlers must not change
// the one they got.
func (q *floorRequest) run(next http.Handler, r *http.Request) *capture {
	c := captures.Get().(*capture)
	c.header = make(http.Header)
	inner := *r
	inner.Body = q
	next.ServeHTTP(c, &inner)
	return c
}

// A capture holds an answer: a small body in a buffer that is used again, a
// large one in chunks that the store takes over.
type capture struct {
	header http.Header
	status int
	small  []byte
	chunks [][]byte
}

var captures = sync.Pool{New: func() any { return &capture{small: make([]byte, 0, 4<<10)} }}

func (c *capture) Header() http.Header    { return c.header }
func (c *capture) WriteHeader(status int) { c.status = status }

func (c *capture) Write(p []byte) (int, error) {
	n := len(p)
	if c.chunks == nil && len(c.small)+n <= cap(c.small) {
		c.small = append(c.small, p...)
		return n, nil
	}
	if len(c.small) > 0 {
		c.chunks = append(c.chunks, bytes.Clone(c.small))
		c.small = c.small[:0]
	}
	if last := len(c.chunks) - 1; last >= 0 {
		chunk := c.chunks[last]
		room := min(cap(chunk)-len(chunk), len(p))
		c.chunks[last] = append(chunk, p[:room]...)
		p = p[room:]
	}
	if len(p) > 0 {
		c.chunks = append(c.chunks, append(make([]byte, 0, max(32<<10, len(p))), p...))
	}
	return n, nil
}

// send writes the answer to the client.
func (c *capture) send(w http.ResponseWriter) {
	h := w.Header()
	own := make([]string, 0, len(c.header))
	for name, values := range c.header {
		own = append(own, values[0])
		h[name] = own[len(own)-1 : len(own) : len(own)]
	}
	w.WriteHeader(c.status)
	if len(c.small) > 0 {
		_, _ = w.Write(c.small)
	}
	for _, chunk := range c.chunks {
		_, _ = w.Write(chunk)
	}
}

func (c *capture) free() {
	c.header, c.status, c.small, c.chunks = nil, 0, c.small[:0], nil
	captures.Put(c)
}

var floorSeed = maphash.MakeSeed()

const floorShards = 64

// mapFloor keeps answers as the values that a replay writes, in maps of
// pointers.
type mapFloor struct {
	next   http.Handler
	shards [floorShards]mapShard
}

type mapShard struct {
	mu      sync.Mutex // guards records, and each record that is not done
	records map[floorCell]*mapRecord
	_       [64]byte
}

type mapRecord struct {
	sum    [sha256.Size]byte
	expiry int64
	done   bool
	status int
	fields []mapField
	small  []byte
	chunks [][]byte
}

type mapField struct{ name, value string }

func newMapFloor(next http.Handler) http.Handler {
	f := &mapFloor{next: next}
	for i := range f.shards {
		f.shards[i].records = make(map[floorCell]*mapRecord)
	}
	return f
}

func (f *mapFloor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := readFloorRequest(r)
	defer floorRequests.Put(q)
	sh := &f.shards[q.cell[0]%floorShards]
	sh.mu.Lock()
	rec := sh.records[q.cell]
	if rec == nil || rec.expiry <= q.now {
		rec = &mapRecord{sum: q.sum, expiry: q.now + floorLasts}
		sh.records[q.cell] = rec
		sh.mu.Unlock()
		f.run(w, r, q, sh, rec)
		return
	}
	done := rec.done
	sh.mu.Unlock()
	switch {
	case rec.sum != q.sum:
		w.WriteHeader(http.StatusUnprocessableEntity)
	case !done:
		w.WriteHeader(http.StatusConflict)
	default:
		rec.replay(w)
	}
}

func (f *mapFloor) run(w http.ResponseWriter, r *http.Request, q *floorRequest, sh *mapShard, rec *mapRecord) {
	c := q.run(f.next, r)
	fields := make([]mapField, 0, len(c.header))
	for name, values := range c.header {
		fields = append(fields, mapField{name, values[0]})
	}
	small := bytes.Clone(c.small)
	sh.mu.Lock()
	rec.status, rec.fields, rec.small, rec.chunks, rec.done = c.status, fields, small, c.chunks, true
	sh.mu.Unlock()
	c.send(w)
	c.free()
}

func (rec *mapRecord) replay(w http.ResponseWriter) {
	h := w.Header()
	values := make([]string, len(rec.fields))
	for i := range rec.fields {
		values[i] = rec.fields[i].value
		h[rec.fields[i].name] = values[i : i+1 : i+1]
	}
	w.WriteHeader(rec.status)
	if len(rec.small) > 0 {
		_, _ = w.Write(rec.small)
	}
	for _, chunk := range rec.chunks {
		_, _ = w.Write(chunk)
	}
}

// slabFloor packs answers into slabs of bytes, with an index that has no
// pointers, so that a million of them cost the garbage collector nothing.
type slabFloor struct {
	next   http.Handler
	shards [floorShards]slabShard
}

type slabShard struct {
	mu     sync.Mutex // guards what follows; what is in slabs never changes
	index  map[uint64]slabPlace
	slabs  [][]byte
	claims []slabClaim
	free   []uint32 // of claims
	_      [64]byte
}

// A slabPlace is where a record begins, or the number of a claim.
type slabPlace struct{ slab, offset uint32 }

const claimed = ^uint32(0)

type slabClaim struct {
	cell   floorCell
	sum    [sha256.Size]byte
	expiry int64
}

// A packed answer follows its length, expiry, cell and sum.
const (
	slabExpiry = 4
	slabCell   = slabExpiry + 8
	slabSum    = slabCell + len(floorCell{})
	slabAnswer = slabSum + sha256.Size
)

func newSlabFloor(next http.Handler) http.Handler {
	f := &slabFloor{next: next}
	for i := range f.shards {
		f.shards[i].index = make(map[uint64]slabPlace)
	}
	return f
}

func (f *slabFloor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := readFloorRequest(r)
	defer floorRequests.Put(q)
	hash := maphash.Bytes(floorSeed, q.cell[:])
	sh := &f.shards[hash%floorShards]
	sh.mu.Lock()
	var cell, sum, answer []byte
	var expiry int64
	p, found := sh.index[hash]
	switch {
	case !found:
	case p.slab == claimed:
		claim := &sh.claims[p.offset]
		cell, sum, expiry = claim.cell[:], claim.sum[:], claim.expiry
	default:
		b := sh.slabs[p.slab][p.offset:]
		cell, sum, answer = b[slabCell:slabSum], b[slabSum:slabAnswer], b[slabAnswer:binary.LittleEndian.Uint32(b)]
		expiry = int64(binary.LittleEndian.Uint64(b[slabExpiry:]))
	}
	if expiry <= q.now {
		sh.claim(hash, q)
		sh.mu.Unlock()
		c := q.run(f.next, r)
		sh.publish(hash, q, c)
		c.send(w)
		c.free()
		return
	}
	same, known := bytes.Equal(sum, q.sum[:]), bytes.Equal(cell, q.cell[:])
	sh.mu.Unlock()
	switch {
	case !known:
		panic("two keys have one hash")
	case !same:
		w.WriteHeader(http.StatusUnprocessableEntity)
	case answer == nil:
		w.WriteHeader(http.StatusConflict)
	default:
		replayBytes(w, answer)
	}
}

func (sh *slabShard) claim(hash uint64, q *floorRequest) {
	if len(sh.free) == 0 {
		sh.free = append(sh.free, uint32(len(sh.claims)))
		sh.claims = append(sh.claims, slabClaim{})
	}
	n := sh.free[len(sh.free)-1]
	sh.free = sh.free[:len(sh.free)-1]
	sh.claims[n] = slabClaim{q.cell, q.sum, q.now + floorLasts}
	sh.index[hash] = slabPlace{claimed, n}
}

func (sh *slabShard) publish(hash uint64, q *floorRequest, c *capture) {
	size := slabAnswer + c.encodedSize()
	sh.mu.Lock()
	defer sh.mu.Unlock()
	last := len(sh.slabs) - 1
	if last < 0 || cap(sh.slabs[last])-len(sh.slabs[last]) < size {
		sh.slabs = append(sh.slabs, make([]byte, 0, max(64<<10, size)))
		last++
	}
	b := sh.slabs[last]
	offset := uint32(len(b))
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	b = binary.LittleEndian.AppendUint64(b, uint64(q.now+floorLasts))
	b = append(append(b, q.cell[:]...), q.sum[:]...)
	sh.slabs[last] = c.appendTo(b)
	sh.free = append(sh.free, sh.index[hash].offset)
	sh.index[hash] = slabPlace{uint32(last), offset}
}

// encodedSize is the number of bytes that appendTo appends.
func (c *capture) encodedSize() int {
	n := 3 + len(c.small)
	for name, values := range c.header {
		n += 4 + len(name) + len(values[0])
	}
	for _, chunk := range c.chunks {
		n += len(chunk)
	}
	return n
}

// appendTo appends the answer in a form that replayBytes reads in place.
func (c *capture) appendTo(b []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(c.status))
	b = append(b, byte(len(c.header)))
	for name, values := range c.header {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
		b = append(b, name...)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(values[0])))
		b = append(b, values[0]...)
	}
	b = append(b, c.small...)
	for _, chunk := range c.chunks {
		b = append(b, chunk...)
	}
	return b
}

// replayBytes writes an answer. Its bytes never change.
func replayBytes(w http.ResponseWriter, b []byte) {
	h := w.Header()
	status, fields := binary.LittleEndian.Uint16(b), int(b[2])
	b = b[3:]
	field := func() string {
		n := int(binary.LittleEndian.Uint16(b))
		s := unsafe.String(&b[2], n)
		b = b[2+n:]
		return s
	}
	values := make([]string, fields)
	for i := range values {
		name := field()
		values[i] = field()
		h[name] = values[i : i+1 : i+1]
	}
	w.WriteHeader(int(status))
	_, _ = w.Write(b)
}
