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

// headerField is one difference that the handler made to the header.
type headerField struct {
	op     byte
	name   string // as it stands in the map, canonical or not
	values []string

	transient bool // sent, but not kept for replay
}

// apply makes the difference to h.
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

// cloneFields copies the values too, for maps in which they may be changed in
// place.
func cloneFields(fields []headerField) []headerField {
	fields = slices.Clone(fields)
	for i := range fields {
		fields[i].values = slices.Clone(fields[i].values)
	}
	return fields
}

func applyFields(h http.Header, fields []headerField) {
	for i := range fields {
		fields[i].apply(h)
	}
}

// isConnectionLevel reports whether a header belongs to the connection (RFC
// 9110, section 7.6.1) and not to the response; connection are the values of
// the Connection header.
func isConnectionLevel(name string, connection []string) bool {
	switch http.CanonicalHeaderKey(name) {
	case "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authentication-Info",
		"Proxy-Authorization", "Proxy-Connection", "Te", "Transfer-Encoding", "Upgrade":
		return true
	}
	for _, line := range connection {
		for named := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(named), name) {
				return true
			}
		}
	}
	return false
}

// markTransient marks the fields that are not kept for replay. size is that of
// the body: a Content-Length that is not the body's would break the replay.
func markTransient(fields []headerField, keep func(string) bool, connection []string, size int64) {
	for i := range fields {
		f := &fields[i]
		name := strings.TrimPrefix(f.name, http.TrailerPrefix)
		wrongLength := len(f.values) > 0 && strings.EqualFold(name, "Content-Length") &&
			!slices.Equal(f.values, []string{strconv.FormatInt(size, 10)})
		f.transient = wrongLength || isConnectionLevel(name, connection) || !keep(name)
	}
}
