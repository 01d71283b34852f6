package history

// checkKept wants the rows that a handler wrote on the transaction of its answer
// to be there exactly when the answer is: one row for each life of the key
// whose answer was attached, and none for any other.
func (c *checker) checkKept() {
	rows := make(map[string]int) // of runs
	for _, row := range c.rows {
		if row.Type == RowKept {
			rows[row.Run]++
			c.report.Effects++
			if c.byID[row.Run] == nil {
				c.violate(Phantom, "there is a row of %q, which did not run under this key", row.Run)
			}
		}
	}
	kept := make([]int, len(c.lives))
	for _, r := range c.runs {
		n := rows[r.Run]
		kept[r.life] += n
		switch {
		case c.kind == Begin && r.stored && r.attached() && n == 0:
			c.violate(Torn, "the answer of %s was stored, and its row was not", r.Run)
		case n > 0 && !r.stored && c.storedRun(r.life) != nil:
			c.violate(Torn, "the row of %s was stored, and the answer of %s", r.Run, c.storedRun(r.life).Run)
		case n > 0 && !r.attached():
			c.violate(Torn, "%s has a row, and had not handed its transaction over", r.Run)
		}
	}
	for n, count := range kept {
		if count > 1 {
			c.violate(Twice, "%d rows in life %d of the key", count, n+1)
		}
	}
}

// rolledBack reports whether the store has said that it has rolled the
// transaction of r back.
func (r *run) rolledBack() bool {
	for _, row := range r.completes {
		if row.RolledBack {
			return true
		}
	}
	return false
}

// attached reports whether the answer of r and what the handler attached are to
// be stored as one. Then it must not go out before that, and is not tried again.
func (r *run) attached() bool { return r.end != nil && r.end.Attached }
