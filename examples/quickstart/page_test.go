package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// counts are the numbers of GET /charges, and those that the page shows.
type counts struct{ With, Without int }

func get(t *testing.T, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(body)
}

func charges(t *testing.T, server string) (c counts) {
	t.Helper()
	_, body := get(t, server+"/charges")
	require.NoError(t, json.Unmarshal([]byte(body), &c))
	return c
}

func TestPageLoadsNothingElse(t *testing.T) {
	srv := httptest.NewServer(newHandler(nil))
	defer srv.Close()
	res, body := get(t, srv.URL+"/")
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.Equal(t, "text/html; charset=utf-8", res.Header.Get("Content-Type"))
	require.Contains(t, res.Header.Get("Content-Security-Policy"), "default-src 'none'")
	require.NotRegexp(t, regexp.MustCompile(`https?://|src=|@import|url\(`), body)

	res, _ = get(t, srv.URL+"/elsewhere")
	require.Equal(t, http.StatusNotFound, res.StatusCode)
}

// losing sends a charge whose answer gets lost.
func losing(t *testing.T, url string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("amount=100"))
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Idempotency-Key", "order-17")
	req.Header.Set("Lose-Answer", "true")
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	_, err = io.ReadAll(res.Body)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

// The requests of one payment in the flaky network, as the page sends them.
func TestLostAnswersChargeOnceWithTheMiddlewareOnly(t *testing.T) {
	srv := httptest.NewServer(newHandler(nil))
	defer srv.Close()
	require.Equal(t, counts{}, charges(t, srv.URL))
	for _, path := range []string{"/charge", "/unprotected/charge"} {
		losing(t, srv.URL+path)
		losing(t, srv.URL+path)
	}
	res, body := post(t, srv.URL+"/charge", "order-17", "amount=100")
	require.Equal(t, "charge 1: 100\n", body)
	require.Equal(t, "true", res.Header.Get("Idempotent-Replayed"))
	res, body = post(t, srv.URL+"/unprotected/charge", "order-17", "amount=100")
	require.Equal(t, "charge 3: 100\n", body)
	require.Empty(t, res.Header.Get("Idempotent-Replayed"))
	require.Equal(t, counts{With: 1, Without: 3}, charges(t, srv.URL))
}

// driver pays twice, first in the flaky network and then in a good one, as a
// visitor does, and reports what the page shows after each.
const driver = `<script>
(async () => {
  const shown = [];
  for (const flaky of [true, false]) {
    if ($('flaky').checked !== flaky) $('flaky').click();
    $('pay').click();
    while ($('pay').disabled) await new Promise((resolve) => setTimeout(resolve, 10));
    shown.push({
      with: Number($('with').textContent), without: Number($('without').textContent),
      payments: Number($('payments').textContent),
      tries: [...$('tries-with').children].map((item) => item.textContent),
    });
  }
  await fetch('shown', { method: 'POST', body: JSON.stringify(shown) });
})();
</script>`

// What a visitor sees in a real browser.
func TestPageInChromium(t *testing.T) {
	browser := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		t.Skip("needs chromium")
	}
	handler := newHandler(nil)
	shown := make(chan string, 1)
	mux := http.NewServeMux()
	mux.Handle("/", handler)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r)
		_, _ = io.WriteString(w, driver)
	})
	mux.HandleFunc("POST /shown", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		shown <- string(body)
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()

	// Processes of the browser may write for a moment after it was ended, so the
	// folder is not that of the test, which has to be gone at the end.
	profile, err := os.MkdirTemp("", "chromium")
	require.NoError(t, err)
	defer os.RemoveAll(profile)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--no-first-run", "--disable-background-networking", "--user-data-dir="+profile,
		"--remote-debugging-port=0", srv.URL+"/") // with the port, the browser stays until it is ended
	require.NoError(t, cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait()
	}()
	select {
	case got := <-shown:
		require.JSONEq(t, `[
			{"payments":1, "with":1, "without":3, "tries":[
				"no answer: was it charged? Try again.", "no answer: was it charged? Try again.", "201 charge 1: 100 (replayed)"]},
			{"payments":2, "with":2, "without":4, "tries":["201 charge 2: 100"]}
		]`, got)
	case <-ctx.Done():
		require.Fail(t, "the page did not come to an end")
	}
}
