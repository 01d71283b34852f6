package idempotency_test

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What a request may allocate. These are limits to keep, not wishes: lower them
// when the library gets better.
const (
	passThroughAllocations = 0
)

// allocations returns what requests with different keys allocate on average.
func allocations(t *testing.T, replayed bool, keyed bool) float64 {
	if raceDetector {
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
