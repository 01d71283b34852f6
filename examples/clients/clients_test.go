// Package clients tests what docs/clients.md says.
package clients

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(text)
}

// block returns the code of the page in the given language.
func block(t *testing.T, language string) string {
	t.Helper()
	parts := strings.Split(read(t, "../../docs/clients.md"), "```"+language+"\n")
	require.Len(t, parts, 2, "the page has one block of %s", language)
	code, _, closed := strings.Cut(parts[1], "```")
	require.True(t, closed)
	return code
}

// An entry is what clients have to know of a code.
type entry struct {
	status    int
	retryable bool
}

// codes returns what matches of pattern in text say: the status, the code and
// whether it is retryable are the groups of these names.
func codes(t *testing.T, text, pattern string) map[string]entry {
	t.Helper()
	re := regexp.MustCompile(pattern)
	found := map[string]entry{}
	for _, m := range re.FindAllStringSubmatch(text, -1) {
		group := func(name string) string { return m[re.SubexpIndex(name)] }
		status, err := strconv.Atoi(group("status"))
		if err != nil {
			status = statusNamed(group("status"))
		}
		retryable := group("retryable")
		found[group("code")] = entry{status, retryable == "yes" || retryable == "true"}
	}
	require.NotEmpty(t, found)
	return found
}

// statusNamed returns the status of a constant of net/http.
func statusNamed(name string) int {
	for status := 400; status < 600; status++ {
		if "Status"+strings.ReplaceAll(http.StatusText(status), " ", "") == name {
			return status
		}
	}
	return 0
}

// ofLibrary are the codes in the sources of the library.
func ofLibrary(t *testing.T) map[string]entry {
	t.Helper()
	source := read(t, "../../errors.go")
	_, rows, ok := strings.Cut(source, "var problems = []problem{")
	require.True(t, ok)
	rows, _, _ = strings.Cut(rows, "\n}\n")
	found := codes(t, rows, `(?s)\{err: Err\w+, status: http\.(?P<status>\w+), code: "(?P<code>\w+)".*?(?:retryable: (?P<retryable>true))?\},`)
	require.Len(t, found, strings.Count(rows, "{err: "))
	return found
}

func TestTableOfErrorsIsThatOfTheLibrary(t *testing.T) {
	table := codes(t, read(t, "../../docs/clients.md"), "(?m)^\\| `(?P<code>\\w+)` \\| (?P<status>\\d+)(?:, \\d+)? \\| (?P<retryable>yes|no) \\| .+\\. \\| .+\\. \\|$")
	require.Equal(t, ofLibrary(t), table)
}

// An openAPI is the part of the document that the test compares.
type openAPI struct {
	Paths      map[string]map[string]struct{ Responses map[string]any }
	Components struct {
		Schemas map[string]struct {
			Required   []string
			Properties map[string]struct{ Enum []string }
		}
		Responses map[string]struct {
			Headers map[string]any
			Content map[string]struct {
				Examples map[string]struct{ Value map[string]any }
			}
		}
	}
}

// A refusal makes the library answer with its code.
type refusal struct {
	store idempotency.Store
	opts  idempotency.Options
	noKey bool
	body  func() io.Reader
	tries int // the last one is answered with the code

	// outer stands for middleware that has seen the request before.
	outer func(*http.Request) error
}

// A scripted store always finds the same under a key.
type scripted struct {
	idempotency.Store
	found idempotency.Record
}

func (s scripted) Acquire(_ context.Context, _ string, _ idempotency.Claim) (idempotency.Record, error) {
	return s.found, nil
}

// refusals has one for each code, and one for each other status of a code.
func refusals() map[string]refusal {
	finds := func(state idempotency.State) idempotency.Store {
		return scripted{found: idempotency.Record{State: state, Value: []byte("damaged")}}
	}
	down := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	down.Fail("Acquire", idemtest.ErrDown)
	return map[string]refusal{
		"key_missing":         {noKey: true, opts: idempotency.Options{RequireKey: true}},
		"key_invalid":         {opts: idempotency.Options{ValidateKey: func(string) error { return io.EOF }}},
		"key_reused":          {store: finds(idempotency.Mismatch)},
		"in_progress":         {store: finds(idempotency.InProgress), opts: idempotency.Options{Wait: idempotency.NoWait}},
		"outcome_unknown":     {store: finds(idempotency.Abandoned)},
		"response_not_stored": {opts: idempotency.Options{MaxResponseBytes: 1}, tries: 2},
		"record_unreadable":   {store: finds(idempotency.Completed)},
		"body_incomplete":     {body: func() io.Reader { return io.MultiReader(strings.NewReader("a"), brokenOff{io.ErrUnexpectedEOF}) }},
		"body_incomplete 500": {outer: parseFormThatIsLost},
		"body_too_large":      {body: func() io.Reader { return brokenOff{&http.MaxBytesError{Limit: 1}} }},
		"store_unavailable":   {store: down},
	}
}

// A brokenOff body ends with an error.
type brokenOff struct{ err error }

func (b brokenOff) Read([]byte) (int, error) { return 0, b.err }

