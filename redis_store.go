package idempotency

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrTooFewReplicas: fewer than RedisOptions.MinReplicas replicas acknowledged
// a claim in time. A new claim was released, that of a running handler stands.
var ErrTooFewReplicas = errors.New("idempotency: too few Redis replicas acknowledged the claim")

// RedisOptions configure [NewRedisStore]. A nil *RedisOptions and a zero field
// mean the defaults. NewRedisStore copies them.
type RedisOptions struct {
	// Prefix is put before every key and every Pub/Sub channel. Default
	// "idem:".
	Prefix string

	// MinReplicas is how many replicas must acknowledge a claim before the
	// handler may run; of a Cluster, replicas of the key's master. When fewer
	// do, the claim is released and the request is refused with
	// [ErrTooFewReplicas]; a renewal that they do not acknowledge fails too,
	// so that a handler is cancelled at the end of its lease. They are asked
	// in the same round trip, but as long as there are too few of them every
	// answer, a replay as well, takes ReplicaTimeout. Default 0: claims are
	// not waited for.
	//
	// A claim survives a failover only if a replica that acknowledged it is
	// promoted, and Redis does not tell which ones did. So this should be the
	// number of all replicas that a master has. With fewer, a key whose claim
	// the promoted one had not received runs again, at-most-once or not:
	// Sentinel and Cluster prefer the replica with the largest offset, but only
	// among those they can reach, which is no guarantee.
	//
	// What is stored after the handler ran is not waited for: a failover that
	// loses only that leaves the claim, and the handler runs again after its
	// lease, or never if the key is at-most-once.
	//
	// These commands go to the master of a key directly. Hooks of a Cluster
	// client do not see them, and redirections are not followed: while a
	// Cluster moves slots, claims in them are refused.
	MinReplicas int

	// ReplicaTimeout is how long to wait for MinReplicas, in whole
	// milliseconds. Default 500ms. It is shortened to half of what the
	// deadline of a call leaves, so that there is time to release the claim.
	// The client's ReadTimeout must be longer.
	ReplicaTimeout time.Duration
}

// withDefaults returns a copy of o in which every field has its value. It
// panics when one of them is invalid.
func (o *RedisOptions) withDefaults() RedisOptions {
	var r RedisOptions
	if o != nil {
		r = *o
	}
	setDefault(&r.Prefix, "idem:")
	setDefault(&r.ReplicaTimeout, 500*time.Millisecond)
	switch {
	case r.MinReplicas < 0:
		panic("idempotency: RedisOptions.MinReplicas is negative; leave it zero not to wait for replicas")
	case r.ReplicaTimeout < time.Millisecond:
		panic("idempotency: RedisOptions.ReplicaTimeout is under 1ms; leave it zero for 500ms")
	}
	return r
}

// A RedisStore keeps records in Redis 7.0 or newer, or in Valkey: one server,
// Sentinel or Cluster, whatever the client reaches. It is what a service of
// many replicas needs. A first execution costs two round trips, a replay one.
//
// Set ContextTimeoutEnabled in the options of the client. Without it go-redis
// looks at its own ReadTimeout and MaxRetries only, so that a Redis that hangs
// holds a request for many times Options.StoreTimeout.
//
// Redis must not evict: with another maxmemory-policy than noeviction it drops
// records, and then handlers run twice. [RedisStore.Check] looks at that. When
// Redis is full, new keys get [ErrStoreFull], and what runs is still completed.
// What a restart without persistence or a failover loses is lost as well; see
// RedisOptions.MinReplicas.
//
// Under load, commands to one server go together in pipelines: hooks of the
// client then see ProcessPipelineHook, with the context values of one caller.
//
// A RedisStore is safe for concurrent use and needs no Close; the client is the
// caller's. Duplicates that wait share one Pub/Sub connection per store, which
// is there only as long as one of them waits. Where the Redis user may not
// subscribe or publish, they poll.
//
// Leases and TTLs run by the clock of the server. It is a wall clock: have it
// slewed, not stepped, and have those of masters and replicas agree to much
// less than a lease, for a failover changes from one to the other.
type RedisStore struct {
	client redis.UniversalClient
	pipe   *redisPipe // nil unless client is that of one server
	opts   RedisOptions

	mu            sync.Mutex                // guards what follows and what it points to
	questions     map[string]*redisQuestion // on their way, by the name of the key
	session       *redisSession             // nil while no caller watches
	notBefore     time.Time                 // when the next session may be tried
	slotsReloaded time.Time                 // when reloadSlotsAfter last did so
}

