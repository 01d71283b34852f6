package redis_test

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

// A claim survives a failover only if a replica that acknowledged it is
// promoted. With two replicas and MinReplicas 1 the other one may be: a key runs
// again then, at-most-once or not, and min-replicas-to-write changes nothing
// about it.
func TestFailoverMinReplicasDoesNotChooseThePromoted(t *testing.T) {
	for name, row := range map[string]struct {
		isAhead bool // the one that acknowledged the claim is promoted
		then    string
		runs    []int
	}{
		"without the claim": {then: "201 charge 2", runs: []int{1, 1}},
		"with the claim":    {isAhead: true, then: "replay 201 charge 1", runs: []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			p := startTrio(t, "--min-replicas-to-write", "1")
			c := p.open(1, idempotency.Options{AtMostOnce: true}, nil)
			p.cut()
			require.Equal(t, "201 charge 1", c.ask(), "the other replica has acknowledged the claim")
			require.Equal(t, "replay 201 charge 1", c.ask())
			if row.isAhead {
				p.has(connectTo(t, p.other), 'D')
				p.failOverTo(p.other)
			} else {
				p.failOver()
				p.addReplica()
			}
			require.Equal(t, row.then, c.ask())
			require.Equal(t, row.runs, c.runs())
		})
	}
}

// When MinReplicas is the number of all replicas, each has the claim of whatever
// runs: nothing new runs while one of them is cut off, and it does not matter
// which one is promoted. Here the link breaks after the claim, so that only the
// other one knows the response; see TestFailoverLosesTheResponseButNotTheClaim
// for what becomes of the key then.
func TestFailoverMinReplicasOfAllKeepsTheClaim(t *testing.T) {
	for name, row := range map[string]struct {
		isAhead bool // the one that has the response is promoted
		then    string
	}{
		"without the response": {then: "409 in_progress"},
		"with the response":    {isAhead: true, then: "replay 201 charge 1"},
	} {
		t.Run(name, func(t *testing.T) {
			p := startTrio(t, "--min-replicas-to-write", "1")
			opts := idempotency.Options{AtMostOnce: true, Wait: idempotency.NoWait}
			c := p.open(2, opts, func(int, *http.Request) int {
				p.cut()
				return 0
			})
			p.cut()
			require.Equal(t, "503 store_unavailable", c.ask(), "one replica is not enough")
			require.ErrorIs(t, c.events.Last().Err, idempotency.ErrTooFewReplicas)
			require.Empty(t, c.runs())
			p.mend()

			require.Equal(t, "201 charge 1", c.ask())
			if row.isAhead {
				p.has(connectTo(t, p.other), 'D')
				p.failOverTo(p.other)
			} else {
				require.Equal(t, byte('C'), p.cell(p.onReplica))
				p.failOver()
			}
			require.Equal(t, row.then, c.ask())
			require.Len(t, c.runs(), 1)
		})
	}
}
