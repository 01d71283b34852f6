package main

import (
	"database/sql/driver"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
	"modernc.org/sqlite"
)

// virtualNow is the time of SQLite in milliseconds, or 0 for the real one.
var virtualNow atomic.Int64

func init() {
	sqlite.MustRegisterScalarFunction("unixepoch", 1, func(*sqlite.FunctionContext, []driver.Value) (driver.Value, error) {
		now := virtualNow.Load()
		if now == 0 {
			now = time.Now().UnixMilli()
		}
		return float64(now) / 1000, nil
	})
}

// What a client sees when a call goes wrong is what the table of the library
// says, as with a MemoryStore.
func TestStoreCalls(t *testing.T) {
	db := openNew(t)
	_, err := db.ExecContext(t.Context(), `PRAGMA synchronous = OFF`) // nothing crashes here
	require.NoError(t, err)
	t.Cleanup(func() { virtualNow.Store(0) })
	idemtest.CheckStoreCalls(t, "../..", newStore(t, db), func(now time.Time) { virtualNow.Store(now.UnixMilli()) })
}
