package postgres

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// States of a cell in the column state.
const (
	absent int16 = iota // no row, or one that has expired
	claimed
	completed
	released
)

// Conditions read statement_timestamp(), and new times count from
// clock_timestamp(). A statement takes its snapshot after the first and may then
// wait for a lock, while a renewal prolongs the lease that the snapshot has.
// What the first says to be over was over in the snapshot as well. The second is
// never earlier than the decision, so no lease is shorter than was asked for.
//
// now() would be the beginning of the handler's transaction.
//
// Every operator gets operands of exactly its types. PostgreSQL then takes its
// own operator. Otherwise it may prefer one that another role has made in a
// schema of the search_path.
const (
	tableSQL = `CREATE TABLE IF NOT EXISTS {table} (
	key         text COLLATE "C" PRIMARY KEY,
	state       smallint NOT NULL, -- 1 claimed, 2 completed, 3 released
	token       text COLLATE "C" NOT NULL,
	attempt     integer NOT NULL,
	once        boolean NOT NULL,
	watched     boolean NOT NULL,
	lease_until timestamptz NOT NULL,
	expires_at  timestamptz NOT NULL,
	fingerprint bytea NOT NULL,
	value       bytea NOT NULL
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at);
`

	// claim is what a claim sends first. It takes an absent cell, and reads any
	// other one, so it is enough for a first execution and for a replay. Its plan
	// is small: the server spends two thirds of what acquire costs it on a replay,
	// and less on a first execution. It returns no row when the cell has expired,
	// and when another claim inserts it at the same time.
	//
	// $1 key, $2 token, $3 fingerprint, $4 lease, $5 TTL in microseconds
	claimSQL = `WITH old AS MATERIALIZED (
	SELECT state, token, attempt, once, fingerprint, value, lease_until, watched, expires_at
	FROM {table} WHERE key = $1::text
), written AS (
	INSERT INTO {table}
		(key, state, token, attempt, once, watched, lease_until, expires_at, fingerprint, value)
	SELECT $1::text, 1, $2::text, 1, false, false,
		clock_timestamp() + $4::bigint::float8 * interval '1 microsecond',
		clock_timestamp() + $5::bigint::float8 * interval '1 microsecond', $3::bytea, ''::bytea
	WHERE NOT EXISTS (SELECT FROM old)
	ON CONFLICT (key) DO NOTHING
	RETURNING key
)
SELECT 0::smallint, '', 0, false, ''::bytea, ''::bytea, 0::bigint, false FROM written
UNION ALL
SELECT state, token, attempt, once, fingerprint, value,
	CASE WHEN state = 1 THEN ceil(extract(epoch FROM lease_until - statement_timestamp())::numeric * 1000000::numeric)::bigint ELSE 0::bigint END, watched
FROM old AS r WHERE {replicated r} AND expires_at > statement_timestamp()`

	// acquire is for all cells. It writes only when its snapshot lets it. A replay
	// writes no row and locks none. The conditions are checked once more on the row that is
	// locked, which may be newer. When they fail there, no row is written.
	//
	// $1 key, $2 token, $3 fingerprint, $4 attempt, $5 once, $6 lease, $7 TTL in
	// microseconds
	acquireSQL = `WITH old AS MATERIALIZED (
	SELECT * FROM {table} WHERE key = $1::text
), written AS (
	INSERT INTO {table} AS t
		(key, state, token, attempt, once, watched, lease_until, expires_at, fingerprint, value)
	SELECT $1::text, 1, $2::text, greatest($4::int, 1), false, false,
		clock_timestamp() + {lease}, clock_timestamp() + {ttl}, $3::bytea, ''
	WHERE NOT EXISTS (SELECT FROM old AS r WHERE NOT ({accepts r}))
	ON CONFLICT (key) DO UPDATE SET state = 1, token = $2::text, value = '',
		attempt = CASE WHEN {expired t} THEN greatest($4::int, 1) WHEN {own t} THEN t.attempt ELSE t.attempt + 1 END,
		once = {own t} AND (t.once OR $4::int > 0 AND $5::bool),
		watched = t.watched AND NOT {expired t},
		fingerprint = CASE WHEN {own t} THEN t.fingerprint ELSE $3::bytea END,
		lease_until = clock_timestamp() + {lease}, expires_at = clock_timestamp() + {ttl}
	WHERE {accepts t}
	RETURNING attempt, once
)
SELECT w.attempt, w.once, coalesce(r.state, 0::smallint), coalesce(r.token, ''), coalesce(r.attempt, 0),
	coalesce(r.once, false), r.fingerprint, r.value,
	coalesce({micros r.lease_until}, 0::bigint),
	coalesce(r.watched, false)
FROM (SELECT) AS one
LEFT JOIN written AS w ON true
LEFT JOIN old AS r ON NOT {expired r}
WHERE {replicated r}`

	// acceptsSQL are the rows of the table in the documentation of Store that
	// answer Acquired.
	acceptsSQL = `({expired r} OR CASE
		WHEN r.state = 3 THEN r.token <> $2::text AND $4::int = 0
		WHEN r.fingerprint <> '' AND $3::bytea <> '' AND r.fingerprint <> $3::bytea THEN false
		WHEN r.state = 2 THEN false
		WHEN r.token = $2::text THEN $4::int IN (0, r.attempt)
		ELSE $4::int = 0 AND NOT r.once AND r.lease_until <= statement_timestamp()
	END)`

	ownSQL     = `(r.expires_at > statement_timestamp() AND r.state = 1 AND r.token = $2::text)`
	expiredSQL = `(r.expires_at <= statement_timestamp())`

	// replicated is true for every cell. With a synchronous standby, it keeps the
	// statement from reading out a response that the standby lacks. The response
	// was committed on the primary alone when its owner gave up waiting for the
	// standby, or when the primary has crashed and recovered meanwhile. So the
	// statement writes an empty message behind it into the log, which makes its
	// own commit wait until the standby has both.
	replicatedSQL = `CASE WHEN r.state = 2 AND current_setting('synchronous_standby_names') <> ''
	THEN pg_logical_emit_message(true, ''::text, ''::text) IS NOT NULL ELSE true END`

	// completeOwn is what Complete sends first. An UPDATE costs the server two
	// thirds of an INSERT that conflicts. It returns no row unless the cell is
	// claimed under the token, and complete decides then.
	//
	// $1 key, $2 token, $3 fingerprint, $4 value, $5 TTL in microseconds
	completeOwnSQL = `UPDATE {table} AS t SET state = 2, once = false, fingerprint = $3::bytea, value = $4::bytea,
	expires_at = clock_timestamp() + $5::bigint::float8 * interval '1 microsecond'
WHERE key = $1::text AND {own t}
RETURNING CASE WHEN watched THEN pg_notify('{channel}', $1::text)::text END`

	// $1 key, $2 token, $3 fingerprint, $4 value, $5 TTL in microseconds
	completeSQL = `WITH old AS MATERIALIZED (
	SELECT state, token, expires_at FROM {table} WHERE key = $1::text
), written AS (
	INSERT INTO {table} AS t
		(key, state, token, attempt, once, watched, lease_until, expires_at, fingerprint, value)
	VALUES ($1::text, 2, $2::text, 0, false, false, clock_timestamp(),
		clock_timestamp() + {keep}, $3::bytea, $4::bytea)
	ON CONFLICT (key) DO UPDATE SET state = 2, token = $2::text, once = false, fingerprint = $3::bytea,
		value = $4::bytea, expires_at = clock_timestamp() + {keep}
	WHERE {expired t} OR {own t}
	RETURNING watched
)
SELECT w.watched IS NOT NULL, CASE WHEN w.watched THEN pg_notify('{channel}', $1::text)::text END,
	coalesce(r.state, 0::smallint), coalesce(r.token, '')
FROM (SELECT) AS one
LEFT JOIN written AS w ON true
LEFT JOIN old AS r ON NOT {expired r}`

	// $1 key, $2 token, $3 how long the marker is kept, in microseconds
	releaseSQL = `WITH written AS (
	INSERT INTO {table} AS t
		(key, state, token, attempt, once, watched, lease_until, expires_at, fingerprint, value)
	VALUES ($1::text, 3, $2::text, 0, false, false, clock_timestamp(),
		clock_timestamp() + {marker}, '', '')
	ON CONFLICT (key) DO UPDATE SET state = 3, token = $2::text, once = false, fingerprint = '', value = '',
		attempt = CASE WHEN {expired t} THEN 0 ELSE t.attempt END,
		expires_at = CASE WHEN t.attempt > 1 AND {own t}
			THEN greatest(t.expires_at, clock_timestamp() + {marker})
			ELSE clock_timestamp() + {marker} END
	WHERE {expired t} OR {own t}
	RETURNING watched
)
SELECT CASE WHEN watched THEN pg_notify('{channel}', $1::text)::text END FROM written`

	watchSQL = `UPDATE {table} SET watched = true WHERE key = $1::text AND state = 1 AND NOT watched`

	// ownerSQL waits for the end of a transaction that has completed the cell.
	ownerSQL = `SELECT state, token FROM {table} WHERE key = $1::text FOR UPDATE`

	// $1 key
	inspectSQL = `SELECT state, token, attempt, once, fingerprint, value,
	{micros lease_until}, {micros expires_at}
FROM {table} WHERE key = $1::text AND expires_at > statement_timestamp()`

	forgetSQL = `WITH forgotten AS (
	UPDATE {table} SET once = false, fingerprint = '', value = '',
		attempt = greatest(attempt, 1),
		token = CASE WHEN state = 2 THEN '' ELSE token END,
		state = CASE WHEN state = 2 THEN 3 ELSE state END
	WHERE key = $1::text RETURNING watched
)
SELECT CASE WHEN watched THEN pg_notify('{channel}', $1::text)::text END FROM forgotten`

	// A claim may revive a row after the inner SELECT has read it. The condition
	// of the DELETE is checked again on the row as it is then.
	//
	// The keys are an array, which the planner can only look up one by one. It
	// joins the rows of IN, and may read every expired row for that. After a quiet
	// night these are so many that no batch would end within cleanTime.
	cleanSQL = `DELETE FROM {table} WHERE expires_at <= statement_timestamp() AND key = ANY (ARRAY(
	SELECT key FROM {table} WHERE expires_at <= statement_timestamp()
	ORDER BY expires_at LIMIT $1::int FOR UPDATE SKIP LOCKED))`
)

