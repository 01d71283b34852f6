package storetest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
)

// These three are the kinds of store that Run tells apart.
type (
	virtualStore interface {
		idempotency.Watcher
		idempotency.Inspector
		plainStore
		advancer
	}
	realStore interface {
		idempotency.Watcher
		idempotency.Inspector
		plainStore
	}
	plainStore interface{ idempotency.Store }
)

var _ virtualStore = (*reference)(nil)

func TestReferencePasses(t *testing.T) {
	t.Run("virtual time", func(t *testing.T) {
		t.Parallel()
		Run(t, func(*testing.T) idempotency.Store { return newReference(fault{}) })
	})
	t.Run("virtual time that runs", func(t *testing.T) {
		t.Parallel()
		Run(t, func(*testing.T) idempotency.Store { return running(fault{}) })
	})
	t.Run("one store for all rules", func(t *testing.T) {
		t.Parallel()
		shared := newReference(fault{})
		Run(t, func(*testing.T) idempotency.Store { return shared })
	})
	t.Run("real time", func(t *testing.T) {
		t.Parallel()
		shared := running(fault{})
		Run(t, func(*testing.T) idempotency.Store { return struct{ realStore }{shared} })
	})
}

// A smallStore keeps no values over MaxValue.
type smallStore struct {
	virtualStore
	stored int // bytes of the largest value
}

func (*smallStore) MaxValue() int { return 300_000 }

func (s *smallStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if len(r.Value) > s.MaxValue() {
		return errors.New("too large")
	}
	s.stored = max(s.stored, len(r.Value))
	return s.virtualStore.Complete(ctx, key, token, r)
}

func TestLargeValueOfALimitedStore(t *testing.T) {
	t.Parallel()
	store := &smallStore{virtualStore: newReference(fault{})}
	if err := allRules()["Values/a large value"].run(t.Context(), store, timingOf(store)); err != nil {
		t.Error(err)
	}
	if store.stored != store.MaxValue() {
		t.Errorf("the largest value has %d bytes, and not the %d that the store can keep", store.stored, store.MaxValue())
	}
}

// running returns a reference whose clock runs.
func running(f fault) *reference {
	s := newReference(f)
	s.start = time.Now()
	return s
}

func TestRulesAreSkipped(t *testing.T) {
	t.Parallel()
	watched := struct{ realStore }{newReference(fault{})}
	plain := struct{ plainStore }{newReference(fault{})}
	for name, r := range allRules() {
		if reason := r.skip(newReference(fault{})); reason != "" {
			t.Errorf("%s is skipped for a store that can do everything: %s", name, reason)
		}
		if reason := r.skip(watched); reason != "" {
			t.Errorf("%s is skipped for a store without Advance: %s", name, reason)
		}
		if skipped := r.skip(plain) != ""; skipped != (r.needsWatcher || r.needsInspector) {
			t.Errorf("%s is skipped for a store with just the three methods: %v", name, skipped)
		}
	}
}

// allRules returns the rules by the names that their subtests have.
func allRules() map[string]rule {
	rules := make(map[string]rule)
	for _, g := range groups {
		for _, r := range g.rules {
			rules[g.name+"/"+r.name] = r
		}
	}
	return rules
}

func brokenStores() []brokenStore {
	return slices.Concat(acquireFaults, resendFaults, renewFaults, onceFaults, leaseFaults, wayFaults(),
		completeFaults, releaseFaults, expiryFaults, valueFaults, raceFaults, watchFaults,
		inspectFaults, forgetFaults, forgetMeanwhileFaults)
}

func TestBrokenStoresAreFound(t *testing.T) {
	rules := allRules()
	for _, broken := range brokenStores() {
		t.Run(broken.name, func(t *testing.T) {
			t.Parallel()
			if len(broken.rules) == 0 {
				t.Error("no rule is meant to find it")
			}
			for _, name := range broken.rules {
				store := newReference(broken.fault)
				tm := timingOf(store)
				tm.patience = 50 * time.Millisecond // for what will never happen
				if rules[name].run(t.Context(), store, tm) == nil {
					t.Errorf("%s did not find it", name)
				}
			}
		})
	}
}

// TestEveryRuleFindsSomething keeps out rules that cannot fail.
func TestEveryRuleFindsSomething(t *testing.T) {
	t.Parallel()
	rules, left := allRules(), allRules()
	for _, broken := range brokenStores() {
		for _, name := range broken.rules {
			if _, ok := rules[name]; !ok {
				t.Errorf("%s: there is no rule %q", broken.name, name)
			}
			delete(left, name)
		}
	}
	for name := range left {
		t.Errorf("no broken store is meant to be found by %s", name)
	}
}

// TestBrokenStoresAreFoundInRealTime has the clock be right and only the store
// wrong. What is short is so long that no pause of the machine hides a fault.
func TestBrokenStoresAreFoundInRealTime(t *testing.T) {
	t.Parallel()
	tm := timing{short: 600 * time.Millisecond, tolerance: 10 * time.Millisecond, patience: 50 * time.Millisecond}
	names := []string{
		"the lease never ends", "the lease ends at once", "the lease is half as long", "a renewal does not start the lease",
		"nothing ever expires", "a result expires early", "a take-over keeps the TTL", "a marker is kept for the lease",
	}
	rules := allRules()
	var all sync.WaitGroup // not subtests, of which only a few run at a time
	for _, name := range names {
		i := slices.IndexFunc(brokenStores(), func(b brokenStore) bool { return b.name == name })
		if i < 0 {
			t.Fatalf("there is no broken store %q", name)
		}
		broken := brokenStores()[i]
		for _, name := range broken.rules {
			r, store := rules[name], struct{ realStore }{running(broken.fault)}
			all.Go(func() {
				if r.run(t.Context(), store, tm) == nil {
					t.Errorf("%s: %s did not find it", broken.name, name)
				}
			})
		}
	}
	all.Wait()
}

// TestReport shows the report that the author of a broken store reads.
func TestReport(t *testing.T) {
	t.Parallel()
	store := newReference(fault{after: func(c *call) {
		if c.complete() {
			c.err = nil
		}
	}})
	err := allRules()["Complete/a former owner is refused after a take-over"].run(t.Context(), store, timingOf(store))
	want := strings.TrimPrefix(`
after
	Acquire(token A, fingerprint none, Lease 10s, TTL 5m0s) = Acquired, Attempt 1
	8s pass
	at least 11s have passed
	Acquire(token B, fingerprint none, Lease 5m0s, TTL 5m0s) = Acquired, Attempt 2
	Complete(token A, fingerprint none, value "late", TTL 5m0s) = <nil>
want idempotency: lease lost`, "\n")
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}
