package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"

	"github.com/go-idempotency/idempotency"
)

// newProvider stands for a payment provider that requires idempotency keys. The
// large providers offer them.
func newProvider() http.Handler {
	var charges atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("POST /charges", func(w http.ResponseWriter, r *http.Request) {
		var p payment
		if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		p.Charge = fmt.Sprintf("ch_%d", charges.Add(1))
		writeJSON(w, http.StatusCreated, p)
	})
	required := &idempotency.Options{RequireKey: true}
	return idempotency.Middleware(idempotency.NewMemoryStore(), required)(mux)
}
