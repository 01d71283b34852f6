package benchmarks

import (
	"context"
	"net/http"
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

const (
	// waitingDuplicates is how many duplicates wait for one execution.
	waitingDuplicates = 50_000

	// arriveTogether is how many of them arrive at once. If all did, many would
	// wait for a processor for longer than a store call may take.
	arriveTogether = 250
)

// BenchmarkDuplicates has 50,000 duplicates wait for one execution in one
// process, and releases them at once. It reports the processor time of each from
// its arrival until it waits, and from its release until it is answered; the bytes
// that each holds while it waits; and the time from the release to the last
// answer. Run it with -benchtime=1x.
func BenchmarkDuplicates(b *testing.B) {
	list := []contender{{"floor", newWaitingFloor}, {"idempotency", func(next http.Handler) http.Handler {
		return waitingMiddleware(&idempotency.MemoryStore{})(next)
	}}}
	each(b, list, func(b *testing.B, c contender) {
		for b.Loop() {
			d := newDuplicates(b, c.wrap)
			d.arrive(b)
			d.release(b)
		}
	})
}

// BenchmarkRedisDuplicates is BenchmarkDuplicates on Redis. It also reports how
// many commands were sent before the release and after it.
func BenchmarkRedisDuplicates(b *testing.B) {
	addr := idemtest.StartRedis(b).Addr
	admin := idemtest.DialRedis(b, addr)
	wrap := waitingMiddleware(idempotency.NewRedisStore(idemtest.DialRedis(b, addr), nil))
	each(b, []contender{{"idempotency", wrap}}, func(b *testing.B, c contender) {
		for b.Loop() {
			require.NoError(b, admin.FlushDB(b.Context()).Err())
			d := newDuplicates(b, c.wrap)
			require.NoError(b, admin.ConfigResetStat(b.Context()).Err())
			d.arrive(b)
			before, _ := idemtest.CommandsSent(b, admin)
			d.release(b)
			all, _ := idemtest.CommandsSent(b, admin)
			b.ReportMetric(float64(before), "commands-waiting")
			b.ReportMetric(float64(all-before), "commands-released")
		}
	})
}

// waitingMiddleware lets all duplicates wait. The last of those that are released
// at once calls the store when all others have been answered, which takes longer
// than the default StoreTimeout on a busy machine.
func waitingMiddleware(store idempotency.Store) func(http.Handler) http.Handler {
	return idempotency.Middleware(store, &idempotency.Options{
		MaxWaiting: waitingDuplicates, Wait: time.Minute, StoreTimeout: 15 * time.Second,
	})
}

// duplicates are requests with one key.
type duplicates struct {
	handler  http.Handler
	clients  []*benchClient
	answered sync.WaitGroup
	arrived  chan struct{} // has one of them sent
	started  chan struct{} // closed by the handler of the first
	released chan struct{} // closed when it is to answer
}

// newDuplicates returns duplicates that have their goroutines, so that those do
// not count for the library.
func newDuplicates(b *testing.B, wrap func(http.Handler) http.Handler) *duplicates {
	d := &duplicates{arrived: make(chan struct{}), started: make(chan struct{}), released: make(chan struct{})}
	charge := newCharge(smallBody)
	d.handler = wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(d.started) // panics in a second run
		<-d.released
		charge.ServeHTTP(w, r)
	}))
	for range waitingDuplicates {
		client := newBenchClient(true)
		ctx, cancel := context.WithCancel(b.Context()) // as a server has one for each request
		b.Cleanup(cancel)
		client.request = client.request.WithContext(ctx)
		d.clients = append(d.clients, client)
		d.answered.Go(func() {
			<-d.arrived
			client.do(d.handler, keyAt(0))
		})
	}
	return d
}

// arrive sends the first request and, when its handler runs, the duplicates, some
// at a time. It returns when all of them wait.
func (d *duplicates) arrive(b *testing.B) {
	before := memoryInUse()
	first := newBenchClient(true)
	d.answered.Go(func() { first.do(d.handler, keyAt(0)) })
	<-d.started
	cpu := processTime()
	for range waitingDuplicates / arriveTogether {
		for range arriveTogether {
			d.arrived <- struct{}{}
		}
		awaitIdle(b)
	}
	cpu = processTime() - cpu
	b.ReportMetric(microseconds(cpu)/waitingDuplicates, "arrival-cpu-us")
	b.ReportMetric((memoryInUse()-before)/waitingDuplicates, "B/duplicate")
}

// release has the handler answer, and returns when all duplicates have been
// answered.
func (d *duplicates) release(b *testing.B) {
	cpu, start := processTime(), time.Now()
	close(d.released)
	d.answered.Wait()
	b.ReportMetric(milliseconds(time.Since(start)), "last-ms")
	b.ReportMetric(microseconds(processTime()-cpu)/waitingDuplicates, "release-cpu-us")
	for _, client := range d.clients {
		client.check(b, smallBody, true)
	}
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// memoryInUse returns the bytes of live objects and of stacks.
func memoryInUse() float64 {
	heap := heapInUse()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return heap + float64(m.StackInuse)
}

// awaitIdle waits until all goroutines but this one have waited for a while. The
// processor time would not tell that: it stands still too when other processes
// keep this one from running.
func awaitIdle(b *testing.B) {
	const interval, intervals = 2 * time.Millisecond, 5
	samples := []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}, {Name: "/sched/goroutines/running:goroutines"}}
	for idle := 0; idle < intervals; idle++ {
		time.Sleep(interval)
		metrics.Read(samples)
		if samples[0].Value.Kind() == metrics.KindBad {
			b.Skip("Go 1.26 and newer count the goroutines that wait")
		}
		if samples[0].Value.Uint64() > 0 || samples[1].Value.Uint64() > 1 {
			idle = -1
		}
	}
}

// waitingFloor is a mapFloor for one key, whose duplicates wait for the first
// request, or until a time is over or their clients have gone.
type waitingFloor struct {
	answers http.Handler
	begun   atomic.Bool
	done    chan struct{}
}

func newWaitingFloor(next http.Handler) http.Handler {
	return &waitingFloor{answers: newMapFloor(next), done: make(chan struct{})}
}

func (f *waitingFloor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !f.begun.Swap(true) {
		f.answers.ServeHTTP(w, r)
		close(f.done)
		return
	}
	timer := time.NewTimer(time.Minute)
	defer timer.Stop()
	select {
	case <-f.done:
		f.answers.ServeHTTP(w, r)
	case <-timer.C:
	case <-r.Context().Done():
	}
}
