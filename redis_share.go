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

// A claim waits for a question of another claim for questionPatience. Then it
// gives that one up and leads the next, so that one connection that hangs does
// not hold up all duplicates. After maxQuestions it asks Redis for itself.
const (
	questionPatience = 50 * time.Millisecond
	maxQuestions     = 4
)

// share leads a question, or takes the answer to one that was sent after the
// call began. Only one claim can own a key, so an answer that gives the key to
// its leader is not shared. Answers are shared only where Redis would say the
// same to this call, and change nothing.
func (s *RedisStore) share(ctx context.Context, name string, c Claim) (Record, error) {
	for n := range maxQuestions {
		// A claim that finds no question leads one. So only one question is on
		// its way, apart from those that were given up.
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
		if !q.wait(ctx) {
			if err := ctx.Err(); err != nil {
				return Record{}, err
			}
			s.removeQuestion(name, q)
			continue
		}
		if n == 0 {
			continue // Redis may have answered it before the call began
		}
		if rec, ok := q.answer.sharedWith(c); ok {
			return rec, nil
		}
	}
	answer, err := s.claim(ctx, name, c, s.isWatched(name))
	return answer.Record, err
}

// wait waits until the question is done. It is false when that took too long.
func (q *redisQuestion) wait(ctx context.Context) bool {
	patience := time.NewTimer(questionPatience)
	defer patience.Stop()
	select {
	case <-q.done:
		return true
	case <-patience.C:
	case <-ctx.Done():
	}
	return false
}

// removeQuestion makes room for the next question. A question that was given up
// may have been followed by another, which stays.
func (s *RedisStore) removeQuestion(name string, q *redisQuestion) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.questions[name] == q {
		delete(s.questions, name)
	}
}

// lead claims, and gives the answer to the claims that wait for q. It ends the
// question even if the client of Redis panics: the claims that wait would
// otherwise wait in vain.
func (s *RedisStore) lead(ctx context.Context, name string, c Claim, q *redisQuestion) (Record, error) {
	defer func() {
		s.removeQuestion(name, q)
		if q.done != nil { // no claim finds it any more
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
