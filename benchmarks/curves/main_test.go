package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// printed returns what two rounds of all curves print. In the second round
// everything takes three times as long. The library takes twice as long as the
// floor, and each number ten times as long as the one before.
func printed() string {
	var b strings.Builder
	b.WriteString("goos: linux\ngoarch: amd64\npkg: example.com/benchmarks\ncpu: Some Processor\n")
	for _, round := range []float64{1, 3} {
		for _, f := range figures {
			for _, c := range f.charts {
				for i, n := range []int{100, 1000, 100_000, 1_000_000} {
					cost := round * []float64{1, 10, 100, 1000}[i]
					for _, who := range c.contenders {
						if who.name == "idempotency" {
							cost *= 2
						}
						fmt.Fprintf(&b, "Benchmark%s/%d/%s-2 \t 1\t %g %s\n", c.benchmark, n, who.name, cost, c.metric)
					}
				}
			}
		}
	}
	b.WriteString("BenchmarkReplay/idempotency-2 \t 1\t 7 ns/op\nPASS\nwith: go1.25, 2 processors\n")
	return b.String()
}

const document = "# Benchmarks\n\nBefore.\n\n" + beginMarker + "old\n" + endMarker + "\nAfter.\n"

// write puts the files of a run into a directory.
func write(t *testing.T, output, document string) (in, doc, charts string) {
	dir := t.TempDir()
	in, doc, charts = filepath.Join(dir, "bench.txt"), filepath.Join(dir, "BENCHMARKS.md"), filepath.Join(dir, "docs")
	require.NoError(t, os.WriteFile(in, []byte(output), 0o600))
	require.NoError(t, os.WriteFile(doc, []byte(document), 0o600))
	require.NoError(t, os.Mkdir(charts, 0o700))
	return in, doc, charts
}

func read(t *testing.T, name string) string {
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(b)
}

func TestRun(t *testing.T) {
	in, doc, charts := write(t, printed(), document)
	require.NoError(t, run(in, doc, charts))
	text := read(t, doc)
	require.True(t, strings.HasPrefix(text, "# Benchmarks\n\nBefore.\n\n"+beginMarker), text)
	require.True(t, strings.HasSuffix(text, endMarker+"\nAfter.\n"), text)
	require.NotContains(t, text, "old")
	require.Contains(t, text, "linux/amd64, Some Processor, go1.25, 2 processors. Medians of 2 rounds.")
	require.Contains(t, text, "](docs/curve-records.svg)")
	require.Contains(t, text, "| 1M | 2 µs | 4 µs | 2.00x | 2 µs | 4 µs | 2.00x |\n", "medians of both rounds")
	require.Contains(t, text, "| 977 KiB | 2 µs | 4 µs | 2.00x |")
	require.Contains(t, text, "| 1k | 20 B | 40 B | 2.00x | - | - | - |\n", "marking begins at 100k")
	require.Contains(t, text, "| 100k | 200 B | 400 B | 2.00x | 200 ns | 400 ns | 2.00x |\n")

	for _, f := range figures {
		page := read(t, filepath.Join(charts, f.file))
		requireXML(t, page)
		require.Contains(t, page, "prefers-color-scheme: dark")
		for _, c := range f.charts {
			require.Contains(t, page, c.title)
		}
		require.Equal(t, 4, strings.Count(page, ">library</text>"), "each line has its name")
		require.Equal(t, 4, strings.Count(page, ">floor</text>"))
	}

	require.NoError(t, run(in, doc, charts))
	require.Equal(t, text, read(t, doc), "a second run")
}

// requireXML fails unless a browser can parse the page.
func requireXML(t *testing.T, page string) {
	for decoder := xml.NewDecoder(strings.NewReader(page)); ; {
		_, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err)
	}
}

// The library's line is drawn where its values are: here each value is ten times
// the one before, and so are the numbers but one.
func TestRunDrawsLines(t *testing.T) {
	in, doc, charts := write(t, printed(), document)
	require.NoError(t, run(in, doc, charts))
	page := read(t, filepath.Join(charts, "curve-bodies.svg"))
	_, rest, found := strings.Cut(page, `<path class="line library" d="M`)
	require.True(t, found)
	path, _, _ := strings.Cut(rest, `"`)
	points := strings.Split(path, "L")
	require.Len(t, points, 4)
	var x, y [4]float64
	for i, point := range points {
		_, err := fmt.Sscan(point, &x[i], &y[i])
		require.NoError(t, err)
	}
	const rounding = 0.2
	require.InDelta(t, 0, x[0], rounding)
	require.InDelta(t, plotWidth, x[3], rounding)
	require.InDelta(t, plotWidth/4.0, x[1], rounding, "a decade of four")
	require.InDelta(t, 3*plotWidth/4.0, x[2], rounding)
	require.InDelta(t, y[0]-y[1], y[1]-y[2], rounding, "a log scale")
	require.InDelta(t, y[1]-y[2], y[2]-y[3], rounding, "a log scale")
	require.Greater(t, y[0], y[3], "more is further up")
	require.Greater(t, y[3], 0.0, "inside of the plot")
	require.Less(t, y[0], float64(plotHeight))
}

// What cannot be shown whole is an error, and leaves the files alone.
func TestRunFails(t *testing.T) {
	without := func(line string) string {
		var kept []string
		for l := range strings.Lines(printed()) {
			if !strings.Contains(l, line) {
				kept = append(kept, l)
			}
		}
		return strings.Join(kept, "")
	}
	rows := []struct{ name, output, document, text string }{
		{"no curve", "BenchmarkReplay/idempotency-2 1 7 ns/op\n", document, "no benchmark of a curve"},
		{"a chart is missing", without("CurveBodies/request-replay"), document, "CurveBodies/request-replay was measured at 0"},
		{"a contender is missing", without("CurveRedisGoroutines/first/1000/floor-goredis"), document, "at 1000 for floor-goredis"},
		{"a word for a value", strings.Replace(printed(), " 1 replay", " one replay", 1), document, "one"},
		{"no begin", printed(), strings.Replace(document, beginMarker, "", 1), "has no line <!-- curves: begin"},
		{"no end", printed(), strings.Replace(document, endMarker, "", 1), "has no line <!-- curves: end"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			in, doc, charts := write(t, row.output, row.document)
			require.ErrorContains(t, run(in, doc, charts), row.text)
			require.Equal(t, row.document, read(t, doc))
			files, err := os.ReadDir(charts)
			require.NoError(t, err)
			require.Empty(t, files)
		})
	}
}

// The document of the library has the markers, and between them a picture of each
// file that the command writes.
func TestDocument(t *testing.T) {
	text := read(t, "../../BENCHMARKS.md")
	_, err := replaceBetween([]byte(text), "")
	require.NoError(t, err)
	for _, f := range figures {
		require.Contains(t, text, "](docs/"+f.file+")")
		require.FileExists(t, "../../docs/"+f.file)
	}
}
