package neighbours

import (
	"net/http"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/rs/cors"
	"github.com/stretchr/testify/require"
)

func newCORS() *cors.Cors {
	return cors.New(cors.Options{
		AllowedOrigins:   []string{"https://a.example", "https://b.example"},
		AllowedMethods:   []string{http.MethodPost},
		AllowedHeaders:   []string{"Idempotency-Key", "Content-Type"},
		ExposedHeaders:   []string{"Idempotent-Replayed", "Retry-After"},
		AllowCredentials: true,
	})
}

// A replay has the CORS headers of its own request, and each of them once.
func TestCORSOutside(t *testing.T) {
	s := newShop(idempotency.Options{})
	url := try.Serve(t, newCORS().Handler(s.once(s.charge())))

	first := post(t, url, "Origin", "https://a.example")
	retry := post(t, url, "Origin", "https://b.example")
	require.Equal(t, "https://a.example", first.Header.Get("Access-Control-Allow-Origin"))
	require.True(t, retry.Replayed)
	require.Equal(t, []string{"https://b.example"}, retry.Header.Values("Access-Control-Allow-Origin"))
	require.Equal(t, []string{"Origin"}, retry.Header.Values("Vary"))
	require.Equal(t, []string{"Idempotent-Replayed, Retry-After"}, retry.Header.Values("Access-Control-Expose-Headers"))
	require.Empty(t, post(t, url).Header.Get("Access-Control-Allow-Origin"), "a retry that does not come from a page")

	// A page may read a refusal too.
	refused := post(t, url+"?amount=2", "Origin", "https://b.example")
	require.Equal(t, http.StatusUnprocessableEntity, refused.Status)
	require.Equal(t, "https://b.example", refused.Header.Get("Access-Control-Allow-Origin"))
	require.EqualValues(t, 1, s.runs.Load())
}

// A preflight asks whether the header may be sent. It is not held up by
// RequireKey, as OPTIONS is no method of the middleware.
func TestCORSPreflight(t *testing.T) {
	s := newShop(idempotency.Options{RequireKey: true})
	for name, h := range map[string]http.Handler{
		"outside": newCORS().Handler(s.once(s.charge())),
		"inside":  s.once(newCORS().Handler(s.charge())),
	} {
		t.Run(name, func(t *testing.T) {
			r := try.Request(t, try.Serve(t, h), "", "Origin", "https://a.example",
				"Access-Control-Request-Method", http.MethodPost, "Access-Control-Request-Headers", "idempotency-key")
			r.Method = http.MethodOptions
			r.Header.Del("Idempotency-Key")
			answer := try.Send(t, r)
			require.Equal(t, http.StatusNoContent, answer.Status)
			require.Equal(t, "idempotency-key", answer.Header.Get("Access-Control-Allow-Headers"))
		})
	}
	require.Zero(t, s.runs.Load())
}

// Inside, a replay allows the origin of the first request, and no page may read a
// refusal.
func TestWrongCORSInside(t *testing.T) {
	s := newShop(idempotency.Options{})
	url := try.Serve(t, s.once(newCORS().Handler(s.charge())))

	post(t, url, "Origin", "https://a.example")
	retry := post(t, url, "Origin", "https://b.example")
	require.True(t, retry.Replayed)
	require.Equal(t, "https://a.example", retry.Header.Get("Access-Control-Allow-Origin"))
	refused := post(t, url+"?amount=2", "Origin", "https://a.example")
	require.Equal(t, http.StatusUnprocessableEntity, refused.Status)
	require.Empty(t, refused.Header.Get("Access-Control-Allow-Origin"))
}
