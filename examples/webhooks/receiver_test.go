package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A ledger counts the events that were handled, and fails as it is told.
type ledger struct {
	mu     sync.Mutex
	events []string
	keys   []string
	errs   []error // of the next calls
}

func (l *ledger) process(_ context.Context, key string, e event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = append(l.keys, key)
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return err
	}
	l.events = append(l.events, e.Type)
	return nil
}

func newTestReceiver(t *testing.T, process func(context.Context, string, event) error) *receiver {
	t.Helper()
	return &receiver{
		stripe: sender{name: "stripe", keys: [][]byte{stripeKey(stripeSecret)}},
		standard: []sender{
			{name: "acme", keys: [][]byte{mustKey(t, acmeSecret)}},
			{name: "globex", keys: [][]byte{mustKey(t, globexSecret)}},
		},
		process: process,
	}
}

// deliver returns the status, and whether the answer is a replay.
func deliver(h http.Handler, r *http.Request) string {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Header().Get("Idempotent-Replayed") == "true" {
		return fmt.Sprint(w.Code, " replayed")
	}
	return fmt.Sprint(w.Code)
}

// Each retry is stamped and signed anew, and comes when the schedules of the
// senders say so. The last of them is more than three days late.
func TestEventIsHandledOnce(t *testing.T) {
	standardSchedule := []time.Duration{
		0, 5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour,
		10 * time.Hour, 14 * time.Hour, 20 * time.Hour, 24 * time.Hour,
	}
	tests := []struct {
		name     string
		schedule []time.Duration
		delivery func(attempt int) *http.Request
	}{
		{"standard", standardSchedule, func(attempt int) *http.Request {
			body := fmt.Sprintf(`{"type":"paid","data":{"amount":1.0},"attempt":%d,"sent_at":%d}`, attempt, time.Now().Unix())
			return newStandard(acmeSecret, "msg_1", body, time.Now())
		}},
		{"stripe", []time.Duration{0, time.Hour, 24 * time.Hour, 47 * time.Hour, 27 * 24 * time.Hour}, func(attempt int) *http.Request {
			body := fmt.Sprintf(`{"id":"evt_1","type":"paid","data":{},"pending_webhooks":%d}`, 10-attempt)
			return newStripe(stripeSecret, body, time.Now())
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l ledger
				h := newHandler(idempotency.NewMemoryStore(), nil, newTestReceiver(t, l.process))
				want := "204"
				for attempt, pause := range tt.schedule {
					time.Sleep(pause)
					require.Equal(t, want, deliver(h, tt.delivery(attempt)), "attempt %d", attempt)
					want = "204 replayed"
				}
				require.Equal(t, []string{"paid"}, l.events)
			})
		})
	}
}

// A claimStore counts the claims that it is asked for.
type claimStore struct {
	idempotency.Store
	claims int
}

func (s *claimStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	s.claims++
	return s.Store.Acquire(ctx, key, c)
}

// A request that is not signed does not reach the store, so it holds no key.
func TestForgedEventOccupiesNothing(t *testing.T) {
	var l ledger
	store := &claimStore{Store: idempotency.NewMemoryStore()}
	h := newHandler(store, nil, newTestReceiver(t, l.process))
	const stripeBody, standardBody = `{"id":"evt_1","type":"paid"}`, `{"type":"paid"}`

	require.Equal(t, "401", deliver(h, newStripe("guessed", stripeBody, time.Now())))
	require.Equal(t, "401", deliver(h, newStandard("whsec_guessed", "msg_1", standardBody, time.Now())))
	require.Zero(t, store.claims)
	require.Equal(t, "204", deliver(h, newStripe(stripeSecret, stripeBody, time.Now())))
	require.Equal(t, "204", deliver(h, newStandard(acmeSecret, "msg_1", standardBody, time.Now())))
	require.Len(t, l.events, 2)
	require.Equal(t, 2, store.claims)
}

func TestEachSenderHasItsOwnKeys(t *testing.T) {
	var l ledger
	h := newHandler(idempotency.NewMemoryStore(), nil, newTestReceiver(t, l.process))
	require.Equal(t, "204", deliver(h, newStandard(acmeSecret, "msg_1", `{"type":"of acme"}`, time.Now())))
	require.Equal(t, "204", deliver(h, newStandard(globexSecret, "msg_1", `{"type":"of globex"}`, time.Now())))
	require.Equal(t, []string{"of acme", "of globex"}, l.events)
	require.NotEqual(t, l.keys[0], l.keys[1])
}

