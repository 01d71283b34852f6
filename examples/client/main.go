// Command client sends one operation and repeats it until it knows the answer.
// When it is interrupted or out of tries, it says how to resume the operation:
// with the same key. The part to copy is client.go, which needs nothing else.
//
// Run the quickstart example as the server, and stop it in between.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"time"
)

func main() {
	url := flag.String("url", "http://127.0.0.1:8080/charge", "where to POST")
	data := flag.String("data", "amount=100", "form to send")
	key := flag.String("key", "", "key of the operation to resume; empty starts a new one")
	timeout := flag.Duration("timeout", time.Minute, "time for all tries together")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	os.Exit(run(ctx, *url, *key, *data, os.Stdout, os.Stderr))
}

// run returns the exit status: 0 for an answer, 1 for an operation that is not
// settled, 2 for what repeating does not help against.
func run(ctx context.Context, url, key, data string, stdout, stderr io.Writer) int {
	if key == "" {
		key = NewKey()
	}
	// The user sees the key before the first try, and can resume the operation
	// even if this program is killed. A program that runs unattended saves the
	// whole Operation instead.
	fmt.Fprintln(stderr, "key", key)

	res, err := new(Client).Do(ctx, Operation{
		Key:    key,
		Method: http.MethodPost,
		URL:    url,
		Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
		Body:   []byte(data),
	})
	var unsettled *UnsettledError
	switch {
	case errors.As(err, &unsettled):
		fmt.Fprintf(stderr, "%v\nto resume, repeat the command with -key %s\n", err, key)
		return 1
	case err != nil:
		fmt.Fprintln(stderr, err)
		return 2
	}
	fmt.Fprintf(stdout, "%d, replayed: %t, tries: %d\n%s", res.Status, res.Replayed(), res.Tries, res.Body)
	return 0
}
