package main

import (
	"context"
	"crypto/cipher"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-idempotency/idempotency"
)

// forgetting is what an operator must know before a key is forgotten.
const forgetting = `Forgetting this key lets the handler run again for the next request under it,
whatever that request contains. Forget a key only
  - after the outcome was settled by hand: it is known that nothing was done, or
    what was done has been taken back;
  - after the process that ran it is gone. One that was only stopped may go on,
    beside the next run.
The next run gets a later attempt and the same key for downstream services.`

// A request is what an operator knows of a client's request.
type request struct{ Scope, Method, Path, Key string }

func (r request) storeKey() string {
	return idempotency.StoreKey(r.Scope, r.Method, r.Path, r.Key)
}

// clientKey returns the key in a header: as it is, or what its quotes hold.
func clientKey(header string) string {
	if len(header) < 2 || header[0] != '"' || header[len(header)-1] != '"' {
		return header
	}
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(header[1 : len(header)-1])
}

// An operator looks into a store.
type operator struct {
	store idempotency.Inspector
	aead  cipher.AEAD   // Options.AEAD of the service
	ttl   time.Duration // Options.TTL of the service
}

// A report is a cell, for a person.
type report struct {
	StoreKey   string `json:"store_key"`
	State      string `json:"state"`
	Meaning    string `json:"meaning"`
	Attempt    int    `json:"attempt,omitempty"`
	AtMostOnce bool   `json:"at_most_once,omitempty"`
	Lease      string `json:"lease,omitempty"` // how long it still runs
	TTL        string `json:"ttl,omitempty"`   // how long the cell is still kept
	Ago        string `json:"ago,omitempty"`   // since the last sign of life, if the TTL is the service's

	Outcome    string      `json:"outcome,omitempty"` // of a retry
	Unreadable string      `json:"unreadable,omitempty"`
	Status     int         `json:"status,omitempty"`
	Header     http.Header `json:"header,omitempty"`
	Trailer    http.Header `json:"trailer,omitempty"`
	Body       string      `json:"body,omitempty"` // shortened
}

// meanings say what each state means to the next request.
var meanings = map[idempotency.State]string{
	0: "nothing is kept under this key: it was never used here, or its TTL has passed. " +
		"Look at scope, method, path (a slash at its end counts), key and prefix",
	idempotency.InProgress: "a handler is running",
	idempotency.Lapsed:     "a handler was started and never reported its outcome. The same request runs again",
	idempotency.Abandoned: "an at-most-once handler was started and never reported its outcome. " +
		"Retries get outcome_unknown",
	idempotency.Completed: "a handler has run, and retries get what is stored",
	idempotency.Released:  "the key is free. Attempts are still counted",
}

// look returns the cell of a request, and a report of it.
func (o *operator) look(ctx context.Context, r request) (idempotency.Cell, report, error) {
	key := r.storeKey()
	cell, err := o.store.Inspect(ctx, key)
	if err != nil {
		return cell, report{}, err
	}
	rep := report{
		StoreKey: key, State: "nothing there", Meaning: meanings[cell.State],
		Attempt: cell.Attempt, AtMostOnce: cell.Once,
	}
	if cell.State == 0 {
		return cell, rep, nil
	}
	rep.State, rep.TTL = cell.State.String(), inWords(cell.TTL)
	if cell.Lease > 0 {
		rep.Lease = inWords(cell.Lease)
	}
	if ago := o.ttl - cell.TTL; ago >= 0 && cell.State != idempotency.Released {
		rep.Ago = inWords(ago)
	}
	if cell.State == idempotency.Completed {
		rep.open(cell.Response(key, o.aead))
	}
	return cell, rep, nil
}

// open reports the stored response. That it cannot be read is a report as well:
// it says what clients get.
func (r *report) open(resp *idempotency.StoredResponse, err error) {
	if err != nil {
		r.Outcome, r.Unreadable = string(idempotency.OutcomeRecordUnreadable), err.Error()
		return
	}
	r.Outcome, r.Status, r.Header, r.Trailer = string(resp.Outcome), resp.Status, resp.Header, resp.Trailer
	r.Body = shorten(resp.Body)
}

// inWords returns a duration to the second.
func inWords(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// maxBody is how much of a body is shown.
const maxBody = 2 << 10

// shorten returns the beginning of a body if it is text, and else its size. A
// body comes from clients in the end, so no control character of it reaches a
// terminal.
func shorten(body []byte) string {
	shown := body[:min(len(body), maxBody)]
	for len(shown) < len(body) && len(shown) > 0 && !utf8.RuneStart(body[len(shown)]) {
		shown = shown[:len(shown)-1] // a whole character
	}
	isControl := func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\r' && r != '\t' }
	switch {
	case !utf8.Valid(shown) || slices.ContainsFunc([]rune(string(shown)), isControl):
		return fmt.Sprintf("(%d bytes, binary)", len(body))
	case len(shown) < len(body):
		return fmt.Sprintf("%s… (%d bytes in all)", shown, len(body))
	}
	return string(shown)
}

// print writes the report as lines.
func (r *report) print(w io.Writer) {
	line := func(name, value string) {
		if value != "" {
			_, _ = fmt.Fprintf(w, "%-13s %s\n", name+":", value)
		}
	}
	line("store key", r.StoreKey)
	line("state", r.State+": "+r.Meaning)
	if r.Attempt > 0 {
		line("attempt", strconv.Itoa(r.Attempt))
	}
	if r.State != "nothing there" && r.Outcome == "" {
		line("at most once", map[bool]string{true: "yes", false: "no"}[r.AtMostOnce])
	}
	line("lease", r.Lease)
	line("kept for", r.TTL)
	line("last change", r.Ago)
	line("a retry gets", r.Outcome)
	line("unreadable", r.Unreadable)
	if r.Status > 0 {
		line("status", fmt.Sprint(r.Status, " ", http.StatusText(r.Status)))
	}
	printHeader(w, "header", r.Header)
	printHeader(w, "trailer", r.Trailer)
	if r.Body != "" {
		_, _ = fmt.Fprintf(w, "body:\n%s\n", strings.TrimSuffix(r.Body, "\n"))
	}
}

// printHeader writes one line for each value, quoted where it is not plain text.
func printHeader(w io.Writer, title string, h http.Header) {
	for _, name := range slices.Sorted(maps.Keys(h)) {
		for _, value := range h[name] {
			text := name + ": " + value
			if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
				text = strconv.Quote(text)
			}
			_, _ = fmt.Fprintf(w, "%-13s %s\n", title+":", text)
		}
	}
}
