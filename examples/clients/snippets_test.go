package clients

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// quickstart starts the program of examples/quickstart and returns its address.
func quickstart(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "quickstart.exe")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../quickstart").CombinedOutput()
	require.NoError(t, err, "%s", out)
	cmd := exec.CommandContext(t.Context(), program, "-addr", "127.0.0.1:0")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if address := regexp.MustCompile(`http://[\d.:]+`).FindString(lines.Text()); address != "" {
			return address
		}
	}
	require.Fail(t, "the quickstart has printed no address")
	return ""
}

// A network stands between a client and the quickstart. Its first tries meet the
// faults, one each, and the others pass.
type network struct {
	server string
	faults []fault

	mu   sync.Mutex
	seen []try
}

// A fault has the answer of the server, and treats the client badly.
type fault func(w http.ResponseWriter, answer *http.Response, body []byte)

// A try is what must be the same in all tries of an operation.
type try struct{ key, contentType, body string }

func (n *network) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client is gone
	}
	n.mu.Lock()
	n.seen = append(n.seen, try{r.Header.Get("Idempotency-Key"), r.Header.Get("Content-Type"), string(body)})
	number := len(n.seen)
	n.mu.Unlock()

	req, err := http.NewRequestWithContext(r.Context(), r.Method, n.server+r.URL.Path, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	req.Header = r.Header.Clone()
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		panic(err)
	}
	defer answer.Body.Close()
	if body, err = io.ReadAll(answer.Body); err != nil {
		panic(err)
	}
	if number <= len(n.faults) {
		n.faults[number-1](w, answer, body)
		return
	}
	for name, values := range answer.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.StatusCode)
	_, _ = w.Write(body)
}

// lost closes the connection: the server has charged, and the client hears
// nothing.
func lost(http.ResponseWriter, *http.Response, []byte) { panic(http.ErrAbortHandler) }

// half closes the connection in the middle of the answer.
func half(w http.ResponseWriter, answer *http.Response, body []byte) {
	w.Header().Set("Content-Length", answer.Header.Get("Content-Length"))
	w.WriteHeader(answer.StatusCode)
	_, _ = w.Write(body[:len(body)/2])
	_ = http.NewResponseController(w).Flush() // or the panic would drop it
	panic(http.ErrAbortHandler)
}

// busy answers as a server does that still runs the first try.
func busy(w http.ResponseWriter, r *http.Response, _ []byte) {
	idempotency.WriteError(w, r.Request, &idempotency.Error{
		Status: http.StatusConflict, Code: "in_progress", Type: "about:blank", RetryAfter: time.Second, Retryable: true,
	})
}

// away answers as a proxy does whose server restarts.
func away(w http.ResponseWriter, _ *http.Response, _ []byte) {
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusServiceUnavailable)
}

// Each program of the page meets each fault, and charges once.
func TestSnippetsChargeOnce(t *testing.T) {
	python := func(t *testing.T, file string) *exec.Cmd {
		if exec.CommandContext(t.Context(), "python3", "-c", "import requests").Run() != nil {
			t.Skip("needs python3 with requests")
		}
		return exec.CommandContext(t.Context(), "python3", file)
	}
	node := func(t *testing.T, file string) *exec.Cmd {
		if exec.CommandContext(t.Context(), "node", "-e", "fetch").Run() != nil {
			t.Skip("needs node 18 or newer")
		}
		return exec.CommandContext(t.Context(), "node", file)
	}
	golang := func(t *testing.T, file string) *exec.Cmd { return exec.CommandContext(t.Context(), "go", "run", file) }
	curl := func(t *testing.T, file string) *exec.Cmd {
		for _, program := range []string{"sh", "curl", "openssl"} {
			if _, err := exec.LookPath(program); err != nil {
				t.Skip("needs " + program)
			}
		}
		return exec.CommandContext(t.Context(), "sh", file)
	}
	const final = "201 charge 1: 100 replayed: true"
	all := []fault{lost, half, busy, away}
	for _, row := range []struct {
		language, file string
		run            func(*testing.T, string) *exec.Cmd
		faults         []fault
		want           []string
	}{
		{language: "python", file: "pay.py", run: python, faults: all, want: []string{final}},
		{language: "js", file: "pay.mjs", run: node, faults: all, want: []string{final}},
		{language: "go", file: "main.go", run: golang, faults: all, want: []string{final}},
		{language: "sh", file: "pay.sh", run: curl, faults: []fault{lost, half, away}, // a 409 is final to curl
			want: []string{"HTTP/1.1 201", "Idempotent-Replayed: true", "charge 1: 100\n"}},
	} {
		t.Run(row.language, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), row.file)
			cmd := row.run(t, file)
			net := &network{server: quickstart(t), faults: row.faults}
			srv := httptest.NewServer(net)
			defer srv.Close()
			code := strings.ReplaceAll(block(t, row.language), "https://api.example.com", srv.URL)
			require.NoError(t, os.WriteFile(file, []byte(code), 0o600))

			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			for _, want := range row.want {
				require.Contains(t, string(out), want)
			}
			net.mu.Lock()
			defer net.mu.Unlock()
			require.NotEmpty(t, net.seen[0].key)
			require.Equal(t, "amount=100", net.seen[0].body)
			require.Equal(t, slices.Repeat(net.seen[:1], len(row.faults)+1), net.seen, "tries are the same request")
		})
	}
}
