package idempotency_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// encode writes a form as encoders do. A part is its header, an empty line and
// its content.
func encode(boundary string, parts ...string) string {
	var b strings.Builder
	for _, part := range parts {
		b.WriteString("--" + boundary + "\r\n" + part + "\r\n")
	}
	return b.String() + "--" + boundary + "--\r\n"
}

// field returns a part.
func field(name, content string) string {
	return "Content-Disposition: form-data; name=\"" + name + "\"\r\n\r\n" + content
}

// formRequest returns a POST of a form under key "a". Its body comes in pieces
// of at most cut bytes.
func formRequest(c *idemtest.Client, contentType, body string, cut int) *http.Request {
	r := c.Request(idemtest.Exchange{Key: "a", Body: body, Header: http.Header{"Content-Type": {contentType}}})
	r.Body = io.NopCloser(&pieces{strings.NewReader(body), cut})
	return r
}

// pieces returns at most n bytes at a time.
type pieces struct {
	io.Reader
	n int
}

func (p *pieces) Read(b []byte) (int, error) { return p.Reader.Read(b[:min(len(b), p.n)]) }

// A form that a client encodes anew is the same request, unless any byte of a
// part differs, or the boundary stands where it may be content.
func TestFormEncodedAnew(t *testing.T) {
	const (
		a, b   = "----WebKitFormBoundaryAAAA", "----formdata-undici-0123456789"
		replay = "replay 201 "
		reused = "422 key_reused"
	)
	x, y := field("x", "1"), field("y", "2")
	file := "Content-Disposition: form-data; name=\"f\"; filename=\"f.txt\"\r\nContent-Type: text/plain\r\n\r\nhello"
	// swap encodes a body in which A is the boundary with each of the two.
	swap := func(body string) [2]string {
		return [2]string{strings.ReplaceAll(body, "A", a), strings.ReplaceAll(body, "A", b)}
	}
	for name, row := range map[string]struct {
		bodies [2]string
		get    string
	}{
		"the same parts":                {[2]string{encode(a, x, y, file), encode(b, x, y, file)}, replay},
		"no parts":                      {[2]string{encode(a), encode(b)}, replay},
		"no parts, as Go writes them":   {[2]string{"\r\n" + encode(a), "\r\n" + encode(b)}, replay},
		"an empty part":                 {[2]string{encode(a, "\r\n"), encode(b, "\r\n")}, replay},
		"without the last line end":     {[2]string{strings.TrimSpace(encode(a, x)), strings.TrimSpace(encode(b, x))}, replay},
		"content of dashes":             {[2]string{encode(a, field("x", "\r\n------\r\n-----")), encode(b, field("x", "\r\n------\r\n-----"))}, replay},
		"a nested form":                 {[2]string{encode(a, encode("inner", x)), encode(b, encode("inner", x))}, replay},
		"a nested form encoded anew":    {[2]string{encode(a, encode("inner", x)), encode(b, encode("other", x))}, reused},
		"another value":                 {[2]string{encode(a, x, field("y", "2")), encode(b, x, field("y", "3"))}, reused},
		"another name":                  {[2]string{encode(a, field("x", "1")), encode(b, field("z", "1"))}, reused},
		"another order":                 {[2]string{encode(a, x, y), encode(b, y, x)}, reused},
		"a part more":                   {[2]string{encode(a, x), encode(b, x, x)}, reused},
		"a part less":                   {[2]string{encode(a, x, x), encode(b, x)}, reused},
		"another file name":             {[2]string{encode(a, file), encode(b, strings.Replace(file, "f.txt", "g.txt", 1))}, reused},
		"another header":                {[2]string{encode(a, file), encode(b, strings.Replace(file, "text/plain", "text/html", 1))}, reused},
		"another name of a header":      {[2]string{encode(a, file), encode(b, strings.Replace(file, "Content-Type", "Content-Kind", 1))}, reused},
		"a line end more":               {[2]string{encode(a, x), encode(b, x+"\r\n")}, reused},
		"a line end instead of two":     {[2]string{encode(a, field("x", "1\r\n2")), encode(b, field("x", "1\n2"))}, reused},
		"cut at another place":          {[2]string{encode(a, field("x", "12"), field("y", "")), encode(b, field("x", "1"), field("y", "2"))}, reused},
		"not the end":                   {[2]string{encode(a, x, y), encode(b, x)}, reused},
		"the other boundary as content": {[2]string{encode(a, field("x", "1\r\n--"+b+"\r\n"+y)), encode(b, x, y)}, reused},
		"its own boundary in content":   {[2]string{encode(a, x, y), encode(b, field("x", "1\r\n--"+a+"\r\n"+y))}, reused},
		"the other's in both":           {[2]string{encode(a, field("x", b)), encode(b, field("x", a))}, reused},

		"boundary within a line":         {swap(encode("A", field("x", "1--A"))), reused},
		"boundary after dashes":          {swap(encode("A", field("x", "\r\n-----A\r\n"))), reused},
		"boundary that goes on":          {swap(encode("A", field("x", "\r\n--Axyz\r\n"))), reused},
		"boundary with dashes in a line": {swap(encode("A", field("x", "\r\n--A-x\r\n"))), reused},
		"padding after a boundary":       {swap(strings.Replace(encode("A", x, y), "--A\r\n", "--A \r\n", 1)), reused},
		"padding after the last":         {swap(strings.Replace(encode("A", x), "--A--", "--A-- ", 1)), reused},
		"line feeds only":                {swap(strings.ReplaceAll(encode("A", x, y), "\r\n", "\n")), reused},
		"a line feed before a boundary":  {swap("--A\r\n" + x + "\n--A\r\n" + y + "\r\n--A--\r\n"), reused},
		"a line feed after a boundary":   {swap("--A\r\n" + x + "\r\n--A\n" + y + "\r\n--A--\r\n"), reused},
		"two boundaries in a row":        {swap("--A\r\n--A\r\n" + x + "\r\n--A--\r\n"), reused},
		"a part after the end":           {swap(encode("A", x) + encode("A", y)), reused},
		"text after the end":             {swap(encode("A", x) + "text"), reused},
		"a line after the end":           {swap(encode("A", x) + "\r\n"), reused},
		"text in the line of the end":    {swap(strings.TrimSpace(encode("A", x)) + "text"), reused},
		"no end":                         {swap("--A\r\n" + x), reused},
		"no end after a boundary":        {swap("--A\r\n" + x + "\r\n--A"), reused},
		"half of an end":                 {swap("--A\r\n" + x + "\r\n--A-"), reused},
		"no boundary at all":             {[2]string{x, x}, reused},
		"the same text before the form":  {swap("text\r\n" + encode("A", x)), replay},
		"another text before the form":   {[2]string{"text\r\n" + encode(a, x), "Text\r\n" + encode(b, x)}, reused},
		"text right before the form":     {swap("text" + encode("A", x)), reused},
	} {
		for mode, opts := range map[string]idempotency.Options{"small": {}, "large": {MaxBufferedBody: 1}} {
			for _, cut := range []int{1, 7, 4096} {
				t.Run(fmt.Sprintf("%s/%s, %d bytes a time", name, mode, cut), func(t *testing.T) {
					// The second body comes first in the second round.
					for i := range 2 {
						c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, func(w http.ResponseWriter, r *http.Request) {
							r.Body = io.NopCloser(&pieces{r.Body, cut})
							reading(-1)(w, r)
						})
						types := [2]string{"multipart/form-data; boundary=" + a, "multipart/form-data; boundary=" + b}
						for _, try := range []struct {
							n   int
							get string
						}{{i, "201 "}, {1 - i, row.get}, {i, replay}} {
							got, _ := idemtest.Describe(t, c.Do(formRequest(c, types[try.n], row.bodies[try.n], cut)))
							require.Equal(t, try.get, got)
						}
					}
				})
			}
		}
	}
}

