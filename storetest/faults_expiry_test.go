package storetest

import (
	"time"

	"github.com/go-idempotency/idempotency"
)

// wayFaults are the faults that each way to acquire a cell can have.
func wayFaults() (faults []brokenStore) {
	for _, way := range []struct {
		name string
		took func(*call) bool
		had  bool // a cell before
	}{
		{"the claim of an absent cell", (*call).anew, false},
		{"the renewal of an absent cell", (*call).restored, false},
		{"the claim of a released cell", (*call).reclaimed, true},
		{"a claim that is sent twice", (*call).resent, true},
		{"a renewal", (*call).renewed, true},
		{"a take-over", (*call).tookOver, true},
	} {
		add := func(name, rule string, change func(*call)) {
			after := func(c *call) {
				if way.took(c) {
					change(c)
				}
			}
			faults = append(faults, brokenStore{way.name + " " + name, fault{after: after}, []string{rule}})
		}
		lease, ttl := "Lease/"+way.name+" starts the lease", "Expiry/"+way.name+" starts the TTL anew"
		add("does not start the lease", lease, func(c *call) { c.cell.leaseEnd = c.old.leaseEnd })
		add("has no TTL but the lease", ttl, func(c *call) { c.cell.expires = c.cell.leaseEnd })
		add("expires before its lease", "Expiry/"+way.name+" does not expire before its lease",
			func(c *call) { c.cell.expires = c.now + c.claim.TTL })
		if !way.had {
			continue
		}
		add("keeps the TTL", ttl, func(c *call) { c.cell.expires = c.old.expires })
		add("keeps the TTL unless the lease is longer", ttl, func(c *call) { c.cell.expires = max(c.old.expires, c.cell.leaseEnd) })
		add("only prolongs the TTL", ttl, func(c *call) { c.cell.expires = max(c.old.expires, c.cell.expires) })
		if way.name != "a take-over" { // when the lease is over
			add("only prolongs the lease", lease, func(c *call) { c.cell.leaseEnd = max(c.old.leaseEnd, c.cell.leaseEnd) })
		}
	}
	return faults
}

