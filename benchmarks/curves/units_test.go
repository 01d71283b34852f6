package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFormat(t *testing.T) {
	rows := []struct {
		unit  unit
		value float64
		text  string
	}{
		{count, 1, "1"},
		{count, 512, "512"},
		{count, 1000, "1k"},
		{count, 5_000_000, "5M"},
		{duration, 0, "0"},
		{duration, 0.0123, "0.0123 ns"},
		{duration, 1.234, "1.23 ns"},
		{duration, 85.64, "85.6 ns"},
		{duration, 999.7, "1.00 µs"},
		{duration, 1234, "1.23 µs"},
		{duration, 20_000, "20 µs"},
		{duration, 226_400_000, "226 ms"},
		{duration, 3e9, "3 s"},
		{size, 100, "100 B"},
		{size, 406.4, "406 B"},
		{size, 64 << 10, "64 KiB"},
		{size, 64 << 20, "64 MiB"},
	}
	for _, row := range rows {
		require.Equal(t, row.text, row.unit.format(row.value), "%g", row.value)
	}
}