// Which Content-Types have a boundary that need not be repeated, and what else
// of them counts.
func TestBoundaryOfAContentType(t *testing.T) {
	long := strings.Repeat("a", 70)
	for name, row := range map[string]struct {
		types [2][]string
		get   string
	}{
		"any kind":            {[2][]string{{"multipart/mixed; boundary=aaa"}, {"multipart/mixed; boundary=bbb"}}, "replay 201 "},
		"in upper case":       {[2][]string{{"Multipart/Form-Data; BOUNDARY=aaa"}, {"Multipart/Form-Data; BOUNDARY=bbb"}}, "replay 201 "},
		"quoted":              {[2][]string{{`multipart/mixed; boundary="aaa"`}, {"multipart/mixed; boundary=bbb"}}, "replay 201 "},
		"quoted for a reason": {[2][]string{{`multipart/mixed; boundary="aa?=/"`}, {`multipart/mixed; boundary="bbb"`}}, "replay 201 "},
		"of 70 characters":    {[2][]string{{"multipart/mixed; boundary=" + long}, {"multipart/mixed; boundary=bbb"}}, "replay 201 "},
		"with parameters": {[2][]string{
			{`multipart/related; type="a/b"; boundary=aaa; start=x`}, {`multipart/related; type="a/b"; boundary=bbb; start=x`}}, "replay 201 "},
		"another kind":               {[2][]string{{"multipart/mixed; boundary=aaa"}, {"multipart/form-data; boundary=bbb"}}, "422 key_reused"},
		"another parameter before":   {[2][]string{{"multipart/mixed; a=b; boundary=aaa"}, {"multipart/mixed; a=c; boundary=bbb"}}, "422 key_reused"},
		"another parameter after":    {[2][]string{{"multipart/mixed; boundary=aaa; a=b"}, {"multipart/mixed; boundary=bbb; a=c"}}, "422 key_reused"},
		"of 71 characters":           {[2][]string{{"multipart/mixed; boundary=a" + long}, {"multipart/mixed; boundary=bbb"}}, "422 key_reused"},
		"none":                       {[2][]string{{"multipart/mixed"}, {"multipart/mixed"}}, "422 key_reused"},
		"empty":                      {[2][]string{{"multipart/mixed; boundary="}, {"multipart/mixed; boundary="}}, "422 key_reused"},
		"repeated":                   {[2][]string{{"multipart/mixed; boundary=aaa; boundary=aaa"}, {"multipart/mixed; boundary=bbb; boundary=bbb"}}, "422 key_reused"},
		"in two lines":               {[2][]string{{"multipart/mixed; boundary=aaa", "x/y"}, {"multipart/mixed; boundary=bbb", "x/y"}}, "422 key_reused"},
		"with a colon":               {[2][]string{{`multipart/mixed; boundary="a:a"`}, {`multipart/mixed; boundary="b:b"`}}, "422 key_reused"},
		"with a space":               {[2][]string{{`multipart/mixed; boundary="a a"`}, {`multipart/mixed; boundary="b b"`}}, "422 key_reused"},
		"with an escape":             {[2][]string{{`multipart/mixed; boundary="a\aa"`}, {`multipart/mixed; boundary="b\bb"`}}, "422 key_reused"},
		"of the wrong characters":    {[2][]string{{`multipart/mixed; boundary="a;a"`}, {`multipart/mixed; boundary="b;b"`}}, "422 key_reused"},
		"in RFC 2231":                {[2][]string{{"multipart/mixed; boundary*=utf-8''aaa"}, {"multipart/mixed; boundary*=utf-8''bbb"}}, "422 key_reused"},
		"in RFC 2231, in sections":   {[2][]string{{"multipart/mixed; boundary*0=a; boundary*1=aa"}, {"multipart/mixed; boundary*0=b; boundary*1=bb"}}, "422 key_reused"},
		"within another parameter":   {[2][]string{{`multipart/mixed; a="boundary=aaa"`}, {`multipart/mixed; a="boundary=bbb"`}}, "422 key_reused"},
		"in another parameter, too":  {[2][]string{{`multipart/mixed; boundary=aaa; a="boundary=x"`}, {`multipart/mixed; boundary=bbb; a="boundary=x"`}}, "422 key_reused"},
		"of another parameter, too":  {[2][]string{{`multipart/mixed; x-boundary=aaa; boundary=aaa`}, {`multipart/mixed; x-boundary=bbb; boundary=bbb`}}, "422 key_reused"},
		"of what is no multipart":    {[2][]string{{"text/mixed; boundary=aaa"}, {"text/mixed; boundary=bbb"}}, "422 key_reused"},
		"of what is no Content-Type": {[2][]string{{"multipart/mixed, x; boundary=aaa"}, {"multipart/mixed, x; boundary=bbb"}}, "422 key_reused"},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), reading(-1))
			send := func(i int) string {
				_, boundary, _ := strings.Cut(strings.ToLower(row.types[i][0]), "boundary=")
				boundary, _, _ = strings.Cut(boundary, ";")
				if boundary == "" {
					boundary = []string{"aaa", "bbb"}[i]
				}
				r := formRequest(c, "", encode(strings.Trim(boundary, `"`), field("x", "1")), 4096)
				r.Header["Content-Type"] = row.types[i]
				got, _ := idemtest.Describe(t, c.Do(r))
				return got
			}
			require.Equal(t, "201 ", send(0))
			require.Equal(t, "replay 201 ", send(0))
			require.Equal(t, row.get, send(1))
		})
	}
}

