package idempotency

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/redis/go-redis/v9"
)

// A cell is one string. Numbers are big-endian.
//
//	every cell           offset  length
//	redisMagic           0       1
//	redisVersion         1       1
//	state                2       1
//	fingerprint length   3       2
//
//	claimed or released                    completed
//	flags                5       1         TTL in seconds    5   4
//	lease in ms          6       6         token digest      9   8
//	TTL in ms            12      6         fingerprint       17
//	attempt              18      4         value
//	token length         22      1
//	token, fingerprint   23
//
// The offsets are fixed so that Lua reads them without a library: miniredis
// has no struct. Redis counts the time that is left of a key, so the time since
// a claim or its last renewal is the TTL in the cell less the PTTL of the key,
// by the server's clock alone.
//
// Of a completed cell there are millions, so it has only what is needed. Its
// token is compared when Complete was sent twice: eight bytes of a hash tell.
// Its TTL is rounded down.
//
// Records outlive deployments, so a version that was ever released stays
// readable.
const (
	redisMagic   = 0x1d
	redisVersion = 1

	redisClaimed   = 'C'
	redisCompleted = 'D'
	redisReleased  = 'R'

	redisClaimHeader  = 23
	redisRecordHeader = 17

	redisOnce   = 1
	redisWaited = 2 // somebody was answered InProgress, so a change is published
)

// redisCell is a cell. A completed one that was read has no token.
type redisCell struct {
	state              byte
	once               bool
	lease, ttl         int64 // milliseconds
	attempt            uint32
	token              string
	fingerprint, value []byte
}

// millis rounds up: no lease and no cell ends early.
func millis(d time.Duration) int64 {
	ms := int64(d / time.Millisecond)
	if d%time.Millisecond > 0 {
		ms++
	}
	return max(ms, 1)
}

// encode returns the stored form in one allocation.
func (c *redisCell) encode() ([]byte, error) {
	if len(c.token) > math.MaxUint8 || len(c.fingerprint) > math.MaxUint16 {
		return nil, errors.New("idempotency: RedisStore takes tokens of up to 255 bytes and fingerprints of up to 65535")
	}
	b := make([]byte, 0, redisClaimHeader+len(c.token)+len(c.fingerprint)+len(c.value))
	b = append(b, redisMagic, redisVersion, c.state)
	b = binary.BigEndian.AppendUint16(b, uint16(len(c.fingerprint)))
	if c.state == redisCompleted {
		digest := sha256.Sum256([]byte(c.token))
		b = binary.BigEndian.AppendUint32(b, uint32(min(c.ttl/1000, math.MaxUint32)))
		b = append(b, digest[:8]...)
		b = append(b, c.fingerprint...)
		return append(b, c.value...), nil
	}
	flags := byte(0)
	if c.once {
		flags = redisOnce
	}
	b = append(b, flags)
	b = appendUint48(b, c.lease)
	b = appendUint48(b, c.ttl)
	b = binary.BigEndian.AppendUint32(b, c.attempt)
	b = append(b, byte(len(c.token)))
	b = append(b, c.token...)
	return append(b, c.fingerprint...), nil
}

func appendUint48(b []byte, n int64) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(n>>32))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func uint48(b []byte) int64 {
	return int64(binary.BigEndian.Uint16(b))<<32 | int64(binary.BigEndian.Uint32(b[2:]))
}

var errForeignCell = errors.New("idempotency: the Redis key holds something that is no record of this package, or of a newer release")

// parseRedisCell reads b in place: fingerprint and value are parts of it. What
// it does not understand is an error and never a free key.
func parseRedisCell(b []byte) (redisCell, error) {
	if len(b) < redisRecordHeader || b[0] != redisMagic || b[1] != redisVersion {
		return redisCell{}, errForeignCell
	}
	c := redisCell{state: b[2]}
	token, start := 0, redisRecordHeader
	switch {
	case c.state == redisCompleted:
		c.ttl = int64(binary.BigEndian.Uint32(b[5:])) * 1000
	case (c.state == redisClaimed || c.state == redisReleased) && len(b) >= redisClaimHeader:
		token, start = int(b[22]), redisClaimHeader
		c.once = b[5]&redisOnce != 0
		c.lease, c.ttl, c.attempt = uint48(b[6:]), uint48(b[12:]), binary.BigEndian.Uint32(b[18:])
	default:
		return redisCell{}, errForeignCell
	}
	end := start + token + int(binary.BigEndian.Uint16(b[3:]))
	if end > len(b) || c.state != redisCompleted && end < len(b) {
		return redisCell{}, errForeignCell
	}
	c.token = string(b[start : start+token])
	c.fingerprint, c.value = b[start+token:end:end], b[end:]
	return c, nil
}

