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

// numberedHeaders are what the ops from 0x20 on set; the value follows where
// there is none here. They are written out, for it is the records of earlier
// releases that say what a number means.
var numberedHeaders = []string{
	"Content-Type: application/json", "Content-Type: application/json; charset=utf-8",
	"Content-Type: application/json; charset=UTF-8", "Content-Type: application/problem+json",
	"Content-Type: text/plain; charset=utf-8", "Content-Type: text/html; charset=utf-8", "Content-Type",
	"Cache-Control: no-store", "Cache-Control: no-cache", "Cache-Control", "X-Content-Type-Options: nosniff",
	"X-Content-Type-Options", "Access-Control-Allow-Origin: *", "Access-Control-Allow-Origin",
	"Access-Control-Expose-Headers", "Content-Disposition", "Content-Encoding", "Content-Language",
	"Content-Length", "Content-Location", "Content-Security-Policy", "Date", "Deprecation", "Etag", "Expires",
	"Idempotency-Key", "Last-Modified", "Link", "Location", "Pragma", "Ratelimit", "Ratelimit-Policy",
	"Referrer-Policy", "Request-Id", "Retry-After", "Server", "Server-Timing", "Strict-Transport-Security",
	"Sunset", "Traceparent", "Vary", "X-Correlation-Id", "X-Frame-Options", "X-Powered-By",
	"X-Ratelimit-Limit", "X-Ratelimit-Remaining", "X-Ratelimit-Reset", "X-Request-Id",
}

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
func (r recordReader) field(values *int) (op byte, name string, list []string) {
	op, count := r.byte(), 1
	if op < 0x20 {
		insist(op <= 2)
		name = string(r.bytes(r.short()))
		count = r.short()
	}
	*values -= count
	insist(*values >= 0)
	if op < 0x20 {
		for range count {
			list = append(list, string(r.bytes(r.short())))
		}
		return op, name, list
	}
	insist(int(op-0x20) < len(numberedHeaders))
	name, value, _ := strings.Cut(numberedHeaders[op-0x20], ": ")
	if value == "" {
		value = string(r.bytes(r.short()))
	}
	return 0, name, []string{value}
}

// fields reads one list of changes.
func (r recordReader) fields(values *int) (changes []func(h http.Header), prefixed []bool) {
	n := r.short()
	insist(n <= r.Len()) // the rest is checked one by one
	for range n {
		op, name, list := r.field(values)
		changes = append(changes, func(h http.Header) {
			switch op {
			case 0:
				h[name] = list
			case 1:
				h[name] = slices.Concat(h[name], list)
			case 2:
				delete(h, name)
			}
		})
		prefixed = append(prefixed, op == 0 && strings.HasPrefix(name, http.TrailerPrefix))
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
			if p != errRecord {
				panic(p)
			}
			got = replayedRecord{refused: "record_unreadable"}
		}
	}()
	r := recordReader{bytes.NewReader(value)}
	insist(r.byte() == 1)
	kind := r.byte()
	insist(kind == 1 || kind == 2 || kind == 4)
	if kind != 4 {
		got.status = r.number()
		insist(got.status == 101 || 200 <= got.status && got.status <= 999 || got.status == 0 && kind == 1)
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
	b := append(binary.AppendUvarint([]byte{1, 1}, status), 0)
	b = append(binary.AppendUvarint(b, uint64(len(head))), head...)
	return append(binary.AppendUvarint(b, uint64(len(body))), body...)
}

// recordSeeds are records of every shape.
func recordSeeds(t require.TestingT) (seeds [][]byte) {
	for _, golden := range []string{idemtest.GoldenResponse, idemtest.GoldenCommon} {
		value, err := hex.DecodeString(golden)
		require.NoError(t, err)
		seeds = append(seeds, value)
	}
	seeds = append(seeds,
		[]byte{1, 2, 0xc9, 1, 0},              // not stored
		[]byte{1, 3, 0, 0},                    // sealed
		[]byte{1, 4, 0}, []byte{1, 4, 1, 'd'}, // of an unknown outcome
		[]byte{1, 1, 0xc9, 1, 1, 'd', 3, 0, 0, 0, 2, 'h', 'i'},       // with a digest
		aRecord(0, 0, "\x00", "\x00", "hi"),                          // an implied status
		aRecord(0, 1, "\x00", "\x01\x00\x03X-T\x01\x01v", ""),        // and one before trailers, as after a flush
		aRecord(201, 2, "\x01\x00\x03X-A\x02\x011\x012", "\x00", ""), // two values
		[]byte{1, 2, 0, 0}, // no status, and not stored
		aRecord(201, 1, "\x01\x03\x03X-A\x01\x01v", "\x00", ""), // an unknown op
		aRecord(201, 1, "\x00", "\x01\x3c", ""),                 // Location without a value
		aRecord(201, 2, "\x02\x20\x21\x00", "\x00", ""),         // one name twice
	)
	for _, op := range []string{"\x00", "\x01", "\x02"} { // set, add, delete
		seeds = append(seeds,
			aRecord(201, 1, "\x01"+op+"\x06X-Gone\x01\x01v", "\x00", "hi"),
			aRecord(201, 1, "\x00", "\x01"+op+"\x0cTrailer:X-T3\x01\x01v", ""))
	}
	for i, header := range numberedHeaders {
		field := "\x01" + string([]byte{0x20 + byte(i)})
		if !strings.Contains(header, ": ") {
			field += "\x01v"
		}
		seeds = append(seeds, aRecord(201, 1, field, "\x00", "hi"))
	}
	return append(seeds, aRecord(201, 1, "\x01"+string([]byte{0x20 + byte(len(numberedHeaders))})+"\x01v", "\x00", ""))
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
		value := strings.Repeat("v", size-10)
		field := "\x01\x00\x01X\x01" + string(binary.AppendUvarint(nil, uint64(len(value)))) + value
		return aRecord(201, 1, field, "\x00", "")
	}
	for name, row := range map[string]struct {
		value   []byte
		refused string
		status  int
		sent    http.Header
	}{
		"a number": {value: aRecord(201, 1, "\x01\x20", "\x00", ""), status: 201,
			sent: http.Header{"Content-Type": {"application/json"}}},
		"a number and a value": {value: aRecord(201, 1, "\x01\x4f\x017", "\x00", ""), status: 201,
			sent: http.Header{"X-Request-Id": {"7"}}},
		"a number too high":      {value: aRecord(201, 1, "\x01\x50\x017", "\x00", ""), refused: "record_unreadable"},
		"a value too many":       {value: aRecord(201, 0, "\x01\x20", "\x00", ""), refused: "record_unreadable"},
		"a status of 103":        {value: aRecord(103, 0, "\x00", "\x00", ""), refused: "record_unreadable"},
		"an implied status":      {value: aRecord(0, 0, "\x00", "\x00", "hi"), status: 200, sent: http.Header{}},
		"an unknown outcome":     {value: []byte{1, 4, 1, 'd'}, refused: "outcome_unknown"},
		"more than unknown":      {value: []byte{1, 4, 1, 'd', 0}, refused: "record_unreadable"},
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
