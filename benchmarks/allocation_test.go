package benchmarks

import (
	"fmt"
	"net/http"
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

	// extraBytes is what a request with a large body, or one with a large
	// response, allocates in addition to one copy of it.
	extraBytes = 16 << 10
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

// A response is captured as it comes and not copied again.
func TestLargeFirstAllocations(t *testing.T) {
	for _, size := range []int{8 << 10, 15 << 10, 16 << 10, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			client := newBenchClient(true)
			h := inMemory(newCharge(size))
			require.LessOrEqual(t, allocatedBytes(t, client, h, keyAt), size+extraBytes)
			client.check(t, size, false)
		})
	}
}

// A request body whose length is declared is read into one buffer, which small
// ones find in a pool.
func TestBodyAllocations(t *testing.T) {
	for size, limit := range map[int]int{
		16 << 10:  extraBytes,
		63 << 10:  extraBytes,
		64 << 10:  64<<10 + extraBytes,
		512 << 10: 512<<10 + extraBytes,
		1 << 20:   1<<20 + extraBytes,
	} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			client := newUpload(size)
			h := inMemory(newCharge(smallBody))
			require.LessOrEqual(t, allocatedBytes(t, client, h, func(int) string { return keyAt(0) }), limit)
			client.check(t, smallBody, true)
		})
	}
}

// allocatedBytes returns how many bytes a request allocates on average.
func allocatedBytes(t *testing.T, client *benchClient, h http.Handler, key func(i int) string) int {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	const requests = 100
	client.do(h, key(requests)) // pools are filled
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range requests {
		client.do(h, key(i))
	}
	runtime.ReadMemStats(&after)
	return int(after.TotalAlloc-before.TotalAlloc) / requests
}
