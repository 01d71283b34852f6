package idempotency_test

import (
	"math"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

const million = 1_000_000

// millionKey returns the key of number i; a million do not fit into keyList.
func millionKey(buffer []byte, i int) string {
	copy(buffer, "8e03978e-40d5-43e8-bc93-")
	for at := benchKeyBytes - 1; at >= 24; at-- {
		buffer[at] = "0123456789abcdef"[i&15]
		i >>= 4
	}
	return string(buffer)
}

// fillMillion has a million answers stored and returns how long that took.
func fillMillion(b *testing.B, h http.Handler, n int) time.Duration {
	client, buffer, start := newBenchClient(true), make([]byte, benchKeyBytes), time.Now()
	for i := range n {
		client.do(h, millionKey(buffer, i))
	}
	client.check(b, smallBody, false)
	return time.Since(start)
}

// heapInUse returns the bytes of live objects.
func heapInUse() float64 {
	for range 3 { // pools keep what they have for two collections
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// collection returns how many milliseconds the median of forced collections
// takes, sweeping included.
func collection() float64 {
	times := make([]float64, 5)
	for i := range times {
		start := time.Now()
		runtime.GC()
		times[i] = float64(time.Since(start).Microseconds()) / 1000
	}
	slices.Sort(times)
	return times[len(times)/2]
}

// marking returns the processor time of the marking of all collections so far,
// in milliseconds.
func marking() (ms float64) {
	samples := []metrics.Sample{
		{Name: "/cpu/classes/gc/mark/assist:cpu-seconds"},
		{Name: "/cpu/classes/gc/mark/dedicated:cpu-seconds"},
		{Name: "/cpu/classes/gc/mark/idle:cpu-seconds"},
	}
	metrics.Read(samples)
	for _, s := range samples {
		ms += 1000 * s.Value.Float64()
	}
	return ms
}

// BenchmarkMillionRecords tells what a million records cost while nothing
// happens. Run it with -benchtime=1x.
func BenchmarkMillionRecords(b *testing.B) {
	list := []contender{{"floor", newSlabFloor}, {"floor-map", newMapFloor}, {"idempotency", inMemory}}
	each(b, list, func(b *testing.B, c contender) {
		for b.Loop() {
			charge := newCharge(smallBody)
			before, none := heapInUse(), collection()
			h := c.wrap(charge)
			fillMillion(b, h, million)
			b.ReportMetric((heapInUse()-before)/million, "B/record")
			marked := marking()
			b.ReportMetric(collection(), "gc-ms")
			b.ReportMetric((marking()-marked)/5, "mark-ms")
			b.ReportMetric(none, "gc-ms-empty")
			runtime.KeepAlive(h)
		}
	})
}

// BenchmarkMillionExpiring has a million records expire while other keys are in
// use, and tells the worst request (for bare: the worst that the machine does
// to a request that does next to nothing), and the memory that is left, as a
// multiple of what as many records cost that never had others beside them. Run
// it with -benchtime=1x.
func BenchmarkMillionExpiring(b *testing.B) {
	list := []contender{{name: "bare", wrap: bare}, {name: "idempotency"}}
	each(b, list, func(b *testing.B, c contender) {
		for b.Loop() {
			expireMillion(b, c.wrap)
		}
	})
}

// expireMillion measures the library if wrap is nil.
func expireMillion(b *testing.B, wrap func(http.Handler) http.Handler) {
	const inUse = 100_000
	charge := newCharge(smallBody)
	short, long, store := wrap, wrap, new(idempotency.MemoryStore)
	ttl, alone := 2*time.Second, 1.0
	if wrap == nil {
		before := heapInUse()
		trial := inMemory(charge)
		filled := fillMillion(b, trial, inUse)
		alone = heapInUse() - before
		runtime.KeepAlive(trial)
		trial = nil
		ttl = 3*filled*million/inUse/2 + 500*time.Millisecond
		store.MaxBytes = 4 << 30
		short = idempotency.Middleware(store, &idempotency.Options{TTL: ttl})
		long = idempotency.Middleware(store, nil)
	}
	before := heapInUse()
	h := short(charge)
	filled := fillMillion(b, h, million)
	full := heapInUse() - before
	if wrap == nil {
		require.Equal(b, million, store.Len(), "records expired too early")
	}

	h = long(charge)
	client := newBenchClient(true)
	var worst time.Duration
	// From the moment when nothing has expired until all has, and then until
	// every shard has been asked often enough to free what it has.
	expired := time.Now().Add(ttl)
	for i, more := 0, inUse; more > 0; i++ {
		start := time.Now()
		client.do(h, keyAt(i%inUse))
		took := time.Since(start)
		worst = max(worst, took)
		if start.After(expired) {
			more--
		}
	}
	left := heapInUse() - before
	b.ReportMetric(float64(worst.Microseconds())/1000, "worst-ms")
	if wrap != nil {
		return
	}
	b.ReportMetric(full/math.Pow(2, 20), "MiB-full")
	b.ReportMetric(left/math.Pow(2, 20), "MiB-left")
	b.ReportMetric(left/alone, "x-live")
	b.ReportMetric(float64(filled.Milliseconds()), "fill-ms")
	require.Equal(b, inUse, store.Len())
	runtime.KeepAlive(h)
}
