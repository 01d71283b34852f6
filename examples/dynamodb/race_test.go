package main

import (
	"fmt"
	"maps"
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
	const processes, keys, skew, enough = 8, 3, 60 * time.Millisecond, 10
	table, url := newTable(t), newLikeAWS(t).URL
	r := race{holds: make(map[string][]hold), owners: make(map[string]int)}
	var all sync.WaitGroup
	deadline := time.Now().Add(patience)
	for i := range processes {
		s := NewStore(connect(url), table, &Options{MaxClockSkew: skew})
		ahead := skew * time.Duration(i) / (processes - 1)
		s.clock = func() time.Time { return time.Now().Add(ahead) }
		all.Go(func() {
			// A lease that is not over before its claim is answered holds on a slow
			// machine, too.
			lease := 80 * time.Millisecond
			for n := 0; r.fewest(keys) < enough && time.Now().Before(deadline); n++ {
				key := strconv.Itoa(rand.IntN(keys))
				held, slowest := live(t, s, key, fmt.Sprintf("%d-%d", i, n), lease)
				r.add(key, held)
				lease = max(lease, 3*slowest)
			}
		})
	}
	all.Wait()
	require.GreaterOrEqual(t, r.fewest(keys), enough, "owners of a key")
	for _, held := range r.holds {
		requireNoOverlap(t, held)
	}
}

// A race is what the owners have reported.
type race struct {
	mu     sync.Mutex // guards what follows
	holds  map[string][]hold
	owners map[string]int // that have held the key
}

func (r *race) add(key string, held []hold) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.holds[key] = append(r.holds[key], held...)
	if len(held) > 0 {
		r.owners[key]++
	}
}

// fewest returns how many owners the key had that had the fewest.
func (r *race) fewest(keys int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.owners) < keys {
		return 0
	}
	return slices.Min(slices.Collect(maps.Values(r.owners)))
}

func requireNoOverlap(t *testing.T, held []hold) {
	t.Helper()
	slices.SortFunc(held, func(a, b hold) int { return a.from.Compare(b.from) })
	last := held[0]
	for _, h := range held[1:] {
		if h.owner != last.owner {
			require.False(t, h.from.Before(last.to), "%s held a key until %v, and %s from %v",
				last.owner, last.to, h.owner, h.from)
		}
		last = h
	}
}

// live claims the key once. It returns when the owner relied on it: from each
// answer until the lease ends that began with the question, or until the owner
// freed the key. slowest is how long the slowest answer took.
func live(t *testing.T, s *Store, key, owner string, lease time.Duration) (holds []hold, slowest time.Duration) {
	c := idempotency.Claim{Token: owner, Lease: lease, TTL: time.Hour}
	for {
		asked := time.Now()
		rec, err := s.Acquire(t.Context(), key, c)
		answered := time.Now()
		slowest = max(slowest, answered.Sub(asked))
		if err != nil {
			t.Error(err)
		}
		if err != nil || rec.State != idempotency.Acquired {
			return holds, slowest
		}
		if end := asked.Add(lease); answered.Before(end) {
			holds = append(holds, hold{owner, answered, end})
		}
		c.Attempt = rec.Attempt
		switch rand.IntN(3) {
		case 0: // dies
			return holds, slowest
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
			return holds, slowest
		}
	}
}
