package fuzz

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A storeBug is what a store does instead of what it should. Where a function is
// nil the store does what it should.
type storeBug struct {
	acquire  func(s fullStore, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error)
	complete func(s *plantedStore, ctx context.Context, key, token string, r idempotency.Result) error
	release  func(s *plantedStore, ctx context.Context, key, token string, keep time.Duration) error
}

// A plantedStore is a store with a bug.
type plantedStore struct {
	bug storeBug

	mu    sync.Mutex // guards what follows
	store fullStore
}

func (s *plantedStore) inner() fullStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store
}

// forget drops everything.
func (s *plantedStore) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store = idempotency.NewMemoryStore()
}

func (s *plantedStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	if s.bug.acquire == nil {
		return s.inner().Acquire(ctx, key, c)
	}
	return s.bug.acquire(s.inner(), ctx, key, c)
}

func (s *plantedStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if s.bug.complete == nil {
		return s.inner().Complete(ctx, key, token, r)
	}
	return s.bug.complete(s, ctx, key, token, r)
}

func (s *plantedStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if s.bug.release == nil {
		return s.inner().Release(ctx, key, token, keep)
	}
	return s.bug.release(s, ctx, key, token, keep)
}

func (s *plantedStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	return s.inner().Watch(ctx, key)
}

// changesClaims is a store that changes claims before it makes them.
func changesClaims(change func(*idempotency.Claim)) storeBug {
	return storeBug{acquire: func(s fullStore, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		change(&c)
		return s.Acquire(ctx, key, c)
	}}
}

// changesAnswers is a store that changes the answer to a claim.
func changesAnswers(change func(*idempotency.Record, *error)) storeBug {
	return storeBug{acquire: func(s fullStore, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		rec, err := s.Acquire(ctx, key, c)
		change(&rec, &err)
		return rec, err
	}}
}

// storeBugs are what the checks have to catch.
var storeBugs = map[string]storeBug{
	"lets a duplicate in": changesAnswers(func(rec *idempotency.Record, _ *error) {
		if rec.State == idempotency.InProgress {
			*rec = idempotency.Record{State: idempotency.Acquired, Attempt: 1}
		}
	}),
	"lets in when it fails": changesAnswers(func(rec *idempotency.Record, err *error) {
		if *err != nil {
			*rec, *err = idempotency.Record{State: idempotency.Acquired, Attempt: 1}, nil
		}
	}),
	"replays another key's value": changesAnswers(func(rec *idempotency.Record, _ *error) {
		if rec.State == idempotency.Completed {
			rec.Value, _ = hex.DecodeString(idemtest.GoldenResponse)
		}
	}),
	"ignores at most once": {acquire: func(s fullStore, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		said := c.Once && c.Attempt > 0
		c.Once = false
		rec, err := s.Acquire(ctx, key, c)
		rec.Once = said && rec.State == idempotency.Acquired
		return rec, err
	}},
	"counts no attempts": {acquire: func(s fullStore, ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
		if c.Attempt > 0 { // the inner store counts
			again := c
			again.Attempt = 0
			rec, err := s.Acquire(ctx, key, again)
			if err != nil || rec.State != idempotency.Acquired {
				return rec, err
			}
			c.Attempt = rec.Attempt
		}
		rec, err := s.Acquire(ctx, key, c)
		rec.Attempt = min(rec.Attempt, 1)
		return rec, err
	}},
	"ends the lease early":  changesClaims(func(c *idempotency.Claim) { c.Lease /= 3 }),
	"does not end a lease":  changesClaims(func(c *idempotency.Claim) { c.Lease, c.TTL = 24*time.Hour, 24*time.Hour }),
	"takes its time":        changesClaims(func(*idempotency.Claim) { time.Sleep(9 * time.Second) }),
	"Complete does nothing": {complete: func(*plantedStore, context.Context, string, string, idempotency.Result) error { return nil }},
	"Complete fails": {complete: func(*plantedStore, context.Context, string, string, idempotency.Result) error {
		return idemtest.ErrDown
	}},
	"Complete ignores the token": {complete: func(s *plantedStore, ctx context.Context, key, token string, r idempotency.Result) error {
		s.forget()
		return s.inner().Complete(ctx, key, token, r)
	}},
	"Release does nothing": {release: func(*plantedStore, context.Context, string, string, time.Duration) error { return nil }},
	"Release frees a record": {release: func(s *plantedStore, _ context.Context, _, _ string, _ time.Duration) error {
		s.forget()
		return nil
	}},
}

func plant(bug string) func(fullStore) fullStore {
	return func(s fullStore) fullStore {
		planted, ok := storeBugs[bug]
		if !ok {
			panic(bug)
		}
		return &plantedStore{bug: planted, store: s}
	}
}

// An objector notes what a check fails with.
type objector struct{ said string }

func (o *objector) Errorf(format string, args ...any) { o.said += fmt.Sprintf(format, args...) }

func (o *objector) FailNow() { panic(o) }

// objection returns what a check fails with, or "".
func objection(check func(require.TestingT)) (said string) {
	o := new(objector)
	defer func() {
		if p := recover(); p != nil && p != any(o) {
			panic(p)
		}
		said = o.said
	}()
	check(o)
	return ""
}

