package idempotency_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// FailOpen is for a store that is down. A cell that cannot be read is evidence
// that a handler may have run.
func TestRedisForeignCellDoesNotFailOpen(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		require.NoError(t, client.FlushAll(t.Context()).Err())
		shop := idemtest.OpenShop(t, idempotency.NewRedisStore(client, nil), &idempotency.Options{FailOpen: true}, nil)
		require.Contains(t, shop.Post("key"), "201")
		name := client.Keys(t.Context(), "idem:*").Val()[0]
		cell := client.Get(t.Context(), name).Val()
		require.NoError(t, client.Set(t.Context(), name, "\x1e"+cell[1:], time.Hour).Err())
		require.Equal(t, "503 Service Unavailable", shop.Post("key"))
		require.EqualValues(t, 1, shop.Runs.Load())
	})
}

// A value that is no record of this release is never taken for a free key, and
// the store does not change it.
func TestRedisForeignCells(t *testing.T) {
	valid := func(t *testing.T, store idempotency.Store, client *redis.Client) string {
		acquireAs(t, store, "valid", "A")
		return client.Get(t.Context(), "idem:valid").Val()
	}
	rows := map[string]func(t *testing.T, store idempotency.Store, client *redis.Client) any{
		"empty":       func(*testing.T, idempotency.Store, *redis.Client) any { return "" },
		"text":        func(*testing.T, idempotency.Store, *redis.Client) any { return strings.Repeat("text ", 20) },
		"truncated":   func(t *testing.T, s idempotency.Store, c *redis.Client) any { v := valid(t, s, c); return v[:len(v)-1] },
		"header only": func(t *testing.T, s idempotency.Store, c *redis.Client) any { return valid(t, s, c)[:21] },
		"no header":   func(t *testing.T, s idempotency.Store, c *redis.Client) any { return valid(t, s, c)[:3] },
		"newer": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			v := valid(t, s, c)
			return "\x1e" + v[1:]
		},
		"newer record": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			acquireAs(t, s, "valid", "A")
			require.NoError(t, s.Complete(t.Context(), "valid", "A", idempotency.Result{Fingerprint: []byte("print"), Value: []byte("v"), TTL: time.Hour}))
			v := c.Get(t.Context(), "idem:valid").Val()
			return "\x1e" + v[1:]
		},
		"longer claim of another request": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			other := claimOf("B")
			other.Fingerprint = []byte("other")
			_, err := s.Acquire(t.Context(), "valid", other)
			require.NoError(t, err)
			return c.Get(t.Context(), "idem:valid").Val() + "x"
		},
		"unknown state": func(t *testing.T, s idempotency.Store, c *redis.Client) any {
			v := valid(t, s, c)
			return v[:1] + "X" + v[2:]
		},
		"another type": nil,
	}
	eachRedis(t, func(t *testing.T, addr string) {
		for name, content := range rows {
			t.Run(name, func(t *testing.T) {
				client := idemtest.DialRedis(t, addr)
				store := idempotency.NewRedisStore(client, nil)
				require.NoError(t, client.FlushAll(t.Context()).Err())
				if content == nil {
					require.NoError(t, client.LPush(t.Context(), "idem:key", "value").Err())
				} else {
					require.NoError(t, client.Set(t.Context(), "idem:key", content(t, store, client), 0).Err())
				}
				before := client.Dump(t.Context(), "idem:key").Val()

				_, err := store.Acquire(t.Context(), "key", claimOf("A"))
				require.Error(t, err)
				_, err = store.Acquire(t.Context(), "key", renewalOf("A", 1))
				require.Error(t, err)
				err = store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour})
				require.Error(t, err)
				require.NotErrorIs(t, err, idempotency.ErrLeaseLost)
				require.Error(t, store.Release(t.Context(), "key", "A", time.Minute))
				require.Equal(t, before, client.Dump(t.Context(), "idem:key").Val())

				shop := idemtest.OpenShop(t, store, nil, nil)
				require.NoError(t, client.FlushAll(t.Context()).Err())
				require.Equal(t, "201 charge 1", shop.Post("key"), "a key of its own is not disturbed")
			})
		}
	})
}

// Without an expiry Redis cannot tell when the lease of a claim is over.
func TestRedisClaimWithoutExpiry(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		acquireAs(t, store, "key", "A")
		require.NoError(t, client.Persist(t.Context(), "idem:key").Err())
		_, err := store.Acquire(t.Context(), "key", claimOf("B"))
		require.Error(t, err)
	})
}

// A cell has an expiry whatever happens to it.
func TestRedisKeysExpire(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		ttl := func() time.Duration { return client.PTTL(t.Context(), "idem:key").Val() }
		about := func(want time.Duration) {
			t.Helper()
			require.InDelta(t, want.Seconds(), ttl().Seconds(), 30)
		}
		acquireAs(t, store, "key", "A")
		about(time.Hour)
		acquireAs(t, store, "key", "B") // marks the cell
		about(time.Hour)
		require.NoError(t, store.Release(t.Context(), "key", "A", time.Minute))
		about(time.Minute)
		acquireAs(t, store, "key", "B")
		about(time.Hour)
		require.NoError(t, store.Complete(t.Context(), "key", "B", idempotency.Result{TTL: 2 * time.Hour}))
		about(2 * time.Hour)
		require.NoError(t, client.Del(t.Context(), "idem:key").Err())
		require.NoError(t, store.Release(t.Context(), "key", "C", time.Minute))
		about(time.Minute)
	})
}

