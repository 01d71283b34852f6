package storetest

import (
	"bytes"

	"github.com/go-idempotency/idempotency"
)

var leaseFaults = []brokenStore{
	{"the lease never ends", fault{after: func(c *call) {
		c.cell.leaseEnd = forever
	}}, []string{
		"Lease/a claim is taken over when its lease is over",
		"Lease/a Once claim is Abandoned when its lease is over",
		"Watch/a watch outlives a take-over",
		"Concurrency/either Complete or a take-over wins",
	}},
	{"the lease ends at once", fault{after: func(c *call) {
		c.cell.leaseEnd = c.now
	}}, []string{
		"Lease/a running lease is InProgress",
		"Lease/the claim's lease counts and not that of who asks",
		"Concurrency/one of many claims wins",
		"Renew/the lease starts anew",
	}},
	{"the lease is half as long", fault{after: func(c *call) {
		if c.acquired() {
			c.cell.leaseEnd = c.now + c.claim.Lease/2
		}
	}}, []string{
		"Lease/a claim is taken over when its lease is over",
		"Lease/Remaining is the time until the lease ends",
	}},
	{"the lease is twice as long", fault{after: func(c *call) {
		if c.acquired() {
			c.cell.leaseEnd = c.now + c.claim.Lease*2
		}
	}}, []string{
		"Lease/a claim is taken over when its lease is over",
		"Lease/a running lease is InProgress",
	}},
	{"the lease is judged by who asks", fault{before: func(c *call) {
		if c.acquire() && c.old.status == claimed {
			c.cell.leaseEnd += c.claim.Lease - c.old.lease
		}
	}}, []string{
		"Lease/the claim's lease counts and not that of who asks",
	}},
	{"Remaining is zero", fault{after: func(c *call) {
		c.rec.Remaining = 0
	}}, []string{
		"Lease/a running lease is InProgress",
	}},
	{"Remaining is the whole lease", fault{after: func(c *call) {
		if c.rec.State == idempotency.InProgress {
			c.rec.Remaining = c.old.lease
		}
	}}, []string{
		"Lease/Remaining is the time until the lease ends",
	}},
	{"Remaining is beyond the lease", fault{after: func(c *call) {
		c.rec.Remaining *= 2
	}}, []string{
		"Lease/a running lease is InProgress",
	}},
	{"a take-over keeps the fingerprint", fault{after: func(c *call) {
		if c.tookOver() {
			c.cell.fingerprint = c.old.fingerprint
		}
	}}, []string{
		"Lease/a take-over writes its own fingerprint",
	}},
	{"a take-over does not write Once", fault{after: func(c *call) {
		if c.tookOver() {
			c.cell.once = false
		}
	}}, []string{
		"Lease/a take-over writes its own Once",
	}},
	{"a take-over does not write the token", fault{after: func(c *call) {
		if c.tookOver() {
			c.cell.token = c.old.token
		}
	}}, []string{
		"Lease/a claim is taken over when its lease is over",
		"Complete/a former owner is refused after a take-over",
		"Release/a former owner leaves the new one alone",
		"Renew/a claim cannot be renewed after it was taken over",
	}},
	{"the claim of a released cell does not write Once", fault{after: func(c *call) {
		if c.acquired() && c.old.status == released {
			c.cell.once = false
		}
	}}, []string{
		"Lease/the claim of a released cell writes its own Once",
	}},
	{"a refused claim counts", fault{after: func(c *call) {
		if c.rec.State == idempotency.Mismatch || c.rec.State == idempotency.InProgress {
			c.cell.attempt++
		}
	}}, []string{
		"Lease/a claim that is refused changes nothing",
	}},
	{"a refused claim sets Once", fault{after: func(c *call) {
		if c.acquire() && c.claim.Once {
			c.cell.once = true
		}
	}}, []string{
		"Lease/a claim that is refused changes nothing",
	}},
	{"a refused claim prolongs the lease", fault{after: func(c *call) {
		if c.rec.State == idempotency.InProgress {
			c.cell.leaseEnd = c.now + c.old.lease
		}
	}}, []string{
		"Lease/a claim that is refused changes nothing",
		"Lease/a claim is taken over when its lease is over",
	}},
	{"a Once claim is taken over", fault{before: func(c *call) {
		if c.acquire() {
			c.cell.once = false
		}
	}}, []string{
		"Lease/a Once claim is Abandoned when its lease is over",
		"Complete/the result of an abandoned claim is stored",
		"Release/another owner's abandoned claim stays",
	}},
	{"a Once claim is Abandoned at once", fault{after: func(c *call) {
		if c.rec.State == idempotency.InProgress && c.old.once {
			c.refuse(idempotency.Abandoned)
		}
	}}, []string{
		"Lease/a Once claim is Abandoned when its lease is over",
	}},
	{"Once outlives its claim", fault{after: func(c *call) {
		if c.acquired() && c.old.once {
			c.cell.once = true
		}
	}}, []string{
		"Lease/Once does not outlive its claim",
	}},
}

var renewFaults = []brokenStore{
	{"a renewal counts", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.attempt++
			c.rec.Attempt++
		}
	}}, []string{
		"Renew/the attempt stays",
		"Acquire/Attempt counts claims after releases and take-overs",
	}},
	{"a renewal does not renew", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.leaseEnd, c.cell.expires = c.old.leaseEnd, c.old.expires
		}
	}}, []string{
		"Renew/the lease starts anew",
		"Renew/a claim can be renewed when its lease is over",
		"Expiry/a renewal starts the TTL anew",
	}},
	{"a claim is renewed only once", fault{after: func(c *call) {
		if c.renewed() {
			if c.old.leaseEnd > c.old.began+c.old.lease {
				c.cell.leaseEnd = c.old.leaseEnd
			}
			c.cell.began = c.old.began
		}
	}}, []string{
		"Renew/the lease starts anew every time",
	}},
	{"a renewal needs a running lease", fault{after: func(c *call) {
		if c.renewed() && c.lapsed() {
			c.refuse(idempotency.Lost)
		}
	}}, []string{
		"Renew/a claim can be renewed when its lease is over",
	}},
	{"a renewal overwrites the fingerprint", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.fingerprint = bytes.Clone(c.claim.Fingerprint)
		}
	}}, []string{
		"Renew/the fingerprint stays",
		"Renew/an unknown fingerprint stays unknown",
	}},
	{"a renewal fills in the fingerprint", fault{after: func(c *call) {
		if c.renewed() && len(c.old.fingerprint) == 0 {
			c.cell.fingerprint = bytes.Clone(c.claim.Fingerprint)
		}
	}}, []string{
		"Renew/an unknown fingerprint stays unknown",
	}},
	{"a renewal does not set Once", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.once = c.old.once
		}
	}}, []string{
		"Renew/Once is set when it is asked for",
	}},
	{"a renewal unsets Once", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.once = c.claim.Once
		}
	}}, []string{
		"Renew/Once is never unset",
	}},
	{"a former owner can renew", fault{before: func(c *call) {
		if c.acquire() && c.old.status == claimed && c.token == c.old.former {
			c.cell.token = c.token
		}
	}}, []string{
		"Renew/a claim cannot be renewed after it was taken over",
		"Lease/a claim is taken over when its lease is over",
	}},
}
