package fuzz

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// A recordStore has one record for every key.
type recordStore struct{ value []byte }

func (s recordStore) Acquire(_ context.Context, _ string, c idempotency.Claim) (idempotency.Record, error) {
	return idempotency.Record{State: idempotency.Completed, Fingerprint: c.Fingerprint, Value: s.value}, nil
}

func (recordStore) Complete(context.Context, string, string, idempotency.Result) error {
	return errors.New("not to be called")
}

func (recordStore) Release(context.Context, string, string, time.Duration) error {
	return errors.New("not to be called")
}

// recordReader reads the stored form as its description in response.go says,
// and panics with errRecord where it is not that.
type recordReader struct{ *bytes.Reader }

var errRecord = errors.New("not a record")

func insist(ok bool) {
	if !ok {
		panic(errRecord)
	}
}

func (r recordReader) byte() byte {
	b, err := r.ReadByte()
	insist(err == nil)
	return b
}

func (r recordReader) number() int {
	n, err := binary.ReadUvarint(r)
	insist(err == nil && n <= 1<<40)
	return int(n)
}

// short is a number within the head, which has five bytes at most.
func (r recordReader) short() int {
	before := r.Len()
	n := r.number()
	insist(before-r.Len() <= 5)
	return n
}

func (r recordReader) bytes(n int) []byte {
	insist(n <= r.Len())
	b := make([]byte, n)
	_, _ = io.ReadFull(r, b)
	return b
}

// field reads one change, and takes its values from those that are left.
func (r recordReader) field(values *int) (op int, name string, list []string) {
	n := r.short()
	op, name = n%4, string(r.bytes(n/4))
	count := 0
	switch op {
	case 0:
		count = 1
	case 1, 3:
		count = r.short()
	}
	*values -= count
	insist(*values >= 0)
	for range count {
		list = append(list, string(r.bytes(r.short())))
	}
	return op, name, list
}

// fields reads one list of changes.
func (r recordReader) fields(values *int) (changes []func(h http.Header), prefixed []bool) {
	n := r.short()
	insist(n <= r.Len()) // the rest is checked one by one
	for range n {
		op, name, list := r.field(values)
		changes = append(changes, func(h http.Header) {
			switch op {
			case 0, 3:
				h[name] = list
			case 1:
				h[name] = slices.Concat(h[name], list)
			case 2:
				delete(h, name)
			}
		})
		prefixed = append(prefixed, (op == 0 || op == 3) && strings.HasPrefix(name, http.TrailerPrefix))
	}
	return changes, prefixed
}

// replayedRecord is what a record is answered with.
type replayedRecord struct {
	refused     string // the code of the problem
	status      int
	sent, after http.Header
	body        string
}

// readRecord reads value, within an outer header.
func readRecord(value []byte, outer http.Header) (got replayedRecord) {
	defer func() {
		if p := recover(); p != nil {
			if err, ok := p.(error); !ok || !errors.Is(err, errRecord) {
				panic(p)
			}
			got = replayedRecord{refused: "record_unreadable"}
		}
	}()
	r := recordReader{bytes.NewReader(value)}
	first := r.byte()
	insist(first>>4 == 1)
	kind := first & 15
	insist(kind == 1 || kind == 2 || kind == 4)
	if kind != 4 {
		got.status = r.number()
		insist(got.status == 101 || 200 <= got.status && got.status <= 999 || got.status == 0) // 0: implied, or not known
	}
	r.bytes(r.number()) // the digest, of a large body only
	switch kind {
	case 2:
		insist(r.Len() == 0)
		return replayedRecord{refused: "response_not_stored", status: got.status}
	case 4:
		insist(r.Len() == 0)
		return replayedRecord{refused: "outcome_unknown"}
	}
	size := r.number()
	insist(size <= 64<<10)
	head := recordReader{bytes.NewReader(r.bytes(size))}
	values := head.short()
	insist(values <= head.Len())
	fields, _ := head.fields(&values)
	trailers, prefixed := head.fields(&values)
	insist(head.Len() == 0)
	got.body = string(r.bytes(r.number()))
	insist(r.Len() == 0)
	got.replay(outer, fields, trailers, prefixed)
	return got
}

// replay makes the changes to outer.
func (got *replayedRecord) replay(outer http.Header, fields, trailers []func(http.Header), prefixed []bool) {
	for _, change := range fields {
		change(outer)
	}
	outer["Idempotent-Replayed"] = []string{"true"}
	for i, change := range trailers {
		if prefixed[i] {
			change(outer)
		}
	}
	got.sent = plain(outer)
	for _, change := range trailers {
		change(outer)
	}
	got.after = plain(outer)
	if got.status == 0 {
		got.status = http.StatusOK // which the handler left to be implied
	}
}

// aRecord is a response with a head that has that many values and these fields
// and trailers, each list with its number.
func aRecord(status uint64, values byte, fields, trailers, body string) []byte {
	head := append([]byte{values}, fields+trailers...)
	b := append(binary.AppendUvarint([]byte{0x11}, status), 0)
	b = append(binary.AppendUvarint(b, uint64(len(head))), head...)
	return append(binary.AppendUvarint(b, uint64(len(body))), body...)
}

// What a header field is in the stored form, as response.go describes it.
const (
	setsOne  = 0
	adds     = 1
	deletes  = 2
	setsList = 3
)

// aField is a field with its op: values are as they are stored.
func aField(op byte, name, values string) string {
	return string(binary.AppendUvarint(nil, uint64(len(name))<<2|uint64(op))) + name + values
}

