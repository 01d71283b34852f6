package idempotency_test

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

	"github.com/go-idempotency/idempotency"
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

func (recordStore) Release(context.Context, string, string) error {
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

// fields reads one list of changes.
func (r recordReader) fields(values *int) (changes []func(h http.Header), prefixed []bool) {
	n := r.short()
	insist(n <= r.Len()) // the rest is checked one by one
	for range n {
		op := r.byte()
		insist(op <= 2)
		name := string(r.bytes(r.short()))
		var list []string
		count := r.short()
		*values -= count
		insist(*values >= 0)
		for range count {
			list = append(list, string(r.bytes(r.short())))
		}
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

// replayed is what a record is answered with.
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
	insist(kind == 1 || kind == 2)
	got.status = r.number()
	insist(got.status == 101 || 200 <= got.status && got.status <= 999)
	r.bytes(r.number()) // the digest, of a large body only
	if kind == 2 {
		insist(r.Len() == 0)
		return replayedRecord{refused: "response_not_stored", status: got.status}
	}
	head := recordReader{bytes.NewReader(r.bytes(r.number()))}
	values := head.short()
	insist(values <= head.Len())
	fields, _ := head.fields(&values)
	trailers, prefixed := head.fields(&values)
	insist(head.Len() == 0)
	got.body = string(r.bytes(r.number()))
	insist(r.Len() == 0)

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
	return got
}

// FuzzStoredFormReader compares the replay of anything with what a second
// reader of the stored form makes of it.
func FuzzStoredFormReader(f *testing.F) {
	golden, err := hex.DecodeString(goldenResponse)
	require.NoError(f, err)
	f.Add(golden)
	f.Add([]byte{1, 2, 0xc9, 1, 0})
	f.Add([]byte{1, 1, 0xc9, 1, 1, 'd', 3, 0, 0, 0, 2, 'h', 'i'})
	for _, op := range []string{"\x00", "\x01", "\x02"} { // set, add, delete: the trailer X-T3
		f.Add([]byte("\x01\x01\xc9\x01\x00\x14\x01\x00\x01" + op + "\x0cTrailer:X-T3\x01\x01v\x00"))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		outer := func() http.Header { return http.Header{"X-Gone": {"outer"}, "X-More": {"1"}} }
		want := readRecord(value, outer())
		var refused *idempotency.Error
		opts := idempotency.Options{ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err *idempotency.Error) { refused = err }}
		c := newAPI(recordStore{value}, &opts, nil)
		w := &wireWriter{header: outer()}
		c.handler.ServeHTTP(w, &http.Request{Method: "POST", RequestURI: "/", ProtoMajor: 1, Header: http.Header{"Idempotency-Key": {"a"}}})
		require.Zero(t, c.runs())
		if want.refused != "" {
			require.NotNil(t, refused)
			require.Equal(t, want, replayedRecord{refused: refused.Code, status: refused.OriginalStatus})
			return
		}
		require.Nil(t, refused)
		require.Equal(t, want, replayedRecord{status: w.status, sent: plain(w.sent), after: plain(w.header), body: string(w.body)})
	})
}
