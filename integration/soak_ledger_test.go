package integration

import (
	"bufio"
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A soakLedger counts effects. It remembers a key for two turns, which are
// longer than records live.
type soakLedger struct {
	addr  string
	lease time.Duration

	mu       sync.Mutex // guards what follows
	effects  map[string]soakEffect
	previous map[string]soakEffect
	answered map[string]bool      // runs whose answer a client has
	before   map[string]bool      // the same, of the last turn
	unstored map[string]time.Time // when answers of runs went out that were not stored
	dead     map[string]time.Time // processes, and when they were killed
	outages  []redisOutage        // of Redis that the promise names
	total    int
	again    map[string]string // keys that ran again and may, by their first run
	unkept   int               // keys that ran again and may, after an answer
	double   []string          // what must not be
}

// A soakEffect is the last run that had the effect of a key, and when the first
// had it.
type soakEffect struct {
	run  string
	at   time.Time
	lost bool // the answer of the first may be lost
}

type redisOutage struct{ from, to time.Time }

func startSoakLedger(t *testing.T, lease time.Duration) *soakLedger {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	l := &soakLedger{
		addr: listener.Addr().String(), lease: lease, effects: make(map[string]soakEffect),
		answered: make(map[string]bool), unstored: make(map[string]time.Time), dead: make(map[string]time.Time),
		again: make(map[string]string),
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				for lines := bufio.NewScanner(conn); lines.Scan(); {
					key, run, _ := strings.Cut(lines.Text(), " ")
					if key == notYetStored {
						l.goesOut(run, time.Now())
					} else {
						l.add(key, run)
					}
				}
				_ = conn.Close()
			}()
		}
	}()
	return l
}

// notYetStored is what a line has in the place of a key if it says that the answer
// of a run goes out, and is not stored yet.
const notYetStored = "unstored"

// goesOut notes that an answer goes out that is not stored yet.
func (l *soakLedger) goesOut(run string, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unstored[run] = at
}

// diedLocked reports whether the process of a run was killed.
func (l *soakLedger) diedLocked(run string) bool {
	_, dead := l.dead[processOf(run)]
	return dead
}

// unkeptLocked reports whether the process of a run was killed while its answer,
// which had gone out, waited to be stored. The process goes on storing it, so
// the excuse holds for a lease.
func (l *soakLedger) unkeptLocked(run string) bool {
	sent, unstored := l.unstored[run]
	died, dead := l.dead[processOf(run)]
	return unstored && dead && died.Sub(sent) < l.lease
}

func (l *soakLedger) effectLocked(key string) (effect soakEffect, ok bool) {
	if effect, ok = l.effects[key]; !ok {
		effect, ok = l.previous[key]
	}
	return effect, ok
}

// add judges an effect. A second one is legal under a key that is not
// at-most-once if the process of the first was killed before a client had its
// answer, or before the store had it, as the service has said itself.
func (l *soakLedger) add(key, run string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	first, ok := l.effectLocked(key)
	plain := strings.HasPrefix(key, history.Plain)
	switch {
	case !ok:
		l.effects[key] = soakEffect{run: run, at: time.Now()}
	case plain && l.unkeptLocked(first.run):
		l.unkept++
		l.effects[key] = soakEffect{run, first.at, true}
	case plain && l.diedLocked(first.run) && !l.answered[first.run] && !l.before[first.run]:
		l.again[first.run] = key
		l.effects[key] = soakEffect{run, first.at, first.lost}
	case plain && l.lostLocked(first.at):
		l.effects[key] = soakEffect{run, first.at, first.lost}
	default:
		l.double = append(l.double, key+": "+first.run+", "+run)
	}
}

// answer notes that a client has the answer of a run. It may learn of it after
// the key ran again.
func (l *soakLedger) answer(run string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answered[run] = true
	if key, ok := l.again[run]; ok {
		delete(l.again, run)
		l.double = append(l.double, key+": ran again after the answer of "+run)
	}
}

// processOf returns the process that a run was in.
func processOf(run string) string { return run[:strings.LastIndexByte(run, '-')] }

func (l *soakLedger) bury(process string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead[process] = time.Now()
}

func (l *soakLedger) isDead(process string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, dead := l.dead[process]
	return dead
}

// isDeadOwner reports whether the key's effect was in a process that was killed.
func (l *soakLedger) isDeadOwner(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	effect, ok := l.effectLocked(key)
	return ok && l.diedLocked(effect.run)
}

// away notes that Redis was down. An answer that could not be stored until its
// lease ended may be lost, which takes about a lease.
func (l *soakLedger) away(from, to time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if to.Sub(from) > l.lease/2 {
		l.outages = append(l.outages, redisOutage{from, to})
	}
}

