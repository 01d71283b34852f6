package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Two replicas share a table: one answers with what the other has stored.
func TestReplicas(t *testing.T) {
	table := "p" + rand.Text()
	post := func(url string) (status, replayed, body string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("amount=100"))
		require.NoError(t, err)
		req.Header.Set("Idempotency-Key", "order-17")
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.Status, resp.Header.Get("Idempotent-Replayed"), string(answer)
	}
	one, two := start(t, "-table", table, "-create"), start(t, "-table", table)
	status, replayed, first := post(one)
	require.Equal(t, "201 Created", status)
	require.Empty(t, replayed)
	status, replayed, again := post(two)
	require.Equal(t, "201 Created", status)
	require.Equal(t, "true", replayed)
	require.Equal(t, first, again)
}

// A program whose table is missing says so, and does not start.
func TestTableIsMissing(t *testing.T) {
	for name, value := range map[string]string{
		"AWS_ENDPOINT_URL_DYNAMODB": endpoint(t), "AWS_REGION": "us-east-1",
		"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local",
	} {
		t.Setenv(name, value)
	}
	_, err := newStore(t.Context(), "missing", false)
	require.ErrorContains(t, err, "cannot read the table missing (-create makes it)")
}

// start runs the program until the end of the test and returns the URL that it
// suggests.
func start(t *testing.T, args ...string) string {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(context.Background(), self, append(args, "-addr", "127.0.0.1:0")...)
	cmd.Env = append(os.Environ(), asProgram+"=1", "AWS_ENDPOINT_URL_DYNAMODB="+endpoint(t),
		"AWS_REGION=us-east-1", "AWS_ACCESS_KEY_ID=local", "AWS_SECRET_ACCESS_KEY=local")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { // the context of the test has ended by then
		if runtime.GOOS != "windows" && !t.Failed() {
			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			require.NoError(t, cmd.Wait(), "it stops in order")
			return
		}
		_ = cmd.Process.Kill()
	})
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if url := regexp.MustCompile(`http://\S+`).FindString(lines.Text()); url != "" {
			return url
		}
	}
	t.Fatal("the program has printed no URL")
	return ""
}
