package integration

import (
	"bytes"
	"encoding/json"
	"io"
	"mime/multipart"
	"net/http"
	"strings"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/integration/history"
)

// tenantHeader names the tenant of a request.
const tenantHeader = "Tenant"

// An event is the body of a request under an Event key.
type event struct{ ID, Payload string }

// headLength is how much of the body of a Head key the handler reads. It is more
// than the middleware reads before it claims the key.
const headLength = 2 * maxBufferedBody

// newRequest makes the request of op. Its body can be read again where that is
// possible, so that Go's Transport sends the request a second time by itself when
// an idle connection breaks.
func newRequest(address string, op history.Op) *http.Request {
	var body io.Reader = strings.NewReader(op.Payload)
	key, contentType := op.Key, "text/plain"
	header := make(http.Header)
	switch op.Kind {
	case history.Large:
		body = strings.NewReader(op.Payload + strings.Repeat(" ", 3*maxBufferedBody))
	case history.Head: // no reader whose length net/http knows, so the body is chunked
		body = io.MultiReader(strings.NewReader(op.Payload+strings.Repeat(" ", headLength-len(op.Payload))),
			strings.NewReader(strings.Repeat("what follows in "+op.ID+"\n", 50)))
	case history.Form:
		body, contentType = newForm(op.Payload)
	case history.Event:
		text, err := json.Marshal(event{op.Key, op.Payload})
		must(err)
		body, key = bytes.NewReader(text), ""
	case history.Tenant:
		var tenant string
		tenant, key, _ = strings.Cut(op.Key, "/")
		header.Set(tenantHeader, tenant)
	}
	req, err := http.NewRequest(http.MethodPost, address+"/"+op.Kind, body)
	must(err)
	req.Header = header
	req.Header.Set("Content-Type", contentType)
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	return req
}

// newForm encodes a form, with a boundary of its own.
func newForm(payload string) (body io.Reader, contentType string) {
	var b bytes.Buffer
	form := multipart.NewWriter(&b)
	must(form.WriteField("amount", "100"))
	file, err := form.CreateFormFile("file", "payload.txt")
	must(err)
	_, err = io.WriteString(file, payload)
	must(err)
	must(form.Close())
	return bytes.NewReader(b.Bytes()), form.FormDataContentType()
}

// setUp sets the options that a kind of key is about.
func setUp(opts *idempotency.Options, kind, bug string) {
	switch {
	case kind == history.Event && bug == takesAnyEvent:
		opts.Key = func(*http.Request, []byte) (string, error) { return "an event", nil }
	case kind == history.Event:
		opts.Key = func(_ *http.Request, body []byte) (string, error) {
			var e event
			err := json.Unmarshal(body, &e)
			return e.ID, err
		}
	case kind == history.Tenant && bug != takesAnyTenant:
		opts.Scope = func(r *http.Request) string { return r.Header.Get(tenantHeader) }
	case kind == history.Form && bug == comparesBoundaries:
		opts.Fingerprint = func(_ *http.Request, body []byte) []byte { return body }
	}
}

// keyOf returns the name of the key of a request that has arrived.
func keyOf(kind string, r *http.Request) string {
	switch kind {
	case history.Event: // not known before the body is read
		return r.Header.Get(keyHeader)
	case history.Tenant:
		return r.Header.Get(tenantHeader) + "/" + r.Header.Get("Idempotency-Key")
	}
	return r.Header.Get("Idempotency-Key")
}

// readPayload reads what the handler of a kind needs of its request.
func readPayload(kind, bug string, r *http.Request) (string, error) {
	var source io.Reader = r.Body
	switch kind {
	case history.Form:
		file, _, err := r.FormFile("file")
		if err != nil {
			return "", err
		}
		source = file
	case history.Head:
		head := make([]byte, headLength)
		_, err := io.ReadFull(r.Body, head)
		if err == nil && bug == readsOn {
			_, err = io.Copy(io.Discard, r.Body)
		}
		return strings.TrimSpace(string(head)), err
	}
	text, err := io.ReadAll(source)
	if err == nil && kind == history.Event {
		var e event
		err = json.Unmarshal(text, &e)
		return e.Payload, err
	}
	return strings.TrimSpace(string(text)), err
}