// A body that is a form for one request is not that of one that is none.
func TestFormIsNotItsBytes(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), reading(-1))
	body := encode("aaa", field("x", "1"))
	got, _ := idemtest.Describe(t, c.Do(formRequest(c, "multipart/mixed; boundary=aaa", body, 100)))
	require.Equal(t, "201 ", got)
	got, _ = idemtest.Describe(t, c.Do(formRequest(c, "multipart/mixed; boundary=", body, 100)))
	require.Equal(t, "422 key_reused", got)
}

// Of a body that is no form, each byte counts, those that a boundary might
// begin with too.
func TestFormThatIsNone(t *testing.T) {
	for _, opts := range []idempotency.Options{{}, {MaxBufferedBody: 1}} {
		for _, end := range []string{"-", "--", "--a"} {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, reading(-1))
			for i, try := range []struct{ body, get string }{{"text", "201 "}, {"text" + end, "422 key_reused"}, {"text", "replay 201 "}} {
				got, _ := idemtest.Describe(t, c.Do(formRequest(c, "multipart/form-data; boundary=aaa", try.body, 100)))
				require.Equal(t, try.get, got, i)
			}
		}
	}
}

// When the handler stops reading, the same part of a retry counts, whatever the
// length of its boundary. Where the handler stops within a boundary, only the
// same boundary will do.
func TestFormReadInPart(t *testing.T) {
	const short, long = "abcabd", "--abcabcabcd"
	parts := []string{field("x", "\r\n--abcab-\r\n--"), field("y", "a\r")}
	first, again := encode(short, parts...), encode(long, parts...)
	opts := idempotency.Options{MaxBufferedBody: 1}
	request := func(c *idemtest.Client, boundary, body string) *http.Request {
		r := formRequest(c, "multipart/form-data; boundary="+boundary, body, 3)
		r.ContentLength = -1
		return r
	}
	// within counts the boundaries before n, and tells whether n is within what
	// is or may become a boundary, for one of the two.
	within := func(n int) (before int, inside bool) {
		for end := 0; ; before++ {
			i := strings.Index(first[end:], "--"+short)
			if i < 0 || n <= end+i+2 {
				break
			}
			end += i + 2 + len(short)
			if n < end {
				return before, true
			}
		}
		for _, delimiter := range []string{"--" + short, "--" + long} {
			for k := 3; k < len(delimiter); k++ {
				inside = inside || strings.HasSuffix(first[:n], delimiter[:k])
			}
		}
		return before, inside
	}
	for n := range len(first) + 1 {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, reading(int64(n)))
		got, _ := idemtest.Describe(t, c.Do(request(c, short, first)))
		require.Equal(t, "201 ", got)
		got, _ = idemtest.Describe(t, c.Do(request(c, short, first)))
		require.Equal(t, "replay 201 ", got, "%d bytes: %q", n, first[:n])

		before, inside := within(n)
		got, _ = idemtest.Describe(t, c.Do(request(c, long, again)))
		if !inside {
			require.Equal(t, "replay 201 ", got, "%d bytes: %q", n, first[:n])
		} else {
			require.Equal(t, "422 key_reused", got, "%d bytes: %q", n, first[:n])
		}

		// A byte that differs counts if the handler has read it.
		for at := range len(first) {
			other := first[:at] + "!" + first[at+1:]
			got, _ = idemtest.Describe(t, c.Do(request(c, short, other)))
			if at < n {
				require.Equal(t, "422 key_reused", got, "%d bytes: %q", n, other)
			} else {
				require.Equal(t, "replay 201 ", got, "%d bytes: %q", n, other)
			}
		}
		if at := n + before*(len(long)-len(short)) - 1; !inside && at >= 0 {
			got, _ = idemtest.Describe(t, c.Do(request(c, long, again[:at]+"!"+again[at+1:])))
			require.Equal(t, "422 key_reused", got, "%d bytes: %q", n, first[:n])
			got, _ = idemtest.Describe(t, c.Do(request(c, long, again[:at])))
			require.Equal(t, "422 key_reused", got, "%d bytes: %q", n, first[:n])
		}
	}
}

