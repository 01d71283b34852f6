package fuzz

import (
	"fmt"
	"slices"
	"time"
)

// The options that are the same in every sequence of FuzzMiddleware.
const (
	modelTTL   = 10 * time.Minute
	modelLease = 30 * time.Second

	modelSlow        = 65 * time.Second // how long a slow handler takes
	modelLastRenewal = 60 * time.Second // when its lease is renewed for the last time

	modelMaxBody     = 32 // larger ones are not buffered
	modelMaxResponse = 64 // larger ones are not kept
)

// modelRequest is one request of a sequence, and what the handler does if it
// runs for it.
type modelRequest struct {
	pause                    time.Duration // virtual time that passes first
	method, path, query, key string        // key: the header line; "-" is none
	payload, auth, tenant    string

	status                       int
	discard, commit, panic       bool
	large, flush, slow, earlyEnd bool // earlyEnd: the body is left unread
}

// modelOptions are the options that differ between sequences.
type modelOptions struct{ atMostOnce, scope, requireKey bool }

// modelCell is what the store has under a key, as far as a client can tell.
type modelCell struct {
	state       string // "claimed", "completed", "released"
	fingerprint string
	digest      string // of a large body
	once        bool
	running     bool
	attempt     int
	leaseEnd    time.Duration
	expiry      time.Duration
	answer      string // what a retry gets
	notStored   bool   // which is not a replay
}

// modelAnswer is what a client gets, and what the middleware reports.
type modelAnswer struct {
	text    string // as describe says it
	event   string // "outcome attempt", "" for none
	run     int    // the number of the run; 0: none
	attempt int
}

// A model says what should become of a sequence of requests. It knows the
// documentation and nothing of the code.
type model struct {
	opts  modelOptions
	now   time.Duration
	cells map[string]*modelCell
	runs  int
	ends  []modelEnd
}

// modelEnd is the end of a slow run that is still to come.
type modelEnd struct {
	at   time.Duration
	cell *modelCell
	req  modelRequest
	run  int
}

// pass lets time pass, and slow runs end.
func (m *model) pass(d time.Duration) {
	m.now += d
	slices.SortStableFunc(m.ends, func(a, b modelEnd) int { return int(a.at - b.at) })
	for len(m.ends) > 0 && m.ends[0].at <= m.now {
		e := m.ends[0]
		m.ends = m.ends[1:]
		m.settle(e.cell, e.req, e.run, e.at)
	}
}

// serve predicts what becomes of r.
func (m *model) serve(r modelRequest) modelAnswer {
	keys := map[string]string{`"a"`: "a", "a": "a", "b": "b", `"x;y" ;`: "", "": ""}
	key, present := keys[r.key]
	switch {
	case r.method == "GET", !present && !m.opts.requireKey:
		return m.passThrough(r)
	case !present:
		return modelAnswer{text: "400 key_missing", event: "key_missing 0"}
	case key == "":
		return modelAnswer{text: "400 key_invalid", event: "key_invalid 0"}
	}
	who := r.auth
	name := fmt.Sprint(r.method, " ", r.path, " ", key)
	if m.opts.scope && r.tenant != "" {
		name, who = name+" of "+r.tenant, ""
	}
	print := who + "?" + r.query + ":" + r.payload
	if len(r.payload) > modelMaxBody {
		print = who + "?" + r.query + " large"
	}
	c := m.cells[name]
	if c != nil && c.expiry <= m.now && !c.running {
		c = nil
	}
	switch {
	case c == nil:
		c = &modelCell{attempt: 1}
		m.cells[name] = c
	case c.state == "released":
		c.attempt++
	case c.fingerprint != print:
		return modelAnswer{text: "422 key_reused", event: "key_reused 0"}
	case c.state == "completed":
		return m.stored(c, r)
	case c.running || c.leaseEnd > m.now:
		return modelAnswer{text: "409 in_progress", event: "in_progress 0"}
	case c.once:
		return modelAnswer{text: "409 outcome_unknown", event: "outcome_unknown 0"}
	default:
		c.attempt++
	}
	return m.run(c, r, print)
}

