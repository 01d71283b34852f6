package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestScale(t *testing.T) {
	linear := plot{lines: [][]float64{{300, 400}, {1000, 2800}}}.scale()
	require.False(t, linear.log, "less than tenfold")
	require.Zero(t, linear.place(0), "it begins at 0")
	require.InDelta(t, linear.place(2800), 2*linear.place(1400), 1e-9)
	require.Equal(t, []float64{0, 1000, 2000, 3000}, linear.ticks())

	wide := plot{lines: [][]float64{{3, 40}, {100, 28_000}}}.scale()
	require.True(t, wide.log)
	require.Equal(t, []float64{10, 100, 1000, 10_000}, wide.ticks())
	narrow := plot{lines: [][]float64{{3, 40}}}.scale()
	require.True(t, narrow.log)
	require.Equal(t, []float64{5, 10, 20, 50}, narrow.ticks())

	zero := plot{lines: [][]float64{{0, 0}}}.scale()
	require.False(t, zero.log, "0 has no place on a log scale")
	require.Zero(t, zero.place(0))
}

// Names of lines that end close together do not cover each other.
func TestSpread(t *testing.T) {
	rows := []struct{ places, moved []float64 }{
		{[]float64{20, 100}, []float64{20, 100}},
		{[]float64{100, 20}, []float64{100, 20}},
		{[]float64{50, 50, 50}, []float64{50, 65, 80}},
		{[]float64{plotHeight, plotHeight - 1}, []float64{plotHeight, plotHeight - lineHeight}},
	}
	for _, row := range rows {
		require.Equal(t, row.moved, spread(row.places), "%v", row.places)
	}
}
