package idempotency

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
)

// A multipartType is a Content-Type with the value of its boundary parameter
// taken out.
type multipartType struct {
	before, boundary, after string
}

// parseMultipartType returns ok if the boundary is beyond doubt: there is one
// Content-Type line, mime.ParseMediaType finds a boundary in it, and the
// boundary stands in the line as it is. Any other body is compared byte by
// byte.
func parseMultipartType(lines []string) (t multipartType, ok bool) {
	const kind, parameter = "multipart/", "boundary="
	if len(lines) != 1 || len(lines[0]) < len(kind) || !strings.EqualFold(lines[0][:len(kind)], kind) {
		return t, false
	}
	_, params, err := mime.ParseMediaType(lines[0])
	boundary := params["boundary"]
	if err != nil || !isUsableBoundary(boundary) {
		return t, false
	}
	at := indexFold(lines[0], parameter)
	if at < 0 || strings.IndexByte("; \t", lines[0][at-1]) < 0 {
		return t, false // such as boundary*=, boundary = or x-boundary=
	}
	before, value := lines[0][:at+len(parameter)], lines[0][at+len(parameter):]
	after, ok := strings.CutPrefix(value, `"`+boundary+`"`)
	if !ok {
		after, ok = strings.CutPrefix(value, boundary)
	}
	if !ok || indexFold(after, parameter) >= 0 {
		return t, false // another parameter has "boundary=" in its value
	}
	return multipartType{before, boundary, after}, true
}

// formBoundary returns the boundary of a body that was not parsed outside, or "".
func formBoundary(r *http.Request) string {
	if r.MultipartForm != nil {
		return ""
	}
	t, _ := parseMultipartType(r.Header["Content-Type"])
	return t.boundary
}

// isUsableBoundary reports whether s is a boundary of RFC 2046, section 5.1.1,
// without the space and the colon. A parser may take a space at the end of a
// boundary for padding. A line that begins with a boundary with a colon may be
// taken for the header of a part, and would then be content.
func isUsableBoundary(s string) bool {
	for _, c := range []byte(s) {
		if !isAlphanumeric(c) && strings.IndexByte("'()+_,-./=?", c) < 0 {
			return false
		}
	}
	return s != "" && len(s) <= 70
}

// indexFold is strings.Index without regard to case.
func indexFold(s, part string) int {
	for i := range len(s) - len(part) + 1 {
		if strings.EqualFold(s[i:i+len(part)], part) {
			return i
		}
	}
	return -1
}

// A formHash hashes a multipart body without its boundaries, so that a form has
// one hash however often a client encodes it. Every place where the boundary
// follows two dashes ends a segment, and the hash is that of the list of
// segments. All other bytes count: headers and contents of parts, line ends,
// and what comes before the first part.
//
// Two forms with one list of segments have the same parts if the boundaries
// stand only where every parser sees the end of a part. That is so in what
// encoders write: "--B" CRLF, then parts that end with CRLF "--B" CRLF or CRLF
// "--B--", then at most a CRLF. A body that has the boundary anywhere else, or
// does not end like that, is irregular. In the hash of an irregular body the
// boundary counts, so that it equals only a body of the same bytes. The hash
// looks for no further boundary then. A boundary every few bytes, which no
// encoder writes, would cost a hundred times as much as its bytes.
//
// The hash does not depend on how the body is cut into writes.
type formHash struct {
	delimiter []byte // two dashes and the boundary
	pending   int    // that many bytes of delimiter are the end of what was written
	read      int64  // what extent tells, without pending
	irregular bool

	boundaries int               // how many were met
	chain      [sha256.Size]byte // of the identity and all segments before the last boundary
	segment    hash.Hash         // of what came after it
	size       int64             // of the segment
	head, tail []byte            // the first five and the last four bytes of the segment
}

const (
	dashes      = "--"
	lineEnd     = "\r\n"
	beforeParts = lineEnd + dashes // what stands before a boundary
	headBytes   = len(dashes) + len(lineEnd) + 1
)

// maxParts is how many parts a form may have before it is irregular. Hashing
// that many takes a few milliseconds. The parser of Go takes 1,000.
const maxParts = 10_000

func newFormHash(identity []byte, boundary string) *formHash {
	return &formHash{delimiter: []byte(dashes + boundary), chain: sha256.Sum256(identity), segment: sha256.New()}
}

// Write implements io.Writer. It holds back bytes at the end of p with which a
// boundary may begin. They are the first bytes of the delimiter, so their
// number is enough.
func (f *formHash) Write(p []byte) (int, error) {
	written := len(p)
	if f.pending > 0 {
		p = f.resume(p)
	}
	for len(p) > 0 {
		if f.irregular {
			f.add(p)
			break
		}
		i := bytes.Index(p, f.delimiter)
		if i < 0 {
			f.hold(p)
			break
		}
		f.add(p[:i+len(dashes)])
		f.endSegment()
		p = p[i+len(f.delimiter):]
	}
	return written, nil
}

