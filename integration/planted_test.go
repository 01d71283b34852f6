package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
)

// Small scenarios, each of which brings about one kind of trouble.
var (
	plainKeys  = []string{history.Plain}
	onceKeys   = []string{history.Once}
	commitKeys = []string{history.Commit}
	largeKeys  = []string{history.Large}
	formKeys   = []string{history.Form}
	eventKeys  = []string{history.Event}
	tenantKeys = []string{history.Tenant}
	headKeys   = []string{history.Head}
	brokenKeys = []string{history.Broken}
	openKeys   = []string{history.Open}
	beginKeys  = []string{history.Begin}

	quiet  = faultMix{}
	stops  = faultMix{process: []choice[faultKind]{{1, stopProcess}}, pause: 400 * time.Millisecond}
	kills  = faultMix{process: []choice[faultKind]{{1, killProcess}}, pause: 400 * time.Millisecond}
	cuts   = faultMix{link: []choice[faultKind]{{1, breakLink}, {1, muteLink}}, pause: 300 * time.Millisecond}
	lags   = faultMix{link: []choice[faultKind]{{1, slowLink}}, pause: 150 * time.Millisecond}
	outage = faultMix{database: []choice[faultKind]{{1, killProcess}}, pause: 200 * time.Millisecond}
	swaps  = faultMix{process: []choice[faultKind]{{1, replace}}, database: outage.database, pause: 300 * time.Millisecond}
	often  = faultMix{database: outage.database, pause: 60 * time.Millisecond}
)

// script is the plan of every run, and the first one that of the first run of
// a key, if it is another.
func script(first []step, then ...step) func(time.Duration) planner {
	return func(lease time.Duration) planner {
		return func(_, _ string, nth int) []step {
			if nth == 1 && first != nil {
				return first
			}
			return then
		}
	}
}

func created() step { return step{Do: doAnswer, Status: 201} }

// targeted returns a scenario of one and a half seconds in which the runs do
// what plan says.
func targeted(mix faultMix, kinds []string, plan func(time.Duration) planner) scenario {
	return scenario{
		length: 1500 * time.Millisecond, lease: 200 * time.Millisecond, settle: patienceOfSweep, mix: mix,
		load: workload{clients: 12, groups: 3, ahead: 3, kinds: kinds, pause: 20 * time.Millisecond, plan: plan},
	}
}

var (
	short  = step{Do: doWork, For: 20 * time.Millisecond}
	longer = step{Do: doWork, For: 120 * time.Millisecond}

	simple    = script(nil, short, step{Do: doEffect}, created())
	slowly    = script(nil, step{Do: doEffect}, longer, created())
	overtaken = script([]step{{Do: doEffect}, longer, created()}, step{Do: doEffect}, created())
	crashing  = script([]step{{Do: doEffect}, {Do: doCrash}}, short, step{Do: doEffect}, created())
	failing   = script([]step{{Do: doAnswer, Status: 500}}, short, step{Do: doEffect}, created())
	late      = script(nil, longer, step{Do: doCommit}, step{Do: doEffect}, longer, created())

	// freed is overtaken by runs that fail, until the first one is over.
	freed = func(time.Duration) planner {
		return func(_, _ string, nth int) []step {
			switch {
			case nth == 1:
				return []step{{Do: doEffect}, longer, longer, {Do: doCommit}, created()}
			case nth < 12:
				return []step{short, {Do: doAnswer, Status: 500}}
			}
			return []step{{Do: doEffect}, created()}
		}
	}
	// waiting fails once, and then does nothing until the sweep comes.
	waiting = func(time.Duration) planner {
		return func(_, _ string, nth int) []step {
			switch {
			case nth == 1:
				return []step{{Do: doAnswer, Status: 500}}
			case nth < 4:
				return []step{{Do: doAnswer, Status: 401}}
			}
			return []step{{Do: doEffect}, created()}
		}
	}
	// idle does nothing at first.
	idle    = script([]step{short, {Do: doAnswer, Status: 401}}, short, step{Do: doEffect}, created())
	commits = script([]step{{Do: doCommit}, {Do: doEffect}, {Do: doCrash}}, step{Do: doCommit}, step{Do: doEffect}, created())
)

