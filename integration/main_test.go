// Package integration runs services of several processes on a real Redis, does
// to them what happens to services, and judges what their clients saw.
package integration

import (
	"encoding/json"
	"os"
	"testing"
	"time"
)

// replicaVariable holds the replicaConfig of a server process. Those are this
// very binary.
const replicaVariable = "IDEMPOTENCY_REPLICA"

func TestMain(m *testing.M) {
	if text := os.Getenv(replicaVariable); text != "" {
		var config replicaConfig
		must(json.Unmarshal([]byte(text), &config))
		runReplica(config)
		return
	}
	os.Exit(m.Run())
}

// must is for what cannot fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// durable are arguments of a redis-server that writes every command to disk
// before it answers, so that a restart is no excuse.
var durable = []string{"--appendonly", "yes", "--appendfsync", "always"}

// patience is how long tests wait for what must happen.
const patience = 20 * time.Second

// replicaEnviron is the environment of a server process with a replicaConfig. A
// race detector would let its other goroutines go on for a second after os.Exit.
func replicaEnviron(config []byte) []string {
	return append(os.Environ(), replicaVariable+"="+string(config), "GORACE=atexit_sleep_ms=0")
}
