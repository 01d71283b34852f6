//go:build unix

package postgres_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// The store ("idempotency") against the fewest statements that could do its work
// ("bare"), over pools of the same size on the same server.

const bareTable = `CREATE TABLE bare (key text COLLATE "C" PRIMARY KEY, token text, value bytea,
	lease_until timestamptz, expires_at timestamptz); CREATE INDEX ON bare (expires_at)`

const (
	bareClaim = `INSERT INTO bare VALUES ($1, $2, NULL, clock_timestamp() + interval '30 s',
		clock_timestamp() + interval '1 day') ON CONFLICT DO NOTHING`
	bareComplete = `UPDATE bare SET value = $3, expires_at = clock_timestamp() + interval '1 day'
		WHERE key = $1 AND token = $2`
	bareReplay = `SELECT token, value FROM bare WHERE key = $1 AND expires_at > clock_timestamp()`
)

// A bench is a server with both tables.
type bench struct {
	b      *testing.B
	server *server
	pool   *pgxpool.Pool // of the floor
	store  *postgres.Store
	calls  *statementCounter // of the store
	keys   atomic.Int64
}

var benchBody = make([]byte, 512)

// startBench starts a server for conns connections of each contender.
func startBench(b *testing.B, conns int) *bench {
	server := startServer(b)
	x := &bench{b: b, server: server, pool: server.dial(conns), calls: new(statementCounter)}
	_, err := x.pool.Exec(b.Context(), bareTable)
	require.NoError(b, err)
	config, err := pgxpool.ParseConfig(server.URL())
	require.NoError(b, err)
	config.ConnConfig.Tracer = x.calls
	handlers, err := pgxpool.NewWithConfig(b.Context(), config)
	require.NoError(b, err)
	b.Cleanup(handlers.Close)
	x.store = newStore(b, handlers, &postgres.Options{MaxConns: int32(conns)})
	return x
}

// A statementCounter counts statements.
type statementCounter struct{ n atomic.Int64 }

func (c *statementCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	c.n.Add(1)
	return ctx
}

func (c *statementCounter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (x *bench) newKey() string { return fmt.Sprint("key", x.keys.Add(1)) }

func (x *bench) bareFirst() {
	key := x.newKey()
	if _, err := x.pool.Exec(x.b.Context(), bareClaim, key, "A"); err != nil {
		x.b.Error(err)
	}
	if _, err := x.pool.Exec(x.b.Context(), bareComplete, key, "A", benchBody); err != nil {
		x.b.Error(err)
	}
}

func (x *bench) first() {
	key := x.newKey()
	rec, err := x.store.Acquire(x.b.Context(), key, benchClaim("A"))
	if err != nil || rec.State != idempotency.Acquired {
		x.b.Error(rec, err)
	}
	if err := x.store.Complete(x.b.Context(), key, "A", idempotency.Result{Value: benchBody, TTL: 24 * time.Hour}); err != nil {
		x.b.Error(err)
	}
}

func (x *bench) bareReplay(key string) {
	var token string
	var value []byte
	if err := x.pool.QueryRow(x.b.Context(), bareReplay, key).Scan(&token, &value); err != nil {
		x.b.Error(err)
	}
}

func (x *bench) replay(key string) {
	rec, err := x.store.Acquire(x.b.Context(), key, benchClaim("B"))
	if err != nil || rec.State != idempotency.Completed {
		x.b.Error(rec, err)
	}
}

func benchClaim(token string) idempotency.Claim {
	return idempotency.Claim{Token: token, Lease: 30 * time.Second, TTL: 24 * time.Hour}
}

// fill makes n completed records in both tables.
func (x *bench) fill(n int) {
	for _, sql := range []string{
		`INSERT INTO bare SELECT 'old' || i, 'A', $1::bytea, clock_timestamp(), clock_timestamp() + interval '1 day'
			FROM generate_series(1, $2::int) AS i`,
		`INSERT INTO idempotency SELECT 'old' || i, 2, 'A', 1, false, false, clock_timestamp(),
			clock_timestamp() + interval '1 day', '', $1::bytea FROM generate_series(1, $2::int) AS i`,
	} {
		_, err := x.pool.Exec(x.b.Context(), sql, benchBody, n)
		require.NoError(x.b, err)
	}
	for _, table := range []string{"bare", "idempotency"} { // at once, not during the benchmark
		_, err := x.pool.Exec(x.b.Context(), `VACUUM ANALYZE `+table)
		require.NoError(x.b, err)
	}
}

// compare runs both contenders with so many clients at a time. Besides the time
// it reports that of the processors, here and in the server, which depends less
// on what else the machine does, and how many statements an operation takes.
func (x *bench) compare(clients int, bare, ours func()) {
	for _, contender := range []struct {
		name string
		op   func()
	}{{"bare", bare}, {"idempotency", ours}} {
		x.b.Run(contender.name, func(b *testing.B) {
			for range 8 * clients { // connections, and the plans that the server keeps
				contender.op()
			}
			server := x.server.processes()
			calls, cpu := x.calls.n.Load(), x.server.cpuTime(server)
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var all sync.WaitGroup
			for range clients {
				all.Go(func() {
					for left.Add(-1) >= 0 {
						contender.op()
					}
				})
			}
			all.Wait()
			b.StopTimer()
			b.ReportMetric(float64(x.server.cpuTime(server)-cpu)/float64(b.N), "cpu-ns/op")
			if contender.name == "idempotency" {
				b.ReportMetric(float64(x.calls.n.Load()-calls)/float64(b.N), "statements/op")
			}
		})
	}
}

// processes returns the directories in /proc of the server's processes. There are
// none on systems other than Linux.
func (s *server) processes() (found []string) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		stat, _ := os.ReadFile(file)
		_, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(s.Process().Pid) {
			found = append(found, filepath.Dir(file))
		}
	}
	return found
}

