package idempotency

import "strings"

// maxKeyBytes is the longest key, after unquoting. It is the limit of Stripe,
// so a key that is valid there is valid here. The limit bounds what a client
// can make the server hash and log.
const maxKeyBytes = 255

// parseKey returns the key in the lines of the header. A key comes bare, as
// most clients send it, or as the string of RFC 9651, section 3.3.3, that
// draft-ietf-httpapi-idempotency-key-header asks for. Both forms of a key are
// the same key: a client library that is upgraded between two tries may change
// the form.
//
// When there is no valid key, detail tells the client why, with the name of the
// header. An invalid key is never passed through as if it were missing: the
// client believes that its request is protected.
func parseKey(lines []string, header string) (key, detail string) {
	// Several lines are as good as one with commas (RFC 9110, section 5.3), and
	// the middleware cannot know which of two keys the client means.
	if len(lines) > 1 {
		return "", "The " + header + " header appears more than once. Send it once."
	}
	key = strings.Trim(strings.Join(lines, ""), " \t")
	if strings.HasPrefix(key, `"`) {
		var rest string
		var ok bool
		if key, rest, ok = cutString(key); !ok || !isParameters(rest) {
			return "", "The " + header + " header is not a well-formed quoted string."
		}
	} else if !isBare(key) {
		return "", "An unquoted " + header + " must be visible ASCII without quotes, commas and spaces."
	}
	switch {
	case key == "":
		return "", "The " + header + " header is empty."
	case len(key) > maxKeyBytes:
		return "", "The key in the " + header + " header is longer than 255 bytes."
	}
	return key, ""
}

// cutString takes the RFC 9651 string that s begins with and returns it
// unquoted, with what follows it. It follows the parsing algorithm of section
// 4.2.5: a backslash escapes only a quote or a backslash, and every other use
// of it is an error.
func cutString(s string) (value, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], true
		case c == '\\':
			i++
			if i == len(s) || s[i] != '"' && s[i] != '\\' {
				return "", "", false
			}
			b.WriteByte(s[i])
		case c < ' ' || c > '~':
			return "", "", false
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}

// isParameters reports whether s is a list of parameters as in RFC 9651,
// section 3.1.2. Their names and values are ignored, as the draft defines none.
// But they are checked, because text that is no parameter could be a second key
// that a proxy has joined to the first.
//
// The check is wider than the RFC: a name is a token and a value is any bare
// text, a quoted string or a display string (section 3.3.8). A parameter that
// is a little wrong does no harm here.
func isParameters(s string) bool {
	for s != "" {
		name, ok := strings.CutPrefix(s, ";")
		if !ok {
			return false
		}
		name = strings.TrimLeft(name, " ")
		end := strings.IndexAny(name, ";=")
		if end < 0 {
			return isToken(name)
		}
		if !isToken(name[:end]) {
			return false
		}
		s = name[end:]
		value, ok := strings.CutPrefix(s, "=")
		if !ok {
			continue
		}
		if strings.HasPrefix(value, `"`) {
			if _, s, ok = cutString(value); !ok {
				return false
			}
			continue
		}
		if display, ok := strings.CutPrefix(value, `%"`); ok {
			text, rest, ok := strings.Cut(display, `"`)
			if !ok || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' || c > '~' }) {
				return false
			}
			s = rest
			continue
		}
		end = strings.IndexByte(value+";", ';')
		if end == 0 || !isBare(value[:end]) {
			return false
		}
		s = value[end:]
	}
	return true
}

// isBare reports whether s is visible ASCII without quotes and commas. A comma
// could join two keys, and a quote could be half of a quoted key.
func isBare(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == ',' {
			return false
		}
	}
	return true
}
