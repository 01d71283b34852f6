package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

const (
	absent = iota
	claimed
	completed
	released
)

// A cell is one item. The zero cell is absent.
type cell struct {
	state, attempt     int
	token              string
	once               bool
	fingerprint, value []byte

	// leaseEnd and expires are by the clock of the process that wrote the cell.
	leaseEnd, expires time.Time

	// rev is another one after each write, so that a write can name the cell
	// that it was decided for.
	rev string
}

// An item has these attributes. Several names are reserved words of DynamoDB, so
// conditions use them with a "#" in front.
const (
	attrID          = "id" // the partition key
	attrState       = "state"
	attrAttempt     = "attempt"
	attrToken       = "token"
	attrOnce        = "once"
	attrFingerprint = "fingerprint" // not there if empty
	attrValue       = "value"       // not there if empty
	attrLeaseEnd    = "lease_end"   // microseconds since 1970, as expires
	attrExpires     = "expires"
	attrRev         = "rev"
	attrTTL         = "ttl" // seconds since 1970: when DynamoDB may delete the item
)

// deletionDelay is how long after its end a cell is deleted. DynamoDB deletes by
// its own clock, and mostly hours late. The delay keeps it from deleting early
// for a process whose clock is slow.
const deletionDelay = time.Hour

type item = map[string]types.AttributeValue

// encode returns the item of c under key.
func (s *Store) encode(key string, c cell) item {
	i := item{
		attrID:       &types.AttributeValueMemberS{Value: key},
		attrState:    number(int64(c.state)),
		attrAttempt:  number(int64(c.attempt)),
		attrToken:    &types.AttributeValueMemberS{Value: c.token},
		attrOnce:     &types.AttributeValueMemberBOOL{Value: c.once},
		attrLeaseEnd: number(micros(c.leaseEnd)),
		attrExpires:  number(micros(c.expires)),
		attrRev:      &types.AttributeValueMemberS{Value: c.rev},
		attrTTL:      number(c.expires.Add(s.skew + deletionDelay).Unix()),
	}
	if len(c.fingerprint) > 0 {
		i[attrFingerprint] = &types.AttributeValueMemberB{Value: c.fingerprint}
	}
	if len(c.value) > 0 {
		i[attrValue] = &types.AttributeValueMemberB{Value: c.value}
	}
	return i
}

func number(n int64) *types.AttributeValueMemberN {
	return &types.AttributeValueMemberN{Value: strconv.FormatInt(n, 10)}
}

// micros rounds up, so that nothing ends early. The zero time is 0.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Add(time.Microsecond - 1).UnixMicro()
}

// decode returns the cell of an item; that of an empty item is absent. An item
// that no Store has written is an error, since a guess might run a handler again.
func decode(i item) (c cell, err error) {
	if len(i) == 0 {
		return cell{}, nil
	}
	var state, attempt, leaseEnd, expires int64
	for _, a := range []struct {
		name string
		to   *int64
	}{{attrState, &state}, {attrAttempt, &attempt}, {attrLeaseEnd, &leaseEnd}, {attrExpires, &expires}} {
		n, ok := i[a.name].(*types.AttributeValueMemberN)
		if !ok {
			return cell{}, fmt.Errorf("dynamodb: the item has no number %q", a.name)
		}
		if *a.to, err = strconv.ParseInt(n.Value, 10, 64); err != nil {
			return cell{}, fmt.Errorf("dynamodb: %q of the item: %w", a.name, err)
		}
	}
	token, hasToken := i[attrToken].(*types.AttributeValueMemberS)
	rev, hasRev := i[attrRev].(*types.AttributeValueMemberS)
	once, hasOnce := i[attrOnce].(*types.AttributeValueMemberBOOL)
	if !hasToken || !hasRev || !hasOnce || state < claimed || state > released {
		return cell{}, errors.New("dynamodb: the item is no cell")
	}
	c = cell{
		state: int(state), attempt: int(attempt), token: token.Value, rev: rev.Value, once: once.Value,
		leaseEnd: time.UnixMicro(leaseEnd), expires: time.UnixMicro(expires),
	}
	if b, ok := i[attrFingerprint].(*types.AttributeValueMemberB); ok {
		c.fingerprint = b.Value
	}
	if b, ok := i[attrValue].(*types.AttributeValueMemberB); ok {
		c.value = b.Value
	}
	return c, nil
}

// A condition is what must hold of the item for a write to happen.
type condition struct {
	text   string
	names  map[string]string
	values item
}

// isAbsent holds when there is no item, or an expired one. past is the latest
// end that has come on the clocks of all processes.
const isAbsent = "attribute_not_exists(#id) OR #expires <= :past"

func (s *Store) past(now time.Time) types.AttributeValue {
	return number(now.Add(-s.skew).UnixMicro())
}

// unchanged holds when the cell is still what it was taken for at a time.
func (s *Store) unchanged(old cell, now time.Time) condition {
	if s.at(old, now).state == absent {
		return condition{
			isAbsent, map[string]string{"#id": attrID, "#expires": attrExpires},
			item{":past": s.past(now)},
		}
	}
	return condition{
		"#rev = :rev", map[string]string{"#rev": attrRev},
		item{":rev": &types.AttributeValueMemberS{Value: old.rev}},
	}
}

// claimedBy holds when the cell is claimed under token, or absent.
func (s *Store) claimedBy(token string, now time.Time) condition {
	return condition{
		isAbsent + " OR #state = :claimed AND #token = :token",
		map[string]string{"#id": attrID, "#expires": attrExpires, "#state": attrState, "#token": attrToken},
		item{
			":past":    s.past(now),
			":claimed": number(claimed),
			":token":   &types.AttributeValueMemberS{Value: token},
		},
	}
}

// put writes c if the condition holds. If it does not, put writes nothing and
// returns the cell that it found. DynamoDB sends that cell along with the
// refusal. Some of its imitations do not, and then put reads the cell.
func (s *Store) put(ctx context.Context, key string, c cell, only condition) (found cell, written bool, err error) {
	_, err = s.client.PutItem(ctx, &dynamodb.PutItemInput{
		TableName:                           &s.table,
		Item:                                s.encode(key, c),
		ConditionExpression:                 &only.text,
		ExpressionAttributeNames:            only.names,
		ExpressionAttributeValues:           only.values,
		ReturnValuesOnConditionCheckFailure: types.ReturnValuesOnConditionCheckFailureAllOld,
	})
	var refused *types.ConditionalCheckFailedException
	switch {
	case !errors.As(err, &refused):
		return cell{}, err == nil, err
	case len(refused.Item) > 0:
		found, err = decode(refused.Item)
	default:
		found, err = s.load(ctx, key)
	}
	return found, false, err
}

// load reads the cell of key. The read is a consistent one: any other may miss a
// write that was answered before.
func (s *Store) load(ctx context.Context, key string) (cell, error) {
	out, err := s.client.GetItem(ctx, &dynamodb.GetItemInput{
		TableName:      &s.table,
		Key:            item{attrID: &types.AttributeValueMemberS{Value: key}},
		ConsistentRead: aws.Bool(true),
	})
	if err != nil {
		return cell{}, err
	}
	return decode(out.Item)
}
