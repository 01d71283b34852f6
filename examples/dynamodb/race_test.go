package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// A hold is the time in which an owner relies on its lease, by one clock.
type hold struct {
	owner    string
	from, to time.Time
}

// Many owners with clocks that differ by up to MaxClockSkew claim a few keys
// with leases that end all the time, renew some, free some, and die on the rest.
// No two hold a key at once.
func TestNoTwoOwners(t *testing.T) {
	const owners, keys, skew, lease = 16, 3, 60 * time.Millisecond, 80 * time.Millisecond
	table, url := newTable(t), newLikeAWS(t).URL
	var mu sync.Mutex // guards holds
	holds := make(map[string][]hold)
	var all sync.WaitGroup
	deadline := time.Now().Add(4 * time.Second)
	for i := range owners {
		s := NewStore(connect(url), table, &Options{MaxClockSkew: skew})
		ahead := skew * time.Duration(i) / (owners - 1)
		s.clock = func() time.Time { return time.Now().Add(ahead) }
		all.Go(func() {
			for n := 0; time.Now().Before(deadline); n++ {
				key := strconv.Itoa(rand.IntN(keys))
				held := live(t, s, key, fmt.Sprintf("%d-%d", i, n), lease)
				mu.Lock()
				holds[key] = append(holds[key], held...)
				mu.Unlock()
			}
		})
	}
	all.Wait()
	require.Len(t, holds, keys)
	for key, held := range holds {
		requireNoOverlap(t, key, held)
	}
}

// requireNoOverlap also wants several owners, so that there was a race.
func requireNoOverlap(t *testing.T, key string, held []hold) {
	t.Helper()
	require.NotEmpty(t, held)
	slices.SortFunc(held, func(a, b hold) int { return a.from.Compare(b.from) })
	changes, last := 0, held[0]
	for _, h := range held[1:] {
		if h.owner != last.owner {
			changes++
			require.False(t, h.from.Before(last.to), "%s held the key %s until %v, and %s from %v",
				last.owner, key, last.to, h.owner, h.from)
		}
		last = h
	}
	t.Logf("key %s changed hands %d times", key, changes)
	require.Greater(t, changes, 3)
}

// live claims the key once, and returns when the owner relied on it: from each
// answer until the lease ends that began with the question, or until the owner
// freed the key.
func live(t *testing.T, s *Store, key, owner string, lease time.Duration) (holds []hold) {
	c := idempotency.Claim{Token: owner, Lease: lease, TTL: time.Hour}
	for {
		asked := time.Now()
		rec, err := s.Acquire(t.Context(), key, c)
		answered := time.Now()
		if err != nil {
			t.Error(err)
		}
		if err != nil || rec.State != idempotency.Acquired {
			return holds
		}
		if end := asked.Add(lease); answered.Before(end) {
			holds = append(holds, hold{owner, answered, end})
		}
		c.Attempt = rec.Attempt
		switch rand.IntN(3) {
		case 0: // dies
			return holds
		case 1:
			freed := time.Now()
			for i := range holds {
				if holds[i].to.After(freed) {
					holds[i].to = freed
				}
			}
			if err := s.Release(t.Context(), key, owner, time.Hour); err != nil {
				t.Error(err)
			}
			return holds
		}
	}
}
