package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// An env is what a rule works with: a store, a key of its own, and a log of its
// steps. The first step that fails sets err, and the steps after it do nothing;
// so a rule reads as a list of steps.
type env struct {
	timing
	ctx   context.Context
	store idempotency.Store
	clock advancer // nil: real time
	moved time.Duration
	key   string
	salt  string
	log   []string
	err   error
}

func newEnv(ctx context.Context, store idempotency.Store, tm timing) *env {
	clock, _ := store.(advancer)
	return &env{timing: tm, ctx: ctx, store: store, clock: clock, key: randomKey(), salt: rand.Text()}
}

// randomKey returns a key in base64url, like those of the middleware and longer.
func randomKey() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails, says its documentation
	return base64.RawURLEncoding.EncodeToString(b)
}

// use makes key the key of the steps that follow.
func (e *env) use(key string) {
	e.key = key
	e.note("with the key %s", show([]byte(key)))
}

// token returns the token that the rules call name. The salt comes first, so that
// "A" is a prefix of "AA", and "A" and "a" differ in case only.
func (e *env) token(name string) string { return e.salt + name }

func (e *env) note(format string, args ...any) {
	e.log = append(e.log, fmt.Sprintf(format, args...))
}

// fail sets err to the steps so far and to what the last one should have returned.
func (e *env) fail(format string, args ...any) {
	if e.err == nil {
		e.err = fmt.Errorf("after\n\t%s\nwant %s", strings.Join(e.log, "\n\t"), fmt.Sprintf(format, args...))
	}
}

// A claim is an idempotency.Claim in short: the token by name, no fingerprint
// for "", and long durations for zero. With an attempt it is a renewal.
type claim struct {
	token, fp  string
	lease, ttl time.Duration
	attempt    int
	once       bool
}

func (e *env) claim(c claim) idempotency.Claim {
	return idempotency.Claim{
		Token: e.token(c.token), Fingerprint: toBytes(c.fp),
		Lease: orLong(c.lease), TTL: orLong(c.ttl), Attempt: c.attempt, Once: c.once,
	}
}

// A result is an idempotency.Result in short.
type result struct {
	fp, value string
	ttl       time.Duration
}

func (e *env) result(r result) idempotency.Result {
	return idempotency.Result{Fingerprint: toBytes(r.fp), Value: toBytes(r.value), TTL: orLong(r.ttl)}
}

// toBytes returns nil for "": the middleware has both forms of empty.
func toBytes(s string) []byte {
	if s == "" {
		return nil
	}
	return []byte(s)
}

func orLong(d time.Duration) time.Duration {
	if d == 0 {
		return long
	}
	return d
}

// acquire claims the key, or renews its claim.
func (e *env) acquire(c claim) answer { return e.send(e.claim(c)) }

// acquireOnce claims the key, and marks the claim with a renewal. The claim has a
// long TTL and only the renewal that of c, so the claim cannot expire before it is
// marked.
func (e *env) acquireOnce(c claim) answer {
	ttl := c.ttl
	c.ttl = long
	e.acquire(c).acquired(1)
	c.attempt, c.once, c.ttl = 1, true, ttl
	return e.acquire(c).acquiredOnce(1)
}

// send calls Acquire with c as it is.
func (e *env) send(c idempotency.Claim) answer {
	if e.err != nil {
		return answer{e: e}
	}
	a := answer{e: e}
	a.before = e.now()
	rec, err := e.store.Acquire(e.ctx, e.key, c)
	a.after, a.Record = e.now(), rec
	e.note("%s = %s", e.describe(c), outcome(rec, err))
	switch {
	case err != nil:
		e.fail("no error")
	case !valid(rec.State):
		e.fail("one of the States")
	case rec.State == idempotency.InProgress && rec.Remaining <= 0:
		// A waiting request would ask again at once, and again.
		e.fail("a Remaining above 0 as long as the answer is InProgress")
	}
	return a
}

// valid reports whether s is one of the constants.
func valid(s idempotency.State) bool { return s >= idempotency.Acquired && s <= idempotency.Lost }

// complete stores r, which must succeed.
func (e *env) complete(token string, r result) span {
	return e.finish(e.token(token), e.result(r), nil)
}

// refuseComplete tries to store r, which must fail with ErrLeaseLost.
func (e *env) refuseComplete(token string, r result) {
	e.finish(e.token(token), e.result(r), idempotency.ErrLeaseLost)
}

