package idemtest

import (
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// GoldenResponse is a record as release 1 wrote it: 201, X-A: 1, X-A: 2, a
// deleted X-Gone, X-More added to, trailer X-T, body "hello". It must stay
// readable for ever.
const GoldenResponse = "11c901002604" + // version and kind, status 201, no digest, 38 bytes of head with 4 values
	"03" + "0f582d41" + "020131" + "0132" + // 3 fields; set X-A to a list
	"1a582d476f6e65" + // delete X-Gone
	"19582d4d6f7265" + "010132" + // add to X-More
	"01" + "0c582d54" + "047461696c" + // 1 trailer; set X-T to one value
	"05" + "68656c6c6f"

// Stored returns a store in which the cell of Exchange{Key: "a"} has value.
func Stored(t testing.TB, value []byte) idempotency.Store {
	return StoredUnder(t, value, nil)
}

// StoredUnder is Stored with another fingerprint than that of the request.
func StoredUnder(t testing.TB, value, fingerprint []byte) idempotency.Store {
	s := &FaultyStore{Store: idempotency.NewMemoryStore()}
	opts := idempotency.Options{}
	probe := NewClient(s, &opts, nil)
	probe.Do(probe.Request(Exchange{Key: "a"}))
	golden := idempotency.NewMemoryStore()
	result := s.LastResult()
	result.Value, result.TTL = value, time.Hour
	if fingerprint != nil {
		result.Fingerprint = fingerprint
	}
	require.NoError(t, golden.Complete(t.Context(), s.LastKey(), "1", result))
	return golden
}
