package storetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Chance decides a race, so each rule runs many races, with a key for each.
const (
	races  = 16
	racers = 16
)

var concurrencyRules = []rule{
	{name: "one of many claims wins", check: func(e *env) {
		for range races {
			e.use(randomKey())
			if recs := e.contend(racers, nil); e.err == nil && !won(recs, 1) {
				e.fail("one Acquired with Attempt 1, and all others InProgress")
			}
		}
	}},

	{name: "one of many take-overs wins", check: func(e *env) {
		for _, key := range e.lapsedClaims() {
			e.use(key)
			if recs := e.contend(racers, nil); e.err == nil && !won(recs, 2) {
				e.fail("one Acquired with Attempt 2, and all others InProgress")
			}
		}
	}},

	{name: "either a claim or the renewal of an absent cell wins", check: func(e *env) {
		for range races {
			e.use(randomKey())
			recs := e.claimAll([]claim{{token: "A", attempt: 1}, {token: "B"}}, nil)
			e.oneOfTwo(recs, idempotency.Lost, idempotency.InProgress)
		}
	}},

	{name: "either a claim that is sent twice or a take-over wins", check: func(e *env) {
		for _, key := range e.lapsedClaims() {
			e.use(key)
			recs := e.claimAll([]claim{{token: "A"}, {token: "B"}}, nil)
			e.oneOfTwo(recs, idempotency.InProgress, idempotency.InProgress)
		}
	}},

	{name: "either a renewal or a take-over wins", check: func(e *env) {
		for _, key := range e.lapsedClaims() {
			e.use(key)
			recs := e.claimAll([]claim{{token: "A", attempt: 1, once: true}, {token: "B"}}, nil)
			e.oneOfTwo(recs, idempotency.Lost, idempotency.InProgress)
			if e.err == nil && recs[0].State == idempotency.Acquired {
				e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
			}
		}
	}},

	{name: "no other call of the owner unsets Once", check: func(e *env) {
		for range races {
			e.use(randomKey())
			e.acquire(claim{token: "A"}).acquired(1)
			e.claimAll([]claim{{token: "A"}, {token: "A", attempt: 1, once: true}, {token: "A", attempt: 1}}, nil)
			e.acquire(claim{token: "A", attempt: 1}).acquiredOnce(1)
		}
	}},

	{name: "either Complete or a take-over wins", check: completeOrTakeOver},

	{name: "either Complete or a renewal wins", check: completeOrRenewal},

	{name: "either Complete or Release wins", check: completeOrRelease},

	// B has the claim in the end, after the release or instead of it.
	{name: "either Release or a take-over wins", check: func(e *env) {
		for _, key := range e.lapsedClaims() {
			e.use(key)
			e.whileReleased(claim{token: "B"}).acquired(2)
			e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		}
	}},

	{name: "either Release or a renewal wins", check: func(e *env) {
		for _, again := range []claim{{token: "A"}, {token: "A", attempt: 1}} {
			for range races {
				e.use(randomKey())
				e.acquire(claim{token: "A"}).acquired(1)
				e.ownWhileReleased(again)
			}
		}
	}},

	{name: "either Release of an absent cell or a claim wins", check: func(e *env) {
		for range races {
			e.use(randomKey())
			e.whileReleased(claim{token: "B"}).acquired(1)
			e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		}
	}},

	// The owner has no answer to its claim, or the store has lost the cell.
	{name: "either Release of an absent cell or its own claim wins", check: func(e *env) {
		for _, own := range []claim{{token: "A"}, {token: "A", attempt: 1}} {
			for range races {
				e.use(randomKey())
				e.ownWhileReleased(own)
			}
		}
	}},

	{name: "one of many Completes wins", check: func(e *env) {
		for range races {
			e.use(randomKey())
			e.completeAll(racers)
		}
	}},

	{name: "a release admits one claim", check: releaseAmongClaims},

	{name: "different keys do not disturb each other", check: func(e *env) {
		views := make([]*env, races)
		for i := range views {
			views[i] = newEnv(e.ctx, e.store, e.timing)
		}
		atOnce(races, func(i int) {
			v, value := views[i], fmt.Sprint("done ", i)
			v.acquire(claim{token: "A", fp: "one"}).acquired(1)
			v.release("A")
			v.acquire(claim{token: "B", fp: "one"}).acquired(2)
			v.acquire(claim{token: "C", fp: "two"}).is(idempotency.Mismatch)
			v.complete("B", result{fp: "one", value: value})
			v.acquire(claim{token: "C", fp: "one"}).completed("one", value)
		})
		for _, v := range views {
			if v.err != nil {
				e.err = fmt.Errorf("while %d keys are in use: %w", races, v.err)
			}
		}
	}},
}