var (
	_ Store   = (*RedisStore)(nil)
	_ Watcher = (*RedisStore)(nil)
)

// NewRedisStore returns a store on client. It panics if client is nil or an
// option is invalid. It panics for a [redis.Ring], which moves keys to another
// server when one is down: their claims are not known there, and handlers run
// twice. It panics for a [redis.AutoPipeliner], which does not keep to
// deadlines. It does not connect; see [RedisStore.Check].
func NewRedisStore(client redis.UniversalClient, opts *RedisOptions) *RedisStore {
	s := &RedisStore{client: client, opts: opts.withDefaults(), questions: make(map[string]*redisQuestion)}
	server, oneServer := client.(*redis.Client)
	_, cluster := client.(masterFinder)
	_, ring := client.(*redis.Ring)
	_, pipelined := client.(*redis.AutoPipeliner)
	switch {
	case client == nil:
		panic("idempotency: NewRedisStore without a client; make one with redis.NewUniversalClient")
	case pipelined:
		panic("idempotency: NewRedisStore with a redis.AutoPipeliner, which waits longer than a call may take; " +
			"use the client that it was made of")
	case ring:
		panic("idempotency: NewRedisStore with a redis.Ring, which loses claims when a server is down; " +
			"use Redis Cluster or Sentinel")
	case s.opts.MinReplicas > 0 && !oneServer && !cluster:
		panic("idempotency: RedisOptions.MinReplicas needs the connection that a claim went over; " +
			"use a *redis.Client or a *redis.ClusterClient")
	case oneServer:
		// Not for a Cluster, where one node that is down would hold up what
		// goes to the others.
		s.pipe = &redisPipe{client: server}
	}
	return s
}

// Acquire implements [Store]. It returns an error that wraps [ErrStoreFull]
// when Redis has no room for a new key, and [ErrTooFewReplicas]. A key that
// holds something else than a record is an error as well.
//
// Claims of one key through one store may share a question to Redis that was
// sent after each of them began.
func (s *RedisStore) Acquire(ctx context.Context, key string, c Claim) (Record, error) {
	name := s.opts.Prefix + key
	if c.Attempt == 0 {
		return s.share(ctx, name, c)
	}
	answer, err := s.decide(ctx, name, c)
	return answer.Record, err
}

// A redisAnswer is a Record, and the cell that it tells of. It has no cell when
// the State is Acquired or Lost.
type redisAnswer struct {
	Record
	cell redisCell
}

// claim asks Redis for the key. SET alone is enough for a free key and for a
// record, which are the usual ones: it is native, and takes half as long as a
// script for a large record. About a claim or a marker the script decides. It
// decides about all cells alike, so a key that is likely to be claimed
// (contended) goes to it at once.
func (s *RedisStore) claim(ctx context.Context, name string, c Claim, contended bool) (answer redisAnswer, err error) {
	if !contended {
		answer, err = s.claimFree(ctx, name, c)
	}
	if err != nil || answer.State != 0 {
		return answer, err
	}
	return s.decide(ctx, name, c)
}

// encodeClaim returns the cell that a free key becomes, and how long it is kept
// in milliseconds.
func encodeClaim(c Claim) ([]byte, int64, error) {
	cell := redisCell{
		state: redisClaimed, lease: millis(c.Lease), ttl: max(millis(c.TTL), millis(c.Lease)),
		attempt: max(c.Attempt, 1), token: c.Token, fingerprint: c.Fingerprint,
	}
	b, err := cell.encode()
	return b, cell.ttl, err
}

