package idempotency

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// A redisFlight is a question about one key that is on its way to Redis.
// Duplicates of one process that come meanwhile wait until it has landed. One
// of them then asks on behalf of all, so a hundred cost a few commands.
type redisFlight struct {
	landed chan struct{} // made by the first who waits
	answer redisAnswer   // the zero answer when asking failed
}

// How long a call waits for the flights of others before it asks alone, so that
// one connection that hangs does not hold all duplicates, and how many of them.
const (
	flightPatience = 50 * time.Millisecond
	maxFlights     = 4
)

// askTogether asks, or takes an answer from a flight that began after the call
// did. It never takes a claim from a flight: only what would be the same answer
// for this call, and changes nothing, is shared.
func (s *RedisStore) askTogether(ctx context.Context, name string, c Claim) (Record, error) {
	var patience *time.Timer
	for n := range maxFlights {
		s.mu.Lock()
		if cell := s.resultLocked(name); cell != nil {
			s.mu.Unlock()
			return completedRecord(c, cell.fingerprint, cell.value, nil), nil
		}
		f := s.flights[name]
		if f == nil {
			f = new(redisFlight)
			s.flights[name] = f
			s.mu.Unlock()
			return s.fly(ctx, name, c, f)
		}
		if f.landed == nil {
			f.landed = make(chan struct{})
		}
		s.mu.Unlock()
		if patience == nil {
			patience = time.NewTimer(flightPatience)
			defer patience.Stop()
		}
		if !f.await(ctx, patience) {
			break
		}
		if n == 0 {
			continue // it was in the air before the call
		}
		if rec, ok := f.answer.shared(c); ok {
			return rec, nil
		}
	}
	answer, err := s.ask(ctx, name, c, s.contended(name))
	return answer.Record, err
}

// await waits until the flight has landed. It is false when that took too long.
func (f *redisFlight) await(ctx context.Context, patience *time.Timer) bool {
	select {
	case <-f.landed:
		return true
	case <-patience.C:
	case <-ctx.Done():
	}
	return false
}

// fly asks, and lets those know who wait for f.
func (s *RedisStore) fly(ctx context.Context, name string, c Claim, f *redisFlight) (Record, error) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.flights, name)
		if f.landed != nil {
			close(f.landed)
		}
	}()
	answer, err := s.ask(ctx, name, c, s.contended(name))
	f.answer = answer
	return answer.Record, err
}

// shared returns what the answer to another call means for c. It is false when
// c has to ask for itself: the cell is free, or c's own, or nobody marked it as
// waited for.
func (a *redisAnswer) shared(c Claim) (Record, bool) {
	switch {
	case a.State == 0 || a.cell.state == 0:
		return Record{}, false
	case mismatch(a.cell.fingerprint, c.Fingerprint):
		return Record{State: Mismatch}, true
	case a.cell.state == redisCompleted:
		return completedRecord(c, a.cell.fingerprint, a.cell.value, nil), true
	case a.cell.token == c.Token:
		return Record{}, false
	case a.State == InProgress || a.State == Abandoned:
		return a.Record, true
	}
	return Record{}, false
}

// A redisWatch is one channel, shared by all who wait for its key.
type redisWatch struct {
	channel string
	name    string // of the key; "" if there are several
	users   int
	ready   chan struct{} // closed when Redis has confirmed the subscription
	changed chan struct{} // closed by a message; nil until somebody watches again

	// asked is when a question was sent that found the key claimed, answered
	// when that was known. A record that a question sent later finds was
	// completed after asked, so it is there until its TTL has passed since
	// asked, and nobody need ask for it until then.
	asked, answered time.Time
	result          *redisCell
	resultEnd       time.Time
}

// contended reports whether somebody waits for the key and was not told yet
// that it changed.
func (s *RedisStore) contended(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.watchLocked(name)
	return w != nil && w.changed != nil
}

func (s *RedisStore) watchLocked(name string) *redisWatch {
	if s.session == nil {
		return nil
	}
	w := s.session.watches[redisChannel(name)]
	if w == nil || w.name != name {
		return nil
	}
	return w
}

