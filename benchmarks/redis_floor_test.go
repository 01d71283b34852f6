package benchmarks

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/internal/idemtest"
)

// redisFloor is the least code that does the job on Redis, with the kinds of
// commands that RedisStore sends: SET NX GET PX for the claim, whose reply is the
// replay, and a script that compares the token and stores the answer. A claim is
// a C, the token and the fingerprint. A stored answer is a D, the fingerprint and
// the answer.
type redisFloor struct {
	next   http.Handler
	prefix string
	client floorClient
}

// A floorClient sends a command and returns the reply: nil for a null.
type floorClient interface {
	claim(key, value []byte) ([]byte, error)
	complete(key, token, value []byte) error
}

const (
	floorToken = 16
	floorTTL   = "86400000"

	floorScript = `
local value = redis.call('get', KEYS[1])
if value and string.sub(value, 1, 17) ~= 'C' .. ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
return 1`
)

var floorSHA = func() string {
	sum := sha1.Sum([]byte(floorScript))
	return hex.EncodeToString(sum[:])
}()

var floorValues = sync.Pool{New: func() any { return new([]byte) }}

func (f *redisFloor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := readFloorRequest(r)
	defer floorRequests.Put(q)
	buffer := floorValues.Get().(*[]byte)
	defer floorValues.Put(buffer)

	b := append(append((*buffer)[:0], f.prefix...), q.cell[:]...)
	key := b[:len(b):len(b)]
	b = append(b, 'C')
	b = binary.LittleEndian.AppendUint64(b, rand.Uint64())
	b = binary.LittleEndian.AppendUint64(b, rand.Uint64())
	b = append(b, q.sum[:]...)
	claim := b[len(key):]
	token := claim[1 : 1+floorToken]
	*buffer = b
	stored, err := f.client.claim(key, claim)
	idemtest.Must(err)
	if stored == nil {
		c := q.run(f.next, r)
		at := len(b)
		b = append(append(b, 'D'), q.sum[:]...)
		b = c.appendTo(b)
		*buffer = b
		idemtest.Must(f.client.complete(key, token, b[at:]))
		c.send(w)
		c.free()
		return
	}
	running := stored[0] == 'C'
	if stored = stored[1:]; running {
		stored = stored[floorToken:]
	}
	switch {
	case !bytes.HasPrefix(stored, q.sum[:]):
		w.WriteHeader(http.StatusUnprocessableEntity)
	case running:
		w.WriteHeader(http.StatusConflict)
	default:
		replayBytes(w, stored[len(q.sum):])
	}
}

// goRedisClient is a floorClient of go-redis.
type goRedisClient struct{ client *redis.Client }

func (c goRedisClient) claim(key, value []byte) ([]byte, error) {
	cmd := redis.NewStringCmd(context.Background(), "set", key, value, "nx", "get", "px", floorTTL)
	_ = c.client.Process(context.Background(), cmd)
	stored, err := cmd.Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	return stored, err
}

func (c goRedisClient) complete(key, token, value []byte) error {
	cmd := redis.NewCmd(context.Background(), "evalsha", floorSHA, 1, key, token, value, floorTTL)
	_ = c.client.Process(context.Background(), cmd)
	n, err := cmd.Int()
	if err == nil && n != 1 {
		err = errors.New("lease lost")
	}
	return err
}

// rawCommands makes a floorClient of a function that takes a command in the form
// that goes over the wire.
type rawCommands struct{ rawExchange }

type rawExchange interface {
	exchange(build func(b []byte) []byte) ([]byte, error)
}

func (c rawCommands) claim(key, value []byte) ([]byte, error) {
	return c.exchange(func(b []byte) []byte {
		b = appendBulk(append(b, "*7\r\n$3\r\nSET\r\n"...), key)
		b = append(appendBulk(b, value), "$2\r\nNX\r\n$3\r\nGET\r\n$2\r\nPX\r\n"...)
		return appendBulk(b, floorTTL)
	})
}

