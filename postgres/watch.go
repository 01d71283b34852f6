package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// How long the listener waits for its connection and the notification that
// tests it, after what silence it tests the connection again, and for how long
// it does not try again after a failure.
const (
	listenTimeout = time.Second
	listenSilence = 5 * time.Second
	listenPause   = 5 * time.Second
)

var errNotListening = errors.New("postgres: notifications do not arrive")

// A listener passes the notifications of one connection on to all waiters. The
// connection is there while there are waiters.
type listener struct {
	store *Store

	mu       sync.Mutex // guards what follows
	waiters  map[string]map[*waiter]struct{}
	session  *session // nil: there are no waiters
	notUntil time.Time
}

// A session is one connection of a listener. err is set when ready is closed.
type session struct {
	end   context.CancelFunc
	ready chan struct{}
	err   error
}

// A waiter is one call of Watch.
type waiter struct{ changed chan struct{} }

// Watch implements [idempotency.Watcher] by LISTEN, over one connection for all
// waiters. It returns an error where notifications do not arrive, as through
// PgBouncer in transaction mode.
func (s *Store) Watch(ctx context.Context, key string) (<-chan struct{}, error) {
	l := &s.listener
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w, on, err := l.add(key)
	if err != nil {
		return nil, err
	}
	select {
	case <-on.ready:
		err = on.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		select {
		case <-w.changed: // before the connection was tested; then nobody needed it any more
			return w.changed, nil
		default:
			l.remove(key, w)
			return nil, err
		}
	}
	context.AfterFunc(ctx, func() { l.remove(key, w) })
	return w.changed, nil
}

// add adds a waiter. The first one starts a session.
func (l *listener) add(key string) (*waiter, *session, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().Before(l.notUntil) {
		return nil, nil, errNotListening
	}
	if l.session == nil {
		ctx, end := context.WithCancel(context.Background())
		l.session = &session{end: end, ready: make(chan struct{})}
		l.waiters = make(map[string]map[*waiter]struct{})
		go l.run(ctx, l.session)
	}
	w := &waiter{make(chan struct{})}
	if l.waiters[key] == nil {
		l.waiters[key] = make(map[*waiter]struct{})
	}
	l.waiters[key][w] = struct{}{}
	return w, l.session, nil
}

// remove removes a waiter, unless a notification has done so. The last one ends
// the session.
func (l *listener) remove(key string, w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.waiters[key][w]; !ok {
		return
	}
	delete(l.waiters[key], w)
	l.tidyLocked(key)
}

// tidyLocked forgets a key without waiters, and ends a session without keys.
func (l *listener) tidyLocked(key string) {
	if len(l.waiters[key]) == 0 {
		delete(l.waiters, key)
	}
	if len(l.waiters) == 0 && l.session != nil {
		l.session.end()
		l.session = nil
	}
}

func (l *listener) hasWaiter(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.waiters[key]) > 0
}

// notify wakes the waiters of a key.
func (l *listener) notify(on *session, key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session != on {
		return
	}
	for w := range l.waiters[key] {
		close(w.changed)
		delete(l.waiters[key], w)
	}
	l.tidyLocked(key)
}

// run listens until the session ends. When its connection breaks, or brings no
// notifications any more, run wakes all waiters, which then poll. Waiters whose
// connection was never ready learn that from the session.
func (l *listener) run(ctx context.Context, on *session) {
	defer on.end()
	conn, err := l.connect(ctx, on)
	if conn != nil {
		defer func() { _ = conn.Close(context.Background()) }()
	}
	on.err = err
	close(on.ready)
	connected := err == nil
	for err == nil {
		_, err = l.next(ctx, on, conn, listenSilence)
		if errors.Is(err, context.DeadlineExceeded) {
			err = l.probe(ctx, on, conn)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session != on {
		return // the last waiter has ended it
	}
	if connected {
		for _, waiters := range l.waiters {
			for w := range waiters {
				close(w.changed)
			}
		}
	}
	l.waiters, l.session = nil, nil
	l.notUntil = time.Now().Add(listenPause)
}

// next passes one notification on, and returns its payload.
func (l *listener) next(ctx context.Context, on *session, conn *pgx.Conn, patience time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	n, err := conn.WaitForNotification(ctx)
	if err != nil {
		return "", err
	}
	l.notify(on, n.Payload)
	return n.Payload, nil
}

// connect opens the connection and tests it.
func (l *listener) connect(ctx context.Context, on *session) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	config := l.store.pool.Config()
	if config.BeforeConnect != nil { // which may set a password that changes
		if err := config.BeforeConnect(ctx, config.ConnConfig); err != nil {
			return nil, err
		}
	}
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "LISTEN "+l.store.sql.channel); err != nil {
		return conn, err
	}
	return conn, l.probe(ctx, on, conn)
}

// probe tests the connection with a notification that another connection sends.
// A pooler takes LISTEN and forgets it after the statement. A firewall may drop
// an idle connection and tell neither end.
func (l *listener) probe(ctx context.Context, on *session, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	own, err := l.store.conns()
	if err != nil {
		return err
	}
	probe := "probe " + rand.Text() // no key has a space
	if _, err := own.Exec(ctx, "SELECT pg_notify($1::text, $2::text)", l.store.sql.channel, probe); err != nil {
		return err
	}
	for payload := ""; payload != probe; {
		if payload, err = l.next(ctx, on, conn, listenTimeout); err != nil {
			return errors.Join(errNotListening, err)
		}
	}
	return nil
}
