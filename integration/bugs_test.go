package integration

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
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
	losesLeases         = "every other Complete is told that the lease is lost"
	takesBack           = "a stale owner's renewal is accepted"
	overwritesAnswers   = "Complete overwrites the answer of another run"
	readsLate           = "what was running is taken to be running for a while"
	marksClaims         = "a claim marks"
	renewsFreed         = "a renewal that finds another owner, or none, claims the key"
	skipsAttempts       = "every claim counts twice"
	losesMarkers        = "a released key leaves nothing behind"
	shortensLaterOnes   = "the marker of a later attempt is kept for as long as that of a first one"
	refusesAll          = "answers are refused, and what says so in their place"
	endsTTLsEarly       = "answers are kept for a third of the TTL"
	endsTTLsLate        = "records are kept for three times the TTL"
	abandonsClaims      = "what may be taken over is told to be abandoned"

	// In the middleware.
	releasesAfterPanic = "a panic frees the key"
	releasesAnswers    = "final answers free the key"
	sendsUnstored      = "answers are sent, and not stored"
	dropsAnswers       = "every other answer is taken for that of a stale owner"
	givesUp            = "a failed Complete is not tried again"
	givesUpAtLease     = "Complete is not tried beyond the end of the lease"
	leavesMarks        = "a failed Release is not tried again"
	skipsMarks         = "runs start without a mark"
	shortensMarkers    = "every marker is kept for a lease"
	lengthensMarkers   = "every marker is kept for the TTL"
	shrinksAnswers     = "a small record is stored as soon as an answer is not"
	opensBeside        = "a key that is in progress counts as a store that is down"
	opensAnyhow        = "a claim counts as a store that is down"
	freesExposed       = "the key of a run without a claim is freed"
	keepsFailures      = "what is not final is stored"
	marksNoReplays     = "replays are not marked"
	comparesNoBodies   = "large bodies are not compared"

	// In what has to be one.
	commitsAlone      = "the handler commits for itself"
	losesAttachments  = "answers are stored without what is attached"
	closesConnections = "connections are closed when SIGTERM comes"

	// In what the service says about its requests.
	comparesBoundaries = "the boundaries of forms are compared"
	takesAnyEvent      = "all events have one key"
	takesAnyTenant     = "the keys of tenants are not told apart"
	hidesBreaks        = "a body that breaks off is taken for one that the handler has read in part"
	readsOn            = "the handler reads a body further than it needs it"
)

// refusesAnswers is no bug but a store that is up and takes no answers: they are
// too large for it, say.
const refusesAnswers = "answers are refused"

// plant returns the store, broken as bug says.
func plant(bug string, client *redis.Client, store *idempotency.RedisStore) idempotency.Store {
	if bug == "" {
		return store
	}
	return newBrokenStore(bug, client, store)
}

// plantAbove returns what the middleware asks, broken as bug says: a bug in the
// middleware is one that the journal sees.
func plantAbove(bug string, j *journal) idempotency.Store {
	return &brokenCaller{journal: j, bug: bug}
}

type brokenCaller struct {
	*journal
	bug   string
	fails sync.Map // tokens, and when first
	calls atomic.Int64
}

func (s *brokenCaller) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	skips := s.bug == skipsMarks && c.Once
	c.Once = c.Once && !skips
	rec, err := s.journal.Acquire(ctx, key, c)
	switch {
	case s.bug == opensBeside && rec.State == idempotency.InProgress, s.bug == opensAnyhow && rec.State == idempotency.Acquired:
		return idempotency.Record{}, errors.New("taken for an error")
	case s.bug == freesExposed && err != nil:
		time.AfterFunc(20*time.Millisecond, func() { _ = s.journal.Release(context.Background(), key, c.Token, s.replica.config.TTL) })
	}
	rec.Once = rec.Once || skips && rec.State == idempotency.Acquired
	return rec, err
}

func (s *brokenCaller) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	switch s.bug {
	case sendsUnstored:
		return nil
	case releasesAnswers:
		return s.journal.Release(ctx, key, token, time.Minute)
	}
	if s.bug == dropsAnswers && s.calls.Add(1)%2 == 0 {
		return idempotency.ErrLeaseLost
	}
	since, failed := s.failed(token)
	switch {
	case s.bug == givesUp && failed:
		return errors.New("as before")
	case s.bug == givesUpAtLease && failed && time.Since(since) > s.replica.config.Lease:
		return errors.New("too late")
	}
	if s.bug == losesAttachments {
		ctx = context.Background()
	}
	err := s.journal.Complete(ctx, key, token, r)
	if err != nil && !failed {
		s.fails.Store(token, time.Now())
	}
	if err != nil && s.bug == shrinksAnswers {
		r.Value = r.Value[:1]
		return s.journal.Complete(ctx, key, token, r)
	}
	return err
}

func (s *brokenCaller) failed(token string) (since time.Time, failed bool) {
	at, failed := s.fails.Load(token)
	if failed {
		since = at.(time.Time)
	}
	return since, failed
}

func (s *brokenCaller) Release(ctx context.Context, key, token string, keep time.Duration) error {
	if s.bug == keepsFailures {
		return s.journal.Complete(ctx, key, token, idempotency.Result{TTL: time.Hour})
	}
	switch s.bug {
	case shortensMarkers:
		keep = s.replica.config.Lease
	case lengthensMarkers:
		keep = s.replica.config.TTL
	}
	if _, failed := s.failed(token); s.bug == leavesMarks && failed {
		return errors.New("as before")
	}
	err := s.journal.Release(ctx, key, token, keep)
	if err != nil {
		s.fails.Store(token, time.Now())
	}
	return err
}

// releaseAfterPanic is to be deferred in a handler.
func releaseAfterPanic(p *replica, v *visit) {
	if p.config.Bug != releasesAfterPanic {
		return
	}
	if crash := recover(); crash != nil {
		_ = p.store.Release(context.Background(), v.storeKey, v.token, time.Minute)
		panic(crash)
	}
}

// hideBody shows the middleware the same body in all requests under Large keys,
// and the handler the right one.
func hideBody(bug string, v *visit, r *http.Request) {
	if bug != comparesNoBodies || v.about.Kind != history.Large {
		return
	}
	v.body, _ = io.ReadAll(r.Body)
	r.Body = io.NopCloser(strings.NewReader(strings.Repeat(" ", 3*maxBufferedBody)))
	r.ContentLength = 3 * maxBufferedBody
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
