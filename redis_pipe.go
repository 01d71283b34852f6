package idempotency

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisPipe sends commands to one server. As long as few are on their way,
// each goes by itself, at once. When there are more they wait for one that comes
// back, and go together in one pipeline. That costs a third of the processor
// time for each, on both sides, and hardly any patience: of eight that are on
// their way, one is back after an eighth of a round trip.
type redisPipe struct {
	client *redis.Client

	mu    sync.Mutex // guards what follows
	lanes int        // in use
	queue []*queuedCommand
	alone int // so many commands go by themselves, as something large came by
}

const (
	maxLanes = 8
	maxBatch = 128 // commands in a pipeline, so that none waits long for the others

	// aloneAfterBulk is how many commands go by themselves after one with a
	// large value: in one pipeline, each would wait for the values of all.
	aloneAfterBulk = 1000
)

// isBulky reports whether a command has a large value, or brought one back.
func isBulky(cmd redis.Cmder) bool {
	for _, arg := range cmd.Args() {
		if b, ok := arg.([]byte); ok && len(b) > maxPacked {
			return true
		}
	}
	reply, ok := cmd.(*redis.StringCmd)
	return ok && len(reply.Val()) > maxPacked
}

// A queuedCommand waits to be sent with others. Its caller may leave when ctx
// ends; nobody looks at cmd then.
type queuedCommand struct {
	ctx  context.Context
	cmd  redis.Cmder
	done chan struct{}
}

// process is client.Process.
func (p *redisPipe) process(ctx context.Context, cmd redis.Cmder) error {
	p.mu.Lock()
	if isBulky(cmd) {
		p.alone = aloneAfterBulk
	}
	if p.alone > 0 {
		p.alone--
		p.mu.Unlock()
		defer p.look(cmd)
		return p.client.Process(ctx, cmd)
	}
	if p.lanes < maxLanes {
		p.lanes++
		p.mu.Unlock()
		defer p.free()
		defer p.look(cmd)
		return p.client.Process(ctx, cmd)
	}
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

// look sees whether a command brought back something large.
func (p *redisPipe) look(cmd redis.Cmder) {
	if isBulky(cmd) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.alone = aloneAfterBulk
	}
}

// free has a lane send what waits, or gives it up.
func (p *redisPipe) free() {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(p.queue), maxBatch)
	if n == 0 {
		p.lanes--
		return
	}
	batch := p.queue[:n:n]
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil
	}
	go p.send(batch)
}

// send sends a batch. It takes as long as the most patient caller waits.
func (p *redisPipe) send(batch []*queuedCommand) {
	defer p.free()
	var deadline time.Time
	limited := true
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
		if err != nil {
			q.cmd.SetErr(err)
		}
		p.look(q.cmd)
		close(q.done)
	}
}

// exec returns an error if a hook of the client panics: on a goroutine of its
// own that would be the end of the process.
func (p *redisPipe) exec(ctx context.Context, batch []*queuedCommand) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("idempotency: panic while sending to Redis: %v", r)
		}
	}()
	pipe := p.client.Pipeline()
	for _, q := range batch {
		if err := q.ctx.Err(); err != nil { // else a claim would be made that nobody knows of
			q.cmd.SetErr(err) // its caller may be about to look
			continue
		}
		_ = pipe.Process(ctx, q.cmd)
	}
	return execPipeline(ctx, pipe)
}

// execPipeline returns an error that none of the commands has, which are then not
// done: a connection that is refused when it begins, say, or that of a hook.
func execPipeline(ctx context.Context, pipe redis.Pipeliner) error {
	cmds, err := pipe.Exec(ctx)
	for _, cmd := range cmds {
		if cmd.Err() != nil {
			return nil
		}
	}
	return err
}