// passThrough predicts a request that the middleware does not protect.
func (m *model) passThrough(r modelRequest) modelAnswer {
	m.runs++
	r.discard, r.commit = false, false
	return modelAnswer{text: r.answer(m.runs), run: m.runs}
}

// stored predicts the retry of what has finished.
func (m *model) stored(c *modelCell, r modelRequest) modelAnswer {
	digest := r.digest()
	if c.digest == "unread" {
		digest = "unread"
	}
	switch {
	case c.digest != digest:
		return modelAnswer{text: "422 key_reused", event: "key_reused 0"}
	case c.notStored:
		return modelAnswer{text: c.answer, event: "response_not_stored 0"}
	}
	return modelAnswer{text: "replay " + c.answer, event: "replayed 0"}
}

// run predicts a run of the handler under a key.
func (m *model) run(c *modelCell, r modelRequest, print string) modelAnswer {
	m.runs++
	c.state, c.fingerprint, c.digest, c.running = "claimed", print, "", true
	c.once = m.opts.atMostOnce || r.commit
	c.leaseEnd, c.expiry = m.now+modelLease, m.now+modelTTL
	a := modelAnswer{text: r.answer(m.runs), run: m.runs, attempt: c.attempt}
	switch {
	case r.panic:
		a.event = fmt.Sprint("panicked ", c.attempt)
	case r.isFinal(m.opts.atMostOnce):
		a.event = fmt.Sprint("executed ", c.attempt)
	default:
		a.event = fmt.Sprint("released ", c.attempt)
	}
	if r.slow {
		m.ends = append(m.ends, modelEnd{m.now + modelSlow, c, r, m.runs})
	} else {
		m.settle(c, r, m.runs, m.now)
	}
	return a
}

// settle says what a run leaves behind that ends at that time.
func (m *model) settle(c *modelCell, r modelRequest, run int, at time.Duration) {
	c.running = false
	switch {
	case r.panic:
		if r.slow {
			renewed := at - modelSlow + modelLastRenewal
			c.leaseEnd, c.expiry = renewed+modelLease, renewed+modelTTL
		}
	case r.isFinal(m.opts.atMostOnce):
		c.state, c.answer, c.expiry = "completed", r.answer(run), at+modelTTL
		if c.notStored = r.large && !r.bodyless(); c.notStored {
			c.answer = fmt.Sprintf("409 response_not_stored, which was %d", r.status)
		}
		if c.digest = r.digest(); c.digest != "" && r.earlyEnd {
			c.digest = "unread"
		}
	default:
		c.state, c.expiry = "released", m.markerEnd(c, r, at)
	}
}

// markerEnd says until when a freed key is remembered: for a lease after a first
// attempt that did nothing and whose claim was not marked.
func (m *model) markerEnd(c *modelCell, r modelRequest, at time.Duration) time.Duration {
	claimed := at
	if r.slow {
		claimed = at - modelSlow + modelLastRenewal
	}
	switch {
	case !r.nothingDone() && !r.discard || m.opts.atMostOnce:
		return at + modelTTL
	case c.attempt > 1:
		return claimed + modelTTL
	}
	return at + modelLease
}

// isFinal says what is kept, in the words of the documentation.
func (r modelRequest) isFinal(atMostOnce bool) bool {
	return r.commit || !r.discard && !r.nothingDone() && (r.status < 500 || atMostOnce)
}

func (r modelRequest) nothingDone() bool {
	return slices.Contains([]int{401, 403, 407, 408, 425, 429}, r.status)
}

func (r modelRequest) bodyless() bool { return r.status == 204 || r.status == 304 }

// answer is what the handler answers in that run.
func (r modelRequest) answer(run int) string {
	if r.panic {
		return "panic"
	}
	return fmt.Sprintf("%d %s", r.status, r.body(run))
}

func (r modelRequest) body(run int) string {
	switch {
	case r.bodyless():
		return ""
	case r.large:
		return fmt.Sprintf("run %0*d", modelMaxResponse, run)
	}
	return fmt.Sprintf("run %d", run)
}

// digest tells large bodies apart, once they have been read.
func (r modelRequest) digest() string {
	if len(r.payload) > modelMaxBody {
		return r.payload
	}
	return ""
}
