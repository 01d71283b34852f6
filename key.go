package idempotency

import "strings"

// maxKeyBytes is the longest key, after unquoting. Stripe's limit.
const maxKeyBytes = 255

// parseKey returns the key in the lines of the header. A key comes bare, or as
// the string item of RFC 9651 that draft-ietf-httpapi-idempotency-key-header
// asks for; both forms of a key are the same key. If there is none, detail
// tells the client why.
func parseKey(lines []string) (key, detail string) {
	if len(lines) > 1 {
		return "", "The idempotency key header appears more than once."
	}
	key = strings.Trim(strings.Join(lines, ""), " \t")
	if strings.HasPrefix(key, `"`) {
		var rest string
		var ok bool
		if key, rest, ok = cutString(key); !ok || !isParameters(rest) {
			return "", "The idempotency key is not a well-formed quoted string."
		}
	} else if !isBare(key) {
		return "", "An unquoted idempotency key must be visible ASCII without quotes, commas and spaces."
	}
	switch {
	case key == "":
		return "", "The idempotency key is empty."
	case len(key) > maxKeyBytes:
		return "", "The idempotency key is longer than 255 bytes."
	}
	return key, ""
}

// cutString takes the RFC 9651 string that s begins with and returns it
// unquoted, with what follows it.
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
// section 3.1.2. They mean nothing here, but what is not a parameter could be a
// second key that a proxy has joined to the first.
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
			if !ok || !isBare(strings.NewReplacer(" ", "", ",", "").Replace(text)) {
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

// isBare reports whether s is visible ASCII without quotes and commas.
func isBare(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == ',' {
			return false
		}
	}
	return true
}
