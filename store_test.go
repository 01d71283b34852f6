package idempotency_test

import (
	"testing"

	"github.com/go-idempotency/idempotency"
	"github.com/go-idempotency/idempotency/storetest"
)

// The store of ExampleStore is one to copy.
func TestExampleStoreContract(t *testing.T) {
	storetest.Run(t, func(*testing.T) idempotency.Store { return &mapStore{cells: map[string]cell{}} })
}
