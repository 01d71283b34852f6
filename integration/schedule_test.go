package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// A fault is something that happens to one part of the service. From is since
// the schedule began; a part whose last fault took longer comes later.
type fault struct {
	What      faultKind
	From, For time.Duration
	Delay     time.Duration
}

type faultKind string

const (
	killProcess faultKind = "kill the process"
	stopProcess faultKind = "stop the process"
	replace     faultKind = "replace the process"
	cutLink     faultKind = "cut its connections"
	breakLink   faultKind = "link " + faultKind(linkDown)
	slowLink    faultKind = "link " + faultKind(linkSlow)
	muteLink    faultKind = "link " + faultKind(linkMute)
	hollowLink  faultKind = "link " + faultKind(linkHollow)
)

func (f fault) String() string {
	s := fmt.Sprintf("%v after %v for %v", f.What, f.From.Round(time.Millisecond), f.For.Round(time.Millisecond))
	if f.Delay > 0 {
		s += fmt.Sprintf(", %v each", f.Delay.Round(time.Millisecond))
	}
	return s
}

// A schedule is the faults of each part: replica-0, link-0, database.
type schedule struct {
	lanes  []string
	faults map[string][]fault
}

func (s schedule) count() (n int) {
	for _, faults := range s.faults {
		n += len(faults)
	}
	return n
}

func (s schedule) String() string {
	var b strings.Builder
	for _, lane := range s.lanes {
		for _, f := range s.faults[lane] {
			fmt.Fprintf(&b, "%s: %v\n", lane, f)
		}
	}
	return b.String()
}

// A faultMix says how likely faults are. A part without any has none.
type faultMix struct {
	process, link, database []choice[faultKind]
	pause                   time.Duration // mean time between faults of a part
}

var allFaults = faultMix{
	process:  []choice[faultKind]{{4, killProcess}, {6, stopProcess}},
	link:     []choice[faultKind]{{3, cutLink}, {2, breakLink}, {3, slowLink}, {3, muteLink}, {2, hollowLink}},
	database: []choice[faultKind]{{3, killProcess}, {2, stopProcess}},
	pause:    1200 * time.Millisecond,
}

// deployments has processes replaced, and all other faults.
var deployments = faultMix{
	process: []choice[faultKind]{{8, replace}, {1, killProcess}, {1, stopProcess}},
	link:    allFaults.link, database: allFaults.database, pause: 900 * time.Millisecond,
}

// newSchedule returns the schedule of a seed.
func newSchedule(seed uint64, replicas int, length, lease time.Duration, mix faultMix) schedule {
	s := schedule{faults: make(map[string][]fault)}
	add := func(lane string, mix []choice[faultKind], pause time.Duration) {
		s.lanes = append(s.lanes, lane)
		if len(mix) == 0 {
			return
		}
		r := newRand(seed, "faults", lane)
		for at := between(r, pause/3, pause); at < length; {
			f := newFault(r, choose(r, mix), lease)
			f.From = at
			s.faults[lane] = append(s.faults[lane], f)
			at += f.For + between(r, pause/2, pause*3/2)
		}
	}
	for n := range replicas {
		add(fmt.Sprintf("replica-%d", n), mix.process, mix.pause)
		add(fmt.Sprintf("link-%d", n), mix.link, mix.pause)
	}
	add("database", mix.database, 2*mix.pause)
	return s
}

func newFault(r *rand.Rand, what faultKind, lease time.Duration) fault {
	f := fault{What: what}
	switch what {
	case stopProcess:
		f.For = between(r, lease/3, lease*5/2)
	case slowLink:
		f.For, f.Delay = between(r, lease/4, 2*lease), between(r, time.Millisecond, lease/3)
		if r.IntN(3) == 0 { // commands arrive when whoever sent them has lost its lease
			f.Delay = between(r, lease/2, lease*3/2)
		}
	case cutLink, replace:
	default:
		f.For = between(r, 10*time.Millisecond, lease*3/2)
	}
	return f
}

func between(r *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(r.Int64N(int64(to-from)+1))
}

// run does to the service what the schedule says, and heals what it did. It
// returns when all is over, or ctx, and the last part is healed.
func (s schedule) run(ctx context.Context, t *testing.T, f *fleet) {
	began := time.Now()
	var lanes sync.WaitGroup
	for _, lane := range s.lanes {
		lanes.Go(func() {
			for _, fault := range s.faults[lane] {
				if !pauseFor(ctx, fault.From-time.Since(began)) {
					return
				}
				f.strike(ctx, t, lane, fault)
			}
		})
	}
	lanes.Wait()
}

// pauseFor is false when ctx has ended.
func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// stopFor stops a process for d, or until ctx ends. Where that is not possible
// it goes on.
func stopFor(ctx context.Context, process *os.Process, d time.Duration) {
	_ = idemtest.Stop(process)
	pauseFor(ctx, d)
	_ = idemtest.Continue(process)
}

// strike lets a fault happen and waits until it is over.
func (f *fleet) strike(ctx context.Context, t *testing.T, lane string, fault fault) {
	name, number, _ := strings.Cut(lane, "-")
	n := 0
	_, _ = fmt.Sscan(number, &n)
	switch {
	case name == "database" && fault.What == killProcess:
		f.database.kill()
		pauseFor(ctx, fault.For)
		if !f.database.start() {
			t.Error("the database does not start again")
		}
	case name == "database":
		stopFor(ctx, f.database.process(), fault.For)
	case fault.What == replace:
		if err := f.servers[n].deploy(); err != nil {
			t.Error(err)
		}
	case fault.What == killProcess:
		f.kill(n)
		pauseFor(ctx, fault.For)
		if err := f.servers[n].start(); err != nil {
			t.Error(err)
		}
	case fault.What == stopProcess:
		f.stop(ctx, n, fault.For)
	case fault.What == cutLink:
		f.links[n].cut()
	default:
		f.links[n].set(linkMode(strings.TrimPrefix(string(fault.What), "link ")), fault.Delay)
		pauseFor(ctx, fault.For)
		f.links[n].set(linkUp, 0)
	}
}
