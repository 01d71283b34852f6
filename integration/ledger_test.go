package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A ledger is the list of what happened. It is here, in the process of the
// test, so that nothing that befalls a server process can take a row back; and
// it is told before the process goes on, so that no row comes late.
type ledger struct {
	url   string
	epoch time.Time
	plan  planner

	mu   sync.Mutex // guards what follows
	rows []history.Row
	runs map[string]int // of a key
}

// A begun is what a handler gets for its RowBegin: its name, and what it is to
// do. So all decisions are made here, from the seed.
type begun struct {
	Run  string
	Plan []step
}

func startLedger(t *testing.T, epoch time.Time, plan planner) *ledger {
	l := &ledger{epoch: epoch, plan: plan, runs: make(map[string]int)}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l.url = "http://" + listener.Addr().String()
	server := &http.Server{Handler: l}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return l
}

// ServeHTTP takes one row.
func (l *ledger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var row history.Row
	if err := json.NewDecoder(r.Body).Decode(&row); err != nil {
		return // the process died while it sent the row
	}
	must(json.NewEncoder(w).Encode(l.add(row)))
}

func (l *ledger) add(row history.Row) (answer begun) {
	l.mu.Lock()
	defer l.mu.Unlock()
	row.Seq, row.At = len(l.rows)+1, since(l.epoch)
	if row.Type == history.RowBegin {
		l.runs[row.Key]++
		row.Run = fmt.Sprintf("%s-run-%d-%d", row.Key, l.runs[row.Key], row.Seq)
		answer = begun{row.Run, l.plan(row.Key, row.Kind, l.runs[row.Key])}
	}
	l.rows = append(l.rows, row)
	return answer
}

func (l *ledger) all() []history.Row {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.rows)
}

// since is the time of a history. It is that of the wall clock, which all
// processes share, and not of a monotonic one.
func since(epoch time.Time) time.Duration {
	return time.Duration(time.Now().UnixNano() - epoch.UnixNano())
}

// A ledgerClient is a server process's way to the ledger.
type ledgerClient struct {
	url  string
	http *http.Client
}

func newLedgerClient(url string) *ledgerClient {
	return &ledgerClient{url, &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}}}
}

// add returns when the ledger has the row. Without a ledger there is nothing
// left to do for this process.
func (c *ledgerClient) add(row history.Row) (answer begun) {
	body, err := json.Marshal(row)
	must(err)
	resp, err := c.http.Post(c.url, "application/json", bytes.NewReader(body))
	must(err)
	defer func() { _ = resp.Body.Close() }()
	must(json.NewDecoder(resp.Body).Decode(&answer))
	return answer
}
