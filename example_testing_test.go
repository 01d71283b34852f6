package idempotency_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/go-idempotency/idempotency"
)

// A service tests its own handler with a MemoryStore and httptest. The effect
// has to be counted where it happens: a status does not tell a replay from a
// second run. The page docs/testing.md goes on with crashes, leases, stores that
// fail, and Redis.
func Example_testing() {
	sent := 0 // letters, in the place of a fake post office
	h := idempotency.Middleware(idempotency.NewMemoryStore(), nil)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		sent++
		w.WriteHeader(http.StatusAccepted)
	}))
	for range 2 {
		r := httptest.NewRequest("POST", "/letters", strings.NewReader("Dear customer"))
		r.Header.Set("Idempotency-Key", "letter-1")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(w.Code, "replayed:", w.Header().Get("Idempotent-Replayed") == "true", "sent:", sent)
	}
	// Output:
	// 202 replayed: false sent: 1
	// 202 replayed: true sent: 1
}

// A panic after the effect is a crash between the effect and the answer. The
// key stays claimed, so a retry does not run the handler at once. It does when
// the lease has ended; testing/synctest makes that pass in no time.
func Example_testingCrash() {
	charges := 0
	h := idempotency.Middleware(idempotency.NewMemoryStore(), &idempotency.Options{
		Wait: idempotency.NoWait,
	})(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		charges++
		panic("the process dies here")
	}))
	for range 2 {
		r := httptest.NewRequest("POST", "/charge", strings.NewReader("amount=100"))
		r.Header.Set("Idempotency-Key", "order-17")
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if recover() != nil { // net/http does this, and closes the connection
					fmt.Println("no answer, charges:", charges)
				}
			}()
			h.ServeHTTP(w, r)
			fmt.Println(w.Code, "charges:", charges)
		}()
	}
	// Output:
	// no answer, charges: 1
	// 409 charges: 1
}
