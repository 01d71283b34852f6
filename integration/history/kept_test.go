package history

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What is attached to an answer is there when the answer is.
func TestLegalAttachments(t *testing.T) {
	stored := []func(*tale){runs("a", 1, 10), attaches("a", 20), completes("a", 25, ""), first("a", 30, 201), keeps("a")}
	again := []func(*tale){runs("b", 2, 130), attaches("b", 140), completes("b", 145, ""), keeps("b")}
	for name, h := range map[string]History{
		"a row and an answer": told(Begin, append(stored, asks("b", 40, replay("a", 201)))...),
		"neither, when the transaction was rolled back": told(Begin, append([]func(*tale){runs("a", 1, 10), attaches("a", 20),
			rollsBack("a", 25, "refused"), releasesFor("a", 26, 10*lease, "")}, again...)...),
		"or when the key was lost": told(Begin, append([]func(*tale){runs("a", 1, 10), runs("x", 2, 110), attaches("a", 115),
			rollsBack("a", 116, ErrLeaseLost), releasesFor("a", 117, 10*lease, "")}, runs("b", 3, 215))...),
		"or when the process died": killed(50, told(Begin, append([]func(*tale){runs("a", 1, 10), attaches("a", 20)}, again...)...)),
		"the commit got through, and its reply did not": told(Begin, runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"),
			keeps("a"), asks("b", 40, replay("a", 201))),
		"nobody asks what became of it":             told(Begin, runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), keeps("a")),
		"an answer without a row":                   told(Begin, runs("a", 1, 10), ends("a", 20, 404), completes("a", 25, ""), first("a", 30, 404)),
		"a row in each life":                        told(Begin, append(stored, runs("b", 1, 1030), attaches("b", 1040), completes("b", 1041, ""), keeps("b"))...),
		"an attachment that the store did not take": told(Attach, runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), runs("b", 2, 115)),
	} {
		t.Run(name, func(t *testing.T) {
			require.Empty(t, Check(h).Violations, "\n%s", h.Lines("key"))
		})
	}
}

func TestRulesOfAttachments(t *testing.T) {
	begin := func(lines ...func(*tale)) History { return told(Begin, lines...) }
	requireKinds(t, map[string]broken{
		"an answer without its row": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, "")), []string{Torn}},
		"a row without its answer": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), keeps("a"),
			runs("b", 2, 130), ends("b", 140, 404), completes("b", 145, "")), []string{Torn}},
		"two rows": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, ""), keeps("a"), keeps("a")), []string{Twice}},
		"rows of two runs": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), keeps("a"),
			runs("b", 2, 130), attaches("b", 140), completes("b", 145, ""), keeps("b")), []string{Torn, Twice}},
		"a row that was not handed over": {begin(runs("a", 1, 10), keeps("a")), []string{Torn}},
		"a row of nobody":                {begin(keeps("x")), []string{Phantom}},
		"sent, and it may be rolled back": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), first("a", 30, 201)),
			[]string{Unstored}},
		"freed, and it was not rolled back": {begin(runs("a", 1, 10), attaches("a", 20), completes("a", 25, "down"), releasesFor("a", 26, lease, "")),
			[]string{Freed}},
		"rolled back, with a short marker": {begin(runs("a", 1, 10), attaches("a", 20), rollsBack("a", 25, "refused"), releasesFor("a", 26, lease, "")),
			[]string{Marker}},
		"not even tried": {begin(runs("a", 1, 10), attaches("a", 20)), []string{GaveUp}},
	})
}