// observe keeps an answer for those who wait for the same key.
func (s *RedisStore) observe(name string, sent time.Time, a redisAnswer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.watchLocked(name)
	switch {
	case w == nil:
	case a.State == InProgress:
		w.asked, w.answered, w.result = sent, time.Now(), nil
	case a.cell.state == redisCompleted && !w.asked.IsZero() && sent.After(w.answered):
		cell := a.cell
		w.result, w.resultEnd = &cell, w.asked.Add(time.Duration(cell.ttl)*time.Millisecond)
	case a.State == Acquired:
		w.result = nil
	}
}

// resultLocked returns the record that waiters of the key have found, or nil.
func (s *RedisStore) resultLocked(name string) *redisCell {
	w := s.watchLocked(name)
	if w == nil || w.result == nil || !time.Now().Before(w.resultEnd) {
		return nil
	}
	return w.result
}

// redisChannel returns the channel of a key: its name, at least 36 bytes long,
// because older releases of go-redis wait for as many of a message. Short names
// may meet on one channel, which is a false alarm for one of them.
func redisChannel(name string) string {
	const length = 36
	if len(name) < length {
		name += strings.Repeat(".", length-len(name))
	}
	return name
}

// A redisSession is one Pub/Sub connection. It begins with the first who waits
// and ends with the last, or when the connection breaks: then all are told that
// something may have changed, and ask, and watch again.
type redisSession struct {
	store   *RedisStore
	watches map[string]*redisWatch // by channel
	orders  []redisOrder           // not yet sent
	sent    []*redisWatch          // whose subscription is not yet confirmed, in order
	up      bool                   // something was confirmed
	more    chan struct{}          // orders has something; capacity 1
	ctx     context.Context        // ends with the session
	cancel  context.CancelFunc
}

// A redisOrder is to subscribe, or to unsubscribe.
type redisOrder struct {
	watch     *redisWatch
	subscribe bool
}

const (
	watchPatience = 200 * time.Millisecond // how long Watch waits for a subscription
	watchQuiet    = time.Second            // how long after a failure Watch does not try again
	watchPing     = time.Second            // a connection that is silent for twice as long is dead
)

var errWatchDown = errors.New("idempotency: no Redis Pub/Sub connection")

// Watch implements [Watcher]. It returns when Redis has confirmed the
// subscription, and after 200 ms at most. After a failure it returns an error
// at once for a second. It needs permission to SUBSCRIBE to channels that begin
// with Prefix, and the user of the completing process to PUBLISH to them.
func (s *RedisStore) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	session, w, changed := s.join(s.opts.Prefix + key)
	if session == nil {
		return nil, errWatchDown
	}
	stop := context.AfterFunc(ctx, func() { s.leave(session, w) })
	select {
	case <-w.ready:
		return changed, nil
	default:
	}
	timer := time.NewTimer(watchPatience)
	defer timer.Stop()
	err := errWatchDown
	select {
	case <-w.ready:
		return changed, nil
	case <-session.ctx.Done():
	case <-timer.C:
		s.giveUp(session)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if stop() {
		s.leave(session, w)
	}
	return nil, err
}

// join makes the caller a user of a watch, and begins what is missing for it.
func (s *RedisStore) join(name string) (*redisSession, *redisWatch, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == nil {
		if time.Now().Before(s.quiet) {
			return nil, nil, nil
		}
		s.session = &redisSession{store: s, watches: make(map[string]*redisWatch), more: make(chan struct{}, 1)}
		s.session.ctx, s.session.cancel = context.WithCancel(context.Background())
		go s.session.run()
	}
	channel := redisChannel(name)
	w := s.session.watches[channel]
	if w == nil {
		w = &redisWatch{channel: channel, name: name, ready: make(chan struct{})}
		s.session.watches[channel] = w
		s.session.orderLocked(w, true)
	}
	if w.name != name {
		w.name = ""
	}
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	w.users++
	return s.session, w, w.changed
}

// leave ends one use of a watch, with the last one the watch, and with the last
// watch the session.
func (s *RedisStore) leave(session *redisSession, w *redisWatch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.users--; w.users > 0 || session.watches[w.channel] != w {
		return
	}
	delete(session.watches, w.channel)
	if len(session.watches) == 0 {
		session.endLocked()
		return
	}
	session.orderLocked(w, false)
}

