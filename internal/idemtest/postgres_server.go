package idemtest

import (
	"encoding/binary"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A PostgresServer is a PostgreSQL of the test's own.
type PostgresServer struct {
	T    testing.TB
	Dir  string
	Port string

	bin    string
	args   []string
	nobody bool // root may not run it
	cmd    *exec.Cmd
}

// StartPostgres starts a PostgreSQL in a temporary directory, with arguments such
// as "-c", "fsync=on". It stops with the test. The test is skipped where there is
// none, unless POSTGRES_REQUIRED is 1.
func StartPostgres(t testing.TB, args ...string) *PostgresServer {
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
	slices.Sort(found)
	postgres, err := filepath.EvalSymlinks(found[len(found)-1]) // its folder has the other programs
	require.NoError(t, err)
	s := &PostgresServer{T: t, bin: filepath.Dir(postgres), args: args, nobody: os.Geteuid() == 0}
	s.create("initdb", "-U", "test", "-A", "trust")
	return s
}

// StartStandby starts a standby with the name "standby", which replicates s. It
// is asynchronous until synchronous_standby_names of s says otherwise.
func (s *PostgresServer) StartStandby() *PostgresServer {
	s.T.Helper()
	standby := &PostgresServer{T: s.T, bin: s.bin, args: s.args, nobody: s.nobody}
	standby.create("pg_basebackup", "-R", "-c", "fast", "-d", "host=127.0.0.1 port="+s.Port+" user=test application_name=standby")
	return standby
}

// Promote makes a standby a primary, and waits until it is one.
func (s *PostgresServer) Promote() {
	s.T.Helper()
	s.run("pg_ctl", "promote", "-w", "-D", s.Dir+"/data")
}

// create has a program make the data of a new server, and starts that.
func (s *PostgresServer) create(program string, args ...string) {
	s.T.Helper()
	dir, err := os.MkdirTemp("", "pg") // short: the path of a socket has 107 bytes
	require.NoError(s.T, err)
	s.Dir = dir
	s.T.Cleanup(func() { _ = os.RemoveAll(dir) })
	if s.nobody {
		require.NoError(s.T, os.Chown(dir, nobody, nobody))
	}
	s.run(program, append(args, "--no-sync", "-D", dir+"/data")...)
	s.Port = FreePort(s.T)
	s.Restart()
	s.T.Cleanup(s.Crash)
}

// run runs a program of PostgreSQL to its end.
func (s *PostgresServer) run(program string, args ...string) {
	s.T.Helper()
	out, err := s.command(program, args...).CombinedOutput()
	require.NoError(s.T, err, string(out))
}

// command is a program of PostgreSQL.
func (s *PostgresServer) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, program), args...)
	s.Demote(cmd)
	return cmd
}

// Demote has cmd run in the directory and as the user of the server.
func (s *PostgresServer) Demote(cmd *exec.Cmd) {
	cmd.Dir = s.Dir
	if s.nobody {
		demote(cmd)
	}
}

// Start starts the process, which recovers from a crash. It is false if that does
// not answer.
func (s *PostgresServer) Start() bool {
	args := append([]string{"-D", s.Dir + "/data", "-p", s.Port, "-k", s.Dir,
		"-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200", "-c", "fsync=on"}, s.args...)
	s.cmd = s.command("postgres", args...)
	log, err := os.OpenFile(s.Dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(s.T, err)
	defer func() { _ = log.Close() }()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	require.NoError(s.T, s.cmd.Start())
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if s.accepts() {
			return true
		}
	}
	s.Crash()
	text, _ := os.ReadFile(s.Dir + "/log")
	s.T.Logf("PostgreSQL does not answer\n%s", text)
	return false
}

// accepts reports whether a session can begin. The first byte of the answer to the
// message that starts one is an R then, and an E while the server recovers.
func (s *PostgresServer) accepts() bool {
	conn, err := net.DialTimeout("tcp", "127.0.0.1:"+s.Port, time.Second)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	const parameters = "user\x00test\x00database\x00postgres\x00\x00"
	message := binary.BigEndian.AppendUint32(nil, uint32(8+len(parameters)))
	message = binary.BigEndian.AppendUint32(message, 3<<16) // the version of the protocol
	_, _ = conn.Write(append(message, parameters...))
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	var answer [1]byte
	_, err = conn.Read(answer[:])
	return err == nil && answer[0] == 'R'
}

// Restart starts it anew on the same port and directory.
func (s *PostgresServer) Restart() { require.True(s.T, s.Start(), "PostgreSQL does not start") }

// Crash is an immediate shutdown: nothing is saved, and the next start recovers.
func (s *PostgresServer) Crash() {
	_ = quit(s.cmd.Process)
	_ = s.cmd.Wait()
}

// Process is the process that was started last.
func (s *PostgresServer) Process() *os.Process { return s.cmd.Process }

// URL is what a pool connects to.
func (s *PostgresServer) URL() string { return PostgresURL("127.0.0.1:" + s.Port) }

// PostgresURL is the URL of a PostgresServer that is reached at addr.
func PostgresURL(addr string) string { return "postgres://test@" + addr + "/postgres?sslmode=disable" }
