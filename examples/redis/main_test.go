package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests, so that the
// tests drive the real program without building it again.
const asProgram = "REDIS_AS_PROGRAM"

// patience is how long the tests wait for what must happen.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(t *testing.T, redisAddr string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "REDIS_ADDR="+redisAddr)
	cmd.Stderr = os.Stderr
	return cmd
}

// start starts the program and returns the URLs in the first n commands that it
// suggests.
func start(t *testing.T, cmd *exec.Cmd, n int) (urls []string) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // without effect unless the test failed
	for lines := bufio.NewScanner(stdout); len(urls) < n && lines.Scan(); {
		if strings.Contains(lines.Text(), "curl") {
			urls = append(urls, regexp.MustCompile(`http://\S+`).FindString(lines.Text()))
		}
	}
	require.Len(t, urls, n)
	go func() { _, _ = io.Copy(io.Discard, stdout) }()
	return urls
}

// An answer is what a client got.
type answer struct {
	status   int
	body     string
	replayed bool
}

// post returns an error when there is no answer.
func post(ctx context.Context, url, key, body string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Idempotency-Key", key)
	// A connection for each try: Go's Transport would send a request again by
	// itself when a used one breaks.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, string(text), res.Header.Get("Idempotent-Replayed") == "true"}, err
}

func mustPost(t *testing.T, url, key, body string) answer {
	t.Helper()
	a, err := post(t.Context(), url, key, body)
	require.NoError(t, err)
	return a
}

// testClient looks into the Redis of a test.
func testClient(t *testing.T, addr string) *redis.Client {
	client := redis.NewClient(&redis.Options{Addr: addr})
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	return ln.Addr().String()
}

// startRedis starts a redis-server that stops with the test.
func startRedis(t *testing.T) (addr string) {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("REDIS_REQUIRED") == "1" {
		t.Fatal("REDIS_REQUIRED=1, but there is no redis-server on the PATH")
	}
	if err != nil {
		t.Skip("no redis-server on the PATH")
	}
	dir := t.TempDir()
	for range 5 { // another process may take the port
		addr = freeAddr(t)
		_, port, err := net.SplitHostPort(addr)
		require.NoError(t, err)
		cmd := exec.Command(binary, "--bind", "127.0.0.1", "--port", port, "--dir", dir,
			"--logfile", filepath.Join(dir, "log"), "--save", "", "--appendonly", "no")
		require.NoError(t, cmd.Start())
		exited := make(chan struct{})
		go func() { _ = cmd.Wait(); close(exited) }()
		t.Cleanup(func() { _ = cmd.Process.Kill(); <-exited })
		if answers(t, addr, exited) {
			return addr
		}
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	t.Fatalf("redis-server does not start\n%s", log)
	return ""
}

// answers is false if the server ended.
func answers(t *testing.T, addr string, exited <-chan struct{}) bool {
	client := testClient(t, addr)
	require.Eventually(t, func() bool {
		select {
		case <-exited:
			return true
		default:
			return client.Ping(t.Context()).Err() == nil
		}
	}, patience, 5*time.Millisecond, "redis-server does not answer")
	return client.Ping(t.Context()).Err() == nil
}

// Without a redis-server at hand, the flow on miniredis and inside the test.
func TestTwoReplicasOnMiniredis(t *testing.T) {
	addr := miniredis.RunT(t).Addr()
	var urls []string
	for range 2 {
		rep := &replica{client: newClient(addr), work: 10 * time.Millisecond}
		srv := httptest.NewUnstartedServer(newHandler(rep, 30*time.Second, nil))
		rep.name = srv.Listener.Addr().String()
		srv.Start()
		t.Cleanup(func() { srv.Close(); _ = rep.client.Close() })
		urls = append(urls, srv.URL+"/charge")
	}
	requireOneExecution(t, addr, urls)
}

func TestProgram(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted there")
	}
	addr := startRedis(t)
	cmd := program(t, addr, "-listen", "127.0.0.1:0,127.0.0.1:0")
	urls := start(t, cmd, 5)
	require.NotEqual(t, urls[0], urls[1], "two replicas")
	require.ElementsMatch(t, []string{urls[1], urls[0], urls[1]}, urls[2:])
	requireOneExecution(t, addr, urls[:2])
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), "SIGTERM ends the program in order")
}

// requireOneExecution sends what the program suggests to two replicas.
func requireOneExecution(t *testing.T, redisAddr string, urls []string) {
	t.Helper()
	first := mustPost(t, urls[0], "order-17", "amount=100")
	require.Equal(t, http.StatusCreated, first.status)
	by, found := strings.CutPrefix(first.body, "charge 1: 100, by ")
	require.True(t, found, first.body)
	require.Contains(t, urls[0], strings.TrimSpace(by))
	for _, url := range urls {
		require.Equal(t, answer{first.status, first.body, true}, mustPost(t, url, "order-17", "amount=100"))
		refused := mustPost(t, url, "order-17", "amount=999")
		require.Equal(t, http.StatusUnprocessableEntity, refused.status)
		require.Contains(t, refused.body, "key_reused")
	}
	requireOneOfTwo(t, urls)
	charges, err := testClient(t, redisAddr).LRange(t.Context(), ledger, 0, -1).Result()
	require.NoError(t, err)
	require.Equal(t, []string{"order-17 attempt 1", "order-18 attempt 1"}, charges)
}

// requireOneOfTwo sends one request to both at once.
func requireOneOfTwo(t *testing.T, urls []string) {
	t.Helper()
	var answers [2]answer
	done := make(chan error, len(answers))
	for i := range answers {
		go func() {
			var err error
			answers[i], err = post(t.Context(), urls[i], "order-18", "amount=100")
			done <- err
		}()
	}
	for range answers {
		require.NoError(t, <-done)
	}
	require.Equal(t, http.StatusCreated, answers[0].status)
	require.Equal(t, answers[0].body, answers[1].body)
	require.NotEqual(t, answers[0].replayed, answers[1].replayed, "one of them is the execution")
}

func TestProgramSaysHowToStartRedis(t *testing.T) {
	addr := freeAddr(t)
	var stderr bytes.Buffer
	cmd := program(t, addr, "-listen", "127.0.0.1:0")
	cmd.Stderr = &stderr
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Contains(t, stderr.String(), addr)
	require.Contains(t, stderr.String(), "redis-server --port 6379")
}

func TestProgramRefusesRedisThatEvicts(t *testing.T) {
	addr := startRedis(t)
	require.NoError(t, testClient(t, addr).ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	var stderr bytes.Buffer
	cmd := program(t, addr, "-listen", "127.0.0.1:0")
	cmd.Stderr = &stderr
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Contains(t, stderr.String(), "noeviction")
}
