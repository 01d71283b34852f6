package idempotency

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A claim that came late is given back in the background, by its call. Were that
// reused meanwhile, the claim of another request would be given back. No test
// from outside can make a MemoryStore late.
func TestCallThatGivesBackIsNotReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := NewMemoryStore()
		h := Middleware(store, nil)(http.NotFoundHandler()).(*handler)
		c := &call{arrival: arrival{
			handler: h, r: httptest.NewRequest(http.MethodPost, "/charge", nil), storeKey: "cell", token: "late",
		}}
		rec, err := c.tryClaim()
		require.NoError(t, err)
		require.Equal(t, Acquired, rec.State)

		c.uncertain.Store(true)
		c.giveBack()
		c.recycle()
		time.Sleep(time.Second)
		rec, err = store.Acquire(t.Context(), "cell", Claim{Token: "late", Lease: time.Minute, TTL: time.Hour})
		require.NoError(t, err)
		require.Equal(t, Lost, rec.State, "given back")
	})
}