// completeOrTakeOver lets the owner of a lapsed claim complete while another
// token takes it over. The two answers must agree on which was first.
func completeOrTakeOver(e *env) {
	for _, key := range e.lapsedClaims() {
		e.use(key)
		var err error
		b := e.claimWhile(claim{token: "B"}, func() { err = e.tryComplete() })
		e.note("meanwhile Complete(token A) = %v", err)
		lost := errors.Is(err, idempotency.ErrLeaseLost)
		switch {
		case e.err != nil:
			return
		case err != nil && !lost:
			e.fail("no error but ErrLeaseLost")
		case lost && b.State != idempotency.Acquired:
			e.fail("<nil>, as the claim was not taken over")
		case lost:
			e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		case b.State != idempotency.Completed:
			e.fail("B to be answered Completed, as A was told that it is")
		default:
			e.acquire(claim{token: "C"}).completed("", "done")
		}
	}
}

// completeOrRenewal renews the claim, or sends it twice, while the owner
// completes. Neither may bring the claim back.
func completeOrRenewal(e *env) {
	for _, again := range []claim{{token: "A"}, {token: "A", attempt: 1}} {
		for range races {
			e.use(randomKey())
			e.acquire(claim{token: "A"}).acquired(1)
			var err error
			a := e.claimWhile(again, func() { err = e.tryComplete() })
			e.note("meanwhile Complete(token A) = %v", err)
			switch {
			case err != nil:
				e.fail("<nil>")
			case a.State == idempotency.Acquired:
				a.acquired(1)
			case again.attempt > 0:
				a.is(idempotency.Lost)
			default:
				a.completed("", "done")
			}
			e.acquire(claim{token: "C"}).completed("", "done")
		}
	}
}

// completeOrRelease lets the owner complete and release at once. A result that
// Complete has reported as stored must not be freed.
func completeOrRelease(e *env) {
	for range races {
		e.use(randomKey())
		e.acquire(claim{token: "A"}).acquired(1)
		if e.err != nil {
			return
		}
		var completing, releasing error
		atOnce(2, func(i int) {
			if i == 0 {
				completing = e.tryComplete()
			} else {
				releasing = e.store.Release(e.ctx, e.key, e.token("A"), long)
			}
		})
		e.note("Complete(token A) = %v", completing)
		e.note("meanwhile Release(token A) = %v", releasing)
		switch {
		case releasing != nil:
			e.fail("<nil>")
		case completing == nil:
			e.acquire(claim{token: "B"}).completed("", "done")
		case errors.Is(completing, idempotency.ErrLeaseLost):
			e.acquire(claim{token: "B"}).acquired(2)
		default:
			e.fail("no error from Complete but ErrLeaseLost")
		}
	}
}

// tryComplete calls Complete under token A and returns its error.
func (e *env) tryComplete() error {
	return e.store.Complete(e.ctx, e.key, e.token("A"), e.result(result{value: "done"}))
}

// ownWhileReleased calls Acquire under token A while A releases the key. The
// call may come first or find the release. Afterwards the cell is released.
func (e *env) ownWhileReleased(c claim) {
	if a := e.whileReleased(c); a.State != idempotency.Lost {
		a.acquired(1)
	}
	e.acquire(claim{token: "A"}).is(idempotency.Lost)
}

// whileReleased calls Acquire while A releases the key.
func (e *env) whileReleased(c claim) answer {
	var err error
	a := e.claimWhile(c, func() { err = e.store.Release(e.ctx, e.key, e.token("A"), long) })
	e.note("meanwhile Release(token A) = %v", err)
	if err != nil {
		e.fail("<nil>")
	}
	return a
}

// releaseAmongClaims lets the owner release while others claim the key.
func releaseAmongClaims(e *env) {
	for range races {
		e.use(randomKey())
		e.acquire(claim{token: "A"}).acquired(1)
		var err error
		recs := e.contend(racers, func() {
			err = e.store.Release(e.ctx, e.key, e.token("A"), long)
		})
		e.note("meanwhile Release(token A) = %v", err)
		switch {
		case e.err != nil:
			return
		case err != nil:
			e.fail("<nil>")
		case won(recs, 2):
			e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		case count(recs, idempotency.InProgress) == racers: // all came too early
			e.acquire(claim{token: "B"}).acquired(2)
		default:
			e.fail("at most one Acquired, with Attempt 2, and all others InProgress")
		}
	}
}

