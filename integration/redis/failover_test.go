package redis_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// These tests show what a failover of Redis can lose, and what MinReplicas
// changes about it. Some of them assert that a handler runs twice: that is no
// wish but what asynchronous replication makes of the promise, and what the
// documentation therefore has to say.

// A redisPair is a primary and its replica, a link between them that can be
// cut, and a client of whichever is the primary now.
type redisPair struct {
	t                *testing.T
	primary, replica *idemtest.RedisServer
	link             *idemtest.RedisProxy
	other            *idemtest.RedisServer  // a second replica, over no link
	address          atomic.Pointer[string] // what the client dials
	client           *redis.Client

	onPrimary, onReplica redis.UniversalClient // behind the back of the store
}

// startPair starts both and waits until they are in step. args are the
// primary's.
func startPair(t *testing.T, args ...string) *redisPair {
	p := &redisPair{t: t, primary: idemtest.StartRedis(t, append(args, "--repl-diskless-sync-delay", "0")...)}
	p.link = idemtest.StartProxy(t, p.primary.Addr)
	host, port, err := net.SplitHostPort(p.link.Addr())
	require.NoError(t, err)
	p.replica = idemtest.StartRedis(t, "--replicaof", host+" "+port, "--repl-diskless-sync-delay", "0")
	p.onPrimary, p.onReplica = connectTo(t, p.primary), connectTo(t, p.replica)
	p.address.Store(&p.primary.Addr)
	p.client = idemtest.DialRedis(t, p.primary.Addr, func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, *p.address.Load())
		}
	})
	idemtest.AwaitReplicas(t, p.onPrimary, 1)
	return p
}

// startTrio is startPair with another replica, which nothing cuts off.
func startTrio(t *testing.T, args ...string) *redisPair {
	p := startPair(t, args...)
	p.other = startReplica(t, p.primary)
	idemtest.AwaitReplicas(t, p.onPrimary, 2)
	return p
}

func startReplica(t *testing.T, of *idemtest.RedisServer) *idemtest.RedisServer {
	host, port, err := net.SplitHostPort(of.Addr)
	require.NoError(t, err)
	return idemtest.StartRedis(t, "--replicaof", host+" "+port, "--repl-diskless-sync-delay", "0")
}

// replicas returns how many the primary has while the link is whole.
func (p *redisPair) replicas() int {
	if p.other != nil {
		return 2
	}
	return 1
}

// cut breaks the link: what the primary writes from now on does not get to the
// replica.
func (p *redisPair) cut() {
	p.t.Helper()
	p.link.Set(func(idemtest.RedisCommand) idemtest.Verdict { return idemtest.CutBefore })
	p.link.Cut()
	left := fmt.Sprintf("connected_slaves:%d", p.replicas()-1)
	idemtest.Await(p.t, "the primary misses its replica", func() bool {
		return strings.Contains(p.onPrimary.Info(p.t.Context(), "replication").Val(), left)
	})
}

// mend lets the replica connect again and get what it missed.
func (p *redisPair) mend() {
	p.link.Set(nil)
	idemtest.AwaitReplicas(p.t, p.onPrimary, p.replicas())
}

// failOver kills the primary, makes the replica the primary, and has the client
// connect to that.
func (p *redisPair) failOver() {
	p.t.Helper()
	p.failOverTo(p.replica)
}

// failOverTo is failOver to that replica.
func (p *redisPair) failOverTo(promoted *idemtest.RedisServer) {
	p.t.Helper()
	p.primary.Kill()
	require.NoError(p.t, connectTo(p.t, promoted).Do(p.t.Context(), "replicaof", "no", "one").Err())
	p.address.Store(&promoted.Addr)
}

// addReplica gives the new primary a replica. Without one no claim can be made
// or taken over under MinReplicas.
func (p *redisPair) addReplica() {
	p.t.Helper()
	startReplica(p.t, p.replica)
	idemtest.AwaitReplicas(p.t, p.onReplica, 1)
}

// cell returns the state of the one cell that a server has: C, D or R, and 0
// when it has none.
func (p *redisPair) cell(on redis.UniversalClient) byte {
	keys := on.Keys(p.t.Context(), "idem:*").Val()
	if len(keys) != 1 {
		return 0
	}
	cell, err := on.Get(p.t.Context(), keys[0]).Bytes()
	if err != nil {
		return 0
	}
	return cell[1]
}

// replicaHas waits until the replica has a cell in that state.
func (p *redisPair) replicaHas(state byte) {
	p.t.Helper()
	p.has(p.onReplica, state)
}

func (p *redisPair) has(on redis.UniversalClient, state byte) {
	p.t.Helper()
	idemtest.Await(p.t, fmt.Sprintf("a cell in state %c", state), func() bool { return p.cell(on) == state })
}

