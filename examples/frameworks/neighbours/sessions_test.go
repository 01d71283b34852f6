package neighbours

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/examples/frameworks/internal/try"
	"github.com/stretchr/testify/require"
)

// cookieOf returns the session that an answer sets, as a client sends it.
func cookieOf(t *testing.T, a try.Answer) string {
	t.Helper()
	cookies := (&http.Response{Header: a.Header}).Cookies()
	require.Len(t, cookies, 1)
	return cookies[0].Name + "=" + cookies[0].Value
}

// login makes a session of a user and returns its cookie.
func login(t *testing.T, sessions *scs.SessionManager, user string) string {
	t.Helper()
	url := try.Serve(t, sessions.LoadAndSave(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		sessions.Put(r.Context(), "user", user)
	})))
	r := try.Request(t, url, "")
	r.Header.Del("Idempotency-Key")
	return cookieOf(t, try.Send(t, r))
}

// With the sessions outside, the Set-Cookie of a replay is that of its own
// session: here each answer extends the session, as IdleTimeout does.
func TestSessionsOutside(t *testing.T) {
	sessions := scs.New()
	sessions.IdleTimeout = time.Hour
	cookie := login(t, sessions, "alice")
	s := newShop(idempotency.Options{})
	url := try.Serve(t, sessions.LoadAndSave(s.once(s.counted(func(w http.ResponseWriter, r *http.Request) {
		sessions.Put(r.Context(), "charges", sessions.GetInt(r.Context(), "charges")+1)
		w.WriteHeader(http.StatusCreated)
	}))))

	for i := range 2 {
		answer := post(t, url, "Cookie", cookie)
		require.Equal(t, i == 1, answer.Replayed)
		require.Equal(t, cookie, cookieOf(t, answer))
		require.Equal(t, []string{"Cookie"}, answer.Header.Values("Vary"))
		require.Equal(t, []string{`no-cache="Set-Cookie"`}, answer.Header.Values("Cache-Control"))
	}
	ctx, err := sessions.Load(t.Context(), cookie[len("session="):])
	require.NoError(t, err)
	require.Equal(t, 1, sessions.GetInt(ctx, "charges"))
	require.EqualValues(t, 1, s.runs.Load())
}

// A handler that renews the token changes the cookie of its client, and so a
// retry of the client that has got it. Scope says that it is the same user.
func TestSessionsThatRenewTheToken(t *testing.T) {
	for name, scoped := range map[string]bool{"without Scope": false, "with Scope": true} {
		t.Run(name, func(t *testing.T) {
			sessions := scs.New()
			cookie := login(t, sessions, "alice")
			opts := idempotency.Options{}
			if scoped {
				opts.Scope = func(r *http.Request) string { return sessions.GetString(r.Context(), "user") }
			}
			s := newShop(opts)
			url := try.Serve(t, sessions.LoadAndSave(s.once(s.counted(func(w http.ResponseWriter, r *http.Request) {
				if err := sessions.RenewToken(r.Context()); err != nil {
					http.Error(w, err.Error(), http.StatusInternalServerError)
				}
			}))))

			renewed := cookieOf(t, post(t, url, "Cookie", cookie))
			require.NotEqual(t, cookie, renewed)
			retry := post(t, url, "Cookie", renewed)
			require.Equal(t, scoped, retry.Replayed)
			require.Equal(t, !scoped, retry.Status == http.StatusUnprocessableEntity)
			require.EqualValues(t, 1, s.runs.Load())

			stranger := post(t, url, "Cookie", login(t, sessions, "bob"))
			require.False(t, stranger.Replayed)
			require.Equal(t, scoped, stranger.Status == http.StatusOK, "with Scope the key of bob is another")
		})
	}
}

// Outside, the session is saved when the response goes out, which is after it was
// stored. When that fails, the client sees the failure and a retry the response.
// The handler has run once.
func TestSessionsOutsideThatCannotBeSaved(t *testing.T) {
	sessions := scs.New()
	cookie := login(t, sessions, "alice")
	store := &failingStore{Store: sessions.Store}
	sessions.Store = store
	s := newShop(idempotency.Options{})
	url := try.Serve(t, sessions.LoadAndSave(s.once(s.counted(func(w http.ResponseWriter, r *http.Request) {
		sessions.Put(r.Context(), "charged", true)
		w.WriteHeader(http.StatusCreated)
	}))))

	store.fails = true
	require.Equal(t, http.StatusInternalServerError, post(t, url, "Cookie", cookie).Status)
	store.fails = false
	retry := post(t, url, "Cookie", cookie)
	require.True(t, retry.Replayed)
	require.Equal(t, http.StatusCreated, retry.Status)
	require.EqualValues(t, 1, s.runs.Load())
	ctx, err := sessions.Load(t.Context(), cookie[len("session="):])
	require.NoError(t, err)
	require.False(t, sessions.GetBool(ctx, "charged"), "what the handler put into the session is lost")
}

type failingStore struct {
	scs.Store
	fails bool
}

func (s *failingStore) Commit(token string, b []byte, expiry time.Time) error {
	if s.fails {
		return context.DeadlineExceeded
	}
	return s.Store.Commit(token, b, expiry)
}

// Inside, a replay loads no session, so it extends none, and has no Set-Cookie:
// that of the first answer is not replayed. Scope cannot see the user.
func TestWrongSessionsInside(t *testing.T) {
	sessions := scs.New()
	sessions.IdleTimeout = time.Hour
	cookie := login(t, sessions, "alice")
	s := newShop(idempotency.Options{})
	url := try.Serve(t, s.once(sessions.LoadAndSave(s.charge())))

	require.NotEmpty(t, post(t, url, "Cookie", cookie).Header.Get("Set-Cookie"))
	retry := post(t, url, "Cookie", cookie)
	require.True(t, retry.Replayed)
	require.Empty(t, retry.Header.Get("Set-Cookie"))
}
