package benchmarks

import (
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-idempotency/idempotency"
)

// These benchmarks show how a cost grows, each as a row of sub-benchmarks that
// are named by a number. The script .ci/curves runs them, and benchmarks/curves
// makes tables and charts of what they print.

var (
	curveRecords    = []int{1000, 10_000, 100_000, million, 5 * million}
	curveGoroutines = []int{1, 2, 4, 8, 16, 32, 64, 128, 256, 512}
	curveBytes      = []int{
		100, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, largestCurveBody,
	}
)

const largestCurveBody = 64 << 20

// eachOf is each for every number.
func eachOf(b *testing.B, name string, numbers []int, list []contender, run func(b *testing.B, c contender, n int)) {
	for _, n := range numbers {
		b.Run(name+strconv.Itoa(n), func(b *testing.B) {
			each(b, list, func(b *testing.B, c contender) { run(b, c, n) })
		})
	}
}

// BenchmarkCurveRecords reports what a MemoryStore costs by how many records it
// has. Run it with -benchtime=1x.
func BenchmarkCurveRecords(b *testing.B) {
	list := []contender{{"floor", newSlabFloor}, {"idempotency", inMemory}}
	eachOf(b, "", curveRecords, list, func(b *testing.B, c contender, records int) {
		for b.Loop() {
			withRecords(b, c, records)
		}
	})
}

// withRecords reports the bytes of a record and the time that it takes the
// garbage collector to mark it, and then a replay and a first execution among so
// many records.
func withRecords(b *testing.B, c contender, records int) {
	const operations = 100_000
	client, buffer := newBenchClient(true), make([]byte, benchKeyBytes)
	before, unmarked := heapInUse(), markingOnce()
	charge := newCharge(smallBody)
	h := c.wrap(charge)
	fill(b, h, records)
	b.ReportMetric((heapInUse()-before)/float64(records), "B/record")
	b.ReportMetric(max(0, markingOnce()-unmarked)*1e6/float64(records), "mark-ns/record")

	charge.closed = true
	cpu := processTime()
	for i := range operations {
		client.do(h, millionKey(buffer, i*7919%records)) // a prime, for another order
	}
	b.ReportMetric(float64(processTime()-cpu)/operations, "replay-cpu-ns")
	client.check(b, smallBody, true)
	charge.closed = false

	// A small store grows with each first execution, so it is replaced before it
	// has a quarter more records. Filling it does not count.
	cpu = 0
	for i, more := 0, min(records/4, operations); i < operations; i++ {
		if i > 0 && i%more == 0 {
			h = c.wrap(charge)
			fill(b, h, records)
		}
		start := processTime()
		for ; i%more < more-1; i++ {
			client.do(h, millionKey(buffer, records+i%more))
		}
		client.do(h, millionKey(buffer, records+i%more))
		cpu += processTime() - start
	}
	b.ReportMetric(float64(cpu)/operations, "first-cpu-ns")
	client.check(b, smallBody, false)
	runtime.KeepAlive(h)
}

// markingOnce returns the processor time of the marking of one collection, in
// milliseconds.
func markingOnce() float64 {
	const collections = 5
	before := marking()
	for range collections {
		runtime.GC()
	}
	return (marking() - before) / collections
}

// BenchmarkCurveGoroutines tells what an operation costs by how many goroutines
// send requests. Run it with a fixed number of operations, many for each of them.
func BenchmarkCurveGoroutines(b *testing.B) {
	list := []contender{{"floor", newSlabFloor}, {"idempotency", inMemory}}
	byGoroutines(b, "first/", list, parallel)
	byGoroutines(b, "replay/", list, parallelReplay)
}

// BenchmarkCurveRedisGoroutines is BenchmarkCurveGoroutines on Redis. It counts
// the processor time of the client.
func BenchmarkCurveRedisGoroutines(b *testing.B) {
	list, _ := redisContenders(b, "floor-pipelined", "floor-goredis", "idempotency")
	byGoroutines(b, "first/", list, parallel)
	byGoroutines(b, "replay/", list, parallelReplay)
}

func byGoroutines(b *testing.B, name string, list []contender, run func(*testing.B, contender, crowd)) {
	eachOf(b, name, curveGoroutines, list, func(b *testing.B, c contender, n int) { run(b, c, crowdOf(n)) })
}

// crowdOf returns a crowd of so many goroutines, which may be fewer than there are
// processors.
func crowdOf(goroutines int) crowd {
	return func(b *testing.B, work func(next func() bool)) {
		var taken atomic.Int64
		var workers sync.WaitGroup
		for range goroutines {
			workers.Go(func() { work(func() bool { return taken.Add(1) <= int64(b.N) }) })
		}
		workers.Wait()
	}
}

// BenchmarkCurveBodies tells what an operation costs by the size of the body of
// the response, and of the request. The limits of the library are as high as the
// largest of them.
func BenchmarkCurveBodies(b *testing.B) {
	list := []contender{{"floor", newMapFloor}, {"idempotency", inMemoryLarge}}
	eachOf(b, "response-first/", curveBytes, list, func(b *testing.B, c contender, size int) {
		firstOf(b, newBenchClient(true), size, c)
	})
	eachOf(b, "response-replay/", curveBytes, list, func(b *testing.B, c contender, size int) {
		replayOf(b, newBenchClient(true), size, c)
	})
	eachOf(b, "request-first/", curveBytes, list, func(b *testing.B, c contender, size int) {
		firstOf(b, newUpload(size), smallBody, c)
	})
	eachOf(b, "request-replay/", curveBytes, list, func(b *testing.B, c contender, size int) {
		replayOf(b, newUpload(size), smallBody, c)
	})
}

// inMemoryLarge is inMemory with limits that no body of a curve exceeds.
func inMemoryLarge(next http.Handler) http.Handler {
	store := &idempotency.MemoryStore{MaxBytes: 4 << 30}
	opts := &idempotency.Options{MaxBufferedBody: largestCurveBody, MaxResponseBytes: largestCurveBody}
	return idempotency.Middleware(store, opts)(next)
}
