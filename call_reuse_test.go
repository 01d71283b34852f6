package idempotency_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// What serves a request from memory serves another one after it, of another
// middleware perhaps. Nothing of the first is left for the second: not its
// scope, its body, its key, nor the time that it waited.
func TestCallsAreReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &idemtest.EventLog{}
		scoped := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
			Scope:           func(*http.Request) string { return "acme" },
			MaxBufferedBody: 4, // bodies are large
		}, idemtest.Lasting(time.Second))
		plain := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add, RequireKey: true}, nil)

		plain.Check(t, 0, idemtest.Exchange{Key: "a", Get: "201 charge 1"})
		var first sync.WaitGroup
		first.Go(func() { scoped.Check(t, 1, idemtest.Exchange{Key: "a", Get: "201 charge 1"}) })
		synctest.Wait()
		for i := range 20 {
			// The first of these waits.
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			plain.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			require.Zero(t, events.Last().Waited)
			require.Zero(t, events.Last().Attempt)
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Body: "other", Get: "422 key_reused"})
			plain.Check(t, i, idemtest.Exchange{Get: "400 key_missing"})
			require.Empty(t, events.Last().StoreKey)
			scoped.Check(t, i, idemtest.Exchange{Key: "a", Get: "replay 201 charge 1"})
			name := fmt.Sprint("b", i)
			plain.Check(t, i, idemtest.Exchange{Key: name, Get: fmt.Sprint("201 charge ", i+2)})
			plain.Check(t, i, idemtest.Exchange{Key: name, Body: "x", Get: "422 key_reused"})
		}
		first.Wait()
		require.Equal(t, 1, scoped.Runs())
		require.Equal(t, 21, plain.Runs())
	})
}

// What a caller keeps of an event is not changed by what comes after it.
func TestEventsStayAsTheyWere(t *testing.T) {
	events := &idemtest.EventLog{}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.Add}, nil)
	var keys []string
	for i := range 50 {
		c.Do(c.Request(idemtest.Exchange{Key: fmt.Sprint("k", i%10)}))
		keys = append(keys, strings.Clone(events.Last().StoreKey))
	}
	for i, e := range events.Events() {
		require.Equal(t, keys[i], e.StoreKey)
		require.Equal(t, keys[i%10], e.StoreKey)
	}
}

// Requests that follow each other share buffers. A response that is stored in
// the background, long after its request, is the one that was answered.
func TestBackgroundStoresWhatWasAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
		c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Key", idemtest.Execution(r).Key())
			w.WriteHeader(http.StatusCreated)
			_, err := io.Copy(w, r.Body)
			idemtest.Must(err)
		})
		store.Fail("Complete", errors.New("down"))
		body := func(i int) string { return strings.Repeat(fmt.Sprint("body ", i, " "), 10+200*i) }
		for i := range 10 {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: body(i), Get: "201 " + body(i)})
		}
		store.Fail("Complete", nil)
		time.Sleep(20 * time.Second)
		for i := range 10 {
			c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint(i), Body: body(i), Get: "replay 201 " + body(i)})
		}
		require.Equal(t, 10, c.Runs())
	})
}

// Many clients at once get their own answers, first, replayed and cut short by
// a limit, whatever buffers they share on the way.
func TestAnswersAreNotMixedUp(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 40 << 10}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		w.Header().Set("X-Body", string(body))
		for range 5 {
			_, err = w.Write(bytes.Repeat(body, 1+len(body)%3000))
			idemtest.Must(err)
		}
	})
	var clients sync.WaitGroup
	for n := range 8 {
		clients.Go(func() {
			for i := range 60 {
				body := fmt.Sprintf("client %d request %d %s", n, i, strings.Repeat("x", i%7*(i%11)))
				want := "200 " + strings.Repeat(body, 5*(1+len(body)%3000))
				x := idemtest.Exchange{Key: fmt.Sprint(n, "-", i), Body: body}
				got, _ := idemtest.Describe(t, c.Do(c.Request(x)))
				if got != want {
					t.Errorf("client %d got another answer to request %d", n, i)
				}
				if len(want) > 40<<10 {
					want = "409 response_not_stored"
				} else {
					want = "replay " + want
				}
				for range 2 {
					if got, _ := idemtest.Describe(t, c.Do(c.Request(x))); got != want {
						t.Errorf("client %d got another replay of request %d", n, i)
					}
				}
			}
		})
	}
	clients.Wait()
	require.Equal(t, 8*60, c.Runs())
}

// A response that is streamed because it is too large gives its buffer back
// once. Two who hold the same one would answer with each other's bytes.
func TestLargeResponsesDoNotShareBuffers(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 100}
	large := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			_, err := w.Write(make([]byte, 60))
			idemtest.Must(err)
		}
	})
	for i := range 20 {
		large.Do(large.Request(idemtest.Exchange{Key: fmt.Sprint(i)}))
	}
	depth := 0
	var c *idemtest.Client
	c = idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		key := idemtest.Execution(r).Key()
		_, err := io.WriteString(w, key+" begins, ")
		idemtest.Must(err)
		if depth++; depth < 20 { // another request on the same goroutine, in the middle of this one
			c.Check(t, depth, idemtest.Exchange{Key: fmt.Sprint("key", depth), Get: fmt.Sprintf("200 key%d begins, key%d ends", depth, depth)})
		}
		_, err = io.WriteString(w, key+" ends")
		idemtest.Must(err)
	})
	c.Check(t, 0, idemtest.Exchange{Key: "key0", Get: "200 key0 begins, key0 ends"})
	for i := range 20 {
		c.Check(t, i, idemtest.Exchange{Key: fmt.Sprint("key", i), Get: fmt.Sprintf("replay 200 key%d begins, key%d ends", i, i)})
	}
	require.Equal(t, 20, c.Runs())
}

// What is kept of a large response is neither the buffer that the next one is
// captured in nor what the handler wrote from and goes on using.
func TestLargeAnswersStayAsTheyWere(t *testing.T) {
	for _, writes := range []int{1, 20} {
		t.Run(fmt.Sprint(writes, " writes"), func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := idemtest.NewClient(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					part := bytes.Repeat([]byte(idemtest.Execution(r).Key()), 20_000/writes)
					for range writes {
						_, err := w.Write(part)
						idemtest.Must(err)
					}
					clear(part)
				})
				answer := func(key string) string { return "200 " + strings.Repeat(key, 20_000) }
				keys := strings.Split("ab cd ef gh ij kl mn op", " ")
				for i, key := range keys {
					c.Check(t, i, idemtest.Exchange{Key: key, Get: answer(key)})
				}
				for i, key := range keys {
					c.Check(t, i, idemtest.Exchange{Key: key, Get: "replay " + answer(key)})
				}
			})
		})
	}
}
