// Package postgres keeps the records of
// [github.com/go-idempotency/idempotency] in a table of PostgreSQL 12 or later.
//
// A first execution costs two statements, a replay one. A handler that writes
// to the same database can commit its rows and the stored response in one
// transaction, so its effect happens exactly once: see [Store.Begin].
//
// # Connections
//
// The store sends its own statements over a pool of its own, made from the
// configuration of the pool that [NewStore] gets. So handlers that hold every
// connection of that pool, in transactions, cannot starve the claims and
// renewals of the store. See [Options.MaxConns]. Transactions of [Store.Begin]
// come from the handlers' pool. While duplicates wait, each process has one
// more connection, which listens.
//
// Through PgBouncer in transaction mode, set
// ConnConfig.DefaultQueryExecMode of the pool to [pgx.QueryExecModeExec].
// LISTEN does not work there: the store finds out, and duplicates poll.
//
// # Durability
//
// The store promises what the database promises. With synchronous_commit off, a
// crash of the server may take back answers that clients have seen, and their
// retries run again.
//
// A failover to an asynchronous standby loses the claims and responses that the
// standby does not have yet, and their requests run again. Effects that were
// committed together with a response are lost with it. Other effects happen
// twice. So name the standby in synchronous_standby_names, and leave
// synchronous_commit on, for the roles of both pools. The level remote_apply is
// not needed.
//
// A handler then runs only under a claim that the standby has, and a client gets
// a replay only of a response that the standby has. While the standby is
// missing, requests get 503 after [idempotency.Options.StoreTimeout]. The
// response of a handler that has finished meanwhile is sent, unless it belongs
// to a transaction of [Store.Begin], and is stored when the standby is back. A
// replay costs a round trip to the standby.
//
// An operator who cancels (pg_cancel_backend) a commit that waits for the
// standby has PostgreSQL report success. The store sees the warning beside that
// on its own connections, unless client_min_messages hides it, and returns an
// error. It cannot see the warning on a transaction of Begin, whose response is
// then sent. A failover loses that response and its rows together.
package postgres
