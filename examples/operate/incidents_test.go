//go:build unix

package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-idempotency/idempotency"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// The incidents of docs/operating.md, each with a Redis of its own.

// startRedis returns a client of a new Redis and the process of it.
func startRedis(t *testing.T, args ...string) (*redis.Client, *os.Process) {
	path, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("REDIS_REQUIRED") != "1" {
		t.Skip("there is no redis-server")
	}
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	_, port, _ := net.SplitHostPort(addr)
	server := exec.Command(path, append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", t.TempDir()}, args...)...)
	require.NoError(t, server.Start())
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	client := redis.NewClient(&redis.Options{Addr: addr, ContextTimeoutEnabled: true})
	t.Cleanup(func() { _ = client.Close() })
	require.Eventually(t, func() bool { return client.Ping(context.Background()).Err() == nil }, 10*time.Second, 10*time.Millisecond)
	return client, server.Process
}

func send(h http.Handler, key string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/charge", strings.NewReader("amount=1"))
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	func() {
		defer func() { _ = recover() }() // as http.Server does
		h.ServeHTTP(w, r)
	}()
	return w
}

func TestRedisIsFull(t *testing.T) {
	client, _ := startRedis(t, "--maxmemory-policy", "noeviction")
	service := idempotency.Middleware(idempotency.NewRedisStore(client, nil), nil)
	begun, finish := make(chan struct{}, 1), make(chan struct{})
	h := service(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Idempotency-Key") == "running" {
			begun <- struct{}{}
			<-finish
		}
		w.WriteHeader(http.StatusCreated)
	}))
	require.Equal(t, http.StatusCreated, send(h, "before").Code)
	running := make(chan int, 1)
	go func() { running <- send(h, "running").Code }()
	<-begun
	require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "1").Err())
	w := send(h, "new")
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Contains(t, w.Body.String(), "store_unavailable")
	require.Equal(t, "true", send(h, "before").Header().Get("Idempotent-Replayed"))
	close(finish)
	require.Equal(t, http.StatusCreated, <-running)
	require.Equal(t, "true", send(h, "running").Header().Get("Idempotent-Replayed"))
	require.NoError(t, client.ConfigSet(t.Context(), "maxmemory", "0").Err())
	require.Equal(t, http.StatusCreated, send(h, "new").Code)
}

func TestRedisIsAwayDuringADeployment(t *testing.T) {
	client, server := startRedis(t)
	background := new(idempotency.Background)
	options := &idempotency.Options{Background: background}
	var runs atomic.Int32
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if runs.Add(1) == 1 {
			_ = server.Signal(syscall.SIGSTOP)
		}
		w.WriteHeader(http.StatusCreated)
	})
	h := idempotency.Middleware(idempotency.NewRedisStore(client, nil), options)(handler)
	require.Equal(t, http.StatusCreated, send(h, "order-17").Code, "answered while Redis is away")
	require.Equal(t, http.StatusServiceUnavailable, send(h, "new").Code)
	time.AfterFunc(10*time.Second, func() { _ = server.Signal(syscall.SIGCONT) })
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	require.NoError(t, background.Wait(ctx))

	next := idempotency.Middleware(idempotency.NewRedisStore(client, nil), nil)(handler)
	require.Equal(t, "true", send(next, "order-17").Header().Get("Idempotent-Replayed"))
	require.EqualValues(t, 1, runs.Load())
}

func TestACustomerIsStuck(t *testing.T) {
	client, _ := startRedis(t)
	attempts := make(chan int, 2)
	h := idempotency.Middleware(idempotency.NewRedisStore(client, &idempotency.RedisOptions{Prefix: "shop:"}),
		&idempotency.Options{AtMostOnce: true, Lease: time.Second})(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e, _ := idempotency.FromContext(r.Context())
		attempts <- e.Attempt()
		if e.Attempt() == 1 {
			panic("the process dies")
		}
		w.WriteHeader(http.StatusCreated)
	}))
	send(h, "order-17")
	require.Equal(t, 1, <-attempts)
	require.Eventually(t, func() bool { return strings.Contains(send(h, "order-17").Body.String(), "outcome_unknown") },
		10*time.Second, 50*time.Millisecond)
	args := []string{"forget", "POST", "/charge", "order-17", "-redis", client.Options().Addr, "-prefix", "shop:", "-yes"}
	var out strings.Builder
	code := run(t.Context(), args, func(string) string { return "" }, strings.NewReader(""), &out, io.Discard)
	require.Equal(t, exitDone, code, out.String())
	require.Equal(t, http.StatusCreated, send(h, "order-17").Code)
	require.Equal(t, 2, <-attempts)
}
