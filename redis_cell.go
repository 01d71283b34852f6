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
//	redisFormat          0       1
//	state                1       1
//	fingerprint length   2       1       0 in a released cell
//
//	completed                            claimed and released
//	token digest         3       8       token length        3   1
//	fingerprint          11              attempt             4   4
//	value
//	                                     claimed
//	                                     flags               8   1
//	released                             lease in ms         9   6
//	token                8               TTL in ms           15  6
//	                                     token, fingerprint  21
//
// Flag 1 is Once: the claim is never taken over. Flag 2 is watched: a caller was
// answered InProgress, so that a change is published. Only the scripts set flags.
//
// The offsets are fixed, so that Lua reads them without a library: miniredis
// has no struct.
//
// A claimed cell has its TTL because Redis tells only the time that is left of
// a key. The time since the claim, or since its last renewal, is the TTL in the
// cell less the PTTL of the key, by the server's clock alone.
//
// Most cells are completed, so a completed cell holds only what is needed. A
// Complete that was sent twice needs the token only to compare it, and eight
// bytes of a hash are enough for that. The TTL is Redis's own.
//
// Records outlive deployments, so a format that was ever released stays
// readable. Another format has another first byte.
const (
	redisFormat = 0x1d

	redisClaimed   = 'C'
	redisCompleted = 'D'
	redisReleased  = 'R'

	redisCompletedHeader = 11
	redisReleasedHeader  = 8
	redisClaimedHeader   = 21
)

// A redisCell is a cell as it is first written. A cell that was read has no
// lease, TTL and attempt, which only the scripts use, and a completed one no
// token. Its value is whole: no parts follow it.
type redisCell struct {
	state              byte
	lease, ttl         int64 // of a claim, in milliseconds
	attempt            int
	token              string
	fingerprint, value []byte
	parts              [][]byte
}

// millis returns whole milliseconds, the unit of Redis. It rounds up: no lease
// and no cell ends early.
func millis(d time.Duration) int64 {
	ms := int64(d / time.Millisecond)
	if d%time.Millisecond > 0 {
		ms++
	}
	return max(ms, 1)
}

// encode returns the stored form in one allocation. Lengths are one byte each: a
// token of this package has 22 bytes, a fingerprint 16.
func (c *redisCell) encode() ([]byte, error) {
	if len(c.token) > math.MaxUint8 || len(c.fingerprint) > math.MaxUint8 {
		return nil, fmt.Errorf("idempotency: RedisStore takes a token and a fingerprint of up to 255 bytes each, not of %d and %d",
			len(c.token), len(c.fingerprint))
	}
	b := make([]byte, 0, redisClaimedHeader+len(c.token)+len(c.fingerprint)+len(c.value)+sizeOf(c.parts))
	b = append(b, redisFormat, c.state, byte(len(c.fingerprint)))
	if c.state == redisCompleted {
		digest := sha256.Sum256([]byte(c.token))
		b = append(b, digest[:8]...)
		b = append(b, c.fingerprint...)
		b = append(b, c.value...)
		for _, part := range c.parts {
			b = append(b, part...)
		}
		return b, nil
	}
	b = append(b, byte(len(c.token)))
	b = binary.BigEndian.AppendUint32(b, uint32(min(int64(c.attempt), math.MaxUint32)))
	if c.state == redisReleased {
		return append(b, c.token...), nil
	}
	b = append(b, 0) // flags
	b = appendUint48(b, c.lease)
	b = appendUint48(b, c.ttl)
	b = append(b, c.token...)
	return append(b, c.fingerprint...), nil
}

// appendUint48 appends a time in milliseconds. 48 bits are 8,900 years; Lua's
// numbers are exact up to 53 bits.
func appendUint48(b []byte, n int64) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(n>>32))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// errForeignCell is the error for a key that another program uses, or a newer
// release. The request is refused: to take such a key could run a handler
// twice, or destroy what the other program keeps there.
var errForeignCell = errors.New("idempotency: the Redis key holds something that is no record of this package, or of a newer release")

// parseRedisCell reads b in place: fingerprint and value are parts of it. Bytes
// that it does not understand are an error and never a free key.
func parseRedisCell(b []byte) (redisCell, error) {
	if len(b) < redisReleasedHeader || b[0] != redisFormat {
		return redisCell{}, errForeignCell
	}
	c := redisCell{state: b[1]}
	start, token, fingerprint := 0, int(b[3]), int(b[2])
	switch c.state {
	case redisCompleted:
		start, token = redisCompletedHeader, 0
	case redisReleased:
		start = redisReleasedHeader
	case redisClaimed:
		start = redisClaimedHeader
	default:
		return redisCell{}, errForeignCell
	}
	// Only a completed cell goes on after its fingerprint, with the value. More
	// bytes, or fewer, were not written by this release.
	end := start + token + fingerprint
	if end > len(b) || c.state != redisCompleted && end < len(b) {
		return redisCell{}, errForeignCell
	}
	c.token = string(b[start : start+token])
	c.fingerprint, c.value = b[start+token:end:end], b[end:]
	return c, nil
}

