package storetest

import (
	"time"

	"github.com/go-idempotency/idempotency"
)

// show makes it an Inspect that returns something else, if it finds a cell with
// this state.
func (c *call) show(s idempotency.State, change func(*idempotency.Cell)) {
	if c.inspects && c.view.State == s {
		change(&c.view)
	}
}

// viewFault shows cells of one state wrongly.
func viewFault(s idempotency.State, change func(*idempotency.Cell)) fault {
	return fault{after: func(c *call) { c.show(s, change) }}
}

var inspectFaults = []brokenStore{
	{"an absent cell is shown as released", viewFault(0, func(v *idempotency.Cell) {
		v.State, v.TTL = idempotency.Released, 1
	}), []string{
		"Inspect/an absent cell is the zero Cell",
		"Inspect/an expired cell is absent",
		"Forget/an absent cell stays absent",
		"Forget/a claim that was forgotten expires",
	}},
	{"Inspect claims an absent cell", fault{after: func(c *call) {
		if c.inspects && c.old.status == absent {
			c.cell = cell{status: released, attempt: 1, expires: c.now + long}
		}
	}}, []string{
		"Inspect/an absent cell is the zero Cell",
	}},
	{"a running claim is shown as lapsed", viewFault(idempotency.InProgress, func(v *idempotency.Cell) {
		v.State, v.Lease = idempotency.Lapsed, 0
	}), []string{
		"Inspect/a running lease is InProgress",
	}},
	{"Once of a running claim is not shown", viewFault(idempotency.InProgress, func(v *idempotency.Cell) {
		v.Once = false
	}), []string{
		"Inspect/a running lease is InProgress",
	}},
	{"an abandoned claim is shown as lapsed", viewFault(idempotency.Abandoned, func(v *idempotency.Cell) {
		v.State = idempotency.Lapsed
	}), []string{
		"Inspect/Lapsed and Abandoned begin when the lease ends",
	}},
	{"a claim is always shown as running", viewFault(idempotency.Lapsed, func(v *idempotency.Cell) {
		v.State, v.Lease = idempotency.InProgress, 1
	}), []string{
		"Inspect/Lapsed and Abandoned begin when the lease ends",
		"Forget/a lapsed claim is free for any request",
	}},
	{"the attempt is always shown as 1", viewFault(idempotency.Lapsed, func(v *idempotency.Cell) {
		v.Attempt = 1
	}), []string{
		"Inspect/Lapsed and Abandoned begin when the lease ends",
	}},
	{"a marker is shown without its attempt", viewFault(idempotency.Released, func(v *idempotency.Cell) {
		v.Attempt = 0
	}), []string{
		"Inspect/a released cell counts attempts",
	}},
	{"a marker is shown as Once", viewFault(idempotency.Released, func(v *idempotency.Cell) {
		v.Once = v.Attempt == 1
	}), []string{
		"Inspect/a released cell counts attempts",
	}},
	{"a value is shown in part", viewFault(idempotency.Completed, func(v *idempotency.Cell) {
		v.Value = v.Value[:min(len(v.Value), 1<<16)]
	}), []string{
		"Inspect/a completed cell shows its result",
	}},
	{"the fingerprint of a result is not shown", viewFault(idempotency.Completed, func(v *idempotency.Cell) {
		v.Fingerprint = nil
	}), []string{
		"Inspect/a completed cell shows its result",
	}},
	{"the TTL is not shown", viewFault(idempotency.Completed, func(v *idempotency.Cell) { v.TTL = 0 }), []string{
		"Inspect/a completed cell shows its result",
	}},
	{"the lease is shown after its end", viewFault(idempotency.Lapsed, func(v *idempotency.Cell) { v.Lease = -1 }), []string{
		"Inspect/Lapsed and Abandoned begin when the lease ends",
	}},
	{"the whole lease is shown", fault{after: func(c *call) {
		c.show(idempotency.InProgress, func(v *idempotency.Cell) { v.Lease = c.cell.lease })
	}}, []string{
		"Inspect/Lease and TTL are the times that are left",
	}},
	{"the TTL is shown from the claim on", viewFault(idempotency.Completed, func(v *idempotency.Cell) {
		v.TTL += 10 * time.Second
	}), []string{
		"Inspect/Lease and TTL are the times that are left",
	}},
	{"Inspect renews", fault{after: func(c *call) {
		if c.inspects && c.cell.status == claimed {
			c.cell.leaseEnd += c.cell.lease
			c.cell.expires += c.cell.lease
		}
	}}, []string{
		"Inspect/Inspect changes nothing",
	}},
	{"Inspect prolongs a result", fault{after: func(c *call) {
		if c.inspects && c.cell.status == completed {
			c.cell.expires += forever
		}
	}}, []string{
		"Inspect/Inspect changes nothing",
	}},
	{"no Owner is shown", fault{after: func(c *call) {
		c.view.Owner = ""
	}}, []string{
		"Inspect/Owner tells owners apart",
	}},
	{"each Inspect shows another Owner", fault{after: func(c *call) {
		c.view.Owner += randomKey()
	}}, []string{
		"Inspect/Owner tells owners apart",
	}},
	{"a claim's fingerprint is shown from the buffer", fault{after: func(c *call) {
		if c.forgets() && c.err == nil {
			clear(c.old.fingerprint)
		}
	}}, []string{
		"Inspect/returned slices stay valid",
	}},
	{"Inspect shows nothing but errors", fault{after: func(c *call) {
		if c.inspects {
			c.err = idempotency.ErrLeaseLost
		}
	}}, []string{
		"Inspect/an absent cell is the zero Cell",
	}},
}

