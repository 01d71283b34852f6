package main

import (
	"fmt"
	"strings"
)

// A figure is one file of four charts, and two tables.
type figure struct {
	file, title, summary string
	numbers              axis // what the numbers of the benchmarks count
	charts               [4]chart
}

// A chart has a line for each contender. The last of them is the library, and
// the first is the floor that it is compared with.
type chart struct {
	title      string
	benchmark  string
	metric     string
	values     axis
	from       int // the smallest number that is shown
	contenders []contender
}

// A contender is a name in the output of the benchmarks, and one for a reader.
type contender struct{ name, label string }

var (
	inMemory = []contender{{"floor", "floor"}, {"idempotency", "library"}}
	onRedis  = []contender{
		{"floor-pipelined", "floor"}, {"floor-goredis", "floor on go-redis"}, {"idempotency", "library"},
	}
)

var figures = []figure{
	{
		file: "curve-records.svg", title: "Records in a MemoryStore", numbers: axis{"records", count},
		summary: "Cost by the number of records in a MemoryStore: a replay, a first execution, the memory of a record, " +
			"and the time to mark one in a garbage collection.",
		charts: [4]chart{
			{"Replay", "CurveRecords", "replay-cpu-ns", perOperation, 0, inMemory},
			{"First execution", "CurveRecords", "first-cpu-ns", perOperation, 0, inMemory},
			{"Memory of a record", "CurveRecords", "B/record", axis{"live bytes", size}, 0, inMemory},
			{"Marking of a record in a collection", "CurveRecords", "mark-ns/record",
				axis{"processor time of a record", duration}, 100_000, inMemory},
		},
	},
	{
		file: "curve-goroutines.svg", title: "Goroutines that send requests", numbers: axis{"goroutines", count},
		summary: "Cost by the number of goroutines that send requests, in memory and on Redis: a first execution and a replay.",
		charts: [4]chart{
			{"First execution, memory", "CurveGoroutines/first", cpu, perOperation, 0, inMemory},
			{"Replay, memory", "CurveGoroutines/replay", cpu, perOperation, 0, inMemory},
			{"First execution, Redis", "CurveRedisGoroutines/first", cpu, perOperation, 0, onRedis},
			{"Replay, Redis", "CurveRedisGoroutines/replay", cpu, perOperation, 0, onRedis},
		},
	},
	{
		file: "curve-bodies.svg", title: "Size of a body", numbers: axis{"body", size},
		summary: "Cost by the size of the response body and of the request body, in memory: a first execution and a replay.",
		charts: [4]chart{
			{"First execution, by response body", "CurveBodies/response-first", cpu, perOperation, 0, inMemory},
			{"Replay, by response body", "CurveBodies/response-replay", cpu, perOperation, 0, inMemory},
			{"First execution, by request body", "CurveBodies/request-first", cpu, perOperation, 0, inMemory},
			{"Replay, by request body", "CurveBodies/request-replay", cpu, perOperation, 0, inMemory},
		},
	},
}

const cpu = "cpu-ns/op"

var perOperation = axis{"processor time of an operation", duration}

// A plot is a chart with its values.
type plot struct {
	chart
	numbers []int
	lines   [][]float64 // for each contender, one value for each number
	ratios  []float64   // of the library to the floor
}

// A page is a figure with its values.
type page struct {
	figure
	plots []plot
}

func (f figure) load(r *results) (*page, error) {
	p := &page{figure: f}
	for _, c := range f.charts {
		loaded, err := c.load(r)
		if err != nil {
			return nil, err
		}
		p.plots = append(p.plots, loaded)
	}
	return p, nil
}

func (c chart) load(r *results) (plot, error) {
	p := plot{chart: c, lines: make([][]float64, len(c.contenders))}
	for _, n := range r.numbers[c.benchmark] {
		if n < c.from {
			continue
		}
		p.numbers = append(p.numbers, n)
		at := func(i int) measure { return measure{c.benchmark, n, c.contenders[i].name, c.metric} }
		for i := range c.contenders {
			value, found := r.median(at(i))
			if !found {
				return p, fmt.Errorf("no %s of %s at %d for %s", c.metric, c.benchmark, n, c.contenders[i].name)
			}
			p.lines[i] = append(p.lines[i], value)
		}
		ratio, _ := r.ratio(at(len(c.contenders)-1), at(0)) // 0 if the floor is
		p.ratios = append(p.ratios, ratio)
	}
	if len(p.numbers) < 2 {
		return p, fmt.Errorf("%s was measured at %d numbers; a curve needs two", c.benchmark, len(p.numbers))
	}
	return p, nil
}

// markdown is the figure and a table for each two charts, which have the same
// numbers.
func (p *page) markdown(directory string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "### %s\n\n![%s](%s/%s)\n\n", p.title, p.summary, directory, p.file)
	for i := 0; i < len(p.plots); i += 2 {
		writeTable(&b, p.numbers, p.plots[i:i+2])
	}
	return b.String()
}

// writeTable writes a row for each number that one of the plots has.
func writeTable(b *strings.Builder, numbers axis, plots []plot) {
	fmt.Fprintf(b, "| %s |", numbers.name)
	rule := "\n|--:|"
	for _, p := range plots {
		for i, c := range p.contenders {
			if i == 0 {
				fmt.Fprintf(b, " %s: %s |", p.title, c.label)
			} else {
				fmt.Fprintf(b, " %s |", c.label)
			}
			rule += "--:|"
		}
		b.WriteString(" of the floor |")
		rule += "--:|"
	}
	b.WriteString(rule + "\n")
	for row, n := range plots[0].numbers {
		fmt.Fprintf(b, "| %s |", numbers.unit.format(float64(n)))
		for _, p := range plots {
			at := row - len(plots[0].numbers) + len(p.numbers) // plots end at one number
			for _, line := range p.lines {
				if at < 0 {
					b.WriteString(" - |")
				} else {
					fmt.Fprintf(b, " %s |", p.values.unit.format(line[at]))
				}
			}
			if at < 0 || p.ratios[at] == 0 {
				b.WriteString(" - |")
			} else {
				fmt.Fprintf(b, " %.2fx |", p.ratios[at])
			}
		}
		b.WriteString("\n")
	}
	b.WriteString("\n")
}
