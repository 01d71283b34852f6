package idempotency_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

func TestRecordsOfReleasesAreReadable(t *testing.T) {
	value, err := hex.DecodeString(idemtest.GoldenResponse)
	require.NoError(t, err)
	c := idemtest.NewClient(idemtest.Stored(t, value), &idempotency.Options{}, nil)
	w := httptest.NewRecorder()
	w.Header().Set("X-Gone", "outer")
	w.Header().Set("X-More", "1")
	c.Handler.ServeHTTP(w, c.Request(idemtest.Exchange{Key: "a"}))
	resp := w.Result()
	require.Equal(t, 201, resp.StatusCode)
	require.Equal(t, "hello", w.Body.String())
	require.Equal(t, []string{"1", "2"}, resp.Header["X-A"])
	require.Equal(t, []string{"1", "2"}, resp.Header["X-More"])
	require.NotContains(t, resp.Header, "X-Gone")
	require.Equal(t, "true", resp.Header.Get("Idempotent-Replayed"))
	require.Equal(t, []string{"tail"}, w.Header()["X-T"])

	value, err = hex.DecodeString("12c90100")
	require.NoError(t, err)
	c = idemtest.NewClient(idemtest.Stored(t, value), &idempotency.Options{}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 201})
}

// trustingStore answers with what it has, whoever asks.
type trustingStore struct{ idempotency.Store }

func (s trustingStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	c.Fingerprint = nil
	return s.Store.Acquire(ctx, key, c)
}

// A response is that of the request which it was stored for, even if the store
// does not look.
func TestRecordOfAnotherRequest(t *testing.T) {
	value, err := hex.DecodeString(idemtest.GoldenResponse)
	require.NoError(t, err)
	for name, fingerprint := range map[string][]byte{"another's": make([]byte, 32), "none": {}} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(trustingStore{idemtest.StoredUnder(t, value, fingerprint)}, &idempotency.Options{}, nil)
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "422 key_reused"})
		})
	}
}

// What a client must never see: a panic, a second run, or half a response.
func TestDamagedRecords(t *testing.T) {
	golden, err := hex.DecodeString(idemtest.GoldenResponse)
	require.NoError(t, err)
	damaged := map[string][]byte{
		"empty":            {},
		"no status":        {0x11},
		"a newer version":  append([]byte{0x21}, golden[1:]...),
		"an unknown kind":  append([]byte{0x19}, golden[1:]...),
		"a status of 103":  append([]byte{0x11, 103}, golden[3:]...),
		"a status of 1000": append([]byte{0x11, 0xe8, 0x07}, golden[3:]...),
		"one byte more":    append(append([]byte(nil), golden...), 0),
		"a huge head":      {0x11, 0xc9, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"a huge count":     {0x11, 0xc9, 1, 0, 5, 0xff, 0xff, 0xff, 0xff, 0x0f, 0},
		"a huge digest":    {0x11, 0xc9, 1, 0xff, 0xff, 0x7f},
		"a longer head":    {0x11, 0xc9, 1, 0, 4, 0, 0, 0, 9, 0},
		"a longer name":    {0x11, 0xc9, 1, 0, 5, 0, 1, 3<<2 | 2, 'x', 0, 0},
		"too few values":   {0x11, 0xc9, 1, 0, 6, 0, 1, 1 << 2, 'x', 0, 0, 0},
		"a longer value":   {0x11, 0xc9, 1, 0, 5, 1, 1, 1 << 2, 'x', 9, 0},
		"no kind it knows": {0x19, 0xc9, 1, 0},
		"more than status": {0x12, 0xc9, 1, 0, 0},
		"more than digest": {0x14, 0, 0},
		"a status of 1":    {0x12, 1, 0},
		"a list too long":  {0x11, 0xc9, 1, 0, 6, 1, 1, 1<<2 | 3, 'x', 2, 0, 0},
	}
	for n := range golden {
		damaged["cut at "+hex.EncodeToString([]byte{byte(n)})] = golden[:n]
	}
	for name, value := range damaged {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idemtest.Stored(t, value), &idempotency.Options{}, nil)
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
			require.Zero(t, c.Runs())
		})
	}
}

// Reading what pretends to have a great many headers takes no memory for them.
func TestHeadOfARecordIsBounded(t *testing.T) {
	const size = 8 << 20
	number := binary.AppendUvarint(nil, size)
	value := append([]byte{0x11, 0xc9, 1, 0}, number...) // version and kind, status 201, no digest, length of head
	value = append(append(value, number...), number...)  // so many values, so many fields
	value = append(value, make([]byte, size)...)
	c := idemtest.NewClient(idemtest.Stored(t, value), &idempotency.Options{}, nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
	runtime.ReadMemStats(&after)
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(size))
}

func newAEAD(t *testing.T, fill byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(bytes.Repeat([]byte{fill}, 32))
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	return aead
}

