package storetest

import (
	"bytes"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// A brokenStore is the reference with one fault, and the rules that are meant
// to find it. More may find it as well.
type brokenStore struct {
	name  string
	fault fault
	rules []string
}

const forever = 1000 * time.Hour

// What kind of call it is.
func (c *call) acquire() bool  { return c.claim != nil }
func (c *call) renewal() bool  { return c.acquire() && c.claim.Attempt != 0 }
func (c *call) complete() bool { return c.result != nil }
func (c *call) release() bool {
	return c.claim == nil && c.result == nil && !c.inspects && !c.forgets()
}
func (c *call) forgets() bool { return c.seen != nil }

// What it found.
func (c *call) owner() bool  { return c.old.token == c.token }
func (c *call) lapsed() bool { return c.old.leaseEnd <= c.now }

// differs: both fingerprints are known and not the same.
func (c *call) differs() bool {
	a, b := string(c.old.fingerprint), string(c.claim.Fingerprint)
	return a != b && a != "" && b != ""
}

// What came of it. The first six are the ways to acquire a cell.
func (c *call) anew() bool      { return c.acquired() && c.old.status == absent && !c.renewal() }
func (c *call) restored() bool  { return c.acquired() && c.old.status == absent && c.renewal() }
func (c *call) reclaimed() bool { return c.acquired() && c.old.status == released }
func (c *call) resent() bool    { return c.extended() && !c.renewal() }
func (c *call) renewed() bool   { return c.extended() && c.renewal() }
func (c *call) tookOver() bool  { return c.acquired() && c.old.status == claimed && !c.owner() }

func (c *call) acquired() bool { return c.rec.State == idempotency.Acquired }
func (c *call) extended() bool { return c.acquired() && c.old.status == claimed && c.owner() }
func (c *call) refused() bool  { return c.acquire() && !c.acquired() }

// setAttempt changes the attempt of the cell and of the answer.
func (c *call) setAttempt(n int) { c.cell.attempt, c.rec.Attempt = n, n }

// setOnce changes the mark of the cell, and that of the answer.
func (c *call) setOnce(once bool) { c.cell.once, c.rec.Once = once, once }

// refuse makes it a refused Acquire.
func (c *call) refuse(s idempotency.State) {
	c.cell, c.rec = c.old, idempotency.Record{State: s}
	if s == idempotency.InProgress {
		c.rec.Remaining = time.Second
	}
}

// undo makes it a Complete or Release that had no effect.
func (c *call) undo(err error) { c.cell, c.err = c.old, err }

// text is what becomes of bytes in a column that is meant for text.
func text(b []byte) string {
	s, _, _ := strings.Cut(strings.ToValidUTF8(string(b), "?"), "\x00")
	return strings.ToLower(strings.TrimSpace(s))
}

var acquireFaults = []brokenStore{
	{"attempts count from 0", fault{after: func(c *call) {
		if c.acquired() {
			c.rec.Attempt--
		}
	}}, []string{
		"Acquire/an absent cell is claimed",
	}},
	{"a token can claim only once", fault{after: func(c *call) {
		if c.resent() {
			c.refuse(idempotency.InProgress)
		}
	}}, []string{
		"Resend/the attempt stays",
		"Acquire/a cancelled context leads to an error or a true answer",
	}},
	{"a claim writes nothing", fault{after: func(c *call) {
		if c.anew() {
			c.cell = c.old
		}
	}}, []string{
		"Acquire/an absent cell is claimed",
	}},
	{"a claim is not exclusive", fault{after: func(c *call) {
		if c.rec.State == idempotency.InProgress {
			c.take(1)
		}
	}}, []string{
		"Lease/a running lease is InProgress",
		"Lease/a claim is taken over when its lease is over",
	}},
	{"a delayed claim reclaims a released cell", fault{before: func(c *call) {
		if c.old.status == released {
			c.cell.token = "none"
		}
	}}, []string{
		"Release/a delayed claim is Lost",
		"Release/an absent cell remembers the release",
		"Release/a second time changes nothing",
	}},
	{"Mismatch comes before Lost", fault{after: func(c *call) {
		if c.old.status == released && c.acquire() && c.differs() {
			c.refuse(idempotency.Mismatch)
		}
	}}, []string{
		"Acquire/a cell released under the token is Lost whatever the fingerprint",
	}},
	{"a released cell keeps its fingerprint", fault{after: func(c *call) {
		if c.reclaimed() {
			c.cell.fingerprint = c.old.fingerprint
		}
	}}, []string{
		"Acquire/a released cell is claimed with any fingerprint",
	}},
	{"a released cell keeps its fingerprint when none replaces it", fault{after: func(c *call) {
		if c.reclaimed() && len(c.claim.Fingerprint) == 0 {
			c.cell.fingerprint = c.old.fingerprint
		}
	}}, []string{
		"Acquire/a released cell is claimed without a fingerprint",
	}},
	{"fingerprints are ignored", fault{before: func(c *call) {
		if c.acquire() && c.differs() {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Acquire/Mismatch while the lease runs",
		"Acquire/Mismatch comes before Completed",
		"Acquire/Mismatch comes before the claim's own token",
		"Acquire/Mismatch comes before Abandoned",
		"Acquire/Mismatch comes before take-over",
		"Renew/Mismatch comes before the token and the attempt",
		"Expiry/a renewal starts the TTL anew",
	}},
	{"Completed comes before Mismatch", fault{before: func(c *call) {
		if c.acquire() && c.old.status == completed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Acquire/Mismatch comes before Completed",
		"Complete/the fingerprint replaces that of the claim",
		"Complete/an absent cell is written",
	}},
	{"the own token comes before Mismatch", fault{before: func(c *call) {
		if c.acquire() && c.owner() && c.old.status == claimed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Acquire/Mismatch comes before the claim's own token",
	}},
	{"Abandoned comes before Mismatch", fault{after: func(c *call) {
		if c.acquire() && c.old.once && c.lapsed() && c.rec.State == idempotency.Mismatch {
			c.refuse(idempotency.Abandoned)
		}
	}}, []string{
		"Acquire/Mismatch comes before Abandoned",
	}},
	{"a take-over comes before Mismatch", fault{after: func(c *call) {
		if c.acquire() && !c.old.once && c.old.status == claimed && c.lapsed() && c.rec.State == idempotency.Mismatch {
			c.take(c.old.attempt + 1)
		}
	}}, []string{
		"Acquire/Mismatch comes before take-over",
		"Expiry/a take-over starts the TTL anew",
	}},
	{"an unknown fingerprint is one that differs", fault{after: func(c *call) {
		stored := c.old.status == claimed || c.old.status == completed
		if c.acquire() && stored && !bytes.Equal(c.old.fingerprint, c.claim.Fingerprint) {
			c.refuse(idempotency.Mismatch)
		}
	}}, []string{
		"Acquire/an unknown fingerprint is no Mismatch",
		"Acquire/Completed comes with an unknown fingerprint too",
		"Resend/an unknown fingerprint stays unknown",
		"Renew/an unknown fingerprint stays unknown",
	}},
	{"fingerprints are compared as text", fault{before: func(c *call) {
		if c.acquire() && c.differs() && text(c.old.fingerprint) == text(c.claim.Fingerprint) {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Acquire/fingerprints are compared byte by byte",
	}},
	{"the owner claims a completed cell", fault{after: func(c *call) {
		if c.rec.State == idempotency.Completed && c.owner() {
			c.take(1)
		}
	}}, []string{
		"Acquire/Completed comes before the claim's own token",
	}},
	{"tokens are compared without case", fault{before: func(c *call) {
		if strings.EqualFold(c.token, c.old.token) {
			c.token = c.old.token
		}
	}}, []string{
		"Acquire/tokens are compared verbatim",
	}},
	{"tokens are compared by their beginning", fault{before: func(c *call) {
		if c.old.token != "" && strings.HasPrefix(c.token, c.old.token) {
			c.token = c.old.token
		}
	}}, []string{
		"Acquire/tokens are compared verbatim",
	}},
	{"a take-over does not count", fault{after: func(c *call) {
		if c.tookOver() {
			c.setAttempt(c.old.attempt)
		}
	}}, []string{
		"Acquire/Attempt counts claims after releases and take-overs",
		"Lease/a claim is taken over when its lease is over",
		"Concurrency/one of many take-overs wins",
	}},
	{"a released cell forgets its attempts", fault{after: func(c *call) {
		if c.release() {
			c.cell.attempt = 0
		}
	}}, []string{
		"Acquire/Attempt counts claims after releases and take-overs",
		"Release/the owner's claim is freed",
		"Concurrency/a release admits one claim",
	}},
	{"a cancelled Acquire returns nothing", fault{after: func(c *call) {
		if c.ctx.Err() != nil {
			c.undo(nil)
			c.rec = idempotency.Record{}
		}
	}}, []string{
		"Acquire/a cancelled context leads to an error or a true answer",
	}},
	{"a cancelled Complete reports ErrLeaseLost", fault{after: func(c *call) {
		if c.complete() && c.ctx.Err() != nil {
			c.undo(idempotency.ErrLeaseLost)
		}
	}}, []string{
		"Acquire/a cancelled context leads to an error or a true answer",
	}},
	{"a deadline is ignored", fault{before: func(c *call) {
		if c.ctx.Err() != nil {
			<-time.After(time.Second)
		}
	}}, []string{
		"Acquire/no call goes on after its deadline",
	}},
	{"Mismatch is the zero State", fault{after: func(c *call) {
		if c.rec.State == idempotency.Mismatch {
			c.rec.State = 0
		}
	}}, []string{
		"Acquire/Mismatch while the lease runs",
	}},
}
