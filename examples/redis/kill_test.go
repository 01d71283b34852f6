package main

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A fleet is replicas in processes of their own, behind a round-robin client.
type fleet struct {
	t         *testing.T
	redisAddr string
	ledger    *redis.Client
	cmds      []*exec.Cmd

	mu   sync.Mutex // guards what follows
	urls []string
	next int
}

func startFleet(t *testing.T, replicas int) *fleet {
	addr := startRedis(t)
	f := &fleet{
		t: t, redisAddr: addr, ledger: testClient(t, addr),
		cmds: make([]*exec.Cmd, replicas), urls: make([]string, replicas),
	}
	for i := range replicas {
		f.start(i)
	}
	return f
}

// start starts a replica, anew if it was killed.
func (f *fleet) start(i int) {
	cmd := program(f.t, f.redisAddr, "-listen", "127.0.0.1:0", "-lease", "1s", "-work", "400ms")
	url := start(f.t, cmd, 1)[0]
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cmds[i], f.urls[i] = cmd, url
}

// kill is kill -9.
func (f *fleet) kill(i int) {
	require.NoError(f.t, f.cmds[i].Process.Kill())
	require.Error(f.t, f.cmds[i].Wait())
}

func (f *fleet) roundRobin() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	return f.urls[f.next%len(f.urls)]
}

// send repeats a request, each time at the next replica, until it is answered.
func (f *fleet) send(ctx context.Context, key string) (answer, error) {
	for {
		a, err := post(ctx, f.roundRobin(), key, "amount=100")
		switch {
		case ctx.Err() != nil:
			return answer{}, fmt.Errorf("key %s is not settled: %w", key, ctx.Err())
		case err != nil: // a replica that is dead, or died
		case a.status == http.StatusConflict && strings.Contains(a.body, "in_progress"):
		case a.status == http.StatusServiceUnavailable:
		default:
			return a, nil
		}
		// Without a pause, the retries would keep the machine from recovering.
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// An outcome is all answers that the clients of one key got.
type outcome struct {
	key     string
	answers []answer
	err     error
}

// sendAll sends each key several times at once.
func (f *fleet) sendAll(ctx context.Context, keys []string) <-chan outcome {
	const times = 4
	outcomes := make(chan outcome, len(keys))
	for _, key := range keys {
		go func() {
			o := outcome{key: key, answers: make([]answer, times)}
			errs := make([]error, times)
			var done sync.WaitGroup
			for i := range times {
				done.Go(func() { o.answers[i], errs[i] = f.send(ctx, key) })
			}
			done.Wait()
			for _, err := range errs {
				if err != nil {
					o.err = err
				}
			}
			outcomes <- o
		}()
	}
	return outcomes
}

// requireEqualAnswers checks what sendAll promised, and returns the answers.
func (f *fleet) requireEqualAnswers(outcomes <-chan outcome, keys int) map[string]string {
	f.t.Helper()
	bodies := make(map[string]string)
	for range keys {
		o := <-outcomes
		require.NoError(f.t, o.err)
		executed := 0
		for _, a := range o.answers {
			require.Equal(f.t, http.StatusCreated, a.status, a.body)
			require.Equal(f.t, o.answers[0].body, a.body, "key %s", o.key)
			if !a.replayed {
				executed++
			}
		}
		// None, if the one that ran the handler was killed when it had stored
		// the answer and not sent it.
		require.LessOrEqual(f.t, executed, 1, "key %s", o.key)
		bodies[o.key] = o.answers[0].body
	}
	return bodies
}

// charges returns the attempts that had an effect, by key and in order.
func (f *fleet) charges() map[string][]int {
	f.t.Helper()
	entries, err := f.ledger.LRange(f.t.Context(), ledger, 0, -1).Result()
	require.NoError(f.t, err)
	attempts := make(map[string][]int)
	for _, entry := range entries {
		var key string
		var attempt int
		_, err := fmt.Sscanf(entry, "%s attempt %d", &key, &attempt)
		require.NoError(f.t, err, entry)
		attempts[key] = append(attempts[key], attempt)
	}
	return attempts
}

// awaitCharge waits until a handler that runs under key had its effect.
func (f *fleet) awaitCharge(key string) {
	f.t.Helper()
	require.Eventually(f.t, func() bool { return len(f.charges()[key]) > 0 }, patience, time.Millisecond, key)
}

func keys(name string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprint(name, "-", i)
	}
	return all
}

// TestKill kills each of three replicas in turn, in the middle of handlers,
// while a client sends every key several times and to all of them.
func TestKill(t *testing.T) {
	const replicas, perPhase = 3, 12
	f := startFleet(t, replicas)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()

	calm := keys("calm", perPhase)
	bodies := f.requireEqualAnswers(f.sendAll(ctx, calm), perPhase)
	for _, key := range calm {
		require.Equal(t, []int{1}, f.charges()[key], "nobody died")
	}
	sent, takeOvers := slices.Clone(calm), 0
	for i := range replicas {
		phase := keys(fmt.Sprint("kill-", i), perPhase)
		// The handler of this request runs in the replica that is killed.
		victim := fmt.Sprint("victim-", i)
		heard := make(chan error, 1)
		f.mu.Lock()
		url := f.urls[i]
		f.mu.Unlock()
		go func() { _, err := post(ctx, url, victim, "amount=100"); heard <- err }()
		outcomes := f.sendAll(ctx, phase)
		f.awaitCharge(victim)
		f.kill(i)
		err := <-heard
		f.start(i)

		for key, body := range f.requireEqualAnswers(outcomes, perPhase) {
			bodies[key] = body
		}
		for key, body := range f.requireEqualAnswers(f.sendAll(ctx, []string{victim}), 1) {
			bodies[key] = body
		}
		if err != nil && slices.Equal(f.charges()[victim], []int{1, 2}) {
			takeOvers++
		}
		sent = append(append(sent, phase...), victim)
	}

	total := f.ledger.LLen(ctx, ledger).Val()
	again := f.requireEqualAnswers(f.sendAll(ctx, sent), len(sent))
	require.Equal(t, bodies, again, "the answers stay")
	require.Equal(t, total, f.ledger.LLen(ctx, ledger).Val(), "and nothing is executed for them")
	require.Positive(t, takeOvers, "of the victims, whose handlers were killed after their effect")
	f.requireNoDoubles(sent)
}

// requireNoDoubles checks that no attempt had two effects: a further effect is
// that of a take-over. The first may be that of attempt 2, when a replica was
// killed between its claim and its effect.
func (f *fleet) requireNoDoubles(sent []string) {
	f.t.Helper()
	charges := f.charges()
	require.Len(f.t, charges, len(sent))
	for _, key := range sent {
		attempts := charges[key]
		slices.Sort(attempts)
		require.NotEmpty(f.t, attempts, key)
		require.Len(f.t, slices.Compact(slices.Clone(attempts)), len(attempts), "key %s: attempts %v", key, attempts)
	}
}