// claimFree claims a key that has no cell. The answer has no State when the
// script is needed to tell, as for the claim's own cell, which a command that
// go-redis sent twice finds.
func (s *RedisStore) claimFree(ctx context.Context, name string, c Claim) (answer redisAnswer, err error) {
	claim, ttl, err := encodeClaim(c)
	if err != nil {
		return redisAnswer{}, err
	}
	cmd := redis.NewStringCmd(ctx, "set", name, claim, "nx", "get", "px", ttl)
	replicated, err := s.send(ctx, name, cmd, true)
	// NX with GET sets nothing where a cell is, and brings the cell back.
	switch {
	case errors.Is(err, redis.Nil): // no cell was there
		return s.acquired(ctx, name, c, Record{State: Acquired, Attempt: 1}, replicated)
	case isRedisFull(err):
		return redisAnswer{}, nil // whether or not the key has a cell
	case err != nil:
		return redisAnswer{}, err
	}
	stored, err := cmd.Bytes()
	if err == nil {
		answer.cell, err = parseRedisCell(stored)
	}
	if err != nil {
		return redisAnswer{}, err
	}
	switch {
	case answer.cell.state == redisReleased: // its fingerprint does not count
	case mismatch(answer.cell.fingerprint, c.Fingerprint):
		answer.State = Mismatch
	case answer.cell.state == redisCompleted:
		answer.Record = Record{State: Completed, Fingerprint: answer.cell.fingerprint, Value: answer.cell.value}
	}
	return answer, nil
}

// decide has the script decide about a claim or a renewal. The script may make
// a claim of a cell whose lease is over, so its reply waits for replicas as that
// to SET does.
func (s *RedisStore) decide(ctx context.Context, name string, c Claim) (redisAnswer, error) {
	claim, _, err := encodeClaim(c)
	if err != nil {
		return redisAnswer{}, err
	}
	mark := 0
	if c.Once && c.Attempt > 0 {
		mark = 1
	}
	cmd, replicated, err := s.run(ctx, acquireScript, true, name, claim, c.Attempt, mark)
	if isRedisFull(err) {
		return redisAnswer{}, fmt.Errorf("%w: %w", ErrStoreFull, err)
	}
	if err != nil {
		return redisAnswer{}, err
	}
	reply, err := cmd.Slice()
	if err != nil || len(reply) != 3 {
		return redisAnswer{}, fmt.Errorf("idempotency: unexpected reply of Redis to a claim: %v", reply)
	}
	state, _ := reply[0].(int64)
	number, _ := reply[1].(int64)
	answer := redisAnswer{Record: Record{State: State(state)}}
	switch answer.State {
	case Lost:
		return answer, nil
	case Acquired:
		answer.Attempt, answer.Once = int(number), reply[2] == int64(1)
		return s.acquired(ctx, name, c, answer.Record, replicated)
	}
	stored, _ := reply[2].(string)
	if answer.cell, err = parseRedisCell([]byte(stored)); err != nil {
		return redisAnswer{}, err
	}
	switch answer.State {
	case InProgress:
		answer.Remaining = time.Duration(number) * time.Millisecond
	case Completed:
		answer.Fingerprint, answer.Value = answer.cell.fingerprint, answer.cell.value
	}
	return answer, nil
}

// acquired is the answer to a claim or a renewal that Redis took. When too few
// replicas have it, a claim is released, so that the key is not blocked for a
// lease by a request that is refused. That of a renewal is not: its handler is
// running, and the key would be free for a second one.
func (s *RedisStore) acquired(ctx context.Context, name string, c Claim, rec Record, replicated bool) (redisAnswer, error) {
	switch {
	case replicated:
		return redisAnswer{Record: rec}, nil
	case c.Attempt > 0:
		return redisAnswer{}, ErrTooFewReplicas
	}
	if err := s.release(ctx, name, c.Token, c.Lease); err != nil {
		return redisAnswer{}, fmt.Errorf("%w; releasing it failed: %w", ErrTooFewReplicas, err)
	}
	return redisAnswer{}, ErrTooFewReplicas
}

// Complete implements [Store]. It gets through when Redis is full.
func (s *RedisStore) Complete(ctx context.Context, key, token string, r Result) error {
	cell := redisCell{state: redisCompleted, token: token, fingerprint: r.Fingerprint, value: r.Value}
	ok, err := s.settle(ctx, completeScript, s.opts.Prefix+key, cell, r.TTL)
	if err == nil && !ok {
		err = ErrLeaseLost
	}
	return err
}

