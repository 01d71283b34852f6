package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// crashLease is how long a retry has to wait for what a dead process claimed.
const crashLease = 3 * time.Second

// doomed serves the API in a process that kills itself, with SIGKILL, at the
// step of the given number. With 0 it does not kill itself.
func doomed() {
	last, err := strconv.ParseInt(os.Getenv(killAt), 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	var steps atomic.Int64
	watched.watch(func(step string) error {
		if steps.Add(1) != last {
			return nil
		}
		fmt.Fprint(os.Stderr, step)
		self, err := os.FindProcess(os.Getpid())
		if err == nil {
			err = self.Kill()
		}
		log.Print(err)
		select {} // not one step more
	})
	log.Fatal(run(context.Background(), "watched", os.Args[1], "127.0.0.1:0", crashLease))
}

// launch starts a process that dies at the step of that number.
func launch(t *testing.T, path string, step int) (url string, cmd *exec.Cmd, stderr *strings.Builder) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd = exec.CommandContext(t.Context(), self, path)
	cmd.Env = append(os.Environ(), killAt+"="+strconv.Itoa(step))
	stderr = new(strings.Builder)
	cmd.Stderr = stderr
	return start(t, cmd), cmd, stderr
}

// The steps of the first request, and what a process that dies there has left.
var steps = []struct {
	name   string
	leaves string
}{
	{"before begin", "nothing"}, // the claim
	{"before SELECT state, token,", "nothing"},
	{"before INSERT INTO idempotency", "nothing"},
	{"before DELETE FROM idempotency", "nothing"},
	{"before commit", "nothing"},
	{"after commit", "claim"},
	{"before begin", "claim"}, // the handler
	{"before INSERT INTO orders", "claim"},
	{"before SELECT state, token,", "claim"}, // the response
	{"before INSERT INTO idempotency", "claim"},
	{"before commit", "claim"},
	{"after commit", "all"}, // the client has not heard of it
}

// TestCrash kills the process at every step of a request, then repeats the
// request with a new process.
func TestCrash(t *testing.T) {
	const key, body = "order-17", "item=tea&quantity=2"
	dir := t.TempDir()
	path := func(step int) string { return filepath.Join(dir, fmt.Sprint("step", step, ".db")) }
	for i, step := range steps {
		url, cmd, stderr := launch(t, path(i), i+1)
		_, err := post(t.Context(), url, key, body)
		require.Error(t, err, "no answer at step %d", i+1)
		require.Error(t, cmd.Wait(), "killed")
		require.Equal(t, step.name, stderr.String())
	}
	for i, step := range steps {
		t.Run(fmt.Sprint(i+1, " ", step.name), func(t *testing.T) {
			db := openFile(t, "sqlite", path(i))
			rows, cells := count(t, db, "orders"), count(t, db, "idempotency")
			responses := count(t, db, "idempotency WHERE state = $1", completed)
			left := map[[3]int]string{{0, 0, 0}: "nothing", {0, 1, 0}: "claim", {1, 1, 1}: "all"}
			require.Equal(t, step.leaves, left[[3]int{rows, cells, responses}])

			url, cmd, _ := launch(t, path(i), 0)
			a := mustPost(t, url, key, body)
			require.Equal(t, http.StatusCreated, a.status, a.body)
			require.Equal(t, step.leaves == "all", a.replayed)
			requireOneOrder(t, db, a.body)
			attempt := map[string]int{"nothing": 1, "claim": 2, "all": 1}[step.leaves]
			require.Equal(t, 1, count(t, db, "idempotency"))
			require.Equal(t, 1, count(t, db, "idempotency WHERE state = $1 AND attempt = $2", completed, attempt))

			again := mustPost(t, url, key, body)
			require.Equal(t, answer{a.status, a.body, true}, again)
			require.NoError(t, cmd.Process.Kill())
			require.Error(t, cmd.Wait())
		})
	}
}

// The list of steps is all of them.
func TestNoMoreSteps(t *testing.T) {
	url, cmd, stderr := launch(t, filepath.Join(t.TempDir(), "test.db"), len(steps)+1)
	a := mustPost(t, url, "order-17", "item=tea&quantity=2")
	require.Equal(t, http.StatusCreated, a.status, a.body)
	require.Empty(t, stderr.String())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
}
