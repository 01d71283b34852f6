package idempotency

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// No test finds two keys of one hash, so this one gives them one. In production
// they may come some day.
func TestMemoryStoreEqualHashes(t *testing.T) {
	const hash = 42
	var packed packedRecords
	q := &memoryQueue{ttl: time.Minute}
	now := int64(0)
	lookup := func(key string) string {
		b, ok := packed.lookup(hash, key, now)
		if !ok {
			return ""
		}
		_, _, _, value := b.fields()
		return string(value)
	}
	require.True(t, packed.add(q, hash, "a", "token", Result{Value: []byte("one")}, now))
	require.Equal(t, "one", lookup("a"))
	require.Empty(t, lookup("b"), "another key")
	require.False(t, packed.add(q, hash, "b", "token", Result{Value: []byte("two")}, now), "the hash is taken")
	require.Equal(t, "one", lookup("a"))

	now += int64(time.Minute) // the first has expired and is still there
	require.Empty(t, lookup("a"))
	require.True(t, packed.add(q, hash, "b", "token", Result{Value: []byte("two")}, now))
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
	require.True(t, sh.packed.add(sh.queue(time.Hour), hash, "a", "1", Result{Value: []byte("one")}, memoryNow()))
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
