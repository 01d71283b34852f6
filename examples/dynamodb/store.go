package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/go-idempotency/idempotency"
)

// Options configure a [Store]. The zero Options are the defaults.
type Options struct {
	// MaxClockSkew is how far apart the clocks of two processes that share the
	// table may be. The conditions of DynamoDB know no time, so each process
	// judges leases by its own clock, and waits for this much longer before it takes a claim over or
	// takes a cell for expired. If two clocks are further apart, two handlers
	// may run at once. A step of a clock while a claim is held counts too.
	//
	// Default 1s, which NTP keeps by far where it works. It must not be negative.
	// A claim whose process died is taken over after Lease and MaxClockSkew.
	MaxClockSkew time.Duration
}

// A Store is an [idempotency.Store] in a DynamoDB table. It may be shared by any
// number of processes whose clocks are at most [Options].MaxClockSkew apart, and
// is safe for concurrent use.
//
// All writes are conditional. A write that was meant for another state of the
// cell than DynamoDB has does nothing, and the store decides anew. So a write
// that is sent twice, because the first reply was lost, does no harm.
type Store struct {
	client *dynamodb.Client
	table  string
	skew   time.Duration
	clock  func() time.Time
}

var _ idempotency.Store = (*Store)(nil)

// NewStore returns a store in table, whose partition key is the string id: see
// CreateTable. Each service needs a table of its own, or one takes the other's
// key for a retry. client should be one of NewClient. NewStore panics when
// opts.MaxClockSkew is negative.
func NewStore(client *dynamodb.Client, table string, opts *Options) *Store {
	skew := time.Second
	if opts != nil && opts.MaxClockSkew != 0 {
		skew = opts.MaxClockSkew
	}
	if skew < 0 {
		panic("dynamodb: Options.MaxClockSkew is negative; leave it zero for 1s")
	}
	return &Store{client: client, table: table, skew: skew, clock: time.Now}
}

// update has decide say what becomes of the cell of key, and writes that. When
// another write comes in between, decide is asked again. update ends at the
// latest with ctx.
//
// update takes the cell for absent until it learns better, unless read is set.
// That is right for most claims, and where it is not, the refused write returns
// the cell. A renewal or a release finds its cell there, so it begins with a
// read, which DynamoDB charges less for than for a write that it refuses.
func (s *Store) update(ctx context.Context, key string, read bool, decide func(old cell, now time.Time) (next cell, write bool)) error {
	var old cell
	var err error
	if read {
		old, err = s.load(ctx, key)
	}
	for written := false; err == nil && !written; {
		now := s.clock()
		next, write := decide(s.at(old, now), now)
		if !write {
			return nil
		}
		old, written, err = s.put(ctx, key, next, s.unchanged(old, now))
	}
	return err
}

// at returns what c is at a time. An expired cell is absent, also when DynamoDB
// has not deleted it yet.
func (s *Store) at(c cell, now time.Time) cell {
	if s.left(c.expires, now) <= 0 {
		return cell{}
	}
	return c
}

// left returns the time until end has come on the clocks of all processes.
func (s *Store) left(end, now time.Time) time.Duration { return end.Add(s.skew).Sub(now) }

// Acquire implements [idempotency.Store].
func (s *Store) Acquire(ctx context.Context, key string, c idempotency.Claim) (rec idempotency.Record, err error) {
	err = s.update(ctx, key, c.Attempt > 0, func(old cell, now time.Time) (next cell, write bool) {
		next, rec = s.acquire(old, c, now)
		return next, rec.State == idempotency.Acquired
	})
	if err != nil {
		return idempotency.Record{}, err
	}
	return rec, nil
}

// acquire decides by the table in the documentation of [idempotency.Store], in
// its order. The cases that return are the rows that refuse. The others say what
// the cell becomes.
func (s *Store) acquire(old cell, c idempotency.Claim, now time.Time) (cell, idempotency.Record) {
	next := cell{
		state: claimed, token: c.Token, attempt: old.attempt + 1, fingerprint: c.Fingerprint,
		leaseEnd: now.Add(c.Lease), expires: now.Add(max(c.TTL, c.Lease)), rev: rand.Text(),
	}
	own, renewal := old.token == c.Token, c.Attempt > 0
	switch {
	case old.state == absent: // a renewal claims it as well: the store has lost the record of a running handler
		next.attempt = max(c.Attempt, 1)
	case old.state == released && (own || renewal):
		return cell{}, idempotency.Record{State: idempotency.Lost}
	case old.state == released:
	case len(old.fingerprint) > 0 && len(c.Fingerprint) > 0 && !bytes.Equal(old.fingerprint, c.Fingerprint):
		return cell{}, idempotency.Record{State: idempotency.Mismatch}
	case old.state == completed && !renewal:
		return cell{}, idempotency.Record{State: idempotency.Completed, Fingerprint: old.fingerprint, Value: old.value}
	case old.state == claimed && own && (!renewal || c.Attempt == old.attempt):
		next.attempt, next.fingerprint = old.attempt, old.fingerprint
		next.once = old.once || renewal && c.Once
	case renewal: // of another attempt, or of a cell that is not its own
		return cell{}, idempotency.Record{State: idempotency.Lost}
	case s.left(old.leaseEnd, now) > 0:
		return cell{}, idempotency.Record{State: idempotency.InProgress, Remaining: s.left(old.leaseEnd, now)}
	case old.once:
		return cell{}, idempotency.Record{State: idempotency.Abandoned}
	}
	return next, idempotency.Record{State: idempotency.Acquired, Attempt: next.attempt, Once: next.once}
}

// Complete implements [idempotency.Store]. It takes one call, since its
// condition says all that must hold of the cell. DynamoDB refuses an item over
// 400 KB, and Complete returns its error: the middleware then stores in its
// place that the response was not stored.
func (s *Store) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	for {
		now := s.clock()
		next := cell{
			state: completed, token: token, fingerprint: r.Fingerprint, value: r.Value,
			expires: now.Add(r.TTL), rev: rand.Text(),
		}
		found, written, err := s.put(ctx, key, next, s.claimedBy(token, now))
		if written || err != nil {
			return err
		}
		switch old := s.at(found, now); {
		case old.state == absent, old.state == claimed && old.token == token:
			// The cell has changed since the condition failed: try again.
		case old.state == completed && old.token == token:
			return nil
		default:
			return idempotency.ErrLeaseLost
		}
	}
}

// Release implements [idempotency.Store].
func (s *Store) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return s.update(ctx, key, true, func(old cell, now time.Time) (next cell, write bool) {
		if old.state != absent && (old.state != claimed || old.token != token) {
			return cell{}, false
		}
		next = cell{state: released, token: token, attempt: old.attempt, expires: now.Add(keep), rev: rand.Text()}
		// The marker of an earlier attempt may stand for a run that had an effect,
		// so this one is kept for at least as long as that one would have been.
		if old.attempt > 1 && old.expires.After(next.expires) {
			next.expires = old.expires
		}
		return next, true
	})
}
