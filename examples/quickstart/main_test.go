package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests, so that the
// tests drive the real program without building it again.
const asProgram = "QUICKSTART_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	return cmd
}

func post(t *testing.T, url, key, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(answer)
}

// requireThreeAnswers sends the three requests that the program suggests.
func requireThreeAnswers(t *testing.T, url string) {
	t.Helper()
	res, first := post(t, url, "order-17", "amount=100")
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Equal(t, "charge 1: 100\n", first)
	require.Empty(t, res.Header.Get("Idempotent-Replayed"))

	res, again := post(t, url, "order-17", "amount=100")
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Equal(t, first, again)
	require.Equal(t, "true", res.Header.Get("Idempotent-Replayed"))

	res, refused := post(t, url, "order-17", "amount=999")
	require.Equal(t, http.StatusUnprocessableEntity, res.StatusCode)
	require.Contains(t, refused, "key_reused")
}

func TestHandler(t *testing.T) {
	srv := httptest.NewServer(newHandler(nil))
	defer srv.Close()
	requireThreeAnswers(t, srv.URL+"/charge")

	res, other := post(t, srv.URL+"/charge", "order-18", "amount=100")
	require.Equal(t, http.StatusCreated, res.StatusCode)
	require.Equal(t, "charge 2: 100\n", other, "a new key is a new charge, and the tries above made only one")

	for range 2 {
		res, _ = post(t, srv.URL+"/charge", "order-19", "amount=nothing")
		require.Equal(t, http.StatusBadRequest, res.StatusCode)
	}
	require.Equal(t, "true", res.Header.Get("Idempotent-Replayed"), "a refusal is an answer too")
}

func TestWithoutKeyEveryRequestIsExecuted(t *testing.T) {
	srv := httptest.NewServer(newHandler(nil))
	defer srv.Close()
	_, first := post(t, srv.URL+"/charge", "", "amount=100")
	_, second := post(t, srv.URL+"/charge", "", "amount=100")
	require.Equal(t, "charge 1: 100\n", first)
	require.Equal(t, "charge 2: 100\n", second)
}

func TestProgram(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted there")
	}
	cmd := program(t, "-addr", "127.0.0.1:0")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // without effect unless the test failed

	var commands []string
	for lines := bufio.NewScanner(stdout); len(commands) < 3 && lines.Scan(); {
		if strings.Contains(lines.Text(), "curl") {
			commands = append(commands, lines.Text())
		}
	}
	require.Len(t, commands, 3)
	url := regexp.MustCompile(`http://\S+`).FindString(commands[0])
	requireThreeAnswers(t, url)

	http.DefaultClient.CloseIdleConnections()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), "SIGTERM ends the program in order")
}

func TestProgramSaysThatThePortIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()

	var stderr bytes.Buffer
	cmd := program(t, "-addr", taken.Addr().String())
	cmd.Stderr = &stderr
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Contains(t, stderr.String(), taken.Addr().String())
}
