package idempotency

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisWatch is one channel, shared by all callers that watch its key. Redis
// publishes on the channel when Complete or Release finds that the cell was
// marked as watched. The script sets that mark for a claim that it answers
// InProgress. So a caller watches first and claims then.
type redisWatch struct {
	channel string
	users   int
	ready   chan struct{} // closed when Redis has confirmed the subscription
	news    *redisNews    // what the next message brings; nil until the next Watch
}

// redisNews is a change of a key, for all callers that watched it before the
// message came. answer tells of the response if there is one by then. It is set
// before changed is closed.
type redisNews struct {
	name    string
	changed chan struct{}
	answer  redisAnswer
}

// toldOf returns what the news mean for a claim that waited for them. It is
// false when the claim has to ask Redis.
func (n *redisNews) toldOf(c Claim) (Record, bool) {
	select {
	case <-n.changed:
		return n.answer.sharedWith(c)
	default:
		return Record{}, false
	}
}

// isWatched reports whether a caller watches the key and has not been told that
// it changed. Such a key is likely to be claimed.
func (s *RedisStore) isWatched(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == nil {
		return false
	}
	w := s.session.watches[redisChannel(name)]
	return w != nil && w.news != nil
}

// redisChannel returns the channel of a key. That is its name, made at least 36
// bytes long: older releases of go-redis read at least so many bytes of a
// message before they return it. Two short names may meet on one channel, which
// is a false alarm for one of them.
func redisChannel(name string) string {
	const filler = "...................................." // 36 bytes
	if len(name) < len(filler) {
		name += filler[len(name):]
	}
	return name
}

// A redisSession is one Pub/Sub connection. It begins with the first watch, and
// ends with the last or when the connection breaks. Messages may be lost then,
// so it tells all watches of a change: their callers ask Redis and watch again.
//
// run sends commands and receive takes what comes. So a connection that is slow
// to be made, or that hangs, holds up neither Watch nor the end of a watch. The
// lock of the store guards the fields.
type redisSession struct {
	store       *RedisStore
	watches     map[string]*redisWatch // by channel
	pending     []redisSubscription    // not yet sent
	unconfirmed []*redisWatch          // whose subscription was sent, in order
	up          bool                   // Redis has confirmed one of them
	wake        chan struct{}          // pending has something; capacity 1
	abandoned   bool                   // the connection is not to be closed
	ctx         context.Context        // ends with the session
	cancel      context.CancelCauseFunc
}

// A redisSubscription is a command: to subscribe to the channel of a watch, or
// with end to unsubscribe from it. Redis confirms both.
type redisSubscription struct {
	watch *redisWatch
	end   bool
}

// Without these bounds, a server that is out of reach would cost each duplicate
// its whole Wait. A connection that looks open but is dead, as after a NAT
// table was cleared, would cost each of them the same.
const (
	watchPatience = 200 * time.Millisecond // how long Watch waits for Redis to confirm
	watchRetry    = time.Second            // how long after a failure Watch does not try again
	watchPing     = time.Second            // how long a connection may be silent before a PING
)

// errWatchDown has the caller poll.
var errWatchDown = errors.New("idempotency: no Redis Pub/Sub connection")

// Watch implements [Watcher]. It returns when Redis has confirmed the
// subscription, since what is published before that is lost, and after 200ms at
// most. After a failure it returns an error at once for a second. It needs
// permission to SUBSCRIBE to channels that begin with Prefix, and the process
// that completes needs permission to PUBLISH to them.
func (s *RedisStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	news, err := s.watch(ctx, s.opts.Prefix+key)
	if err != nil {
		return nil, err
	}
	return news.changed, nil
}

// watch is Watch for a name, which has the Prefix.
func (s *RedisStore) watch(ctx context.Context, name string) (*redisNews, error) {
	session, w, news := s.join(name)
	if session == nil {
		return nil, errWatchDown
	}
	stop := context.AfterFunc(ctx, func() { s.leave(session, w) })
	select { // the usual case needs no timer
	case <-w.ready:
		return news, nil
	default:
	}
	timer := time.NewTimer(watchPatience)
	defer timer.Stop()
	err := errWatchDown
	select {
	case <-w.ready:
		return news, nil
	case <-session.ctx.Done():
		err = context.Cause(session.ctx)
	case <-timer.C:
		// A session that is up goes on: other callers have confirmed watches.
		session.endUnlessUp()
	case <-ctx.Done():
		err = ctx.Err()
	}
	if stop() { // else the AfterFunc has left, or is about to
		s.leave(session, w)
	}
	return nil, err
}

