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
	"github.com/stretchr/testify/require"
)

// What serves a request from memory serves another one after it, of another
// middleware perhaps. Nothing of the first is left for the second: not its
// scope, its body, its key, nor the time that it waited.
func TestCallsAreReused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := &eventLog{}
		scoped := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{
			Scope:           func(*http.Request) string { return "acme" },
			MaxBufferedBody: 4, // bodies are large
		}, lasting(time.Second))
		plain := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.add, RequireKey: true}, nil)

		plain.check(t, 0, exchange{key: k("a"), get: "201 charge 1"})
		var first sync.WaitGroup
		first.Go(func() { scoped.check(t, 1, exchange{key: k("a"), get: "201 charge 1"}) })
		synctest.Wait()
		for i := range 20 {
			// The first of these waits.
			scoped.check(t, i, exchange{key: k("a"), get: "replay 201 charge 1"})
			plain.check(t, i, exchange{key: k("a"), get: "replay 201 charge 1"})
			require.Zero(t, events.last().Waited)
			require.Zero(t, events.last().Attempt)
			scoped.check(t, i, exchange{key: k("a"), body: "other", get: "422 key_reused"})
			plain.check(t, i, exchange{get: "400 key_missing"})
			require.Empty(t, events.last().StoreKey)
			scoped.check(t, i, exchange{key: k("a"), get: "replay 201 charge 1"})
			name := fmt.Sprint("b", i)
			plain.check(t, i, exchange{key: k(name), get: fmt.Sprint("201 charge ", i+2)})
			plain.check(t, i, exchange{key: k(name), body: "x", get: "422 key_reused"})
		}
		first.Wait()
		require.Equal(t, 1, scoped.runs())
		require.Equal(t, 21, plain.runs())
	})
}

// What a caller keeps of an event is not changed by what comes after it.
func TestEventsStayAsTheyWere(t *testing.T) {
	events := &eventLog{}
	c := newAPI(idempotency.NewMemoryStore(), &idempotency.Options{OnEvent: events.add}, nil)
	var keys []string
	for i := range 50 {
		c.do(c.request(exchange{key: k(fmt.Sprint("k", i%10))}))
		keys = append(keys, strings.Clone(events.last().StoreKey))
	}
	for i, e := range events.events {
		require.Equal(t, keys[i], e.StoreKey)
		require.Equal(t, keys[i%10], e.StoreKey)
	}
}

// Requests that follow each other share buffers. A response that is stored in
// the background, long after its request, is the one that was answered.
func TestBackgroundStoresWhatWasAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faultyStore{Store: idempotency.NewMemoryStore()}
		c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Key", execution(r).Key())
			w.WriteHeader(http.StatusCreated)
			_, err := io.Copy(w, r.Body)
			must(err)
		})
		store.fail("Complete", errors.New("down"))
		body := func(i int) string { return strings.Repeat(fmt.Sprint("body ", i, " "), 10+200*i) }
		for i := range 10 {
			c.check(t, i, exchange{key: k(fmt.Sprint(i)), body: body(i), get: "201 " + body(i)})
		}
		store.fail("Complete", nil)
		time.Sleep(20 * time.Second)
		for i := range 10 {
			c.check(t, i, exchange{key: k(fmt.Sprint(i)), body: body(i), get: "replay 201 " + body(i)})
		}
		require.Equal(t, 10, c.runs())
	})
}

// Many clients at once get their own answers, first, replayed and cut short by
// a limit, whatever buffers they share on the way.
func TestAnswersAreNotMixedUp(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 40 << 10}
	c := newAPI(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		must(err)
		w.Header().Set("X-Body", string(body))
		for range 5 {
			_, err = w.Write(bytes.Repeat(body, 1+len(body)%3000))
			must(err)
		}
	})
	var clients sync.WaitGroup
	for n := range 8 {
		clients.Go(func() {
			for i := range 60 {
				body := fmt.Sprintf("client %d request %d %s", n, i, strings.Repeat("x", i%7*(i%11)))
				want := "200 " + strings.Repeat(body, 5*(1+len(body)%3000))
				x := exchange{key: k(fmt.Sprint(n, "-", i)), body: body}
				got, _ := describe(t, c.do(c.request(x)))
				if got != want {
					t.Errorf("client %d got another answer to request %d", n, i)
				}
				if len(want) > 40<<10 {
					want = "409 response_not_stored"
				} else {
					want = "replay " + want
				}
				for range 2 {
					if got, _ := describe(t, c.do(c.request(x))); got != want {
						t.Errorf("client %d got another replay of request %d", n, i)
					}
				}
			}
		})
	}
	clients.Wait()
	require.Equal(t, 8*60, c.runs())
}

// A response that is streamed because it is too large gives its buffer back
// once. Two who hold the same one would answer with each other's bytes.
func TestLargeResponsesDoNotShareBuffers(t *testing.T) {
	opts := idempotency.Options{MaxResponseBytes: 100}
	large := newAPI(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			_, err := w.Write(make([]byte, 60))
			must(err)
		}
	})
	for i := range 20 {
		large.do(large.request(exchange{key: k(fmt.Sprint(i))}))
	}
	depth := 0
	var c *api
	c = newAPI(idempotency.NewMemoryStore(), &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
		key := execution(r).Key()
		_, err := io.WriteString(w, key+" begins, ")
		must(err)
		if depth++; depth < 20 { // another request on the same goroutine, in the middle of this one
			c.check(t, depth, exchange{key: k(fmt.Sprint("key", depth)), get: fmt.Sprintf("200 key%d begins, key%d ends", depth, depth)})
		}
		_, err = io.WriteString(w, key+" ends")
		must(err)
	})
	c.check(t, 0, exchange{key: k("key0"), get: "200 key0 begins, key0 ends"})
	for i := range 20 {
		c.check(t, i, exchange{key: k(fmt.Sprint("key", i)), get: fmt.Sprintf("replay 200 key%d begins, key%d ends", i, i)})
	}
	require.Equal(t, 20, c.runs())
}

// What is kept of a large response is neither the buffer that the next one is
// captured in nor what the handler wrote from and goes on using.
func TestLargeAnswersStayAsTheyWere(t *testing.T) {
	for _, writes := range []int{1, 20} {
		t.Run(fmt.Sprint(writes, " writes"), func(t *testing.T) {
			eachWay(t, func(t *testing.T, store idempotency.Store) {
				c := newAPI(store, &idempotency.Options{}, func(w http.ResponseWriter, r *http.Request) {
					part := bytes.Repeat([]byte(execution(r).Key()), 20_000/writes)
					for range writes {
						_, err := w.Write(part)
						must(err)
					}
					clear(part)
				})
				answer := func(key string) string { return "200 " + strings.Repeat(key, 20_000) }
				keys := strings.Split("ab cd ef gh ij kl mn op", " ")
				for i, key := range keys {
					c.check(t, i, exchange{key: k(key), get: answer(key)})
				}
				for i, key := range keys {
					c.check(t, i, exchange{key: k(key), get: "replay " + answer(key)})
				}
			})
		})
	}
}
