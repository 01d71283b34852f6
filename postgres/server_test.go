//go:build unix

package postgres_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// patience is how long the tests wait for what must happen.
const patience = 30 * time.Second

// A server is a PostgreSQL of the test's own.
type server struct {
	t    testing.TB
	bin  string
	dir  string
	port string
	cred *syscall.Credential // nil: of the test's user
	cmd  *exec.Cmd
}

// startServer starts a PostgreSQL in a temporary directory. It skips the test
// where there is none, unless POSTGRES_REQUIRED is 1.
func startServer(t testing.TB) *server {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if path, err := exec.LookPath("postgres"); err == nil {
		found = append(found, path)
	}
	if len(found) == 0 && os.Getenv("POSTGRES_REQUIRED") == "1" {
		t.Fatal("POSTGRES_REQUIRED=1, but there is no PostgreSQL")
	}
	if len(found) == 0 {
		t.Skip("there is no PostgreSQL: neither on the PATH nor in /usr/lib/postgresql")
	}
	sort.Strings(found)
	dir, err := os.MkdirTemp("", "pg") // short: the path of a socket has 107 bytes
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &server{t: t, bin: filepath.Dir(found[len(found)-1]), dir: dir}
	if os.Geteuid() == 0 { // for which PostgreSQL does not run
		s.cred = &syscall.Credential{Uid: 65534, Gid: 65534}
		require.NoError(t, os.Chown(dir, 65534, 65534))
	}
	out, err := s.command("initdb", "-D", dir+"/data", "-U", "test", "-A", "trust", "--no-sync").CombinedOutput()
	require.NoError(t, err, string(out))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, s.port, _ = net.SplitHostPort(listener.Addr().String())
	require.NoError(t, listener.Close())
	s.start()
	t.Cleanup(s.stop)
	return s
}

// command runs a program of PostgreSQL. It is killed when this process dies.
func (s *server) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, program), args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	return cmd
}

func (s *server) start() {
	s.cmd = s.command("postgres", "-D", s.dir+"/data", "-p", s.port, "-k", s.dir,
		"-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200", "-c", "fsync=on")
	log, err := os.OpenFile(s.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(s.t, err)
	defer func() { _ = log.Close() }()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	require.NoError(s.t, s.cmd.Start())
	require.Eventually(s.t, func() bool {
		conn, err := pgx.Connect(context.Background(), s.url())
		if err != nil {
			return false
		}
		return conn.Close(context.Background()) == nil
	}, patience, 20*time.Millisecond, "PostgreSQL does not start")
}

// stop is an immediate shutdown: nothing is saved, and the next start recovers.
func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGQUIT)
	_ = s.cmd.Wait()
}

func (s *server) url() string {
	return "postgres://test@127.0.0.1:" + s.port + "/postgres?sslmode=disable"
}

// dial returns a pool of at most n connections.
func (s *server) dial(n int) *pgxpool.Pool {
	pool, err := pgxpool.New(context.Background(), s.url()+"&pool_max_conns="+strconv.Itoa(n))
	require.NoError(s.t, err)
	s.t.Cleanup(pool.Close)
	return pool
}
