package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/go-idempotency/idempotency/storetest"
	"github.com/stretchr/testify/require"
)

func TestMemoryStoreContract(t *testing.T) {
	storetest.Run(t, func(*testing.T) idempotency.Store { return idempotency.NewMemoryStore() })
}

// A large value is not packed.
func TestMemoryStoreContractWithLargeValues(t *testing.T) {
	storetest.Run(t, func(*testing.T) idempotency.Store { return paddedStore{idempotency.NewMemoryStore()} })
}

// paddedStore stores values that are too large for a slab.
type paddedStore struct{ *idempotency.MemoryStore }

var padding = bytes.Repeat([]byte("p"), 64<<10)

func (s paddedStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	r.Value = append(append([]byte(nil), padding...), r.Value...)
	defer clear(r.Value) // the store must have copied it
	return s.MemoryStore.Complete(ctx, key, token, r)
}

func (s paddedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	rec, err := s.MemoryStore.Acquire(ctx, key, c)
	if rec.State == idempotency.Completed {
		rec.Value = rec.Value[len(padding):]
	}
	return rec, err
}

func (s paddedStore) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	cell, err := s.MemoryStore.Inspect(ctx, key)
	if cell.State == idempotency.Completed {
		cell.Value = bytes.TrimPrefix(cell.Value, padding)
	}
	return cell, err
}

func acquire(t *testing.T, s idempotency.Store, key, token string) idempotency.Record {
	t.Helper()
	rec, err := s.Acquire(t.Context(), key, idempotency.Claim{Token: token, Lease: time.Second, TTL: time.Minute})
	require.NoError(t, err)
	return rec
}

func complete(t *testing.T, s idempotency.Store, key, token string, value []byte, ttl time.Duration) {
	t.Helper()
	require.NoError(t, s.Complete(t.Context(), key, token, idempotency.Result{Value: value, TTL: ttl}))
}

func TestMemoryStoreZeroValue(t *testing.T) {
	var s idempotency.MemoryStore
	require.Equal(t, idempotency.Acquired, acquire(t, &s, "a", "1").State)
	require.Equal(t, 1, s.Len())
}

func TestMemoryStoreIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &idempotency.MemoryStore{MaxBytes: 100 << 10}
		acquire(t, s, "running", "1")
		var n int
		for n = 0; ; n++ {
			key := fmt.Sprint("k", n)
			rec, err := s.Acquire(t.Context(), key, idempotency.Claim{Token: "1", Lease: time.Second, TTL: time.Minute})
			if err != nil {
				require.ErrorIs(t, err, idempotency.ErrStoreFull)
				break
			}
			require.Equal(t, idempotency.Acquired, rec.State)
			complete(t, s, key, "1", make([]byte, 1000), time.Minute)
		}
		require.InDelta(t, 90, n, 10, "about 1 KiB each")

		// What was let in is completed, and nothing was evicted for it.
		complete(t, s, "running", "1", make([]byte, 50<<10), time.Minute)
		for i := range n {
			require.Equal(t, idempotency.Completed, acquire(t, s, fmt.Sprint("k", i), "2").State)
		}
		require.Greater(t, s.Bytes(), s.MaxBytes)

		time.Sleep(time.Minute) // all expire, in whichever shard they are
		require.Equal(t, idempotency.Acquired, acquire(t, s, "new", "1").State)
	})
}

// A full store refuses a flood of new keys without work for the garbage collector.
func TestMemoryStoreRefusesWithoutAllocating(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	s := &idempotency.MemoryStore{MaxBytes: 1}
	claim := idempotency.Claim{Token: "1", Fingerprint: make([]byte, 32), Lease: time.Second, TTL: time.Minute}
	allocs := testing.AllocsPerRun(100, func() {
		if _, err := s.Acquire(t.Context(), "a", claim); err == nil {
			t.Error("the store is full")
		}
	})
	require.Zero(t, allocs)
}

