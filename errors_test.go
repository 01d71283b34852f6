package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// knownStore says of every key what it was told to say.
type knownStore struct {
	idempotency.Store
	record idempotency.Record
	err    error
}

func (s *knownStore) Acquire(_ context.Context, _ string, c idempotency.Claim) (idempotency.Record, error) {
	if s.record.State == idempotency.Completed {
		s.record.Fingerprint = c.Fingerprint
	}
	return s.record, s.err
}

func (s *knownStore) Release(context.Context, string, string, time.Duration) error { return s.err }

// says returns a store that says of every key that it is in this state.
func says(state idempotency.State, value string) idempotency.Store {
	return &knownStore{record: idempotency.Record{State: state, Value: []byte(value), Remaining: time.Hour}}
}

// A refusal is a request that the middleware answers itself.
type refusal struct {
	sentinel error
	code     string
	store    idempotency.Store // nil: empty
	options  func(o *idempotency.Options)
	body     io.Reader
	noKey    bool
	tries    int // the last of which is refused; 0: one
}

// refusals has one for every sentinel. The key is in the header of the options,
// or with a Key in the body.
func refusals() []refusal {
	return []refusal{
		{sentinel: idempotency.ErrKeyMissing, code: "key_missing", noKey: true, options: func(o *idempotency.Options) { o.RequireKey = true }},
		{sentinel: idempotency.ErrKeyInvalid, code: "key_invalid", options: func(o *idempotency.Options) {
			o.ValidateKey = func(string) error { return errors.New("") }
		}},
		{sentinel: idempotency.ErrKeyReused, code: "key_reused", store: says(idempotency.Mismatch, "")},
		{sentinel: idempotency.ErrInProgress, code: "in_progress", store: says(idempotency.InProgress, "")},
		{sentinel: idempotency.ErrOutcomeUnknown, code: "outcome_unknown", store: says(idempotency.Abandoned, "")},
		{sentinel: idempotency.ErrResponseNotStored, code: "response_not_stored", tries: 2, options: func(o *idempotency.Options) { o.MaxResponseBytes = 1 }},
		{sentinel: idempotency.ErrRecordUnreadable, code: "record_unreadable", store: says(idempotency.Completed, "damaged")},
		{sentinel: idempotency.ErrBodyIncomplete, code: "body_incomplete", body: &brokenBody{strings.NewReader("a"), io.ErrUnexpectedEOF}},
		{sentinel: idempotency.ErrBodyTooLarge, code: "body_too_large", body: &brokenBody{strings.NewReader("a"), &http.MaxBytesError{Limit: 1}}},
		{sentinel: idempotency.ErrStoreUnavailable, code: "store_unavailable", store: &knownStore{err: errors.New("down")}},
	}
}

// refused returns how the middleware refuses: the Error and its answer.
func (x refusal) refused(t *testing.T, opts idempotency.Options) (err *idempotency.Error, p idemtest.Problem) {
	t.Helper()
	opts.Wait = idempotency.NoWait
	opts.ErrorHandler = func(w http.ResponseWriter, r *http.Request, e *idempotency.Error) {
		err = e
		idempotency.WriteError(w, r, e)
	}
	if x.options != nil {
		x.options(&opts)
	}
	if x.store == nil {
		x.store = idempotency.NewMemoryStore()
	}
	c := idemtest.NewClient(x.store, &opts, nil)
	var resp *http.Response
	for range max(x.tries, 1) {
		key := "a"
		if x.noKey {
			key = ""
		}
		r := httptest.NewRequest("POST", "/charge", strings.NewReader(key))
		if x.body != nil {
			r.Body = io.NopCloser(x.body)
		}
		if key != "" {
			r.Header.Set(opts.Header, key)
		}
		resp = c.Do(r)
	}
	_, p = idemtest.Describe(t, resp)
	require.ErrorIs(t, err, x.sentinel)
	require.Equal(t, x.code, err.Code)
	require.Equal(t, x.code, p.Code)
	require.Equal(t, err.Detail, p.Detail)
	return err, p
}

// Which errors are worth a retry, and when. What an ErrorHandler gets and what a
// client is told are the same.
func TestWhatIsRetryable(t *testing.T) {
	retryable := map[error]string{ // Retry-After
		idempotency.ErrInProgress: "1s", idempotency.ErrStoreUnavailable: "1s", idempotency.ErrBodyIncomplete: "0s",
	}
	for _, x := range refusals() {
		err, p := x.refused(t, idempotency.Options{Header: "Idempotency-Key"})
		after, want := retryable[x.sentinel]
		require.Equal(t, want, err.Retryable, x.code)
		require.Equal(t, want, p.Retryable, x.code)
		if !want {
			after = "0s"
		}
		require.Equal(t, after, err.RetryAfter.String(), x.code)
	}
}

// WriteError says of an Error what the Error says.
func TestWriteErrorTellsItsFields(t *testing.T) {
	for _, row := range []struct {
		retryable  bool
		retryAfter time.Duration
		header     string
	}{{false, 0, ""}, {true, 0, ""}, {false, time.Second, "1"}, {true, 1500 * time.Millisecond, "2"}} {
		for _, code := range []string{"in_progress", "key_reused", "of my own"} {
			w := httptest.NewRecorder()
			idempotency.WriteError(w, nil, &idempotency.Error{Status: 409, Code: code, Retryable: row.retryable, RetryAfter: row.retryAfter})
			_, p := idemtest.Describe(t, w.Result())
			require.Equal(t, row.retryable, p.Retryable, code)
			require.Equal(t, row.header, w.Header().Get("Retry-After"), code)
		}
	}
}