func (l *soakLedger) lostLocked(at time.Time) bool {
	for _, o := range l.outages {
		if at.After(o.from.Add(-l.lease)) && at.Before(o.to) {
			return true
		}
	}
	return false
}

// mayBeLost reports whether Redis was down for as long as the key's lease ran, or
// the key's process was killed while its answer waited to be stored.
func (l *soakLedger) mayBeLost(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	effect, ok := l.effectLocked(key)
	return ok && (effect.lost || l.lostLocked(effect.at) || l.unkeptLocked(effect.run))
}

// soakMemory is how many leases two turns take.
const soakMemory = 16

// wasUnstored reports whether the answer of the key's run went out before it was
// stored. If it is stored only when its lease is over, an at-most-once key has an
// unknown outcome until then.
func (l *soakLedger) wasUnstored(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	effect, ok := l.effectLocked(key)
	_, unstored := l.unstored[effect.run]
	return ok && unstored
}

// turn forgets what is two turns old.
func (l *soakLedger) turn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.previous, l.effects = l.effects, make(map[string]soakEffect)
	l.before, l.answered = l.answered, make(map[string]bool)
	maps.DeleteFunc(l.unstored, func(_ string, at time.Time) bool { return time.Since(at) > soakMemory*l.lease })
}

func (l *soakLedger) counts() (total, again, unkept int, double []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, len(l.again), l.unkept, l.double
}

// The death of a process is an excuse for a second effect only as long as no
// client has the answer of the first, or the store does not have it.
func TestSoakLedger(t *testing.T) {
	const first, second = "redis-0.1-1", "redis-1.1-7"
	for name, row := range map[string]struct {
		key      string
		happens  func(l *soakLedger)
		twice    bool
		happened int // runs again that may
	}{
		"a plain key, killed":    {"plain-1", func(l *soakLedger) { l.bury("redis-0.1") }, false, 1},
		"a plain key, alive":     {"plain-1", func(*soakLedger) {}, true, 0},
		"answered, then killed":  {"plain-1", func(l *soakLedger) { l.answer(first); l.bury("redis-0.1") }, true, 0},
		"another run is killed":  {"plain-1", func(l *soakLedger) { l.bury("redis-1.1") }, true, 0},
		"an at-most-once key":    {"once-1", func(l *soakLedger) { l.bury("redis-0.1") }, true, 0},
		"forgotten in the turns": {"plain-1", func(l *soakLedger) { l.turn(); l.turn() }, false, 0},
		"Redis was away for long": {"plain-1", func(l *soakLedger) {
			l.away(time.Now().Add(-time.Minute), time.Now().Add(time.Minute))
		}, false, 0},
		"Redis was away for a moment": {"plain-1", func(l *soakLedger) {
			l.away(time.Now().Add(-time.Millisecond), time.Now().Add(time.Millisecond))
		}, true, 0},
		"answered before it was stored, then killed": {"plain-1", func(l *soakLedger) {
			l.goesOut(first, time.Now())
			l.answer(first)
			l.bury("redis-0.1")
		}, false, 1},
		"or answered later": {"plain-1", func(l *soakLedger) { l.goesOut(first, time.Now()); l.bury("redis-0.1") }, false, 1},
		"and at-most-once":  {"once-1", func(l *soakLedger) { l.goesOut(first, time.Now()); l.bury("redis-0.1") }, true, 0},
		"and alive":         {"plain-1", func(l *soakLedger) { l.goesOut(first, time.Now()) }, true, 0},
		"and killed later than its lease": {"plain-1", func(l *soakLedger) {
			l.goesOut(first, time.Now().Add(-time.Minute))
			l.answer(first)
			l.bury("redis-0.1")
		}, true, 0},
		"another answer was not stored": {"plain-1", func(l *soakLedger) {
			l.goesOut("redis-0.1-2", time.Now())
			l.answer(first)
			l.bury("redis-0.1")
		}, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := startSoakLedger(t, time.Second)
			l.add(row.key, first)
			row.happens(l)
			l.add(row.key, second)
			total, again, unkept, double := l.counts()
			require.Equal(t, 2, total)
			require.Equal(t, row.happened, again+unkept)
			require.Equal(t, row.twice, len(double) > 0, "%q", double)
			if unkept > 0 {
				require.True(t, l.mayBeLost(row.key), "clients may have two answers")
			}
			if again > 0 { // the client is slower than the second run
				l.answer(first)
				_, again, _, double = l.counts()
				require.Zero(t, again)
				require.NotEmpty(t, double)
			}
		})
	}
}
