package main

import (
	"fmt"
	"path"
	"strings"
)

// A mutant is one way to break the library.
type mutant struct {
	name string
	file string // of the library
	old  string // occurs in file once
	new  string

	// tests is the -run pattern of the tests that are expected to fail, and in
	// the directory of their package. They are tried before the whole suite.
	tests, in string

	// equivalent says why no test can fail. A mutant without it must be killed.
	equivalent string
}

// parse reads a list in the form that mutants.txt describes.
func parse(text string) (mutants []*mutant, err error) {
	names := map[string]bool{}
	var m *mutant
	for number, line := range strings.Split(text, "\n") {
		fail := func(problem string) error {
			return fmt.Errorf("mutants.txt:%d: %s", number+1, problem)
		}
		word, rest, _ := strings.Cut(line, " ")
		switch {
		case strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#"):
			continue
		case word == "mutant":
			m = &mutant{name: strings.TrimSpace(rest)}
			if m.name == "" || names[m.name] {
				return nil, fail("a mutant needs a name of its own")
			}
			names[m.name] = true
			mutants = append(mutants, m)
			continue
		case m == nil:
			return nil, fail("before the first mutant")
		}
		if !m.set(line, word, rest) {
			return nil, fail("unknown line")
		}
	}
	for _, m := range mutants {
		// What surrounds the text does not matter, so that it may begin in the
		// middle of a line.
		m.old, m.new = strings.TrimSpace(m.old), strings.TrimSpace(m.new)
		if m.in == "" {
			m.in = "./" + path.Dir(m.file)
		}
		if m.file == "" || m.old == "" || m.old == m.new {
			return nil, fmt.Errorf("mutants.txt: %s needs a file and a change", m.name)
		}
	}
	return mutants, nil
}

// set takes one line of a mutant, which begins with word. It is false if there
// is no such line.
func (m *mutant) set(line, word, rest string) bool {
	switch {
	case word == "file":
		m.file = strings.TrimSpace(rest)
	case word == "tests":
		m.tests = strings.TrimSpace(rest)
		if in, tests, found := strings.Cut(m.tests, " "); found {
			m.in, m.tests = in, tests
		}
	case word == "equivalent":
		m.equivalent = strings.TrimSpace(m.equivalent + " " + rest)
	case line[0] == '-':
		m.old += line[1:] + "\n"
	case line[0] == '+':
		m.new += line[1:] + "\n"
	default:
		return false
	}
	return true
}