// redisParse is the part of the scripts that reads a cell. Lua counts from 1,
// so all offsets are one more than those of the table above.
//
// parse returns the state, the token, the fingerprint and the flags, or nil for
// a string that is no cell. The token of a completed cell is its digest.
const redisParse = `
local function parse(s)
  if #s < 8 or string.byte(s, 1) ~= 29 then return nil end
  local state, fingerprint, token = string.sub(s, 2, 2), string.byte(s, 3), string.byte(s, 4)
  if state == 'D' and #s >= 11 + fingerprint then
    return state, string.sub(s, 4, 11), string.sub(s, 12, 11 + fingerprint), 0
  end
  if state == 'C' and #s == 21 + token + fingerprint then
    return state, string.sub(s, 22, 21 + token), string.sub(s, 22 + token), string.byte(s, 9)
  end
  if state == 'R' and #s == 8 + token + fingerprint then
    return state, string.sub(s, 9, 8 + token), '', 0
  end
end
local foreign = {err = 'FOREIGN the key holds something else'}
`

// redisLease is the part of the scripts that reads the lease of a claim. number
// reads a number of a cell. leaseLeft returns how many milliseconds the lease
// of a claim still runs, 0 or less when it is over, or nil for a key without a
// TTL, which no script has written.
//
// A lease is over when more milliseconds have begun than it has. Else it would
// end up to one millisecond early.
const redisLease = `
local function number(s, from, to)
  local n = 0
  for i = from, to do n = n * 256 + string.byte(s, i) end
  return n
end
local function leaseLeft(cell)
  local kept, lease = redis.call('PTTL', KEYS[1]), number(cell, 10, 15)
  if kept < 0 then return nil end
  return math.min(lease, lease - (number(cell, 16, 21) - kept) + 1)
end
`

// acquireScript decides about a claim or a renewal by the table of [Store].
//
// KEYS[1] is the cell. ARGV[1] is the claim as an absent cell becomes it.
// ARGV[2] is the attempt that is renewed, and 0 for a claim. ARGV[3] is 1 for a
// renewal that marks the claim as Once.
//
// Its rows are those of the table, in the same order. A claim is extended in
// place, so that its fingerprint and its attempt stay.
//
// It returns a State and two values that belong to it: for Acquired the attempt
// and Once, for InProgress the milliseconds that are left of the lease and the
// cell, for Lost nothing, and else 0 and the cell. InProgress also sets
// the flag watched, so that Complete and Release publish the change.
var acquireScript = newRedisScript(redisParse + redisLease + `
local claim, renewal = ARGV[1], tonumber(ARGV[2])
local _, token, fingerprint = parse(claim)
local function write(attempt, flags)
  local n = string.char(math.floor(attempt / 16777216) % 256, math.floor(attempt / 65536) % 256,
    math.floor(attempt / 256) % 256, attempt % 256, flags)
  local cell = string.sub(claim, 1, 4) .. n .. string.sub(claim, 10)
  redis.call('SET', KEYS[1], cell, 'PX', number(claim, 16, 21))
  return {1, attempt, 0}
end

local cell = redis.call('GET', KEYS[1])
if not cell then
  if full then return {err = 'OOM no room for a new key'} end
  return write(number(claim, 5, 8), 0)
end
local state, owner, known, flags = parse(cell)
if not state then return foreign end
if state == 'R' then
  if owner == token or renewal > 0 then return {6, 0, ''} end
  return write(number(cell, 5, 8) + 1, 0)
end
if known ~= '' and fingerprint ~= '' and known ~= fingerprint then return {4, 0, cell} end
if state == 'D' then
  if renewal > 0 then return {6, 0, ''} end
  return {3, 0, cell}
end
local once, watched, attempt = flags % 2, flags - flags % 2, number(cell, 5, 8)
if owner == token and (renewal == 0 or renewal == attempt) then
  once = math.max(once, tonumber(ARGV[3]))
  local head = string.char(once + watched) .. string.sub(claim, 10, 21)
  redis.call('PEXPIRE', KEYS[1], number(claim, 16, 21))
  if head ~= string.sub(cell, 9, 21) then redis.call('SETRANGE', KEYS[1], 8, head) end
  return {1, attempt, once}
end
if renewal > 0 then return {6, 0, ''} end

local left = leaseLeft(cell)
if not left then return foreign end
if left > 0 then
  if watched == 0 then redis.call('SETRANGE', KEYS[1], 8, string.char(once + 2)) end
  return {2, left, cell}
end
if once == 1 then return {5, 0, cell} end
return write(attempt + 1, watched)
`)

