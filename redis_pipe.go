package idempotency

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisPipe sends commands to one server. While few commands are on their
// way, each goes at once and by itself. Further commands wait for a reply to
// one of those, and go together in one pipeline. That costs a third of the
// processor time for each, on both sides.
//
// The more commands go in a pipeline, the less each costs. So many commands
// share few lanes. How few depends on the length of a round trip, because none
// of them shall wait for longer than laneWait. With 64 callers on loopback, two
// lanes cost a replay 11.2 µs of processor time, and eight lanes cost 13.9.
//
// What a claim brings back is known only afterwards. It may be a large record,
// and the other commands of its pipeline wait for that. So a pipeline that
// moved much is followed by shorter ones.
type redisPipe struct {
	maxLanes    int           // how many commands and pipelines are on their way at a time
	minReplicas int           // that each command waits for
	waitTimeout time.Duration // for minReplicas

	mu        sync.Mutex            // guards what follows
	lanes     [smallLanes]time.Time // when each began its round trip; zero for one that is not in use
	sent      int                   // commands on their way
	demand    int                   // most commands that were queued or on their way lately
	batch     int                   // how many commands the next pipeline may have
	roundTrip time.Duration         // of a pipeline, on average
	queue     []*queuedCommand
}

const (
	// smallLanes is maxLanes for small commands. With fewer, eight callers
	// would wait for each other although the server is idle.
	smallLanes = 8

	// largeCommand is how many bytes of values a small command sends at most. At
	// 1 Gbit/s they hold up what comes behind them for 0.13 ms.
	largeCommand = 16 << 10

	// largeLanes is maxLanes for large commands. Four lanes with full pipelines
	// move a mebibyte in each round trip, which fills most links.
	largeLanes = 4

	// crowd is how many commands are queued or on their way when the pipe gives
	// up lanes. Fewer commands have a lane each.
	crowd = smallLanes

	// minLanes is how many lanes a crowd has at least, so that one connection
	// that hangs does not hold up all of them.
	minLanes = 2

	// lateLane is how long a round trip takes until its lane counts no longer, and
	// another one may be used in its place. Lanes are given up only where a round
	// trip takes less than a millisecond, so its connection is likely to hang.
	lateLane = 20 * time.Millisecond

	// laneWait is for how long a command of a crowd may wait for a lane. The
	// longest wait is one round trip divided by the number of lanes.
	laneWait = 100 * time.Microsecond

	// maxBatch is how many commands go in a pipeline, so that none waits long
	// for the replies to the others.
	maxBatch = 128

	// maxBatchBytes is how many bytes of values a pipeline should move, both
	// ways together, for the same reason. At 1 Gbit/s it takes 2 ms.
	maxBatchBytes = 256 << 10
)

// redisPipes are the pipes to one server. Commands with a large value have one
// of their own, whose lanes are few, so that no small command waits until a
// large value has been sent. So have claims that wait for replicas: those hold
// up what comes behind them until the slowest replica has them.
type redisPipes struct{ small, large, replicated redisPipe }

// newRedisPipes returns the pipes to the server of client. Together they should
// not need more connections than the client has. Otherwise commands of one pipe
// would wait for connections that another one holds.
func newRedisPipes(client *redis.Client, opts *RedisOptions) *redisPipes {
	size := client.Options().PoolSize
	p := &redisPipes{
		small:      redisPipe{maxLanes: smallLanes, batch: maxBatch},
		replicated: redisPipe{minReplicas: opts.MinReplicas, waitTimeout: opts.ReplicaTimeout, batch: maxBatch},
	}
	if opts.MinReplicas > 0 {
		p.replicated.maxLanes = max(1, min(smallLanes, size/2))
	}
	spare := max(1, size-p.small.maxLanes-p.replicated.maxLanes)
	p.large = redisPipe{maxLanes: min(largeLanes, spare), batch: 1}
	return p
}

