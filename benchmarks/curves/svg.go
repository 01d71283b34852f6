package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Sizes in pixels. A page has two plots in a row.
const (
	pageWidth  = 1000
	plotWidth  = 350
	plotHeight = 190
	leftOf     = 76 // of a plot: the names of its values
	rightOf    = 74 // the names of its lines
	aboveOf    = 44
	belowOf    = 52
	lineHeight = 15 // how far apart two names are at least
)

// style has the colors for a light and a dark background. The lines differ in
// width and dashes too.
const style = `
    text { fill: #1f2328; }
    .title { font-weight: 600; font-size: 14px; }
    .tick { fill: #57606a; font-size: 11px; }
    .grid { stroke: #d0d7de; stroke-width: 1; }
    .axis { stroke: #57606a; stroke-width: 1; fill: none; }
    .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
    .floor { stroke: #6e7781; stroke-dasharray: 2 3; }
    .other { stroke: #9a6700; stroke-dasharray: 7 4; }
    .library { stroke: #0969da; stroke-width: 2.5; }
    .dot { fill: #0969da; }
    .name-floor { fill: #57606a; }
    .name-other { fill: #9a6700; }
    .name-library { fill: #0969da; font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .tick { fill: #8b949e; }
      .grid { stroke: #30363d; }
      .axis { stroke: #8b949e; }
      .floor { stroke: #8b949e; }
      .other { stroke: #d29922; }
      .library { stroke: #58a6ff; }
      .dot { fill: #58a6ff; }
      .name-floor { fill: #8b949e; }
      .name-other { fill: #d29922; }
      .name-library { fill: #58a6ff; }
    }
  `

// svg returns the page as a file that stands alone, without a background: it is
// read on a light or a dark one.
func (p *page) svg() string {
	const rowHeight = aboveOf + plotHeight + belowOf
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="12" `+
		`role="img" aria-labelledby="title desc">`+"\n", pageWidth, rowHeight*len(p.plots)/2)
	fmt.Fprintf(&b, "  <title id=\"title\">%s</title>\n  <desc id=\"desc\">%s</desc>\n  <style>%s</style>\n",
		html.EscapeString(p.title), html.EscapeString(p.summary), style)
	for i, plot := range p.plots {
		fmt.Fprintf(&b, "  <g transform=\"translate(%d %d)\">\n", leftOf+i%2*pageWidth/2, aboveOf+i/2*rowHeight)
		plot.draw(&b, p.numbers)
		b.WriteString("  </g>\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// draw draws a plot whose upper left corner is at 0, 0.
func (p plot) draw(b *strings.Builder, numbers axis) {
	x := logScale(float64(p.numbers[0]), float64(p.numbers[len(p.numbers)-1]), plotWidth)
	y := p.scale()
	kind := ""
	if y.log {
		kind = ", log scale"
	}
	fmt.Fprintf(b, "    <text class=\"title\" x=\"0\" y=\"-24\">%s</text>\n", html.EscapeString(p.title))
	fmt.Fprintf(b, "    <text class=\"tick\" x=\"0\" y=\"-8\">%s%s</text>\n", p.values.name, kind)
	for _, value := range y.ticks() {
		at := plotHeight - y.place(value)
		fmt.Fprintf(b, "    <path class=\"grid\" d=\"M0 %.1fH%d\"/>\n", at, plotWidth)
		fmt.Fprintf(b, "    <text class=\"tick\" x=\"-8\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", at+4, p.values.unit.format(value))
	}
	fmt.Fprintf(b, "    <path class=\"axis\" d=\"M0 0V%dH%d\"/>\n", plotHeight, plotWidth)
	free := math.Inf(-1) // from where on there is room for a name
	for _, n := range p.numbers {
		at := x.place(float64(n))
		fmt.Fprintf(b, "    <path class=\"axis\" d=\"M%.1f %dv4\"/>\n", at, plotHeight)
		text := numbers.unit.format(float64(n))
		half := float64(len(text)) * 3.2
		if at-half < free {
			continue
		}
		free = at + half + 6
		fmt.Fprintf(b, "    <text class=\"tick\" x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", at, plotHeight+18, text)
	}
	fmt.Fprintf(b, "    <text class=\"tick\" x=\"%d\" y=\"%d\" text-anchor=\"end\">%s, log scale</text>\n",
		plotWidth, plotHeight+34, numbers.name)
	p.drawLines(b, x, y)
}

// drawLines draws the lines, that of the library last and so above the others,
// and the name of each at its right end.
func (p plot) drawLines(b *strings.Builder, x, y scale) {
	last := len(p.numbers) - 1
	ends := make([]float64, len(p.lines))
	for i, line := range p.lines {
		var path strings.Builder
		for j, n := range p.numbers {
			command := 'L'
			if j == 0 {
				command = 'M'
			}
			fmt.Fprintf(&path, "%c%.1f %.1f", command, x.place(float64(n)), plotHeight-y.place(line[j]))
		}
		fmt.Fprintf(b, "    <path class=\"line %s\" d=\"%s\"/>\n", p.class(i), path.String())
		ends[i] = plotHeight - y.place(line[last])
	}
	library := len(p.lines) - 1
	for j, n := range p.numbers {
		fmt.Fprintf(b, "    <circle class=\"dot\" cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\"/>\n",
			x.place(float64(n)), plotHeight-y.place(p.lines[library][j]))
	}
	for i, at := range spread(ends) {
		text := html.EscapeString(strings.TrimPrefix(p.contenders[i].label, "floor on "))
		fmt.Fprintf(b, "    <text class=\"name-%s\" x=\"%d\" y=\"%.1f\">%s</text>\n", p.class(i), plotWidth+8, at+4, text)
	}
}

// class is the style of a line.
func (p plot) class(i int) string {
	switch i {
	case len(p.contenders) - 1:
		return "library"
	case 0:
		return "floor"
	}
	return "other"
}

// spread moves places apart that are too close for names, and keeps their order.
func spread(places []float64) []float64 {
	order := make([]int, len(places))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(places[i], places[j]) })
	moved := slices.Clone(places)
	for k := 1; k < len(order); k++ {
		above, below := order[k-1], order[k]
		moved[below] = max(moved[below], moved[above]+lineHeight)
	}
	// The lowest name stays inside of the plot, and those above make room.
	for k := len(order) - 1; k >= 0; k-- {
		limit := float64(plotHeight)
		if k < len(order)-1 {
			limit = moved[order[k+1]] - lineHeight
		}
		moved[order[k]] = min(moved[order[k]], limit)
	}
	return moved
}