// troubles are the scenarios. Without a bug each of them is clean.
var troubles = map[string]func() scenario{
	"quiet":    func() scenario { return targeted(quiet, plainKeys, simple) },
	"payloads": func() scenario { return withVariants(targeted(quiet, plainKeys, simple)) },
	"stops":    func() scenario { return targeted(stops, plainKeys, slowly) },
	"kills":    func() scenario { return targeted(kills, onceKeys, slowly) },
	"cuts":     func() scenario { return targeted(cuts, plainKeys, slowly) },
	"outages":  func() scenario { return targeted(outage, plainKeys, slowly) },
	"downtime": func() scenario { return lasting(3*time.Second, targeted(often, plainKeys, slowly)) },
	"panics":   func() scenario { return targeted(quiet, plainKeys, crashing) },
	"failures": func() scenario { return targeted(quiet, plainKeys, failing) },
	"claims":   func() scenario { return allAlive(targeted(cuts, onceKeys, slowly)) },
	"nothing":  func() scenario { return targeted(quiet, plainKeys, idle) },
	"commits":  func() scenario { return targeted(quiet, commitKeys, commits) },

	"stale owners": func() scenario { return targeted(stops, plainKeys, overtaken) },
	"late commits": func() scenario { return targeted(stops, commitKeys, late) },
	"cut commits":  func() scenario { return targeted(cuts, commitKeys, late) },
	"sealed":       func() scenario { return targeted(quiet, onceKeys, simple) },
	"large":        func() scenario { return withVariants(targeted(quiet, largeKeys, simple)) },

	"forms":   func() scenario { return withVariants(targeted(quiet, formKeys, simple)) },
	"events":  func() scenario { return withVariants(targeted(quiet, eventKeys, simple)) },
	"tenants": func() scenario { return withVariants(targeted(quiet, tenantKeys, simple)) },
	"heads":   func() scenario { return withVariants(targeted(quiet, headKeys, simple)) },
	"form":    func() scenario { return targeted(quiet, formKeys, simple) },
	"event":   func() scenario { return targeted(quiet, eventKeys, simple) },
	"head":    func() scenario { return targeted(quiet, headKeys, simple) },

	"broken": func() scenario { return withVariants(targeted(quiet, brokenKeys, simple)) },
	"open":   func() scenario { return targeted(quiet, openKeys, slowly) },
	"opened": func() scenario { return targeted(cuts, openKeys, slowly) },

	"freed keys": func() scenario { return targeted(stops, plainKeys, freed) },

	// Commands come late, by more than a lease. What comes when its claim was given
	// up holds the key for a lease. A mark finds the marker, however late it is.
	"late claims": func() scenario { return allAlive(targeted(lags, onceKeys, simple)) },
	"lags":        func() scenario { return targeted(lags, plainKeys, slowly) },

	// Attempts count for the TTL: after a mark, and when there was one before.
	"idle":      func() scenario { return targeted(quiet, onceKeys, idle) },
	"idle once": func() scenario { return rarely(targeted(quiet, plainKeys, waiting)) },

	"expiry":       func() scenario { return expiring(targeted(quiet, plainKeys, simple)) },
	"expiry once":  func() scenario { return expiring(targeted(kills, onceKeys, slowly)) },
	"deployments":  func() scenario { return targeted(swaps, plainKeys, slowly) },
	"transactions": func() scenario { return onDatabase(targeted(kills, beginKeys, crashing)) },

	"refusals": func() scenario {
		s := allAlive(targeted(quiet, []string{history.Plain, history.Once}, simple))
		s.bug = refusesAnswers
		return s
	},
}

func withVariants(s scenario) scenario {
	s.load.variant = 3
	return s
}

// expiring has a few keys, which are used again when their TTL is over.
func expiring(s scenario) scenario {
	s.ttl, s.load.limit, s.length = 3*s.lease, 4, 3*time.Second
	return s
}

func onDatabase(s scenario) scenario {
	s.store, s.lease, s.length = onPostgres, 600*time.Millisecond, 3*time.Second
	return s
}

func lasting(length time.Duration, s scenario) scenario {
	s.length = length
	return s
}

// rarely has clients pause for longer than a lease, so that short markers are over
// when they come again.
func rarely(s scenario) scenario {
	s.load.pause = 3 * s.lease
	return s
}

// allAlive wants every outcome to become known: a mark that nobody knows of is
// freed.
func allAlive(s scenario) scenario {
	s.noneDied = true
	return s
}

