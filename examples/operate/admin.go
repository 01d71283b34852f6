package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"strconv"
	"strings"

	"github.com/go-idempotency/idempotency"
)

// newAdmin returns a handler that shows and forgets keys, as JSON:
//
//	GET  /?method=POST&path=/charge&key=order-17&scope=alice
//	POST /   the same as form values, and seen from the answer to GET
//
// It has no authentication of its own. It shows the answers of all customers
// and lets handlers run again, so mount it only behind the authentication of
// operators, and log who does what. It refuses what another site has a browser
// send.
func newAdmin(o *operator) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", o.show)
	mux.HandleFunc("POST /{$}", o.forget)
	return http.NewCrossOriginProtection().Handler(mux)
}

// An adminReport is a report with what a POST has to bring back. It proves that
// the person who forgets the key has seen this state of it.
type adminReport struct {
	report
	Seen       string `json:"seen"`
	Forgetting string `json:"forgetting"`
}

func (o *operator) show(w http.ResponseWriter, r *http.Request) {
	req, ok := requestOf(w, r)
	if !ok {
		return
	}
	cell, rep, err := o.look(r.Context(), req)
	switch {
	case err != nil:
		fail(w, http.StatusBadGateway, err)
	case cell.State == 0:
		answer(w, http.StatusNotFound, rep)
	default:
		answer(w, http.StatusOK, adminReport{rep, encodeSeen(cell), forgetting})
	}
}

func (o *operator) forget(w http.ResponseWriter, r *http.Request) {
	req, ok := requestOf(w, r)
	if !ok {
		return
	}
	seen, err := decodeSeen(r.FormValue("seen"))
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	err = o.store.Forget(r.Context(), req.storeKey(), seen)
	switch {
	case errors.Is(err, idempotency.ErrInProgress), errors.Is(err, idempotency.ErrCellChanged):
		fail(w, http.StatusConflict, err)
	case err != nil:
		fail(w, http.StatusBadGateway, fmt.Errorf("it is not known whether the key was forgotten; look again: %w", err))
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// requestOf returns the request that the operator names. The scope is not
// required, as a service may have none.
func requestOf(w http.ResponseWriter, r *http.Request) (req request, ok bool) {
	req = request{
		Scope: r.FormValue("scope"), Method: r.FormValue("method"), Path: r.FormValue("path"),
		Key: clientKey(r.FormValue("key")),
	}
	if req.Method == "" || req.Path == "" || req.Key == "" {
		fail(w, http.StatusBadRequest, errors.New("method, path and key are required"))
		return req, false
	}
	return req, true
}

// encodeSeen returns what Forget compares.
func encodeSeen(c idempotency.Cell) string {
	return fmt.Sprintf("%d.%d.%s", c.State, c.Attempt, c.Owner)
}

func decodeSeen(s string) (c idempotency.Cell, err error) {
	parts := strings.SplitN(s, ".", 3)
	if len(parts) != 3 {
		return c, errors.New("seen must be that of the answer to GET")
	}
	state, err := strconv.ParseUint(parts[0], 10, 8)
	if err != nil {
		return c, errors.New("seen must be that of the answer to GET")
	}
	attempt, err := strconv.Atoi(parts[1])
	return idempotency.Cell{State: idempotency.State(state), Attempt: attempt, Owner: parts[2]}, err
}

func fail(w http.ResponseWriter, status int, err error) {
	answer(w, status, map[string]string{"error": err.Error()})
}

// answer writes JSON that no cache keeps.
func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Print(err)
	}
}
