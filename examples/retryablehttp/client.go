package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// newClient returns a client that repeats a request until it has the final
// answer. It is safe for concurrent use.
//
// Requests come from retryablehttp.NewRequest, with the body as a []byte, so
// that each try sends all of it. When Do returns an error, or an answer that
// says to try again, the outcome is unknown: the caller keeps the key, and sends
// the same request again later.
func newClient() *retryablehttp.Client {
	c := retryablehttp.NewClient()
	c.Logger = nil
	c.CheckRetry = checkRetry
	c.Backoff = backoff
	c.ErrorHandler = retryablehttp.PassthroughErrorHandler // returns the last answer, and not an error in its place
	c.HTTPClient.Timeout = 15 * time.Second                // of one try; there is none by default
	c.HTTPClient.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c
}

// checkRetry differs from retryablehttp.DefaultRetryPolicy in what the server
// says about a retry: a 409 may pass, and a 500 may be final. It reads the body,
// because an answer that breaks off is no answer.
func checkRetry(ctx context.Context, res *http.Response, err error) (bool, error) {
	if err != nil || ctx.Err() != nil {
		return retryablehttp.DefaultRetryPolicy(ctx, res, err)
	}
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	res.Body = io.NopCloser(bytes.NewReader(body))
	if err != nil {
		return ctx.Err() == nil, ctx.Err()
	}
	var problem struct{ Retryable *bool }
	if res.Header.Get("Content-Type") == "application/problem+json" {
		_ = json.Unmarshal(body, &problem) // another problem says nothing about a retry
	}
	switch {
	case res.Header.Get("Idempotent-Replayed") == "true":
		return false, nil // a stored answer stays as it is, even a 500
	case problem.Retryable != nil:
		return *problem.Retryable, nil
	}
	return slices.Contains([]int{408, 425, 429, 500, 502, 503, 504}, res.StatusCode), nil
}

// backoff honours Retry-After whatever the status; retryablehttp.DefaultBackoff
// reads it with 429 and 503 only. The random part on top keeps apart clients
// that were told the same. A server may ask for longer than the caller can
// wait: the deadline of the request's context ends the pause.
func backoff(shortest, longest time.Duration, attempt int, res *http.Response) time.Duration {
	pause := rand.N(min(longest, shortest<<min(attempt, 16)))
	if res != nil {
		seconds, _ := strconv.ParseUint(res.Header.Get("Retry-After"), 10, 31)
		pause += time.Duration(seconds) * time.Second
	}
	return pause
}