// A claim takes the cell of one that has ended, and the room for its fingerprint.
func TestMemoryStoreClaimsWithoutAllocating(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	s := idempotency.NewMemoryStore()
	claim := idempotency.Claim{Token: "1", Fingerprint: make([]byte, 32), Lease: time.Second, TTL: time.Hour}
	keys := make([]string, 10_000)
	for i := range keys {
		keys[i] = fmt.Sprint(i)
	}
	execute := func() {
		key := keys[0]
		keys = keys[1:]
		_, _ = s.Acquire(t.Context(), key, claim)
		_ = s.Complete(t.Context(), key, "1", idempotency.Result{TTL: time.Hour})
	}
	for range 2000 {
		execute() // every shard has a cell then
	}
	require.Zero(t, testing.AllocsPerRun(5000, execute), "slabs and maps grow less than once a call")
	require.Equal(t, 2000+5000+1, s.Len())
}

// The memory of claims that were never completed comes back as well, that of the
// maps which had room for them included.
func TestMemoryStoreFreesClaimsThatExpired(t *testing.T) {
	const claims = 100_000
	synctest.Test(t, func(t *testing.T) {
		s := &idempotency.MemoryStore{MaxBytes: 1 << 30}
		base := heap()
		for i := range claims {
			acquire(t, s, fmt.Sprint(i), "1")
		}
		full := heap() - base
		require.Greater(t, full, int64(claims*100))
		time.Sleep(time.Minute)
		require.Zero(t, s.Len())
		require.Zero(t, s.Bytes())
		require.Less(t, heap()-base, full/20)
		runtime.KeepAlive(s)
	})
}

// A record expires, and its memory comes back while the store is used for other
// keys, without a call to Len or Bytes.
func TestMemoryStoreFreesWhatExpired(t *testing.T) {
	const records = 100_000
	synctest.Test(t, func(t *testing.T) {
		s := &idempotency.MemoryStore{MaxBytes: 1 << 30}
		base := heap()
		fill := func(name string, n int) {
			value := make([]byte, 300)
			for i := range n {
				key := fmt.Sprint(name, i)
				acquire(t, s, key, "1")
				complete(t, s, key, "1", value, time.Hour)
			}
		}
		fill("old", records)
		full := heap() - base
		require.Greater(t, full, int64(records*300))

		time.Sleep(time.Hour)
		fill("new", records/4)
		require.Less(t, heap()-base, full/2, "the old records are gone")
		require.Equal(t, records/4, s.Len())

		time.Sleep(time.Hour)
		require.Zero(t, s.Len())
		require.Zero(t, s.Bytes())
		require.Less(t, heap()-base, full/20)
		runtime.KeepAlive(s)
	})
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// More records expire at once than one operation drops. An expired record is no
// answer, and when it is dropped, the record that replaced it stays.
func TestMemoryStoreReplacesWhatExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		const records = 20_000
		for i := range records {
			complete(t, s, fmt.Sprint(i), "1", []byte("old"), time.Minute)
		}
		time.Sleep(time.Minute)
		for i := records - 100; i < records; i++ {
			require.Equal(t, idempotency.Acquired, acquire(t, s, fmt.Sprint(i), "2").State)
			complete(t, s, fmt.Sprint(i), "2", []byte("new"), time.Minute)
		}
		require.Equal(t, 100, s.Len())
		for i := records - 100; i < records; i++ {
			require.Equal(t, "new", string(acquire(t, s, fmt.Sprint(i), "3").Value))
		}
	})
}