// A cashier is a service on a redisPair whose Nth run answers 201 "charge N".
type cashier struct {
	url     string
	browser browser
	events  *idemtest.EventLog

	mu       sync.Mutex // guards what follows
	attempts []int
}

// open starts it. charge, which may be nil, is what a run does before it
// answers, and the status of the answer unless that is 0.
func (p *redisPair) open(minReplicas int, opts idempotency.Options, charge func(run int, r *http.Request) int) *cashier {
	store := idempotency.NewRedisStore(p.client, &idempotency.RedisOptions{MinReplicas: minReplicas})
	c := &cashier{browser: newBrowser(p.t), events: &idemtest.EventLog{}}
	if opts.Lease == 0 { // so long that nothing here depends on it
		opts.Lease, opts.StoreTimeout = time.Minute, 2*time.Second
	}
	opts.OnEvent, opts.Logger = c.events.Add, slog.New(slog.DiscardHandler)
	c.url = idemtest.OpenShop(p.t, store, &opts, func(w http.ResponseWriter, r *http.Request) {
		e, _ := idempotency.FromContext(r.Context())
		c.mu.Lock()
		c.attempts = append(c.attempts, e.Attempt())
		run, status := len(c.attempts), http.StatusCreated
		c.mu.Unlock()
		if charge != nil {
			if s := charge(run, r); s != 0 {
				status = s
			}
		}
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, "charge %d", run)
	}).URL
	return c
}

// ask sends the one request that these tests are about.
func (c *cashier) ask() string { return c.browser.ask(c.url+"/charge", "key") }

// runs returns the attempts that the handler was told of, one for each run.
func (c *cashier) runs() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.attempts)
}

// gated returns a charge whose first run waits for proceed to be closed, and a
// channel that is closed when it waits.
func gated(t *testing.T) (charge func(int, *http.Request) int, charging, proceed chan struct{}) {
	charging, proceed = make(chan struct{}), make(chan struct{})
	return func(run int, _ *http.Request) int {
		if run == 1 {
			close(charging)
			select {
			case <-proceed:
			case <-t.Context().Done(): // a test that fails ends
			}
		}
		return 0
	}, charging, proceed
}

// commits is a charge that begins with Execution.Commit.
func commits(_ int, r *http.Request) int {
	e, _ := idempotency.FromContext(r.Context())
	if e.Commit(r.Context()) != nil {
		return http.StatusServiceUnavailable
	}
	return 0
}

// Without MinReplicas a failover loses what the replica did not receive: a key
// that was answered, and whose answer was stored, runs again. At-most-once does
// not help, for its mark is in the record that is lost; nor does Attempt tell.
func TestFailoverLosesAKey(t *testing.T) {
	for name, row := range map[string]struct {
		opts   idempotency.Options
		charge func(int, *http.Request) int
	}{
		"default":      {},
		"at most once": {opts: idempotency.Options{AtMostOnce: true}},
		"committed":    {charge: commits},
	} {
		t.Run(name, func(t *testing.T) {
			p := startPair(t)
			c := p.open(0, row.opts, row.charge)
			p.cut()
			require.Equal(t, "201 charge 1", c.ask())
			require.Equal(t, "replay 201 charge 1", c.ask(), "the primary has stored it")
			p.failOver()
			require.Equal(t, "201 charge 2", c.ask(), "the new primary has never seen the key")
			require.Equal(t, []int{1, 1}, c.runs())
			require.Equal(t, "replay 201 charge 2", c.ask())
		})
	}
}

// What the replica has received is not lost, with MinReplicas or without.
func TestFailoverKeepsWhatTheReplicaHas(t *testing.T) {
	for _, minReplicas := range []int{0, 1} {
		t.Run(fmt.Sprintf("MinReplicas %d", minReplicas), func(t *testing.T) {
			p := startPair(t)
			c := p.open(minReplicas, idempotency.Options{}, nil)
			require.Equal(t, "201 charge 1", c.ask())
			p.replicaHas('D')
			p.failOver()
			require.Equal(t, "replay 201 charge 1", c.ask())
			require.Equal(t, []int{1}, c.runs())
		})
	}
}

// With MinReplicas a claim that the replica does not receive runs nothing: the
// request is refused, before a failover, after it, and until there is a replica
// again.
func TestFailoverMinReplicasRefusesWhatCouldBeLost(t *testing.T) {
	p := startPair(t)
	c := p.open(1, idempotency.Options{}, nil)
	p.cut()
	require.Equal(t, "503 store_unavailable", c.ask())
	require.ErrorIs(t, c.events.Last().Err, idempotency.ErrTooFewReplicas)
	p.mend()
	require.Equal(t, "201 charge 1", c.ask())
	p.replicaHas('D')

	p.failOver()
	require.Equal(t, "replay 201 charge 1", c.ask())
	another := func() string { return c.browser.ask(c.url+"/charge", "another") }
	require.Equal(t, "503 store_unavailable", another(), "the new primary has no replica")
	p.addReplica()
	require.Equal(t, "201 charge 2", another())
	require.Len(t, c.runs(), 2)
}

