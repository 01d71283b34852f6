package benchmarks

import (
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// What a request may allocate. These are limits to keep, not wishes: lower them
// when the library gets better.
const (
	passThroughAllocations = 0
	replayAllocations      = 2
	firstAllocations       = 7

	// largeFirstBytes is for a response of 64 KiB: about one copy of it.
	largeFirstBytes = 64<<10 + 16<<10
)

// allocations returns what requests with different keys allocate on average.
func allocations(t *testing.T, replayed bool, keyed bool) float64 {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	client, charge := newBenchClient(keyed), newCharge(smallBody)
	h := inMemory(charge)
	const requests = 2000
	if replayed {
		for i := range requests + 1 { // one to warm up
			client.do(h, keyAt(i))
		}
		charge.closed = true
	}
	next := 0
	n := testing.AllocsPerRun(requests, func() {
		client.do(h, keyAt(next))
		next++
	})
	client.check(t, smallBody, replayed)
	return n
}

func TestPassThroughAllocations(t *testing.T) {
	require.LessOrEqual(t, allocations(t, false, false), float64(passThroughAllocations))
}

func TestReplayAllocations(t *testing.T) {
	require.LessOrEqual(t, allocations(t, true, true), float64(replayAllocations))
}

func TestFirstAllocations(t *testing.T) {
	require.LessOrEqual(t, allocations(t, false, true), float64(firstAllocations))
}

// A large response is captured as it comes and not copied again.
func TestLargeFirstAllocations(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	const requests, size = 200, 64 << 10
	client := newBenchClient(true)
	h := inMemory(newCharge(size))
	client.do(h, keyAt(requests)) // pools are filled
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range requests {
		client.do(h, keyAt(i))
	}
	runtime.ReadMemStats(&after)
	client.check(t, size, false)
	require.LessOrEqual(t, (after.TotalAlloc-before.TotalAlloc)/requests, uint64(largeFirstBytes))
}
