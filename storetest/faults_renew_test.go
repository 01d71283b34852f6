package storetest

import (
	"bytes"

	"github.com/go-idempotency/idempotency"
)

var resendFaults = []brokenStore{
	{"a claim that is sent twice counts", fault{after: func(c *call) {
		if c.resent() {
			c.setAttempt(c.old.attempt + 1)
		}
	}}, []string{
		"Resend/the attempt stays",
		"Acquire/Attempt counts claims after releases and take-overs",
	}},
	{"only the first attempt may be sent twice", fault{after: func(c *call) {
		if c.resent() && c.old.attempt != 1 {
			c.refuse(idempotency.Lost)
		}
	}}, []string{
		"Resend/the attempt stays",
	}},
	{"a claim that is sent twice needs a running lease", fault{after: func(c *call) {
		if c.resent() && c.lapsed() {
			c.refuse(idempotency.Lost)
		}
	}}, []string{
		"Resend/the lease may be over",
	}},
	{"a claim that is sent twice when its lease is over counts", fault{after: func(c *call) {
		if c.resent() && c.lapsed() {
			c.setAttempt(c.old.attempt + 1)
		}
	}}, []string{
		"Resend/the lease may be over",
	}},
	{"a claim that is sent twice overwrites the fingerprint", fault{after: func(c *call) {
		if c.resent() {
			c.cell.fingerprint = bytes.Clone(c.claim.Fingerprint)
		}
	}}, []string{
		"Resend/the fingerprint stays",
		"Resend/an unknown fingerprint stays unknown",
	}},
	{"a claim that is sent twice fills in the fingerprint", fault{after: func(c *call) {
		if c.resent() && len(c.old.fingerprint) == 0 {
			c.cell.fingerprint = bytes.Clone(c.claim.Fingerprint)
		}
	}}, []string{
		"Resend/an unknown fingerprint stays unknown",
	}},
	{"a former owner goes on", fault{before: func(c *call) {
		if c.acquire() && c.old.status == claimed && c.token == c.old.former {
			c.cell.token = c.token
		}
	}}, []string{
		"Resend/a claim that was taken over is another owner's",
		"Lease/a claim is taken over when its lease is over",
	}},
}