// A form of about the limit is large or small, whatever the length of its
// boundary.
func TestFormOfAboutTheLimit(t *testing.T) {
	const limit = 100 << 10
	short, long := "a", strings.Repeat("b", 70)
	for size := limit - 300; size < limit+10; size += 3 {
		parts := []string{field("x", "1"), field("y", strings.Repeat("y", size-150))}
		for _, boundaries := range [][2]string{{short, long}, {long, short}} {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: limit}, reading(-1))
			for i, boundary := range boundaries {
				r := formRequest(c, "multipart/form-data; boundary="+boundary, encode(boundary, parts...), 1<<20)
				got, _ := idemtest.Describe(t, c.Do(r))
				require.Equal(t, []string{"201 ", "replay 201 "}[i], got, size)
			}
		}
	}
}

// A custom fingerprint gets the bytes as they came.
func TestCustomFingerprintOfAForm(t *testing.T) {
	var seen []byte
	opts := idempotency.Options{Fingerprint: func(_ *http.Request, body []byte) []byte {
		seen = bytes.Clone(body)
		return seen
	}}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, reading(-1))
	for _, try := range []struct{ boundary, get string }{{"aaa", "201 "}, {"bbb", "422 key_reused"}} {
		body := encode(try.boundary, field("x", "1"))
		got, _ := idemtest.Describe(t, c.Do(formRequest(c, "multipart/form-data; boundary="+try.boundary, body, 100)))
		require.Equal(t, try.get, got)
		require.Equal(t, body, string(seen))
	}
}

