package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/storetest"
	"github.com/stretchr/testify/require"
)

// A fleet is the stores of several processes on one table. Its calls go to each
// store in turn, so the contract has to hold across processes.
type fleet struct {
	stores []*Store
	calls  atomic.Int64
}

func (f *fleet) next() *Store { return f.stores[int(f.calls.Add(1))%len(f.stores)] }

// MaxValue is what fits into an item of 400 KB beside the longest key, token and
// fingerprint that storetest uses.
func (f *fleet) MaxValue() int { return 390 << 10 }

func (f *fleet) Acquire(ctx context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	return f.next().Acquire(ctx, key, c)
}

func (f *fleet) Complete(ctx context.Context, key, token string, r idempotency.Result) error {
	return f.next().Complete(ctx, key, token, r)
}

func (f *fleet) Release(ctx context.Context, key, token string, keep time.Duration) error {
	return f.next().Release(ctx, key, token, keep)
}

func (f *fleet) Inspect(ctx context.Context, key string) (idempotency.Cell, error) {
	return f.next().Inspect(ctx, key)
}

func (f *fleet) Forget(ctx context.Context, key string, seen idempotency.Cell) error {
	return f.next().Forget(ctx, key, seen)
}

// The clocks of the stores are equal here, as they are on one machine, so that
// the leases are as exact as storetest wants them. In TestSkew they are not.
func TestStore(t *testing.T) {
	run := func(t *testing.T, url string) {
		t.Helper()
		table, oneMachine := newTable(t), &Options{MaxClockSkew: time.Millisecond}
		one, two := NewStore(connect(url), table, oneMachine), NewStore(connect(url), table, oneMachine)
		storetest.Run(t, func(*testing.T) idempotency.Store { return &fleet{stores: []*Store{one, two}} })
	}
	t.Run("a refusal without the item", func(t *testing.T) { run(t, endpoint(t)) })
	t.Run("a refusal with the item", func(t *testing.T) {
		p := newLikeAWS(t)
		run(t, p.URL)
		require.Positive(t, p.sent.Load())
	})
}

func claim(token string, lease time.Duration) idempotency.Claim {
	return idempotency.Claim{Token: token, Lease: lease, TTL: time.Hour, Fingerprint: []byte("fp")}
}

func acquire(t *testing.T, s *Store, c idempotency.Claim) idempotency.Record {
	t.Helper()
	rec, err := s.Acquire(t.Context(), "key", c)
	require.NoError(t, err)
	return rec
}

// manual returns a store whose clock is what the pointer says.
func manual(t *testing.T, table string, opts *Options) (*Store, *time.Time) {
	t.Helper()
	s, now := NewStore(connect(endpoint(t)), table, opts), time.Now()
	s.clock = func() time.Time { return now }
	return s, &now
}

// Two clocks that are as far apart as MaxClockSkew allows end no lease and no
// TTL early.
func TestSkew(t *testing.T) {
	const skew, lease = 3 * time.Second, 10 * time.Second
	table := newTable(t)
	slow, slowNow := manual(t, table, &Options{MaxClockSkew: skew})
	fast, fastNow := manual(t, table, &Options{MaxClockSkew: skew})
	*fastNow = slowNow.Add(skew)
	pass := func(d time.Duration) { *slowNow, *fastNow = slowNow.Add(d), fastNow.Add(d) }

	require.Equal(t, idempotency.Acquired, acquire(t, slow, claim("slow", lease)).State)
	pass(lease - time.Millisecond)
	rec := acquire(t, fast, claim("fast", lease))
	require.Equal(t, idempotency.InProgress, rec.State, "the lease is running on the clock of its owner")
	require.InDelta(t, time.Millisecond, rec.Remaining, float64(time.Microsecond))
	pass(2 * time.Millisecond)
	require.Equal(t, idempotency.Acquired, acquire(t, fast, claim("fast", lease)).State)

	// In the other direction the taker waits for longer than it would have to.
	pass(lease + 2*skew - time.Millisecond)
	require.Equal(t, idempotency.InProgress, acquire(t, slow, claim("slow", lease)).State)
	pass(2 * time.Millisecond)
	require.Equal(t, 3, acquire(t, slow, claim("slow", lease)).Attempt)

	result := idempotency.Result{Fingerprint: []byte("fp"), Value: []byte("done"), TTL: lease}
	require.NoError(t, slow.Complete(t.Context(), "key", "slow", result))
	pass(lease - time.Millisecond)
	require.Equal(t, idempotency.Completed, acquire(t, fast, claim("fast", lease)).State)
	pass(2 * time.Millisecond)
	require.Equal(t, 1, acquire(t, fast, claim("fast", lease)).Attempt, "the cell has expired")
}