// join makes the caller a user of a watch, and begins the watch and the session
// where they are missing. The session is nil for a second after one that
// failed.
func (s *RedisStore) join(name string) (*redisSession, *redisWatch, *redisNews) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == nil {
		// The session has a context of its own, for it outlives this call.
		if time.Now().Before(s.notBefore) {
			return nil, nil, nil
		}
		s.session = &redisSession{store: s, watches: make(map[string]*redisWatch), wake: make(chan struct{}, 1)}
		s.session.ctx, s.session.cancel = context.WithCancelCause(context.Background())
		go s.session.run()
	}
	channel := redisChannel(name)
	w := s.session.watches[channel]
	if w == nil {
		w = &redisWatch{channel: channel, ready: make(chan struct{})}
		s.session.watches[channel] = w
		s.session.enqueueLocked(redisSubscription{watch: w})
	}
	if w.news == nil {
		w.news = &redisNews{name: name, changed: make(chan struct{})}
	}
	w.users++
	if w.news.name != name { // it has the channel too: it is told of a change, and of no response
		return s.session, w, &redisNews{name: name, changed: w.news.changed}
	}
	return s.session, w, w.news
}

// leave ends one use of a watch. With the last use it ends the watch, and with
// the last watch the session. That is why the store needs no Close.
func (s *RedisStore) leave(session *redisSession, w *redisWatch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.users--; w.users > 0 || session.watches[w.channel] != w {
		return // others use it, or the session has ended
	}
	delete(session.watches, w.channel)
	if len(session.watches) == 0 {
		session.endLocked(nil)
		return
	}
	session.enqueueLocked(redisSubscription{watch: w, end: true})
}

// enqueueLocked has a command sent. Commands are sent in order, and Redis
// confirms them in order.
func (ss *redisSession) enqueueLocked(sub redisSubscription) {
	ss.pending = append(ss.pending, sub)
	select {
	case ss.wake <- struct{}{}:
	default:
	}
}

// endUnlessUp ends a session that Redis has confirmed nothing to.
func (ss *redisSession) endUnlessUp() {
	ss.store.mu.Lock()
	defer ss.store.mu.Unlock()
	if !ss.up {
		ss.endLocked(nil)
	}
}

// end is endLocked for a caller without the lock.
func (ss *redisSession) end(cause error) {
	ss.store.mu.Lock()
	defer ss.store.mu.Unlock()
	// A go-redis that panicked may still hold the lock that Close waits for.
	ss.abandoned = ss.abandoned || errors.Is(cause, errRedisPanic)
	ss.endLocked(cause)
}

// endLocked ends the session; cause tells why, if that is known. A session that
// has watches and was never up has failed. After a failure the callers poll for
// watchRetry: each of them would otherwise wait for a connection that is likely
// to fail again.
func (ss *redisSession) endLocked(cause error) {
	if ss.store.session != ss {
		return
	}
	ss.store.session = nil
	if cause == nil {
		ss.cancel(errWatchDown)
	} else {
		ss.cancel(fmt.Errorf("%w: %w", errWatchDown, cause))
	}
	if len(ss.watches) > 0 && !ss.up {
		ss.store.notBefore = time.Now().Add(watchRetry)
	}
	for _, w := range ss.watches {
		w.notifyLocked()
	}
	clear(ss.watches)
}

// notifyLocked tells the callers that watch. A caller that watches again gets
// another channel.
func (w *redisWatch) notifyLocked() {
	if w.news != nil {
		close(w.news.changed)
		w.news = nil
	}
}

// read reads a key that has changed, and tells the callers that watched it. One
// command answers them all. If each of 50,000 callers claimed for itself, the
// replies would wait for a processor behind those callers, and all of them would
// ask again: that took 30,000 commands and 48 µs of processor time for each.
//
// GETEX goes to the master where a Cluster client sends GET to a replica.
func (s *RedisStore) read(news *redisNews) {
	defer close(news.changed)
	ctx, cancel := context.WithTimeout(context.Background(), watchPatience)
	defer cancel()
	cmd := redis.NewStringCmd(ctx, "getex", news.name)
	if _, err := s.send(ctx, news.name, cmd, false); err != nil {
		return
	}
	// A claim or a marker may have changed again. Its callers ask.
	if cell, err := parseRedisCell([]byte(cmd.Val())); err == nil && cell.state == redisCompleted {
		news.answer = redisAnswer{Record{State: Completed}, cell}
	}
}

