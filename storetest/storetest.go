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
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Run checks the stores that newStore returns, one rule of the contract per
// subtest. Each rule has a store of its own; one more is made to see its type.
// All keys and tokens are random, so the stores may share one database, which
// need not be empty. The cells that Run leaves in it expire within five minutes.
//
// Some rules wait for a lease or a TTL to end. How depends on the store:
//
//   - If it has a method Advance(time.Duration), its clock is virtual. Advance
//     moves it on. The rules then run one after the other, so that stores may
//     share the clock as well. The clock may also run by itself.
//   - Otherwise the rules wait in real time, a fraction of a second each, and
//     several run at a time. The store's clock may then be 10 ms coarse, not
//     more: a store with a coarser one needs Advance.
//
// The largest value that Run stores has 1 MiB, which is the default of
// Options.MaxResponseBytes. A store that can keep less says how many bytes, with
// a method MaxValue() int, and Run stores a value of that size. Such a store
// returns an error for a larger one, and leaves the cell as it is.
//
// Run skips the rules about [idempotency.Watcher] for a store that is not one,
// and likewise those about [idempotency.Inspector].
func Run(t *testing.T, newStore func(t *testing.T) idempotency.Store) {
	_, virtual := newStore(t).(advancer)
	limit := 1
	if !virtual {
		limit = realTimeRules
	}
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			slots := make(chan struct{}, limit)
			var all sync.WaitGroup
			for _, r := range g.rules {
				slots <- struct{}{}
				all.Go(func() {
					t.Run(r.name, func(t *testing.T) { r.test(t, newStore(t)) })
					<-slots
				})
			}
			all.Wait()
		})
	}
}

// realTimeRules is how many rules run at a time in real time. t.Parallel would
// run as many as there are processors; most rules only wait, so more can run.
const realTimeRules = 8

// An advancer is a store with a virtual clock.
type advancer interface{ Advance(time.Duration) }

// A limiter is a store whose values may not have 1 MiB.
type limiter interface{ MaxValue() int }

// A rule is one sentence of the contract. Its check reports to the env and not
// to a testing.T, so that the suite can be tested with stores that break it.
type rule struct {
	name  string
	check func(*env)

	// These say that the rule is for a Watcher or an Inspector only.
	needsWatcher, needsInspector bool
}

var groups = []struct {
	name  string
	rules []rule
}{
	{"Acquire", acquireRules},
	{"Resend", resendRules},
	{"Renew", renewRules},
	{"Once", onceRules},
	{"Lease", leaseRules},
	{"Complete", completeRules},
	{"Release", releaseRules},
	{"Expiry", expiryRules},
	{"Values", valueRules},
	{"Concurrency", concurrencyRules},
	{"Watch", watchRules},
	{"Inspect", inspectRules},
	{"Forget", forgetRules},
}

// test checks the rule on store, or skips it.
func (r rule) test(t *testing.T, store idempotency.Store) {
	if reason := r.skip(store); reason != "" {
		t.Skip(reason)
	}
	if err := r.run(t.Context(), store, timingOf(store)); err != nil {
		t.Error(err)
	}
}

// skip returns why the rule does not apply to this store, or "".
func (r rule) skip(store idempotency.Store) string {
	if _, ok := store.(idempotency.Watcher); r.needsWatcher && !ok {
		return "optional: the store is no idempotency.Watcher"
	}
	if _, ok := store.(idempotency.Inspector); r.needsInspector && !ok {
		return "optional: the store is no idempotency.Inspector"
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
