package benchmarks

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// benchVariable holds the address of the Redis of a server process, or "none".
const benchVariable = "IDEMPOTENCY_BENCH_SERVER"

// stormHandling is how long the handlers of a storm take.
const stormHandling = 50 * time.Millisecond

// TestBenchServer is no test but the program of the server processes of the
// benchmarks. It serves until its standard input ends.
func TestBenchServer(t *testing.T) {
	addr := os.Getenv(benchVariable)
	if addr == "" {
		return
	}
	charge, mux := newCharge(smallBody), http.NewServeMux()
	mux.Handle("/bare", charge)
	mux.Handle("/floor", newMapFloor(charge))
	mux.Handle("/memory", inMemory(charge))
	storm := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Started", strconv.FormatInt(time.Now().UnixNano(), 10))
		time.Sleep(stormHandling)
		charge.ServeHTTP(w, r)
	})
	mux.Handle("/storm-bare", storm)
	if addr != "none" {
		store := idempotency.NewRedisStore(idemtest.DialRedis(t, addr), nil)
		once := idempotency.Middleware(store, nil)
		mux.Handle("/redis", once(charge))
		mux.Handle("/storm", once(storm))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	idemtest.Must(err)
	fmt.Printf("serving on %s\n", listener.Addr())
	go func() { idemtest.Must(http.Serve(listener, mux)) }()
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// startBenchServer starts a server process and returns its address.
func startBenchServer(t testing.TB, redisAddr string) string {
	binary, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(binary, "-test.run=^TestBenchServer$")
	cmd.Env = append(os.Environ(), benchVariable+"="+redisAddr)
	cmd.Stderr = os.Stderr
	_, err = cmd.StdinPipe() // the server ends when this process does
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err, "the process does not serve")
	return strings.TrimPrefix(strings.TrimSpace(line), "serving on ")
}

// A wireClient sends one request again and again over one connection. It does as
// little as possible, because it shares the processors with the server.
type wireClient struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
	key     []byte // a part of request
}

type wireAnswer struct {
	status, size int
	replayed     bool
	started      int64
}

func newWireClient(t testing.TB, addr, path string) *wireClient {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	body := newBenchClient(true).body.data
	head := "POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nIdempotency-Key: "
	c := &wireClient{conn: conn, in: bufio.NewReader(conn)}
	c.request = fmt.Appendf(nil, "%s%s\r\nContent-Length: %d\r\n\r\n%s", head, keyAt(0), len(body), body)
	c.key = c.request[len(head):][:benchKeyBytes]
	return c
}

// do sends the request with a key of that number.
func (c *wireClient) do(number int64) (a wireAnswer, err error) {
	for i, n := len(c.key)-1, number; i >= len(c.key)-12; i-- {
		c.key[i] = "0123456789abcdef"[n&15]
		n >>= 4
	}
	if _, err = c.conn.Write(c.request); err != nil {
		return a, err
	}
	line, err := c.in.ReadSlice('\n')
	if err != nil || len(line) < 12 {
		return a, fmt.Errorf("status line %q: %w", line, err)
	}
	a.status, _ = strconv.Atoi(string(line[9:12]))
	for {
		if line, err = c.in.ReadSlice('\n'); err != nil {
			return a, err
		}
		name, value, found := bytes.Cut(line, []byte(": "))
		if !found {
			break
		}
		switch string(name) {
		case "Content-Length":
			a.size, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		case "Idempotent-Replayed":
			a.replayed = true
		case "Started":
			a.started, err = strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64)
		}
		if err != nil {
			return a, err
		}
	}
	_, err = c.in.Discard(a.size)
	return a, err
}

// wireKeys numbers the keys, so that no two runs share one.
var wireKeys atomic.Int64

// overWire has eight connections send requests as fast as they are answered.
func overWire(b *testing.B, addr, path string, replayed bool) {
	b.ReportAllocs() // of the client
	same := wireKeys.Add(1)
	if replayed {
		a, err := newWireClient(b, addr, path).do(same)
		require.NoError(b, err)
		require.Equal(b, http.StatusCreated, a.status)
	}
	b.SetParallelism(max(1, 8/runtime.GOMAXPROCS(0)))
	clients := make(chan *wireClient, 8+runtime.GOMAXPROCS(0))
	for range cap(clients) {
		clients <- newWireClient(b, addr, path)
	}
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		client := <-clients
		for pb.Next() {
			number := same
			if !replayed {
				number = wireKeys.Add(1)
			}
			a, err := client.do(number)
			ours := path == "/memory" || path == "/redis"
			if err != nil || a.status != http.StatusCreated || a.size != smallBody || a.replayed != (replayed && ours) {
				b.Errorf("%+v, %v", a, err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

// overWireEach compares paths of one server process.
func overWireEach(b *testing.B, redisAddr string, replayed bool, paths ...string) {
	names := map[string]string{"/bare": "bare", "/floor": "floor", "/memory": "idempotency", "/redis": "idempotency"}
	addr := startBenchServer(b, redisAddr)
	for _, n := range rand.Perm(len(paths)) {
		path := paths[n]
		b.Run(names[path], func(b *testing.B) { overWire(b, addr, path, replayed) })
	}
}

func BenchmarkServerFirst(b *testing.B) { overWireEach(b, "none", false, "/bare", "/floor", "/memory") }

func BenchmarkServerReplay(b *testing.B) { overWireEach(b, "none", true, "/bare", "/floor", "/memory") }

func BenchmarkServerRedisFirst(b *testing.B) {
	overWireEach(b, idemtest.StartRedis(b).Addr, false, "/bare", "/redis")
}

func BenchmarkServerRedisReplay(b *testing.B) {
	overWireEach(b, idemtest.StartRedis(b).Addr, true, "/bare", "/redis")
}
