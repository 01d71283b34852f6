package main

import (
	"bytes"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests, so that the
// tests drive the real program without building it again.
const asProgram = "CLIENT_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd = exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

// keyOf returns the key that a program said it would use.
func keyOf(t *testing.T, stderr *bytes.Buffer) string {
	t.Helper()
	line, _, _ := strings.Cut(stderr.String(), "\n")
	key, found := strings.CutPrefix(line, "key ")
	require.True(t, found, stderr.String())
	require.Len(t, key, 36, "a UUID")
	return key
}

func TestProgramThatIsKilledCanBeResumed(t *testing.T) {
	charging, finish := make(chan struct{}), make(chan struct{})
	b := newBank(t, nil, nil, first(1, func(next http.Handler, w http.ResponseWriter, r *http.Request) {
		close(charging)
		<-finish
		next.ServeHTTP(w, r)
	}))
	finishOnce := sync.OnceFunc(func() { close(finish) })
	t.Cleanup(finishOnce) // or a failed test would hang

	cmd, stdout, stderr := program(t, "-url", b.URL)
	require.NoError(t, cmd.Start())
	<-charging
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Empty(t, stdout.String())
	finishOnce() // the handler finishes after its client has gone

	cmd, stdout, resumed := program(t, "-url", b.URL, "-key", keyOf(t, stderr))
	require.NoError(t, cmd.Run(), resumed)
	require.Equal(t, "201, replayed: true, tries: 1\ncharge 1", stdout.String())
	require.Equal(t, keyOf(t, stderr), keyOf(t, resumed))
}

func TestProgramSaysHowToResume(t *testing.T) {
	b := newBank(t, nil, nil, nil)
	b.Close() // nobody listens there any more
	cmd, stdout, stderr := program(t, "-url", b.URL, "-timeout", "1ms")
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, 1, exit.ExitCode())
	require.Empty(t, stdout.String())
	require.Contains(t, stderr.String(), "to resume, repeat the command with -key "+keyOf(t, stderr))
}

func TestProgramRefusesNonsense(t *testing.T) {
	cmd, _, stderr := program(t, "-url", "http://[")
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Run(), &exit)
	require.Equal(t, 2, exit.ExitCode())
	require.NotContains(t, stderr.String(), "resume")
}
