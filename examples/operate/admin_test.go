package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// ask sends a request of an operator to the admin handler.
func ask(t *testing.T, h http.Handler, method string, form url.Values, site string) (int, map[string]any) {
	t.Helper()
	r := httptest.NewRequest(method, "/?"+form.Encode(), nil)
	if method == "POST" {
		r = httptest.NewRequest(method, "/", strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if site != "" {
		r.Header.Set("Sec-Fetch-Site", site)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var body map[string]any
	if strings.HasPrefix(w.Header().Get("Content-Type"), "application/json") {
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &body))
		require.Equal(t, "no-store", w.Header().Get("Cache-Control"))
	}
	return w.Code, body
}

func TestAdmin(t *testing.T) {
	s := newService(t, idempotency.Options{})
	admin := newAdmin(&operator{store: s.store, ttl: 24 * time.Hour})
	form := url.Values{"method": {"POST"}, "path": {"/charge"}, "key": {`"order-17"`}, "scope": {"alice"}}
	status, body := ask(t, admin, "GET", form, "")
	require.Equal(t, 404, status)
	require.Equal(t, "nothing there", body["state"])

	s.work = die
	require.Zero(t, s.post("order-17"))
	s.work = charge
	_, body = ask(t, admin, "GET", form, "")
	require.Equal(t, "InProgress", body["state"])
	form.Set("seen", body["seen"].(string))
	status, _ = ask(t, admin, "POST", form, "")
	require.Equal(t, 409, status)

	s.mini.FastForward(time.Minute)
	status, body = ask(t, admin, "POST", form, "")
	require.Equal(t, 409, status, "what was seen is no longer so")
	require.Contains(t, body["error"], "changed")
	status, body = ask(t, admin, "GET", form, "")
	require.Equal(t, 200, status)
	require.Equal(t, "Abandoned", body["state"])
	require.Equal(t, true, body["at_most_once"])
	require.Equal(t, forgetting, body["forgetting"])
	form.Set("seen", body["seen"].(string))

	status, _ = ask(t, admin, "POST", form, "cross-site")
	require.Equal(t, 403, status)
	require.Equal(t, 409, s.post("order-17"))
	status, _ = ask(t, admin, "POST", form, "same-origin")
	require.Equal(t, 204, status)
	require.Equal(t, 201, s.post("order-17"))

	status, body = ask(t, admin, "GET", form, "")
	require.Equal(t, 200, status)
	require.Equal(t, "replayed", body["outcome"])
	require.Equal(t, "charged \u00e4\n", body["body"])
	require.InDelta(t, 201, body["status"], 0)
	status, _ = ask(t, admin, "POST", form, "")
	require.Equal(t, 409, status, "the charge that came meanwhile is not forgotten")
	require.Equal(t, 201, s.post("order-17"))
	require.Equal(t, 2, s.runs)
}

func TestAdminRefuses(t *testing.T) {
	s := newService(t, idempotency.Options{})
	admin := newAdmin(&operator{store: s.store})
	full := func() url.Values {
		return url.Values{"method": {"POST"}, "path": {"/charge"}, "key": {"order-17"}, "seen": {"5.1.A"}}
	}
	for _, name := range []string{"method", "path", "key", "seen"} {
		form := full()
		form.Del(name)
		status, body := ask(t, admin, "POST", form, "")
		require.Equal(t, 400, status, name)
		require.NotEmpty(t, body["error"])
	}
	for _, seen := range []string{"5", "x.1.A", "5.x.A", "999.1.A"} {
		form := full()
		form.Set("seen", seen)
		status, _ := ask(t, admin, "POST", form, "")
		require.Equal(t, 400, status, seen)
	}
	s.mini.Close()
	status, _ := ask(t, admin, "GET", full(), "")
	require.Equal(t, 502, status)
	status, body := ask(t, admin, "POST", full(), "")
	require.Equal(t, 502, status)
	require.Contains(t, body["error"], "not known")
}
