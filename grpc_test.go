package idempotency_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// sayStatus answers as a gRPC handler with a message and a declared trailer.
func sayStatus(w http.ResponseWriter, code string) {
	w.Header().Set("Content-Type", "application/grpc+proto")
	w.Header().Set("Trailer", "Grpc-Status")
	_, _ = io.WriteString(w, "message")
	w.Header().Set("Grpc-Status", code)
}

// What a status code of gRPC does to the key, with an HTTP status of 200 always.
// A run that may have got somewhere is remembered for the TTL, one that did
// nothing for a lease.
func TestGRPCStatus(t *testing.T) {
	const replayed, again, refused = "is replayed", "runs again", "did nothing, runs again"
	for code, row := range []struct{ name, byDefault, atMostOnce string }{
		0:  {"OK", replayed, replayed},
		1:  {"CANCELLED", again, replayed},
		2:  {"UNKNOWN", again, replayed},
		3:  {"INVALID_ARGUMENT", replayed, replayed},
		4:  {"DEADLINE_EXCEEDED", again, replayed},
		5:  {"NOT_FOUND", replayed, replayed},
		6:  {"ALREADY_EXISTS", replayed, replayed},
		7:  {"PERMISSION_DENIED", refused, again},
		8:  {"RESOURCE_EXHAUSTED", refused, again},
		9:  {"FAILED_PRECONDITION", replayed, replayed},
		10: {"ABORTED", again, replayed},
		11: {"OUT_OF_RANGE", replayed, replayed},
		12: {"UNIMPLEMENTED", again, replayed},
		13: {"INTERNAL", again, replayed},
		14: {"UNAVAILABLE", again, replayed},
		15: {"DATA_LOSS", again, replayed},
		16: {"UNAUTHENTICATED", refused, again},
		17: {"no code", replayed, replayed},
	} {
		for _, atMostOnce := range []bool{false, true} {
			t.Run(fmt.Sprint(row.name, ", AtMostOnce ", atMostOnce), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					attempt := 0
					c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{AtMostOnce: atMostOnce},
						func(w http.ResponseWriter, r *http.Request) {
							attempt = idemtest.Execution(r).Attempt()
							sayStatus(w, fmt.Sprint(code))
						})
					c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 message"})
					time.Sleep(time.Hour) // longer than a lease, shorter than the TTL
					resp := c.Do(c.Request(idemtest.Exchange{Key: "a"}))
					want := row.byDefault
					if atMostOnce {
						want = row.atMostOnce
					}
					got := map[int]string{1: refused, 2: again}[attempt]
					if c.Runs() == 1 {
						got = replayed
						require.Equal(t, "true", resp.Header.Get("Idempotent-Replayed"))
					}
					require.Equal(t, want, got)
					_, err := io.Copy(io.Discard, resp.Body)
					require.NoError(t, err)
					require.Equal(t, fmt.Sprint(code), resp.Trailer.Get("Grpc-Status"))
				})
			})
		}
	}
}

