package storetest

import (
	"bytes"
	"strings"

	"github.com/go-idempotency/idempotency"
)

var completeFaults = []brokenStore{
	{"Complete stores nothing", fault{after: func(c *call) {
		if c.complete() && c.err == nil {
			c.undo(nil)
		}
	}}, []string{
		"Complete/the owner's result is stored",
	}},
	{"Complete forgets the value", fault{after: func(c *call) {
		if c.complete() {
			c.cell.value = nil
		}
	}}, []string{
		"Complete/the owner's result is stored",
	}},
	{"Complete needs a running lease", fault{after: func(c *call) {
		if c.complete() && c.old.status == claimed && c.lapsed() {
			c.undo(idempotency.ErrLeaseLost)
		}
	}}, []string{
		"Complete/the result is stored after the lease is over",
		"Complete/the result of an abandoned claim is stored",
	}},
	{"Complete refuses an abandoned claim", fault{after: func(c *call) {
		if c.complete() && c.old.once && c.lapsed() {
			c.undo(idempotency.ErrLeaseLost)
		}
	}}, []string{
		"Complete/the result of an abandoned claim is stored",
	}},
	{"Complete refuses an absent cell", fault{after: func(c *call) {
		if c.complete() && c.old.status == absent {
			c.undo(idempotency.ErrLeaseLost)
		}
	}}, []string{
		"Complete/an absent cell is written",
		"Expiry/Complete writes after the claim has expired",
	}},
	{"Complete keeps the claim's fingerprint", fault{after: func(c *call) {
		if c.complete() && c.old.status == claimed && c.err == nil {
			c.cell.fingerprint = c.old.fingerprint
		}
	}}, []string{
		"Complete/the fingerprint replaces that of the claim",
	}},
	{"a second Complete fails", fault{after: func(c *call) {
		if c.complete() && c.old.status == completed {
			c.err = idempotency.ErrLeaseLost
		}
	}}, []string{
		"Complete/a second time by the owner is no error",
		"Complete/a second time by the owner changes nothing",
	}},
	{"a second Complete writes", fault{before: func(c *call) {
		if c.complete() && c.old.status == completed && c.owner() {
			c.cell = cell{}
		}
	}}, []string{
		"Complete/a second time by the owner changes nothing",
	}},
	{"a second Complete starts the TTL anew", fault{after: func(c *call) {
		if c.complete() && c.old.status == completed && c.owner() {
			c.cell.expires = c.now + c.result.TTL
		}
	}}, []string{
		"Complete/a second time by the owner changes nothing",
	}},
	{"a second Complete prolongs the TTL", fault{after: func(c *call) {
		if c.complete() && c.err == nil && c.old.status == completed {
			c.cell.expires = max(c.cell.expires, c.now+c.result.TTL)
		}
	}}, []string{
		"Expiry/a second Complete does not prolong the first",
	}},
	{"Complete checks no token", fault{before: func(c *call) {
		if c.complete() {
			c.token = c.cell.token
		}
	}}, []string{
		"Complete/another owner's claim is refused",
		"Complete/a former owner is refused after a take-over",
		"Complete/a cell completed under another token is refused",
	}},
	{"Complete checks no token when the lease is over", fault{before: func(c *call) {
		if c.complete() && c.lapsed() {
			c.token = c.cell.token
		}
	}}, []string{
		"Complete/another owner's claim is refused",
	}},
	{"Complete overwrites any result", fault{before: func(c *call) {
		if c.complete() && c.old.status == completed {
			c.cell = cell{}
		}
	}}, []string{
		"Complete/a cell completed under another token is refused",
	}},
	{"Complete writes on a released cell", fault{before: func(c *call) {
		if c.complete() && c.old.status == released {
			c.cell = cell{}
		}
	}}, []string{
		"Complete/a released cell is refused",
		"Complete/a cell released while it was absent is refused",
	}},
	{"a refused Complete is silent", fault{after: func(c *call) {
		if c.complete() {
			c.err = nil
		}
	}}, []string{
		"Complete/a former owner is refused after a take-over",
		"Concurrency/one of many Completes wins",
	}},
}

