package idempotency_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// sent returns a request with the key, and a body of size bytes that nothing
// but the middleware holds. Without a declared length it is sent in chunks.
func sent(c *idemtest.Client, key string, size int64, declared bool) *http.Request {
	r := c.Request(idemtest.Exchange{Key: key})
	r.Body, r.ContentLength = io.NopCloser(io.LimitReader(zeros{}, size)), -1
	if declared {
		r.ContentLength = size
	}
	return r
}

// heapOfWaiting returns what thirty waiting duplicates take, beyond the first.
func heapOfWaiting(t *testing.T, opts *idempotency.Options, request func(c *idemtest.Client) *http.Request) (taken int64) {
	synctest.Test(t, func(t *testing.T) {
		opts.Wait = time.Hour
		c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, idemtest.Lasting(time.Minute))
		var all sync.WaitGroup
		all.Go(func() { c.Do(request(c)) })
		synctest.Wait()
		before := heap()
		for range 30 {
			all.Go(func() {
				resp := c.Do(request(c))
				if resp.Header.Get("Idempotent-Replayed") != "true" {
					t.Errorf("a duplicate got %v", resp.Status)
				}
			})
		}
		synctest.Wait()
		taken = heap() - before
		all.Wait()
		require.Equal(t, 1, c.Runs())
	})
	return taken
}

// Thirty duplicates that wait hold one body of 1 MiB, not thirty. With a
// body that is streamed they hold one beginning of it.
func TestWaitingDuplicatesShareABody(t *testing.T) {
	for name, row := range map[string]struct {
		size     int64
		declared bool
	}{
		"declared":           {1 << 20, true},
		"in chunks":          {1 << 20, false},
		"700 KiB, in chunks": {700 << 10, false},
		"streamed":           {2 << 20, false},
	} {
		t.Run(name, func(t *testing.T) {
			taken := heapOfWaiting(t, &idempotency.Options{}, func(c *idemtest.Client) *http.Request {
				return sent(c, "a", row.size, row.declared)
			})
			require.Less(t, taken, int64(4<<20), "thirty bodies would be 20 MiB or more")
		})
	}
}

// A duplicate with a body of 100 bytes gives back the 64 KiB of the pooled
// buffer that it read the body into.
func TestWaitingDuplicateWithASmallBody(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties the pool
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Wait: time.Hour}, idemtest.Lasting(time.Minute))
		before := heap()
		var all sync.WaitGroup
		for i := range 30 { // at the same time, so that the pool gets thirty large buffers
			all.Go(func() { c.Do(sent(c, fmt.Sprint(i), 60<<10, true)) })
		}
		all.Wait()
		for range 30 {
			all.Go(func() { c.Do(sent(c, "a", 100, true)) })
		}
		synctest.Wait()
		taken := heap() - before
		all.Wait()
		require.Less(t, taken, int64(800<<10), "thirty buffers would be 2 MiB")
	})
}

// A body that no request needs any more is not kept.
func TestSharedBodiesAreForgotten(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, idemtest.Answering(http.StatusCreated))
	before := heap()
	for i := range 30 {
		for range 2 {
			require.Equal(t, http.StatusCreated, c.Do(sent(c, fmt.Sprint(i), 1<<20, true)).StatusCode)
		}
	}
	taken := heap() - before
	c.Do(sent(c, "last", 1, true)) // keeps the middleware alive until here
	require.Less(t, taken, int64(4<<20), "thirty bodies would be 33 MiB")
}

