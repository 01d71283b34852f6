package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// redirect answers with a redirect to where target says.
func redirect(status int, target func() string) func(http.Handler, http.ResponseWriter, *http.Request) {
	return func(_ http.Handler, w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, target(), status)
	}
}

// The session of the client is over, and a proxy sends it to a login page. The
// page is not the answer to the operation, and its 200 is not a charge.
func TestRedirectThatChangesTheMethodIsTheAnswer(t *testing.T) {
	for _, status := range []int{301, 302, 303} {
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
			t.Run(method+" "+http.StatusText(status), func(t *testing.T) {
				b := newBank(t, nil, first(1, redirect(status, func() string { return "/login" })), nil)
				client, pauses := newClient(t)
				op := b.operation(NewKey())
				op.Method = method
				res, err := client.Do(t.Context(), op)
				require.NoError(t, err)
				require.Equal(t, status, res.Status)
				require.Equal(t, "/login", res.Header.Get("Location"))
				require.Equal(t, 1, res.Tries)
				require.Empty(t, *pauses)
				b.requireTries(t, op, 1, 0)
			})
		}
	}
}

// 307 and 308 repeat the request with its body and its key, on every try.
func TestRedirectThatRepeatsTheRequestIsFollowed(t *testing.T) {
	for _, status := range []int{307, 308} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			moved := func(next http.Handler) http.Handler {
				next = first(1, loseAnswer)(next)
				mux := http.NewServeMux()
				mux.Handle("POST /v2/charges", next)
				mux.Handle("POST /charges", http.RedirectHandler("/v2/charges", status))
				return mux
			}
			b := newBank(t, nil, moved, nil)
			client, _ := newClient(t)
			// The Transport repeats by itself what breaks on a connection that
			// has served a request before.
			client.HTTP.Transport.(*http.Transport).DisableKeepAlives = true
			op := b.operation(NewKey())
			res, err := client.Do(t.Context(), op)
			require.NoError(t, err)
			require.Equal(t, http.StatusCreated, res.Status)
			require.Equal(t, "charge 1", string(res.Body))
			require.True(t, res.Replayed())
			require.Equal(t, 2, res.Tries)
			b.requireTries(t, op, 4, 1)
		})
	}
}

// Another host has not seen the key: both could charge. It gets neither the key
// nor the body.
func TestRedirectToAnotherHostIsTheAnswer(t *testing.T) {
	for _, status := range []int{302, 307, 308} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			var visits atomic.Int32
			other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visits.Add(1) }))
			defer other.Close()
			b := newBank(t, nil, first(1, redirect(status, func() string { return other.URL + "/charges" })), nil)
			client, _ := newClient(t)
			op := b.operation(NewKey())
			res, err := client.Do(t.Context(), op)
			require.NoError(t, err)
			require.Equal(t, status, res.Status)
			require.Equal(t, other.URL+"/charges", res.Header.Get("Location"))
			require.Zero(t, visits.Load())
			b.requireTries(t, op, 1, 0)
		})
	}
}

// Another scheme is another server too: a key that went to one is unknown to the
// other, or was sent in the clear.
func TestRedirectToAnotherSchemeIsTheAnswer(t *testing.T) {
	var urls []string
	client := &Client{HTTP: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		urls = append(urls, r.URL.String())
		rec := httptest.NewRecorder()
		http.Redirect(rec, r, "http://bank.test/charges", http.StatusTemporaryRedirect)
		return rec.Result(), nil
	})}}
	res, err := client.Do(t.Context(), Operation{Key: "order-17", Method: http.MethodPost, URL: "https://bank.test/charges"})
	require.NoError(t, err)
	require.Equal(t, http.StatusTemporaryRedirect, res.Status)
	require.Equal(t, []string{"https://bank.test/charges"}, urls)
}

// The caller's own rule is asked about what would be followed, and the caller's
// http.Client is not changed.
func TestCheckRedirectOfTheCaller(t *testing.T) {
	b := newBank(t, nil, first(1, redirect(http.StatusTemporaryRedirect, func() string { return "/elsewhere" })), nil)
	client, _ := newClient(t)
	client.MaxTries = 1
	forbidden := errors.New("no redirects here")
	client.HTTP.CheckRedirect = func(*http.Request, []*http.Request) error { return forbidden }
	op := b.operation(NewKey())
	_, err := client.Do(t.Context(), op)
	require.ErrorIs(t, err, forbidden)
	require.ErrorIs(t, client.HTTP.CheckRedirect(nil, nil), forbidden)
	b.requireTries(t, op, 1, 0)
}

func TestRedirectsInACircleEnd(t *testing.T) {
	b := newBank(t, nil, first(1000, redirect(http.StatusTemporaryRedirect, func() string { return "/charges" })), nil)
	client, _ := newClient(t)
	client.MaxTries = 2
	op := b.operation(NewKey())
	_, err := client.Do(t.Context(), op)
	require.ErrorContains(t, err, "stopped after 10 redirects")
	b.requireTries(t, op, 2*10, 0)
}
