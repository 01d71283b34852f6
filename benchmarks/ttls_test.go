package benchmarks

import (
	"strconv"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
)

// BenchmarkMemoryTTLs claims and completes a key, with records of so many TTLs in
// one MemoryStore. A service has many when its middlewares have Options of their
// own, or a TTL for each tenant.
func BenchmarkMemoryTTLs(b *testing.B) {
	ttl := func(i, ttls int) time.Duration {
		return time.Hour + time.Duration(i%ttls)*23*time.Hour/time.Duration(ttls)
	}
	value := make([]byte, 300)
	for _, ttls := range []int{1, 200, 1000} {
		b.Run(strconv.Itoa(ttls)+"-TTLs", func(b *testing.B) {
			b.ReportAllocs()
			var s *idempotency.MemoryStore
			run := func(i int) {
				lasting := ttl(i, ttls)
				key := keyAt(i)
				_, _ = s.Acquire(b.Context(), key, idempotency.Claim{Token: "1", Lease: 30 * time.Second, TTL: lasting})
				_ = s.Complete(b.Context(), key, "1", idempotency.Result{Value: value, TTL: lasting})
			}
			fill := func() {
				s = &idempotency.MemoryStore{MaxBytes: 4 << 30}
				for i := range benchKeys / 2 {
					run(i)
				}
			}
			fill()
			i, cpu := benchKeys/2, processTime()
			for b.Loop() {
				if i++; i == benchKeys {
					b.StopTimer()
					filling := processTime()
					fill()
					cpu += processTime() - filling
					i = benchKeys / 2
					b.StartTimer()
				}
				run(i)
			}
			reportCPU(b, cpu)
		})
	}
}