// Errors speak of the key as the client knows it: as the header that it sends,
// or, where Key finds the key, as the idempotency key.
func TestErrorsNameTheHeader(t *testing.T) {
	fromBody := func(_ *http.Request, body []byte) (string, error) { return string(body), nil }
	withoutKey := []string{"body_incomplete", "body_too_large", "store_unavailable"} // which speak of the request
	for _, x := range refusals() {
		err, p := x.refused(t, idempotency.Options{Header: "webhook-id"})
		require.NotContains(t, strings.ToLower(err.Detail), "idempotency", x.code)
		require.NotContains(t, err.Detail, "{", x.code)
		if !strings.Contains(fmt.Sprint(withoutKey), x.code) {
			require.Contains(t, err.Detail, "webhook-id", x.code)
		}
		standard, standardProblem := x.refused(t, idempotency.Options{Header: "Idempotency-Key"})
		require.Equal(t, strings.ReplaceAll(err.Detail, "webhook-id", "Idempotency-Key"), standard.Detail)
		require.Equal(t, p.Title, standardProblem.Title)

		keyed, _ := x.refused(t, idempotency.Options{Header: "webhook-id", Key: fromBody})
		require.Equal(t, strings.ReplaceAll(err.Detail, "webhook-id", "idempotency key"), keyed.Detail)
		require.NotContains(t, keyed.Detail, "header")
	}
	for _, lines := range [][]string{{""}, {`""`}, {"a", "b"}, {`"a`}, {"a b"}, {strings.Repeat("a", 256)}} {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Header: "webhook-id"}, nil)
		got, p := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Header: http.Header{"Webhook-Id": lines}})))
		require.Equal(t, "400 key_invalid", got)
		require.Contains(t, p.Detail, "webhook-id")
		require.NotContains(t, strings.ToLower(p.Detail), "idempotency")
	}
}

// A 422 names what counts with the options in force, and warns of a new key.
func TestWhatA422Says(t *testing.T) {
	const credentials = "credentials (Authorization, Cookie)"
	scope := func(r *http.Request) string { return r.Header.Get("Tenant") }
	for name, row := range map[string]struct {
		opts    idempotency.Options
		header  http.Header
		says    []string
		without []string
	}{
		"by default":         {says: []string{"query, body, Content-Type, ", credentials}},
		"with a scope":       {opts: idempotency.Options{Scope: scope}, header: http.Header{"Tenant": {"t"}}, says: []string{"query, body, Content-Type, "}, without: []string{"credentials", "Cookie"}},
		"with an empty one":  {opts: idempotency.Options{Scope: scope}, says: []string{"query, body, Content-Type, ", credentials}},
		"with more headers":  {opts: idempotency.Options{FingerprintHeaders: []string{"stripe-account", "X-Tenant-Id"}}, says: []string{credentials + ", Stripe-Account, X-Tenant-Id, preconditions"}},
		"with a fingerprint": {opts: idempotency.Options{Fingerprint: func(_ *http.Request, body []byte) []byte { return body }}, says: []string{"the content that this operation compares", credentials}, without: []string{"query", "body", "Content-Type"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &row.opts, nil)
			c.Check(t, 1, idemtest.Exchange{Key: "a", Header: row.header, Get: "201 charge 1"})
			got, p := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a", Header: row.header, Body: "other"})))
			require.Equal(t, "422 key_reused", got)
			require.Contains(t, p.Detail, "Another request came before under this Idempotency-Key, and it may have succeeded.")
			require.Contains(t, p.Detail, "preconditions (If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since).")
			require.Contains(t, p.Detail, "repeat it exactly as it was")
			require.Contains(t, p.Detail, "the same operation under a new key may be done twice")
			require.NotContains(t, strings.ToLower(p.Detail), "scope")
			for _, text := range row.says {
				require.Contains(t, p.Detail, text)
			}
			for _, text := range row.without {
				require.NotContains(t, p.Detail, text)
			}
		})
	}
}

func TestErrorBody(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, DocsURL: "https://docs.example/idempotency"}, nil)
	resp := c.Do(c.Request(idemtest.Exchange{}))
	require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
	require.Equal(t, "no-store", resp.Header.Get("Cache-Control"))
	require.Equal(t, "en", resp.Header.Get("Content-Language"))
	require.Equal(t, `<https://docs.example/idempotency>; rel="describedby"`, resp.Header.Get("Link"))
	got, p := idemtest.Describe(t, resp)
	require.Equal(t, "400 key_missing", got)
	require.Equal(t, "Idempotency-Key is missing", p.Title)
	require.Equal(t, "https://docs.example/idempotency", p.Type)

	var seen *idempotency.Error
	c = idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{RequireKey: true, ErrorHandler: func(w http.ResponseWriter, r *http.Request, err *idempotency.Error) {
		seen = err
		w.WriteHeader(http.StatusTeapot)
	}}, nil)
	require.Equal(t, http.StatusTeapot, c.Do(c.Request(idemtest.Exchange{})).StatusCode)
	require.ErrorIs(t, seen, idempotency.ErrKeyMissing)
	require.Equal(t, "about:blank", seen.Type)
}