// giveUp ends a session that is not up by now.
func (s *RedisStore) giveUp(session *redisSession) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !session.up {
		session.endLocked()
	}
}

// orderLocked has a command sent. Commands of one watch are sent in order, and
// confirmed in order.
func (ss *redisSession) orderLocked(w *redisWatch, subscribe bool) {
	ss.orders = append(ss.orders, redisOrder{w, subscribe})
	select {
	case ss.more <- struct{}{}:
	default:
	}
}

// endLocked ends the session. If anybody still waits, it failed.
func (ss *redisSession) endLocked() {
	if ss.store.session != ss {
		return
	}
	ss.store.session = nil
	ss.cancel()
	if len(ss.watches) > 0 && !ss.up {
		ss.store.quiet = time.Now().Add(watchQuiet)
	}
	for _, w := range ss.watches {
		w.notifyLocked()
	}
	clear(ss.watches)
}

func (w *redisWatch) notifyLocked() {
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}

func (ss *redisSession) end() {
	ss.store.mu.Lock()
	defer ss.store.mu.Unlock()
	ss.endLocked()
}

// run sends what was ordered. Nobody waits for it: connecting may take long.
func (ss *redisSession) run() {
	pubsub := ss.store.client.Subscribe(ss.ctx) // to nothing: this does not connect yet
	defer func() { _ = pubsub.Close() }()
	defer ss.end()
	for receiving := false; ; receiving = true {
		select {
		case <-ss.more:
		case <-ss.ctx.Done():
			return
		}
		if err := ss.send(pubsub); err != nil {
			ss.store.notice(ss.ctx, err)
			return
		}
		if !receiving {
			go ss.receive(pubsub)
		}
	}
}

// send sends what was ordered, with one command for orders of a kind that
// follow each other.
func (ss *redisSession) send(pubsub *redis.PubSub) error {
	ss.store.mu.Lock()
	orders := ss.orders
	ss.orders = nil
	for _, o := range orders {
		if o.subscribe {
			ss.sent = append(ss.sent, o.watch)
		}
	}
	ss.store.mu.Unlock()
	for len(orders) > 0 {
		n, channels := 0, []string(nil)
		for ; n < len(orders) && orders[n].subscribe == orders[0].subscribe; n++ {
			channels = append(channels, orders[n].watch.channel)
		}
		command := pubsub.Unsubscribe
		if orders[0].subscribe {
			command = pubsub.Subscribe
		}
		if err := command(ss.ctx, channels...); err != nil {
			return err
		}
		orders = orders[n:]
	}
	return nil
}

// receive takes messages until the connection breaks. go-redis would connect
// again by itself, but what was published meanwhile would be lost.
func (ss *redisSession) receive(pubsub *redis.PubSub) {
	defer ss.end()
	for silent := false; ; {
		// Before go-redis tells that the connection broke, it connects again, which
		// may take as long as its DialTimeout unless the context is shorter.
		ctx, cancel := context.WithTimeout(ss.ctx, watchPing+watchPatience)
		message, err := pubsub.ReceiveTimeout(ctx, watchPing)
		cancel()
		var timeout net.Error
		switch {
		case err == nil:
			silent = false
			ss.handle(message)
		case errors.As(err, &timeout) && timeout.Timeout() && !silent:
			silent = true
			if pubsub.Ping(ss.ctx) != nil {
				return
			}
		default:
			return
		}
	}
}

func (ss *redisSession) handle(message any) {
	ss.store.mu.Lock()
	defer ss.store.mu.Unlock()
	switch m := message.(type) {
	case *redis.Message:
		if w := ss.watches[m.Channel]; w != nil {
			w.notifyLocked()
		}
	case *redis.Subscription:
		switch {
		case m.Kind != "subscribe":
		case len(ss.sent) == 0 || ss.sent[0].channel != m.Channel:
			ss.endLocked() // go-redis has connected again, and messages are lost
		default:
			close(ss.sent[0].ready)
			ss.sent, ss.up = ss.sent[1:], true
		}
	}
}