// An upload of many read-aheads goes over a real connection, with and without
// a declared length. The retry has another boundary.
func TestServerLargeFormEncodedAnew(t *testing.T) {
	s := newServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
		idemtest.Must(r.ParseMultipartForm(1 << 10))
		fmt.Fprint(w, r.MultipartForm.File["f"][0].Size)
	})
	send := func(key, boundary, end string, sized bool) (int, bool) {
		body := encode(boundary, "Content-Disposition: form-data; name=\"f\"; filename=\"f\"\r\n\r\n"+strings.Repeat("\r\n--", 1<<20)+end)
		r, err := http.NewRequestWithContext(t.Context(), "POST", s.URL, strings.NewReader(body))
		require.NoError(t, err)
		r.Header.Set("Idempotency-Key", key)
		r.Header.Set("Content-Type", "multipart/form-data; boundary="+boundary)
		if !sized {
			r.ContentLength = -1
		}
		resp, err := s.Client().Do(r)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		return resp.StatusCode, resp.Header.Get("Idempotent-Replayed") == "true"
	}
	for key, sized := range map[string]bool{"sized": true, "chunked": false} {
		for i, try := range []struct {
			boundary, end string
			status        int
		}{{"aaa", "", 200}, {"bbbbbb", "", 200}, {"c", "", 200}, {"aaa", "x", 422}, {"bbbbbb", "x", 422}} {
			status, replayed := send(key, try.boundary, try.end, sized)
			require.Equal(t, try.status, status, i)
			require.Equal(t, i > 0 && status == 200, replayed, i)
		}
	}
}

// A parsedForm is a form that an outer middleware parses.
type parsedForm struct {
	boundary string
	values   [][2]string
	files    []parsedFile
}

type parsedFile struct{ name, filename, kind, content string }

func (f parsedForm) request(t *testing.T, c *idemtest.Client) *http.Request {
	t.Helper()
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	require.NoError(t, w.SetBoundary(f.boundary))
	for _, value := range f.values {
		require.NoError(t, w.WriteField(value[0], value[1]))
	}
	for _, file := range f.files {
		part, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {fmt.Sprintf("form-data; name=%q; filename=%q", file.name, file.filename)},
			"Content-Type":        {file.kind},
		})
		require.NoError(t, err)
		_, err = io.WriteString(part, file.content)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	r := formRequest(c, w.FormDataContentType(), b.String(), 1<<20)
	r.Header.Set("Content-Type", w.FormDataContentType())
	return r
}