// redisParse is the part of the scripts that reads a cell. Lua counts from 1.
// It returns the state, the flags, the token and the fingerprint, or nil for
// what is no cell. A completed cell has neither flags nor token.
const redisParse = `
local function parse(s)
  if #s < 17 or string.sub(s, 1, 2) ~= '\29\1' then return nil end
  local state, fingerprint = string.sub(s, 3, 3), string.byte(s, 4) * 256 + string.byte(s, 5)
  if state == 'D' and #s >= 17 + fingerprint then
    return state, nil, nil, string.sub(s, 18, 17 + fingerprint)
  end
  if (state ~= 'C' and state ~= 'R') or #s < 23 then return nil end
  local token = 23 + string.byte(s, 23)
  if #s ~= token + fingerprint then return nil end
  return state, string.byte(s, 6), string.sub(s, 24, token), string.sub(s, token + 1)
end
local foreign = {err = 'FOREIGN the key holds something else'}
`

// contendScript decides about a key that may be claimed or released by someone.
// It is the whole table of Store.Acquire.
//
// KEYS[1] is the cell. ARGV[1] is the claim as it would be written. ARGV[2] is
// 1 if an absent cell may be claimed, and 0 if there is no room for a new key.
//
// It returns a State and two values that belong to it: the attempt and whether
// this was a renewal, or the time in milliseconds that is left of the lease and
// the cell. State 0: the cell is absent and may not be claimed. When it answers
// InProgress it marks the cell, so that its owner publishes what becomes of it.
// The lease is over when more milliseconds have begun than it has: less would
// end it up to one too early.
var contendScript = newRedisScript(redisParse + `
local claim = ARGV[1]
local _, mine, token, fingerprint = parse(claim)
local function number(s, from, to)
  local n = 0
  for i = from, to do n = n * 256 + string.byte(s, i) end
  return n
end
local function write(attempt, flags)
  local n = string.char(math.floor(attempt / 16777216) % 256, math.floor(attempt / 65536) % 256,
    math.floor(attempt / 256) % 256, attempt % 256)
  local cell = string.sub(claim, 1, 5) .. string.char(flags) .. string.sub(claim, 7, 18) .. n .. string.sub(claim, 23)
  redis.call('SET', KEYS[1], cell, 'PX', number(claim, 13, 18))
  return {1, attempt, 0}
end

local cell = redis.call('GET', KEYS[1])
if not cell then
  if ARGV[2] == '0' then return {0, 0, 0} end
  return write(1, mine)
end
local state, flags, owner, known = parse(cell)
if not state then return foreign end
if state == 'R' then
  if owner == token then return {6, 0, 0} end
  return write(number(cell, 19, 22) + 1, mine)
end
if known ~= '' and fingerprint ~= '' and known ~= fingerprint then return {4, 0, cell} end
if state == 'D' then return {3, 0, cell} end
local once, waited = flags % 2, flags - flags % 2
if owner == token then
  local head = string.char(math.max(once, mine) + waited) .. string.sub(claim, 7, 18)
  redis.call('PEXPIRE', KEYS[1], number(claim, 13, 18))
  if head ~= string.sub(cell, 6, 18) then redis.call('SETRANGE', KEYS[1], 5, head) end
  return {1, number(cell, 19, 22), 1}
end

local kept = redis.call('PTTL', KEYS[1])
if kept < 0 then return foreign end
local lease = number(cell, 7, 12)
local left = lease - (number(cell, 13, 18) - kept) + 1
if left > 0 then
  if waited == 0 then redis.call('SETRANGE', KEYS[1], 5, string.char(once + 2)) end
  return {2, math.min(left, lease), cell}
end
if once == 1 then return {5, 0, cell} end
return write(number(cell, 19, 22) + 1, mine + waited)
`)

