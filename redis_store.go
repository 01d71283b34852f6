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
// a claim in time. A new claim was released; the claim of a running handler
// stands.
var ErrTooFewReplicas = errors.New("idempotency: too few Redis replicas acknowledged the claim")

// RedisOptions configure [NewRedisStore]. A nil *RedisOptions and the zero
// RedisOptions mean all defaults, and a zero field means the default of that
// field. RedisOptions may be copied, and NewRedisStore copies them.
type RedisOptions struct {
	// Prefix is put before every key and every Pub/Sub channel. Default
	// "idem:".
	//
	// Services that share one Redis need a Prefix each. With one prefix, two
	// services that get a request with the same method, path and key take it for
	// the same request. An event that a dispatcher sends to both runs in one of
	// them only. A gateway that passes its request on with the key holds the key
	// itself, so the service behind it answers 409 and never runs.
	//
	// A change of Prefix forgets all keys: a retry of a finished request then
	// runs again.
	Prefix string

	// MinReplicas is how many replicas must acknowledge a claim before the
	// handler may run; of a Cluster, replicas of the key's master. Default 0:
	// no claim waits for replicas.
	//
	// When fewer replicas acknowledge it, the claim is released and the request
	// is answered 503; its Error matches [ErrTooFewReplicas]. A renewal that
	// too few replicas acknowledge fails too, so that a handler is cancelled at
	// the end of its lease. WAIT goes with the claim in the same round trip.
	// But while too few replicas are there, every claim takes ReplicaTimeout,
	// even one that is answered with a replay.
	//
	// A claim survives a failover only if a replica that acknowledged it is
	// promoted, and Redis does not tell which ones did. So MinReplicas should
	// be the number of all replicas that a master has. With fewer, the promoted
	// replica may not have received the claim, and the key runs again,
	// at-most-once or not. Sentinel and Cluster prefer the replica with the
	// largest offset, but only among those they can reach, which is no
	// guarantee.
	//
	// Complete and Release do not wait for replicas. A failover that loses only
	// the response leaves the claim: the handler runs again after its lease, or
	// never if the key is at-most-once.
	//
	// A claim with WAIT goes to the master of its key directly. Hooks of a
	// Cluster client do not see it, and redirections are not followed: while a
	// Cluster moves slots, claims in them are refused.
	MinReplicas int

	// ReplicaTimeout is how long to wait for MinReplicas, in whole
	// milliseconds, 1ms at least. Default 500ms. It is shortened to half of the
	// time that the deadline of a call leaves, so that there is time to release
	// the claim. The client's ReadTimeout must be longer.
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
// many replicas needs. A first execution costs two round trips, a replay one;
// an at-most-once key costs one more.
//
// A RedisStore is made by [NewRedisStore]; the zero value is of no use. It is
// safe for concurrent use and must not be copied. It needs no Close, and the
// client is the caller's to close.
//
// Set ContextTimeoutEnabled in the options of the client. Without it go-redis
// looks at its own ReadTimeout and MaxRetries only, so that a Redis that hangs
// holds a request for many times Options.StoreTimeout.
//
// Redis must not evict. With another maxmemory-policy than noeviction it drops
// records, and then handlers run twice; [RedisStore.Check] looks at that. When
// Redis is full, new keys get [ErrStoreFull], and handlers that run are still
// completed. A record that Redis loses in a restart without persistence or in a
// failover is lost; see RedisOptions.MinReplicas.
//
// Under load, commands to one server, or to one node of a Cluster, go together
// in pipelines. Hooks of the client then see ProcessPipelineHook, with the
// context values of one caller.
//
// Duplicates that wait share one Pub/Sub connection per store, which is there
// only while one of them waits. Where the Redis user may not subscribe or
// publish, they poll.
//
// Leases and TTLs run by the clock of the server, which is a wall clock. The
// operator has it slewed, not stepped. The clocks of masters and replicas must
// differ by much less than a lease, because a failover goes from one clock to
// another.
type RedisStore struct {
	client redis.UniversalClient
	opts   RedisOptions

	pipes *redisPipes // nil unless client is that of one server

	mu            sync.Mutex                // guards what follows and what it points to
	nodes         map[string]*redisPipes    // of a Cluster, by address: as many as it has had masters
	questions     map[string]*redisQuestion // that are on their way, by the name of the key
	session       *redisSession             // nil while no caller watches
	notBefore     time.Time                 // when the next session may be tried
	slotsReloaded time.Time                 // when reloadSlotsAfter last reloaded them
}

var (
	_ Store     = (*RedisStore)(nil)
	_ Watcher   = (*RedisStore)(nil)
	_ Inspector = (*RedisStore)(nil)
)

// NewRedisStore returns a store on client. It does not connect; see
// [RedisStore.Check]. It panics if client is nil or an option is invalid, and
// for two kinds of client, or a struct that embeds one. A [redis.Ring] moves
// keys to another server when one is down: claims are not known there, and
// handlers run twice. A [redis.AutoPipeliner] does not keep to deadlines. With
// MinReplicas the client must be a *redis.Client or a *redis.ClusterClient.
//
// Services that share one Redis need a Prefix each; see [RedisOptions].
func NewRedisStore(client redis.UniversalClient, opts *RedisOptions) *RedisStore {
	s := &RedisStore{
		client: client, opts: opts.withDefaults(),
		nodes: make(map[string]*redisPipes), questions: make(map[string]*redisQuestion),
	}
	requireRedisClient(client, &s.opts)
	if server, ok := client.(*redis.Client); ok {
		s.pipes = newRedisPipes(server, &s.opts)
	}
	return s
}

// Acquire implements [Store]. Its error wraps [ErrStoreFull] when Redis has no
// room for a key that it does not have, and [ErrTooFewReplicas] when too few
// replicas acknowledged. Acquire also fails when the key holds something that
// is no record.
//
// Claims of one key through one store may share a command to Redis that was
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
// record, which are the usual ones. It is native, and takes half as long as a
// script for a large record. About a claim or a marker the script decides. The
// script decides about all cells alike, so a key that is likely to be claimed
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
// a claim of a cell whose lease is over, so its reply waits for replicas as the
// reply to SET does.
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
// replicas have a claim, it is released, so that a request that is refused does
// not block the key for a lease. A renewal is not released: its handler is
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

// Complete implements [Store]. It succeeds when Redis is full, because its key
// was let in before. It does not wait for replicas.
func (s *RedisStore) Complete(ctx context.Context, key, token string, r Result) error {
	cell := redisCell{state: redisCompleted, token: token, fingerprint: r.Fingerprint, value: r.Value, parts: r.parts}
	ok, err := s.settle(ctx, completeScript, s.opts.Prefix+key, cell, r.TTL)
	if err == nil && !ok {
		err = ErrLeaseLost
	}
	return err
}

// Release implements [Store]. It succeeds when Redis is full, because it makes
// room. It does not wait for replicas.
func (s *RedisStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.release(ctx, s.opts.Prefix+key, token, keep)
}

// release is Release for a name, which has the Prefix.
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

// send sends a command. With claims the command may make a claim, and
// replicated tells whether enough replicas have what it wrote.
func (s *RedisStore) send(ctx context.Context, name string, cmd redis.Cmder, claims bool) (replicated bool, err error) {
	defer containRedis(&err)
	replicated, err = s.sendPiped(ctx, name, cmd, claims && s.opts.MinReplicas > 0)
	if err != nil && !errors.Is(err, redis.Nil) {
		s.reloadSlotsAfter(ctx, err)
	}
	return replicated, err
}

// A masterFinder is a redis.ClusterClient, or a client that wraps one.
type masterFinder interface {
	MasterForKey(ctx context.Context, key string) (*redis.Client, error)
}

// sendPiped sends a command through a pipe to the server that has the key. In a
// Cluster each node has pipes of its own, so that one that is down holds up
// nothing that goes to the others.
func (s *RedisStore) sendPiped(ctx context.Context, name string, cmd redis.Cmder, waits bool) (replicated bool, err error) {
	var client redisSender = s.client
	pipes := s.pipes
	if cluster, ok := s.client.(masterFinder); ok {
		node, err := cluster.MasterForKey(ctx, name)
		if err != nil {
			return false, err
		}
		if pipes = s.pipesTo(node); waits {
			client = node // WAIT has no key, so a ClusterClient would send it anywhere
		}
	}
	switch {
	case pipes == nil:
		return true, client.Process(ctx, cmd)
	case waits:
		return pipes.replicated.process(ctx, client, cmd)
	case isLarge(cmd):
		return pipes.large.process(ctx, client, cmd)
	default:
		return pipes.small.process(ctx, client, cmd)
	}
}

// pipesTo returns the pipes to a node of a Cluster. They are kept by its address,
// because the client is another one after the node was away.
func (s *RedisStore) pipesTo(node *redis.Client) *redisPipes {
	address := node.Options().Addr
	s.mu.Lock()
	defer s.mu.Unlock()
	pipes := s.nodes[address]
	if pipes == nil {
		pipes = newRedisPipes(node, &s.opts)
		s.nodes[address] = pipes
	}
	return pipes
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
