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
// retries run again. A failover to an asynchronous replica loses the
// transactions that the replica does not have yet. Effects and responses that
// were committed together are lost together. With other effects, a handler may
// run twice. A synchronous replica (synchronous_standby_names with
// synchronous_commit on) prevents that.
package postgres
