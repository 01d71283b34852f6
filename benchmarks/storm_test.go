//go:build unix

package benchmarks

import (
	"context"
	"math"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// BenchmarkStorm sends a hundred requests with one key at once to two processes
// on one Redis. The handler takes 50 ms. The benchmark reports the time from the
// start of the handler to the last answer, and how many commands Redis got. For
// bare, every request runs the handler, which shows what a hundred answers at once
// cost the machine.
func BenchmarkStorm(b *testing.B) {
	addr := idemtest.StartRedis(b).Addr
	admin := idemtest.DialRedis(b, addr)
	servers := [2]string{startBenchServer(b, addr), startBenchServer(b, addr)}
	for _, row := range []struct{ name, path string }{{"bare", "/storm-bare"}, {"idempotency", "/storm"}} {
		b.Run(row.name, func(b *testing.B) {
			b.ReportAllocs() // of the clients
			clients := make([]*wireClient, 100)
			for i := range clients {
				clients[i] = newWireClient(b, servers[i%2], row.path)
			}
			storm(b, clients, row.path) // opens connections and loads scripts
			var last, most time.Duration
			var sent, storms int64
			for b.Loop() {
				b.StopTimer()
				idemtest.Await(b, "nobody watches", func() bool {
					return len(admin.PubSubChannels(context.Background(), "*").Val()) == 0
				})
				require.NoError(b, admin.ConfigResetStat(b.Context()).Err())
				b.StartTimer()
				took := storm(b, clients, row.path)
				b.StopTimer()
				last, most = last+took, max(most, took)
				n, _ := idemtest.CommandsSent(b, admin)
				sent, storms = sent+n, storms+1
				b.StartTimer()
			}
			b.ReportMetric(milliseconds(last)/float64(storms), "last-ms")
			b.ReportMetric(milliseconds(most), "worst-ms")
			b.ReportMetric(float64(sent)/float64(storms), "commands/storm")
		})
	}
}

// storm returns the time from the start of the (first) handler to the last
// answer.
func storm(b *testing.B, clients []*wireClient, path string) time.Duration {
	type result struct {
		wireAnswer
		err error
		at  time.Time
	}
	key, results := wireKeys.Add(1), make(chan result, len(clients))
	for _, client := range clients {
		go func() {
			a, err := client.do(key)
			results <- result{a, err, time.Now()}
		}()
	}
	first, last, executed := int64(math.MaxInt64), time.Time{}, 0
	for range clients {
		r := <-results
		require.NoError(b, r.err)
		require.Equal(b, http.StatusCreated, r.status)
		if !r.replayed {
			executed++
		}
		first = min(first, r.started)
		if r.at.After(last) {
			last = r.at
		}
	}
	if path == "/storm" {
		require.Equal(b, 1, executed)
	}
	return last.Sub(time.Unix(0, first))
}
