package idempotency

import (
	"net/http"
	"strings"
)

// grpcStatuses are what the status codes of gRPC count as, by their number
// (https://grpc.io/docs/guides/status-codes/). They are the HTTP statuses of
// google.rpc.Code but for two: CANCELLED would be 499 and ABORTED 409. Both say
// that the client may try again and not how far the handler got, and so does a
// 503.
var grpcStatuses = map[string]int{
	"0":  http.StatusOK,
	"1":  http.StatusServiceUnavailable,  // CANCELLED
	"2":  http.StatusInternalServerError, // UNKNOWN
	"3":  http.StatusBadRequest,          // INVALID_ARGUMENT
	"4":  http.StatusGatewayTimeout,      // DEADLINE_EXCEEDED
	"5":  http.StatusNotFound,            // NOT_FOUND
	"6":  http.StatusConflict,            // ALREADY_EXISTS
	"7":  http.StatusForbidden,           // PERMISSION_DENIED
	"8":  http.StatusTooManyRequests,     // RESOURCE_EXHAUSTED
	"9":  http.StatusBadRequest,          // FAILED_PRECONDITION
	"10": http.StatusServiceUnavailable,  // ABORTED
	"11": http.StatusBadRequest,          // OUT_OF_RANGE
	"12": http.StatusNotImplemented,      // UNIMPLEMENTED
	"13": http.StatusInternalServerError, // INTERNAL
	"14": http.StatusServiceUnavailable,  // UNAVAILABLE
	"15": http.StatusInternalServerError, // DATA_LOSS
	"16": http.StatusUnauthorized,        // UNAUTHENTICATED
}

// effectiveStatus returns what a response counts as: its HTTP status, or, for
// gRPC and gRPC-Web, what its Grpc-Status says. There the HTTP status is almost
// always 200, and a client goes by the Grpc-Status where there is one. h is the
// header as the handler left it, trailers included.
//
// A client takes a response without a valid Grpc-Status for a failure. Here it
// counts as its HTTP status: the handler has finished, and nothing says that it
// may run again. A gRPC-Web response that has a message is such a one, since its
// status is at the end of the body.
func effectiveStatus(status int, h http.Header) int {
	if !isGRPC(h.Get("Content-Type")) {
		return status
	}
	code, inTrailer := "", false
	for name, values := range h {
		bare, prefixed := strings.CutPrefix(name, http.TrailerPrefix)
		if strings.EqualFold(bare, "Grpc-Status") && len(values) > 0 && (prefixed || !inTrailer) {
			code, inTrailer = values[0], prefixed
		}
	}
	if counts, ok := grpcStatuses[code]; ok {
		return counts
	}
	return status
}

// isGRPC reports whether a Content-Type is one of gRPC or gRPC-Web, with any
// encoding of messages after a plus sign.
func isGRPC(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	media, _, _ = strings.Cut(strings.ToLower(strings.TrimSpace(media)), "+")
	switch media {
	case "application/grpc", "application/grpc-web", "application/grpc-web-text":
		return true
	}
	return false
}