// Where the status of an unavailable service may stand, and what looks like one.
func TestGRPCStatusIsFound(t *testing.T) {
	inHeader := func(contentType, name, value string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.Header()[name] = []string{value}
			w.WriteHeader(http.StatusOK)
		}
	}
	inTrailers := func(header, trailer string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", header)
			w.WriteHeader(http.StatusOK)
			w.Header()["Trailer:grpc-status"] = []string{trailer}
		}
	}
	for name, row := range map[string]struct {
		handler http.HandlerFunc
		runs    int
	}{
		"a declared trailer": {func(w http.ResponseWriter, _ *http.Request) { sayStatus(w, "14") }, 2},
		"a trailer after a flush": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			w.(http.Flusher).Flush()
			w.Header().Set("Grpc-Status", "14")
		}, 2},
		"an undeclared trailer":            {inHeader("application/grpc", "Trailer:Grpc-Status", "14"), 2},
		"the header, without a body":       {inHeader("application/grpc", "Grpc-Status", "14"), 2},
		"a name as HTTP/2 writes it":       {inHeader("application/grpc", "grpc-status", "14"), 2},
		"the trailer counts, a failure":    {inTrailers("0", "14"), 2},
		"the trailer counts, a success":    {inTrailers("14", "0"), 1},
		"gRPC with an encoding":            {inHeader("application/grpc+json; charset=utf-8", "Grpc-Status", "14"), 2},
		"in capitals":                      {inHeader(" Application/GRPC;x=y", "Grpc-Status", "14"), 2},
		"gRPC-Web":                         {inHeader("application/grpc-web+proto", "Grpc-Status", "14"), 2},
		"gRPC-Web as text":                 {inHeader("application/grpc-web-text+proto", "Grpc-Status", "14"), 2},
		"another type that begins like it": {inHeader("application/grpcish", "Grpc-Status", "14"), 1},
		"another type":                     {inHeader("application/json", "Grpc-Status", "14"), 1},
		"no type":                          {inHeader("", "Grpc-Status", "14"), 1},
		"no status":                        {inHeader("application/grpc", "X-Status", "14"), 1},
		"an empty status":                  {inHeader("application/grpc", "Grpc-Status", ""), 1},
		"a status that is no number":       {inHeader("application/grpc", "Grpc-Status", "UNAVAILABLE"), 1},
		"a negative status":                {inHeader("application/grpc", "Grpc-Status", "-14"), 1},
		"no status, and HTTP is unavailable": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.WriteHeader(http.StatusServiceUnavailable)
		}, 2},
		"the status counts, and not HTTP's": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "5")
			w.WriteHeader(http.StatusServiceUnavailable)
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, row.handler)
			for range 2 {
				c.Do(c.Request(idemtest.Exchange{Key: "a"}))
			}
			require.Equal(t, row.runs, c.Runs())
		})
	}
}

// A ShouldStore of one's own decides by itself, and finds the status.
func TestShouldStoreSeesGRPC(t *testing.T) {
	for _, final := range []bool{true, false} {
		c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{
			ShouldStore: func(status int, h http.Header) bool {
				require.Equal(t, http.StatusOK, status)
				require.Equal(t, "14", h.Get("Grpc-Status"))
				require.Equal(t, []string{"retry"}, h["Trailer:X-Advice"])
				return final
			},
		}, func(w http.ResponseWriter, _ *http.Request) {
			sayStatus(w, "14")
			w.Header()["Trailer:X-Advice"] = []string{"retry"}
		})
		c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 message"})
		want := map[bool]string{true: "replay 200 message", false: "200 message"}[final]
		c.Check(t, 1, idemtest.Exchange{Key: "a", Get: want})
	}
}

// What is told of a response that is not kept, and in an event, is the HTTP
// status that the client has seen.
func TestGRPCResponseThatIsNotKept(t *testing.T) {
	events := &idemtest.EventLog{}
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxResponseBytes: 1, OnEvent: events.Add},
		func(w http.ResponseWriter, _ *http.Request) { sayStatus(w, "3") })
	c.Check(t, 0, idemtest.Exchange{Key: "a", Get: "200 message"})
	c.Check(t, 1, idemtest.Exchange{Key: "a", Get: "409 response_not_stored", Original: 200})
	require.Equal(t, []string{"executed 200", "response_not_stored 409"}, events.All())
}

// A handler that met a broken body and says that it failed has not done the
// work; one that says OK has done a part of it.
func TestGRPCOverABodyThatBreaksOff(t *testing.T) {
	for name, row := range map[string]struct {
		code, then string
		original   int
	}{
		"not done": {code: "3", then: "200 message"}, // final, had the body come whole
		"done":     {code: "0", then: "409 response_not_stored", original: 200},
	} {
		t.Run(name, func(t *testing.T) {
			c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{MaxBufferedBody: 64},
				func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					sayStatus(w, row.code)
				})
			r := c.Request(idemtest.Exchange{Key: "a", Body: upload(600, 'x')})
			r.Body = &brokenBody{strings.NewReader(upload(500, 'x')), io.ErrUnexpectedEOF}
			require.NotNil(t, c.Do(r))
			c.Check(t, 1, idemtest.Exchange{Key: "a", Body: upload(600, 'x'), Get: row.then, Original: row.original})
		})
	}
}