// Release implements [Store]. It gets through when Redis is full.
func (s *RedisStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.release(ctx, s.opts.Prefix+key, token, keep)
}

func (s *RedisStore) release(ctx context.Context, name, token string, keep time.Duration) error {
	_, err := s.settle(ctx, releaseScript, name, redisCell{state: redisReleased, token: token}, keep)
	return err
}

// settle runs a script that ends a claim. ok is false when the claim is lost. It
// does not wait for replicas: the handler has run by now, and its effect cannot
// be taken back.
func (s *RedisStore) settle(ctx context.Context, script *redisScript, name string, cell redisCell, ttl time.Duration) (ok bool, err error) {
	b, err := cell.encode()
	if err != nil {
		return false, err
	}
	cmd, _, err := s.run(ctx, script, false, name, b, redisChannel(name), cell.token, millis(ttl))
	if err != nil {
		return false, err
	}
	n, err := cmd.Int()
	return n == 1, err
}

// send sends a command. If claims is set it may make a claim, and replicated
// tells whether enough replicas have what it wrote. A claim that waits for
// replicas has a connection to itself, so it is not sent with others.
func (s *RedisStore) send(ctx context.Context, name string, cmd redis.Cmder, claims bool) (replicated bool, err error) {
	defer containRedis(&err)
	switch {
	case claims && s.opts.MinReplicas > 0:
		replicated, err = s.sendAndWait(ctx, name, cmd)
	case s.pipe != nil:
		replicated, err = true, s.pipe.process(ctx, cmd)
	default:
		replicated, err = true, s.client.Process(ctx, cmd)
	}
	if err != nil && err != redis.Nil {
		s.reloadSlotsAfter(ctx, err)
	}
	return replicated, err
}

// A masterFinder is a redis.ClusterClient.
type masterFinder interface {
	MasterForKey(ctx context.Context, key string) (*redis.Client, error)
}

// sendAndWait sends a command and WAIT, which is about the connection that it
// comes on. WAIT has no key, so a ClusterClient would send it anywhere.
func (s *RedisStore) sendAndWait(ctx context.Context, name string, cmd redis.Cmder) (replicated bool, err error) {
	// Half of the time that is left is for the release of a claim that too few
	// replicas have.
	timeout := s.opts.ReplicaTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline)/2)
	}
	client := redis.Cmdable(s.client)
	if cluster, ok := s.client.(masterFinder); ok {
		if client, err = cluster.MasterForKey(ctx, name); err != nil {
			return false, err
		}
	}
	wait := redis.NewIntCmd(ctx, "wait", s.opts.MinReplicas, millis(timeout))
	pipe := client.Pipeline()
	_ = pipe.Process(ctx, cmd)
	_ = pipe.Process(ctx, wait)
	if err := execPipeline(ctx, pipe); err != nil {
		return false, err
	}
	// WAIT is answered even if the command failed: it has nothing to wait for.
	if err := cmd.Err(); err != nil && !errors.Is(err, redis.Nil) {
		return false, err
	}
	if err := wait.Err(); err != nil {
		return false, err
	}
	return wait.Val() >= int64(s.opts.MinReplicas), cmd.Err()
}

// reloadSlotsAfter has a Cluster client load its slots again, once a second at
// most, after an error that says that they have moved or that a server is out of
// reach. go-redis itself would ask a master that died for up to a minute.
func (s *RedisStore) reloadSlotsAfter(ctx context.Context, err error) {
	var reply redis.Error
	if errors.As(err, &reply) && !redis.HasErrorPrefix(err, "MOVED") && !redis.HasErrorPrefix(err, "CLUSTERDOWN") {
		return
	}
	cluster, ok := s.client.(interface{ ReloadState(context.Context) })
	if !ok {
		return
	}
	s.mu.Lock()
	now := time.Now()
	due := now.Sub(s.slotsReloaded) >= time.Second
	if due {
		s.slotsReloaded = now
	}
	s.mu.Unlock()
	if due {
		cluster.ReloadState(ctx)
	}
}