// resume decides what the pending bytes are, and returns the rest of p. A
// boundary that begins in them ends in the window, which is no longer than two
// delimiters. When p is too short to tell, all of the window is held back or
// added, and nothing is left.
func (f *formHash) resume(p []byte) []byte {
	pending := f.delimiter[:f.pending]
	n := min(len(p), len(f.delimiter)-1)
	window := slices.Concat(pending, p[:n])
	f.pending = 0
	i := bytes.Index(window, f.delimiter)
	switch {
	case i >= 0:
		f.add(window[:i+len(dashes)])
		f.endSegment()
		return p[i+len(f.delimiter)-len(pending):]
	case n == len(p):
		f.hold(window)
		return nil
	}
	f.add(pending)
	return p
}

// hold adds p, but for the longest end with which a boundary may begin.
func (f *formHash) hold(p []byte) {
	end := p[max(0, len(p)-len(f.delimiter)+1):]
	for !bytes.HasPrefix(f.delimiter, end) {
		end = end[1:]
	}
	f.pending = len(end)
	f.add(p[:len(p)-len(end)])
}

// add adds p to the segment.
func (f *formHash) add(p []byte) {
	f.segment.Write(p)
	f.size += int64(len(p))
	f.read += int64(len(p))
	f.head = append(f.head, p[:min(len(p), headBytes-len(f.head))]...)
	const n = len(beforeParts)
	f.tail = append(f.tail, p[max(0, len(p)-n):]...)
	f.tail = append(f.tail[:0], f.tail[max(0, len(f.tail)-n):]...)
}

// endSegment is called at each boundary. The first one may stand at the
// beginning of the body. Each further one ends a part, which has at least the
// end of the line of the boundary before it, and a line end of its own.
func (f *formHash) endSegment() {
	regular := string(f.tail) == beforeParts
	if f.boundaries == 0 {
		regular = regular || f.size == int64(len(dashes))
	} else {
		regular = regular && f.size >= int64(len(lineEnd+beforeParts)) && bytes.HasPrefix(f.head, []byte(lineEnd))
	}
	f.irregular = !regular || f.boundaries > maxParts
	f.chain = sha256.Sum256(f.segment.Sum(f.chain[:]))
	f.segment.Reset()
	f.size, f.head, f.tail = 0, f.head[:0], f.tail[:0]
	f.boundaries++
	f.read++
}

// sum implements bodyHash.
func (f *formHash) sum(whole bool) []byte {
	pending := f.delimiter[:f.pending]
	b := f.segment.Sum(f.chain[:])
	b = appendField(b, pending)
	if f.irregular || f.undecided() || !f.mayEnd(slices.Concat(f.head, pending), whole) {
		b = appendField(b, f.delimiter)
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

// mayEnd reports whether a regular form may have a last segment that begins
// with head. The end of a whole form is that of its last boundary. When the
// handler stopped before the end, it may have stopped anywhere in a segment.
func (f *formHash) mayEnd(head []byte, whole bool) bool {
	const end = dashes + lineEnd
	switch {
	case whole:
		return f.boundaries > 0 && (string(head) == dashes || string(head) == end)
	case f.boundaries == 0:
		return true
	}
	return strings.HasPrefix(end, string(head)) || strings.HasPrefix(lineEnd, string(head)) ||
		bytes.HasPrefix(head, []byte(lineEnd))
}

// extent implements bodyHash. Each boundary counts as one byte, so that a retry
// with a boundary of another length has the same extent.
func (f *formHash) extent() int64 { return f.read + int64(f.pending) }

// undecided implements bodyHash. Two dashes are no part of a boundary.
func (f *formHash) undecided() bool { return f.pending > len(dashes) }

// appendParsedForm appends a hash of a form that an outer middleware has
// parsed: names, values, and the names, headers and contents of files. The order
// of values and files under one name counts. The order of names does not, since
// a parsed form has none. It reads each file again, from memory or from disk.
func appendParsedForm(b []byte, form *multipart.Form) ([]byte, error) {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(form.Value)) {
		h.Write(appendFields(appendField([]byte{'v'}, name), form.Value[name]))
	}
	for _, name := range slices.Sorted(maps.Keys(form.File)) {
		files := form.File[name]
		h.Write(binary.AppendUvarint(appendField([]byte{'f'}, name), uint64(len(files))))
		for _, file := range files {
			if err := hashFile(h, file); err != nil {
				return nil, fmt.Errorf("file %q of a form that was parsed outside of the middleware: %w", name, err)
			}
		}
	}
	return h.Sum(b), nil
}

// hashFile adds a file to h. The hash of the content has a fixed length, so it
// needs no other mark of its end.
func hashFile(h hash.Hash, file *multipart.FileHeader) error {
	b := appendField(nil, file.Filename)
	b = binary.AppendUvarint(b, uint64(len(file.Header)))
	for _, name := range slices.Sorted(maps.Keys(file.Header)) {
		b = appendFields(appendField(b, name), file.Header[name])
	}
	content, err := file.Open()
	if err != nil {
		return err
	}
	defer func() { _ = content.Close() }()
	sum := sha256.New()
	if _, err := io.Copy(sum, content); err != nil {
		return err
	}
	h.Write(sum.Sum(b))
	return nil
}
