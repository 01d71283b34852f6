package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// results are the values that benchmarks printed, one for each round.
type results struct {
	values  map[measure][]float64
	numbers map[string][]int // of a benchmark, in ascending order
	machine map[string]string
}

// A measure is one metric of a contender, at one number.
type measure struct {
	benchmark string // without Benchmark in front
	number    int
	contender string
	metric    string
}

// benchmarkName has a benchmark, a number and a contender. What follows the
// contender is GOMAXPROCS, which go test leaves out if it is 1.
var benchmarkName = regexp.MustCompile(`^Benchmark(Curve.*)/(\d+)/(.+?)(-\d+)?$`)

// parse reads the output of go test -bench. It ignores benchmarks that are no
// curves.
func parse(output string) (*results, error) {
	r := &results{
		values: make(map[measure][]float64), numbers: make(map[string][]int), machine: make(map[string]string),
	}
	for line := range strings.Lines(output) {
		if name, value, found := strings.Cut(strings.TrimSpace(line), ": "); found && !strings.Contains(name, " ") {
			r.machine[name] = value
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		name := benchmarkName.FindStringSubmatch(fields[0])
		if name == nil {
			continue
		}
		number, err := strconv.Atoi(name[2])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", fields[0], err)
		}
		if !slices.Contains(r.numbers[name[1]], number) {
			r.numbers[name[1]] = append(r.numbers[name[1]], number)
		}
		for i := 2; i+1 < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", fields[0], err)
			}
			m := measure{name[1], number, name[3], fields[i+1]}
			r.values[m] = append(r.values[m], value)
		}
	}
	if len(r.values) == 0 {
		return nil, errors.New("no benchmark of a curve was run")
	}
	for _, numbers := range r.numbers {
		slices.Sort(numbers)
	}
	return r, nil
}

// provenance says where the figures come from. The number of rounds is that of
// the measure with the fewest.
func (r *results) provenance() string {
	rounds, most := 0, 0
	for _, values := range r.values {
		if rounds == 0 || len(values) < rounds {
			rounds = len(values)
		}
		most = max(most, len(values))
	}
	text := strconv.Itoa(rounds)
	if most > rounds {
		text += " to " + strconv.Itoa(most)
	}
	noun := "rounds"
	if most == 1 {
		noun = "round"
	}
	return fmt.Sprintf("Measured on %s/%s, %s, %s. Medians of %s %s.\n",
		r.machine["goos"], r.machine["goarch"], r.machine["cpu"], r.machine["with"], text, noun)
}

// median is that of all rounds.
func (r *results) median(m measure) (float64, bool) {
	values := r.values[m]
	if len(values) == 0 {
		return 0, false
	}
	return median(values), true
}

// ratio is the median of the ratios of all rounds, as two contenders of one round
// find the machine in one state.
func (r *results) ratio(m, floor measure) (float64, bool) {
	ours, floors := r.values[m], r.values[floor]
	var ratios []float64
	for i := range min(len(ours), len(floors)) {
		if floors[i] > 0 {
			ratios = append(ratios, ours[i]/floors[i])
		}
	}
	if len(ratios) == 0 {
		return 0, false
	}
	return median(ratios), true
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
