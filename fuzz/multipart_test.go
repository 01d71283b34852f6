package fuzz

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// formBoundaries are those that one another, or a body, may be taken for.
var formBoundaries = []string{"A", "AA", "B", "-", "--", "---A", "----WebKitFormBoundary7MA4YWxk", "a'()+_,-./=?"}

// formWords are what contents and mutations are made of, beside plain bytes.
// The last ones stand for the two boundaries.
var formWords = []string{"\r\n", "\n", "\r", "-", "--", " ", "x", "y", "\r\n\r\n", "\r\n--", "X: y\r\n", ": ", "--\r\n", "A", "\x00", "\x01"}

// A formSource turns bytes into choices.
type formSource struct{ data []byte }

func (s *formSource) pick(n int) int {
	if len(s.data) == 0 {
		return 0
	}
	b := s.data[0]
	s.data = s.data[1:]
	return int(b) % n
}

func (s *formSource) text(boundaries [2]string) string {
	var b strings.Builder
	for range s.pick(6) {
		b.WriteString(formWords[s.pick(len(formWords))])
	}
	return strings.NewReplacer("\x00", boundaries[0], "\x01", boundaries[1]).Replace(b.String())
}

// written is a form as multipart.Writer writes it.
func written(t *testing.T, boundary string, parts []string) string {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	require.NoError(t, w.SetBoundary(boundary))
	for i, part := range parts {
		p, err := w.CreatePart(textproto.MIMEHeader{"X-Part": {fmt.Sprint(i % 2)}})
		require.NoError(t, err)
		_, err = io.WriteString(p, part)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.String()
}

// readParts is what mime/multipart finds in a body, up to an error.
func readParts(body, boundary string) string {
	var b strings.Builder
	r := multipart.NewReader(strings.NewReader(body), boundary)
	for {
		part, err := r.NextRawPart()
		if err != nil {
			// Errors quote the line at which they occurred.
			fmt.Fprint(&b, "end ", errors.Is(err, io.EOF))
			return b.String()
		}
		content, err := io.ReadAll(part)
		fmt.Fprintf(&b, "part %q %q %v\n", part.Header, content, err)
	}
}

// mutate changes a few places of a body.
func (s *formSource) mutate(body string, boundaries [2]string) string {
	for range s.pick(4) {
		at := (s.pick(256)<<8 | s.pick(256)) % (len(body) + 1)
		end := min(len(body), at+s.pick(4))
		body = body[:at] + s.text(boundaries) + body[end:]
	}
	return body
}

// randomCuts returns the bytes of a body in pieces that the source picks.
type randomCuts struct {
	io.Reader
	source *formSource
}

func (r *randomCuts) Read(p []byte) (int, error) {
	return r.Reader.Read(p[:min(len(p), 1+r.source.pick(40))])
}

// FuzzMultipart holds the fingerprint of forms against mime/multipart. Forms of
// multipart.Writer with the same parts are one request, whatever their
// boundaries. Two bodies that are one request have the same parts, however they
// were damaged, and the same bytes if their boundary is the same.
func FuzzMultipart(f *testing.F) {
	f.Add([]byte{0, 2, 1, 1, 6, 0, 0})
	f.Add([]byte{3, 4, 2, 3, 14, 15, 9, 2, 0, 15, 1, 1, 0, 20, 1, 1, 14})
	f.Add([]byte("\x06\x02\x03\x05\x09\x0e\x00\x0f\x09\x02\x0f\x0e\x02\x01\x01\x30\x00\x03\x09\x0f\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 512 {
			return
		}
		s := &formSource{data}
		boundaries := [2]string{formBoundaries[s.pick(len(formBoundaries))], formBoundaries[s.pick(len(formBoundaries))]}
		var parts [2][]string
		for range s.pick(4) {
			parts[0] = append(parts[0], s.text(boundaries))
		}
		parts[1] = parts[0]
		if s.pick(2) == 1 {
			for range s.pick(4) {
				parts[1] = append(parts[1][:len(parts[1]):len(parts[1])], s.text(boundaries))
			}
		}
		var bodies [2]string
		mutated, regular := false, true
		for i := range bodies {
			form := written(t, boundaries[i], parts[i])
			bodies[i] = s.mutate(form, boundaries)
			mutated = mutated || bodies[i] != form
			regular = regular && strings.Count(form, "--"+boundaries[i]) == len(parts[i])+1
		}
		sameParts := strings.Join(parts[0], "\x00") == strings.Join(parts[1], "\x00") && len(parts[0]) == len(parts[1])
		for _, limit := range []int64{0, 1} { // read ahead, and on the stream
			replayed := isReplayed(t, s, limit, boundaries, bodies)
			describe := fmt.Sprintf("limit %d\n%q %q\n%q %q", limit, boundaries[0], bodies[0], boundaries[1], bodies[1])
			if replayed && boundaries[0] == boundaries[1] {
				require.Equal(t, bodies[0], bodies[1], describe)
			}
			if replayed {
				require.Equal(t, readParts(bodies[0], boundaries[0]), readParts(bodies[1], boundaries[1]), describe)
			}
			if !mutated && regular {
				require.Equal(t, sameParts, replayed, describe)
			}
		}
	})
}

// isReplayed sends the first body and then each of them, and reports whether
// the second one is answered with the response to the first one.
func isReplayed(t *testing.T, s *formSource, limit int64, boundaries, bodies [2]string) bool {
	// What was read ahead reaches the hash in the pieces in which the handler
	// reads it.
	handler := func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, &randomCuts{r.Body, s})
		idemtest.Must(err)
		w.WriteHeader(http.StatusCreated)
	}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: limit}, handler)
	send := func(i int) int {
		r := c.Request(idemtest.Exchange{Key: "a", Body: bodies[i]})
		r.Header.Set("Content-Type", `multipart/form-data; boundary="`+boundaries[i]+`"`)
		r.Body = io.NopCloser(&randomCuts{strings.NewReader(bodies[i]), s})
		r.ContentLength = -1
		resp := c.Do(r)
		if resp.Header.Get("Idempotent-Replayed") == "true" {
			return 0
		}
		return resp.StatusCode
	}
	require.Equal(t, http.StatusCreated, send(0))
	require.Zero(t, send(0), "the same body")
	second := send(1)
	if second != 0 {
		require.Equal(t, http.StatusUnprocessableEntity, second)
	}
	return second == 0
}