// isLarge reports whether a command sends so much that it would hold up others.
func isLarge(cmd redis.Cmder) bool { return sentBytes(cmd) > largeCommand }

// sentBytes returns the length of the values that a command sends.
func sentBytes(cmd redis.Cmder) (n int) {
	for _, arg := range cmd.Args() {
		if b, ok := arg.([]byte); ok {
			n += len(b)
		}
	}
	return n
}

// receivedBytes returns the length of the cell that a command brought back.
func receivedBytes(cmd redis.Cmder) (n int) {
	switch cmd := cmd.(type) {
	case *redis.StringCmd:
		return len(cmd.Val())
	case *redis.Cmd: // a script
		reply, _ := cmd.Val().([]any)
		for _, value := range reply {
			if s, ok := value.(string); ok {
				n += len(s)
			}
		}
	}
	return n
}

// A redisSender is the client of a server, or that of a Cluster, which sends each
// command to the node that has the key.
type redisSender interface {
	Process(context.Context, redis.Cmder) error
	Pipeline() redis.Pipeliner
}

// A queuedCommand waits to be sent with others. When ctx ends, its caller
// returns and does not read the rest. Otherwise the caller reads cmd and
// replicated after done is closed. The close orders that read after the writes
// of the lane.
type queuedCommand struct {
	ctx        context.Context
	client     redisSender
	cmd        redis.Cmder
	replicated bool // minReplicas have what it wrote
	done       chan struct{}
}

// process sends a command, as client.Process does, and waits for minReplicas. A
// goroutine of a lane sends the commands in the queue, so their callers can
// return at their own deadlines.
func (p *redisPipe) process(ctx context.Context, client redisSender, cmd redis.Cmder) (replicated bool, err error) {
	now := time.Now()
	p.mu.Lock()
	if lane, ok := p.freeLane(now); ok {
		p.lanes[lane] = now
		p.sent++
		p.mu.Unlock()
		defer p.endLane(lane, 1)
		if p.minReplicas == 0 {
			return true, client.Process(ctx, cmd)
		}
		q := &queuedCommand{ctx: ctx, client: client, cmd: cmd}
		if err := p.exec(ctx, []*queuedCommand{q}); err != nil {
			return false, err
		}
		return q.replicated, cmd.Err()
	}
	// A lane is in use. It ends in time, and then sends the queue.
	q := &queuedCommand{ctx: ctx, client: client, cmd: cmd, done: make(chan struct{})}
	p.queue = append(p.queue, q)
	p.mu.Unlock()
	select {
	case <-q.done:
		return q.replicated, cmd.Err()
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// freeLane returns a lane that may be used. It is false when enough lanes are in
// use, apart from those that are late. Then there is at least one of them.
func (p *redisPipe) freeLane(now time.Time) (lane int, ok bool) {
	used, free := 0, -1
	for i, began := range p.lanes[:p.maxLanes] {
		switch {
		case began.IsZero():
			free = i
		case now.Sub(began) < lateLane:
			used++
		}
	}
	return free, free >= 0 && used < p.openLanes()
}

// openLanes returns how many lanes may be in use. It looks at the demand of
// late, because callers come in waves: a reply to a pipeline sets many of them
// free at once.
func (p *redisPipe) openLanes() int {
	p.demand = max(p.demand, p.sent+len(p.queue))
	if p.demand <= crowd {
		return p.maxLanes
	}
	return min(max(minLanes, int(p.roundTrip/laneWait)), p.maxLanes)
}

// endLane has a lane that sent some commands send what is queued, or ends its
// use. Each use of a lane ends with endLane, so the queue is empty when no lane
// is in use: no command is left waiting.
func (p *redisPipe) endLane(lane, sent int) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lanes[lane] = time.Time{}
	p.sent -= sent
	p.demand -= (p.demand + 63) / 64 // half of it after about 45 replies
	n := min(len(p.queue), p.batch)
	if _, ok := p.freeLane(now); n == 0 || !ok {
		return
	}
	p.lanes[lane] = now
	batch := p.queue[:n:n] // what is appended to the queue must not reach into it
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil
	}
	p.sent += n
	go p.send(lane, batch)
}

