// Package fuzz holds the library against models and second readers of the same
// rules: with fuzzing, and with a table of all calls of a store that can fail.
package fuzz

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// The choices that the bytes of FuzzMiddleware make. Pauses are odd so that
// nothing ends at the very moment of a request.
var (
	modelPauses = []time.Duration{
		0, 0, 0, 1001 * time.Millisecond, 29907 * time.Millisecond, 30109 * time.Millisecond,
		599313 * time.Millisecond, 601417 * time.Millisecond,
	}
	modelMethods  = []string{"POST", "POST", "PUT", "GET"}
	modelPaths    = []string{"/charge", "/refund"}
	modelKeys     = []string{"a", "a", "a", `"a"`, "b", "-", "", `"x;y" ;`}
	modelPayloads = []string{"one", "two", strings.Repeat("1", modelMaxBody+1), strings.Repeat("2", modelMaxBody+1)}
	modelAuths    = []string{"", "", "alice", "mallory"}
	modelTenants  = []string{"", "acme"}
	modelStatuses = []int{200, 201, 201, 204, 303, 304, 400, 401, 403, 408, 409, 422, 425, 429, 500, 503}
)

// modelSequence is the longest sequence, in bytes of modelStep each.
const (
	modelStep     = 4
	modelSequence = 16 * modelStep
)

// decodeSequence reads a sequence of requests.
func decodeSequence(data []byte) (opts modelOptions, requests []modelRequest) {
	if len(data) == 0 {
		return opts, nil
	}
	bit := func(b byte, n int) bool { return b>>n&1 != 0 }
	opts = modelOptions{atMostOnce: bit(data[0], 0), scope: bit(data[0], 1), requireKey: bit(data[0], 2)}
	data = data[1:min(len(data), 1+modelSequence)]
	for ; len(data) >= modelStep; data = data[modelStep:] {
		a, b, c, d := data[0], data[1], data[2], data[3]
		requests = append(requests, modelRequest{
			pause: modelPauses[a&7], method: modelMethods[a>>3&3], path: modelPaths[a>>5&1],
			query: strings.Repeat("q=1", int(a>>6&1)),
			key:   modelKeys[b&7], payload: modelPayloads[b>>3&3], auth: modelAuths[b>>5&3], tenant: modelTenants[b>>7],
			status: modelStatuses[c&15], discard: bit(c, 4) && bit(d, 4), commit: bit(c, 5) && bit(d, 5), panic: bit(c, 6) && bit(d, 6),
			large: bit(c, 7), flush: bit(d, 0), slow: bit(d, 1) && bit(d, 2), earlyEnd: bit(d, 3),
		})
	}
	return opts, requests
}

// played is one request of a sequence on its way.
type played struct {
	request modelRequest
	want    modelAnswer
	event   string
	got     string
	run     int // what the handler saw
	attempt int
	done    bool
}

type playedKey struct{}

// A stage plays a sequence through the middleware.
type stage struct {
	c    *idemtest.Client
	mu   sync.Mutex
	runs int
}

func newStage(opts modelOptions, store idempotency.Store) *stage {
	s := new(stage)
	o := idempotency.Options{
		TTL: modelTTL, Lease: modelLease, Wait: idempotency.NoWait, AtMostOnce: opts.atMostOnce, RequireKey: opts.requireKey,
		MaxBufferedBody: modelMaxBody, MaxResponseBytes: modelMaxResponse,
		OnEvent: func(ctx context.Context, e idempotency.Event) {
			ctx.Value(playedKey{}).(*played).event += fmt.Sprintf("%s %d", e.Outcome, e.Attempt)
		},
	}
	if opts.scope {
		o.Scope = func(r *http.Request) string { return r.Header.Get("Tenant") }
	}
	s.c = idemtest.NewClient(store, &o, s.handle)
	return s
}

// handle does what the request of the sequence says.
func (s *stage) handle(w http.ResponseWriter, r *http.Request) {
	p := r.Context().Value(playedKey{}).(*played)
	s.mu.Lock()
	s.runs++
	p.run = s.runs
	s.mu.Unlock()
	x := p.request
	if !x.earlyEnd {
		body, err := io.ReadAll(r.Body)
		idemtest.Must(err)
		if string(body) != x.payload {
			panic("the handler got another body")
		}
	}
	if e, ok := idempotency.FromContext(r.Context()); ok {
		p.attempt = e.Attempt()
		if x.commit {
			idemtest.Must(e.Commit(r.Context()))
		}
		if x.discard {
			e.Discard()
		}
	}
	if x.slow {
		time.Sleep(modelSlow)
	}
	w.WriteHeader(x.status)
	if x.flush {
		idemtest.Must(http.NewResponseController(w).Flush())
	}
	_, _ = io.WriteString(w, x.body(p.run)) // refused for a status without one
	if x.panic {
		panic("boom")
	}
}

