package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency"
)

func TestMetrics(t *testing.T) {
	api := newHandler(nil)
	charge := func(key, body string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/charge", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		return w.Code
	}
	require.Equal(t, http.StatusCreated, charge("", "amount=1"), "not counted: it has no key")
	require.Equal(t, http.StatusCreated, charge("a", "amount=1"))
	require.Equal(t, http.StatusCreated, charge("a", "amount=1"))
	require.Equal(t, http.StatusUnprocessableEntity, charge("a", "amount=2"))
	require.Equal(t, http.StatusBadRequest, charge("b", ""))
	require.Equal(t, http.StatusCreated, charge("b", "amount=1"))
	require.Equal(t, http.StatusBadRequest, charge("not a key", "amount=1"))

	w := httptest.NewRecorder()
	api.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code)
	for _, line := range []string{
		`idempotency_requests_total{outcome="executed"} 2`,
		`idempotency_requests_total{outcome="released"} 1`,
		`idempotency_requests_total{outcome="replayed"} 1`,
		`idempotency_requests_total{outcome="key_reused"} 1`,
		`idempotency_requests_total{outcome="key_invalid"} 1`,
		`idempotency_requests_total{outcome="outcome_unknown"} 0`,
		`idempotency_request_duration_seconds_count{outcome="executed"} 2`,
		`idempotency_wait_seconds_count 0`,
		`idempotency_repeated_attempts_total 1`,
	} {
		require.Contains(t, w.Body.String(), line+"\n")
	}
}

// The rules and the dashboard name metrics that the program exports, outcomes that
// the page explains, and sections that the page has.
func TestAlertsFitTheProgram(t *testing.T) {
	rules, err := os.ReadFile("alerts.yml")
	require.NoError(t, err)
	dashboard, err := os.ReadFile("dashboard.json")
	require.NoError(t, err)
	require.True(t, json.Valid(dashboard))
	page, err := os.ReadFile("../../docs/operating.md")
	require.NoError(t, err)

	reg := prometheus.NewRegistry()
	observe := newMetrics(reg)
	observe(t.Context(), idempotency.Event{Outcome: idempotency.OutcomeExecuted, Attempt: 2, Waited: 1})
	families, err := reg.Gather()
	require.NoError(t, err)
	exported := map[string]bool{}
	for _, family := range families {
		exported[family.GetName()] = true
	}
	used := regexp.MustCompile(`idempotency_[a-z_]+`).FindAllString(string(rules)+string(dashboard), -1)
	require.NotEmpty(t, used)
	for _, name := range used {
		require.True(t, exported[strings.TrimSuffix(name, "_bucket")], name)
	}
	for _, match := range regexp.MustCompile(`outcome=~?"([a-z_|]+)"`).FindAllStringSubmatch(string(rules)+strings.ReplaceAll(string(dashboard), `\"`, `"`), -1) {
		for outcome := range strings.SplitSeq(match[1], "|") {
			require.Contains(t, string(page), "`"+outcome+"`")
		}
	}
	for _, match := range regexp.MustCompile(`action: docs/operating.md, (.*)`).FindAllStringSubmatch(string(rules), -1) {
		for _, section := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(match[1], -1) {
			require.Contains(t, string(page), "## "+section[1]+"\n")
		}
	}
}

// promtool knows whether the rules are well-formed, where it is installed.
func TestAlertsAreWellFormed(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed")
	}
	out, err := exec.CommandContext(t.Context(), promtool, "check", "rules", "alerts.yml").CombinedOutput()
	require.NoError(t, err, "%s", out)
}
