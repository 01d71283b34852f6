package integration

import (
	"hash/fnv"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A step is something that a handler does.
type step struct {
	Do     action
	For    time.Duration `json:",omitempty"`
	Status int           `json:",omitempty"`
}

type action string

const (
	doEffect  action = "effect"  // what must not happen twice
	doAttach  action = "attach"  // Attach, something that the store does not know
	doCommit  action = "commit"  // Commit; if it fails, the handler answers 500 and has done nothing
	doWork    action = "work"    // takes time
	doYield   action = "yield"   // from here on, work ends with the handler's context, and the handler answers 503
	doCrash   action = "panic"   //
	doFlush   action = "flush"   // streams the first half of the answer
	doLarge   action = "large"   // the answer has 64 KiB
	doDiscard action = "discard" // Discard
	doAnswer  action = "answer"  //
)

// A planner says what the nth run under a key does.
type planner func(key, kind string, nth int) []step

// newRand returns numbers that depend on the seed and on names only, whatever
// happens when.
func newRand(seed uint64, names ...string) *rand.Rand {
	h := fnv.New64a()
	for _, name := range names {
		_, _ = h.Write([]byte(name + "\x00"))
	}
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// A choice is one of several, with its weight.
type choice[T any] struct {
	weight int
	of     T
}

func choose[T any](r *rand.Rand, choices []choice[T]) T {
	sum := 0
	for _, c := range choices {
		sum += c.weight
	}
	n := r.IntN(sum)
	for _, c := range choices {
		if n -= c.weight; n < 0 {
			return c.of
		}
	}
	panic("unreachable")
}

// seededPlans returns the plans of a seed. From the fifth run on a handler is
// well-behaved, so that every key comes to an end.
func seededPlans(seed uint64, lease time.Duration) planner {
	return func(key, kind string, nth int) []step {
		r := newRand(seed, "plan", key, strconv.Itoa(nth))
		return makePlan(r, kind, nth >= 5, lease)
	}
}

// planEnds are the ways in which a run comes to its end, and earlyAnswers those
// that answer before anything was done.
var (
	planEnds = []choice[string]{
		{52, "answer"}, {6, "long"}, {7, "panic before"}, {7, "panic after"}, {5, "500 before"}, {5, "500 after"},
		{4, "401"}, {5, "discard"}, {3, "404"}, {4, "stream"}, {2, "stream and panic"},
	}
	earlyAnswers = map[string]int{"500 before": 500, "401": 401, "404": 404}
)

// makePlan never tells an at-most-once key that nothing was done after it was
// done, which nobody could make safe.
func makePlan(r *rand.Rand, kind string, tame bool, lease time.Duration) (plan []step) {
	do := func(a action) { plan = append(plan, step{Do: a}) }
	status := func(code int) { plan = append(plan, step{Do: doAnswer, Status: code}) }
	pause := func() {
		if r.IntN(3) > 0 {
			plan = append(plan, step{Do: doWork, For: briefly(r)})
		}
	}
	end := "answer"
	if !tame {
		end = choose(r, planEnds)
	}
	if r.IntN(2) == 0 {
		do(doYield)
	}
	if r.IntN(12) == 0 {
		do(doLarge)
	}
	pause()
	if end == "long" {
		plan = append(plan, step{Do: doWork, For: lease/2 + time.Duration(r.Int64N(int64(2*lease)))})
	}
	if kind == history.Begin && strings.HasPrefix(end, "stream") { // what has gone out cannot be rolled back
		end = "answer"
	}
	switch end {
	case "panic before":
		do(doCrash)
	case "discard":
		do(doDiscard)
		status(202)
	}
	if code := earlyAnswers[end]; code > 0 {
		status(code)
	}
	switch kind {
	case history.Commit:
		do(doCommit)
	case history.Attach:
		do(doAttach)
	}
	pause()
	do(doEffect)
	if kind == history.Plain && r.IntN(8) == 0 {
		do(doCommit)
	}
	pause()
	switch end {
	case "panic after":
		do(doCrash)
	case "500 after":
		status(500)
	case "stream", "stream and panic":
		do(doFlush)
		pause()
		if end != "stream" {
			do(doCrash)
		}
	}
	status(201)
	return plan
}

// briefly is a short time, seldom a longer one.
func briefly(r *rand.Rand) time.Duration {
	limit := 20 * time.Millisecond
	if r.IntN(5) == 0 {
		limit *= 8
	}
	return time.Duration(r.Int64N(int64(limit)))
}