// A duplicate that gets the key after all has the body whole, whoever read it
// first: the handlers read the same copy, one after the other, from its start.
// Other requests, which may get the buffer of a request that has ended, do not
// write to it.
func TestHandlerReadsASharedBody(t *testing.T) {
	for _, size := range []int{100, 60 << 10, 65 << 10, 1 << 20, 2 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				body := strings.Repeat("0123456", size/7+1)[:size]
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{Wait: time.Hour}, func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Idempotency-Key") != "a" {
						time.Sleep(time.Second)
						return
					}
					got, err := io.ReadAll(r.Body)
					require.NoError(t, err)
					attempt := idemtest.Execution(r).Attempt()
					require.True(t, body == string(got), "attempt %d read another body", attempt)
					time.Sleep(time.Minute)
					if attempt < 3 {
						panic("boom")
					}
					w.WriteHeader(http.StatusCreated)
				})
				var all sync.WaitGroup
				statuses := make([]string, 4)
				for i := range statuses {
					all.Go(func() {
						statuses[i] = "panic"
						if resp := c.Do(c.Request(idemtest.Exchange{Key: "a", Body: body})); resp != nil {
							statuses[i], _ = idemtest.Describe(t, resp)
						}
					})
				}
				for range 2 {
					time.Sleep(70 * time.Second) // an owner has died, and the next has not begun
					for i := range 20 {
						all.Go(func() {
							c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprintf("other-%d", time.Now().UnixNano()+int64(i)), Body: strings.Repeat("y", size)}))
						})
					}
				}
				all.Wait()
				require.ElementsMatch(t, []string{"panic", "panic", "201 ", "replay 201 "}, statuses)
			})
		})
	}
}

// A duplicate compares its streamed body after the first request was stored,
// which must not write to what they share.
func TestStreamedBodyIsComparedAfterTheFirstWasStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, idemtest.Lasting(time.Second))
		var all sync.WaitGroup
		for i, x := range []struct {
			size int64
			get  string
		}{{2 << 20, "201 charge 1"}, {2 << 20, "replay 201 charge 1"}, {2<<20 + 1, "422 key_reused"}} {
			all.Go(func() {
				got, _ := idemtest.Describe(t, c.Do(sent(c, "a", x.size, false)))
				if got != x.get {
					t.Errorf("request %d got %v", i, got)
				}
			})
			synctest.Wait()
		}
		all.Wait()
	})
}

// Bodies that a custom Fingerprint takes for one request are not one body: each
// handler reads what its client has sent.
func TestBodiesOfOneFingerprintAreNotShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		large := strings.Repeat("x", 100<<10)
		opts := &idempotency.Options{Wait: time.Hour, Fingerprint: func(*http.Request, []byte) []byte { return []byte("same") }}
		var mu sync.Mutex
		var read []string
		c := idemtest.NewClient(idempotency.NewMemoryStore(), opts, func(w http.ResponseWriter, r *http.Request) {
			got, err := io.ReadAll(r.Body)
			require.NoError(t, err)
			mu.Lock()
			read = append(read, string(bytes.TrimPrefix(got, []byte(large))))
			mu.Unlock()
			time.Sleep(time.Minute)
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		var all sync.WaitGroup
		for _, client := range []string{"one", "two", "three"} {
			all.Go(func() { c.Do(c.Request(idemtest.Exchange{Key: "a", Body: large + client})) })
		}
		all.Wait()
		require.ElementsMatch(t, []string{"one", "two", "three"}, read)
	})
}

// Requests that come and go at the same time, under few keys, read their own
// bodies. The race detector would tell of a buffer that is used twice.
func TestSharedBodiesUnderLoad(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		got, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		want := r.Header.Get("X-Letter")
		if len(got) == 0 || strings.Trim(string(got), want) != "" {
			panic("the body of another request")
		}
		w.WriteHeader(http.StatusTooManyRequests) // the next duplicate runs
	})
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for n := range 100 {
				letter := string(rune('a' + n%8))
				size := []int{100, 10 << 10, 60 << 10, 65 << 10}[n%4]
				r := c.Request(idemtest.Exchange{Key: letter, Body: strings.Repeat(letter, size), Header: http.Header{"X-Letter": {letter}}})
				if resp := c.Do(r); resp == nil {
					t.Errorf("goroutine %d: panic", i)
				}
			}
		})
	}
	all.Wait()
}