func (s *stage) send(t *testing.T, p *played) {
	x := p.request
	uri := &url.URL{Path: x.path, RawQuery: x.query}
	r := &http.Request{
		Method: x.method, URL: uri, RequestURI: uri.RequestURI(), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Tenant": {x.tenant}}, Body: io.NopCloser(strings.NewReader(x.payload)), ContentLength: int64(len(x.payload)),
	}
	if x.auth != "" {
		r.Header.Set("Authorization", x.auth)
	}
	if x.key != "-" {
		r.Header.Set("Idempotency-Key", x.key)
	}
	resp := s.c.Do(r.WithContext(context.WithValue(context.Background(), playedKey{}, p)))
	if p.got = "panic"; resp != nil {
		var problem idemtest.Problem
		p.got, problem = idemtest.Describe(t, resp)
		if problem.OriginalStatus != 0 {
			p.got += fmt.Sprintf(", which was %d", problem.OriginalStatus)
		}
	}
	p.done = true
}

const modelRetry = "\x00\x00\x01\x00"

var modelSeeds = []string{
	"\x00" + modelRetry + modelRetry,                                      // replay
	"\x00" + modelRetry + "\x00\x08\x01\x00",                              // another payload
	"\x00\x00\x00\x0f\x00" + modelRetry,                                   // 503 frees the key
	"\x01\x00\x00\x41\x40\x05\x00\x01\x00",                                // at most once, panic, lease over
	"\x00\x00\x00\x41\x40" + modelRetry + "\x05\x00\x01\x00",              // panic, in progress, take-over
	"\x00\x00\x00\x41\x40\x04\x00\x01\x00",                                // panic, lease almost over
	"\x00\x00\x00\x21\x20\x07\x00\x01\x00",                                // Commit, TTL over
	"\x00\x00\x00\x81\x00" + modelRetry,                                   // too large to be kept
	"\x00\x00\x00\x01\x06" + modelRetry + "\x06\x00\x01\x00",              // slow, in progress, kept
	"\x00\x00\x10\x01\x00\x00\x18\x01\x00\x00\x10\x01\x00",                // large bodies
	"\x02\x00\x80\x01\x00\x00\xc0\x01\x00\x00\x40\x01\x00",                // a scope
	"\x04\x00\x05\x01\x00\x00\x06\x01\x00\x18\x00\x01\x00",                // no key, a bad one, GET
	"\x00\x00\x00\x11\x10\x00\x00\x01\x01\x05\x00\x01\x00",                // Discard, flush, replay
	"\x01\x00\x00\x0f\x00" + modelRetry + "\x00\x20\x01\x00" + modelRetry, // at most once keeps 503
}

// FuzzMiddleware plays sequences of requests, made of bytes, through the
// middleware, and compares each answer, event and run with those of a model
// that is written from the documentation alone. Time is virtual.
func FuzzMiddleware(f *testing.F) {
	for _, seed := range modelSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) { playSequence(t, data, idempotency.NewMemoryStore())(t) })
}

// playSequence plays a sequence on store, and returns what compares what came
// of it with the model.
func playSequence(t *testing.T, data []byte, store idempotency.Store) (check func(require.TestingT)) {
	opts, requests := decodeSequence(data)
	m := &model{opts: opts, cells: map[string]*modelCell{}}
	s := newStage(opts, store)
	all := make([]*played, 0, len(requests))
	synctest.Test(t, func(t *testing.T) {
		for _, x := range requests {
			if x.pause > 0 {
				time.Sleep(x.pause)
				synctest.Wait() // what ended meanwhile has settled
			}
			m.pass(x.pause)
			p := &played{request: x, want: m.serve(x)}
			all = append(all, p)
			if !x.slow {
				s.send(t, p)
				continue
			}
			go s.send(t, p)
			synctest.Wait()
		}
		time.Sleep(time.Hour)
		synctest.Wait()
	})
	return func(t require.TestingT) {
		for i, p := range all {
			require.True(t, p.done)
			require.Equal(t, p.want, modelAnswer{text: p.got, event: p.event, run: p.run, attempt: p.attempt},
				"request %d of %+v", i, requests)
		}
		require.Equal(t, m.runs, s.runs)
	}
}