var expiryFaults = []brokenStore{
	{"nothing ever expires", fault{after: func(c *call) {
		c.cell.expires = forever
	}}, []string{
		"Expiry/a completed cell expires",
		"Expiry/a Once claim expires",
		"Expiry/an absent cell that was released expires",
		"Values/returned slices stay valid",
	}},
	{"a Once claim never expires", fault{after: func(c *call) {
		if c.acquired() && c.cell.once {
			c.cell.expires = forever
		}
	}}, []string{
		"Expiry/a Once claim expires",
	}},
	{"a result expires early", fault{after: func(c *call) {
		if c.complete() && c.err == nil {
			c.cell.expires = c.now + c.result.TTL/2
		}
	}}, []string{
		"Expiry/a completed cell expires",
	}},
	{"reading prolongs the TTL", fault{after: func(c *call) {
		if c.rec.State == idempotency.Completed {
			c.cell.expires += time.Hour
		}
	}}, []string{
		"Expiry/a completed cell expires",
	}},
	{"Complete keeps the TTL of the claim", fault{after: func(c *call) {
		if c.complete() && c.old.status == claimed {
			c.cell.expires = c.old.expires
		}
	}}, []string{
		"Expiry/Complete starts a TTL of its own",
		"Expiry/a completed cell expires",
	}},
	{"a marker is kept for the lease", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell.expires = c.now + c.old.lease
		}
	}}, []string{
		"Expiry/a released cell expires before the claim would have",
		"Expiry/a released cell expires after the claim would have",
	}},
	{"a marker is kept for the TTL of the claim", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell.expires = c.old.expires
		}
	}}, []string{
		"Expiry/a released cell expires before the claim would have",
		"Expiry/a released cell expires after the claim would have",
		"Expiry/a released cell counts attempts for as long as it is kept",
	}},
	{"a marker is kept for the TTL of the claim at least", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell.expires = max(c.old.expires, c.cell.expires)
		}
	}}, []string{
		"Expiry/a released cell expires before the claim would have",
	}},
	{"a marker is kept for the TTL of the claim at most", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell.expires = min(c.old.expires, c.cell.expires)
		}
	}}, []string{
		"Expiry/a released cell expires after the claim would have",
	}},
	{"a marker counts attempts for as long as the lease would run", fault{after: func(c *call) {
		if c.reclaimed() && c.lapsed() {
			c.setAttempt(1)
		}
	}}, []string{
		"Expiry/a released cell counts attempts for as long as it is kept",
	}},
	{"a marker is known to its owner for as long as the lease would run", fault{before: func(c *call) {
		if c.acquire() && c.old.status == released && c.old.lease > 0 && c.lapsed() {
			c.cell.token = "none"
		}
	}}, []string{
		"Expiry/a released cell counts attempts for as long as it is kept",
	}},
	{"the marker of an absent cell is kept for 30s", fault{after: func(c *call) {
		if c.release() && c.old.status == absent {
			c.cell.expires = c.now + 30*time.Second
		}
	}}, []string{
		"Expiry/an absent cell that was released expires",
	}},
	{"the marker of an absent cell is kept for a second", fault{after: func(c *call) {
		if c.release() && c.old.status == absent {
			c.cell.expires = c.now + time.Second
		}
	}}, []string{
		"Expiry/an absent cell that was released expires",
		"Expiry/an absent cell that was released is kept",
	}},
	{"a delayed claim prolongs the marker", fault{after: func(c *call) {
		if c.old.status == released && c.rec.State == idempotency.Lost && !c.renewal() {
			c.cell.expires += time.Hour
		}
	}}, []string{
		"Expiry/a released cell expires before the claim would have",
		"Expiry/an absent cell that was released expires",
	}},
	{"a refused renewal prolongs the marker", fault{after: func(c *call) {
		if c.old.status == released && c.renewal() {
			c.cell.expires += time.Hour
		}
	}}, []string{
		"Expiry/a renewal that is refused does not prolong a released cell",
	}},
	{"a refused renewal prolongs a completed cell", fault{after: func(c *call) {
		if c.old.status == completed && c.renewal() {
			c.cell.expires += time.Hour
		}
	}}, []string{
		"Expiry/a renewal that is refused does not prolong a completed cell",
	}},
	{"Release keeps the marker of a later attempt for keep alone", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell.expires = c.now + c.keep
		}
	}}, []string{
		"Expiry/a release of a later attempt does not shorten the TTL",
	}},
	{"Release keeps the marker of a later attempt for what is left of the TTL alone", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() && c.cell.attempt > 1 {
			c.cell.expires = c.old.expires
		}
	}}, []string{
		"Expiry/a release of a later attempt is kept for longer than the TTL",
	}},
	{"the Release of another prolongs a claim", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && !c.owner() {
			c.cell.expires = max(c.old.expires, c.now+c.keep)
		}
	}}, []string{
		"Expiry/a release that is not the owner's changes no TTL",
	}},
	{"the Release of another shortens a claim", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && !c.owner() {
			c.cell.expires = min(c.old.expires, c.now+c.keep)
		}
	}}, []string{
		"Expiry/a release that is not the owner's changes no TTL",
	}},
	{"Release prolongs a completed cell", fault{after: func(c *call) {
		if c.release() && c.old.status == completed {
			c.cell.expires = max(c.old.expires, c.now+c.keep)
		}
	}}, []string{
		"Expiry/a release of a completed cell changes no TTL",
	}},
	{"Release shortens a completed cell", fault{after: func(c *call) {
		if c.release() && c.old.status == completed {
			c.cell.expires = min(c.old.expires, c.now+c.keep)
		}
	}}, []string{
		"Expiry/a release of a completed cell changes no TTL",
	}},
}