// statements are the SQL of one table.
type statements struct {
	name, channel, table           string
	claim, acquire, watch          string
	completeOwn, complete, release string
	owner, clean, inspect, forget  string
}

func newStatements(schema, table string) statements {
	name := pgx.Identifier{table}
	if schema != "" {
		name = pgx.Identifier{schema, table}
	}
	sum := sha256.Sum256([]byte(name.Sanitize()))
	channel := "idempotency_" + hex.EncodeToString(sum[:8])
	on := func(row, sql string) string { return strings.ReplaceAll(sql, "r.", row+".") }
	var pairs []string
	for _, row := range []string{"r", "t"} {
		expired := on(row, expiredSQL)
		pairs = append(pairs, "{expired "+row+"}", expired, "{own "+row+"}", on(row, ownSQL),
			"{replicated "+row+"}", on(row, replicatedSQL), "{accepts "+row+"}", on(row, strings.ReplaceAll(acceptsSQL, "{expired r}", expiredSQL)))
	}
	pairs = append(pairs, "{table}", name.Sanitize(), "{index}", pgx.Identifier{table + "_expires"}.Sanitize(),
		"{channel}", channel)
	for name, parameter := range map[string]string{"{lease}": "$6", "{ttl}": "$7", "{keep}": "$5", "{marker}": "$3"} {
		pairs = append(pairs, name, parameter+"::bigint::float8 * interval '1 microsecond'")
	}
	for _, column := range []string{"lease_until", "expires_at", "r.lease_until"} {
		pairs = append(pairs, "{micros "+column+"}",
			"ceil(extract(epoch FROM "+column+" - statement_timestamp())::numeric * 1000000::numeric)::bigint")
	}
	fill := strings.NewReplacer(pairs...).Replace
	return statements{
		name: name.Sanitize(), channel: channel, table: fill(tableSQL),
		claim: fill(claimSQL), acquire: fill(acquireSQL), watch: fill(watchSQL),
		completeOwn: fill(completeOwnSQL), complete: fill(completeSQL), release: fill(releaseSQL),
		owner: fill(ownerSQL), clean: fill(cleanSQL), inspect: fill(inspectSQL), forget: fill(forgetSQL),
	}
}

