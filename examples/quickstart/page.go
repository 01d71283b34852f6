package main

import (
	_ "embed"
	"fmt"
	"log"
	"net/http"
	"sync/atomic"
)

// page shows what a lost answer costs. It is one file, and loads nothing else.
//
//go:embed page.html
var page []byte

func servePage(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy",
		"default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'")
	if _, err := w.Write(page); err != nil {
		log.Print(err) // the browser is gone
	}
}

// showCharges answers how often the handler charged on each of its two routes.
func showCharges(with, without *atomic.Int64) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if _, err := fmt.Fprintf(w, "{\"with\":%d,\"without\":%d}\n", with.Load(), without.Load()); err != nil {
			log.Print(err)
		}
	}
}

// loseAnswers is the flaky network of the page. It serves a request with the
// header Lose-Answer, and breaks the connection before the answer. It stands
// outside of the middleware, where the network is.
//
// The client still gets a status line. Without one, Chromium sends a POST again
// by itself if its connection had been used before, and the page would count
// fewer tries than the server gets.
func loseAnswers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Lose-Answer") == "" {
			next.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(lostAnswer{}, r)
		w.Header().Set("Content-Length", "1") // a byte that never comes
		w.WriteHeader(http.StatusOK)
		if err := http.NewResponseController(w).Flush(); err != nil {
			log.Print(err)
		}
		panic(http.ErrAbortHandler)
	})
}

// A lostAnswer takes an answer and forgets it.
type lostAnswer http.Header

func (a lostAnswer) Header() http.Header         { return http.Header(a) }
func (a lostAnswer) Write(b []byte) (int, error) { return len(b), nil }
func (a lostAnswer) WriteHeader(int)             {}
