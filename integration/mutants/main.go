// Mutants checks the tests: it breaks the library on purpose, one line at a
// time, and reports which of these mutants the test suite does not notice.
//
//	go run ./mutants -parallel 3             # all of them: over an hour on two cores
//	go run ./mutants -sample 6 -seed 1       # a few, for CI
//	go run ./mutants -run 'redis/' -v        # those of one part, with what failed
//
// The list is mutants.txt, which says how to read it. It works on copies of the
// library in a temporary directory. It fails if a mutant survives that the list
// does not explain, or dies that it calls equivalent, and if the list does not
// fit the code any more.
package main

import (
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed mutants.txt
var listText string

func main() {
	var (
		root    = flag.String("root", "..", "directory of the library")
		pattern = flag.String("run", "", "only mutants whose name matches this regular expression")
		list    = flag.Bool("list", false, "print the mutants and check that the list fits the code")
		sample  = flag.Int("sample", 0, "only so many, picked at random")
		seed    = flag.Uint64("seed", 0, "of the sample; 0 is another one each time")
		timeout = flag.Duration("timeout", 5*time.Minute, "of the whole suite")
		quick   = flag.Bool("quick", false, "only the tests that the list names for a mutant, not the whole suite after them")
		verbose = flag.Bool("v", false, "print what the failing tests said")

		// The tests wait more than they compute.
		parallel = flag.Int("parallel", 1, "how many mutants are tried at the same time")
	)
	flag.Parse()
	ok, err := run(*root, *pattern, *list, *sample, *seed, *parallel, lab{timeout: *timeout, verbose: *verbose, quick: *quick})
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func run(root, pattern string, list bool, sample int, seed uint64, parallel int, l lab) (ok bool, err error) {
	mutants, err := parse(listText)
	if err != nil {
		return false, err
	}
	if err := fit(root, mutants); err != nil {
		return false, err
	}
	if mutants, err = pick(mutants, pattern, sample, seed); err != nil {
		return false, err
	}
	if list {
		for _, m := range mutants {
			fmt.Printf("%-44s %s\n", m.name, m.file)
		}
		fmt.Println(len(mutants), "mutants")
		return true, nil
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	labs := make([]lab, max(parallel, 1))
	for i := range labs {
		labs[i] = l
		labs[i].dir = filepath.Join(dir, strconv.Itoa(i))
		if err := copyTree(labs[i].dir, root); err != nil {
			return false, err
		}
	}
	if err := labs[0].check(mutants, l.quick || sample > 0 || pattern != ""); err != nil {
		return false, err
	}
	return runAll(labs, mutants), nil
}

// fit reports every mutant whose old text is not in its file exactly once.
func fit(root string, mutants []*mutant) (err error) {
	for _, m := range mutants {
		source, failure := os.ReadFile(filepath.Join(root, m.file))
		if failure == nil {
			if n := strings.Count(string(source), m.old); n != 1 {
				failure = fmt.Errorf("%s has its old text %d times, not once", m.file, n)
			}
		}
		if failure != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", m.name, failure))
		}
	}
	return err
}

// pick returns the mutants that match, or a sample of those that must not
// survive.
func pick(mutants []*mutant, pattern string, sample int, seed uint64) ([]*mutant, error) {
	matches, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	mutants = slices.DeleteFunc(mutants, func(m *mutant) bool {
		return !matches.MatchString(m.name) || sample > 0 && m.equivalent != ""
	})
	if len(mutants) == 0 {
		return nil, errors.New("no mutant matches")
	}
	if sample <= 0 {
		return mutants, nil
	}
	if seed == 0 {
		seed = rand.Uint64N(1<<20) + 1
	}
	fmt.Printf("a sample of -seed %d\n", seed)
	random := rand.New(rand.NewPCG(seed, seed))
	random.Shuffle(len(mutants), func(i, j int) { mutants[i], mutants[j] = mutants[j], mutants[i] })
	return mutants[:min(sample, len(mutants))], nil
}

// copyTree copies the module at root and those in it, but not this one.
func copyTree(to, root string) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, name)
		if entry.IsDir() {
			if entry.Name() == ".git" || name == "integration" {
				return filepath.SkipDir
			}
			return os.MkdirAll(target, 0o755)
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, 0o644)
	})
}