// recordSeeds are records of every shape.
func recordSeeds(t require.TestingT) (seeds [][]byte) {
	value, err := hex.DecodeString(idemtest.GoldenResponse)
	require.NoError(t, err)
	seeds = append(seeds, value,
		[]byte{0x12, 0xc9, 1, 0},              // not stored
		[]byte{0x13, 0, 0},                    // sealed
		[]byte{0x14, 0}, []byte{0x14, 1, 'd'}, // of an unknown outcome
		[]byte{0x11, 0xc9, 1, 1, 'd', 3, 0, 0, 0, 2, 'h', 'i'},                        // with a digest
		aRecord(0, 0, "\x00", "\x00", "hi"),                                           // an implied status
		aRecord(0, 1, "\x00", "\x01"+aField(setsOne, "X-T", "\x01v"), ""),             // and one before trailers, as after a flush
		aRecord(201, 2, "\x01"+aField(setsList, "X-A", "\x02\x011\x012"), "\x00", ""), // two values
		[]byte{0x12, 0, 0}, // not stored, and its status is not known
		[]byte{0x12, 1, 0}, // not stored, with an impossible status
		aRecord(201, 0, "\x01"+aField(setsList, "X-A", "\x00"), "\x00", ""),                             // a list of nothing
		aRecord(201, 1, "\x01"+aField(setsList, "X-A", "\x01\x01v"), "\x00", ""),                        // a list of one
		aRecord(201, 1, "\x00", "\x01"+aField(setsOne, "Location", ""), ""),                             // no value
		aRecord(201, 2, "\x02"+aField(setsOne, "A", "\x011")+aField(setsOne, "A", "\x012"), "\x00", ""), // one name twice
		aRecord(201, 1, "\x01"+aField(setsOne, strings.Repeat("X-Long-", 9), "\x01v"), "\x00", "hi"),
	)
	for op, values := range map[byte]string{setsOne: "\x01v", adds: "\x01\x01v", deletes: "", setsList: "\x01\x01v"} {
		seeds = append(seeds,
			aRecord(201, 1, "\x01"+aField(op, "X-Gone", values), "\x00", "hi"),
			aRecord(201, 1, "\x00", "\x01"+aField(op, "Trailer:X-T3", values), ""))
	}
	return seeds
}

// FuzzStoredFormReader compares the replay of anything with what a second
// reader of the stored form makes of it.
func FuzzStoredFormReader(f *testing.F) {
	for _, value := range recordSeeds(f) {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value []byte) { checkReader(t, value, value) })
}

// checkReader compares the replay of a stored value with what readRecord makes
// of value, which is the same.
func checkReader(t require.TestingT, stored, value []byte) {
	outer := func() http.Header { return http.Header{"X-Gone": {"outer"}, "X-More": {"1"}, "Vary": {"outer"}} }
	want := readRecord(value, outer())
	var refused *idempotency.Error
	opts := idempotency.Options{ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err *idempotency.Error) { refused = err }}
	c := idemtest.NewClient(recordStore{stored}, &opts, nil)
	w := &wireWriter{header: outer()}
	c.Handler.ServeHTTP(w, &http.Request{Method: "POST", RequestURI: "/", ProtoMajor: 1, Header: http.Header{"Idempotency-Key": {"a"}}})
	require.Zero(t, c.Runs())
	if want.refused != "" {
		require.NotNil(t, refused)
		require.Equal(t, want, replayedRecord{refused: refused.Code, status: refused.OriginalStatus})
		return
	}
	require.Nil(t, refused)
	w.WriteHeader(http.StatusOK) // as net/http does when nobody has
	require.Equal(t, want, replayedRecord{status: w.status, sent: plain(w.sent), after: plain(w.header), body: string(w.body)})
}

// The reference reader must itself be right about what it is there for.
func TestReferenceReader(t *testing.T) {
	headOf := func(size int) []byte {
		value := strings.Repeat("v", size-8)
		field := "\x01" + aField(setsOne, "X", string(binary.AppendUvarint(nil, uint64(len(value))))+value)
		return aRecord(201, 1, field, "\x00", "")
	}
	for name, row := range map[string]struct {
		value   []byte
		refused string
		status  int
		sent    http.Header
	}{
		"one value": {value: aRecord(201, 1, "\x01"+aField(setsOne, "X-A", "\x017"), "\x00", ""), status: 201,
			sent: http.Header{"X-A": {"7"}}},
		"two values": {value: aRecord(201, 2, "\x01"+aField(setsList, "X-A", "\x02\x017\x018"), "\x00", ""), status: 201,
			sent: http.Header{"X-A": {"7", "8"}}},
		"a value too many":       {value: aRecord(201, 0, "\x01"+aField(setsOne, "X-A", "\x017"), "\x00", ""), refused: "record_unreadable"},
		"a status of 103":        {value: aRecord(103, 0, "\x00", "\x00", ""), refused: "record_unreadable"},
		"an implied status":      {value: aRecord(0, 0, "\x00", "\x00", "hi"), status: 200, sent: http.Header{}},
		"an unknown outcome":     {value: []byte{0x14, 1, 'd'}, refused: "outcome_unknown"},
		"more than unknown":      {value: []byte{0x14, 1, 'd', 0}, refused: "record_unreadable"},
		"a head of 64 KiB":       {value: headOf(64 << 10), status: 201},
		"a head of 64 KiB and 1": {value: headOf(64<<10 + 1), refused: "record_unreadable"},
	} {
		t.Run(name, func(t *testing.T) {
			got := readRecord(row.value, http.Header{})
			require.Equal(t, row.refused, got.refused)
			require.Equal(t, row.status, got.status)
			if row.sent != nil {
				delete(got.sent, "Idempotent-Replayed")
				require.Equal(t, row.sent, got.sent)
			}
			checkReader(t, row.value, row.value)
		})
	}
}
