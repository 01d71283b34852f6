package integration

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
)

// Bugs that a server process can be started with. The checker has to find each
// of them; see TestPlantedBugs.
const (
	// In the store.
	completesAnything   = "Complete does not look at the token"
	takesOnceOver       = "a dead at-most-once claim is taken over"
	ignoresInProgress   = "every other duplicate is let in"
	forgetsClaims       = "claims are not written"
	forgetsRecords      = "answers are not written, and the key is freed"
	forgetsAtTimes      = "every fourth stored answer is taken for a running one"
	answersForOthers    = "the stored answer of another key is returned"
	spoilsValues        = "a byte of a stored answer is changed"
	truncatesValues     = "a stored answer is cut off"
	ignoresFingerprints = "fingerprints are not compared"
	acquiresWhenDown    = "an error counts as a claim"
	hidesFailures       = "an error of Complete is not told"
	dropsCommits        = "Commit does not mark the claim"
	endsLeasesEarly     = "leases are a quarter as long"
	neverEndsLeases     = "leases do not end"
	losesReleases       = "keys are not freed"
	restartsAttempts    = "every attempt is the first"

	// In the middleware.
	releasesAfterPanic = "a panic frees the key"
	releasesAnswers    = "final answers free the key"
	sendsUnstored      = "answers are sent, and not stored"
	givesUp            = "a failed Complete is not tried again"
	keepsFailures      = "what is not final is stored"
	marksNoReplays     = "replays are not marked"
)

// plant returns the store, broken as bug says.
func plant(bug string, client *redis.Client, store *idempotency.RedisStore) idempotency.Store {
	if bug == "" {
		return store
	}
	return &brokenStore{RedisStore: store, bug: bug, client: client}
}

// A brokenStore is a RedisStore with a bug. Watch is that of the RedisStore.
type brokenStore struct {
	*idempotency.RedisStore
	bug    string
	client *redis.Client
	calls  atomic.Int64

	mu     sync.Mutex // guards what follows
	values map[string][]byte
}

func (s *brokenStore) forget(ctx context.Context, key string) { s.client.Del(ctx, "idem:"+key) }

// every is true for every nth call.
func (s *brokenStore) every(n int64) bool { return s.calls.Add(1)%n == 0 }

func (s *brokenStore) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	fingerprint := c.Fingerprint
	switch s.bug {
	case dropsCommits:
		c.Once = false
	case endsLeasesEarly:
		c.Lease /= 4
	case neverEndsLeases:
		c.Lease = c.TTL
	case ignoresFingerprints:
		c.Fingerprint = nil
	}
	rec, err := s.RedisStore.Acquire(ctx, key, c)
	switch {
	case err != nil && s.bug == acquiresWhenDown:
		return idempotency.Record{State: idempotency.Acquired, Attempt: 1}, nil
	case err != nil:
		return rec, err
	case rec.State == idempotency.Abandoned && s.bug == takesOnceOver,
		rec.State == idempotency.InProgress && s.bug == ignoresInProgress && s.every(2):
		s.forget(ctx, key)
		return s.RedisStore.Acquire(ctx, key, c)
	case rec.State == idempotency.Acquired && s.bug == forgetsClaims:
		s.forget(ctx, key)
	case rec.State == idempotency.Acquired && s.bug == restartsAttempts:
		rec.Attempt = 1
	case rec.State == idempotency.Completed && s.bug == forgetsAtTimes && s.every(4):
		return idempotency.Record{State: idempotency.InProgress, Remaining: time.Minute}, nil
	case rec.State == idempotency.Completed && s.bug == ignoresFingerprints:
		rec.Fingerprint = fingerprint
	case rec.State == idempotency.Completed:
		rec.Value = s.spoil(key, rec.Value)
	}
	return rec, err
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
		if s.values == nil {
			s.values = make(map[string][]byte)
		}
		s.values[key] = value
		for _, other := range s.values {
			return other
		}
	}
	return value
}

func (s *brokenStore) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	if s.bug == forgetsRecords {
		return s.Release(ctx, key, token)
	}
	err := s.RedisStore.Complete(ctx, key, token, r)
	switch {
	case errors.Is(err, idempotency.ErrLeaseLost) && s.bug == completesAnything:
		s.forget(ctx, key)
		return s.RedisStore.Complete(ctx, key, token, r)
	case s.bug == hidesFailures:
		return nil
	}
	return err
}

func (s *brokenStore) Release(ctx context.Context, key, token string) error {
	if s.bug == losesReleases {
		return nil
	}
	return s.RedisStore.Release(ctx, key, token)
}

// plantAbove returns what the middleware asks, broken as bug says: a bug in the
// middleware is one that the journal sees.
func plantAbove(bug string, j *journal) idempotency.Store {
	return &brokenCaller{journal: j, bug: bug}
}

type brokenCaller struct {
	*journal
	bug   string
	fails sync.Map // tokens
}

func (s *brokenCaller) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	switch s.bug {
	case sendsUnstored:
		return nil
	case releasesAnswers:
		return s.journal.Release(ctx, key, token)
	}
	if s.bug == givesUp && s.failed(token) {
		return errors.New("as before")
	}
	err := s.journal.Complete(ctx, key, token, r)
	if err != nil {
		s.fails.Store(token, true)
	}
	return err
}

func (s *brokenCaller) failed(token string) bool {
	_, failed := s.fails.Load(token)
	return failed
}

func (s *brokenCaller) Release(ctx context.Context, key, token string) error {
	if s.bug == keepsFailures {
		return s.journal.Complete(ctx, key, token, idempotency.Result{TTL: time.Hour})
	}
	return s.journal.Release(ctx, key, token)
}

// releaseAfterPanic is to be deferred in a handler.
func releaseAfterPanic(p *replica, v *visit) {
	if p.config.Bug != releasesAfterPanic {
		return
	}
	if crash := recover(); crash != nil {
		_ = p.store.Release(context.Background(), v.storeKey, v.token)
		panic(crash)
	}
}

// withoutMarks takes the mark of replays away.
func withoutMarks(bug string, w http.ResponseWriter) http.ResponseWriter {
	if bug != marksNoReplays {
		return w
	}
	return &unmarked{w}
}

type unmarked struct{ http.ResponseWriter }

func (w *unmarked) WriteHeader(status int) {
	w.Header().Del("Idempotent-Replayed")
	w.ResponseWriter.WriteHeader(status)
}

func (w *unmarked) Unwrap() http.ResponseWriter { return w.ResponseWriter }