// completeAll completes an absent cell under n tokens at once.
func (e *env) completeAll(n int) {
	errs := make([]error, n)
	value := func(i int) string { return fmt.Sprint("done by ", i) }
	atOnce(n, func(i int) {
		errs[i] = e.store.Complete(e.ctx, e.key, e.token(fmt.Sprint(i)), e.result(result{value: value(i)}))
	})
	e.note("%d Completes at once = %v", n, errs)
	winner, winners := 0, 0
	for i, err := range errs {
		if err == nil {
			winner, winners = i, winners+1
		} else if !errors.Is(err, idempotency.ErrLeaseLost) {
			e.fail("no error but ErrLeaseLost")
		}
	}
	if winners != 1 {
		e.fail("one <nil>, and ErrLeaseLost for all others")
	}
	e.acquire(claim{token: "reader"}).completed("", value(winner))
}

// lapsedClaims returns keys that token A has claimed, with the lease over.
func (e *env) lapsedClaims() []string {
	keys := make([]string, races)
	var last answer
	for i := range keys {
		keys[i] = randomKey()
		e.use(keys[i])
		last = e.acquire(claim{token: "A", lease: e.short}).acquired(1)
	}
	// When the last one can be taken over, the leases of all are over.
	e.changesAfter(last.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
	return keys[:races-1]
}

// contend claims the key under n tokens at once.
func (e *env) contend(n int, also func()) []idempotency.Record {
	claims := make([]claim, n)
	for i := range claims {
		claims[i].token = fmt.Sprint("racer ", i)
	}
	return e.claimAll(claims, also)
}

// claimWhile calls Acquire with c and calls also at the same time.
func (e *env) claimWhile(c claim, also func()) answer {
	recs := e.claimAll([]claim{c}, also)
	if e.err != nil {
		return answer{e: e}
	}
	return answer{e: e, Record: recs[0]}
}

// claimAll calls Acquire with all claims at once, and calls also meanwhile.
func (e *env) claimAll(claims []claim, also func()) []idempotency.Record {
	if e.err != nil {
		return nil
	}
	recs, errs := make([]idempotency.Record, len(claims)), make([]error, len(claims))
	atOnce(len(claims)+1, func(i int) {
		if i < len(claims) {
			recs[i], errs[i] = e.store.Acquire(e.ctx, e.key, e.claim(claims[i]))
		} else if also != nil {
			also()
		}
	})
	tally := make(map[string]int)
	for _, r := range recs {
		r.Remaining = r.Remaining.Round(time.Second) // or no two were the same
		tally[outcome(r, nil)]++
	}
	e.note("%d claims at once = %v", len(claims), tally)
	if err := errors.Join(errs...); err != nil {
		e.note("%v", err)
		e.fail("no errors")
	}
	return recs
}

// oneOfTwo fails unless one of two calls has acquired the key. The other must
// have got the state that it gets when it loses: first or second.
func (e *env) oneOfTwo(recs []idempotency.Record, first, second idempotency.State) {
	switch {
	case e.err != nil:
	case recs[0].State == idempotency.Acquired && recs[1].State == second:
	case recs[1].State == idempotency.Acquired && recs[0].State == first:
	default:
		e.fail("one Acquired; else %v for the first or %v for the second", first, second)
	}
}

// won reports whether one racer has acquired, with this attempt, while all
// others wait for it.
func won(recs []idempotency.Record, attempt int) bool {
	for _, r := range recs {
		if r.State == idempotency.Acquired && r.Attempt != attempt {
			return false
		}
	}
	return count(recs, idempotency.Acquired) == 1 && count(recs, idempotency.InProgress) == len(recs)-1
}

func count(recs []idempotency.Record, s idempotency.State) int {
	n := 0
	for _, r := range recs {
		if r.State == s {
			n++
		}
	}
	return n
}

// atOnce makes n calls that begin as simultaneously as can be, and returns
// when all have ended.
func atOnce(n int, call func(i int)) {
	var ready, done sync.WaitGroup
	ready.Add(1)
	// The scheduler tends to run the last goroutine first, so it is another one
	// each time.
	first := rand.IntN(n)
	for i := range n {
		done.Go(func() {
			ready.Wait()
			call((first + i) % n)
		})
	}
	ready.Done()
	done.Wait()
}
