// Package storetest checks an implementation of [idempotency.Store] against
// the contract that its documentation states. A store that passes can be given
// to idempotency.Middleware:
//
//	func TestStore(t *testing.T) {
//		storetest.Run(t, func(t *testing.T) idempotency.Store {
//			return NewStore(testDatabase(t))
//		})
//	}
package storetest

import (
	"context"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Run checks the stores that newStore returns, one rule of the contract per
// subtest. Each rule calls newStore for itself, and there is one call more for
// a look at the type. All keys and tokens are random, so the stores may share
// one database and it need not be empty. What is left in it expires within
// five minutes.
//
// Some rules wait for a lease or a TTL to end. How depends on the store:
//
//   - If it has a method Advance(time.Duration), its clock is virtual. Advance
//     moves it on, and the rules run one after the other, so that stores may
//     share the clock as well. The clock may also run by itself.
//   - Otherwise the rules wait in real time, a fraction of a second each, and
//     run in parallel. The store's clock may then be 10 ms coarse, not more: a
//     store with a coarser one needs Advance.
//
// The rules about [idempotency.Watcher] are skipped for a store that is none,
// and two that would take too long for a store without Advance.
func Run(t *testing.T, newStore func(t *testing.T) idempotency.Store) {
	_, virtual := newStore(t).(advancer)
	for _, g := range groups {
		// The group's subtest is what waits for parallel rules, so that
		// nothing of them is left when Run returns.
		t.Run(g.name, func(t *testing.T) {
			for _, r := range g.rules {
				t.Run(r.name, func(t *testing.T) {
					if !virtual {
						t.Parallel()
					}
					store := newStore(t)
					if reason := r.skip(store); reason != "" {
						t.Skip(reason)
					}
					if err := r.run(t.Context(), store, timingOf(store)); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

// An advancer is a store with a virtual clock.
type advancer interface{ Advance(time.Duration) }

// A rule is one sentence of the contract. Its check reports to the env and not
// to a testing.T, so that the suite can be tested on stores that break it.
type rule struct {
	name  string
	check func(*env)

	// needsAdvance and needsWatcher say which stores the rule is for.
	needsAdvance, needsWatcher bool
}

var groups = []struct {
	name  string
	rules []rule
}{
	{"Acquire", acquireRules},
	{"Lease", leaseRules},
	{"Renew", renewRules},
	{"Complete", completeRules},
	{"Release", releaseRules},
	{"Expiry", expiryRules},
	{"Values", valueRules},
	{"Concurrency", concurrencyRules},
	{"Watch", watchRules},
}

// skip returns why the rule is not for this store, or "".
func (r rule) skip(store idempotency.Store) string {
	if _, ok := store.(advancer); r.needsAdvance && !ok {
		return "takes too long in real time: the store has no Advance method"
	}
	if _, ok := store.(idempotency.Watcher); r.needsWatcher && !ok {
		return "optional: the store is no idempotency.Watcher"
	}
	return ""
}

// run returns how the store breaks the rule, or nil.
func (r rule) run(ctx context.Context, store idempotency.Store, tm timing) error {
	ctx, cancel := context.WithTimeout(ctx, ruleTimeout)
	defer cancel()
	e := newEnv(ctx, store, tm)
	r.check(e)
	return e.err
}