// NewClient changes only what it must of how cfg connects.
func TestNewClientKeepsTheHTTPClient(t *testing.T) {
	proxied := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) { t.MaxConnsPerHost = 7 })
	used, ok := NewClient(aws.Config{HTTPClient: proxied}).Options().HTTPClient.(*awshttp.BuildableClient)
	require.True(t, ok)
	require.Equal(t, 7, used.GetTransport().MaxConnsPerHost)
	require.Equal(t, 100, used.GetTransport().MaxIdleConnsPerHost)

	own := new(http.Client)
	require.Same(t, own, NewClient(aws.Config{HTTPClient: own}).Options().HTTPClient)
}

func TestOptions(t *testing.T) {
	require.Equal(t, time.Second, NewStore(nil, "t", nil).skew)
	require.Equal(t, time.Second, NewStore(nil, "t", &Options{}).skew)
	require.PanicsWithValue(t, "dynamodb: Options.MaxClockSkew is negative; leave it zero for 1s", func() {
		NewStore(nil, "t", &Options{MaxClockSkew: -1})
	})
}

// A first execution takes two calls, and a replay one. dynalite has consistent
// reads only, so the test looks at what the store asks for.
func TestCalls(t *testing.T) {
	var calls recorder
	s := NewStore(connect(newLikeAWS(t).URL, recorded(&calls)), newTable(t), nil)
	result := idempotency.Result{Fingerprint: []byte("fp"), Value: []byte("done"), TTL: time.Hour}
	renewal := claim("A", time.Minute)
	renewal.Attempt = 1
	for _, step := range []struct {
		name string
		call func()
		want []string
	}{
		{"claim", func() { acquire(t, s, claim("A", time.Minute)) }, []string{"PutItem"}},
		{"in progress", func() { acquire(t, s, claim("B", time.Minute)) }, []string{"PutItem"}},
		{"renewal", func() { acquire(t, s, renewal) }, []string{"consistent GetItem", "PutItem"}},
		{"complete", func() { require.NoError(t, s.Complete(t.Context(), "key", "A", result)) }, []string{"PutItem"}},
		{"replay", func() { acquire(t, s, claim("B", time.Minute)) }, []string{"PutItem"}},
		{"release", func() { require.NoError(t, s.Release(t.Context(), "free", "A", time.Minute)) }, []string{"consistent GetItem", "PutItem"}},
	} {
		step.call()
		require.Equal(t, step.want, calls.take(), step.name)
	}
}

// The SDK sends a call again whose reply was lost. What that does must be what
// the first one did.
func TestLostReply(t *testing.T) {
	for name, url := range map[string]string{"with the item": newLikeAWS(t).URL, "without the item": endpoint(t)} {
		t.Run(name, func(t *testing.T) {
			var calls recorder
			s, now := manual(t, newTable(t), nil)
			s.client = connect(url, recorded(&calls))

			calls.loseReply("PutItem")
			rec := acquire(t, s, claim("A", time.Minute))
			require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 1}, rec, "a claim")

			*now = now.Add(time.Minute + 2*time.Second)
			calls.loseReply("PutItem") // of the write that is refused
			rec = acquire(t, s, claim("B", time.Minute))
			require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 2}, rec, "a take-over")
			*now = now.Add(time.Minute + 2*time.Second)
			calls.loseReplyAfter("PutItem", 1) // of the write that takes the key over
			rec = acquire(t, s, claim("C", time.Minute))
			require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 3}, rec, "a take-over")

			renewal := claim("C", time.Minute)
			renewal.Attempt, renewal.Once = 3, true
			calls.loseReply("PutItem")
			rec = acquire(t, s, renewal)
			require.Equal(t, idempotency.Record{State: idempotency.Acquired, Attempt: 3, Once: true}, rec, "a mark")

			calls.loseReply("PutItem")
			require.NoError(t, s.Release(t.Context(), "key", "C", time.Hour))
			require.Equal(t, idempotency.Lost, acquire(t, s, claim("C", time.Minute)).State)

			require.Equal(t, 4, acquire(t, s, claim("D", time.Minute)).Attempt)
			calls.loseReply("PutItem")
			result := idempotency.Result{Fingerprint: []byte("fp"), Value: []byte("done"), TTL: time.Hour}
			require.NoError(t, s.Complete(t.Context(), "key", "D", result))
			require.Equal(t, []byte("done"), acquire(t, s, claim("E", time.Minute)).Value)
			require.Equal(t, 6, calls.lost)
		})
	}
}

