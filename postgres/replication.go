package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// With a synchronous standby, a commit waits until the standby has it. An
// operator can cancel that wait (pg_cancel_backend), and so does every pgx
// connection whose context ends. PostgreSQL has committed on the primary by
// then. It answers with success, and with a warning. A failover takes such a
// commit back, so the store must not tell anyone about it: a handler would run
// under a claim that is lost.

// unreplicated is the mark of a connection that got the warning.
const unreplicated = "github.com/go-idempotency/idempotency/postgres: unreplicated"

var errUnreplicated = errors.New("postgres: the wait for the synchronous standby was cancelled, and a failover may lose what was written")

// markUnreplicated returns a handler of notices that marks the connection and
// calls next, which may be nil. The text of the warning depends on the language
// of the server. The function in the server that has sent it does not.
func markUnreplicated(next pgconn.NoticeHandler) pgconn.NoticeHandler {
	return func(conn *pgconn.PgConn, n *pgconn.Notice) {
		if n.Routine == "SyncRepWaitForLSN" {
			conn.CustomData()[unreplicated] = true
		}
		if next != nil {
			next(conn, n)
		}
	}
}

// An ownPool is the store's own pool. A statement of its QueryRow fails unless
// its commit is on the synchronous standby, if there is one.
type ownPool struct{ *pgxpool.Pool }

// QueryRow hides that of the pool.
func (p ownPool) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return replicatedRow{p.Pool, ctx, sql, args}
}

// A replicatedRow sends its statement when it is scanned.
type replicatedRow struct {
	pool *pgxpool.Pool
	ctx  context.Context
	sql  string
	args []any
}

// Scan implements pgx.Row. When ctx has ended, the answer may be that to a
// cancelled wait: a pool may be configured to wait for the answer after it has
// asked PostgreSQL to cancel.
func (r replicatedRow) Scan(dest ...any) error {
	conn, err := r.pool.Acquire(r.ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	marks := conn.Conn().PgConn().CustomData()
	delete(marks, unreplicated) // which a statement of another kind may have left
	if err := conn.QueryRow(r.ctx, r.sql, r.args...).Scan(dest...); err != nil {
		return err
	}
	if marks[unreplicated] != nil {
		return errUnreplicated
	}
	return r.ctx.Err()
}
