//go:build !race

package idemtest

// RaceDetector tells whether the race detector is on. It allocates.
const RaceDetector = false