// MinReplicas is about the claim. The response is not waited for: here the link
// breaks in the middle of the handler, and the client has an answer that only
// the old primary knew. After the failover the key looks like one whose process
// died: it runs again, but not before the lease is over, and as attempt 2; and
// not at all if it is at-most-once, when nobody can tell the client any more
// what the answer was.
func TestFailoverLosesTheResponseButNotTheClaim(t *testing.T) {
	const lease, unknown = time.Second, "409 outcome_unknown"
	for name, row := range map[string]struct {
		opts   idempotency.Options
		commit bool
		status int
		first  string
		then   string
		runs   []int
	}{
		"default":      {first: "201 charge 1", then: "201 charge 2", runs: []int{1, 2}},
		"at most once": {opts: idempotency.Options{AtMostOnce: true}, first: "201 charge 1", then: unknown, runs: []int{1}},
		"committed":    {commit: true, first: "201 charge 1", then: unknown, runs: []int{1}},
		// What said that nothing was done is forgotten like any answer.
		"released": {status: 429, first: "429 charge 1", then: "201 charge 2", runs: []int{1, 2}},
		"released, at most once": {opts: idempotency.Options{AtMostOnce: true}, status: 429,
			first: "429 charge 1", then: unknown, runs: []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			p := startPair(t)
			row.opts.Lease, row.opts.StoreTimeout = lease, lease/2
			c := p.open(1, row.opts, func(run int, r *http.Request) (status int) {
				if run > 1 {
					return 0
				}
				if row.commit {
					status = commits(run, r)
				}
				p.cut()
				return max(status, row.status)
			})
			sent := time.Now()
			require.Equal(t, row.first, c.ask())
			p.failOver()
			p.addReplica()
			require.Equal(t, row.then, c.ask())
			require.GreaterOrEqual(t, time.Since(sent), lease, "the claim stood until the lease was over")
			require.Equal(t, row.runs, c.runs())
		})
	}
}

// A handler that still runs claims its key anew with the next renewal, after a
// failover that lost the claim. TestRenewalClaimsALostKeyAnew says when that is.
func TestFailoverRenewalClaimsTheKeyAnew(t *testing.T) {
	p := startPair(t)
	charge, charging, proceed := gated(t)
	c := p.open(0, idempotency.Options{Lease: 2 * time.Second, Wait: idempotency.NoWait}, charge)
	p.cut()
	answer := make(chan string, 1)
	go func() { answer <- c.ask() }()
	<-charging
	p.failOver()
	p.replicaHas('C')
	require.Equal(t, "409 in_progress", c.ask())
	close(proceed)
	require.Equal(t, "201 charge 1", <-answer)
	require.Equal(t, "replay 201 charge 1", c.ask())
	require.Equal(t, []int{1}, c.runs())
}

// A retry that comes within that gap, here before any renewal, runs beside the
// first. One of them has the key then, and the other one's answer is dropped:
// there is one stored response even so.
func TestFailoverRunsARetryBesideTheFirst(t *testing.T) {
	p := startPair(t)
	charge, charging, proceed := gated(t)
	c := p.open(0, idempotency.Options{}, charge)
	p.cut()
	answer := make(chan string, 1)
	go func() { answer <- c.ask() }()
	<-charging
	p.failOver()
	require.Equal(t, "201 charge 2", c.ask())
	close(proceed)
	require.Equal(t, "409 in_progress", <-answer, "the client is told to ask again")
	require.Equal(t, "replay 201 charge 2", c.ask())
	require.Equal(t, []int{1, 1}, c.runs())
}

// With min-replicas-to-write on the server a primary without its replica takes
// no response that a failover would lose. The client has its answer, and the
// new primary gets the response from the background.
func TestFailoverMinReplicasToWriteKeepsTheResponse(t *testing.T) {
	p := startPair(t, "--min-replicas-to-write", "1")
	opts := idempotency.Options{Lease: time.Minute, StoreTimeout: 500 * time.Millisecond}
	c := p.open(1, opts, func(int, *http.Request) int {
		p.cut()
		return 0
	})
	require.Equal(t, "201 charge 1", c.ask())
	require.Error(t, c.events.Last().Err, "it was not stored before it was sent")
	require.Equal(t, byte('C'), p.cell(p.onPrimary))
	p.failOver()
	p.replicaHas('D')
	require.Equal(t, "replay 201 charge 1", c.ask())
	require.Equal(t, []int{1}, c.runs())
}