// cpuTime is what this process and those of the server have used of the
// processors, in nanoseconds.
func (s *server) cpuTime(processes []string) (n int64) {
	for _, process := range processes {
		var used int64
		sched, _ := os.ReadFile(filepath.Join(process, "schedstat"))
		_, _ = fmt.Sscan(string(sched), &used)
		n += used
	}
	var usage syscall.Rusage
	require.NoError(s.T, syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return n + usage.Utime.Nano() + usage.Stime.Nano()
}

func BenchmarkPostgresFirst(b *testing.B) {
	x := startBench(b, 1)
	x.compare(1, x.bareFirst, x.first)
}

func BenchmarkPostgresReplay(b *testing.B) {
	x := startBench(b, 1)
	x.fill(1000)
	x.compare(1, func() { x.bareReplay("old1") }, func() { x.replay("old1") })
}

func BenchmarkPostgresFirst64Clients(b *testing.B) {
	x := startBench(b, 16)
	x.compare(64, x.bareFirst, x.first)
}

func BenchmarkPostgresReplay64Clients(b *testing.B) {
	x := startBench(b, 16)
	x.fill(1000)
	x.compare(64, func() { x.bareReplay("old1") }, func() { x.replay("old1") })
}

const million = 1_000_000

func BenchmarkPostgresMillionFirst(b *testing.B) {
	x := startBench(b, 1)
	x.fill(million)
	x.compare(1, x.bareFirst, x.first)
}

func BenchmarkPostgresMillionReplay(b *testing.B) {
	x := startBench(b, 1)
	x.fill(million)
	key := func() string { return fmt.Sprint("old", 1+rand.IntN(million)) }
	x.compare(1, func() { x.bareReplay(key()) }, func() { x.replay(key()) })
}

// 64 requests with one key come at once, and the handler takes 50 ms.
func BenchmarkPostgresStorm(b *testing.B) {
	x := startBench(b, 16)
	h := idempotency.Middleware(x.store, nil)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(50 * time.Millisecond)
		_, _ = w.Write(benchBody)
	}))
	b.Run("idempotency", func(b *testing.B) {
		var last time.Duration
		calls := x.calls.n.Load()
		for b.Loop() {
			key, began := x.newKey(), time.Now()
			var all sync.WaitGroup
			for range 64 {
				all.Go(func() {
					r := httptest.NewRequest(http.MethodPost, "/", http.NoBody)
					r.Header.Set("Idempotency-Key", key)
					w := httptest.NewRecorder()
					h.ServeHTTP(w, r)
					if w.Code != http.StatusOK {
						b.Error(w.Code, w.Body)
					}
				})
			}
			all.Wait()
			last += time.Since(began)
		}
		b.ReportMetric(last.Seconds()*1000/float64(b.N), "last-ms")
		b.ReportMetric(float64(x.calls.n.Load()-calls)/float64(b.N), "statements/storm")
	})
}

// A night's keys have expired, and first executions delete them. The floor are
// the same first executions while nothing has expired. Half of the requests wait
// for no longer than median-us, and all but one in a hundred for p99-us.
func BenchmarkPostgresCleaning(b *testing.B) {
	const night = 50_000
	x := startBench(b, 1)
	for _, contender := range []string{"bare", "idempotency"} {
		b.Run(contender, func(b *testing.B) {
			_, err := x.pool.Exec(b.Context(), `TRUNCATE idempotency, bare`)
			require.NoError(b, err)
			x.fill(night)
			if contender == "idempotency" {
				_, err = x.pool.Exec(b.Context(), `UPDATE idempotency SET expires_at = clock_timestamp() - interval '1 s'`)
				require.NoError(b, err)
			}
			// A batch of 256 rows comes once in 32 claims, so an eighth of the
			// night is enough, and a few more for batches that take too long.
			const claims = night / 6
			took := make([]float64, 0, claims)
			b.ResetTimer()
			for range claims {
				began := time.Now()
				x.first()
				took = append(took, float64(time.Since(began).Nanoseconds())/1e3)
			}
			b.StopTimer()
			sort.Float64s(took)
			b.ReportMetric(took[claims/2], "median-us")
			b.ReportMetric(took[claims*99/100], "p99-us")
			var left int
			require.NoError(b, x.pool.QueryRow(b.Context(),
				`SELECT count(*) FROM idempotency WHERE expires_at <= clock_timestamp()`).Scan(&left))
			b.ReportMetric(float64(left), "left")
		})
	}
}