var releaseFaults = []brokenStore{
	{"Release does nothing", fault{after: func(c *call) {
		if c.release() {
			c.undo(nil)
		}
	}}, []string{
		"Release/the owner's claim is freed",
		"Release/an absent cell remembers the release",
		"Watch/Release closes the channel",
	}},
	{"Release does not free a Once claim", fault{after: func(c *call) {
		if c.release() && c.old.once {
			c.undo(nil)
		}
	}}, []string{
		"Release/a Once claim is freed",
	}},
	{"Release does not free a claim when its lease is over", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() && c.lapsed() && !c.old.once {
			c.undo(nil)
		}
	}}, []string{
		"Release/one's own lapsed claim is freed",
	}},
	{"Release deletes the cell", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && c.owner() {
			c.cell = cell{}
		}
	}}, []string{
		"Release/a delayed claim is Lost",
		"Release/the owner's claim is freed",
		"Release/a second time changes nothing",
		"Complete/a released cell is refused",
	}},
	{"Release of an absent cell leaves nothing", fault{after: func(c *call) {
		if c.release() && c.old.status == absent {
			c.undo(nil)
		}
	}}, []string{
		"Release/an absent cell remembers the release",
		"Complete/a cell released while it was absent is refused",
	}},
	{"Release of an absent cell counts", fault{after: func(c *call) {
		if c.release() && c.old.status == absent {
			c.cell.attempt = 1
		}
	}}, []string{
		"Release/an absent cell that was released has had no attempts",
	}},
	{"a second Release writes", fault{before: func(c *call) {
		if c.release() && c.old.status == released {
			c.cell = cell{}
		}
	}}, []string{
		"Release/a second time changes nothing",
		"Release/a cell released under another token stays",
		"Expiry/a second release does not prolong the first",
	}},
	{"a second Release starts the time anew", fault{after: func(c *call) {
		if c.release() && c.old.status == released {
			c.cell.expires = c.now + c.keep
		}
	}}, []string{
		"Expiry/a second release does not prolong the first",
		"Expiry/a second release does not shorten the first",
	}},
	{"a second Release prolongs the time", fault{after: func(c *call) {
		if c.release() && c.old.status == released {
			c.cell.expires = max(c.old.expires, c.now+c.keep)
		}
	}}, []string{
		"Expiry/a second release does not prolong the first",
	}},
	{"Release checks no token", fault{before: func(c *call) {
		if c.release() {
			c.token = c.old.token
		}
	}}, []string{
		"Release/another owner's claim stays",
		"Release/another owner's abandoned claim stays",
		"Release/a former owner leaves the new one alone",
	}},
	{"Release takes over the mark of another", fault{after: func(c *call) {
		if c.release() && c.old.status == released {
			c.cell.token = c.token
		}
	}}, []string{
		"Release/a cell released under another token stays",
	}},
	{"Release frees a completed cell", fault{after: func(c *call) {
		if c.release() && c.old.status == completed {
			c.cell = cell{}
		}
	}}, []string{
		"Release/a completed cell stays",
	}},
	{"Release fails for a former owner", fault{after: func(c *call) {
		if c.release() && c.old.status == claimed && !c.owner() {
			c.err = idempotency.ErrLeaseLost
		}
	}}, []string{
		"Release/a former owner leaves the new one alone",
		"Release/another owner's claim stays",
	}},
}

var valueFaults = []brokenStore{
	{"an empty value is no value", fault{after: func(c *call) {
		if c.rec.State == idempotency.Completed && len(c.rec.Value) == 0 {
			c.refuse(idempotency.InProgress)
			c.rec.Remaining = 1
		}
	}}, []string{
		"Values/an empty value",
	}},
	{"values are text", fault{after: func(c *call) {
		if c.complete() {
			c.cell.value = bytes.ToValidUTF8(c.cell.value, nil)
		}
	}}, []string{
		"Values/a binary value and fingerprint",
		"Values/a large value",
	}},
	{"values end at a zero byte", fault{after: func(c *call) {
		if c.complete() {
			c.cell.value, _, _ = bytes.Cut(c.cell.value, []byte("\x00"))
		}
	}}, []string{
		"Values/a binary value and fingerprint",
	}},
	{"values are cut at 64 KiB", fault{after: func(c *call) {
		c.cell.value = c.cell.value[:min(len(c.cell.value), 1<<16)]
	}}, []string{
		"Values/a large value",
	}},
	{"keys are compared without case", fault{key: strings.ToLower}, []string{
		"Values/every key has a cell of its own",
	}},
	{"keys are cut at 128 bytes", fault{key: func(key string) string { return key[:min(len(key), 128)] }}, []string{
		"Values/every key has a cell of its own",
	}},
	{"all keys are one", fault{key: func(string) string { return "" }}, []string{
		"Concurrency/different keys do not disturb each other",
		"Values/every key has a cell of its own",
	}},
	{"the claim's fingerprint is not copied", fault{after: func(c *call) {
		if c.anew() {
			c.cell.fingerprint = c.claim.Fingerprint
		}
	}}, []string{
		"Values/the fingerprint of a claim is copied",
	}},
	{"the result's fingerprint is not copied", fault{after: func(c *call) {
		if c.complete() && c.err == nil {
			c.cell.fingerprint = c.result.Fingerprint
		}
	}}, []string{
		"Values/the fingerprint and value of a result are copied",
	}},
	{"the result's value is not copied", fault{after: func(c *call) {
		if c.complete() && c.err == nil {
			c.cell.value = c.result.Value
		}
	}}, []string{
		"Values/the fingerprint and value of a result are copied",
	}},
	{"buffers are used again", fault{reuse: true}, []string{
		"Values/returned slices stay valid",
	}},
}
