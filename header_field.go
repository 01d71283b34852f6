package idempotency

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// What a header field does to the headers that outer middleware has set. In the
// stored form an op takes two bits.
const (
	opSet     = 0 // replaces
	opAdd     = 1 // follows
	opDelete  = 2 // removes
	opSetList = 3 // in the stored form: replaces, with another number of values than one
)

// A headerField is one difference that the handler made to the header.
// Differences are recorded, and not the header as a whole: on a replay, what
// outer middleware has set (a request id, CORS, Vary) is that of the current
// request, neither doubled nor stale.
type headerField struct {
	op     byte
	name   string // as it stands in the map, canonical or not
	values []string

	transient bool // sent, but not kept for replay
}

// apply makes the difference to h. An opAdd gets a slice of its own: two
// headers that outer middleware has set may share a backing array.
func (f *headerField) apply(h http.Header) {
	switch f.op {
	case opSet:
		h[f.name] = f.values
	case opAdd:
		h[f.name] = append(slices.Clip(h[f.name]), f.values...)
	case opDelete:
		delete(h, f.name)
	}
}

// cloneFields copies the values too. Its result goes into maps whose users may
// change values in place, and the original is still to be stored.
func cloneFields(fields []headerField) []headerField {
	fields = slices.Clone(fields)
	for i := range fields {
		fields[i].values = slices.Clone(fields[i].values)
	}
	return fields
}

// applyFields makes all differences to h.
func applyFields(h http.Header, fields []headerField) {
	for i := range fields {
		fields[i].apply(h)
	}
}

// isConnectionLevel reports whether a header belongs to the connection (RFC
// 9110, section 7.6.1) and not to the response. connection has the further ones
// that the Connection header names. A replay goes over another connection,
// perhaps of another version of HTTP.
func isConnectionLevel(name string, connection map[string]bool) bool {
	switch name = http.CanonicalHeaderKey(name); name {
	case "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info",
		"Proxy-Authorization", "Proxy-Connection", "Te", "Transfer-Encoding", "Upgrade":
		return true
	}
	return connection[name]
}

// namesIn returns the header names in a header that lists names, in canonical
// form. It is a set, because a service behind a proxy decides how many headers
// a response has and how many names are listed: a search of the list for each
// header took seconds for 400 KB of both.
func namesIn(lines []string) (names map[string]bool) {
	for _, line := range lines {
		for name := range strings.SplitSeq(line, ",") {
			if name = strings.TrimSpace(name); name == "" {
				continue
			}
			if names == nil {
				names = make(map[string]bool)
			}
			names[http.CanonicalHeaderKey(name)] = true
		}
	}
	return names
}

// markTransient marks the fields that are not kept for replay. size is that of
// the body. A Content-Length of another size would break the replay: net/http
// cuts a longer body, and a client waits for the rest of a shorter one.
func markTransient(fields []headerField, keep func(string) bool, connection map[string]bool, size int64) {
	for i := range fields {
		f := &fields[i]
		name := strings.TrimPrefix(f.name, http.TrailerPrefix)
		wrongLength := len(f.values) > 0 && strings.EqualFold(name, "Content-Length") &&
			!slices.Equal(f.values, []string{strconv.FormatInt(size, 10)})
		f.transient = wrongLength || isConnectionLevel(name, connection) || !keep(name)
	}
}

// A headerScratch holds the usual header without an allocation.
type headerScratch struct {
	fields [4]headerField
	values [4]string
}

// difference returns what turns base into header. The values are copied: the
// handler may go on changing them. A list that begins with the values of base
// is an opAdd, so that a Vary of outer middleware is not stored and replayed
// twice.
func (s *headerScratch) difference(base, header http.Header) []headerField {
	backing, fields := s.values[:0], s.fields[:0]
	for name, values := range header {
		f := headerField{op: opSet, name: name}
		if outer, ok := base[name]; ok {
			if slices.Equal(outer, values) {
				continue
			}
			if len(outer) > 0 && len(outer) < len(values) && slices.Equal(outer, values[:len(outer)]) {
				f.op, values = opAdd, values[len(outer):]
			}
		}
		backing = append(backing, values...)
		f.values = slices.Clip(backing[len(backing)-len(values):])
		fields = append(fields, f)
	}
	for name := range base {
		if _, ok := header[name]; !ok {
			fields = append(fields, headerField{op: opDelete, name: name})
		}
	}
	return fields
}