// parseFormThatIsLost parses a form whose file then disappears from the disk.
func parseFormThatIsLost(r *http.Request) error {
	r.Header.Set("Content-Type", "multipart/form-data; boundary=b")
	r.Body = io.NopCloser(strings.NewReader("--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n" +
		strings.Repeat("x", 16<<20) + "\r\n--b--\r\n"))
	if err := r.ParseMultipartForm(1); err != nil { // which keeps large files on the disk
		return err
	}
	return r.MultipartForm.RemoveAll()
}

// answer returns what the library answers.
func (f refusal) answer(t *testing.T) *httptest.ResponseRecorder {
	t.Helper()
	store := f.store
	if store == nil {
		store = idempotency.NewMemoryStore()
	}
	f.opts.Logger = slog.New(slog.DiscardHandler)
	h := idempotency.Middleware(store, &f.opts)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "charge 1: 100")
	}))
	var w *httptest.ResponseRecorder
	for range max(f.tries, 1) {
		var body io.Reader
		if f.body != nil {
			body = f.body()
		}
		r := httptest.NewRequest(http.MethodPost, "/charge", body)
		if !f.noKey {
			r.Header.Set("Idempotency-Key", "order-17")
		}
		if f.outer != nil {
			require.NoError(t, f.outer(r))
		}
		w = httptest.NewRecorder()
		h.ServeHTTP(w, r)
	}
	return w
}

func TestEachCodeHasARefusal(t *testing.T) {
	all := refusals()
	for code := range ofLibrary(t) {
		require.Contains(t, all, code)
	}
}

// The examples of the document are what the library answers, but for the detail,
// which depends on the options.
func TestOpenAPIHasTheAnswersOfTheLibrary(t *testing.T) {
	var doc openAPI
	require.NoError(t, yaml.Unmarshal([]byte(block(t, "yaml")), &doc))
	schema := doc.Components.Schemas["IdempotencyProblem"]
	require.Len(t, schema.Properties["code"].Enum, len(ofLibrary(t)))

	for name, refusal := range refusals() {
		code, _, _ := strings.Cut(name, " ")
		t.Run(name, func(t *testing.T) {
			w := refusal.answer(t)
			status := strconv.Itoa(w.Code)
			require.Regexp(t, "(?m)^\\| `"+code+"` \\| ([0-9]+, )?"+status+"[, ]", read(t, "../../docs/clients.md"))
			require.Contains(t, doc.Paths["/charge"]["post"].Responses, status)
			response := doc.Components.Responses["Idempotency"+status]
			content := response.Content[w.Header().Get("Content-Type")]
			require.Contains(t, content.Examples, code)
			if w.Header().Get("Retry-After") != "" {
				require.Contains(t, response.Headers, "Retry-After")
			}

			var answer map[string]any
			require.NoError(t, json.Unmarshal(w.Body.Bytes(), &answer))
			require.Equal(t, code, answer["code"])
			require.Contains(t, schema.Properties["code"].Enum, code)
			for name := range answer {
				require.Contains(t, schema.Properties, name)
			}
			for _, name := range schema.Required {
				require.Contains(t, answer, name)
			}
			delete(answer, "detail")
			example, err := json.Marshal(content.Examples[code].Value)
			require.NoError(t, err)
			got, err := json.Marshal(answer)
			require.NoError(t, err)
			require.JSONEq(t, string(got), string(example))
		})
	}
}

// A reference that points nowhere is not an error to all validators.
func TestOpenAPIReferencesResolve(t *testing.T) {
	var doc any
	require.NoError(t, yaml.Unmarshal([]byte(block(t, "yaml")), &doc))
	references := 0
	var visit func(node any)
	visit = func(node any) {
		switch node := node.(type) {
		case []any:
			for _, child := range node {
				visit(child)
			}
		case map[string]any:
			for name, child := range node {
				if name == "$ref" {
					references++
					requireTarget(t, doc, child.(string))
				}
				visit(child)
			}
		}
	}
	visit(doc)
	require.NotZero(t, references)
}

// requireTarget follows a reference, "#/components/headers/RetryAfter" say.
func requireTarget(t *testing.T, doc any, reference string) {
	t.Helper()
	path, ok := strings.CutPrefix(reference, "#/")
	require.True(t, ok, reference)
	for name := range strings.SplitSeq(path, "/") {
		node, ok := doc.(map[string]any)
		require.True(t, ok, reference)
		require.Contains(t, node, name, reference)
		doc = node[name]
	}
}

// The OpenAPI validator of Python judges the document, where it is installed.
func TestOpenAPIIsValid(t *testing.T) {
	if exec.CommandContext(t.Context(), "python3", "-c", "import openapi_spec_validator, yaml").Run() != nil {
		t.Skip("needs python3 with openapi-spec-validator")
	}
	cmd := exec.CommandContext(t.Context(), "python3", "-c",
		"import openapi_spec_validator as v, sys, yaml; v.validate(yaml.safe_load(sys.stdin)) if hasattr(v, 'validate') else v.validate_spec(yaml.safe_load(sys.stdin))")
	cmd.Stdin = strings.NewReader(block(t, "yaml"))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}