// send sends a batch. Its deadline is the latest of its callers' deadlines: an
// earlier one would fail commands that have time left. A caller that is
// cancelled must not end the commands of the others, so only the values of its
// context are used.
func (p *redisPipe) send(lane int, batch []*queuedCommand) {
	defer p.endLane(lane, len(batch))
	var deadline time.Time
	limited := true // until a call has no deadline
	for _, q := range batch {
		d, ok := q.ctx.Deadline()
		if limited = limited && ok; d.After(deadline) {
			deadline = d
		}
	}
	ctx := context.WithoutCancel(batch[0].ctx)
	if limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	start := time.Now()
	err := p.exec(ctx, batch)
	took := time.Since(start)
	moved := 0
	for _, q := range batch {
		if err != nil { // none of them was sent, or a hook panicked
			q.cmd.SetErr(err)
		}
		moved += sentBytes(q.cmd) + receivedBytes(q.cmd)
		close(q.done)
	}
	p.adapt(len(batch), moved, took)
}

// adapt sets the length of the next pipelines by what one of n commands moved.
// Half as many commands will move about half as much. The length doubles again
// with each pipeline that moved little, so a few large records among many small
// ones make no difference. The round trip is an average over about eight.
func (p *redisPipe) adapt(n, moved int, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.roundTrip += (took - p.roundTrip) / 8
	if moved > maxBatchBytes {
		p.batch = max(1, n/2)
	} else {
		p.batch = min(2*p.batch, maxBatch)
	}
}

// exec sends the batch as one pipeline. It leaves out commands whose callers
// have returned: their claims would belong to no request.
func (p *redisPipe) exec(ctx context.Context, batch []*queuedCommand) (err error) {
	defer containRedis(&err)
	pipe := batch[0].client.Pipeline()
	for _, q := range batch {
		if err := q.ctx.Err(); err != nil {
			q.cmd.SetErr(err) // its caller may be about to read it
			continue
		}
		_ = pipe.Process(ctx, q.cmd)
	}
	if pipe.Len() == 0 {
		return nil
	}
	if p.minReplicas > 0 {
		return p.execAndWait(ctx, pipe, batch)
	}
	for _, q := range batch {
		q.replicated = true
	}
	return execPipeline(ctx, pipe)
}

// execAndWait sends WAIT behind the batch on the same connection. WAIT is about
// what that connection has written, so one is enough for all.
func (p *redisPipe) execAndWait(ctx context.Context, pipe redis.Pipeliner, batch []*queuedCommand) error {
	// Half of the time that is left is kept for the release of claims that too
	// few replicas have.
	timeout := p.waitTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(deadline)/2)
	}
	wait := redis.NewIntCmd(ctx, "wait", p.minReplicas, millis(timeout))
	_ = pipe.Process(ctx, wait)
	if err := execPipeline(ctx, pipe); err != nil {
		return err
	}
	for _, q := range batch {
		// WAIT is answered even if a command failed: it has nothing to wait for.
		if err := q.cmd.Err(); err != nil && !errors.Is(err, redis.Nil) {
			continue
		}
		if err := wait.Err(); err != nil {
			q.cmd.SetErr(err)
			continue
		}
		q.replicated = wait.Val() >= int64(p.minReplicas)
	}
	return nil
}

// execPipeline returns an error that none of the commands has. The commands
// were not sent then: a hook refused the pipeline, say, or Redis refused the
// connection.
func execPipeline(ctx context.Context, pipe redis.Pipeliner) error {
	cmds, err := pipe.Exec(ctx)
	for _, cmd := range cmds {
		if cmd.Err() != nil {
			return nil
		}
	}
	return err
}
