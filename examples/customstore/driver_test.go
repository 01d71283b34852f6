package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"strings"
	"sync/atomic"

	"modernc.org/sqlite"
)

// A watchedDriver is SQLite's driver. It calls at with each step of a
// transaction: "before begin", "before INSERT INTO orders", "after commit" and
// so on. When at returns an error, the step returns that error, and a "before"
// step is not executed. So tests can make any step fail, and the code under test
// has no hook for it.
type watchedDriver struct {
	sqlite.Driver
	at atomic.Pointer[func(step string) error]
}

var watched = new(watchedDriver)

func init() { sql.Register("watched", watched) }

// watch has the driver call f from now on.
func (d *watchedDriver) watch(f func(step string) error) { d.at.Store(&f) }

func (d *watchedDriver) step(name string) error {
	if f := d.at.Load(); f != nil {
		return (*f)(name)
	}
	return nil
}

// sqliteConn is what database/sql uses of a connection.
type sqliteConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ExecerContext
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
}

type watchedConn struct {
	sqliteConn
	driver *watchedDriver
	inTx   bool
}

func (d *watchedDriver) Open(name string) (driver.Conn, error) {
	conn, err := d.Driver.Open(name)
	if err != nil {
		return nil, err
	}
	return &watchedConn{sqliteConn: conn.(sqliteConn), driver: d}, nil
}

func (c *watchedConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if err := c.driver.step("before begin"); err != nil {
		return nil, err
	}
	tx, err := c.sqliteConn.BeginTx(ctx, opts)
	c.inTx = err == nil
	return &watchedTx{tx, c}, err
}

func (c *watchedConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.statement(query); err != nil {
		return nil, err
	}
	return c.sqliteConn.ExecContext(ctx, query, args)
}

func (c *watchedConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.statement(query); err != nil {
		return nil, err
	}
	return c.sqliteConn.QueryContext(ctx, query, args)
}

func (c *watchedConn) statement(query string) error {
	if !c.inTx {
		return nil
	}
	words := strings.Fields(query)
	return c.driver.step("before " + strings.Join(words[:min(3, len(words))], " "))
}

type watchedTx struct {
	driver.Tx
	conn *watchedConn
}

func (tx *watchedTx) Commit() error {
	tx.conn.inTx = false
	if err := tx.conn.driver.step("before commit"); err != nil {
		_ = tx.Tx.Rollback()
		return err
	}
	if err := tx.Tx.Commit(); err != nil {
		return err
	}
	return tx.conn.driver.step("after commit")
}

func (tx *watchedTx) Rollback() error {
	tx.conn.inTx = false
	return tx.Tx.Rollback()
}
