package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// A lab is a copy of the library in which mutants are tried one by one.
type lab struct {
	dir     string
	timeout time.Duration
	verbose bool
	quick   bool // only the tests that the list names
}

// hintTimeout is that of the tests that are expected to fail. A mutant that
// makes them hang is to be found out soon.
const hintTimeout = 90 * time.Second

// check makes sure that the tests pass on what is not broken: otherwise every
// mutant would seem to be noticed. For a few mutants their own tests are enough.
func (l *lab) check(mutants []*mutant, few bool) error {
	for _, m := range mutants {
		few = few && m.tests != ""
	}
	var suites []string
	tests := map[string][]string{} // of each suite
	for _, m := range mutants {
		suite := l.suite(m.in)
		if !slices.Contains(suites, suite) {
			suites = append(suites, suite)
		}
		if few && !slices.Contains(tests[suite], m.tests) {
			tests[suite] = append(tests[suite], m.tests)
		}
	}
	for _, suite := range suites {
		v := l.test(suite, strings.Join(tests[suite], "|"), l.timeout)
		if v.killed {
			v.err = errors.New(v.by)
		}
		if v.err != nil {
			return fmt.Errorf("the tests fail without a mutant: %w\n%s", v.err, v.output)
		}
	}
	return nil
}

// inModule splits a package into the directory of its module, which go test has
// to run in, and the package there.
func (l *lab) inModule(packages string) (module, rest string) {
	for module = path.Clean(strings.TrimSuffix(packages, "...")); module != "."; module = path.Dir(module) {
		if _, err := os.Stat(filepath.Join(l.dir, module, "go.mod")); err == nil {
			return module, "." + strings.TrimPrefix(packages, "./"+module)
		}
	}
	return ".", packages
}

// suite returns all packages of the module that a package is in.
func (l *lab) suite(packages string) string {
	if module, _ := l.inModule(packages); module != "." {
		return "./" + module + "/..."
	}
	return "./..."
}

// runAll tries the mutants, one at a time in each lab, and prints what became of
// them.
func runAll(labs []lab, mutants []*mutant) (ok bool) {
	next := make(chan *mutant, len(mutants))
	for _, m := range mutants {
		next <- m
	}
	close(next)
	var (
		t       = tally{of: len(mutants), start: time.Now()}
		workers sync.WaitGroup
	)
	for i := range labs {
		workers.Go(func() {
			for m := range next {
				began := time.Now()
				t.count(m, labs[i].try(m), time.Since(began), labs[i].verbose)
			}
		})
	}
	workers.Wait()
	return t.sum()
}

// A tally counts verdicts.
type tally struct {
	of    int
	start time.Time

	mu        sync.Mutex // guards what follows
	judged    int
	killed    int
	survived  []string // without an explanation
	unfit     int      // could not be judged
	surprises int      // killed, but listed as equivalent
}

func (t *tally) count(m *mutant, v verdict, took time.Duration, verbose bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.judged++
	verdict := "killed by " + v.by
	switch {
	case v.err != nil:
		t.unfit++
		verdict = "ERROR: " + v.err.Error() + "\n" + v.output
	case v.killed && m.equivalent != "":
		t.surprises++
		verdict += ", but listed as equivalent"
	case v.killed:
		t.killed++
	case m.equivalent != "":
		verdict = "survives, as it should: " + m.equivalent
	default:
		t.survived = append(t.survived, m.name)
		verdict = "SURVIVED"
	}
	fmt.Printf("%3d/%d %-44s %5.1fs %s\n", t.judged, t.of, m.name, took.Seconds(), verdict)
	if verbose && v.killed {
		fmt.Println(v.output)
	}
}

// sum prints the result and reports whether it is good.
func (t *tally) sum() (ok bool) {
	total := t.killed + len(t.survived)
	fmt.Printf("\n%d of %d mutants killed", t.killed, total)
	if total > 0 {
		fmt.Printf(" (%.1f %%)", 100*float64(t.killed)/float64(total))
	}
	fmt.Printf(", %d more are equivalent, %d could not be judged, in %v\n",
		t.of-total-t.unfit, t.unfit, time.Since(t.start).Round(time.Second))
	for _, name := range t.survived {
		fmt.Println("survived without an explanation:", name)
	}
	return t.unfit+t.surprises+len(t.survived) == 0
}

// A verdict is what became of a mutant.
type verdict struct {
	killed bool
	by     string // the test that failed, or "a time-out in" it
	output string
	err    error // the mutant cannot be judged
}