// completeScript stores a result. KEYS[1] is the cell. ARGV[1] is the record as
// it is written, so that Lua neither builds nor cuts large values. ARGV[2] is
// the channel to publish on when callers wait. ARGV[3] is the token, ARGV[4] the
// TTL in milliseconds. It returns 1, or 0 when the cell is another owner's or
// released.
//
// PUBLISH may fail, for lack of a permission, say. The record must not.
var completeScript = newRedisScript(redisParse + `
local cell, watched = redis.call('GET', KEYS[1]), 2
if cell then
  local state, owner, _, flags = parse(cell)
  if not state then return foreign end
  if state == 'D' then
    if owner == string.sub(ARGV[1], 4, 11) then return 1 end
    return 0
  end
  if state == 'R' or owner ~= ARGV[3] then return 0 end
  watched = flags
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[4])
if watched >= 2 then redis.pcall('PUBLISH', ARGV[2], '') end
return 1
`)

// releaseScript frees a claim. It leaves a marker even where there was no cell: a
// claim that is still on its way finds it, and takes no key for a caller that has
// given it up.
//
// KEYS[1] is the cell. ARGV[1] is the marker that an absent cell becomes. A claim
// under the token becomes the same with its own attempt. ARGV[2] is the channel
// to publish on when callers wait. ARGV[3] is the token, ARGV[4] how long the
// marker is kept, in milliseconds. The marker of a later attempt than the first
// is kept for what is left of the TTL, if that is longer. It returns 1.
var releaseScript = newRedisScript(redisParse + `
local cell, watched, marker, keep = redis.call('GET', KEYS[1]), 2, ARGV[1], tonumber(ARGV[4])
if cell then
  local state, owner, _, flags = parse(cell)
  if not state then return foreign end
  if state ~= 'C' or owner ~= ARGV[3] then return 1 end
  local attempt = string.sub(cell, 5, 8)
  marker, watched = string.sub(marker, 1, 4) .. attempt .. string.sub(marker, 9), flags
  if attempt ~= '\0\0\0\1' then keep = math.max(keep, redis.call('PTTL', KEYS[1])) end
end
redis.call('SET', KEYS[1], marker, 'PX', keep)
if watched >= 2 then redis.pcall('PUBLISH', ARGV[2], '') end
return 1
`)

// A redisScript is Lua in two forms. The second goes on when Redis is full, and
// its variable full says so. It is tried only after Redis refused the first:
// servers and stand-ins that do not know its first line cannot compile it. A
// refused script has written nothing.
type redisScript struct{ plain, full redisSource }

// A redisSource is the text of a script and the hash that EVALSHA knows it by.
type redisSource struct{ text, sha string }

func newRedisScript(lua string) *redisScript {
	return &redisScript{
		plain: newRedisSource("local full = false" + lua),
		full:  newRedisSource("#!lua flags=allow-oom\nlocal full = true" + lua),
	}
}

func newRedisSource(text string) redisSource {
	sum := sha1.Sum([]byte(text)) // the name that EVALSHA knows it by
	return redisSource{text, hex.EncodeToString(sum[:])}
}

// run runs a script on one key. It goes on when Redis is full if the key has a
// cell: such a command makes room, or its cell was let in before. claims is as
// for send.
func (s *RedisStore) run(ctx context.Context, script *redisScript, claims bool, name string, args ...any) (cmd *redis.Cmd, replicated bool, err error) {
	cmd, replicated, err = s.eval(ctx, script.plain, claims, name, args)
	if isRedisFull(err) {
		cmd, replicated, err = s.eval(ctx, script.full, claims, name, args)
	}
	if hasErrorPrefix(err, "FOREIGN") {
		err = fmt.Errorf("%w (%w)", errForeignCell, err)
	}
	return cmd, replicated, err
}

// eval names a script by its hash, and sends its text only to a Redis that does
// not know it.
func (s *RedisStore) eval(ctx context.Context, source redisSource, claims bool, name string, args []any) (cmd *redis.Cmd, replicated bool, err error) {
	call := append(make([]any, 0, 8), "evalsha", source.sha, 1, name)
	call = append(call, args...)
	cmd = redis.NewCmd(ctx, call...)
	replicated, err = s.send(ctx, name, cmd, claims)
	if hasErrorPrefix(err, "NOSCRIPT") {
		call[0], call[1] = "eval", source.text
		cmd = redis.NewCmd(ctx, call...)
		replicated, err = s.send(ctx, name, cmd, claims)
	}
	return cmd, replicated, err
}

// isRedisFull reports whether Redis refused a command for lack of memory.
func isRedisFull(err error) bool { return hasErrorPrefix(err, "OOM") }

// hasErrorPrefix is redis.HasErrorPrefix, which allocates even where there is
// no error.
func hasErrorPrefix(err error, prefix string) bool {
	return err != nil && redis.HasErrorPrefix(err, prefix)
}
