package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
)

// An event is the part of a delivery that the service looks at. Those of Stripe
// and of Standard Webhooks both have a type and data.
type event struct {
	Type string          `json:"type"`
	Data json.RawMessage `json:"data"`
}

// A receiver has what the handlers need.
type receiver struct {
	stripe   sender
	standard []sender

	// process has the effect of an event. It may be called again for an event
	// when an earlier call failed or its process died, with the same key: for a
	// service that knows idempotency keys, or a unique column.
	process func(ctx context.Context, key string, e event) error
}

// errNotYet is what process returns when it has done nothing, and may do it
// later: an event that came before the one that it builds on, for example.
// Senders do not promise an order.
var errNotYet = errors.New("the event came too early")

// newHandler has one route for each kind of sender. The signature is checked
// outside of the idempotency middleware, which calls the handler once for each
// event.
func newHandler(store idempotency.Store, background *idempotency.Background, rec *receiver) http.Handler {
	inHeader := idempotency.Middleware(store, standardOptions(background))
	inBody := idempotency.Middleware(store, stripeOptions(background))
	handler := http.HandlerFunc(rec.receive)
	mux := http.NewServeMux()
	mux.Handle("POST /webhooks/standard", signed(standard, rec.standard, inHeader(handler)))
	mux.Handle("POST /webhooks/stripe", signed(stripe, []sender{rec.stripe}, inBody(handler)))
	return mux
}

// standardOptions are for senders that follow Standard Webhooks, which have the
// key in a header.
func standardOptions(background *idempotency.Background) *idempotency.Options {
	return &idempotency.Options{
		Header:     "Webhook-Id",
		RequireKey: true,

		// Two senders may use one ID, and a sender must not be able to occupy
		// the IDs of another.
		Scope: func(r *http.Request) string { return verified(r.Context()) },

		// The schedule in the specification ends 75 hours and 36 minutes after
		// the first delivery. The rest is for jitter and for deliveries that an
		// operator of the sender repeats by hand.
		TTL: 7 * 24 * time.Hour,

		Fingerprint: withoutStamp,
		ShouldStore: onlySuccess,
		Background:  background,
	}
}

// stripeOptions are for Stripe, which has the key in the body.
func stripeOptions(background *idempotency.Background) *idempotency.Options {
	return &idempotency.Options{
		Key:        eventID,
		RequireKey: true,
		Scope:      func(r *http.Request) string { return verified(r.Context()) },

		// Stripe repeats a delivery for up to 3 days, and "stripe events resend"
		// does for events of the last 30.
		TTL: 31 * 24 * time.Hour,

		// The ID says it all. The body may differ between two deliveries, in
		// pending_webhooks for one, and Stripe never uses an ID again.
		Fingerprint: func(*http.Request, []byte) []byte { return nil },

		ShouldStore: onlySuccess,
		Background:  background,
	}
}

// eventID returns the ID of an event of Stripe. The signature was checked
// before, so an error is not the work of a stranger.
func eventID(_ *http.Request, body []byte) (string, error) {
	var e struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(body, &e); err != nil {
		return "", errors.New("the event is not JSON")
	}
	if !strings.HasPrefix(e.ID, "evt_") {
		return "", errors.New(`the event has no id that begins with "evt_"`)
	}
	return e.ID, nil
}

// withoutStamp returns the body without the members that some senders write
// anew for each delivery. All others count, so a sender that uses an ID for a
// second event gets a 422, and the event does not vanish. With a sender that
// writes more of the body anew, return nil as stripeOptions does.
func withoutStamp(_ *http.Request, body []byte) []byte {
	var members map[string]json.RawMessage
	if json.Unmarshal(body, &members) != nil {
		return body // no JSON object, so there is no stamp
	}
	delete(members, "attempt")
	delete(members, "sent_at")
	rest, err := json.Marshal(members) // sorts the members by name
	if err != nil {
		return body
	}
	return rest
}

// onlySuccess has the handler run again after any answer but a 2xx, because a
// sender takes any other answer as a failure and delivers the event again. A
// stored 4xx would be all that it gets until the TTL ends, also after the bug
// behind it was mended.
func onlySuccess(status int, _ http.Header) bool { return status/100 == 2 }

// receive calls process once for each event. Senders wait 15 to 30 seconds for
// an answer. When a sender has given up, receive goes on, since the middleware
// keeps the hang-up from its context. The next delivery then gets the stored
// answer. A delivery that comes while receive is running waits up to
// Options.Wait, and is then answered 409, which a sender takes as a failure: it
// delivers the event once more.
func (rec *receiver) receive(w http.ResponseWriter, r *http.Request) {
	exec, ok := idempotency.FromContext(r.Context())
	if !ok {
		http.Error(w, "no idempotency middleware", http.StatusInternalServerError)
		return
	}
	var e event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		http.Error(w, "the event is not JSON", http.StatusBadRequest)
		return
	}
	err := rec.process(r.Context(), exec.DownstreamKey("process"), e)
	switch {
	case errors.Is(err, errNotYet):
		exec.Discard() // nothing happened: the next delivery is the first attempt
		w.Header().Set("Retry-After", "60")
		http.Error(w, "not yet", http.StatusServiceUnavailable)
	case err != nil:
		// Something may have happened. The 503 frees the key as well, and the
		// next delivery calls process with the same DownstreamKey.
		log.Printf("event %s, attempt %d: %v", exec.Key(), exec.Attempt(), err)
		http.Error(w, "try again later", http.StatusServiceUnavailable)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// newRedisStore has a Prefix for each service. A sender may deliver an event to
// two services, to each at an address of its own. If these share a Redis and a
// Prefix, and have the same path, the second service gets the answer of the
// first and never handles the event.
func newRedisStore(client redis.UniversalClient, service string) *idempotency.RedisStore {
	return idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: service + ":"})
}