// DynamoDB must not delete an item before its end has come on all clocks.
func TestItemsAreDeleted(t *testing.T) {
	s, now := manual(t, newTable(t), nil)
	acquire(t, s, idempotency.Claim{Token: "A", Lease: time.Minute, TTL: time.Hour})
	c, err := s.load(t.Context(), "key")
	require.NoError(t, err)
	ttl, ok := s.encode("key", c)[attrTTL].(*types.AttributeValueMemberN)
	require.True(t, ok)
	seconds, err := strconv.ParseInt(ttl.Value, 10, 64)
	require.NoError(t, err)
	require.WithinDuration(t, now.Add(time.Hour+time.Second+deletionDelay), time.Unix(seconds, 0), time.Second)
}

// An item that no Store has written is an error.
func TestForeignItem(t *testing.T) {
	for name, change := range map[string]func(item){
		"no state":      func(i item) { delete(i, attrState) },
		"another state": func(i item) { i[attrState] = number(9) },
		"no token":      func(i item) { delete(i, attrToken) },
		"a fraction":    func(i item) { i[attrAttempt] = &types.AttributeValueMemberN{Value: "1.5"} },
	} {
		i := (&Store{}).encode("key", cell{state: claimed, token: "A", rev: "r"})
		_, err := decode(i)
		require.NoError(t, err)
		change(i)
		_, err = decode(i)
		require.ErrorContains(t, err, "dynamodb: ", name)
	}
}

// A DynamoDB that hangs holds a call no longer than its context.
func TestDeadline(t *testing.T) {
	hanging := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hanging }))
	defer server.Close()
	defer close(hanging)
	s := NewStore(connect(server.URL), "t", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Acquire(ctx, "key", claim("A", time.Minute))
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// DynamoDB refuses an item over 400 KB. The handler has run, so its retries
// learn that, and it does not run again.
func TestResponseThatIsTooLarge(t *testing.T) {
	s := NewStore(connect(endpoint(t)), newTable(t), nil)
	require.Equal(t, 1, acquire(t, s, claim("A", time.Minute)).Attempt)
	err := s.Complete(t.Context(), "key", "A", idempotency.Result{Value: make([]byte, 400<<10), TTL: time.Hour})
	require.ErrorContains(t, err, "size")
	require.NotErrorIs(t, err, idempotency.ErrLeaseLost)
	require.Equal(t, idempotency.InProgress, acquire(t, s, claim("B", time.Minute)).State)

	for name, opts := range map[string]*idempotency.Options{
		"refused-by-DynamoDB":       {Lease: 10 * time.Second}, // pauses of the background are a part of it
		"refused-by-the-middleware": {MaxResponseBytes: maxResponse},
	} {
		t.Run(name, func(t *testing.T) {
			runs, background := 0, new(idempotency.Background)
			opts.Background = background
			h := idempotency.Middleware(s, opts)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				runs++
				_, _ = w.Write(make([]byte, 500<<10))
			}))
			post := func() *httptest.ResponseRecorder {
				r := httptest.NewRequest(http.MethodPost, "/"+name, nil)
				r.Header.Set("Idempotency-Key", "order-17")
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				return w
			}
			require.Equal(t, 500<<10, post().Body.Len(), "the client gets the response all the same")
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			require.NoError(t, background.Wait(ctx))
			require.Contains(t, post().Body.String(), "response_not_stored")
			require.Equal(t, 1, runs)
		})
	}
}

// The largest response that maxResponse lets through can be stored, with as many
// headers as the middleware keeps.
func TestLargestResponse(t *testing.T) {
	h := newHandler(NewStore(connect(endpoint(t)), newTable(t), nil), nil, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Large", strings.Repeat("x", 60<<10))
		_, _ = w.Write(make([]byte, maxResponse))
	}))
	for _, replayed := range []string{"", "true"} {
		r := httptest.NewRequest(http.MethodPost, "/charge", nil)
		r.Header.Set("Idempotency-Key", "order-17")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		require.Equal(t, replayed, w.Header().Get("Idempotent-Replayed"))
		require.Equal(t, maxResponse, w.Body.Len())
	}
}