// try breaks the library, tests it and mends it.
func (l *lab) try(m *mutant) (v verdict) {
	file := filepath.Join(l.dir, m.file)
	source, err := os.ReadFile(file)
	if err != nil {
		return verdict{err: err}
	}
	mend := func() error { return os.WriteFile(file, source, 0o644) }
	defer func() {
		if err := mend(); err != nil && v.err == nil {
			v.err = err
		}
	}()
	broken := strings.Replace(string(source), m.old, m.new, 1)
	if err := os.WriteFile(file, []byte(broken), 0o644); err != nil {
		return verdict{err: err}
	}
	if m.tests != "" {
		switch v := l.test(m.in, m.tests, hintTimeout); {
		case v.killed && v.timedOut():
			return l.confirm(v, m.in, m.tests, mend)
		case v.killed || v.err != nil:
			return v
		}
		if l.quick {
			return verdict{}
		}
	}
	suite := l.suite("./" + path.Dir(m.file))
	v = l.test(suite, "", l.timeout)
	if v.killed && m.tests != "" {
		v.by += " (not by " + m.tests + ")"
	}
	return l.confirm(v, suite, v.test(), mend)
}

// confirm makes sure that it was the mutant where that may not be: the tests that
// failed pass when it is mended, while as much else is going on.
func (l *lab) confirm(v verdict, packages, pattern string, mend func() error) verdict {
	if !v.killed {
		return v
	}
	if err := mend(); err != nil {
		return verdict{err: err}
	}
	if again := l.test(packages, pattern, l.timeout); again.killed {
		return verdict{err: errors.New("its tests fail without it too: " + again.by), output: again.output}
	}
	return v
}

const timeOut = "a time-out"

func (v verdict) timedOut() bool { return strings.HasPrefix(v.by, timeOut) }

// test returns a pattern for the test that failed, or for all.
func (v verdict) test() string {
	name, _, _ := strings.Cut(strings.TrimPrefix(v.by, timeOut+" in "), "/")
	if name, _, _ = strings.Cut(name, " "); strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Fuzz") {
		return "^" + name + "$"
	}
	return ""
}

// test runs the tests of packages that match pattern.
func (l *lab) test(packages, pattern string, timeout time.Duration) verdict {
	// Neither what vet says nor debug information helps here, and the latter
	// takes half of the time. Fast code takes half of the rest. Without it there
	// are more allocations.
	module, packages := l.inModule(packages)
	args := []string{"test", "-count=1", "-failfast", "-vet=off", "-ldflags=-s -w",
		"-timeout=" + timeout.String(), "-run=" + pattern}
	if pattern != "" && !strings.Contains(pattern, "Alloc") {
		args = append(args, "-gcflags=-N -l")
	}
	args = append(args, packages)
	// A little longer than the limit that go test has, which names the test.
	output, err := l.command(module, timeout+time.Minute, args...)
	switch {
	case err == nil:
		return verdict{}
	case strings.Contains(output, "[build failed]") || strings.Contains(output, "[setup failed]"):
		return verdict{output: output, err: errors.New("it does not compile, which is no kill")}
	}
	return verdict{killed: true, by: culprit(output), output: output}
}

// command runs the go command in a module of the copy.
func (l *lab) command(module string, timeout time.Duration, args ...string) (output string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(l.dir, module)
	// Without a Redis half of the mutants would survive, and those of Postgres.
	cmd.Env = append(os.Environ(), "REDIS_REQUIRED=1", "POSTGRES_REQUIRED=1", "GOWORK=off")
	cmd.WaitDelay = 10 * time.Second
	b, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		b = append(b, "\npanic: test timed out after "+timeout.String()...)
	}
	return string(b), err
}

var (
	failed  = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
	running = regexp.MustCompile(`(?m)^running tests:\n\t(\S+)`)
	crashed = regexp.MustCompile(`(?m)^(panic|fatal error): (.*)$`)
)

// culprit names what failed first.
func culprit(output string) string {
	if strings.Contains(output, "panic: test timed out after") {
		if m := running.FindStringSubmatch(output); m != nil {
			return timeOut + " in " + m[1]
		}
		return timeOut
	}
	name := ""
	for _, m := range failed.FindAllStringSubmatch(output, -1) {
		if name != "" && !strings.HasPrefix(m[1], name+"/") {
			break
		}
		name = m[1] // a subtest follows its test
	}
	if m := crashed.FindStringSubmatch(output); m != nil {
		name = strings.TrimSpace(name + " (" + m[1] + ": " + m[2] + ")")
	}
	if name == "" {
		return "something that has no name"
	}
	return name
}
