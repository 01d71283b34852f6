//go:build !race

package idemtest

// RaceDetector reports whether the tests run under it, which allocates.
const RaceDetector = false
