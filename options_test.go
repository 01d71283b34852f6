package idempotency_test

import (
	"bytes"
	"context"
	"crypto/cipher"
	"log/slog"
	"math"
	"net/http"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestOptionsThatAreNonsense(t *testing.T) {
	for fix, opts := range map[string]idempotency.Options{
		"TTL is negative":                     {TTL: -1},
		"over 100 years":                      {TTL: math.MaxInt64},
		"MaxBufferedBody is negative or over": {MaxBufferedBody: math.MaxInt64},
		"Lease is under 1ms":                  {Lease: -1},
		"exceeds Options.TTL":                 {Lease: time.Hour, TTL: time.Minute},
		"use NoWait":                          {Wait: -2},
		"MaxWaiting is negative":              {MaxWaiting: -1},
		"MaxExecution is negative":            {MaxExecution: -1},
		"StoreTimeout is negative":            {StoreTimeout: -1},
		"exceeds half of":                     {StoreTimeout: 20 * time.Second},
		"is not a header name":                {Header: "Idempotency Key"},
		"needs no idempotency key":            {Methods: []string{"POST", "GET"}},
		"upper-case":                          {Methods: []string{"post"}},
		"which is not a header name":          {FingerprintHeaders: []string{"X Tenant"}},
		"MaxBufferedBody is negative":         {MaxBufferedBody: -1},
		"MaxResponseBytes is negative":        {MaxResponseBytes: -1},
		"is not a URL":                        {DocsURL: "https://x/>"},
	} {
		t.Run(fix, func(t *testing.T) {
			defer func() { require.Contains(t, recover(), fix) }()
			idempotency.Middleware(idempotency.NewMemoryStore(), &opts)
		})
	}
	require.Panics(t, func() { idempotency.Middleware(nil, nil) })
	require.Panics(t, func() { idempotency.Middleware(idempotency.NewMemoryStore(), nil)(nil) })
}

// A callback that panics after the handler finished must not make it run again.
func TestPanickingCallbacks(t *testing.T) {
	for name, row := range map[string]struct {
		opts idempotency.Options
		then string
	}{
		"ShouldStore":          {idempotency.Options{ShouldStore: func(int, http.Header) bool { panic("bug") }}, "replay 201 charge 1"},
		"OnEvent":              {idempotency.Options{OnEvent: func(context.Context, idempotency.Event) { panic("bug") }}, "replay 201 charge 1"},
		"ReplayHeader":         {idempotency.Options{ReplayHeader: func(string) bool { panic("bug") }}, "409 response_not_stored"},
		"AEAD":                 {idempotency.Options{AEAD: panickingAEAD{}}, "409 response_not_stored"},
		"ReplayHeader, sealed": {idempotency.Options{AEAD: newAEAD(t, 1), ReplayHeader: func(string) bool { panic("bug") }}, "409 response_not_stored"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			row.opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
			store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
			c := idemtest.NewClient(store, &row.opts, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Some", "header")
				idemtest.Lasting(0)(w, r)
			})
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
			require.Contains(t, log.String(), "panic in")
			got, _ := idemtest.Describe(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
			require.Equal(t, row.then, got)
			require.Equal(t, 1, c.Runs())
			if row.opts.AEAD != nil {
				require.NotContains(t, string(store.LastResult().Value), "charge")
			}
		})
	}
}

type panickingAEAD struct{ cipher.AEAD }

func (panickingAEAD) NonceSize() int { panic("bug") }