// A form that outer middleware has parsed, to look for a token say, is not
// there to be read. All that was parsed counts, and the handler gets it.
func TestMultipartFormThatWasParsedOutside(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	parsers := map[string]func(r *http.Request){
		"a value":              func(r *http.Request) { r.PostFormValue("csrf") },
		"all, spilled to disk": func(r *http.Request) { idemtest.Must(r.ParseMultipartForm(0)) },
	}
	for name, parse := range parsers {
		for _, size := range []int{10, 2 << 20} {
			form := func() parsedForm {
				return parsedForm{"aaa", [][2]string{{"csrf", "t"}, {"x", "1"}, {"x", "2"}}, []parsedFile{
					{"f", "f.txt", "text/plain", strings.Repeat("f", size)}, {"f", "g.txt", "text/plain", "g"}, {"h", "h.txt", "text/plain", "h"}}}
			}
			for change, row := range map[string]struct {
				change func(*parsedForm)
				get    string
			}{
				"nothing":                   {func(*parsedForm) {}, "replay 201 "},
				"the boundary":              {func(f *parsedForm) { f.boundary = "bbbb" }, "replay 201 "},
				"the last byte of a file":   {func(f *parsedForm) { f.files[0].content = f.files[0].content[1:] + "!" }, "422 key_reused"},
				"the length of a file":      {func(f *parsedForm) { f.files[0].content += "f" }, "422 key_reused"},
				"the name of a file":        {func(f *parsedForm) { f.files[0].filename = "x.txt" }, "422 key_reused"},
				"the header of a file":      {func(f *parsedForm) { f.files[0].kind = "text/html" }, "422 key_reused"},
				"the field of a file":       {func(f *parsedForm) { f.files[2].name = "i" }, "422 key_reused"},
				"the order of files":        {func(f *parsedForm) { f.files[0], f.files[1] = f.files[1], f.files[0] }, "422 key_reused"},
				"a file less":               {func(f *parsedForm) { f.files = f.files[:2] }, "422 key_reused"},
				"the number of files":       {func(f *parsedForm) { f.files[1].name = "h" }, "422 key_reused"},
				"a value":                   {func(f *parsedForm) { f.values[1][1] = "3" }, "422 key_reused"},
				"the name of a value":       {func(f *parsedForm) { f.values[1][0] = "y" }, "422 key_reused"},
				"the order of values":       {func(f *parsedForm) { f.values[1], f.values[2] = f.values[2], f.values[1] }, "422 key_reused"},
				"a value instead of a file": {func(f *parsedForm) { f.files, f.values = f.files[:2], append(f.values, [2]string{"h", "h"}) }, "422 key_reused"},
			} {
				t.Run(fmt.Sprintf("%s/%d bytes/%s", name, size, change), func(t *testing.T) {
					seen := ""
					c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), func(w http.ResponseWriter, r *http.Request) {
						file, err := r.MultipartForm.File["f"][0].Open()
						idemtest.Must(err)
						content, err := io.ReadAll(file)
						idemtest.Must(err)
						seen = r.PostFormValue("x") + string(content)
						w.WriteHeader(http.StatusCreated)
					})
					send := func(f parsedForm) string {
						r := f.request(t, c)
						parse(r)
						defer func() { require.NoError(t, r.MultipartForm.RemoveAll()) }()
						got, _ := idemtest.Describe(t, c.Do(r))
						return got
					}
					require.Equal(t, "201 ", send(form()))
					require.Equal(t, "1"+strings.Repeat("f", size), seen)
					changed := form()
					row.change(&changed)
					require.Equal(t, row.get, send(changed))
					require.Equal(t, "replay 201 ", send(form()))
				})
			}
		}
	}
}