// The rules of store calls object to each bug, in a flow with a fault or
// without one.
func TestStoreCallsCatchPlantedBugs(t *testing.T) {
	for _, row := range []struct {
		bug     string
		isOuter bool // planted between the middleware and the history of its calls
		flow    string
		call    string
		way     string
		pause   time.Duration
		says    string
	}{
		{bug: "lets a duplicate in", flow: "duplicate that waits", says: "two runs at once"},
		{bug: "lets in when it fails", isOuter: true, flow: "first execution", call: "Acquire#1", way: "fails, not executed",
			says: "the handler ran although the store failed"},
		{bug: "replays another key's value", flow: "replay", says: "201 hello without a run"},
		{bug: "ignores at most once", flow: "at most once, panic", pause: retryLater, says: "an at-most-once key ran again"},
		{bug: "ends the lease early", flow: "panic", pause: 15 * time.Second, says: "within the lease of run 1"},
		{bug: "does not end a lease", flow: "panic", says: "the key is stuck"},
		{bug: "takes its time", flow: "replay", says: "how long the client waited"},
		{bug: "Complete does nothing", flow: "first execution", pause: retryLater, says: "began after an answer was kept"},
		{bug: "Complete fails", flow: "first execution", pause: retryLater, says: "run 2 after run 1 had finished"},
		{bug: "Complete ignores the token", flow: "attached", call: "Complete#1", way: "hangs, executed 45s later",
			pause: 37 * time.Second, says: "another answer than the first"},
		{bug: "Release does nothing", flow: "at most once, discard", pause: retryLater, says: "reported how it ended"},
		{bug: "Release frees a record", flow: "release", call: "Release#1", way: "executed again 45s later",
			says: "began after an answer was kept"},
	} {
		t.Run(row.bug, func(t *testing.T) {
			flow := storeFlows[slices.IndexFunc(storeFlows, func(f storeFlow) bool { return f.name == row.flow })]
			rules, _, _ := flow.undisturbed(t)
			var faults []storeFault
			if row.call != "" {
				way := storeWays[slices.IndexFunc(storeWays, func(w storeWay) bool { return w.name == row.way })]
				faults = append(faults, storeFault{call: row.call, way: way})
			}
			judged := func() string {
				h, _, _ := flow.play(t, faults, thisCall, row.pause)
				return objection(func(t require.TestingT) { rules.check(t, h, row.flow) })
			}
			require.Empty(t, judged(), "without the bug")
			if row.isOuter {
				flow.outer = plant(row.bug)
			} else {
				flow.inner = plant(row.bug)
			}
			require.Contains(t, judged(), row.says)
		})
	}
}

// The model of FuzzMiddleware objects to each bug in one of its seeds.
func TestFuzzMiddlewareCatchesPlantedBugs(t *testing.T) {
	for _, bug := range []string{"lets a duplicate in", "replays another key's value", "ignores at most once", "ends the lease early",
		"does not end a lease", "counts no attempts", "Complete does nothing", "Release does nothing"} {
		t.Run(bug, func(t *testing.T) {
			said := ""
			for _, seed := range modelSeeds {
				said += objection(playSequence(t, []byte(seed), plant(bug)(idempotency.NewMemoryStore())))
			}
			require.NotEmpty(t, said)
		})
	}
}

// FuzzStoredFormReader objects to any seed that is replayed as another one.
func TestFuzzStoredFormReaderCatchesPlantedBugs(t *testing.T) {
	value, err := hex.DecodeString(idemtest.GoldenResponse)
	require.NoError(t, err)
	for _, seed := range recordSeeds(t)[1:] {
		said := objection(func(t require.TestingT) { checkReader(t, value, seed) })
		require.NotEmpty(t, said, "%x", seed)
	}
}

// FuzzHeaderDifference objects to a header that is not what the handler set, and
// to one that outer middleware had set and that is lost or stale.
func TestFuzzHeaderDifferenceCatchesPlantedBugs(t *testing.T) {
	// Outer middleware and the handler set X-A: 1; the last request has a
	// Cache-Control of its own.
	const requests, last = "\x08\x00\x48\x00", "\x10\x04"
	check := func(header string) string {
		store := plantedStore{store: idempotency.NewMemoryStore(), bug: changesAnswers(func(rec *idempotency.Record, _ *error) {
			if rec.State == idempotency.Completed {
				rec.Value = aRecord(200, 1, header, "\x00", "")
			}
		})}
		return objection(func(t require.TestingT) { checkHeaders(t, &store, 0, []byte(requests), []byte(last)) })
	}
	require.Empty(t, check("\x01"+aField(setsOne, "X-A", "\x011")))
	require.Contains(t, check("\x01"+aField(setsOne, "X-A", "\x012")), "the replay")
	require.Contains(t, check("\x01"+aField(adds, "X-A", "\x01\x011")), "the replay")
	require.Contains(t, check("\x02"+aField(setsOne, "X-A", "\x011")+aField(deletes, "Cache-Control", "")), "Cache-Control of the current request")
}
