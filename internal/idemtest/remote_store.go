package idemtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

// RemoteStoreAddr is the environment variable with the address of a ServeStore.
// The table of store calls is checked on that store then.
const RemoteStoreAddr = "STORE_CALLS_AT"

// A RemoteStore is a store in another process, whose clock is the caller's. A
// caller in a bubble of testing/synctest waits for the network, so no virtual
// time passes during a call. For the same reason there is no Watch: a goroutine
// that waits for a notification would stop the time.
type RemoteStore struct {
	mu      sync.Mutex // held during a call
	conn    net.Conn
	replies *bufio.Reader
}

// A storeRequest is one call. A storeReply is its answer.
type storeRequest struct {
	Now        time.Time
	Method     string
	Key, Token string
	Claim      idempotency.Claim
	Result     idempotency.Result
	Keep       time.Duration
}

type storeReply struct {
	Record idempotency.Record
	Lost   bool   // ErrLeaseLost
	Err    string // any other error
}

// DialStore returns the store of a ServeStore.
func DialStore(t testing.TB, addr string) *RemoteStore {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	return &RemoteStore{conn: conn, replies: bufio.NewReader(conn)}
}

func (s *RemoteStore) call(q storeRequest) (idempotency.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q.Now = time.Now()
	line, err := json.Marshal(q)
	Must(err)
	_, err = s.conn.Write(append(line, '\n'))
	Must(err)
	line, err = s.replies.ReadBytes('\n')
	Must(err)
	var a storeReply
	Must(json.Unmarshal(line, &a))
	switch {
	case a.Lost:
		return a.Record, idempotency.ErrLeaseLost
	case a.Err != "":
		return a.Record, errors.New(a.Err)
	}
	return a.Record, nil
}

// Acquire implements idempotency.Store.
func (s *RemoteStore) Acquire(_ context.Context, key string, c idempotency.Claim) (idempotency.Record, error) {
	return s.call(storeRequest{Method: "Acquire", Key: key, Claim: c})
}

// Complete implements idempotency.Store.
func (s *RemoteStore) Complete(_ context.Context, key, token string, r idempotency.Result) error {
	_, err := s.call(storeRequest{Method: "Complete", Key: key, Token: token, Result: r})
	return err
}

// Release implements idempotency.Store.
func (s *RemoteStore) Release(_ context.Context, key, token string, keep time.Duration) error {
	_, err := s.call(storeRequest{Method: "Release", Key: key, Token: token, Keep: keep})
	return err
}

// ServeStore lets RemoteStores use a store whose clock is set with setNow. It
// returns the address.
func ServeStore(t testing.TB, store idempotency.Store, setNow func(time.Time)) (addr string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serveStore(conn, store, setNow)
		}
	}()
	return listener.Addr().String()
}

// serveStore answers the calls of one connection.
func serveStore(conn net.Conn, store idempotency.Store, setNow func(time.Time)) {
	defer func() { _ = conn.Close() }()
	in, out := json.NewDecoder(conn), json.NewEncoder(conn)
	for {
		var q storeRequest
		if in.Decode(&q) != nil {
			return
		}
		setNow(q.Now)
		var a storeReply
		var err error
		ctx := context.Background()
		switch q.Method {
		case "Acquire":
			a.Record, err = store.Acquire(ctx, q.Key, q.Claim)
		case "Complete":
			err = store.Complete(ctx, q.Key, q.Token, q.Result)
		case "Release":
			err = store.Release(ctx, q.Key, q.Token, q.Keep)
		}
		if a.Lost = errors.Is(err, idempotency.ErrLeaseLost); err != nil && !a.Lost {
			a.Err = err.Error()
		}
		if out.Encode(a) != nil {
			return
		}
	}
}

// CheckStoreCalls runs the tests of the table of store calls on a store. root is
// the directory of the library. The rows of requests that wait for another one
// are left out: see RemoteStore.
func CheckStoreCalls(t *testing.T, root string, store idempotency.Store, setNow func(time.Time)) {
	flows := "first execution|replay|take-over|commit|commit, panic|release|panic|renewals|" +
		"at most once|at most once, discard|at most once, panic|attached"
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-timeout=20m",
		"-run", "^TestStoreCalls$/^("+strings.ReplaceAll(flows, " ", "_")+")$", "./fuzz")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), RemoteStoreAddr+"="+ServeStore(t, store, setNow))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Equal(t, strings.Count(flows, "|")+1, strings.Count(string(out), "--- PASS: TestStoreCalls/"), string(out))
}
