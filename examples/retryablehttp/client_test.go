package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/stretchr/testify/require"
)

// A bank charges behind the middleware. Its first answers are spoilt by faults,
// one each.
type bank struct {
	*httptest.Server

	mu      sync.Mutex
	faults  []fault
	seen    []string // key and body of each try
	charges int
}

// A fault gets the handler that charges.
type fault func(next http.Handler, w http.ResponseWriter, r *http.Request)

func newBank(t *testing.T, faults ...fault) *bank {
	t.Helper()
	b := &bank{faults: faults}
	once := idempotency.Middleware(idempotency.NewMemoryStore(), nil)
	next := once(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.charges++
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, "charge %d", b.charges)
	}))
	b.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the client is gone
		}
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		b.mu.Lock()
		b.seen = append(b.seen, r.Header.Get("Idempotency-Key")+" "+string(body))
		number := len(b.seen)
		b.mu.Unlock()
		if number <= len(b.faults) {
			b.faults[number-1](next, w, r)
			return
		}
		next.ServeHTTP(w, r)
	}))
	t.Cleanup(b.Close)
	return b
}

func lost(next http.Handler, _ http.ResponseWriter, r *http.Request) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

func half(next http.Handler, w http.ResponseWriter, r *http.Request) {
	next.ServeHTTP(httptest.NewRecorder(), r)
	w.Header().Set("Content-Length", "8")
	w.WriteHeader(http.StatusCreated)
	_, _ = io.WriteString(w, "char")
	_ = http.NewResponseController(w).Flush() // or the panic would drop it
	panic(http.ErrAbortHandler)
}

// says answers with an error of the middleware.
func says(status int, code string, retryable bool, after time.Duration) fault {
	return func(_ http.Handler, w http.ResponseWriter, r *http.Request) {
		idempotency.WriteError(w, r, &idempotency.Error{Status: status, Code: code, Retryable: retryable, RetryAfter: after})
	}
}

// answers with a status, and a header if there is one.
func answers(status int, header ...string) fault {
	return func(_ http.Handler, w http.ResponseWriter, _ *http.Request) {
		if len(header) == 2 {
			w.Header().Set(header[0], header[1])
		}
		w.WriteHeader(status)
	}
}

// withoutPauses keeps the client's backoff and returns what it asked for.
func withoutPauses(t *testing.T, c *retryablehttp.Client) *[]time.Duration {
	c.Logger = nil
	t.Cleanup(c.HTTPClient.CloseIdleConnections)
	pauses, ask := new([]time.Duration), c.Backoff
	c.Backoff = func(shortest, longest time.Duration, attempt int, res *http.Response) time.Duration {
		*pauses = append(*pauses, ask(shortest, longest, attempt, res))
		return 0
	}
	return pauses
}

func (b *bank) requireTries(t *testing.T, n, charges int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	require.Equal(t, slices.Repeat([]string{"order-17 amount=100"}, n), b.seen, "each try has the key and the whole body")
	require.Equal(t, charges, b.charges)
}

func TestChargesOnce(t *testing.T) {
	b := newBank(t, lost, half, says(http.StatusConflict, "in_progress", true, time.Second), answers(http.StatusServiceUnavailable))
	client := newClient()
	withoutPauses(t, client)
	got, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
	require.NoError(t, err)
	require.Equal(t, http.StatusCreated, got.status)
	require.Equal(t, "charge 1", string(got.body))
	require.True(t, got.replayed)
	b.requireTries(t, 5, 1)
}

