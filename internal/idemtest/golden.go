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
const GoldenResponse = "0101c901002c04" + // version, kind, status 201, no digest, 44 bytes of head with 4 values
	"03" + "0003582d41020131" + "0132" + // 3 fields; set X-A
	"0206582d476f6e6500" + // delete X-Gone
	"0106582d4d6f7265010132" + // add to X-More
	"01" + "0003582d5401" + "0474" + "61696c" + // 1 trailer
	"05" + "68656c6c6f"

// GoldenCommon has headers that are stored as numbers: Content-Type and its
// value, Location and X-Request-Id, the last of the list.
const GoldenCommon = "0101c901000d03" + "03" + "20" + "3c042f632f31" + "4f0137" + "00" + "027b7d"

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
