package idemtest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/go-idempotency/idempotency"
)

// An EventLog keeps the events of a middleware. Add is its OnEvent.
type EventLog struct {
	mu     sync.Mutex // guards events
	events []idempotency.Event
}

// Add keeps e.
func (l *EventLog) Add(_ context.Context, e idempotency.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
}

// All returns the events so far, each as "outcome status".
func (l *EventLog) All() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		lines = append(lines, fmt.Sprintf("%s %d", e.Outcome, e.Status))
	}
	return lines
}

// Events returns the events so far.
func (l *EventLog) Events() []idempotency.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events)
}

// Last returns the last event. There must be one.
func (l *EventLog) Last() idempotency.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[len(l.events)-1]
}