// completeScript stores a result. KEYS[1] is the cell, ARGV[1] the record as it
// is written: large values are neither built nor cut in Lua. ARGV[2] is the
// channel to publish on when somebody waits, ARGV[3] the token and ARGV[4] the
// TTL in milliseconds. It returns 1, or 0 when the cell is another owner's or
// released.
//
// Publishing may fail, for lack of a permission, say. The record must not.
var completeScript = newRedisScript(redisParse + `
local cell = redis.call('GET', KEYS[1])
local flags = 2
if cell then
  local state, marked, owner = parse(cell)
  if not state then return foreign end
  if state == 'D' then
    if string.sub(cell, 10, 17) == string.sub(ARGV[1], 10, 17) then return 1 end
    return 0
  end
  if state == 'R' or owner ~= ARGV[3] then return 0 end
  flags = marked
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[4])
if flags >= 2 then redis.pcall('PUBLISH', ARGV[2], '') end
return 1
`)

// releaseScript frees a claim. KEYS[1] is the cell, ARGV[1] the marker that an
// absent cell becomes, with the TTL ARGV[4] in milliseconds. A claim under the
// token ARGV[3] becomes the same with its own lease and attempt. ARGV[2] is the
// channel to publish on when somebody waits. It returns 1.
var releaseScript = newRedisScript(redisParse + `
local cell = redis.call('GET', KEYS[1])
local marker, ttl, flags = ARGV[1], ARGV[4], 2
if cell then
  local state, marked, owner = parse(cell)
  if not state then return foreign end
  if state ~= 'C' or owner ~= ARGV[3] then return 1 end
  local lease = string.sub(cell, 7, 12)
  marker = string.sub(marker, 1, 6) .. lease .. lease .. string.sub(cell, 19, 22) .. string.sub(marker, 23)
  ttl, flags = 0, marked
  for i = 1, 6 do ttl = ttl * 256 + string.byte(lease, i) end
end
redis.call('SET', KEYS[1], marker, 'PX', ttl)
if flags >= 2 then redis.pcall('PUBLISH', ARGV[2], '') end
return 1
`)

// A redisScript is Lua in two forms. The second goes on when Redis is full: it
// is for what must get through then, and is tried only after the first was
// refused, because servers and stand-ins that do not know its first line cannot
// compile it. A refused script has written nothing.
type redisScript struct{ plain, full redisSource }

type redisSource struct{ text, sha string }

func newRedisScript(lua string) *redisScript {
	return &redisScript{plain: newRedisSource(lua), full: newRedisSource("#!lua flags=allow-oom\n" + lua)}
}

func newRedisSource(text string) redisSource {
	sum := sha1.Sum([]byte(text)) // the name that EVALSHA knows it by
	return redisSource{text, hex.EncodeToString(sum[:])}
}

// eval runs a script on one key. claims is as for send.
func (s *RedisStore) eval(ctx context.Context, source redisSource, claims bool, name string, args ...any) (cmd *redis.Cmd, replicated bool, err error) {
	call := append(make([]any, 0, 8), "evalsha", source.sha, 1, name)
	call = append(call, args...)
	cmd = redis.NewCmd(ctx, call...)
	if replicated, err = s.send(ctx, name, cmd, claims); err == nil {
		return cmd, replicated, nil
	}
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		call[0], call[1] = "eval", source.text
		cmd = redis.NewCmd(ctx, call...)
		replicated, err = s.send(ctx, name, cmd, claims)
	}
	if redis.HasErrorPrefix(err, "FOREIGN") {
		err = fmt.Errorf("%w (%w)", errForeignCell, err)
	}
	return cmd, replicated, err
}

// settle runs a script that ends a claim. It gets through on a full Redis: what
// it does makes room, or was let in before.
func (s *RedisStore) settle(ctx context.Context, script *redisScript, name string, cell redisCell) (ok bool, err error) {
	b, err := cell.encode()
	if err != nil {
		return false, err
	}
	args := []any{b, redisChannel(name), cell.token, cell.ttl}
	cmd, _, err := s.eval(ctx, script.plain, false, name, args...)
	if isRedisFull(err) {
		cmd, _, err = s.eval(ctx, script.full, false, name, args...)
	}
	if err != nil {
		return false, err
	}
	n, err := cmd.Int()
	return n == 1, err
}

func isRedisFull(err error) bool { return err != nil && redis.HasErrorPrefix(err, "OOM") }
