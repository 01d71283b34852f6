package idempotency_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// The client's end is not that of a store call, in whichever way a store, or
// what it is built on, looks at its context.
func TestStoreCallsOutliveTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var kept []context.Context
		seen := map[string]int{}
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, method string) {
			require.NoError(t, ctx.Err())
			require.NoError(t, context.Cause(ctx))
			require.Equal(t, "acme", ctx.Value(tenantKey{}))
			deadline, ok := ctx.Deadline()
			require.True(t, ok)
			require.LessOrEqual(t, time.Until(deadline), time.Second, "StoreTimeout")
			mu.Lock()
			defer mu.Unlock()
			seen[method]++
			kept = append(kept, ctx)
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			idemtest.Must(idemtest.Execution(r).Commit(r.Context()))
			time.Sleep(time.Minute) // renewals
			w.WriteHeader(http.StatusCreated)
		})
		ctx, hangUp := context.WithCancel(context.WithValue(t.Context(), tenantKey{}, "acme"))
		hangUp()
		c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		freeing := idemtest.NewClient(store, &idempotency.Options{}, idemtest.Answering(503))
		freeing.Do(freeing.Request(idemtest.Exchange{Key: "b"}).WithContext(ctx))
		require.Greater(t, seen["Acquire"], 4)
		require.Equal(t, 1, seen["Complete"])
		require.Equal(t, 1, seen["Release"])
		for _, ctx := range kept {
			require.ErrorIs(t, ctx.Err(), context.Canceled, "the call is over")
			<-ctx.Done()
		}
	})
}

// A store that waits for Done is let go in time, though it looked at its context
// before that.
func TestStoreCallsEndInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, _ string) {
			require.NoError(t, ctx.Err())
			start := time.Now()
			<-ctx.Done()
			require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
			require.ErrorIs(t, context.Cause(ctx), context.DeadlineExceeded)
			took = append(took, time.Since(start))
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, nil)
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		c.Do(c.Request(idemtest.Exchange{Key: "a"}).WithContext(ctx))
		require.Equal(t, []time.Duration{time.Second / 2, time.Second / 2}, took)
	})
}

// So is one that only asks now and then whether it may go on.
func TestStoreCallsKnowTheirEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(ctx context.Context, _ string) {
			deadline, _ := ctx.Deadline()
			time.Sleep(time.Until(deadline) - 1)
			require.NoError(t, ctx.Err())
			time.Sleep(time.Nanosecond)
			require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
			<-ctx.Done()
		}}
		c := idemtest.NewClient(store, &idempotency.Options{}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	})
}

// A goroutine that the handler leaves behind reads nothing of the body from the
// moment on at which the response is put together: it may take the place of the
// body.
func TestBodyIsClosedBeforeTheResponseIsStored(t *testing.T) {
	for name, body := range map[string]string{"small": "small", "large": upload(500, 'x')} {
		t.Run(name, func(t *testing.T) {
			var left *http.Request
			looked := false
			store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
				if method == "Complete" {
					looked = true
					n, err := left.Body.Read(make([]byte, 10))
					require.Zero(t, n)
					require.ErrorIs(t, err, http.ErrBodyReadAfterClose)
				}
			}}
			c := idemtest.NewClient(store, &idempotency.Options{MaxBufferedBody: 64}, func(_ http.ResponseWriter, r *http.Request) { left = r })
			c.Check(t, 0, idemtest.Exchange{Key: "a", Body: body, Get: "200 "})
			require.True(t, looked)
		})
	}
}

// What a client has seen a retry must be able to see again.
func TestStoredBeforeSent(t *testing.T) {
	for _, status := range []int{201, 503} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			w := httptest.NewRecorder()
			settled := 0
			store := &idemtest.ObservedStore{Store: idempotency.NewMemoryStore(), Look: func(_ context.Context, method string) {
				if method != "Acquire" {
					settled++
					require.Zero(t, w.Body.Len())
				}
			}}
			c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(status)
				_, err := io.WriteString(w, "the answer")
				idemtest.Must(err)
			})
			c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
			require.Equal(t, 1, settled)
			require.Equal(t, status, w.Code)
			require.Equal(t, "the answer", w.Body.String())
		})
	}
}

// All of a response is sealed, as long as it may be, and never twice under the
// same nonce.
func TestSealedBodies(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 16))
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	for _, size := range []int{10, 1000, 10_000, 100_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				events := &idemtest.EventLog{}
				body := strings.Repeat("x", size)
				nonces := map[string]bool{}
				c := idemtest.NewClient(store, &idempotency.Options{AEAD: aead, OnEvent: events.Add}, func(w http.ResponseWriter, _ *http.Request) {
					_, err := io.WriteString(w, body)
					idemtest.Must(err)
				})
				for i := range 5 {
					key := fmt.Sprint("key", i)
					c.Check(t, i, idemtest.Exchange{Key: key, Get: "200 " + body})
					c.Check(t, i, idemtest.Exchange{Key: key, Get: "replay 200 " + body})
					rec, err := store.Acquire(t.Context(), events.Last().StoreKey,
						idempotency.Claim{Token: "1", Lease: time.Second, TTL: time.Second})
					require.NoError(t, err)
					require.Greater(t, len(rec.Value), size)
					require.NotContains(t, string(rec.Value), "xxxxxxxxxx")
					nonces[string(rec.Value[2:2+aead.NonceSize()])] = true
				}
				require.Len(t, nonces, 5)
			})
		})
	}
}

// What is refused for certain has made no claim, and none is given back.
func TestRefusalsCostNoRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{Wait: idempotency.NoWait}, idemtest.Lasting(time.Second))
		var first sync.WaitGroup
		first.Go(func() { c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 in_progress"})
		c.Check(t, 2, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
		first.Wait()
		store.Fail("Acquire", idempotency.ErrStoreFull)
		c.Check(t, 3, idemtest.Exchange{Key: "b", Get: "503 store_unavailable"})
		time.Sleep(time.Hour)
		require.Zero(t, store.Count("Release"))
		require.Equal(t, 4, store.Count("Acquire"), "a full store is not asked twice")
	})
}
