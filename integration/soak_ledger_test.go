package integration

import (
	"bufio"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/go-idempotency/idempotency/integration/history"
)

// A soakLedger counts effects. It remembers a key for two turns, which are
// longer than records live.
type soakLedger struct {
	addr string

	mu       sync.Mutex // guards what follows
	effects  map[string]string
	previous map[string]string
	dead     map[string]bool // processes
	total    int
	again    int      // runs again after a process was killed, of keys that may
	double   []string // what must not be
}

func startSoakLedger(t *testing.T) *soakLedger {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	l := &soakLedger{addr: listener.Addr().String(), effects: make(map[string]string), dead: make(map[string]bool)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				for lines := bufio.NewScanner(conn); lines.Scan(); {
					key, run, _ := strings.Cut(lines.Text(), " ")
					l.add(key, run)
				}
				_ = conn.Close()
			}()
		}
	}()
	return l
}

// add judges an effect: a second one is legal if the process of the first was
// killed and the key is not at-most-once.
func (l *soakLedger) add(key, run string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	first, ok := l.effects[key]
	if !ok {
		first, ok = l.previous[key]
	}
	switch {
	case !ok:
		l.effects[key] = run
	case strings.HasPrefix(key, history.Plain) && l.dead[processOf(first)]:
		l.again++
		l.effects[key] = run
	default:
		l.double = append(l.double, key+": "+first+", "+run)
	}
}

// processOf returns the process that a run was in.
func processOf(run string) string { return run[:strings.LastIndexByte(run, '-')] }

func (l *soakLedger) bury(process string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead[process] = true
}

func (l *soakLedger) isDead(process string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead[process]
}

// turn forgets what is two turns old.
func (l *soakLedger) turn() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.previous, l.effects = l.effects, make(map[string]string)
}

func (l *soakLedger) counts() (total, again int, double []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total, l.again, l.double
}