func (c rawCommands) complete(key, token, value []byte) error {
	reply, err := c.exchange(func(b []byte) []byte {
		b = appendBulk(append(b, "*7\r\n$7\r\nEVALSHA\r\n"...), floorSHA)
		b = appendBulk(append(b, "$1\r\n1\r\n"...), key)
		return appendBulk(appendBulk(appendBulk(b, token), value), floorTTL)
	})
	if err == nil && string(reply) != "1" {
		err = errors.New("lease lost")
	}
	return err
}

func appendBulk[T []byte | string](b []byte, s T) []byte {
	b = append(b, '$')
	b = strconv.AppendInt(b, int64(len(s)), 10)
	b = append(append(b, "\r\n"...), s...)
	return append(b, "\r\n"...)
}

// readReply reads a string, a number or an error.
func readReply(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	text := line[1 : len(line)-2]
	switch line[0] {
	case ':', '+':
		return bytes.Clone(text), nil
	case '$':
		n, err := strconv.Atoi(string(text))
		if err != nil || n < 0 {
			return nil, err
		}
		b := make([]byte, n+2)
		_, err = io.ReadFull(r, b)
		return b[:n], err
	}
	return nil, errors.New(string(line))
}

// serialConn sends one command at a time over one connection.
type serialConn struct {
	mu   sync.Mutex // guards all
	conn net.Conn
	in   *bufio.Reader
	out  []byte
}

func (c *serialConn) exchange(build func([]byte) []byte) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = build(c.out[:0])
	if _, err := c.conn.Write(c.out); err != nil {
		return nil, err
	}
	return readReply(c.in)
}

// pipelinedConn sends all commands that come while the last ones are on their
// way at once, over one connection.
type pipelinedConn struct {
	conn net.Conn
	in   *bufio.Reader
	wake chan struct{}

	mu      sync.Mutex // guards what follows
	out     []byte
	waiting []chan rawReply
}

type rawReply struct {
	value []byte
	err   error
}

var replyChannels = sync.Pool{New: func() any { return make(chan rawReply, 1) }}

func (c *pipelinedConn) exchange(build func([]byte) []byte) ([]byte, error) {
	reply := replyChannels.Get().(chan rawReply)
	defer replyChannels.Put(reply)
	c.mu.Lock()
	c.out = build(c.out)
	c.waiting = append(c.waiting, reply)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	answer := <-reply
	return answer.value, answer.err
}

// serve sends and receives until the connection is closed and no caller waits.
func (c *pipelinedConn) serve() {
	var out []byte
	var waiting []chan rawReply
	for range c.wake {
		c.mu.Lock()
		out, c.out = c.out, out[:0]
		waiting, c.waiting = c.waiting, waiting[:0]
		c.mu.Unlock()
		_, failed := c.conn.Write(out)
		for _, reply := range waiting {
			answer := rawReply{err: failed}
			if failed == nil {
				answer.value, answer.err = readReply(c.in)
			}
			reply <- answer
		}
	}
}

// dialRaw returns a connection to the server, which knows the script.
func dialRaw(t testing.TB, addr string) net.Conn {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newSerial(t testing.TB, addr string) floorClient {
	conn := dialRaw(t, addr)
	return rawCommands{&serialConn{conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}}
}

func newPipelined(t testing.TB, addr string) floorClient {
	conn := dialRaw(t, addr)
	c := &pipelinedConn{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), wake: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() { defer close(done); c.serve() }()
	t.Cleanup(func() { close(c.wake); <-done })
	return rawCommands{c}
}

// loadFloorScript has the server know the script of the floors.
func loadFloorScript(t testing.TB, client *redis.Client) {
	sha, err := client.ScriptLoad(context.Background(), floorScript).Result()
	require.NoError(t, err)
	require.True(t, strings.EqualFold(sha, floorSHA))
}
