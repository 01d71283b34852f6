package fuzz

import (
	"net/http"
	"regexp"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/internal/idemtest"
	"github.com/stretchr/testify/require"
)

// grpcType is a Content-Type of gRPC (its specification "gRPC over HTTP2") or of
// gRPC-Web.
var grpcType = regexp.MustCompile(`(?is)^\s*application/grpc(-web|-web-text)?(\s*|\+[^;]*)(;.*)?$`)

// httpStatus is what a response with this Grpc-Status counts as. A code that
// does not exist says nothing, and neither does any code in another type of
// response.
func httpStatus(contentType, code string, status int) int {
	statuses := map[string]int{
		"0": 200, "1": 503, "2": 500, "3": 400, "4": 504, "5": 404, "6": 409, "7": 403, "8": 429,
		"9": 400, "10": 503, "11": 400, "12": 501, "13": 500, "14": 503, "15": 500, "16": 401,
	}
	if counts, ok := statuses[code]; ok && grpcType.MatchString(contentType) {
		return counts
	}
	return status
}

// FuzzGRPCStatus holds a response with a Grpc-Status against one with the HTTP
// status that it counts as: a retry runs after both, or after neither.
func FuzzGRPCStatus(f *testing.F) {
	for _, code := range []string{"", "0", "00", "7", "14", "16", "17", "-1", "14 ", "x"} {
		f.Add("application/grpc", code, uint16(200), uint8(0))
		f.Add("application/grpc-web+proto; a=b", code, uint16(200), uint8(1))
		f.Add("application/json", code, uint16(500), uint8(2))
	}
	f.Fuzz(func(t *testing.T, contentType, code string, status uint16, where uint8) {
		if status < 200 || status > 999 {
			return
		}
		names := []string{"Grpc-Status", http.TrailerPrefix + "Grpc-Status", http.TrailerPrefix + "grpc-status"}
		grpc := func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Content-Type"] = []string{contentType}
			w.Header()[names[int(where)%len(names)]] = []string{code}
			w.WriteHeader(int(status))
		}
		plain := func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(httpStatus(contentType, code, int(status)))
		}
		require.Equal(t, runsAgain(plain), runsAgain(grpc), "%q %q %d", contentType, code, status)
	})
}

// runsAgain reports whether a retry runs the handler.
func runsAgain(handler http.HandlerFunc) bool {
	runs := 0
	c := idemtest.NewClient(idempotency.NewMemoryStore(), &idempotency.Options{}, http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			runs++
			handler(w, r)
		}))
	for range 2 {
		c.Do(c.Request(idemtest.Exchange{Key: "k"}))
	}
	return runs == 2
}
