package idempotency

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// No test finds two keys of one hash, so this one gives them one. In production
// they may come some day.
func TestMemoryStoreEqualHashes(t *testing.T) {
	const hash = 42
	var packed packedRecords
	q := &memoryQueue{class: time.Minute}
	now := int64(0)
	lookup := func(key string) string {
		b, ok := packed.lookup(hash, key, now)
		if !ok {
			return ""
		}
		_, _, _, value := b.fields()
		return string(value)
	}
	require.True(t, packed.add(q, hash, "a", "token", Result{Value: []byte("one"), TTL: time.Minute}, now))
	require.Equal(t, "one", lookup("a"))
	require.Empty(t, lookup("b"), "another key")
	require.False(t, packed.add(q, hash, "b", "token", Result{Value: []byte("two"), TTL: time.Minute}, now), "the hash is taken")
	require.Equal(t, "one", lookup("a"))

	now += int64(time.Minute) // the first has expired and is still there
	require.Empty(t, lookup("a"))
	require.True(t, packed.add(q, hash, "b", "token", Result{Value: []byte("two"), TTL: time.Minute}, now))
	require.Equal(t, "two", lookup("b"))
	require.Empty(t, lookup("a"))
	packed.retire(q, now, -1)
	require.Equal(t, "two", lookup("b"), "the first does not take the second with it")
	now += int64(time.Minute)
	packed.retire(q, now, -1)
	require.Empty(t, packed.index)
	require.Empty(t, packed.slabs)
}

// A record that is displaced by one of the same hash has a cell of its own.
func TestMemoryStoreDisplacedRecord(t *testing.T) {
	s := NewMemoryStore()
	key := "b"
	sh, hash := s.lock(key, memoryNow())
	require.True(t, sh.packed.add(sh.queue(time.Hour), hash, "a", "1", Result{Value: []byte("one"), TTL: time.Hour}, memoryNow()))
	sh.mu.Unlock()

	rec, err := s.Acquire(t.Context(), key, Claim{Token: "2", Lease: time.Minute, TTL: time.Hour})
	require.NoError(t, err)
	require.Equal(t, Acquired, rec.State)
	require.NoError(t, s.Complete(t.Context(), key, "2", Result{Value: []byte("two"), TTL: time.Hour}))
	rec, err = s.Acquire(t.Context(), key, Claim{Token: "3", Lease: time.Minute, TTL: time.Hour})
	require.NoError(t, err)
	require.Equal(t, Completed, rec.State)
	require.Equal(t, "two", string(rec.Value))
	b, ok := sh.packed.lookup(hash, "a", memoryNow())
	require.True(t, ok)
	_, _, _, value := b.fields()
	require.Equal(t, "one", string(value))
}

// A record lies before the next one. An append to what is returned must not reach
// it.
func TestPackedFieldsHaveNoCapacity(t *testing.T) {
	var packed packedRecords
	q := &memoryQueue{class: time.Minute}
	for hash, key := range []string{"a", "b"} {
		require.True(t, packed.add(q, uint64(hash), key, "token", Result{Fingerprint: []byte("one"), Value: []byte("done"), TTL: time.Minute}, 0))
	}
	b, ok := packed.lookup(0, "a", 0)
	require.True(t, ok)
	key, token, fingerprint, value := b.fields()
	for _, field := range [][]byte{key, token, fingerprint, value} {
		require.Equal(t, len(field), cap(field), "%s", field)
	}
}

// A large response is stored in pieces, after a value that would fit into a slab.
func TestMemoryStoreKeepsParts(t *testing.T) {
	s := NewMemoryStore()
	result := Result{Value: []byte("head"), parts: [][]byte{[]byte("first"), []byte("second")}, TTL: time.Hour}
	require.NoError(t, s.Complete(t.Context(), "a", "1", result))
	rec, err := s.Acquire(t.Context(), "a", Claim{Token: "2", Lease: time.Minute, TTL: time.Hour})
	require.NoError(t, err)
	require.Equal(t, Record{State: Completed, Value: result.Value, parts: result.parts}, rec)
	require.Greater(t, s.Bytes(), int64(len("headfirstsecond")))
}

// A TTL that is in use no more costs nothing, however many there were.
func TestMemoryStoreDropsEmptyQueues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewMemoryStore()
		for i := range 1000 {
			require.NoError(t, s.Release(t.Context(), fmt.Sprint(i), "1", time.Duration(i)*time.Second))
		}
		time.Sleep(time.Hour)
		require.Zero(t, s.Len())
		for i := range s.shards {
			require.Empty(t, s.shards[i].queues)
		}
	})
}

// A record of a thousand TTLs is freed as the store is used, a quarter of its TTL
// late at most, and none of them is answered after its own TTL.
func TestMemoryStoreOfManyTTLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const ttls = 1000
		s := NewMemoryStore()
		ttl := func(i int) time.Duration { return time.Hour + time.Duration(i)*23*time.Hour/ttls }
		state := func(i int) State {
			rec, err := s.Acquire(t.Context(), fmt.Sprint(i), Claim{Attempt: 1, Token: "x", Lease: time.Nanosecond, TTL: time.Nanosecond})
			require.NoError(t, err)
			return rec.State
		}
		for i := range ttls {
			require.NoError(t, s.Complete(t.Context(), fmt.Sprint(i), "1", Result{TTL: ttl(i)}))
		}
		for i := range s.shards {
			require.LessOrEqual(t, len(s.shards[i].queues), 20)
		}
		started := time.Now()
		for i := range ttls {
			time.Sleep(ttl(i) - 1 - time.Since(started))
			require.Equal(t, Lost, state(i), "a completed record cannot be renewed")
			time.Sleep(time.Nanosecond)
			require.Equal(t, Acquired, state(i), "it has expired")
		}
		time.Sleep(ttl(ttls)/4 + 1)
		for i := range 100 * ttls { // each of which frees a few
			sh, _ := s.lock(fmt.Sprint(i), memoryNow())
			sh.mu.Unlock()
		}
		require.Zero(t, s.bytes.Load())
	})
}

// Queues take turns: one that expires is freed although others, which came
// before it, have nothing to free.
func TestMemoryStoreLooksAtAllQueues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewMemoryStore()
		fill := func(ttl time.Duration) {
			for i := range 1000 {
				require.NoError(t, s.Complete(t.Context(), fmt.Sprint(ttl, i), "1", Result{TTL: ttl}))
			}
		}
		for days := range 2 * retireQueues {
			fill(time.Duration(1<<days) * 24 * time.Hour)
		}
		lasting := s.bytes.Load()
		fill(time.Hour)
		time.Sleep(time.Hour)
		for i := range 10_000 {
			sh, _ := s.lock(fmt.Sprint(i), memoryNow())
			sh.mu.Unlock()
		}
		require.Equal(t, lasting, s.bytes.Load())
	})
}
