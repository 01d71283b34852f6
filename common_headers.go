package idempotency

// commonHeaders are headers that a stored response names by a number, which
// takes a tenth off a usual record, in Redis and in memory. Entries of one name
// stand together, the one for any other value last.
//
// Records outlive deployments: entries are never changed, and new ones come at
// the end, with all of their name.
var commonHeaders = [...]struct{ name, value string }{
	{"Content-Type", "application/json"},
	{"Content-Type", "application/json; charset=utf-8"},
	{"Content-Type", "application/json; charset=UTF-8"},
	{"Content-Type", "application/problem+json"},
	{"Content-Type", "text/plain; charset=utf-8"},
	{"Content-Type", "text/html; charset=utf-8"},
	{"Content-Type", ""},
	{"Cache-Control", "no-store"},
	{"Cache-Control", "no-cache"},
	{"Cache-Control", ""},
	{"X-Content-Type-Options", "nosniff"},
	{"X-Content-Type-Options", ""},
	{"Access-Control-Allow-Origin", "*"},
	{"Access-Control-Allow-Origin", ""},
	{"Access-Control-Expose-Headers", ""},
	{"Content-Disposition", ""},
	{"Content-Encoding", ""},
	{"Content-Language", ""},
	{"Content-Length", ""},
	{"Content-Location", ""},
	{"Content-Security-Policy", ""},
	{"Date", ""},
	{"Deprecation", ""},
	{"Etag", ""},
	{"Expires", ""},
	{"Idempotency-Key", ""},
	{"Last-Modified", ""},
	{"Link", ""},
	{"Location", ""},
	{"Pragma", ""},
	{"Ratelimit", ""},
	{"Ratelimit-Policy", ""},
	{"Referrer-Policy", ""},
	{"Request-Id", ""},
	{"Retry-After", ""},
	{"Server", ""},
	{"Server-Timing", ""},
	{"Strict-Transport-Security", ""},
	{"Sunset", ""},
	{"Traceparent", ""},
	{"Vary", ""},
	{"X-Correlation-Id", ""},
	{"X-Frame-Options", ""},
	{"X-Powered-By", ""},
	{"X-Ratelimit-Limit", ""},
	{"X-Ratelimit-Remaining", ""},
	{"X-Ratelimit-Reset", ""},
	{"X-Request-Id", ""},
}

// commonNames has the first entry of each name.
var commonNames = func() map[string]int {
	m := make(map[string]int)
	for i := len(commonHeaders) - 1; i >= 0; i-- {
		m[commonHeaders[i].name] = i
	}
	return m
}()

// commonHeader returns the number of what f sets. It is false when there is
// none.
func commonHeader(f *headerField) (n int, ok bool) {
	if f.op != opSet || len(f.values) != 1 {
		return 0, false
	}
	n, ok = commonNames[f.name]
	for ok && commonHeaders[n].value != "" && commonHeaders[n].value != f.values[0] {
		n++
	}
	return n, ok
}
