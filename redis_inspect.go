package idempotency

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"
)

// inspectScript reads a cell. KEYS[1] is the cell. It returns the cell, its PTTL
// and the milliseconds that are left of its lease, or an empty string for a key
// that has no cell. It is a script, and no GET and PTTL, because a cell may
// change between two commands, and a client that spreads reads over replicas
// might show what is no longer so.
var inspectScript = newRedisScript(redisParse + redisLease + `
local cell = redis.call('GET', KEYS[1])
if not cell then return {'', 0, 0} end
local state, left = parse(cell), 0
if not state then return foreign end
if state == 'C' then left = leaseLeft(cell) end
if not left then return foreign end
return {cell, redis.call('PTTL', KEYS[1]), left}
`)

// forgetScript frees a key for an operator. KEYS[1] is the cell. ARGV[1] is the
// marker that a completed cell becomes. ARGV[2] is the channel to publish on
// when callers wait. ARGV[3], ARGV[4] and ARGV[5] are what the operator has
// seen: the State, the attempt, and the token, which is a digest for a completed
// cell. It returns 1, or 0 when the cell is another by now, or 2 when a lease is
// running.
//
// The attempt, the token and the TTL of a claim stay, so that its owner may
// still complete it.
var forgetScript = newRedisScript(redisParse + redisLease + `
local cell = redis.call('GET', KEYS[1])
local letter, owner, _, flags = '', '', '', 0
if cell then letter, owner, _, flags = parse(cell) end
if not letter then return foreign end

local state, attempt, becomes = 0, 0, nil
if letter == 'D' then
  state, becomes = 3, ARGV[1]
elseif letter == 'R' then
  state, attempt = 8, number(cell, 5, 8)
elseif letter == 'C' then
  local left, once = leaseLeft(cell), flags % 2
  if not left then return foreign end
  if left > 0 then return 2 end
  state, attempt = once == 1 and 5 or 7, number(cell, 5, 8)
  becomes = string.sub(cell, 1, 2) .. '\0' .. string.sub(cell, 4, 8) .. string.char(flags - once) ..
    string.sub(cell, 10, 21 + #owner)
end
if state ~= tonumber(ARGV[3]) or attempt ~= tonumber(ARGV[4]) or owner ~= ARGV[5] then return 0 end
if becomes then redis.call('SET', KEYS[1], becomes, 'KEEPTTL') end
if flags >= 2 then redis.pcall('PUBLISH', ARGV[2], '') end
return 1
`)

// Inspect implements [Inspector], in one round trip. It brings the whole value.
// It fails when the key holds something that is no record.
func (s *RedisStore) Inspect(ctx context.Context, key string) (Cell, error) {
	cmd, _, err := s.run(ctx, inspectScript, false, s.opts.Prefix+key)
	if err != nil {
		return Cell{}, err
	}
	reply, err := cmd.Slice()
	if err != nil || len(reply) != 3 {
		return Cell{}, fmt.Errorf("idempotency: unexpected reply of Redis to an inspection: %v", reply)
	}
	stored, _ := reply[0].(string)
	kept, _ := reply[1].(int64)
	left, _ := reply[2].(int64)
	if stored == "" {
		return Cell{}, nil
	}
	return inspectRedisCell([]byte(stored), time.Duration(kept)*time.Millisecond, time.Duration(left)*time.Millisecond)
}

// inspectRedisCell reads a cell of which Redis keeps the times.
func inspectRedisCell(b []byte, ttl, lease time.Duration) (Cell, error) {
	cell, err := parseRedisCell(b)
	if err != nil {
		return Cell{}, err
	}
	c := Cell{Owner: cell.token, TTL: ttl, Fingerprint: cell.fingerprint}
	if cell.state == redisCompleted {
		c.State, c.Value, c.Owner = Completed, cell.value, hex.EncodeToString(b[3:redisCompletedHeader])
		return c, nil
	}
	c.Attempt = int(binary.BigEndian.Uint32(b[4:]))
	if cell.state == redisReleased {
		c.State = Released
		return c, nil
	}
	c.Once = b[8]&1 == 1
	switch {
	case lease > 0:
		c.State, c.Lease = InProgress, lease
	case c.Once:
		c.State = Abandoned
	default:
		c.State = Lapsed
	}
	return c, nil
}

// Forget implements [Inspector]. It succeeds when Redis is full, because it
// makes no cell larger. It does not wait for replicas: a failover that loses it
// leaves the key as it was.
func (s *RedisStore) Forget(ctx context.Context, key string, seen Cell) error {
	owner := seen.Owner
	if seen.State == Completed {
		digest, err := hex.DecodeString(owner)
		if err != nil {
			return ErrCellChanged // no Cell of this store
		}
		owner = string(digest)
	}
	marker := redisCell{state: redisReleased, attempt: 1}
	b, err := marker.encode()
	if err != nil {
		return err
	}
	name := s.opts.Prefix + key
	cmd, _, err := s.run(ctx, forgetScript, false, name, b, redisChannel(name), int(seen.State), seen.Attempt, owner)
	if err != nil {
		return err
	}
	switch n, err := cmd.Int(); {
	case err != nil:
		return err
	case n == 2:
		return ErrInProgress
	case n == 0:
		return ErrCellChanged
	}
	return nil
}
