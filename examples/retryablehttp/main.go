// Command retryablehttp is a client on github.com/hashicorp/go-retryablehttp
// that repeats one operation until it knows the answer. The part to copy is
// client.go.
//
// Run the quickstart example as the server.
package main

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

func main() {
	url := flag.String("url", "http://127.0.0.1:8080/charge", "where to POST")
	data := flag.String("data", "amount=100", "form to send")
	key := flag.String("key", rand.Text(), "key of the operation, to resume it")
	flag.Parse()
	log.Print("key ", *key)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	got, err := post(ctx, newClient(), *url, *key, []byte(*data))
	if err != nil {
		log.Fatalf("outcome unknown: %v; repeat the command with -key %s", err, *key)
	}
	fmt.Printf("%d, replayed: %t\n%s", got.status, got.replayed, got.body)
}

// An answer is the final answer to an operation.
type answer struct {
	status   int
	replayed bool // it is the stored answer to an earlier try
	body     []byte
}

// post sends form under key. Every try has the same key and the same bytes.
func post(ctx context.Context, client *retryablehttp.Client, url, key string, form []byte) (answer, error) {
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodPost, url, form)
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Idempotency-Key", key)
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	again, err := checkRetry(ctx, res, nil)
	if err != nil {
		return answer{}, err
	}
	if again { // the last try has come to nothing either
		return answer{}, fmt.Errorf("%s after %d tries", res.Status, client.RetryMax+1)
	}
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header.Get("Idempotent-Replayed") == "true", body}, err
}