func TestRedisDurationsAreRoundedUp(t *testing.T) {
	store := newMiniStore(t, nil)
	claim := claimOf("A")
	claim.Lease, claim.TTL = 1500*time.Microsecond, time.Nanosecond
	_, err := store.Acquire(t.Context(), "key", claim)
	require.NoError(t, err)
	require.Equal(t, 2*time.Millisecond, store.mini.TTL("idem:key"))
	require.NoError(t, store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Microsecond}))
	require.Equal(t, time.Millisecond, store.mini.TTL("idem:key"))
}

// A lease holds to the millisecond, and no longer.
func TestRedisLeaseEndsToTheMillisecond(t *testing.T) {
	s := newMiniStore(t, nil)
	acquireAs(t, s, "key", "A")
	s.mini.FastForward(time.Minute)
	rec := acquireAs(t, s, "key", "B")
	require.Equal(t, idempotency.InProgress, rec.State, "Redis counts whole milliseconds: the last may have just begun")
	require.Equal(t, time.Millisecond, rec.Remaining)
	s.mini.FastForward(time.Millisecond)
	require.Equal(t, idempotency.Acquired, acquireAs(t, s, "key", "B").State)
}

// A record takes 11 bytes more than its fingerprint and its value. There are
// millions of them, so no byte may come in unnoticed.
func TestRedisCellSizes(t *testing.T) {
	store := newMiniStore(t, nil)
	size := func() int {
		cell, err := store.mini.Get("idem:key")
		require.NoError(t, err)
		return len(cell)
	}
	token := strings.Repeat("t", 22)
	fingerprint, value := []byte(strings.Repeat("f", 16)), []byte(strings.Repeat("v", 200))
	claim := claimOf(token)
	claim.Fingerprint = fingerprint
	_, err := store.Acquire(t.Context(), "key", claim)
	require.NoError(t, err)
	require.Equal(t, 21+22+16, size(), "claimed")
	result := idempotency.Result{Fingerprint: fingerprint, Value: value, TTL: time.Hour}
	require.NoError(t, store.Complete(t.Context(), "key", token, result))
	require.Equal(t, 11+16+200, size(), "completed")
	store.mini.Del("idem:key")
	require.NoError(t, store.Release(t.Context(), "key", token, time.Minute))
	require.Equal(t, 8+22, size(), "released")
}

func TestRedisLongFingerprintIsAnError(t *testing.T) {
	store := newMiniStore(t, nil)
	claim := claimOf("A")
	for _, attempt := range []int{0, 1} {
		claim.Attempt, claim.Fingerprint = attempt, make([]byte, 256)
		_, err := store.Acquire(t.Context(), "key", claim)
		require.ErrorContains(t, err, "fingerprint of up to 255 bytes")
	}
	err := store.Complete(t.Context(), "key", "A", idempotency.Result{Fingerprint: claim.Fingerprint, TTL: time.Hour})
	require.ErrorContains(t, err, "fingerprint of up to 255 bytes")
	require.False(t, store.mini.Exists("idem:key"))

	claim.Attempt, claim.Fingerprint = 0, make([]byte, 255)
	_, err = store.Acquire(t.Context(), "key", claim)
	require.NoError(t, err)
	other := claimOf("B")
	other.Fingerprint = append(make([]byte, 254), 1)
	rec, err := store.Acquire(t.Context(), "key", other)
	require.NoError(t, err)
	require.Equal(t, idempotency.Mismatch, rec.State)
}

func TestRedisLongTokenIsAnError(t *testing.T) {
	store := newMiniStore(t, nil)
	_, err := store.Acquire(t.Context(), "key", claimOf(strings.Repeat("x", 256)))
	require.ErrorContains(t, err, "255 bytes")
	require.False(t, store.mini.Exists("idem:key"))
}

func TestRedisAttemptsCountFar(t *testing.T) {
	store := newMiniStore(t, nil)
	for n := 1; n <= 600; n++ { // over the edge of a byte, twice
		token := fmt.Sprint("token ", n)
		require.Equal(t, n, acquireAs(t, store, "key", token).Attempt)
		require.NoError(t, store.Release(t.Context(), "key", token, time.Minute))
		if n > 1 { // the marker of the first is kept for as long as it is said to be
			require.Greater(t, store.mini.TTL("idem:key"), time.Minute, n)
		}
	}
}