// The same with claims that were never completed. When an expired claim is
// dropped, the claim or the marker that replaced it stays.
func TestMemoryStoreReplacesClaimsThatExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		const claims, last = 20_000, 20_000 - 100
		for i := range claims {
			acquire(t, s, fmt.Sprint(i), "1")
		}
		time.Sleep(time.Minute)
		for i := last; i < claims; i++ {
			if i%2 == 0 {
				require.Equal(t, 1, acquire(t, s, fmt.Sprint(i), "2").Attempt)
			} else {
				require.NoError(t, s.Release(t.Context(), fmt.Sprint(i), "2", time.Minute))
			}
		}
		require.Equal(t, 100, s.Len())
		for i := last; i < claims; i++ {
			want := map[int]idempotency.State{0: idempotency.InProgress, 1: idempotency.Acquired}[i%2]
			require.Equal(t, want, acquire(t, s, fmt.Sprint(i), "3").State)
		}
		time.Sleep(time.Minute)
		require.Zero(t, s.Bytes())
	})
}

// A fingerprint may be longer than a packed record can say.
func TestMemoryStoreLargeFingerprint(t *testing.T) {
	s := idempotency.NewMemoryStore()
	fingerprint := bytes.Repeat([]byte("f"), 1<<16+1)
	require.NoError(t, s.Complete(t.Context(), "a", "1", idempotency.Result{Fingerprint: fingerprint, TTL: time.Minute}))
	rec := acquire(t, s, "a", "2")
	require.Equal(t, idempotency.Completed, rec.State)
	require.Equal(t, fingerprint, rec.Fingerprint)
}

// What the store returned stays valid when its cell is gone and used again.
func TestMemoryStoreReturnsWhatStaysValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		for _, size := range []int{10, 100_000} {
			key, value := fmt.Sprint("size ", size), bytes.Repeat([]byte("v"), size)
			fingerprint := bytes.Repeat([]byte("f"), 32)
			require.NoError(t, s.Complete(t.Context(), key, "1", idempotency.Result{Fingerprint: fingerprint, Value: value, TTL: time.Minute}))
			rec := acquire(t, s, key, "2")
			require.Equal(t, idempotency.Completed, rec.State)
			time.Sleep(time.Minute)
			for i := range 1000 {
				claim := idempotency.Claim{Token: "3", Fingerprint: bytes.Repeat([]byte("x"), 32), Lease: time.Second, TTL: time.Second}
				_, err := s.Acquire(t.Context(), fmt.Sprint(size, i), claim)
				require.NoError(t, err)
				complete(t, s, fmt.Sprint("c", size, i), "3", bytes.Repeat([]byte("x"), 500), time.Second)
			}
			require.Equal(t, fingerprint, rec.Fingerprint)
			require.Equal(t, value, rec.Value)
			time.Sleep(time.Minute)
		}
	})
}

func TestMemoryStoreForever(t *testing.T) {
	s := idempotency.NewMemoryStore()
	_, err := s.Acquire(t.Context(), "a", idempotency.Claim{Token: "1", Lease: math.MaxInt64, TTL: math.MaxInt64})
	require.NoError(t, err)
	require.Equal(t, idempotency.InProgress, acquire(t, s, "a", "2").State)
	complete(t, s, "a", "1", nil, math.MaxInt64)
	require.Equal(t, idempotency.Completed, acquire(t, s, "a", "2").State)
}

// A cell costs the same whatever it was before.
func TestMemoryStoreCountsWhatAClaimOverwrites(t *testing.T) {
	const key = "a"
	short := idempotency.Claim{Token: "1", Lease: time.Second, TTL: time.Hour}
	large := idempotency.Claim{Token: "a longer token", Fingerprint: make([]byte, 4096), Lease: time.Second, TTL: time.Hour}
	acquired := func(t *testing.T, s *idempotency.MemoryStore, c idempotency.Claim) {
		t.Helper()
		rec, err := s.Acquire(t.Context(), key, c)
		require.NoError(t, err)
		require.Equal(t, idempotency.Acquired, rec.State)
	}
	for _, test := range []struct {
		name          string
		before, after idempotency.Claim
		free          func(*testing.T, *idempotency.MemoryStore, string)
	}{
		{"a take-over by a larger claim", short, large, endLease},
		{"a take-over by a smaller claim", large, short, endLease},
		{"a larger claim of a released cell", short, large, release},
		{"a smaller claim of a released cell", large, short, release},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fresh, s := idempotency.NewMemoryStore(), idempotency.NewMemoryStore()
				acquired(t, fresh, test.after)
				acquired(t, s, test.before)
				test.free(t, s, test.before.Token)
				acquired(t, s, test.after)
				require.Equal(t, fresh.Bytes(), s.Bytes())
				require.NoError(t, s.Release(t.Context(), key, test.after.Token, time.Minute))
				require.Equal(t, fresh.Bytes(), s.Bytes(), "a marker")
				time.Sleep(time.Hour)
				require.Zero(t, s.Bytes())
			})
		})
	}
}