// Which answers are repeated, here and by default. Where the two differ, the
// default either gives up on an operation that may have happened, or repeats
// what cannot become another answer.
func TestWhichAnswersAreRepeated(t *testing.T) {
	for _, row := range []struct {
		name            string
		fault           fault
		repeated, byDef bool
	}{
		{"409 in_progress", says(409, "in_progress", true, 0), true, false},
		{"409 outcome_unknown", says(409, "outcome_unknown", false, 0), false, false},
		{"400 body_incomplete", says(400, "body_incomplete", true, 0), true, false},
		{"500 record_unreadable", says(500, "record_unreadable", false, 0), false, true},
		{"503 store_unavailable", says(503, "store_unavailable", true, 0), true, true},
		{"422 key_reused", says(422, "key_reused", false, 0), false, false},
		{"500 replayed", answers(500, "Idempotent-Replayed", "true"), false, true},
		{"500", answers(500), true, true},
		{"408", answers(408), true, false},
		{"425", answers(425), true, false},
		{"429", answers(429), true, true},
		{"404", answers(404), false, false},
		{"409", answers(409), false, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			for client, repeated := range map[*retryablehttp.Client]bool{newClient(): row.repeated, retryablehttp.NewClient(): row.byDef} {
				b := newBank(t, row.fault)
				withoutPauses(t, client)
				_, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
				if repeated {
					require.NoError(t, err)
					b.requireTries(t, 2, 1)
					continue
				}
				b.requireTries(t, 1, 0)
			}
		})
	}
}

// By default an answer that breaks off is not repeated: the caller finds out
// when it reads the body.
func TestHalfAnAnswerIsNoAnswer(t *testing.T) {
	b := newBank(t, half)
	client := newClient()
	withoutPauses(t, client)
	got, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(got.body))
	b.requireTries(t, 2, 1)

	b, client = newBank(t, half), retryablehttp.NewClient()
	withoutPauses(t, client)
	req, err := retryablehttp.NewRequest(http.MethodPost, b.URL, []byte("amount=100"))
	require.NoError(t, err)
	req.Header.Set("Idempotency-Key", "order-17")
	res, err := client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	_, err = io.ReadAll(res.Body)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	b.requireTries(t, 1, 1)
}

func TestRetryAfterIsHonouredWithEveryStatus(t *testing.T) {
	for _, status := range []int{http.StatusConflict, http.StatusBadGateway, http.StatusServiceUnavailable} {
		b := newBank(t, says(status, "", true, 7*time.Second))
		client := newClient()
		pauses := withoutPauses(t, client)
		_, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
		require.NoError(t, err)
		require.Len(t, *pauses, 1)
		require.GreaterOrEqual(t, (*pauses)[0], 7*time.Second, status)
		require.Less(t, (*pauses)[0], 7*time.Second+client.RetryWaitMin, status)
	}
}

func TestBackoffGrowsUpToItsLimit(t *testing.T) {
	for attempt, limit := range map[int]time.Duration{0: time.Second, 3: 8 * time.Second, 9: 30 * time.Second, 1000: 30 * time.Second} {
		longest := time.Duration(0)
		for range 1000 {
			pause := backoff(time.Second, 30*time.Second, attempt, nil)
			require.Less(t, pause, limit, attempt)
			longest = max(longest, pause)
		}
		require.Greater(t, longest, limit/2, attempt)
	}
}

// After 303, net/http would send a GET, and the page that it gets is no charge.
func TestRedirectIsTheAnswer(t *testing.T) {
	b := newBank(t, answers(http.StatusSeeOther, "Location", "/login"))
	client := newClient()
	withoutPauses(t, client)
	got, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
	require.NoError(t, err)
	require.Equal(t, http.StatusSeeOther, got.status)
	b.requireTries(t, 1, 0)
}

// By default a try has no limit, and one that hangs is never repeated.
func TestTryThatHangsIsRepeated(t *testing.T) {
	b := newBank(t, func(next http.Handler, _ http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(httptest.NewRecorder(), r)
		<-r.Context().Done() // until the client hangs up
	})
	require.Zero(t, retryablehttp.NewClient().HTTPClient.Timeout)
	client := newClient()
	require.NotZero(t, client.HTTPClient.Timeout)
	client.HTTPClient.Timeout = 200 * time.Millisecond // in place of 15 s
	withoutPauses(t, client)
	got, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
	require.NoError(t, err)
	require.Equal(t, "charge 1", string(got.body))
}

func TestGivesUpWithTheLastStatus(t *testing.T) {
	b := newBank(t, slices.Repeat([]fault{answers(http.StatusServiceUnavailable)}, 9)...)
	client := newClient()
	withoutPauses(t, client)
	_, err := post(t.Context(), client, b.URL, "order-17", []byte("amount=100"))
	require.EqualError(t, err, "503 Service Unavailable after 5 tries")
	b.requireTries(t, 5, 0)
}
