package storetest

import (
	"context"
	"slices"
	"time"
)

var raceFaults = []brokenStore{
	{"an absent cell is checked, then claimed", fault{racy: func(c *call) bool {
		return c.acquire() && c.old.status == absent
	}}, []string{
		"Concurrency/one of many claims wins",
		"Concurrency/either Release of an absent cell or its own claim wins",
	}},
	{"a lease is checked, then taken over", fault{racy: func(c *call) bool {
		return c.acquire() && c.old.status == claimed && !c.owner() && c.lapsed()
	}}, []string{
		"Concurrency/one of many take-overs wins",
	}},
	{"an absent cell is checked, then renewed", fault{racy: func(c *call) bool {
		return c.renewal() && c.old.status == absent
	}}, []string{
		"Concurrency/either a claim or the renewal of an absent cell wins",
		"Concurrency/either Release of an absent cell or its own claim wins",
	}},
	{"a lapsed claim is checked, then resent", fault{racy: func(c *call) bool {
		return c.acquire() && !c.renewal() && c.old.status == claimed && c.owner() && c.lapsed()
	}}, []string{
		"Concurrency/either a claim that is sent twice or a take-over wins",
	}},
	{"a lapsed claim is checked, then renewed", fault{racy: func(c *call) bool {
		return c.renewal() && c.old.status == claimed && c.owner() && c.lapsed()
	}}, []string{
		"Concurrency/either a renewal or a take-over wins",
	}},
	{"a claim is checked, then completed", fault{racy: func(c *call) bool {
		return c.complete() && c.old.status == claimed
	}}, []string{
		"Concurrency/either Complete or a take-over wins",
	}},
	{"an absent cell is checked, then completed", fault{racy: func(c *call) bool {
		return c.complete() && c.old.status == absent
	}}, []string{
		"Concurrency/one of many Completes wins",
	}},
	{"a running claim is checked, then resent", fault{racy: func(c *call) bool {
		return c.acquire() && !c.renewal() && c.old.status == claimed && c.owner() && !c.lapsed()
	}}, []string{
		"Concurrency/either Complete or a renewal wins",
		"Concurrency/either Release or a renewal wins",
		"Concurrency/no other call of the owner unsets Once",
	}},
	{"a running claim is checked, then renewed", fault{racy: func(c *call) bool {
		return c.renewal() && !c.claim.Once && c.old.status == claimed && c.owner() && !c.lapsed()
	}}, []string{
		"Concurrency/either Complete or a renewal wins",
		"Concurrency/either Release or a renewal wins",
		"Concurrency/no other call of the owner unsets Once",
	}},
	{"a claim is checked, then released", fault{racy: func(c *call) bool {
		return c.release() && c.old.status == claimed && c.owner()
	}}, []string{
		"Concurrency/either Complete or Release wins",
		"Concurrency/either Release or a take-over wins",
	}},
	{"an absent cell is checked, then released", fault{racy: func(c *call) bool {
		return c.release() && c.old.status == absent
	}}, []string{
		"Concurrency/either Release of an absent cell or a claim wins",
	}},
	{"a released cell is checked, then claimed", fault{racy: func(c *call) bool {
		return c.acquire() && c.old.status == released
	}}, []string{
		"Concurrency/a release admits one claim",
	}},
	{"a lapsed claim is checked, then forgotten", fault{racy: func(c *call) bool {
		return c.forgets() && c.old.status == claimed
	}}, []string{
		"Forget/either Forget or a take-over comes first",
	}},
}

var watchFaults = []brokenStore{
	{"watches never fire", fault{silent: func(*call) bool { return true }}, []string{
		"Watch/Complete closes the channel",
		"Watch/Release closes the channel",
		"Watch/all channels are closed",
		"Watch/a watch may begin before the claim",
	}},
	{"watches do not fire on Complete", fault{silent: (*call).complete}, []string{
		"Watch/Complete closes the channel",
	}},
	{"watches do not fire on Forget", fault{silent: (*call).forgets}, []string{
		"Forget/Forget closes the channel",
	}},
	{"watches do not fire on Release", fault{silent: (*call).release}, []string{
		"Watch/Release closes the channel",
	}},
	{"a claim ends the watches", fault{drop: (*call).anew}, []string{
		"Watch/a watch may begin before the claim",
	}},
	{"a claim that is sent twice ends the watches", fault{drop: (*call).resent}, []string{
		"Watch/a watch outlives a renewal",
	}},
	{"a renewal ends the watches", fault{drop: (*call).renewed}, []string{
		"Watch/a watch outlives a renewal",
	}},
	{"a take-over ends the watches", fault{drop: (*call).tookOver}, []string{
		"Watch/a watch outlives a take-over",
	}},
	{"a key has one watch", fault{watch: func(s *reference, key string) {
		s.watches[key] = s.watches[key][len(s.watches[key])-1:]
	}}, []string{
		"Watch/all channels are closed",
		"Watch/a watch that has ended ends no other",
	}},
	{"a watch that has ended ends all", fault{drop: func(c *call) bool {
		ended := func(ctx context.Context) bool { return ctx.Err() != nil }
		return slices.ContainsFunc(c.store.watcher[c.key], ended)
	}}, []string{
		"Watch/a watch that has ended ends no other",
	}},
	{"Watch waits for the change", fault{watch: func(*reference, string) {
		<-time.After(time.Second)
	}}, []string{
		"Watch/Watch does not wait",
	}},
	{"watches leak goroutines", fault{watch: func(*reference, string) { go func() { select {} }() }}, []string{
		"Watch/a watch that has ended leaves no goroutine",
	}},
}
