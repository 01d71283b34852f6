package idempotency

import (
	"context"
	"time"
)

// A redisQuestion is a claim of one key that is on its way to Redis. Claims of
// the same key that begin meanwhile wait until it is done. One of them then
// leads the next question, and the others take its answer, so that a hundred
// duplicates cost a few commands.
//
// An answer is shared only with claims that began before its question was sent.
// So it is never older than the call: after Complete has returned, no claim is
// told that the key is in progress. The answers are not kept. A record may
// expire, and a record that Redis has lost must be found missing.
type redisQuestion struct {
	done   chan struct{} // made by the first claim that waits
	answer redisAnswer   // the zero answer when Redis failed
}

// A claim waits for the questions of others for questionPatience, and for
// maxQuestions of them. Then it asks Redis for itself, so that one connection
// that hangs does not hold up all duplicates.
const (
	questionPatience = 50 * time.Millisecond
	maxQuestions     = 4
)

// share leads a question, or takes the answer to one that was sent after the
// call began. Only one claim can own a key, so an answer that gives the key to
// its leader is not shared. Answers are shared only where Redis would say the
// same to this call, and change nothing.
func (s *RedisStore) share(ctx context.Context, name string, c Claim) (Record, error) {
	var patience *time.Timer
	for n := range maxQuestions {
		// A claim that finds no question leads one. So only one question is on
		// its way, apart from those of claims that waited in vain.
		s.mu.Lock()
		q := s.questions[name]
		if q == nil {
			q = new(redisQuestion)
			s.questions[name] = q
			s.mu.Unlock()
			return s.lead(ctx, name, c, q)
		}
		if q.done == nil {
			q.done = make(chan struct{})
		}
		s.mu.Unlock()
		if patience == nil {
			patience = time.NewTimer(questionPatience)
			defer patience.Stop()
		}
		if !q.wait(ctx, patience) {
			break
		}
		if n == 0 {
			continue // Redis may have answered it before the call began
		}
		if rec, ok := q.answer.sharedWith(c); ok {
			return rec, nil
		}
	}
	// The claim asks for itself, and does not lead: the question that it waited
	// for may still be on its way.
	answer, err := s.claim(ctx, name, c, s.isWatched(name))
	return answer.Record, err
}

// wait waits until the question is done. It is false when that took too long.
func (q *redisQuestion) wait(ctx context.Context, patience *time.Timer) bool {
	select {
	case <-q.done:
		return true
	case <-patience.C:
	case <-ctx.Done():
	}
	return false
}

// lead claims, and gives the answer to the claims that wait for q. It ends the
// question even if the client of Redis panics: the claims that wait would
// otherwise wait in vain.
func (s *RedisStore) lead(ctx context.Context, name string, c Claim, q *redisQuestion) (Record, error) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.questions, name)
		if q.done != nil {
			close(q.done)
		}
	}()
	answer, err := s.claim(ctx, name, c, s.isWatched(name))
	q.answer = answer
	return answer.Record, err
}

// sharedWith returns what the answer to another claim means for c. It is false
// when c has to ask Redis for itself: the key is free or c's own, or Redis has
// not marked the cell for a caller that waits.
func (a *redisAnswer) sharedWith(c Claim) (Record, bool) {
	switch {
	case a.State == 0 || a.cell.state == 0: // failed, or claimed by the other
		return Record{}, false
	case mismatch(a.cell.fingerprint, c.Fingerprint):
		return Record{State: Mismatch}, true
	case a.cell.state == redisCompleted:
		return completedRecord(c, a.cell.fingerprint, a.cell.value, nil), true
	case a.cell.token == c.Token: // c was sent twice
		return Record{}, false
	case a.State == InProgress || a.State == Abandoned:
		return a.Record, true
	}
	return Record{}, false
}
