package history

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// A process answers what it has taken, unless it is killed or the handler panics.
func TestRequestsWithoutAnAnswer(t *testing.T) {
	for name, row := range map[string]struct {
		h    History
		want []string
	}{
		"the client hung up":     {told(Plain, runs("a", 1, 10)), nil},
		"the process was killed": {killed(50, told(Plain, runs("a", 1, 10), expects("a"))), nil},
		"or later":               {killed(5000, told(Plain, runs("a", 1, 10), expects("a"))), []string{Dropped}},
		"the handler panicked":   {told(Plain, runs("a", 1, 10), panics("a", 20), expects("a")), nil},
		"it did not arrive":      {told(Plain, asks("a", 10, func(op *Op) { op.Err = "refused" })), nil},
		"it waited for another":  {told(Plain, asksStoreAs("b", 1, 10, "in progress", ""), asks("b", 9, func(op *Op) { op.Err = "broken" })), []string{Dropped}},
		"it is lost":             {told(Plain, runs("a", 1, 10), expects("a")), []string{Dropped}},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, row.want, Check(row.h).Kinds(), "\n%s", row.h.Lines("key"))
		})
	}
}