// A file that is gone cannot be told from another one, so the request is
// refused, before it claims a key.
func TestFileOfAParsedFormThatIsGone(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var event idempotency.Event
	s := &idemtest.FaultyStore{Store: idempotency.NewMemoryStore()}
	c := idemtest.NewClient(s, &idempotency.Options{OnEvent: func(_ context.Context, e idempotency.Event) { event = e }}, reading(-1))
	r := parsedForm{"aaa", nil, []parsedFile{{"f", "f.txt", "text/plain", "f"}}}.request(t, c)
	require.NoError(t, r.ParseMultipartForm(0))
	require.NoError(t, r.MultipartForm.RemoveAll())
	got, p := idemtest.Describe(t, c.Do(r))
	require.Equal(t, "500 body_incomplete", got)
	require.Equal(t, "A file of the form could not be read again. This attempt was not processed. "+
		"Repeat the request with the same key.", p.Detail)
	require.True(t, p.Retryable)
	require.ErrorContains(t, event.Err, `file "f" of a form that was parsed outside of the middleware`)
	require.Zero(t, s.Count("Acquire"))
	require.Zero(t, c.Runs())
}

// An outer middleware that calls MultipartReader may leave any part of the body
// behind. That part counts as it is, and the boundary counts, even if nothing
// is left.
func TestFormThatWasReadInPartOutside(t *testing.T) {
	body := func(boundary, y string) string { return encode(boundary, field("x", "1"), field("y", y)) }
	for left, get := range map[int]string{50: "422 key_reused", 0: "replay 201 "} {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), reading(-1))
		for i, try := range []struct{ boundary, y, get string }{
			{"aaa", "2", "201 "}, {"aaa", "2", "replay 201 "}, {"aaa", "3", get}, {"bbb", "2", "422 key_reused"},
		} {
			sent := body(try.boundary, try.y)
			r := formRequest(c, "multipart/form-data; boundary="+try.boundary, sent, 100)
			_, err := r.MultipartReader()
			require.NoError(t, err)
			_, err = io.CopyN(io.Discard, r.Body, int64(len(sent)-left))
			require.NoError(t, err)
			got, _ := idemtest.Describe(t, c.Do(r))
			require.Equal(t, try.get, got, "%d: %d bytes left", i, left)
		}
	}
}

// ParseForm leaves a multipart body alone, so it is a form as any other.
func TestMultipartFormAfterParseForm(t *testing.T) {
	c := idemtest.NewClient(idempotency.NewMemoryStore(), nilOptions(), reading(-1))
	for i, try := range []struct{ boundary, x, get string }{
		{"aaa", "1", "201 "}, {"bbbb", "1", "replay 201 "}, {"aaa", "2", "422 key_reused"},
	} {
		r := formRequest(c, "multipart/form-data; boundary="+try.boundary, encode(try.boundary, field("x", try.x)), 100)
		require.NoError(t, r.ParseForm())
		got, _ := idemtest.Describe(t, c.Do(r))
		require.Equal(t, try.get, got, i)
	}
}

// A form of very many parts is compared with its boundary: no encoder writes
// such a form, and hashing each part by itself would take a server's time.
func TestFormOfManyParts(t *testing.T) {
	const most = 10_000
	for name, opts := range map[string]idempotency.Options{"small": {}, "large": {MaxBufferedBody: 1}} {
		for parts, get := range map[int]string{most: "replay 201 ", most + 1: "422 key_reused"} {
			t.Run(fmt.Sprintf("%s, %d", name, parts), func(t *testing.T) {
				c := idemtest.NewClient(idempotency.NewMemoryStore(), &opts, reading(-1))
				for _, try := range []struct{ boundary, get string }{{"A", "201 "}, {"B", get}, {"A", "replay 201 "}} {
					body := encode(try.boundary, slices.Repeat([]string{field("x", "1")}, parts)...)
					r := formRequest(c, "multipart/form-data; boundary="+try.boundary, body, 4096)
					got, _ := idemtest.Describe(t, c.Do(r))
					require.Equal(t, try.get, got)
				}
			})
		}
	}
}

// A client that fills a body with boundaries makes the server do little more
// than for any other body, which the allocations tell.
func TestBodyOfBoundaries(t *testing.T) {
	if idemtest.RaceDetector {
		t.Skip("the race detector allocates")
	}
	for name, body := range map[string]string{
		"nothing else": strings.Repeat("--A", 100_000),
		"empty parts":  strings.Repeat("\r\n--A\r\n", 100_000),
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, reading(-1))
			require.Less(t, testing.AllocsPerRun(1, func() {
				got, _ := idemtest.Describe(t, c.Do(formRequest(c, "multipart/form-data; boundary=A", body, 4096)))
				require.Contains(t, []string{"201 ", "replay 201 "}, got)
			}), 50_000.0)
		})
	}
}
