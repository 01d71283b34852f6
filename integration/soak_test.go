package integration

import "net/http"

func newSoakService(config replicaConfig) http.Handler { return nil }