func endLease(*testing.T, *idempotency.MemoryStore, string) { time.Sleep(time.Second) }

func release(t *testing.T, s *idempotency.MemoryStore, token string) {
	t.Helper()
	require.NoError(t, s.Release(t.Context(), "a", token, time.Hour))
}

// A marker is kept for as long as Release says, and takes no room any more when
// that is over, although its claim would have been kept for longer.
func TestMemoryStoreFreesMarkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		for i := range 1000 {
			key := fmt.Sprint(i)
			acquire(t, s, key, "1") // kept for a minute
			require.NoError(t, s.Release(t.Context(), key, "1", time.Second))
		}
		require.Equal(t, 1000, s.Len())
		time.Sleep(time.Second)
		require.Zero(t, s.Len())
		require.Zero(t, s.Bytes())
	})
}

// A full store has no room for the renewal of a key that it does not know, but
// for those that it does.
func TestMemoryStoreRenewsWhenFull(t *testing.T) {
	s := &idempotency.MemoryStore{MaxBytes: 400}
	acquire(t, s, "a", "1")
	renewal := idempotency.Claim{Token: "1", Attempt: 1, Once: true, Lease: time.Second, TTL: time.Minute}
	_, err := s.Acquire(t.Context(), "b", renewal)
	require.ErrorIs(t, err, idempotency.ErrStoreFull)
	rec, err := s.Acquire(t.Context(), "a", renewal)
	require.NoError(t, err)
	require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 1, Once: true}, rec)
	require.Equal(t, 1, s.Len())
}

// Every way into and out of the accounts must agree, or the store would fill up
// by itself.
func TestMemoryStoreAccounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		for i := range 2000 {
			key := fmt.Sprint(i % 700)
			ttl := time.Duration(1+i%5) * time.Minute
			claim := idempotency.Claim{Token: fmt.Sprint(i), Fingerprint: make([]byte, i%40), Lease: time.Duration(i%3) * time.Minute, TTL: ttl}
			rec, err := s.Acquire(t.Context(), key, claim)
			require.NoError(t, err)
			switch {
			case rec.State != idempotency.Acquired:
			case i%4 == 0:
				require.NoError(t, s.Release(t.Context(), key, claim.Token, time.Minute))
			case i%4 == 1:
				complete(t, s, key, claim.Token, make([]byte, i%50*1000), ttl)
			case i%4 == 2:
				renewal := idempotency.Claim{Token: claim.Token, Attempt: rec.Attempt, Once: i%11 == 0, Lease: 2 * time.Minute, TTL: ttl}
				rec, err = s.Acquire(t.Context(), key, renewal)
				require.NoError(t, err)
				require.Equal(t, idempotency.Acquired, rec.State)
				require.Equal(t, renewal.Once, rec.Once)
			}
			require.NoError(t, s.Release(t.Context(), fmt.Sprint("absent", i), "1", time.Minute))
			if i%100 == 0 {
				time.Sleep(time.Minute)
			}
		}
		require.NotZero(t, s.Len())
		require.NotZero(t, s.Bytes())
		time.Sleep(time.Hour)
		require.Zero(t, s.Len())
		require.Zero(t, s.Bytes())
	})
}

func TestMemoryStoreWatchEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		acquire(t, s, "a", "1")
		first, leave := context.WithCancel(t.Context())
		gone, err := s.Watch(first, "a")
		require.NoError(t, err)
		second, cancel := context.WithCancel(t.Context())
		defer cancel()
		still, err := s.Watch(second, "a")
		require.NoError(t, err)
		leave()
		synctest.Wait()
		complete(t, s, "a", "1", nil, time.Minute)
		<-still // a watch that ends does not end the others
		<-gone
	})
}

// A watch that was notified is over. Its context may end later, and leaves the
// next watch of the key alone.
func TestMemoryStoreWatchOutlivesTheOneBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		acquire(t, s, "a", "1")
		ctx, cancel := context.WithCancel(t.Context())
		first, err := s.Watch(ctx, "a")
		require.NoError(t, err)
		require.NoError(t, s.Release(t.Context(), "a", "1", time.Minute))
		<-first
		acquire(t, s, "a", "2")
		second, err := s.Watch(t.Context(), "a")
		require.NoError(t, err)
		cancel()
		synctest.Wait()
		complete(t, s, "a", "2", nil, time.Minute)
		<-second
	})
}

func TestMemoryStoreConcurrentUse(t *testing.T) {
	s := idempotency.NewMemoryStore()
	var owners sync.Map
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for i := range 2000 {
				key, token := fmt.Sprint(i), fmt.Sprint(g)
				rec, err := s.Acquire(t.Context(), key, idempotency.Claim{Token: token, Lease: time.Minute, TTL: time.Hour})
				if err != nil || rec.State != idempotency.Acquired {
					continue
				}
				if other, taken := owners.LoadOrStore(key, token); taken {
					t.Errorf("key %s has owners %s and %s", key, other, token)
				}
				complete(t, s, key, token, []byte(token), time.Hour)
			}
		})
	}
	all.Wait()
	require.Equal(t, 2000, s.Len())
	for i := range 2000 {
		rec := acquire(t, s, fmt.Sprint(i), "late")
		owner, _ := owners.Load(fmt.Sprint(i))
		require.Equal(t, owner, string(rec.Value))
	}
}

// A full store forgets no claim either, however many new keys it refuses.
func TestMemoryStoreKeepsClaimsWhenFull(t *testing.T) {
	s := &idempotency.MemoryStore{MaxBytes: 100 << 10}
	var claimed []string
	for i := range 5000 {
		key := fmt.Sprint(i)
		_, err := s.Acquire(t.Context(), key, idempotency.Claim{Token: "1", Lease: time.Hour, TTL: time.Hour})
		if err == nil {
			claimed = append(claimed, key)
		}
	}
	require.InDelta(t, 350, len(claimed), 100)
	require.Equal(t, len(claimed), s.Len())
	for _, key := range claimed {
		require.Equal(t, idempotency.InProgress, acquire(t, s, key, "2").State)
	}
}

// An expired claim is absent, even where it was not dropped yet.
func TestMemoryStoreCompletesOverClaimsThatExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		const claims, last = 20_000, 20_000 - 100
		for i := range claims {
			acquire(t, s, fmt.Sprint(i), "1")
		}
		time.Sleep(time.Minute)
		for i := last; i < claims; i++ {
			require.NoError(t, s.Complete(t.Context(), fmt.Sprint(i), "2", idempotency.Result{TTL: time.Minute}))
		}
	})
}

// A marker of an absent cell has had no attempts, whatever was there before.
func TestMemoryStoreMarkerForgetsWhatExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := idempotency.NewMemoryStore()
		acquire(t, s, "a", "1")
		require.NoError(t, s.Release(t.Context(), "a", "1", time.Second))
		require.Equal(t, 2, acquire(t, s, "a", "2").Attempt)
		time.Sleep(time.Hour)
		require.NoError(t, s.Release(t.Context(), "a", "3", time.Minute))
		require.Equal(t, 1, acquire(t, s, "a", "4").Attempt)
	})
}