// Members that are no stamp tell two events apart.
func TestAnotherEventUnderTheSameID(t *testing.T) {
	var l ledger
	h := newHandler(idempotency.NewMemoryStore(), nil, newTestReceiver(t, l.process))
	for _, tt := range []struct{ body, want string }{
		{`{"type":"paid","data":{"amount":1}}`, "204"},
		{`{"type":"paid","data":{"amount":2}}`, "422"},
		{`{"type":"paid","data":{"amount":1,"sent_at":3}}`, "422"}, // that one is no stamp
		{`{"sent_at":2,"data":{"amount":1},"type":"paid"}`, "204 replayed"},
	} {
		require.Equal(t, tt.want, deliver(h, newStandard(acmeSecret, "msg_1", tt.body, time.Now())), tt.body)
	}
	require.Len(t, l.events, 1)
}

// A failure is not final, whatever its status: the sender comes again.
func TestSenderComesAgain(t *testing.T) {
	l := ledger{errs: []error{errNotYet, fmt.Errorf("order 7: %w", errNotYet), errors.New("the database is down")}}
	attempts := []int{}
	rec := newTestReceiver(t, func(ctx context.Context, key string, e event) error {
		exec, _ := idempotency.FromContext(ctx)
		attempts = append(attempts, exec.Attempt())
		return l.process(ctx, key, e)
	})
	synctest.Test(t, func(t *testing.T) {
		h := newHandler(idempotency.NewMemoryStore(), nil, rec)
		for _, want := range []string{"503", "503", "503", "204", "204 replayed"} {
			require.Equal(t, want, deliver(h, newStripe(stripeSecret, `{"id":"evt_1","type":"paid"}`, time.Now())))
			time.Sleep(time.Hour)
		}
	})
	require.Equal(t, []string{"paid"}, l.events)
	require.Equal(t, []int{1, 1, 1, 2}, attempts, "only the last failure may have got somewhere")
	for _, key := range l.keys {
		require.Equal(t, l.keys[0], key, "whatever process calls gets the same key in each attempt")
	}
}

// A bug in the receiver is mended while the sender still comes again.
func TestBadEventIsNotStored(t *testing.T) {
	var l ledger
	h := newHandler(idempotency.NewMemoryStore(), nil, newTestReceiver(t, l.process))
	for _, body := range []string{`{"id":"evt_1","type":7}`, `{"id":"evt_1","type":"paid"}`} {
		deliver(h, newStripe(stripeSecret, body, time.Now()))
	}
	require.Equal(t, []string{"paid"}, l.events)
	for _, body := range []string{`{"id":"ch_1"}`, `{}`, `[]`, `x`, ``} {
		require.Equal(t, "400", deliver(h, newStripe(stripeSecret, body, time.Now())), body)
	}
}

// A sender that gave up gets the answer with its next delivery. One that comes
// while the handler is running is told to come again.
func TestSenderThatDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l ledger
		proceed := make(chan struct{})
		h := newHandler(idempotency.NewMemoryStore(), nil, newTestReceiver(t, func(ctx context.Context, key string, e event) error {
			<-proceed
			if err := ctx.Err(); err != nil {
				return err
			}
			return l.process(ctx, key, e)
		}))
		delivery := func() *http.Request { return newStripe(stripeSecret, `{"id":"evt_1","type":"paid"}`, time.Now()) }

		impatient, hangUp := context.WithCancel(t.Context())
		var first sync.WaitGroup
		first.Go(func() { deliver(h, delivery().WithContext(impatient)) })
		synctest.Wait()
		hangUp()

		w := httptest.NewRecorder()
		h.ServeHTTP(w, delivery())
		require.Equal(t, http.StatusConflict, w.Code)
		require.NotEmpty(t, w.Header().Get("Retry-After"))
		require.Contains(t, w.Body.String(), "in_progress")

		close(proceed)
		first.Wait()
		require.Equal(t, "204 replayed", deliver(h, delivery()))
		require.Equal(t, []string{"paid"}, l.events)
	})
}

// An event goes to two services that share a Redis.
func TestTwoServices(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	t.Cleanup(func() { _ = client.Close() })
	deliverTo := func(service string) (string, int) {
		var l ledger
		h := newHandler(newRedisStore(client, service), nil, newTestReceiver(t, l.process))
		return deliver(h, newStripe(stripeSecret, `{"id":"evt_1","type":"paid"}`, time.Now())), len(l.events)
	}
	for _, tt := range []struct {
		service, want string
		handled       int
	}{
		{"billing", "204", 1},
		{"crm", "204", 1},
		{"crm", "204 replayed", 0}, // a third service with the prefix of the second does not get the event
	} {
		answer, handled := deliverTo(tt.service)
		require.Equal(t, tt.want, answer, tt.service)
		require.Equal(t, tt.handled, handled, tt.service)
	}
}
