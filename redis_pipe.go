package idempotency

import (
	"context"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisPipe sends commands to one server. While few commands are on their
// way, each goes at once and by itself. Further commands wait for a reply to
// one of those, and go together in one pipeline. That costs a third of the
// processor time for each, on both sides, and hardly any delay: of eight
// commands on their way, the first is answered after an eighth of a round trip.
//
// A store has two of them. Commands with a large value have one of their own,
// whose connections are few, so that no small command waits until a large value
// has been sent. What a claim brings back is known only afterwards. It may be a
// large record, and the other commands of its pipeline wait for that. So a
// pipeline that moved much is followed by shorter ones.
type redisPipe struct {
	client   *redis.Client
	maxLanes int // how many commands and pipelines are on their way at a time

	mu    sync.Mutex // guards what follows
	lanes int        // in use: commands and pipelines on their way
	batch int        // how many commands the next pipeline may have
	queue []*queuedCommand
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

	// maxBatch is how many commands go in a pipeline, so that none waits long
	// for the replies to the others.
	maxBatch = 128

	// maxBatchBytes is how many bytes of values a pipeline should move, both
	// ways together, for the same reason. At 1 Gbit/s it takes 2 ms.
	maxBatchBytes = 256 << 10
)

// newRedisPipes returns the pipes for small and for large commands. Together
// they should not need more connections than the client has. Otherwise small
// commands would wait for connections that large ones hold.
func newRedisPipes(client *redis.Client) (small, large *redisPipe) {
	spare := max(1, client.Options().PoolSize-smallLanes)
	small = &redisPipe{client: client, maxLanes: smallLanes, batch: maxBatch}
	large = &redisPipe{client: client, maxLanes: min(largeLanes, spare), batch: 1}
	return small, large
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

// A queuedCommand waits to be sent with others. When ctx ends, its caller
// returns and does not read cmd. Otherwise the caller reads cmd after done is
// closed. The close orders that read after the writes of the lane.
type queuedCommand struct {
	ctx  context.Context
	cmd  redis.Cmder
	done chan struct{}
}

// process sends a command, as client.Process does. A goroutine of a lane sends
// the commands in the queue, so their callers can return at their own
// deadlines.
func (p *redisPipe) process(ctx context.Context, cmd redis.Cmder) error {
	p.mu.Lock()
	if p.lanes < p.maxLanes {
		p.lanes++
		p.mu.Unlock()
		defer p.freeLane()
		return p.client.Process(ctx, cmd)
	}
	// All lanes are in use, so one of them is freed in time and sends the queue.
	q := &queuedCommand{ctx, cmd, make(chan struct{})}
	p.queue = append(p.queue, q)
	p.mu.Unlock()
	select {
	case <-q.done:
		return cmd.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// freeLane has a lane send what is queued, or ends its use. Each use of a lane
// ends with freeLane, so the queue is empty when no lane is in use: no command
// is left waiting.
func (p *redisPipe) freeLane() {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(p.queue), p.batch)
	if n == 0 {
		p.lanes--
		return
	}
	batch := p.queue[:n:n] // what is appended to the queue must not reach into it
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil
	}
	go p.send(batch)
}

// send sends a batch. Its deadline is the latest of its callers' deadlines: an
// earlier one would fail commands that have time left. A caller that is
// cancelled must not end the commands of the others, so only the values of its
// context are used.
func (p *redisPipe) send(batch []*queuedCommand) {
	defer p.freeLane()
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
	err := p.exec(ctx, batch)
	moved := 0
	for _, q := range batch {
		if err != nil { // none of them was sent, or a hook panicked
			q.cmd.SetErr(err)
		}
		moved += sentBytes(q.cmd) + receivedBytes(q.cmd)
		close(q.done)
	}
	p.adapt(len(batch), moved)
}

// adapt sets the length of the next pipelines by what one of n commands moved.
// Half as many commands will move about half as much. The length doubles again
// with each pipeline that moved little, so a few large records among many small
// ones make no difference.
func (p *redisPipe) adapt(n, moved int) {
	p.mu.Lock()
	defer p.mu.Unlock()
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
	pipe := p.client.Pipeline()
	for _, q := range batch {
		if err := q.ctx.Err(); err != nil {
			q.cmd.SetErr(err) // its caller may be about to read it
			continue
		}
		_ = pipe.Process(ctx, q.cmd)
	}
	return execPipeline(ctx, pipe)
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
