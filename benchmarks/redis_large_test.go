package benchmarks

import (
	"log/slog"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// BenchmarkRedisLargeBesideSmall tells what first executions with small
// responses come to while other requests have large ones. 800 callers share one
// client over a link with a round trip of 20 ms. The rows should differ by a
// tenth at most, and none may refuse a request. Run it with -benchtime=4s.
func BenchmarkRedisLargeBesideSmall(b *testing.B) {
	const callers, delay = 800, 10 * time.Millisecond
	rows := []struct {
		name    string
		size    int
		clients int // with large responses
		pause   time.Duration
		first   bool // they execute, else they replay
	}{
		{name: "alone"},
		{name: "replays-17KiB-now-and-then", size: 17 << 10, clients: 1, pause: 800 * time.Millisecond},
		{name: "replays-17KiB", size: 17 << 10, clients: 4, pause: 10 * time.Millisecond},
		{name: "replays-1MiB-now-and-then", size: 1 << 20, clients: 1, pause: 800 * time.Millisecond},
		{name: "executions-64KiB", size: 64 << 10, clients: 4, pause: 10 * time.Millisecond, first: true},
	}
	for _, row := range rows {
		b.Run(row.name, func(b *testing.B) {
			addr := idemtest.StartLink(b, idemtest.StartRedis(b).Addr, delay)
			protect := idempotency.Middleware(idempotency.NewRedisStore(idemtest.DialRedis(b, addr), nil),
				&idempotency.Options{Logger: slog.New(slog.DiscardHandler)})
			small, large := protect(newCharge(smallBody)), protect(newCharge(row.size))
			newBenchClient(true).do(large, "large")
			var beside sync.WaitGroup
			ended := make(chan struct{})
			var largeRefused atomic.Int64
			for n := range row.clients {
				beside.Go(func() { keepAsking(large, keyAt(n), row.first, row.pause, ended, &largeRefused) })
			}
			var next, refused atomic.Int64
			b.SetParallelism(callers / runtime.GOMAXPROCS(0))
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				client := newBenchClient(true)
				for pb.Next() {
					client.do(small, keyAt(callers+int(next.Add(1))))
					if client.w.status != http.StatusCreated {
						refused.Add(1)
					}
				}
			})
			b.StopTimer()
			close(ended)
			beside.Wait()
			b.ReportMetric(float64(refused.Load()), "refused")
			b.ReportMetric(float64(largeRefused.Load()), "large-refused")
		})
	}
}

// keepAsking sends requests with a pause between them until ended is closed.
// Their keys are new if they are to execute.
func keepAsking(h http.Handler, key string, first bool, pause time.Duration, ended <-chan struct{}, refused *atomic.Int64) {
	client := newBenchClient(true)
	for n := 0; ; n++ {
		if first {
			client.do(h, key+keyAt(n))
		} else {
			client.do(h, "large")
		}
		if client.w.status != http.StatusCreated {
			refused.Add(1)
		}
		select {
		case <-ended:
			return
		case <-time.After(pause):
		}
	}
}