// finish calls Complete with r as it is.
func (e *env) finish(token string, r idempotency.Result, want error) (s span) {
	if e.err != nil {
		return s
	}
	s.before = e.now()
	err := e.store.Complete(e.ctx, e.key, token, r)
	s.after = e.now()
	e.note("Complete(token %s, fingerprint %s, value %s, TTL %v) = %v",
		e.name(token), show(r.Fingerprint), show(r.Value), r.TTL, err)
	if !errors.Is(err, want) {
		e.fail("%v", want)
	}
	return s
}

// release frees the key, and keeps the marker for long.
func (e *env) release(token string) span { return e.releaseFor(token, long) }

// releaseFor frees the key. Release returns nil whatever the cell is.
func (e *env) releaseFor(token string, keep time.Duration) (s span) {
	if e.err != nil {
		return s
	}
	s.before = e.now()
	err := e.store.Release(e.ctx, e.key, e.token(token), keep)
	s.after = e.now()
	e.note("Release(token %s, keep %v) = %v", token, keep, err)
	if err != nil {
		e.fail("<nil>")
	}
	return s
}

// An answer is what Acquire returned, and when.
type answer struct {
	e *env
	span
	idempotency.Record
}

// acquired: the answer must be Acquired with this attempt, and not Once.
func (a answer) acquired(attempt int) answer {
	if a.State != idempotency.Acquired || a.Attempt != attempt || a.Once {
		a.e.fail("Acquired, Attempt %d", attempt)
	}
	return a
}

// acquiredOnce: the answer must be Acquired with this attempt, and Once.
func (a answer) acquiredOnce(attempt int) answer {
	if a.State != idempotency.Acquired || a.Attempt != attempt || !a.Once {
		a.e.fail("Acquired, Attempt %d, Once", attempt)
	}
	return a
}

// acquiredAny: the answer must be Acquired with any attempt, and not Once. The
// attempt is unknown where a slow machine may have let the cell expire.
func (a answer) acquiredAny() answer {
	if a.State != idempotency.Acquired || a.Attempt < 1 || a.Once {
		a.e.fail("Acquired, Attempt 1 or more")
	}
	return a
}

// completed: the answer must be Completed with just this.
func (a answer) completed(fp, value string) answer {
	if a.State != idempotency.Completed || string(a.Fingerprint) != fp || string(a.Value) != value {
		a.e.fail("Completed, fingerprint %s, value %s", show([]byte(fp)), show([]byte(value)))
	}
	return a
}

// is: the answer must have this state. Its other fields do not matter.
func (a answer) is(s idempotency.State) answer {
	if a.State != s {
		a.e.fail("%v", s)
	}
	return a
}

// describe returns a call of Acquire for the log.
func (e *env) describe(c idempotency.Claim) string {
	s := fmt.Sprintf("Acquire(token %s, fingerprint %s, Lease %v, TTL %v",
		e.name(c.Token), show(c.Fingerprint), c.Lease, c.TTL)
	if c.Attempt != 0 {
		s += fmt.Sprintf(", Attempt %d", c.Attempt)
	}
	if c.Once {
		s += ", Once"
	}
	return s + ")"
}

// name is the reverse of token.
func (e *env) name(token string) string { return strings.TrimPrefix(token, e.salt) }

// outcome returns an answer of Acquire for the log.
func outcome(r idempotency.Record, err error) string {
	if err != nil {
		return fmt.Sprintf("error %q", err)
	}
	switch r.State {
	case idempotency.Acquired:
		s := fmt.Sprintf("Acquired, Attempt %d", r.Attempt)
		if r.Once {
			s += ", Once"
		}
		return s
	case idempotency.InProgress:
		return fmt.Sprintf("InProgress, Remaining %v", r.Remaining)
	case idempotency.Completed:
		return fmt.Sprintf("Completed, fingerprint %s, value %s", show(r.Fingerprint), show(r.Value))
	}
	return r.State.String()
}

// show returns b for the log, without the middle when it is long.
func show(b []byte) string {
	switch {
	case len(b) == 0:
		return "none"
	case len(b) <= 64:
		return fmt.Sprintf("%q", b)
	}
	return fmt.Sprintf("%q…%q (%d bytes)", b[:16], b[len(b)-16:], len(b))
}

// same fails if a slice that the store returned has changed since.
func (e *env) same(what string, got []byte, want string) {
	if !bytes.Equal(got, []byte(want)) {
		e.fail("the %s that was returned to stay %s; it has become %s", what, show([]byte(want)), show(got))
	}
}
