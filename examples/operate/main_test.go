package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// asProgram makes the test binary run main instead of the tests.
const asProgram = "OPERATE_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A service is what the operator looks into: customers have a scope each, and
// keys are at-most-once.
type service struct {
	mini    *miniredis.Miniredis
	store   *idempotency.RedisStore
	handler http.Handler
	runs    int
	work    http.HandlerFunc // of the next requests
}

func newService(t *testing.T, opts idempotency.Options) *service {
	t.Helper()
	s := &service{mini: miniredis.RunT(t)}
	client := redis.NewClient(&redis.Options{Addr: s.mini.Addr(), ContextTimeoutEnabled: true})
	t.Cleanup(func() { _ = client.Close() })
	s.store = idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "shop:"})
	opts.AtMostOnce, opts.Wait = true, idempotency.NoWait
	opts.Scope = func(r *http.Request) string { return r.Header.Get("Customer") }
	s.handler = idempotency.Middleware(s.store, &opts)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.runs++
		s.work(w, r)
	}))
	s.work = charge
	return s
}

func charge(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Location", "/charges/1")
	w.WriteHeader(http.StatusCreated)
	_, _ = io.WriteString(w, "charged \u00e4\n")
}

func die(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// post sends alice's request. The status is 0 when the handler died.
func (s *service) post(key string) (status int) {
	defer func() {
		if recover() != nil {
			status = 0
		}
	}()
	r := httptest.NewRequest("POST", "/charge", strings.NewReader("amount=100"))
	r.Header.Set("Idempotency-Key", key)
	r.Header.Set("Customer", "alice")
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	return w.Code
}

// operate runs the command as an operator types it.
func (s *service) operate(t *testing.T, env map[string]string, typed string, args ...string) (code int, out, errOut string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	args = append([]string{"-redis", s.mini.Addr(), "-prefix", "shop:", "-scope", "alice"}, args...)
	getenv := func(name string) string { return env[name] }
	code = run(t.Context(), args, getenv, strings.NewReader(typed), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

func TestShowCompleted(t *testing.T) {
	s := newService(t, idempotency.Options{})
	require.Equal(t, 201, s.post("order-17"))
	s.mini.FastForward(90 * time.Minute)
	for _, key := range []string{"order-17", `"order-17"`} {
		code, out, errOut := s.operate(t, nil, "", "show", "post", "/charge?trace=1", key)
		require.Equal(t, exitDone, code, errOut)
		for _, want := range []string{
			"store key:    " + idempotency.StoreKey("alice", "POST", "/charge", "order-17") + "\n",
			"state:        Completed: ", "kept for:     22h30m0s\n", "last change:  1h30m0s\n",
			"a retry gets: replayed\n", "status:       201 Created\n", "header:       Location: /charges/1\n",
			"body:\ncharged \u00e4\n",
		} {
			require.Contains(t, out, want)
		}
	}
	require.Equal(t, 1, s.runs, "looking changes nothing")
}

func TestShowNothing(t *testing.T) {
	s := newService(t, idempotency.Options{})
	require.Equal(t, 201, s.post("order-17"))
	for _, args := range [][]string{
		{"show", "POST", "/charge", "order-18"},
		{"show", "POST", "/charge/", "order-17"},
		{"show", "POST", "/charge", "order-17", "-scope", "bob"},
		{"show", "POST", "/charge", "order-17", "-prefix", "idem:"},
		{"forget", "POST", "/charge", "order-18", "-yes"},
	} {
		code, out, _ := s.operate(t, nil, "", args...)
		require.Equal(t, exitNothing, code, args)
		require.Contains(t, out, "nothing there", args)
	}
}

// The way of a customer who is stuck: the process died, retries get
// outcome_unknown, the provider says that it was never asked.
func TestForget(t *testing.T) {
	s := newService(t, idempotency.Options{})
	s.work = die
	require.Zero(t, s.post("order-17"))
	s.work = charge

	code, out, errOut := s.operate(t, nil, "order-17\n", "forget", "POST", "/charge", "order-17")
	require.Equal(t, exitRunning, code)
	require.Contains(t, out, "state:        InProgress: a handler is running\nattempt:      1\nat most once: yes\nlease:        30s\n")
	require.Contains(t, errOut, "not forgotten: a handler is running")

	s.mini.FastForward(time.Minute)
	require.Equal(t, 409, s.post("order-17"))
	for _, typed := range []string{"", "\n", "y\n", "order-18\n"} {
		code, out, errOut = s.operate(t, nil, typed, "forget", "POST", "/charge", "order-17")
		require.Equal(t, exitNotConfirmed, code)
		require.Contains(t, out, "state:        Abandoned")
		require.Contains(t, out, "lets the handler run again")
		require.Contains(t, errOut, "not confirmed")
		require.Equal(t, 409, s.post("order-17"))
	}
	code, out, errOut = s.operate(t, nil, "order-17\n", "forget", "POST", "/charge", "order-17")
	require.Equal(t, exitDone, code, errOut)
	require.Contains(t, out, "forgotten")
	require.Equal(t, 201, s.post("order-17"))
	require.Equal(t, 2, s.runs)

	code, out, errOut = s.operate(t, nil, "", "forget", "POST", "/charge", "order-17", "-yes")
	require.Equal(t, exitDone, code, errOut)
	require.Contains(t, out, "lets the handler run again", "-yes spares the question and not the warning")
	require.Equal(t, 201, s.post("order-17"))
	require.Equal(t, 3, s.runs)
}

// typist is an operator who takes so long that something happens meanwhile.
type typist struct {
	meanwhile func()
	io.Reader
}

func (r *typist) Read(p []byte) (int, error) {
	if r.meanwhile != nil {
		r.meanwhile()
		r.meanwhile = nil
	}
	return r.Reader.Read(p)
}

// The process was only stopped, and reports its charge while the operator types.
func TestForgetWhatHasChanged(t *testing.T) {
	s := newService(t, idempotency.Options{})
	ctx := t.Context()
	key := idempotency.StoreKey("alice", "POST", "/charge", "order-17")
	rec, err := s.store.Acquire(ctx, key, idempotency.Claim{Token: "A", Lease: time.Second, TTL: time.Hour})
	require.NoError(t, err)
	require.Equal(t, 1, rec.Attempt)
	s.mini.FastForward(time.Minute)
	var stdout, stderr bytes.Buffer
	in := &typist{meanwhile: func() {
		require.NoError(t, s.store.Complete(ctx, key, "A", idempotency.Result{TTL: time.Hour}))
	}, Reader: strings.NewReader("order-17\n")}
	args := []string{"forget", "POST", "/charge", "order-17", "-scope", "alice", "-prefix", "shop:", "-redis", s.mini.Addr()}
	require.Equal(t, exitFailed, run(ctx, args, func(string) string { return "" }, in, &stdout, &stderr))
	require.Contains(t, stderr.String(), "not forgotten: ")
	cell, err := s.store.Inspect(ctx, key)
	require.NoError(t, err)
	require.Equal(t, idempotency.Completed, cell.State)
}

func TestSealedResponses(t *testing.T) {
	key := strings.Repeat("ab", 32)
	aead, err := newAEAD(key)
	require.NoError(t, err)
	s := newService(t, idempotency.Options{AEAD: aead})
	require.Equal(t, 201, s.post("order-17"))
	code, out, _ := s.operate(t, map[string]string{"IDEMPOTENCY_AEAD_KEY": key}, "", "show", "POST", "/charge", "order-17")
	require.Equal(t, exitDone, code)
	require.Contains(t, out, "charged")
	code, out, _ = s.operate(t, nil, "", "show", "POST", "/charge", "order-17")
	require.Equal(t, exitDone, code)
	require.Contains(t, out, "a retry gets: record_unreadable\n")
	require.NotContains(t, out, "charged")
	for _, bad := range []string{"xyz", "abcd"} {
		code, _, errOut := s.operate(t, map[string]string{"IDEMPOTENCY_AEAD_KEY": bad}, "", "show", "POST", "/charge", "order-17")
		require.Equal(t, exitUsage, code)
		require.Contains(t, errOut, "IDEMPOTENCY_AEAD_KEY")
		require.NotContains(t, errOut, "\""+bad)
	}
}

func TestPassword(t *testing.T) {
	s := newService(t, idempotency.Options{})
	require.Equal(t, 201, s.post("order-17"))
	s.mini.RequireUserAuth("operator", "secret")
	args := []string{"show", "POST", "/charge", "order-17"}
	code, _, errOut := s.operate(t, nil, "", args...)
	require.Equal(t, exitFailed, code)
	require.Contains(t, errOut, "NOAUTH")
	env := map[string]string{"REDIS_USERNAME": "operator", "REDIS_PASSWORD": "secret"}
	code, _, errOut = s.operate(t, env, "", args...)
	require.Equal(t, exitDone, code, errOut)
	code, _, errOut = s.operate(t, env, "", append(args, "-redis", "redis://"+s.mini.Addr())...)
	require.Equal(t, exitDone, code, errOut)
	code, _, errOut = s.operate(t, nil, "", append(args, "-redis", "redis://operator:secret@"+s.mini.Addr())...)
	require.Equal(t, exitDone, code, errOut)
}

func TestUsage(t *testing.T) {
	s := newService(t, idempotency.Options{})
	for _, args := range [][]string{
		{}, {"show"}, {"show", "POST", "/charge"}, {"show", "POST", "/charge", "a", "b"},
		{"delete", "POST", "/charge", "a"}, {"show", "POST", "/charge", "a", "-what"},
		{"show", "POST", "/charge", "a", "-redis", "redis://user:hunter2@[bad"},
	} {
		code, _, errOut := s.operate(t, nil, "", args...)
		require.Equal(t, exitUsage, code, args)
		require.NotEmpty(t, errOut, args)
		require.NotContains(t, errOut, "hunter2")
	}
	require.Equal(t, 201, s.post("-key"))
	code, out, errOut := s.operate(t, nil, "", "show", "POST", "/charge", "--", "-key")
	require.Equal(t, exitDone, code, errOut)
	require.Contains(t, out, "Completed")
}

// The exit code of the program itself.
func TestProgram(t *testing.T) {
	s := newService(t, idempotency.Options{})
	self, err := os.Executable()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "show", "POST", "/charge", "order-17", "-redis", s.mini.Addr())
	cmd.Env = append(os.Environ(), asProgram+"=1")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, exitNothing, exit.ExitCode(), string(out))
}
