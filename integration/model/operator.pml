/*
 * What an operator does to the cell: Inspector.Forget. It is part of the model
 * with -DFORGET.
 */

mtype:view = { nothing, lapsed, abandoned_claim, result };

/* The Cell that the operator has looked at. */
mtype:view shown = nothing;
byte seen_tok;
byte seen_attempt;

bit anyone;  /* the claim has no fingerprint: it is forgotten, and its owner has not finished */
#define KNOWN (!anyone)

/* Ghosts. */
bit changed; /* the cell is another owner's than at the look, or its run was marked or answered since */
bit settled; /* the key is forgotten, and nothing has come since */
bit answer_forgotten;

#define SEES (state == completed -> result : (state == claimed && !running -> (once -> abandoned_claim : lapsed) : nothing))
#define SAME_CELL (SEES == shown && tok == seen_tok && attempt == seen_attempt)

/* The operator has found out what became of the run. Where no effect may come
 * twice, that takes a run that can have no more of them. */
#ifdef SHOW_FORGETS_A_LIVING_RUN
#define SETTLED(t_) true
#else
#define SETTLED(t_) (!(ONCE || COMMITS) || !alive[t_])
#endif

#define USED settled = 0;
#define CLAIMED_ANEW(t_) settled = 0; anyone = 0; changed = t_ != seen_tok;
#define ANSWERED_ANEW(t_) settled = 0; anyone = 0; changed = t_ != seen_tok || shown != result;
#define MARKED_ANEW(o_) changed = changed || o_ && !once && shown != abandoned_claim;

/* What is asserted of everything that is forgotten. */
inline forgetting() {
	assert(!changed); /* nothing is forgotten but the run that the operator looked at */
	may_take = 1; pledge = 0; bound = 0; request = 0; charged = 0; settled = 1
}

#ifdef BUG_FORGETS_A_RUNNING_CLAIM
#define FORGETTABLE (shown != nothing && state == claimed && tok == seen_tok)
#elif defined(BUG_FORGETS_WHAT_IS_THERE)
#define FORGETTABLE (SEES == lapsed || SEES == abandoned_claim)
#else
#define FORGETTABLE (state == claimed && SAME_CELL)
#endif

/* Inspector.Forget. */
inline store_forget() {
	if
	:: FORGETTABLE -> /* step: forget, claimed and the lease is over */
		assert(holder != tok); /* no claim is forgotten while its owner counts on the lease */
		forgetting();
#ifdef BUG_FORGET_DELETES_THE_CELL
		state = absent; tok = 0; attempt = 0; fingerprint = 0; once = 0
#elif defined(BUG_FORGET_ENDS_A_CLAIM)
		state = released; tok = 0; fingerprint = 0; once = 0; lasting = 1
#else
#ifndef BUG_FORGET_KEEPS_ONCE
		once = 0;
#endif
#ifndef BUG_FORGET_KEEPS_THE_FINGERPRINT
		anyone = 1
#endif
#endif
	:: state == completed && SAME_CELL -> /* step: forget, completed */
		forgetting();
		holder = 0; /* its handler has returned */
		gone[tok] = 1; record = 0; answer_forgotten = 1;
		state = released; tok = 0; attempt = 1; fingerprint = 0; lasting = 1
	:: state == claimed && running && !FORGETTABLE /* step: forget, claimed and the lease runs */
	:: else /* step: forget, another cell than the operator has seen */
	fi
}
