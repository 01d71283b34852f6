package main

import (
	"math"
	"strconv"
)

// An axis has a name and a unit.
type axis struct {
	name string
	unit unit
}

// A unit tells how values are written.
type unit struct {
	steps []step
}

// A step writes values from its size on as multiples of it.
type step struct {
	size float64
	name string
}

var (
	count    = unit{[]step{{1, ""}, {1e3, "k"}, {1e6, "M"}}}
	duration = unit{[]step{{1, " ns"}, {1e3, " µs"}, {1e6, " ms"}, {1e9, " s"}}}
	size     = unit{[]step{{1, " B"}, {1 << 10, " KiB"}, {1 << 20, " MiB"}}}
)

// format writes a value with three digits that count.
func (u unit) format(value float64) string {
	if value == 0 {
		return "0"
	}
	s := u.steps[0]
	for _, larger := range u.steps[1:] {
		if value >= larger.size*0.9995 { // what would be rounded up to it
			s = larger
		}
	}
	scaled := value / s.size
	digits := 2 - int(math.Floor(math.Log10(scaled*1.0005)))
	if scaled == math.Trunc(scaled) {
		digits = 0
	}
	return strconv.FormatFloat(scaled, 'f', max(0, digits), 64) + s.name
}
