package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// runDeployed is the program of a process that is replaced by another. It serves
// until SIGTERM, and tells on its standard output when Shutdown has returned.
func runDeployed(config replicaConfig) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	client := redis.NewClient(&redis.Options{Addr: config.Database, ContextTimeoutEnabled: true})
	background := new(idempotency.Background)
	protect := idempotency.Middleware(idempotency.NewRedisStore(client, nil), &idempotency.Options{
		Lease: config.Lease, Background: background,
	})
	server := &http.Server{Handler: protect(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := http.Post(config.Provider, "", nil)
		must(err)
		charge, err := io.ReadAll(resp.Body)
		must(err)
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(charge)
	}))}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("serving on %s\n", listener.Addr())
	stopped := make(chan error, 1)
	context.AfterFunc(ctx, func() { stopped <- server.Shutdown(context.Background()) })
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		panic(err)
	}
	must(<-stopped)
	fmt.Println("shut down")
	if config.Bug != exitsAtOnce {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		must(background.Wait(ctx))
	}
}

// exitsAtOnce is the bug of a program that does not wait.
const exitsAtOnce = "exits when Shutdown has returned"

// A deployed is one such process.
type deployed struct {
	cmd    *exec.Cmd
	output *bufio.Reader
	url    string
}

func deploy(t *testing.T, config replicaConfig) *deployed {
	text, err := json.Marshal(config)
	require.NoError(t, err)
	binary, err := os.Executable()
	require.NoError(t, err)
	d := &deployed{cmd: exec.CommandContext(t.Context(), binary)}
	d.cmd.Env = replicaEnviron(text)
	d.cmd.Stderr = os.Stderr
	stdout, err := d.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, d.cmd.Start())
	t.Cleanup(func() { _ = d.cmd.Process.Kill() }) // without effect unless the test failed
	d.output = bufio.NewReader(stdout)
	d.url = "http://" + strings.TrimPrefix(d.line(t), "serving on ")
	return d
}

func (d *deployed) line(t *testing.T) string {
	line, err := d.output.ReadString('\n')
	require.NoError(t, err)
	return strings.TrimSpace(line)
}

// charge repeats a request while its key is in progress, as a client does.
func (d *deployed) charge(t *testing.T) (answer string, replayed bool) {
	idemtest.Await(t, "an answer", func() bool {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, d.url, nil)
		require.NoError(t, err)
		r.Header.Set("Idempotency-Key", "order-17")
		resp, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		answer, replayed = fmt.Sprintf("%d %s", resp.StatusCode, body), resp.Header.Get("Idempotent-Replayed") == "true"
		return resp.StatusCode != http.StatusConflict
	})
	return answer, replayed
}

// Redis is away for a moment in the middle of a deployment. The old process has
// charged and answered, and its answer is not stored when SIGTERM comes. A
// program that waits has it stored when Redis is back, and the client's retry
// gets it from the new process. One that exits at once has the card charged
// twice.
func TestDeploymentDuringAnOutage(t *testing.T) {
	for name, row := range map[string]struct {
		bug     string
		answer  string
		replay  bool
		charges int64
	}{
		"the program waits":         {"", "201 charge 1", true, 1},
		"the program exits at once": {exitsAtOnce, "201 charge 2", false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			server := idemtest.StartRedis(t, durable...)
			var charges atomic.Int64
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			provider := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				n := charges.Add(1)
				if n == 1 {
					server.Kill()
				}
				_, _ = fmt.Fprintf(w, "charge %d", n)
			})}
			go func() { _ = provider.Serve(listener) }()
			t.Cleanup(func() { _ = provider.Close() })
			config := replicaConfig{
				Database: server.Addr, Provider: "http://" + listener.Addr().String(), Lease: 3 * time.Second, Bug: row.bug,
			}

			old := deploy(t, config)
			answer, replayed := old.charge(t)
			require.Equal(t, "201 charge 1", answer)
			require.False(t, replayed)
			require.NoError(t, old.cmd.Process.Signal(syscall.SIGTERM))
			require.Equal(t, "shut down", old.line(t))
			if row.bug != "" {
				require.NoError(t, old.cmd.Wait())
			}
			server.Restart()
			if row.bug == "" {
				require.NoError(t, old.cmd.Wait())
			}

			answer, replayed = deploy(t, config).charge(t)
			require.Equal(t, row.answer, answer)
			require.Equal(t, row.replay, replayed)
			require.Equal(t, row.charges, charges.Load())
		})
	}
}
