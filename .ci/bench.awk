# Prints goals and results as a table. The first file has the goals, the second
# the output of the benchmarks.

function median(list, n,    i, j, x) {
	for (i = 2; i <= n; i++) {
		x = list[i]
		for (j = i - 1; j > 0 && list[j] > x; j--) list[j + 1] = list[j]
		list[j + 1] = x
	}
	return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
}

function medianOf(key,    i, list) {
	if (!count[key]) return ""
	for (i = 1; i <= count[key]; i++) list[i] = value[key, i]
	return median(list, count[key])
}

# relation is the median, over the rounds, of ours compared with the floor.
function relation(ours, floor, kind,    i, n, list) {
	n = count[ours] < count[floor] ? count[ours] : count[floor]
	for (i = 1; i <= n; i++) {
		if (kind == "+") list[i] = value[ours, i] - value[floor, i]
		else if (kind == "%") list[i] = 100 * value[floor, i] / value[ours, i]
		else list[i] = value[ours, i] / value[floor, i]
	}
	return median(list, n)
}

function show(x) { return x == "" ? "-" : x >= 1000 ? sprintf("%.0f", x) : sprintf("%.3g", x) }

NR == FNR {
	if ($0 !~ /^#/ && NF >= 4) goal[++goals] = $0
	next
}

/^Benchmark/ {
	name = $1
	sub(/^Benchmark/, "", name)
	sub(/-[0-9]+$/, "", name)
	for (i = 3; i < NF; i += 2) value[name " " $(i + 1), ++count[name " " $(i + 1)]] = $i
}

END {
	row = "%-37s %-15s %-16s %9s %9s %9s %7s  %-16s %s\n"
	printf row, "benchmark", "unit", "floor", "of floor", "ours", "relation", "allocs", "goal", ""
	for (g = 1; g <= goals; g++) {
		split(goal[g], f, " ")
		bench = f[1]; unit = f[2]; kind = f[3]; limit = f[4] + 0; base = f[5]
		# A row may name one contender of a benchmark that has no floor of its own.
		root = bench; sub(/\/.*/, "", root)
		if (bench == root) ours = bench "/idempotency"; else ours = bench
		allocs = medianOf(ours " allocs/op")
		ours = ours " " unit
		if (!count[ours]) continue
		got = medianOf(ours)
		floor = ""; best = ""; which = "-"
		n = split(base, names, ",")
		for (i = 1; i <= n; i++) {
			key = root "/" names[i] " " unit
			m = medianOf(key)
			if (m != "" && (best == "" || m < best)) { best = m; floor = key; which = names[i] }
		}
		if (n > 0 && floor == "") continue
		if (kind == "=" || kind == "==") {
			compared = got; shown = "-"
			text = (kind == "=" ? "at most " : "exactly ") limit
		} else {
			compared = relation(ours, floor, kind)
			shown = sprintf(kind == "+" ? "%+.1f" : kind == "%" ? "%.0f %%" : "%.2fx", compared)
			text = kind == "+" ? sprintf("at most +%g", limit) : \
				kind == "%" ? sprintf("at least %g %%", limit) : sprintf("at most %gx", limit)
		}
		met = kind == "%" ? compared >= limit : kind == "==" ? compared == limit : compared <= limit
		missed += !met
		printf row, bench, unit, which, show(best), show(got), shown,
			unit ~ /ns\/op$/ && bench !~ /^Server/ ? show(allocs) : "-", text, met ? "met" : "MISSED"
	}
	printf "%d missed\n", missed
}
