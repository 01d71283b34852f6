package idempotency

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisPipe sends commands to one server. While few commands are on their
// way, each goes at once and by itself. Further commands wait for a reply to
// one of those, and go together in one pipeline. That costs a third of the
// processor time for each, on both sides, and hardly any delay: of eight
// commands on their way, the first is answered after an eighth of a round trip.
type redisPipe struct {
	client *redis.Client

	mu        sync.Mutex // guards what follows
	lanes     int        // in use: commands and pipelines on their way
	queue     []*queuedCommand
	unbatched int // how many commands go by themselves, after one with a large value
}

const (
	// maxLanes is how many commands and pipelines are on their way at a time.
	// With fewer, eight callers would wait for each other although the server
	// is idle.
	maxLanes = 8

	// maxBatch is how many commands go in a pipeline, so that none waits long
	// for the replies to the others.
	maxBatch = 128

	// unbatchedAfterLarge is how many commands go by themselves after one with
	// a large value: in one pipeline, each would wait for the values of all.
	unbatchedAfterLarge = 1000
)

// isLarge reports whether a command has a large value, or brought one back.
// Large is what a MemoryStore would not pack either.
func isLarge(cmd redis.Cmder) bool {
	for _, arg := range cmd.Args() {
		if b, ok := arg.([]byte); ok && len(b) > maxPacked {
			return true
		}
	}
	reply, ok := cmd.(*redis.StringCmd)
	return ok && len(reply.Val()) > maxPacked
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
	if isLarge(cmd) {
		p.unbatched = unbatchedAfterLarge
	}
	if p.unbatched > 0 { // a large value came lately: past the lanes
		p.unbatched--
		p.mu.Unlock()
		defer p.noteReply(cmd)
		return p.client.Process(ctx, cmd)
	}
	if p.lanes < maxLanes {
		p.lanes++
		p.mu.Unlock()
		defer p.freeLane()
		defer p.noteReply(cmd)
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

// noteReply sees whether a command brought back a large value. A replay does
// not look large before its reply has come.
func (p *redisPipe) noteReply(cmd redis.Cmder) {
	if isLarge(cmd) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.unbatched = unbatchedAfterLarge
	}
}

// freeLane has a lane send what is queued, or ends its use. Each use of a lane
// ends with freeLane, so the queue is empty when no lane is in use: no command
// is left waiting.
func (p *redisPipe) freeLane() {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(p.queue), maxBatch)
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
	for _, q := range batch {
		if err != nil { // none of them was sent, or a hook panicked
			q.cmd.SetErr(err)
		}
		p.noteReply(q.cmd)
		close(q.done)
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

// containRedis is deferred around calls of the client. It makes a panic in a
// hook or a dialer an error, because on a goroutine of the store a panic would
// end the process.
func containRedis(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("idempotency: panic in the Redis client: %v", p)
	}
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
