package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// What the senders of these tests sign with. The first secret is that of the
// test vector of Standard Webhooks.
const (
	acmeSecret   = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	globexSecret = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	stripeSecret = "whsec_5f8c7d0e"
)

func hmacOf(key []byte, parts ...string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(strings.Join(parts, ".")))
	return mac.Sum(nil)
}

// newStandard is a delivery as senders of Standard Webhooks make it.
func newStandard(secret, id, body string, sent time.Time) *http.Request {
	key, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	stamp := strconv.FormatInt(sent.Unix(), 10)
	r := httptest.NewRequest(http.MethodPost, "/webhooks/standard", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("webhook-id", id)
	r.Header.Set("webhook-timestamp", stamp)
	r.Header.Set("webhook-signature", "v1,"+base64.StdEncoding.EncodeToString(hmacOf(key, id, stamp, body)))
	return r
}

// newStripe is a delivery as Stripe makes it, with the v0 of its test events.
func newStripe(secret, body string, sent time.Time) *http.Request {
	stamp := strconv.FormatInt(sent.Unix(), 10)
	signature := hex.EncodeToString(hmacOf([]byte(secret), stamp, body))
	r := httptest.NewRequest(http.MethodPost, "/webhooks/stripe", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json; charset=utf-8")
	r.Header.Set("Stripe-Signature", "t="+stamp+",v1="+signature+",v0="+strings.Repeat("0", 64))
	return r
}

func mustKey(t *testing.T, secret string) []byte {
	t.Helper()
	key, err := standardKey(secret)
	require.NoError(t, err)
	return key
}

// The vector is in the tests of the libraries that the specification links to.
func TestStandardVector(t *testing.T) {
	h := http.Header{}
	h.Set("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
	h.Set("webhook-timestamp", "1614265330")
	h.Set("webhook-signature", "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc= "+
		"v1a,c2lnbmF0dXJl v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")
	d, err := standard(h, []byte(`{"test": 2432232314}`))
	require.NoError(t, err)
	require.Equal(t, time.Unix(1614265330, 0), d.sent)
	require.Len(t, d.signatures, 2, "v1a is another scheme")
	require.Equal(t, hmacOf(mustKey(t, acmeSecret), string(d.signed)), d.signatures[1])
}

func TestStandardKey(t *testing.T) {
	for _, secret := range []string{"", "whsec_", "whsec_!", "whsec_c2hvcnQ="} {
		_, err := standardKey(secret)
		require.Error(t, err, secret)
	}
}

// Any change to a delivery makes its signature wrong.
func TestSigned(t *testing.T) {
	senders := []sender{
		{name: "acme", keys: [][]byte{mustKey(t, acmeSecret), stripeKey("old")}},
		{name: "globex", keys: [][]byte{mustKey(t, globexSecret), stripeKey(stripeSecret)}},
	}
	now := time.Now()
	const body = `{"id":"evt_1"}`
	set := func(r *http.Request, name, value string) *http.Request {
		r.Header.Set(name, value)
		return r
	}
	rebody := func(r *http.Request, body string) *http.Request {
		r.Body = io.NopCloser(strings.NewReader(body))
		return r
	}
	tests := []struct {
		name   string
		scheme scheme
		r      *http.Request
		want   string // the sender, or the status
	}{
		{"standard", standard, newStandard(acmeSecret, "msg_1", body, now), "acme"},
		{"standard of another sender", standard, newStandard(globexSecret, "msg_1", body, now), "globex"},
		{"standard with another secret", standard, newStandard("whsec_"+strings.Repeat("B", 32), "msg_1", body, now), "401"},
		{"standard with another ID", standard, set(newStandard(acmeSecret, "msg_1", body, now), "webhook-id", "msg_2"), "401"},
		{"standard with another time", standard, set(newStandard(acmeSecret, "msg_1", body, now), "webhook-timestamp", strconv.FormatInt(now.Unix()+1, 10)), "401"},
		{"standard with another body", standard, rebody(newStandard(acmeSecret, "msg_1", body, now), body+" "), "401"},
		{"standard without a signature", standard, set(newStandard(acmeSecret, "msg_1", body, now), "webhook-signature", ""), "401"},
		{"standard without an ID", standard, newStandard(acmeSecret, "", body, now), "401"},
		{"standard with a full stop in the ID", standard, newStandard(acmeSecret, "msg.1", body, now), "401"},
		{"standard without a time", standard, set(newStandard(acmeSecret, "msg_1", body, now), "webhook-timestamp", ""), "401"},
		{"standard of long ago", standard, newStandard(acmeSecret, "msg_1", body, now.Add(-tolerance-2*time.Second)), "401"},
		{"standard of the future", standard, newStandard(acmeSecret, "msg_1", body, now.Add(tolerance+2*time.Second)), "401"},
		{"standard of the end of time", standard, newStandard(acmeSecret, "msg_1", body, time.Unix(1<<62, 0)), "401"},
		{"standard, a little late", standard, newStandard(acmeSecret, "msg_1", body, now.Add(-tolerance+time.Minute)), "acme"},
		{"stripe", stripe, newStripe(stripeSecret, body, now), "globex"},
		{"stripe with the old secret", stripe, newStripe("old", body, now), "acme"},
		{"stripe with another secret", stripe, newStripe("other", body, now), "401"},
		{"stripe with another body", stripe, rebody(newStripe(stripeSecret, body, now), body+" "), "401"},
		{"stripe of long ago", stripe, newStripe(stripeSecret, body, now.Add(-tolerance-2*time.Second)), "401"},
		{"stripe without a signature", stripe, set(newStripe(stripeSecret, body, now), "Stripe-Signature", ""), "401"},
		{"stripe with the test signature only", stripe, set(newStripe(stripeSecret, body, now), "Stripe-Signature",
			strings.ReplaceAll(newStripe(stripeSecret, body, now).Header.Get("Stripe-Signature"), "v1=", "v2=")), "401"},
		{"a large body", stripe, newStripe(stripeSecret, strings.Repeat("x", maxBody), now), "globex"},
		{"a body that is too large", stripe, newStripe(stripeSecret, strings.Repeat("x", maxBody+1), now), "413"},
		{"a body that breaks off", stripe, brokenOff(newStripe(stripeSecret, body, now)), "400"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			w := httptest.NewRecorder()
			signed(tt.scheme, senders, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				got = verified(r.Context())
				again, err := io.ReadAll(r.Body)
				require.NoError(t, err)
				require.Contains(t, []string{body, strings.Repeat("x", maxBody)}, string(again), "the body can be read once more")
			})).ServeHTTP(w, tt.r)
			if got == "" {
				got = strconv.Itoa(w.Code)
			}
			require.Equal(t, tt.want, got)
		})
	}
}

func brokenOff(r *http.Request) *http.Request {
	r.Body = io.NopCloser(io.MultiReader(io.LimitReader(r.Body, 5), breaksOff{}))
	return r
}

type breaksOff struct{}

func (breaksOff) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A delivery that was overheard is of no use after the tolerance.
func TestSignedExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		senders := []sender{{name: "stripe", keys: [][]byte{stripeKey(stripeSecret)}}}
		h := signed(stripe, senders, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		overheard := newStripe(stripeSecret, "{}", time.Now())
		for _, want := range []int{http.StatusOK, http.StatusUnauthorized} {
			r := overheard.Clone(t.Context())
			r.Body = io.NopCloser(bytes.NewReader([]byte("{}")))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			require.Equal(t, want, w.Code)
			time.Sleep(tolerance + time.Second)
		}
	})
}
