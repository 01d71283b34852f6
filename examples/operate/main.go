// Command operate shows what a service keeps in Redis or PostgreSQL under a
// client's key, and frees a key whose outcome a person has settled:
//
//	operate show POST /charge order-17 -scope alice -redis 127.0.0.1:6379 -prefix shop:
//	operate forget POST /charge order-17 -scope alice -redis rediss://redis.internal:6380
//	operate show POST /charge order-17 -scope alice -postgres postgres://operator@db.internal/shop
//
// Scope, prefix, method and path are those of the service: what Options.Scope
// returned for the client, RedisOptions.Prefix, and the path as the client sent
// it. The key may be bare or quoted, as in the Idempotency-Key header. The
// environment has what should not stand in a list of processes:
//
//   - REDIS_USERNAME and REDIS_PASSWORD, for a Redis that asks for them;
//   - PGPASSWORD, and the other variables of PostgreSQL's own programs;
//   - IDEMPOTENCY_AEAD_KEY, in hex, for a service that seals its responses with
//     AES-GCM (Options.AEAD).
//
// admin.go has the same as an http.Handler, for a service's own admin pages.
package main

import (
	"bufio"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/go-idempotency/idempotency"
)

// The exit codes, for scripts.
const (
	exitDone         = 0 // shown, or forgotten
	exitFailed       = 1 // the store failed, or the cell has changed meanwhile
	exitUsage        = 2
	exitNothing      = 3 // there is nothing under this key
	exitRunning      = 4 // not forgotten: a handler is running
	exitNotConfirmed = 5 // not forgotten: it was not confirmed
)

const usage = `usage: operate show   METHOD PATH KEY [flags]
       operate forget METHOD PATH KEY [flags]

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// A command is one call of the program.
type command struct {
	operator
	request
	timeout time.Duration // of each question to the store
	yes     bool
	in      io.Reader
	out     io.Writer
}

// run is main without its process.
func run(ctx context.Context, args []string, getenv func(string) string, in io.Reader, out, errOut io.Writer) int {
	c := &command{in: in, out: out}
	flags := flag.NewFlagSet("operate", flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.Usage = func() { _, _ = io.WriteString(errOut, usage); flags.PrintDefaults() }
	var at location
	at.addTo(flags)
	flags.StringVar(&c.Scope, "scope", "", "what Options.Scope returned for the client")
	flags.DurationVar(&c.ttl, "ttl", 24*time.Hour, "Options.TTL of the service, to tell how long ago something was")
	flags.DurationVar(&c.timeout, "timeout", 5*time.Second, "how long to wait for the store")
	flags.BoolVar(&c.yes, "yes", false, "forget without asking")
	words, err := parse(flags, args)
	if err != nil {
		return exitUsage // flags has said why
	}
	if len(words) != 4 || words[0] != "show" && words[0] != "forget" {
		flags.Usage()
		return exitUsage
	}
	c.Method, c.Path, c.Key = words[1], words[2], clientKey(words[3])
	store, closeStore, err := at.open(ctx, getenv)
	if err == nil {
		defer closeStore()
		c.store = store
		c.aead, err = newAEAD(getenv("IDEMPOTENCY_AEAD_KEY"))
	}
	if err != nil {
		_, _ = fmt.Fprintln(errOut, "operate:", err)
		return exitUsage
	}
	code, err := c.do(ctx, words[0] == "forget")
	if err != nil {
		_, _ = fmt.Fprintln(errOut, "operate:", err)
	}
	return code
}

// parse allows flags between the words and after them. What follows a "--" is no
// flag, so a key may begin with a dash.
func parse(flags *flag.FlagSet, args []string) (words []string, err error) {
	var last []string
	for i, arg := range args {
		if arg == "--" {
			args, last = args[:i], args[i+1:]
			break
		}
	}
	for len(args) > 0 {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if args = flags.Args(); len(args) > 0 {
			words, args = append(words, args[0]), args[1:]
		}
	}
	return append(words, last...), nil
}

// newAEAD returns AES-GCM. A service that seals its responses otherwise makes
// its own AEAD here.
func newAEAD(key string) (cipher.AEAD, error) {
	if key == "" {
		return nil, nil
	}
	b, err := hex.DecodeString(key)
	if err != nil {
		return nil, errors.New("IDEMPOTENCY_AEAD_KEY is not hex")
	}
	block, err := aes.NewCipher(b)
	if err != nil {
		return nil, fmt.Errorf("IDEMPOTENCY_AEAD_KEY: %w", err)
	}
	return cipher.NewGCM(block)
}

// do shows the cell, and with forget has it forgotten if that is confirmed.
func (c *command) do(ctx context.Context, forget bool) (code int, err error) {
	asked, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	seen, shown, err := c.look(asked, c.request)
	if err != nil {
		return exitFailed, fmt.Errorf("cannot look into the store: %w", err)
	}
	shown.print(c.out)
	switch {
	case seen.State == 0:
		return exitNothing, nil
	case !forget:
		return exitDone, nil
	case seen.State == idempotency.InProgress:
		return exitRunning, errors.New("not forgotten: a handler is running")
	}
	if !c.confirmed() {
		return exitNotConfirmed, errors.New("not forgotten: not confirmed")
	}
	// The person may have taken long, so the store is asked within a time of its own.
	// That the cell may have changed meanwhile is why Forget gets what was seen.
	asked, cancel = context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err = c.store.Forget(asked, c.storeKey(), seen)
	switch {
	case errors.Is(err, idempotency.ErrInProgress):
		return exitRunning, fmt.Errorf("not forgotten: %w", err)
	case errors.Is(err, idempotency.ErrCellChanged):
		return exitFailed, fmt.Errorf("not forgotten: %w", err)
	case err != nil:
		return exitFailed, fmt.Errorf("it is not known whether the key was forgotten; look again: %w", err)
	}
	_, _ = fmt.Fprintln(c.out, "forgotten: the next request under this key runs the handler")
	return exitDone, nil
}

// confirmed says what forgetting means, and has the person type the key. A single
// letter is typed too easily.
func (c *command) confirmed() bool {
	_, _ = fmt.Fprintln(c.out, "\n"+forgetting)
	if c.yes {
		return true
	}
	_, _ = fmt.Fprint(c.out, "Type the key to forget it: ")
	line, _ := bufio.NewReader(c.in).ReadString('\n')
	return clientKey(strings.TrimSpace(line)) == c.Key
}
