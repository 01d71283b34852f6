package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests, so that the
// tests drive the real program without building it again.
const asProgram = "WEBHOOKS_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// The commands that the program prints sign with openssl, so they also check
// the signatures of this package against another implementation.
func TestPrintedCommands(t *testing.T) {
	for _, tool := range []string{"bash", "curl", "openssl", "base64", "od"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("the commands need ", tool)
		}
	}
	self, err := os.Executable()
	require.NoError(t, err)
	env := append(os.Environ(), asProgram+"=1", "STRIPE_SECRET="+stripeSecret, "STANDARD_SECRET="+acmeSecret, "REDIS_ADDR=")
	program := exec.CommandContext(t.Context(), self, "-addr", "127.0.0.1:0")
	program.Env, program.Stderr = env, io.Discard
	stdout, err := program.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, program.Start())
	t.Cleanup(func() { _ = program.Process.Kill() }) // without effect unless the test failed

	lines := bufio.NewScanner(stdout)
	require.True(t, lines.Scan(), "the first line says what the others are for")
	commands := ""
	for lines.Scan() {
		commands += lines.Text() + "\n"
		if strings.Contains(lines.Text(), "hexkey") {
			break
		}
	}
	for _, replays := range []int{0, 2} {
		shell := exec.CommandContext(t.Context(), "bash", "-euc", commands)
		shell.Env = env
		answers, err := shell.Output()
		require.NoError(t, err)
		require.Equal(t, 2, strings.Count(string(answers), "204 No Content"), "%s", answers)
		require.Equal(t, replays, strings.Count(string(answers), "Idempotent-Replayed: true"), "%s", answers)
	}
	if runtime.GOOS != "windows" {
		require.NoError(t, program.Process.Signal(syscall.SIGTERM))
		require.NoError(t, program.Wait(), "it stops in order")
	}
}

func TestSecretsAreNeeded(t *testing.T) {
	env := map[string]string{}
	getenv := func(name string) string { return env[name] }
	_, err := newReceiver(getenv)
	require.ErrorContains(t, err, "export STRIPE_SECRET=")
	env["STRIPE_SECRET"] = stripeSecret
	_, err = newReceiver(getenv)
	require.ErrorContains(t, err, "24 bytes")
	env["STANDARD_SECRET"] = acmeSecret
	_, err = newReceiver(getenv)
	require.NoError(t, err)
}