func TestRedisForgetsScripts(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		flush := func() { require.NoError(t, client.ScriptFlush(t.Context()).Err()) }
		flush()
		require.Equal(t, idempotency.Acquired, acquireAs(t, store, "key", "A").State)
		flush()
		require.Equal(t, idempotency.InProgress, acquireAs(t, store, "key", "B").State)
		flush()
		require.NoError(t, store.Complete(t.Context(), "key", "A", idempotency.Result{TTL: time.Hour}))
		flush()
		require.Equal(t, idempotency.Completed, acquireAs(t, store, "key", "B").State)

		acquireAs(t, store, "other", "A")
		flush()
		require.NoError(t, store.Release(t.Context(), "other", "A", time.Minute))
		require.Equal(t, 2, acquireAs(t, store, "other", "B").Attempt)
	})
}

// A caller that was answered InProgress is told of the end of the claim, whatever
// became of it meanwhile: the mark in the cell outlives renewals and take-overs.
func TestRedisWatchedMark(t *testing.T) {
	complete := func(t *testing.T, s miniStore, token string) {
		require.NoError(t, s.Complete(t.Context(), "key", token, idempotency.Result{TTL: time.Hour}))
	}
	for name, end := range map[string]func(t *testing.T, s miniStore, acquire func(token string) idempotency.State){
		"completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) { complete(t, s, "A") },
		"released": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			require.NoError(t, s.Release(t.Context(), "key", "A", time.Minute))
		},
		"renewed and completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			for _, once := range []bool{false, true} {
				renewal := renewalOf("A", 1)
				renewal.Once = once
				rec, err := s.Acquire(t.Context(), "key", renewal)
				require.NoError(t, err)
				require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 1, Once: once}, rec)
			}
			complete(t, s, "A")
		},
		"claimed twice and completed": func(t *testing.T, s miniStore, acquire func(string) idempotency.State) {
			require.Equal(t, idempotency.Acquired, acquire("A"))
			complete(t, s, "A")
		},
		"taken over and completed": func(t *testing.T, s miniStore, acquire func(string) idempotency.State) {
			s.mini.FastForward(time.Minute + time.Millisecond)
			require.Equal(t, idempotency.Acquired, acquire("C"))
			complete(t, s, "C")
		},
		"expired and completed": func(t *testing.T, s miniStore, _ func(string) idempotency.State) {
			s.mini.FastForward(2 * time.Hour)
			complete(t, s, "A")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newMiniStore(t, nil)
			acquire := func(token string) idempotency.State { return acquireAs(t, s, "key", token).State }
			messages := idemtest.DialRedis(t, s.mini.Addr()).Subscribe(t.Context(), "idem:key............................")
			t.Cleanup(func() { _ = messages.Close() })
			_, err := messages.Receive(t.Context())
			require.NoError(t, err)
			require.Equal(t, idempotency.Acquired, acquire("A"))
			require.Equal(t, idempotency.InProgress, acquire("B"))
			end(t, s, acquire)
			_, err = messages.ReceiveTimeout(t.Context(), 10*time.Second)
			require.NoError(t, err)
		})
	}
}

// The mark that a caller watches neither sets nor unsets Once.
func TestRedisWatchedMarkLeavesOnce(t *testing.T) {
	for _, once := range []bool{false, true} {
		s := newMiniStore(t, nil)
		acquireAs(t, s, "key", "A")
		mark := renewalOf("A", 1)
		mark.Once = once
		rec, err := s.Acquire(t.Context(), "key", mark)
		require.NoError(t, err)
		require.Equal(t, once, rec.Once)
		for range 2 { // the second finds the mark
			require.Equal(t, idempotency.InProgress, acquireAs(t, s, "key", "B").State)
		}
		s.mini.FastForward(2 * time.Minute)
		want := idempotency.Acquired
		if once {
			want = idempotency.Abandoned
		}
		require.Equal(t, want, acquireAs(t, s, "key", "C").State)
	}
}

// Complete publishes only after a caller was answered InProgress.
func TestRedisPublishesOnlyForWaiters(t *testing.T) {
	eachRedis(t, func(t *testing.T, addr string) {
		client := idemtest.DialRedis(t, addr)
		store := idempotency.NewRedisStore(client, nil)
		messages := client.Subscribe(t.Context(), "idem:key............................", "the end")
		t.Cleanup(func() { _ = messages.Close() })
		_, err := messages.Receive(t.Context())
		require.NoError(t, err)

		finish := func(token string) {
			require.NoError(t, store.Complete(t.Context(), "key", token, idempotency.Result{TTL: time.Hour}))
			require.NoError(t, client.Del(t.Context(), "idem:key").Err())
		}
		acquireAs(t, store, "key", "A")
		finish("A")
		acquireAs(t, store, "key", "A")
		acquireAs(t, store, "key", "B")
		finish("A")
		acquireAs(t, store, "key", "A")
		finish("A")
		require.NoError(t, client.Publish(t.Context(), "the end", "").Err())
		for _, channel := range []string{"idem:key............................", "the end"} {
			m, err := messages.ReceiveMessage(t.Context())
			require.NoError(t, err)
			require.Equal(t, channel, m.Channel)
		}
	})
}
