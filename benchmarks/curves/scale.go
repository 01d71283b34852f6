package main

import "math"

// A scale places values on an axis of so many pixels.
type scale struct {
	from, to float64
	pixels   float64
	log      bool
}

func logScale(from, to, pixels float64) scale { return scale{from, to, pixels, true} }

// scale returns a log scale for values that differ more than tenfold, and else
// one that begins at 0. Either has some room above the largest value.
func (p plot) scale() scale {
	least, most := math.Inf(1), 0.0
	for _, line := range p.lines {
		for _, value := range line {
			least, most = min(least, value), max(most, value)
		}
	}
	if least > 0 && most > 10*least {
		return logScale(least/1.3, most*1.3, plotHeight)
	}
	return scale{0, max(most*1.1, 1e-9), plotHeight, false}
}

// place returns how many pixels from its beginning a value is.
func (s scale) place(value float64) float64 {
	if s.log {
		return s.pixels * math.Log(value/s.from) / math.Log(s.to/s.from)
	}
	return s.pixels * (value - s.from) / (s.to - s.from)
}

// ticks returns round values on the axis: about five on a linear one. On a log
// scale they are powers of ten, with their multiples in between if there are few.
func (s scale) ticks() (values []float64) {
	if !s.log {
		width := roundUp((s.to - s.from) / 5)
		for i := 0; float64(i)*width <= s.to; i++ {
			values = append(values, float64(i)*width)
		}
		return values
	}
	multiples := []float64{1}
	if s.to/s.from < 300 {
		multiples = []float64{1, 2, 5}
	}
	for power := math.Floor(math.Log10(s.from)); power <= math.Log10(s.to); power++ {
		for _, m := range multiples {
			if value := m * math.Pow(10, power); value >= s.from && value <= s.to {
				values = append(values, value)
			}
		}
	}
	return values
}

// roundUp returns the next of 1, 2, 5, 10 and so on.
func roundUp(value float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(value)))
	for _, m := range []float64{1, 2, 5} {
		if value <= m*power*(1+1e-9) {
			return m * power
		}
	}
	return 10 * power
}
