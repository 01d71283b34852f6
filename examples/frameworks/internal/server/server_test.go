package server

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/stretchr/testify/require"
)

// A request that is running when the program is told to stop gets its answer.
func TestServeFinishesWhatRuns(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	started, finish := make(chan struct{}), make(chan struct{})
	background := new(idempotency.Background)
	once := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{Background: background})
	h := once(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(started)
		<-finish
		_, _ = io.WriteString(w, "charged")
	}))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served, answer := make(chan error, 1), make(chan string, 1)
	go func() { served <- serve(ctx, listener, h, background) }()
	go func() { answer <- charge(t.Context(), "http://"+listener.Addr().String()) }()
	<-started
	stop()
	close(finish)
	require.Equal(t, "charged", <-answer)
	require.NoError(t, <-served)
}

func charge(ctx context.Context, url string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader("amount=100"))
	if err != nil {
		return err.Error()
	}
	req.Header.Set("Idempotency-Key", "order-17")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
