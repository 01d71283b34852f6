package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxBody bounds what a stranger can make this process hold before the
	// signature is checked. Standard Webhooks recommends events under 20 KB, and
	// those of Stripe are about as small. It must not exceed
	// Options.MaxBufferedBody, or Options.Key would get no body.
	maxBody = 1 << 20

	// tolerance is how far the time of a delivery may be from this clock. A
	// delivery that was overheard cannot be sent again after that. Senders sign
	// each delivery anew, so a retry that comes hours later is in time. Stripe's
	// libraries and those of Standard Webhooks use five minutes too.
	tolerance = 5 * time.Minute
)

// A sender is a party that may deliver events.
type sender struct {
	// name becomes the Scope of the sender's keys.
	name string

	// keys are what the sender may sign with. There are two while a secret is
	// being replaced. No two senders share one.
	keys [][]byte
}

// A scheme returns what is signed in a delivery, and the signatures of it. It
// returns an error if the headers of the scheme are missing or malformed.
type scheme func(h http.Header, body []byte) (d delivery, err error)

// A delivery is what a scheme finds in a request.
type delivery struct {
	sent       time.Time
	signed     []byte   // what the sender has signed
	signatures [][]byte // any of which may be the right one
}

// signed passes a request on if one of senders has signed it, and tells who, so
// that Options.Scope can return it. It answers any other request itself.
//
// signed belongs outside of the idempotency middleware. Inside, a forged request
// would already hold the key of the true event, and the refusal would be stored
// under it.
func signed(read scheme, senders []sender, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			http.Error(w, "the body is too large", http.StatusRequestEntityTooLarge)
			return
		}
		if err != nil {
			http.Error(w, "the body is incomplete", http.StatusBadRequest)
			return
		}
		name, err := verify(read, senders, r.Header, body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), senderKey{}, name))
		r.Body = io.NopCloser(bytes.NewReader(body)) // whole again, for the middleware inside
		next.ServeHTTP(w, r)
	})
}

type senderKey struct{}

// verified returns the name of the sender whose signature was right. It is empty
// if signed did not run.
func verified(ctx context.Context) string {
	name, _ := ctx.Value(senderKey{}).(string)
	return name
}

// verify returns the name of the sender that has signed the request.
func verify(read scheme, senders []sender, h http.Header, body []byte) (string, error) {
	d, err := read(h, body)
	if err != nil {
		return "", err
	}
	if age := time.Since(d.sent).Abs(); age > tolerance {
		return "", fmt.Errorf("the time of the signature is off by more than %v", tolerance)
	}
	for _, s := range senders {
		for _, key := range s.keys {
			mac := hmac.New(sha256.New, key)
			mac.Write(d.signed)
			want := mac.Sum(nil)
			for _, signature := range d.signatures {
				if hmac.Equal(signature, want) { // in constant time
					return s.name, nil
				}
			}
		}
	}
	return "", errors.New("the signature is wrong")
}

// standard is the scheme of Standard Webhooks 1.0.0, section "Signature scheme",
// with HMAC-SHA256 (v1). An ID with a full stop is refused: the parts are joined
// by full stops, so the signature would not say where the ID ends.
func standard(h http.Header, body []byte) (d delivery, err error) {
	id, stamp := h.Get("Webhook-Id"), h.Get("Webhook-Timestamp")
	if id == "" || strings.Contains(id, ".") {
		return d, errors.New("webhook-id is missing, or has a full stop")
	}
	if d.sent, err = unixTime(stamp); err != nil {
		return d, fmt.Errorf("webhook-timestamp: %w", err)
	}
	d.signed = fmt.Appendf(nil, "%s.%s.%s", id, stamp, body)
	for entry := range strings.FieldsSeq(h.Get("Webhook-Signature")) {
		version, text, _ := strings.Cut(entry, ",")
		if signature, err := base64.StdEncoding.DecodeString(text); err == nil && version == "v1" {
			d.signatures = append(d.signatures, signature)
		}
	}
	return d, nil
}

// stripe is the scheme of the header Stripe-Signature. Elements other than t and
// v1 are ignored, as its documentation demands: v0 is for test events.
func stripe(h http.Header, body []byte) (d delivery, err error) {
	stamp := ""
	for element := range strings.SplitSeq(h.Get("Stripe-Signature"), ",") {
		switch name, value, _ := strings.Cut(element, "="); name {
		case "t":
			stamp = value
		case "v1":
			if signature, err := hex.DecodeString(value); err == nil {
				d.signatures = append(d.signatures, signature)
			}
		}
	}
	if d.sent, err = unixTime(stamp); err != nil {
		return d, fmt.Errorf("t of Stripe-Signature: %w", err)
	}
	d.signed = fmt.Appendf(nil, "%s.%s", stamp, body)
	return d, nil
}

// unixTime reads seconds since 1970.
func unixTime(s string) (time.Time, error) {
	seconds, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return time.Time{}, errors.New("not a time in seconds")
	}
	return time.Unix(seconds, 0), nil
}

// standardKey decodes a secret of Standard Webhooks, which is base64 behind a
// prefix.
func standardKey(secret string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil || len(key) < 24 {
		return nil, errors.New(`a secret of Standard Webhooks is "whsec_" and base64 of at least 24 bytes`)
	}
	return key, nil
}

// stripeKey is the whole text of the secret, with its prefix.
func stripeKey(secret string) []byte { return []byte(secret) }
