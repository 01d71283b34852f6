package idemtest

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/go-idempotency/idempotency"
)

// A Shop is a server with one Middleware, whose handler answers 201 "charge N"
// in its Nth run unless the test says otherwise.
type Shop struct {
	*httptest.Server
	Runs atomic.Int64
}

// OpenShop opens a Shop that closes with the test.
func OpenShop(t *testing.T, store idempotency.Store, opts *idempotency.Options, handler http.HandlerFunc) *Shop {
	s := new(Shop)
	charge := func(w http.ResponseWriter, r *http.Request) {
		n := s.Runs.Add(1)
		if handler != nil {
			handler(w, r)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "charge %d", n)
	}
	s.Server = httptest.NewServer(idempotency.Middleware(store, opts)(http.HandlerFunc(charge)))
	t.Cleanup(s.Close)
	return s
}

// Post returns the status and body of the answer, and "replayed" if it says so.
func (s *Shop) Post(key string) string {
	r, err := http.NewRequest(http.MethodPost, s.URL+"/charge", strings.NewReader(`{"amount":1}`))
	if err != nil {
		return err.Error()
	}
	r.Header.Set("Idempotency-Key", key)
	resp, err := s.Client().Do(r)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	answer := fmt.Sprintf("%d %s", resp.StatusCode, body)
	if resp.StatusCode >= 400 {
		answer = resp.Status
	}
	if resp.Header.Get("Idempotent-Replayed") != "" {
		answer += " replayed"
	}
	return answer
}
