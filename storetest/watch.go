package storetest

import (
	"bytes"
	"context"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// watchRules do what a waiting duplicate does: Watch, Acquire, wait. A store may
// rely on this call of Acquire, and notify only of cells that the call has found
// InProgress. A store may close a channel at any time.
var watchRules = []rule{
	{name: "Complete closes the channel", needsWatcher: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		changed := e.watch(e.ctx)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.complete("A", result{value: "done"})
		e.awaitClosed(changed)
	}},

	{name: "Release closes the channel", needsWatcher: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		changed := e.watch(e.ctx)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.release("A")
		e.awaitClosed(changed)
	}},

	{name: "all channels are closed", needsWatcher: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		changed := make([]<-chan struct{}, 8)
		for i := range changed {
			changed[i] = e.watch(e.ctx)
		}
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.complete("A", result{value: "done"})
		for _, c := range changed {
			e.awaitClosed(c)
		}
	}},

	{name: "Watch does not wait", needsWatcher: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.mustReturn("Watch", func() { _, _ = e.store.(idempotency.Watcher).Watch(e.ctx, e.key) })
	}},

	{name: "a watch may begin before the claim", needsWatcher: true, check: func(e *env) {
		changed := e.watch(e.ctx)
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.complete("A", result{value: "done"})
		e.awaitClosed(changed)
	}},

	{name: "a watch outlives a renewal", needsWatcher: true, check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		changed := e.watch(e.ctx)
		e.acquire(claim{token: "B"}).is(idempotency.InProgress)
		e.acquire(claim{token: "A"}).acquired(1)
		e.acquire(claim{token: "A", attempt: 1}).acquired(1)
		e.complete("A", result{value: "done"})
		e.awaitClosed(changed)
	}},

	{name: "a watch outlives a take-over", needsWatcher: true, check: func(e *env) {
		a := e.acquire(claim{token: "A", lease: e.short}).acquired(1)
		changed := e.watch(e.ctx)
		e.changesAfter(a.span, e.short, claim{token: "B"}, idempotency.InProgress).acquired(2)
		e.acquire(claim{token: "C"}).is(idempotency.InProgress)
		e.release("B")
		e.awaitClosed(changed)
	}},

	{name: "a watch that has ended ends no other", needsWatcher: true, check: func(e *env) {
		// Stores clean up in their own time, so the mistake may take a few
		// tries to show.
		for range races {
			e.use(randomKey())
			e.acquire(claim{token: "A"}).acquired(1)
			ctx, cancel := context.WithCancel(e.ctx)
			e.watch(ctx)
			changed := e.watch(e.ctx)
			e.watch(ctx)
			cancel()
			e.note("the first and the third watch are cancelled")
			e.acquire(claim{token: "B"}).is(idempotency.InProgress)
			e.complete("A", result{value: "done"})
			e.awaitClosed(changed)
		}
	}},

	{name: "a watch that has ended leaves no goroutine", needsWatcher: true, check: abandonedWatches},
}

// watch watches the key.
func (e *env) watch(ctx context.Context) <-chan struct{} {
	if e.err != nil {
		return nil
	}
	changed, err := e.store.(idempotency.Watcher).Watch(ctx, e.key)
	if err != nil || changed == nil {
		e.note("Watch() = %v, %v", changed, err)
		e.fail("a channel and no error")
		return nil
	}
	e.note("Watch() = a channel")
	return changed
}

// awaitClosed waits for a notification.
func (e *env) awaitClosed(changed <-chan struct{}) {
	if e.err != nil {
		return
	}
	select {
	case <-changed:
	case <-time.After(e.patience):
		e.fail("the channel to be closed within %v", e.patience)
	}
}

// abandonedWatches counts the goroutines that watches leave behind. Goroutines
// that Watch starts inherit its label, so no other goroutine counts. A store may
// keep a few goroutines that serve all of its watches.
func abandonedWatches(e *env) {
	const watches, few = 64, 16
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	label := randomKey()
	pprof.Do(ctx, pprof.Labels("storetest", label), func(ctx context.Context) {
		for range watches {
			e.key = randomKey()
			e.watch(ctx)
		}
	})
	cancel()
	e.note("all watches are cancelled")
	for deadline := time.Now().Add(e.patience); e.err == nil; <-time.After(10 * time.Millisecond) {
		left := labelled(label)
		if left <= few {
			return
		}
		if time.Now().After(deadline) {
			e.fail("at most %d goroutines left of %d watches after %v; there are %d", few, watches, e.patience, left)
		}
	}
}

// labelled returns how many goroutines have this label.
func labelled(label string) int {
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		return 0
	}
	// After a headline, "12 @ 0x1 0x2\n# labels: {…}\n…" for 12 equal stacks.
	_, stacks, _ := strings.Cut(profile.String(), "\n")
	total := 0
	for stack := range strings.SplitSeq(stacks, "\n\n") {
		number, rest, _ := strings.Cut(stack, " @ ")
		if n, err := strconv.Atoi(number); err == nil && strings.Contains(rest, label) {
			total += n
		}
	}
	return total
}
