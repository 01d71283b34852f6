package storetest

import (
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// valueRules are about the bytes that go in and come out.
var valueRules = []rule{
	{name: "an empty value", check: func(e *env) {
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{fp: "one"})
		e.acquire(claim{token: "B"}).completed("one", "")

		e.use(randomKey())
		e.acquire(claim{token: "A"}).acquired(1)
		e.finish(e.token("A"), idempotency.Result{Fingerprint: []byte{}, Value: []byte{}, TTL: long}, nil)
		e.acquire(claim{token: "B"}).completed("", "")
	}},

	{name: "a binary value and fingerprint", check: func(e *env) {
		all := make([]byte, 256) // with zero bytes, line ends and invalid UTF-8
		for i := range all {
			all[i] = byte(i)
		}
		value := string(all) + "\x00\r\n\xff\x00"
		fp := value[len(value)-255:] // as long as one may be
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{fp: fp, value: value})
		e.acquire(claim{token: "B"}).completed(fp, value)
	}},

	{name: "a large value", check: func(e *env) {
		value := strings.Repeat("\x00\xfe0123456789abcd", 1<<16)
		if s, ok := e.store.(limiter); ok {
			value = value[:min(len(value), s.MaxValue())]
		}
		e.acquire(claim{token: "A"}).acquired(1)
		e.complete("A", result{value: value})
		e.acquire(claim{token: "B"}).completed("", value)
	}},

	{name: "every key has a cell of its own", check: differentKeys},

	{name: "the fingerprint of a claim is copied", check: func(e *env) {
		c := e.claim(claim{token: "A", fp: "one"})
		e.send(c).acquired(1)
		copy(c.Fingerprint, "two")
		e.note("the caller reuses the slice")
		e.acquire(claim{token: "B", fp: "one"}).is(idempotency.InProgress)
	}},

	{name: "the fingerprint and value of a result are copied", check: func(e *env) {
		r := e.result(result{fp: "one", value: "done"})
		e.acquire(claim{token: "A"}).acquired(1)
		e.finish(e.token("A"), r, nil)
		copy(r.Fingerprint, "two")
		copy(r.Value, "null")
		e.note("the caller reuses the slices")
		e.acquire(claim{token: "B"}).completed("one", "done")
	}},

	{name: "returned slices stay valid", check: returnedSlices},
}

// differentKeys uses keys at once that a store may well confuse.
func differentKeys(e *env) {
	k := randomKey()
	block := strings.Repeat("x", 150)
	keys := []string{
		k, k + "A", k + "a", k + "/../x", k + "*", k + "%", k + "_", k + "-", k + "'\"`;\\",
		k + ":", k + ":1", k + "{a}", "{a}" + k, k + "{b}", k + "}{",
		k + block + "1", k + block + "2",
	}
	for _, key := range keys {
		e.use(key)
		e.acquire(claim{token: "A", fp: "one"}).acquired(1)
	}
	for _, key := range keys {
		e.use(key)
		e.complete("A", result{fp: "one", value: key})
	}
	for _, key := range keys {
		e.use(key)
		e.acquire(claim{token: "B"}).completed("one", key)
	}
}

// returnedSlices keeps an answer while the cell gets another result.
func returnedSlices(e *env) {
	var b answer
	done, ttl := e.within(func(ttl time.Duration) span {
		done := e.complete("A", result{fp: "one", value: "done", ttl: ttl})
		b = e.acquire(claim{token: "B"})
		return done
	})
	b.completed("one", "done")

	e.changesAfter(done, ttl, claim{token: "C"}, idempotency.Completed).acquired(1)
	e.complete("C", result{fp: "two", value: "null"})
	e.acquire(claim{token: "D"}).completed("two", "null")
	e.same("fingerprint", b.Fingerprint, "one")
	e.same("value", b.Value, "done")
}