var renewFaults = []brokenStore{
	{"the renewal of an absent cell is Lost", fault{after: func(c *call) {
		if c.restored() {
			c.refuse(idempotency.Lost)
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
		"Once/a renewal of an absent cell does not set Once",
	}},
	{"the renewal of an absent cell writes nothing", fault{after: func(c *call) {
		if c.restored() {
			c.cell = c.old
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
	}},
	{"the renewal of an absent cell counts from 1", fault{after: func(c *call) {
		if c.restored() {
			c.setAttempt(1)
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
	}},
	{"the renewal of an absent cell counts", fault{after: func(c *call) {
		if c.restored() {
			c.setAttempt(c.claim.Attempt + 1)
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
	}},
	{"the renewal of an absent cell forgets its attempt", fault{after: func(c *call) {
		if c.restored() {
			c.cell.attempt = 1
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
	}},
	{"attempts are stored in one byte", fault{after: func(c *call) {
		if c.acquired() {
			c.setAttempt(int(uint8(c.cell.attempt)))
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
	}},
	{"the renewal of an absent cell writes no fingerprint", fault{after: func(c *call) {
		if c.restored() {
			c.cell.fingerprint = nil
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
		"Expiry/the renewal of an absent cell starts the TTL anew",
	}},
	{"a renewal takes back a cell released under its token", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released && c.owner() {
			c.take(c.claim.Attempt)
		}
	}}, []string{
		"Renew/a cell released under the token is Lost",
		"Renew/a cell released while it was absent is Lost",
		"Concurrency/either Release or a renewal wins",
	}},
	{"a renewal takes a cell released under another token", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released && !c.owner() {
			c.take(c.claim.Attempt)
		}
	}}, []string{
		"Renew/a cell released under another token is Lost",
		"Renew/a cell released while it was absent is Lost",
	}},
	{"a renewal with Once takes a cell released under another token", fault{after: func(c *call) {
		if c.renewal() && c.claim.Once && c.old.status == released && !c.owner() {
			c.take(c.claim.Attempt)
			c.setOnce(true)
		}
	}}, []string{
		"Renew/a cell released under another token is Lost",
	}},
	{"a renewal takes a cell that was released with its attempt", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released && c.old.attempt == c.claim.Attempt {
			c.take(c.claim.Attempt)
		}
	}}, []string{
		"Renew/a cell released under the token is Lost",
		"Renew/a cell released under another token is Lost",
	}},
	{"Mismatch comes before Lost for a renewal", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released && c.differs() {
			c.refuse(idempotency.Mismatch)
		}
	}}, []string{
		"Renew/a cell released under the token is Lost",
		"Renew/a cell released under another token is Lost",
	}},
	{"the renewal of a released cell is InProgress", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released {
			c.refuse(idempotency.InProgress)
		}
	}}, []string{
		"Renew/a cell released under the token is Lost",
		"Renew/a cell released under another token is Lost",
		"Renew/a cell released while it was absent is Lost",
	}},
	{"a refused renewal takes over the mark of a release", fault{after: func(c *call) {
		if c.renewal() && c.old.status == released {
			c.cell.token = c.token
		}
	}}, []string{
		"Renew/a cell released under another token is Lost",
	}},
	{"the owner's renewal ignores its fingerprint", fault{before: func(c *call) {
		if c.renewal() && c.owner() && c.old.status == claimed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Renew/Mismatch comes before the token and the attempt",
		"Renew/a renewal that is refused changes nothing",
	}},
	{"Lost comes before Mismatch on another owner's claim", fault{before: func(c *call) {
		if c.renewal() && !c.owner() && c.old.status == claimed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Renew/Mismatch comes before the token and the attempt",
	}},
	{"Lost comes before Mismatch on another attempt", fault{before: func(c *call) {
		if c.renewal() && c.claim.Attempt != c.old.attempt && c.old.status == claimed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Renew/Mismatch comes before the token and the attempt",
	}},
	{"Lost comes before Mismatch on a completed cell", fault{before: func(c *call) {
		if c.renewal() && c.old.status == completed {
			c.claim.Fingerprint = nil
		}
	}}, []string{
		"Renew/Mismatch comes before the token and the attempt",
	}},
	{"the owner's renewal of a completed cell is Completed", fault{before: func(c *call) {
		if c.renewal() && c.old.status == completed && c.owner() {
			c.claim.Attempt = 0
		}
	}}, []string{
		"Renew/a completed cell is Lost",
		"Concurrency/either Complete or a renewal wins",
	}},
	{"another owner's renewal of a completed cell is Completed", fault{before: func(c *call) {
		if c.renewal() && c.old.status == completed && !c.owner() {
			c.claim.Attempt = 0
		}
	}}, []string{
		"Renew/a completed cell is Lost",
	}},
	{"a renewal takes a completed cell back", fault{after: func(c *call) {
		if c.renewal() && c.old.status == completed && c.owner() {
			c.take(c.claim.Attempt)
		}
	}}, []string{
		"Renew/a completed cell is Lost",
		"Concurrency/either Complete or a renewal wins",
	}},
	{"a renewal is Lost", fault{after: func(c *call) {
		if c.renewed() {
			c.refuse(idempotency.Lost)
		}
	}}, []string{
		"Renew/the attempt stays",
		"Once/a renewal sets Once",
	}},
	{"a renewal counts", fault{after: func(c *call) {
		if c.renewed() {
			c.setAttempt(c.old.attempt + 1)
		}
	}}, []string{
		"Renew/the attempt stays",
	}},
	{"a renewal tells another attempt", fault{after: func(c *call) {
		if c.renewed() {
			c.rec.Attempt = 1
		}
	}}, []string{
		"Renew/the attempt stays",
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
		"Renew/the lease may be over",
		"Once/a renewal sets Once when the lease is over",
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
	{"a renewal ignores its attempt", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && c.owner() {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/another attempt is Lost",
		"Renew/another attempt is Lost when the lease is over",
		"Renew/a late renewal does not mark a late claim",
		"Renew/a renewal that is refused changes nothing",
		"Once/a call that is refused does not unset Once",
	}},
	{"a renewal of an earlier attempt is as good", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && c.owner() && c.claim.Attempt < c.old.attempt {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/another attempt is Lost",
		"Renew/a late renewal does not mark a late claim",
	}},
	{"a renewal of a later attempt is as good", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && c.owner() && c.claim.Attempt > c.old.attempt {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/an absent cell becomes a claim of the attempt",
		"Renew/another attempt is Lost",
	}},
	{"attempts are compared by one byte", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && uint8(c.claim.Attempt) == uint8(c.old.attempt) {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/another attempt is Lost",
	}},
	{"a renewal ignores its attempt when the lease is over", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && c.owner() && c.lapsed() {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/another attempt is Lost when the lease is over",
	}},
	{"a renewal with Once ignores its attempt", fault{before: func(c *call) {
		if c.renewal() && c.claim.Once && c.old.status == claimed && c.owner() {
			c.claim.Attempt = c.old.attempt
		}
	}}, []string{
		"Renew/another attempt is Lost",
		"Renew/a late renewal does not mark a late claim",
	}},
	{"a renewal waits for another owner", fault{after: func(c *call) {
		if c.renewal() && c.old.status == claimed && !c.owner() && !c.lapsed() && c.rec.State == idempotency.Lost {
			c.refuse(idempotency.InProgress)
		}
	}}, []string{
		"Renew/another owner's claim is Lost while its lease runs",
		"Renew/a claim that was taken over is Lost",
	}},
	{"a renewal of the attempt checks no token", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && c.claim.Attempt == c.old.attempt {
			c.cell.token = c.token
		}
	}}, []string{
		"Renew/another owner's claim is Lost while its lease runs",
		"Renew/another owner's claim is Lost when its lease is over",
		"Acquire/tokens are compared verbatim",
	}},
	{"a renewal takes over", fault{before: func(c *call) {
		if c.renewal() && c.old.status == claimed && !c.owner() && c.lapsed() {
			c.claim.Attempt = 0
		}
	}}, []string{
		"Renew/another owner's claim is Lost when its lease is over",
		"Renew/another owner's Once claim is Lost when its lease is over",
		"Renew/a claim that was taken over is Lost",
	}},
	{"a renewal is Abandoned", fault{after: func(c *call) {
		if c.renewal() && c.old.once && !c.owner() && c.lapsed() {
			c.refuse(idempotency.Abandoned)
		}
	}}, []string{
		"Renew/another owner's Once claim is Lost when its lease is over",
	}},
	{"a refused renewal prolongs the lease", fault{after: func(c *call) {
		if c.renewal() && c.refused() && c.old.status == claimed {
			c.cell.leaseEnd = c.now + c.claim.Lease
		}
	}}, []string{
		"Renew/a renewal that is refused changes nothing",
		"Renew/another owner's claim is Lost when its lease is over",
		"Renew/another attempt is Lost when the lease is over",
	}},
	{"a refused renewal counts", fault{after: func(c *call) {
		if c.renewal() && c.refused() {
			c.cell.attempt++
		}
	}}, []string{
		"Renew/a renewal that is refused changes nothing",
		"Renew/a cell released under the token is Lost",
	}},
	{"a refused renewal writes its fingerprint", fault{after: func(c *call) {
		if c.renewal() && c.refused() && c.old.status == claimed && len(c.claim.Fingerprint) > 0 {
			c.cell.fingerprint = bytes.Clone(c.claim.Fingerprint)
		}
	}}, []string{
		"Renew/a renewal that is refused changes nothing",
	}},
}

var onceFaults = []brokenStore{
	{"a renewal does not set Once", fault{after: func(c *call) {
		if c.renewed() {
			c.setOnce(c.old.once)
		}
	}}, []string{
		"Once/a renewal sets Once",
		"Once/a renewal sets Once when the lease is over",
		"Once/a renewal sets Once of any attempt",
	}},
	{"a renewal sets Once in its answer only", fault{after: func(c *call) {
		if c.renewed() {
			c.cell.once = c.old.once
		}
	}}, []string{
		"Once/a renewal sets Once",
	}},
	{"a renewal does not tell Once", fault{after: func(c *call) {
		if c.renewed() {
			c.rec.Once = false
		}
	}}, []string{
		"Once/a renewal sets Once",
		"Once/a renewal does not unset Once",
	}},
	{"a plain renewal does not tell Once", fault{after: func(c *call) {
		if c.renewed() && !c.claim.Once {
			c.rec.Once = false
		}
	}}, []string{
		"Once/a renewal does not unset Once",
	}},
	{"a claim that is sent twice does not tell Once", fault{after: func(c *call) {
		if c.resent() {
			c.rec.Once = false
		}
	}}, []string{
		"Once/a claim that is sent twice does not unset Once",
	}},
	{"a renewal sets Once while the lease runs", fault{after: func(c *call) {
		if c.renewed() && c.lapsed() {
			c.setOnce(c.old.once)
		}
	}}, []string{
		"Once/a renewal sets Once when the lease is over",
	}},
	{"only the first attempt can be Once", fault{after: func(c *call) {
		if c.acquired() && c.cell.attempt != 1 {
			c.setOnce(false)
		}
	}}, []string{
		"Once/a renewal sets Once of any attempt",
	}},
	{"the renewal of an absent cell sets Once", fault{after: func(c *call) {
		if c.restored() {
			c.setOnce(c.claim.Once)
		}
	}}, []string{
		"Once/a renewal of an absent cell does not set Once",
	}},
	{"the renewal of an absent cell sets Once untold", fault{after: func(c *call) {
		if c.restored() {
			c.cell.once = c.claim.Once
		}
	}}, []string{
		"Once/a renewal of an absent cell does not set Once",
	}},
	{"a cell that a renewal restored is never Once", fault{after: func(c *call) {
		if c.restored() {
			c.cell.former = "restored"
		} else if c.renewed() && c.old.former == "restored" {
			c.setOnce(false)
		}
	}}, []string{
		"Once/a renewal of an absent cell does not set Once",
	}},
	{"the claim of an absent cell sets Once", fault{after: func(c *call) {
		if c.anew() {
			c.cell.once = c.claim.Once
		}
	}}, []string{
		"Once/the claim of an absent cell does not set Once",
	}},
	{"the claim of an absent cell tells Once", fault{after: func(c *call) {
		if c.anew() {
			c.rec.Once = c.claim.Once
		}
	}}, []string{
		"Once/the claim of an absent cell does not set Once",
	}},
	{"the claim of a released cell sets Once", fault{after: func(c *call) {
		if c.reclaimed() {
			c.cell.once = c.claim.Once
		}
	}}, []string{
		"Once/the claim of a released cell does not set Once",
	}},
	{"a take-over sets Once", fault{after: func(c *call) {
		if c.tookOver() {
			c.cell.once = c.claim.Once
		}
	}}, []string{
		"Once/a take-over does not set Once",
	}},
	{"a claim that is sent twice sets Once", fault{after: func(c *call) {
		if c.resent() {
			c.setOnce(c.old.once || c.claim.Once)
		}
	}}, []string{
		"Once/a claim that is sent twice does not set Once",
	}},
	{"a refused claim sets Once", fault{after: func(c *call) {
		if c.refused() && !c.renewal() && c.claim.Once {
			c.cell.once = true
		}
	}}, []string{
		"Once/a claim that is refused does not set Once",
	}},
	{"a refused renewal sets Once", fault{after: func(c *call) {
		if c.renewal() && c.refused() && c.claim.Once {
			c.cell.once = true
		}
	}}, []string{
		"Renew/a renewal that is refused changes nothing",
		"Renew/a late renewal does not mark a late claim",
		"Renew/another attempt is Lost",
		"Renew/another owner's claim is Lost while its lease runs",
	}},
	{"a claim that is sent twice unsets Once", fault{after: func(c *call) {
		if c.resent() {
			c.setOnce(false)
		}
	}}, []string{
		"Once/a claim that is sent twice does not unset Once",
		"Lease/a Once claim that is Abandoned stays its owner's",
		"Concurrency/no other call of the owner unsets Once",
	}},
	{"a renewal unsets Once", fault{after: func(c *call) {
		if c.renewed() {
			c.setOnce(c.claim.Once)
		}
	}}, []string{
		"Once/a renewal does not unset Once",
	}},
	{"a refused call unsets Once", fault{after: func(c *call) {
		if c.refused() {
			c.cell.once = false
		}
	}}, []string{
		"Once/a call that is refused does not unset Once",
	}},
	{"a refused Complete unsets Once", fault{after: func(c *call) {
		if c.complete() && c.err != nil {
			c.cell.once = false
		}
	}}, []string{
		"Once/a call that is refused does not unset Once",
		"Complete/another owner's claim is refused",
	}},
	{"a refused Release unsets Once", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && !c.owner() {
			c.cell.once = false
		}
	}}, []string{
		"Once/a call that is refused does not unset Once",
		"Release/another owner's abandoned claim stays",
	}},
	{"Once outlives a release", fault{after: func(c *call) {
		if c.reclaimed() && c.old.once {
			c.cell.once = true
		}
	}}, []string{
		"Once/Once ends with a release",
	}},
	{"Once outlives the cell", fault{after: func(c *call) {
		if c.acquired() && c.old.status == absent {
			c.cell.once = c.store.cells[c.key].once
		}
	}}, []string{
		"Once/Once ends with the cell",
	}},
	{"Once outlives the result", fault{after: func(c *call) {
		before := c.store.cells[c.key]
		if c.complete() && c.err == nil || c.anew() && before.status == completed {
			c.cell.once = before.once
		}
	}}, []string{
		"Once/Once ends with the cell",
	}},
}