func TestAEAD(t *testing.T) {
	store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	sealed := idemtest.NewClient(store, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil)
	sealed.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	sealed.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
	require.NotContains(t, string(store.LastResult().Value), "charge")

	// A value that was moved to another cell is as bad as one that was forged.
	first := store.LastResult()
	value := first.Value
	sealed.Check(t, 2, idemtest.Exchange{Key: "b", Get: "201 charge 2"})
	moved := idempotency.NewMemoryStore()
	require.NoError(t, moved.Complete(t.Context(), store.LastKey(), "x", idempotency.Result{
		Fingerprint: store.LastResult().Fingerprint, Value: value, TTL: time.Hour,
	}))

	for name, c := range map[string]*idemtest.Client{
		"sealed under another key": idemtest.NewClient(store, &idempotency.Options{AEAD: newAEAD(t, 2)}, nil),
		"sealed, but no AEAD":      idemtest.NewClient(store, &idempotency.Options{}, nil),
	} {
		t.Run(name, func(t *testing.T) {
			c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
			require.Zero(t, c.Runs())
		})
	}
	t.Run("moved to another cell", func(t *testing.T) {
		c := idemtest.NewClient(moved, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil)
		c.Check(t, 0, idemtest.Exchange{Key: "b", Get: "500 record_unreadable"})
	})
	// Each of the two that a seal is bound to is enough.
	t.Run("moved to a cell of the same fingerprint", func(t *testing.T) {
		checkMoved(t, first, idemtest.Exchange{Key: "a", Target: "/refund"})
	})
	t.Run("given another fingerprint", func(t *testing.T) {
		other := idemtest.Exchange{Key: "a", Body: "other"}
		fingerprint := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(fingerprint, &idempotency.Options{}, nil)
		c.Do(c.Request(other))
		checkMoved(t, idempotency.Result{Fingerprint: fingerprint.LastResult().Fingerprint, Value: value}, other)
	})
	t.Run("cut off", func(t *testing.T) {
		for n := range value {
			checkMoved(t, idempotency.Result{Fingerprint: first.Fingerprint, Value: value[:n]}, idemtest.Exchange{Key: "a"})
		}
	})
	t.Run("not sealed, but AEAD", func(t *testing.T) {
		plain := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		idemtest.NewClient(plain, &idempotency.Options{}, nil).Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		idemtest.NewClient(plain, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil).Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
	})
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

// checkMoved checks that a sealed record is unreadable where x finds it.
func checkMoved(t *testing.T, record idempotency.Result, x idemtest.Exchange) {
	t.Helper()
	probe := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	c := idemtest.NewClient(probe, &idempotency.Options{}, nil)
	c.Do(c.Request(x))
	moved := idempotency.NewMemoryStore()
	record.TTL = time.Hour
	require.NoError(t, moved.Complete(t.Context(), probe.LastKey(), "x", record))
	x.Get = "500 record_unreadable"
	idemtest.NewClient(moved, &idempotency.Options{AEAD: newAEAD(t, 1)}, nil).Check(t, 0, x)
}

// Headers that are not kept leave no trace in the record.
func TestManyTransientValues(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		for range 500 {
			w.Header().Add("Set-Cookie", "a=b")
		}
		w.WriteHeader(http.StatusCreated)
	})
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 "})
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "replay 201 "})
}

// Outer middleware may append to what a replay has set.
func TestReplayedValuesAreApart(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("A", "a")
		w.Header().Set("B", "b")
		w.WriteHeader(http.StatusCreated)
	})
	inner := c.Handler
	c.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { inner.ServeHTTP(addingWriter{w}, r) })
	for range 2 {
		resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}))
		require.Equal(t, []string{"a", "more"}, resp.Header["A"])
		require.Equal(t, []string{"b", "more"}, resp.Header["B"])
	}
}

// addingWriter is what an outer middleware may hand on.
type addingWriter struct{ http.ResponseWriter }

func (w addingWriter) WriteHeader(status int) {
	w.Header().Add("A", "more")
	w.Header().Add("B", "more")
	w.ResponseWriter.WriteHeader(status)
}

// Of a response that is not stored nothing is kept in memory.
func TestResponseThatIsNotStoredTakesNoMemory(t *testing.T) {
	s := idempotency.NewMemoryStore()
	c := idemtest.NewClient(s, &idempotency.Options{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Huge", strings.Repeat("x", 100<<10))
		_, _ = w.Write(make([]byte, 200<<10))
	})
	require.NotNil(t, c.Do(c.Request(idemtest.Exchange{Key: "a"})))
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 200})
	require.Less(t, s.Bytes(), int64(1<<10))
}

// An AEAD that panics makes a record unreadable, for clients and operators.
func TestAEADThatPanicsWhenItOpens(t *testing.T) {
	events := &idemtest.EventLog{}
	store := idempotency.NewMemoryStore()
	aead := panickingOpen{newAEAD(t, 1)}
	c := idemtest.NewClient(store, &idempotency.Options{AEAD: aead, OnEvent: events.Add}, nil)
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "500 record_unreadable"})
	require.Equal(t, []string{"executed 201", "record_unreadable 500"}, events.All())

	key := events.Last().StoreKey
	cell, err := store.Inspect(t.Context(), key)
	require.NoError(t, err)
	_, err = cell.Response(key, aead)
	require.ErrorIs(t, err, idempotency.ErrRecordUnreadable)
}

type panickingOpen struct{ cipher.AEAD }

func (panickingOpen) Open(_, _, _, _ []byte) ([]byte, error) { panic("bug") }
