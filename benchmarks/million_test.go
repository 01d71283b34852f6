package benchmarks

import (
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

const (
	million      = 1_000_000
	millionInUse = 100_000 // while a million expire
)

// millionKey returns the key of number i; a million do not fit into keyList.
func millionKey(buffer []byte, i int) string {
	copy(buffer, "8e03978e-40d5-43e8-bc93-")
	for at := benchKeyBytes - 1; at >= 24; at-- {
		buffer[at] = "0123456789abcdef"[i&15]
		i >>= 4
	}
	return string(buffer)
}

// fill has n answers stored and returns how long that took.
func fill(b *testing.B, h http.Handler, n int) time.Duration {
	client, buffer, start := newBenchClient(true), make([]byte, benchKeyBytes), time.Now()
	for i := range n {
		client.do(h, millionKey(buffer, i))
	}
	client.check(b, smallBody, false)
	return time.Since(start)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

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
		times[i] = milliseconds(time.Since(start))
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

// BenchmarkMillionRecords reports what a million records cost while no request
// comes. Run it with -benchtime=1x.
func BenchmarkMillionRecords(b *testing.B) {
	list := []contender{{"floor", newSlabFloor}, {"idempotency", inMemory}}
	each(b, list, func(b *testing.B, c contender) {
		for b.Loop() {
			charge := newCharge(smallBody)
			before, none := heapInUse(), collection()
			h := c.wrap(charge)
			fill(b, h, million)
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
// use. It reports the worst request, on the clock and in processor time; the clock
// of bare shows how busy the machine is with other things. It also reports the
// memory that is left, as a multiple of what the remaining records alone would
// cost. Run it with -benchtime=1x.
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
	charge := newCharge(smallBody)
	if wrap != nil {
		fill(b, wrap(charge), million)
		useWhile(b, wrap(charge), 2*time.Second)
		return
	}
	before := heapInUse()
	few := inMemory(charge)
	ttl := time.Second + 15*fill(b, few, millionInUse)
	alone := heapInUse() - before
	runtime.KeepAlive(few)

	var store *idempotency.MemoryStore
	for before = heapInUse(); ; ttl *= 2 { // until no record expires before the last is stored
		store = &idempotency.MemoryStore{MaxBytes: 4 << 30}
		h := idempotency.Middleware(store, &idempotency.Options{TTL: ttl})(charge)
		if fill(b, h, million); store.Len() == million {
			break
		}
	}
	full := heapInUse() - before
	h := idempotency.Middleware(store, nil)(charge)
	useWhile(b, h, ttl)
	left := heapInUse() - before
	b.ReportMetric(full/(1<<20), "MiB-full")
	b.ReportMetric(left/(1<<20), "MiB-left")
	b.ReportMetric(left/alone, "x-live")
	require.Equal(b, millionInUse, store.Len())
}

// useWhile uses other keys until all records from before have expired, and then
// until every shard has had enough requests to free them. It reports the worst
// request.
func useWhile(b *testing.B, h http.Handler, ttl time.Duration) {
	client := newBenchClient(true)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var worst, worstThread time.Duration
	expired := time.Now().Add(ttl)
	for i, more := 0, millionInUse; more > 0; i++ {
		start, thread := time.Now(), threadTime()
		client.do(h, keyAt(i%millionInUse))
		worstThread = max(worstThread, threadTime()-thread)
		worst = max(worst, time.Since(start))
		if start.After(expired) {
			more--
		}
	}
	client.check(b, smallBody, true)
	b.ReportMetric(milliseconds(worst), "worst-ms")
	b.ReportMetric(milliseconds(worstThread), "worst-cpu-ms")
}
