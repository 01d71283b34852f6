package idempotency

import "strings"

// How a byte of a path or a query is written (RFC 3986, section 2).
const (
	encoded    = iota // as "%XX": the byte stands for itself nowhere in a URI
	delimiter         // a "/" and a "%2F" differ, so both stay as they are
	unreserved        // a "~" and a "%7E" are the same
)

// uriBytes tells for each byte how it is written. The percent sign is a
// delimiter, so that "%25" stays.
var uriBytes = func() (table [256]byte) {
	for c := range table {
		switch {
		case isAlphanumeric(byte(c)) || strings.IndexByte("-._~", byte(c)) >= 0:
			table[c] = unreserved
		case strings.IndexByte("%/?#[]@!$&'()*+,;=:", byte(c)) >= 0:
			table[c] = delimiter
		}
	}
	return table
}()

// normalize returns one spelling of all that are equivalent by RFC 3986,
// section 6.2.2: hex digits are in upper case, and unreserved characters are
// decoded. What no URI may contain, as a "|" or a byte of UTF-8, is encoded: some
// clients send it as it is. Everything else stays: "%2F" and "/" may be two
// resources, and so may "/a" and "/a/".
//
// Where two hex digits do not follow a percent sign, s is no part of a URI and
// stays as it is. To decode the rest could make an escape of it: "%2%35" would
// become the "%25" of another request.
func normalize(s string) string {
	for i := range len(s) {
		if c := s[i]; c == '%' || uriBytes[c] == encoded {
			return normalizeFrom(s, i)
		}
	}
	return s
}

// normalizeFrom is normalize when all before first is normal.
func normalizeFrom(s string, first int) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	b.Grow(len(s) + 8)
	b.WriteString(s[:first])
	for i := first; i < len(s); i++ {
		c, escaped := s[i], false
		if c == '%' {
			if i+2 >= len(s) || unhex(s[i+1])|unhex(s[i+2]) >= 16 {
				return s
			}
			c, escaped, i = unhex(s[i+1])<<4|unhex(s[i+2]), true, i+2
		}
		if kind := uriBytes[c]; kind == encoded || escaped && kind == delimiter {
			b.Write([]byte{'%', hexDigits[c>>4], hexDigits[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// unhex returns the value of a hex digit, or 16.
func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 16
}
