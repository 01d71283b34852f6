package idempotency_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The first program of the README is what a newcomer copies, so it has to compile
// as it is printed.
func TestREADMEProgramCompiles(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	_, after, ok := strings.Cut(string(readme), "```go\n")
	require.True(t, ok, "README.md has a block of Go")
	program, _, _ := strings.Cut(after, "```")
	require.Contains(t, program, "package main")

	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	require.NoError(t, os.WriteFile(source, []byte(program), 0o600))
	// The command runs here, so that the import is this checkout.
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "main"), source).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// A reader has ten minutes.
func TestREADMEIsShort(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	lines := strings.Split(string(readme), "\n")
	require.LessOrEqual(t, len(lines)-1, 200)
	first := 0
	for i, line := range lines {
		if line == "```go" {
			first = i + 1
			break
		}
	}
	require.Less(t, first, 20, "the first code")
}