// plantedBugs says in which trouble a bug shows, and as what.
var plantedBugs = []struct {
	bug, trouble, want string
}{
	{completesAnything, "stops", history.Stale},
	{takesOnceOver, "kills", history.Twice},
	{ignoresInProgress, "quiet", history.Overlap},
	{forgetsClaims, "quiet", history.Overlap},
	{forgetsRecords, "quiet", history.RanAgain},
	{forgetsAtTimes, "quiet", history.Forgotten},
	{answersForOthers, "quiet", history.Phantom},
	{spoilsValues, "quiet", history.Phantom},
	{truncatesValues, "quiet", history.Code},
	{ignoresFingerprints, "payloads", history.Payload},
	{acquiresWhenDown, "cuts", history.Overlap},
	{hidesFailures, "outages", history.RanAgain},
	{dropsCommits, "commits", history.RanAgain},
	{endsLeasesEarly, "stops", history.Overlap},
	{neverEndsLeases, "panics", history.Stuck},
	{restartsAttempts, "panics", history.Attempt},
	{releasesAfterPanic, "panics", history.Overlap},
	{releasesAnswers, "quiet", history.Freed},
	{sendsUnstored, "quiet", history.Unstored},
	{keepsFailures, "failures", history.Freed},
	{givesUp, "cuts", history.GaveUp},
	{losesReleases, "claims", history.Stuck},
	{marksNoReplays, "quiet", history.Phantom},
	{losesLeases, "quiet", history.Lost},
	{losesLeases, "quiet", history.GaveUp},
	{dropsAnswers, "quiet", history.GaveUp},
	{takesBack, "late commits", history.TookBack},
	{overwritesAnswers, "stale owners", history.Answers},
	{readsLate, "quiet", history.Register},
	{spoilsValues, "sealed", history.Code},
	{comparesNoBodies, "large", history.Payload},
	{losesReleases, "claims", history.Code},
	{marksClaims, "panics", history.Marked},
	{abandonsClaims, "panics", history.Code},
	{skipsMarks, "sealed", history.Unmarked},
	{skipsMarks, "commits", history.Unmarked},
	{renewsFreed, "freed keys", history.TookBack},
	{skipsAttempts, "panics", history.Attempt},
	{losesMarkers, "failures", history.Attempt},
	{shortensMarkers, "failures", history.Marker},
	{shortensMarkers, "idle", history.Marker},
	{shortensMarkers, "claims", history.Marker},
	{lengthensMarkers, "nothing", history.Marker},
	{shortensLaterOnes, "idle once", history.Attempt},
	{shrinksAnswers, "outages", history.Shrunk},
	{refusesAll, "refusals", history.Stuck},
	{leavesMarks, "cut commits", history.NotFreed},
	{givesUpAtLease, "downtime", history.GaveUp},
	{comparesBoundaries, "form", history.Code},
	{readsOn, "head", history.Code},
	{takesAnyEvent, "event", history.Code},
	{takesAnyTenant, "tenants", history.Phantom},
	{hidesBreaks, "broken", history.Part},
	{opensBeside, "open", history.Exposed},
	{opensAnyhow, "open", history.Exposed},
	{freesExposed, "opened", history.Freed},
	{endsTTLsEarly, "expiry", history.RanAgain},
	{endsTTLsLate, "expiry", history.Outlived},
	{endsTTLsLate, "expiry once", history.Outlived},
	{exitsAtOnce, "deployments", history.GaveUp},
	{closesConnections, "deployments", history.Dropped},
	{commitsAlone, "transactions", history.Twice},
	{losesAttachments, "transactions", history.Torn},
	{"Redis keeps nothing", "outages", history.RanAgain},
}

// TestPlantedBugs shows that the checker finds what it is there to find. What
// happens does not depend on the seed alone, so a bug that needs an unlucky
// moment gets a few.
func TestPlantedBugs(t *testing.T) {
	const seeds = 8
	for _, row := range plantedBugs {
		t.Run(row.bug+", "+row.want, func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); ; seed++ {
				s := troubles[row.trouble]()
				s.seed, s.bug, s.volatile = seed, row.bug, row.bug == "Redis keeps nothing"
				s.settle = 20 * time.Millisecond // per key, and some bugs let none of them settle
				if row.want == history.Stuck {
					s.settle = 3 * s.lease
				}
				h, _ := play(t, s)
				report := history.Check(h)
				kinds := report.Kinds()
				t.Logf("seed %d: %d violations, %q", seed, len(report.Violations), kinds)
				if seed == seeds {
					require.Contains(t, kinds, row.want)
				}
				if slices.Contains(kinds, row.want) {
					return
				}
			}
		})
	}
}

// The scenarios of the planted bugs are clean without them, so it is the bugs
// that were found.
func TestNothingPlanted(t *testing.T) {
	const seeds = 2
	for name, trouble := range troubles {
		for seed := uint64(1); seed <= seeds; seed++ {
			t.Run(fmt.Sprintf("%s, seed %d", name, seed), func(t *testing.T) {
				t.Parallel()
				s := trouble()
				s.seed = seed
				h, faults := play(t, s)
				report := history.Check(h)
				t.Log(describe(h, faults, report))
				requireClean(t, s.seed, h, faults, report)
				if s.bug == refusesAnswers || name == "broken" {
					require.NotZero(t, report.NotStored, "nothing was tested")
				}
				if name == "opened" {
					require.NotZero(t, report.Exposed, "nothing was tested")
				}
				if strings.HasPrefix(name, "expiry") {
					require.Greater(t, report.Lives, report.Keys, "nothing was tested")
				}
			})
		}
	}
}

// A handler that takes longer than its lease runs once all the same, as long as
// nothing befalls its process: the lease is renewed.
func TestLeasesAreRenewed(t *testing.T) {
	s := targeted(quiet, []string{history.Plain, history.Commit, history.Once}, func(lease time.Duration) planner {
		return script(nil, step{Do: doEffect}, step{Do: doWork, For: 2 * lease}, created())(lease)
	})
	s.lease, s.load.limit = 1500*time.Millisecond, 6
	h, faults := play(t, s)
	report := history.Check(h)
	requireClean(t, s.seed, h, faults, report)
	require.Equal(t, report.Keys, report.Runs, "a run lost its lease\n%s", describe(h, faults, report))
}