// run sends what is pending. It is a goroutine of its own because connecting
// may take longer than Watch waits. When it fails, the slots of a Cluster are
// loaded again: the subscription may have gone to a server that has left the
// Cluster.
func (ss *redisSession) run() {
	var err error
	defer func() { ss.end(err) }()
	defer containRedis(&err)
	pubsub := ss.store.client.Subscribe(ss.ctx) // to nothing: this does not connect yet
	defer ss.close(pubsub)
	for receiving := false; ; receiving = true {
		select {
		case <-ss.wake:
		case <-ss.ctx.Done():
			return
		}
		if err = ss.send(pubsub); err != nil {
			ss.end(err)
			ss.store.reloadSlotsAfter(ss.ctx, err)
			return
		}
		if !receiving { // before the first command there is no connection
			go ss.receive(pubsub)
		}
	}
}

// close closes the connection, unless go-redis might wait for itself.
func (ss *redisSession) close(pubsub *redis.PubSub) {
	ss.store.mu.Lock()
	abandoned := ss.abandoned
	ss.store.mu.Unlock()
	if !abandoned {
		_ = pubsub.Close()
	}
}

// send sends what is pending. Subscriptions that follow each other go in one
// command.
func (ss *redisSession) send(pubsub *redis.PubSub) error {
	ss.store.mu.Lock()
	pending := ss.pending
	ss.pending = nil
	// The watches are noted before their commands are sent, since receive may
	// see the confirmation at once.
	for _, sub := range pending {
		if !sub.end {
			ss.unconfirmed = append(ss.unconfirmed, sub.watch)
		}
	}
	ss.store.mu.Unlock()
	for len(pending) > 0 {
		n, channels := 0, []string(nil)
		for ; n < len(pending) && pending[n].end == pending[0].end; n++ {
			channels = append(channels, pending[n].watch.channel)
		}
		command := pubsub.Subscribe
		if pending[0].end {
			command = pubsub.Unsubscribe
		}
		if err := command(ss.ctx, channels...); err != nil {
			return err
		}
		pending = pending[n:]
	}
	return nil
}

// receive takes messages until the connection breaks. go-redis would connect
// again by itself, but what was published meanwhile would be lost.
//
// A connection can be dead although no error tells so. When nothing has come
// for watchPing, receive sends a PING. When nothing comes for as long again,
// the connection counts as broken.
func (ss *redisSession) receive(pubsub *redis.PubSub) {
	var err error
	defer func() { ss.end(err) }()
	defer containRedis(&err)
	for idle := false; ; {
		var message any
		message, err = ss.next(pubsub)
		var timeout net.Error
		switch {
		case err == nil:
			idle = false
			ss.handle(message)
		case errors.As(err, &timeout) && timeout.Timeout() && !idle:
			idle = true
			if err = pubsub.Ping(ss.ctx); err != nil {
				return
			}
		default:
			return
		}
	}
}

// next waits for a message for as long as watchPing. Before go-redis tells that
// the connection broke, it connects again. That may take as long as its
// DialTimeout unless the context is shorter.
func (ss *redisSession) next(pubsub *redis.PubSub) (any, error) {
	ctx, cancel := context.WithTimeout(ss.ctx, watchPing+watchPatience)
	defer cancel()
	return pubsub.ReceiveTimeout(ctx, watchPing)
}

// handle takes a message or a confirmation. A confirmation counts only for the
// subscription that is next. A further one means that go-redis has connected
// again and subscribed to everything anew, so messages may be lost.
func (ss *redisSession) handle(message any) {
	ss.store.mu.Lock()
	defer ss.store.mu.Unlock()
	switch m := message.(type) {
	case *redis.Message:
		// It has no text, so Redis is asked what became of the key. A caller that
		// watches from now on is not told: its request may be younger.
		if w := ss.watches[m.Channel]; w != nil && w.news != nil {
			go ss.store.read(w.news)
			w.news = nil
		}
	case *redis.Subscription:
		switch {
		case m.Kind != "subscribe":
		case len(ss.unconfirmed) == 0 || ss.unconfirmed[0].channel != m.Channel:
			ss.endLocked(nil)
		default:
			close(ss.unconfirmed[0].ready)
			ss.unconfirmed, ss.up = ss.unconfirmed[1:], true
		}
	}
}