// forgot reports whether it is a Forget that had an effect.
func (c *call) forgot() bool { return c.forgets() && c.err == nil }

var forgetFaults = []brokenStore{
	{"Forget does nothing", fault{after: func(c *call) {
		if c.forgets() {
			c.undo(c.err)
		}
	}}, []string{
		"Forget/a lapsed claim is free for any request",
		"Forget/an abandoned claim is free for any request",
		"Forget/an owner that was only stopped may still renew",
		"Forget/a completed cell is free for any request",
		"Forget/nothing brings a forgotten result back",
		"Forget/a second time changes nothing",
	}},
	{"Forget deletes the cell", fault{after: func(c *call) {
		if c.forgot() {
			c.cell = cell{}
		}
	}}, []string{
		"Forget/a lapsed claim is free for any request",
		"Forget/an abandoned claim is free for any request",
		"Forget/a completed cell is free for any request",
		"Forget/nothing brings a forgotten result back",
		"Forget/a released cell stays",
		"Forget/what is kept is kept for the rest of its TTL",
		"Forget/a second time changes nothing",
		"Forget/an owner that was only stopped may still release",
		"Forget/an owner that comes after the next run is refused",
	}},
	{"Forget releases a claim", fault{after: func(c *call) {
		if c.forgot() && c.old.status == claimed {
			c.cell.status = released
		}
	}}, []string{
		"Forget/an owner that was only stopped may still complete",
		"Forget/an owner that was only stopped may still renew",
	}},
	{"Forget leaves a marker without an attempt", fault{after: func(c *call) {
		if c.forgot() && c.old.status == completed {
			c.cell.attempt = 0
		}
	}}, []string{
		"Forget/a completed cell is free for any request",
		"Forget/what is kept is kept for the rest of its TTL",
	}},
	{"Forget writes where nothing is", fault{after: func(c *call) {
		if c.forgot() && c.old.status == absent {
			c.cell = cell{status: released, attempt: 1, expires: c.now + long}
		}
	}}, []string{
		"Forget/an absent cell stays absent",
	}},
	{"Forget frees a running claim", fault{before: func(c *call) {
		if c.forgets() {
			c.cell.leaseEnd = 0
			c.seen.State = idempotency.Lapsed
			if c.cell.once {
				c.seen.State = idempotency.Abandoned
			}
		}
	}}, []string{
		"Forget/a running lease is ErrInProgress",
		"Forget/a claim whose lease began anew is ErrInProgress",
	}},
	{"Forget unsets the Once of a running claim", fault{after: func(c *call) {
		if c.forgets() {
			c.cell.once = false
		}
	}}, []string{
		"Forget/a running lease is ErrInProgress",
		"Forget/a claim whose lease began anew is ErrInProgress",
	}},
	{"Forget forgets the fingerprint of a running claim", fault{after: func(c *call) {
		if c.forgets() {
			c.cell.fingerprint = nil
		}
	}}, []string{
		"Forget/a running lease is ErrInProgress",
	}},
	{"Forget keeps the fingerprint", fault{after: func(c *call) {
		if c.forgot() && c.old.status == claimed {
			c.cell.fingerprint = c.old.fingerprint
		}
	}}, []string{
		"Forget/a lapsed claim is free for any request",
		"Forget/an abandoned claim is free for any request",
	}},
	{"Forget keeps Once", fault{after: func(c *call) {
		if c.forgot() {
			c.cell.once = c.old.once
		}
	}}, []string{
		"Forget/an abandoned claim is free for any request",
	}},
	{"Forget keeps the cell for ever", fault{after: func(c *call) {
		if c.forgot() && c.cell.status != absent {
			c.cell.expires = forever
		}
	}}, []string{
		"Forget/a claim that was forgotten expires",
	}},
}

// forgetMeanwhileFaults forget a cell that is not the one that was seen.
var forgetMeanwhileFaults = []brokenStore{
	{"Forget compares no state", fault{before: func(c *call) {
		if c.forgets() {
			v := call{cell: c.cell, now: c.now}
			inspect(&v)
			c.seen.State, c.seen.Attempt = v.view.State, v.view.Attempt
		}
	}}, []string{
		"Forget/a cell that was completed meanwhile is ErrCellChanged",
		"Forget/a cell that was marked meanwhile is ErrCellChanged",
	}},
	{"Forget compares no attempt and no owner", fault{before: func(c *call) {
		if c.forgets() {
			c.seen.Owner, c.seen.Attempt = c.cell.token, c.cell.attempt
			if c.cell.status == completed {
				c.seen.Attempt = 0
			}
		}
	}}, []string{
		"Forget/a cell that another attempt has left is ErrCellChanged",
		"Forget/a cell of another owner is ErrCellChanged",
	}},
	{"Forget compares no owner", fault{before: func(c *call) {
		if c.forgets() {
			c.seen.Owner = c.cell.token
		}
	}}, []string{
		"Forget/a cell of another owner is ErrCellChanged",
	}},
	{"a refused Forget is silent", fault{after: func(c *call) {
		if c.forgets() {
			c.err = nil
		}
	}}, []string{
		"Forget/a running lease is ErrInProgress",
		"Forget/a cell of another owner is ErrCellChanged",
	}},
}
