/*
 * A Redis with replicas, all of which have to have a claim, a renewal or a mark
 * before it is answered (RedisOptions.MinReplicas). Complete and Release do not
 * wait for them. It is part of the model with -DFAILOVER.
 */

/* The cell as the replica has it that will be the next master. */
mtype:cell r_state = absent;
byte r_tok, r_attempt;
bit r_fingerprint, r_once, r_running, r_lasting;

byte failovers = FAILOVER;

#define REPLICA_IS_UP_TO_DATE (r_state == state && r_tok == tok && r_attempt == attempt && \
	r_fingerprint == fingerprint && r_once == once && r_running == running && r_lasting == lasting)

inline replicate() {
	r_state = state; r_tok = tok; r_attempt = attempt; r_fingerprint = fingerprint; r_once = once;
	r_running = running; r_lasting = lasting
}

/* An Acquire is answered. */
#ifdef SHOW_FAILOVER_TO_A_STALE_REPLICA
#define WAITS(a_, o_) false
#elif defined(BUG_A_MARK_DOES_NOT_WAIT)
#define WAITS(a_, o_) (!o_)
#else
#define WAITS(a_, o_) true
#endif
#define REPLICATED \
	if \
	:: res == acquired && WAITS(a_, o_) -> replicate() \
	:: else \
	fi;

/* Too few replicas have what an Acquire has written. The store releases a claim,
 * and keeps the marker for one lease. The Release may be late. */
#ifdef BUG_RELEASES_A_RENEWAL
#define RELEASES(a_) true
#else
#define RELEASES(a_) (a_ == 0)
#endif
inline unreplicated(a_, late_) {
	if
	:: res == acquired && RELEASES(a_) && late_ -> late_release[t]++; res = too_few
	:: res == acquired && RELEASES(a_) && !late_ -> store_release(t, 0); res = too_few
	:: res == acquired && !RELEASES(a_) -> res = too_few
	:: else
	fi
}

/* The replica becomes the master, and what it has not got is lost: a Complete or a
 * Release that the master has answered, and what was not answered. The ghosts go
 * back to what the cell tells. What was charged stays so. */
inline promote() {
	if
#ifndef SHOW_FAILOVER_LOSES_AN_ANSWER
	:: record != 0 && !(r_state == completed && r_tok == record) -> gone[record] = 1; record = 0
#endif
	:: else
	fi;
	state = r_state; tok = r_tok; attempt = r_attempt; fingerprint = r_fingerprint; once = r_once;
	running = r_running; lasting = r_lasting;
	may_take = may_take || state == absent || state == released || state == claimed && !running && !pledge;
	bound = state == claimed || state == completed;
	request = bound && fingerprint;
	marker = (state == released -> tok : 0);
	served = 1 /* it may have been, and a Release of it may be lost */
}