// SchemaSQL returns the statements that make the table, for a team that has
// migrations of its own. They do nothing when the table is there.
func (s *Store) SchemaSQL() string { return s.sql.table }

// columns counts the columns of the table that the store needs.
const columnsSQL = `SELECT to_regclass($1::text) IS NOT NULL, count(*) FROM pg_catalog.pg_attribute
WHERE attrelid = to_regclass($1::text) AND NOT attisdropped AND attname = ANY (ARRAY['key', 'state', 'token',
	'attempt', 'once', 'watched', 'lease_until', 'expires_at', 'fingerprint', 'value']::name[])`

// Migrate makes the table, unless it is there. Every replica may call it when it
// starts, all at once. When the table is there, Migrate needs no right to make
// one, and returns an error if it is the table of something else.
func (s *Store) Migrate(ctx context.Context) error {
	own, err := s.conns()
	if err != nil {
		return err
	}
	err = pgx.BeginFunc(ctx, own, func(tx pgx.Tx) error {
		// CREATE TABLE IF NOT EXISTS fails when two sessions run it at once.
		sum := sha256.Sum256([]byte(s.sql.name))
		lock := int64(binary.BigEndian.Uint64(sum[:8]))
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1::bigint)`, lock); err != nil {
			return err
		}
		var there bool
		var columns int
		err := tx.QueryRow(ctx, columnsSQL, s.sql.name).Scan(&there, &columns)
		switch {
		case err != nil:
			return err
		case !there:
			_, err = tx.Exec(ctx, s.sql.table)
		case columns != 10:
			err = errors.New("it is there, with other columns; set Options.Table to another name")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("postgres: making the table %s: %w", s.sql.name, err)
	}
	return nil
}

// isText reports whether s can be text in PostgreSQL.
func isText(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\x00") }
