package integration

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
)

// A brokenStore is a RedisStore with a bug. Watch is that of the RedisStore.
type brokenStore struct {
	*idempotency.RedisStore
	bug    string
	client *redis.Client
	calls  atomic.Int64
	owners sync.Map // tokens that have got their key

	attempts sync.Map // of tokens

	mu     sync.Mutex // guards what follows
	values map[string][]byte
	late   map[string]time.Time // keys that are running until then
}

func newBrokenStore(bug string, client *redis.Client, store *idempotency.RedisStore) *brokenStore {
	return &brokenStore{
		RedisStore: store, bug: bug, client: client, values: make(map[string][]byte), late: make(map[string]time.Time),
	}
}

func (s *brokenStore) forget(ctx context.Context, key string) { s.client.Del(ctx, "idem:"+key) }

// every is true for every nth call.
func (s *brokenStore) every(n int64) bool { return s.calls.Add(1)%n == 0 }

func (s *brokenStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	fingerprint, asked := c.Fingerprint, c
	switch s.bug {
	case dropsCommits:
		c.Once = false
	case restartsAttempts:
		c.Attempt = s.attempt(c)
	case skipsAttempts:
		c.Attempt /= 2
	case endsLeasesEarly:
		c.Lease /= 4
	case neverEndsLeases:
		c.Lease = c.TTL
	case ignoresFingerprints:
		c.Fingerprint = nil
	case endsTTLsLate:
		c.TTL *= 3
	}
	rec, err := s.RedisStore.Acquire(ctx, key, c)
	if err == nil && s.bug == takesBack {
		return s.takeBack(ctx, key, c, rec)
	}
	switch {
	case err != nil && s.bug == acquiresWhenDown:
		return idempotency.Record{State: idempotency.Acquired, Attempt: 1}, nil
	case err != nil:
		return rec, err
	case s.bug == renewsFreed && asked.Attempt > 0 && rec.State == idempotency.Lost:
		return s.renewFreed(ctx, key, c)
	case rec.State == idempotency.Abandoned && s.bug == takesOnceOver,
		rec.State == idempotency.InProgress && s.bug == ignoresInProgress && s.every(2):
		s.forget(ctx, key)
		return s.RedisStore.Acquire(ctx, key, c)
	case rec.State == idempotency.Acquired && s.bug == forgetsClaims:
		s.forget(ctx, key)
	case rec.State == idempotency.Acquired && s.bug == restartsAttempts:
		s.attempts.Store(c.Token, rec.Attempt)
		rec.Attempt = 1
	case rec.State == idempotency.Acquired && s.bug == skipsAttempts:
		rec.Attempt *= 2
	case rec.State == idempotency.Acquired && s.bug == dropsCommits:
		rec.Once = asked.Once
	case rec.State == idempotency.Acquired && s.bug == marksClaims && c.Attempt == 0:
		c.Attempt, c.Once = rec.Attempt, true
		return s.RedisStore.Acquire(ctx, key, c)
	case rec.State == idempotency.Acquired && s.bug == abandonsClaims && rec.Attempt > 1:
		return idempotency.Record{State: idempotency.Abandoned}, nil
	case rec.State == idempotency.Completed && s.bug == forgetsAtTimes && s.every(4):
		return idempotency.Record{State: idempotency.InProgress, Remaining: time.Minute}, nil
	case s.bug == readsLate && s.isLate(key, rec.State):
		return idempotency.Record{State: idempotency.InProgress, Remaining: time.Minute}, nil
	case rec.State == idempotency.Completed && s.bug == ignoresFingerprints:
		rec.Fingerprint = fingerprint
	case rec.State == idempotency.Completed:
		rec.Value = s.spoil(key, rec.Value)
	}
	return rec, err
}

// attempt returns the attempt that a renewal is for, whatever it says.
func (s *brokenStore) attempt(c idempotency.Claim) int {
	attempt, ok := s.attempts.Load(c.Token)
	if !ok || c.Attempt == 0 {
		return c.Attempt
	}
	return attempt.(int)
}

// renewFreed claims the key for a renewal, and then renews that claim.
func (s *brokenStore) renewFreed(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	asked := c.Attempt
	c.Attempt = 0
	rec, err := s.RedisStore.Acquire(ctx, key, c)
	if err != nil || rec.State != idempotency.Acquired {
		return idempotency.Record{State: idempotency.Lost}, err
	}
	c.Attempt = rec.Attempt
	rec, err = s.RedisStore.Acquire(ctx, key, c)
	rec.Attempt = asked
	return rec, err
}

// takeBack gives the key to whoever has had it.
func (s *brokenStore) takeBack(ctx context.Context, key string, c idempotency.Claim, rec idempotency.Record) (idempotency.Record, error) {
	_, owner := s.owners.Load(c.Token)
	if owner && rec.State != idempotency.Acquired {
		s.forget(ctx, key)
		return s.RedisStore.Acquire(ctx, key, c)
	}
	if rec.State == idempotency.Acquired {
		s.owners.Store(c.Token, true)
	}
	return rec, nil
}

func (s *brokenStore) isLate(key string, state idempotency.State) bool {
	const while = 300 * time.Millisecond
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.late[key]; !ok && state == idempotency.InProgress {
		s.late[key] = time.Now().Add(while)
	}
	return state == idempotency.Completed && time.Now().Before(s.late[key])
}

func (s *brokenStore) spoil(key string, value []byte) []byte {
	switch s.bug {
	case spoilsValues:
		value = slices.Clone(value)
		value[len(value)-2] ^= 1
	case truncatesValues:
		value = value[:len(value)-1]
	case answersForOthers:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.values[key] = value
		for _, other := range s.values {
			return other
		}
	}
	return value
}

func (s *brokenStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if s.bug == forgetsRecords {
		return s.Release(ctx, key, token, time.Minute)
	}
	if s.bug == losesLeases && s.every(2) {
		return idempotency.ErrLeaseLost
	}
	switch s.bug {
	case endsTTLsEarly:
		r.TTL /= 3
	case endsTTLsLate:
		r.TTL *= 3
	}
	const small = 80 // bytes of a record, sealed or not, that holds no answer
	if s.bug == refusesAll || s.bug == refusesAnswers && len(r.Value) > small {
		return errors.New("refused")
	}
	err := s.RedisStore.Complete(ctx, key, token, r)
	switch {
	case errors.Is(err, idempotency.ErrLeaseLost) &&
		(s.bug == completesAnything || s.bug == overwritesAnswers && s.stateOf(ctx, key) == 'D'):
		s.forget(ctx, key)
		return s.RedisStore.Complete(ctx, key, token, r)
	case s.bug == hidesFailures:
		return nil
	}
	return err
}

// stateOf returns the letter of the state of a cell, or 0.
func (s *brokenStore) stateOf(ctx context.Context, key string) byte {
	cell, err := s.client.Get(ctx, "idem:"+key).Bytes()
	if err != nil || len(cell) < 2 {
		return 0
	}
	return cell[1]
}

func (s *brokenStore) Release(ctx context.Context, key, token string, keep time.Duration) error {
	switch s.bug {
	case losesReleases:
		return nil
	case losesMarkers:
		keep = time.Millisecond
	}
	err := s.RedisStore.Release(ctx, key, token, keep)
	if err == nil && s.bug == shortensLaterOnes && s.stateOf(ctx, key) == 'R' {
		s.client.PExpire(ctx, "idem:"+key, keep)
	}
	return err
}
