package fuzz

import (
	"errors"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// itemReader reads an RFC 9651 item by the algorithms of its section 4.2, which
// are written out here once more so that the parser has something to be
// compared with.
type itemReader struct {
	rest string
}

// stringItem reads a line that is a String with parameters.
func (r *itemReader) stringItem() (value string, ok bool) {
	r.rest = strings.TrimLeft(r.rest, " ")
	if value, ok = r.text(); !ok || !r.parameters() {
		return "", false
	}
	return value, strings.TrimLeft(r.rest, " ") == ""
}

func (r *itemReader) next() byte {
	if r.rest == "" {
		return 0
	}
	c := r.rest[0]
	r.rest = r.rest[1:]
	return c
}

func (r *itemReader) peek() byte {
	if r.rest == "" {
		return 0
	}
	return r.rest[0]
}

// while takes the bytes that are among set.
func (r *itemReader) while(set string) (taken string) {
	end := len(r.rest) - len(strings.TrimLeft(r.rest, set))
	taken, r.rest = r.rest[:end], r.rest[end:]
	return taken
}

const (
	lower = "abcdefghijklmnopqrstuvwxyz"
	upper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digit = "0123456789"
	tchar = "!#$%&'*+-.^_`|~" + digit + lower + upper
)

func (r *itemReader) text() (value string, ok bool) {
	if r.next() != '"' {
		return "", false
	}
	for r.rest != "" {
		switch c := r.next(); {
		case c == '\\':
			if c = r.next(); c != '"' && c != '\\' {
				return "", false
			}
			value += string(rune(c))
		case c == '"':
			return value, true
		case c <= 0x1f || c >= 0x7f:
			return "", false
		default:
			value += string(rune(c))
		}
	}
	return "", false
}

func (r *itemReader) parameters() bool {
	for r.peek() == ';' {
		r.next()
		r.while(" ")
		if c := r.peek(); c == 0 || !strings.Contains(lower+"*", string(rune(c))) {
			return false
		}
		r.while(lower + digit + "_-.*")
		if r.peek() == '=' {
			r.next()
			if !r.bareItem() {
				return false
			}
		}
	}
	return true
}

func (r *itemReader) bareItem() bool {
	switch c := r.peek(); {
	case c == '"':
		_, ok := r.text()
		return ok
	case c == ':':
		r.next()
		r.while(lower + upper + digit + "+/=")
		return r.next() == ':'
	case c == '?':
		r.next()
		c = r.next()
		return c == '0' || c == '1'
	case c == '@':
		r.next()
		before := r.rest
		return r.number() && !strings.Contains(before[:len(before)-len(r.rest)], ".")
	case c == '%':
		return r.displayString()
	case c == '-' || '0' <= c && c <= '9':
		return r.number()
	case c == '*' || c != 0 && strings.Contains(lower+upper, string(rune(c))):
		r.while(tchar + ":/")
		return true
	}
	return false
}

func (r *itemReader) number() bool {
	if r.peek() == '-' {
		r.next()
	}
	whole := r.while(digit)
	if r.peek() != '.' {
		return 1 <= len(whole) && len(whole) <= 15
	}
	r.next()
	fraction := r.while(digit)
	return 1 <= len(whole) && len(whole) <= 12 && 1 <= len(fraction) && len(fraction) <= 3
}

func (r *itemReader) displayString() bool {
	if r.next() != '%' || r.next() != '"' {
		return false
	}
	var b []byte
	for r.rest != "" {
		switch c := r.next(); {
		case c <= 0x1f || c >= 0x7f:
			return false
		case c == '"':
			return utf8.Valid(b)
		case c == '%':
			high, low := strings.IndexByte(digit+"abcdef", r.next()), strings.IndexByte(digit+"abcdef", r.next())
			if high < 0 || low < 0 {
				return false
			}
			b = append(b, byte(high<<4|low))
		default:
			b = append(b, c)
		}
	}
	return false
}

// What is accepted has one of these forms, whatever its parameters mean: there
// is no comma outside of quotes, which could have joined two keys.
var (
	bareForm   = regexp.MustCompile(`^[!#-+\--~]{1,255}$`)
	quotedForm = regexp.MustCompile(`^"((?:[ !#-\[\]-~]|\\["\\])*)"(?:; *[!#$%&'*+.^_|~\x60\-0-9A-Za-z]+(?:=(?:%"[ !#-~]*"|"(?:[ !#-\[\]-~]|\\["\\])*"|[!#-+\--:<-~]+))?)*$`)
	escapes    = strings.NewReplacer(`\"`, `"`, `\\`, `\`)
)

// FuzzKeyGrammar compares the key parser with the grammar: what RFC 9651 takes
// as a String must be taken, with the value it has there, and nothing may be
// taken that has not the form of one key.
func FuzzKeyGrammar(f *testing.F) {
	for _, seed := range []string{
		"a", " a\t", `"a"`, ` "a\"\\" `, `"a";x=1;y="z\"";*a`, `"a";x=-12.5;y=?0;z=:aGk=:`, `"a";d=@1659578233;t=*tok/en:x`,
		`"a";x=%"f%c3%bc"`, `"a", "b"`, `"a";x, "b"`, "a,b", "a b", "", `""`, "\x00", `"a`, `"\x"`, `"a";`, `"a";X=1`, `"a" ;x`, strings.Repeat("a", 256),
	} {
		f.Add(seed)
	}
	var parsed string
	opts := idempotency.Options{
		ValidateKey: func(key string) error { parsed = key; return errors.New("far enough") },
		ErrorHandler: func(http.ResponseWriter, *http.Request, *idempotency.Error) {
		},
	}
	handler := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, nil).Handler
	f.Fuzz(func(t *testing.T, line string) {
		parsed = ""
		handler.ServeHTTP(nil, &http.Request{Method: "POST", ProtoMajor: 1, Header: http.Header{"Idempotency-Key": {line}}})
		trimmed := strings.Trim(line, " \t") // by the rules for every field
		if !strings.HasPrefix(trimmed, `"`) {
			want := ""
			if bareForm.MatchString(trimmed) {
				want = trimmed
			}
			require.Equal(t, want, parsed)
			return
		}
		reader := itemReader{rest: trimmed}
		if want, ok := reader.stringItem(); ok && len(want) <= 255 {
			require.Equal(t, want, parsed)
		}
		if parsed != "" {
			parts := quotedForm.FindStringSubmatch(trimmed)
			require.NotNil(t, parts, "taken for one key")
			require.Equal(t, escapes.Replace(parts[1]), parsed)
			require.LessOrEqual(t, len(parsed), 255)
		}
	})
}
