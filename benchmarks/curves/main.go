// Command curves makes charts and tables of what the benchmarks named Curve…
// print, and puts the tables into a document. The script .ci/curves runs it.
//
//	go run ./benchmarks/curves -in bench.txt -doc BENCHMARKS.md -charts docs
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	in := flag.String("in", "", "what the benchmarks printed")
	doc := flag.String("doc", "BENCHMARKS.md", "the document whose part between the markers is replaced")
	charts := flag.String("charts", "docs", "the directory for the charts")
	flag.Parse()
	if err := run(*in, *doc, *charts); err != nil {
		fmt.Fprintln(os.Stderr, "curves:", err)
		os.Exit(1)
	}
}

// run writes nothing unless the benchmarks printed all that the figures need.
func run(in, doc, charts string) error {
	raw, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	results, err := parse(string(raw))
	if err != nil {
		return err
	}
	old, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	directory, err := filepath.Rel(filepath.Dir(doc), charts)
	if err != nil {
		return err
	}
	pages := make(map[string]string)
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n", results.provenance())
	for _, f := range figures {
		loaded, err := f.load(results)
		if err != nil {
			return err
		}
		pages[f.file] = loaded.svg()
		text.WriteString(loaded.markdown(filepath.ToSlash(directory)))
	}
	updated, err := replaceBetween(old, text.String())
	if err != nil {
		return fmt.Errorf("%s: %w", doc, err)
	}
	for name, page := range pages {
		if err := os.WriteFile(filepath.Join(charts, name), []byte(page), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(doc, updated, 0o644)
}

// The markers stand on lines of their own.
const (
	beginMarker = "<!-- curves: begin; written by .ci/curves -->\n"
	endMarker   = "<!-- curves: end -->\n"
)

// replaceBetween puts text between the markers of a document.
func replaceBetween(doc []byte, text string) ([]byte, error) {
	head, rest, found := bytes.Cut(doc, []byte(beginMarker))
	if !found {
		return nil, errors.New("it has no line " + strings.TrimSpace(beginMarker))
	}
	_, tail, found := bytes.Cut(rest, []byte(endMarker))
	if !found {
		return nil, errors.New("it has no line " + strings.TrimSpace(endMarker))
	}
	return slices.Concat(head, []byte(beginMarker+text+endMarker), tail), nil
}
