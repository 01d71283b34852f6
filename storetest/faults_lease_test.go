package storetest

import "github.com/go-idempotency/idempotency"

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
		"Lease/the lease of the claim counts and not that of the call",
		"Concurrency/one of many claims wins",
		"Renew/the lease starts anew every time",
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
	{"the lease is that of the call", fault{before: func(c *call) {
		if c.acquire() && c.old.status == claimed {
			c.cell.leaseEnd += c.claim.Lease - c.old.lease
		}
	}}, []string{
		"Lease/the lease of the claim counts and not that of the call",
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
	{"a take-over does not write the token", fault{after: func(c *call) {
		if c.tookOver() {
			c.cell.token = c.old.token
		}
	}}, []string{
		"Lease/a claim is taken over when its lease is over",
		"Complete/a former owner is refused after a take-over",
		"Release/a former owner leaves the new one alone",
		"Resend/a claim that was taken over is another owner's",
		"Renew/a claim that was taken over is Lost",
	}},
	{"a refused claim counts", fault{after: func(c *call) {
		if c.rec.State == idempotency.Mismatch || c.rec.State == idempotency.InProgress {
			c.cell.attempt++
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
	{"a claim that is Abandoned is given up", fault{after: func(c *call) {
		if c.rec.State == idempotency.Abandoned {
			c.cell.token = "none"
		}
	}}, []string{
		"Lease/a Once claim that is Abandoned stays its owner's",
		"Complete/the result of an abandoned claim is stored",
	}},
}
