// Package server runs a handler until the program is told to stop.
package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-idempotency/idempotency"
)

// Run serves h at addr until the program is interrupted. It lets running
// requests finish, and then waits for responses that are not stored yet: without
// Wait, a deployment during an outage of the store would lose them, and retries
// would run their handlers again.
func Run(addr string, h http.Handler, background *idempotency.Background) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return serve(ctx, listener, h, background)
}

func serve(ctx context.Context, listener net.Listener, h http.Handler, background *idempotency.Background) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	return errors.Join(srv.Shutdown(limit), background.Wait(limit))
}
