/*
 * The store: one cell, the three operations on it, and what the promise says
 * about each change. Tokens are numbers from 1; a response is named by the
 * token of the run that made it.
 *
 * A ghost is no part of the protocol: the operations never read it. Ghosts
 * write down the history that the promise is about.
 *
 * The comment behind an assertion is the promise that it stands for, under the
 * name that README.md and check know it by. A comment "step: ..." names a branch
 * that README.md maps to the lines that implement it.
 */

mtype:cell = { absent, claimed, completed, released };

/* marked is Acquired with Record.Once, in answer to a renewal that asked for
 * Once. */
mtype:answer = { acquired, marked, in_progress, replay, mismatch, abandoned, lost, done, unknown,
	too_few /* replicas have the claim or the renewal */, rolled_back };

mtype:cell state = absent;
byte tok;        /* of the owner that claimed, completed or released it */
byte attempt;
bit fingerprint;
bit once;
bit running;     /* the lease */
bit lasting;     /* a released marker is kept for the TTL, not for one lease */

/* Ghosts. The end of a TTL resets what is about the key. */
byte holder;     /* the owner that counts on the lease: its own clock says that it runs */
byte record;     /* the stored response */
bit may_take = 1; /* since the last claim, the key was released or an unmarked lease ended */
bit pledge;      /* a handler was started at most once, or was told that it committed */
bit served;      /* a handler was called for the present claim */
bit bound;       /* the key belongs to a request: */
bit request;     /* this one */
byte marker;     /* the token that released the key, while the marker is kept */
bit charged;     /* a handler that runs at most once has had its effect */
bit somewhere;   /* a handler has had its effect */

/* Ghosts that only some configurations need. */
#ifdef TTL
byte ttls = TTL;
byte since[TOKENS + 2];  /* 1: the token has claimed; 2: before a TTL ended */
#define OLD(t_) (since[t_] == 2)
#define ISSUE(t_) since[t_] = (since[t_] == 2 -> 2 : 1);
#else
#define OLD(t_) 0
#define ISSUE(t_)
#endif
#ifdef FAIL_OPEN
bit exposed[TOKENS + 2];    /* the handler runs, and the middleware knows nothing of its claim */
#define OPEN(t_) exposed[t_]
#else
#define OPEN(t_) 0
#endif
#if defined(FORGET) || defined(FAILOVER)
bit gone[TOKENS + 2];    /* its response was stored, and is forgotten or lost */
#define GONE(t_) gone[t_]
#else
#define GONE(t_) 0
#endif
#ifdef ATTACH
bit on_tx = 1;           /* the store call brings the transaction of the handler */
bit paid;                /* a transaction was committed */
#ifdef BUG_COMMITS_BEFORE_THE_RECORD
#define PAID(t_)
#else
#define PAID(t_) \
	assert(on_tx); /* an attached answer is never stored without its effect */ \
	pay();
#endif
#else
#define PAID(t_)
#endif
#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
bit started[TOKENS + 2];
#define NOTE_START(t_) started[t_] = 1;
#else
#define NOTE_START(t_)
#endif

#ifdef FORGET
#include "operator.pml"
#else
#define KNOWN 1
#define CLAIMED_ANEW(t_)
#define ANSWERED_ANEW(t_)
#define MARKED_ANEW(o_)
#define USED
#endif

/* The transaction of a handler is committed. */
#ifdef ATTACH
inline pay() {
	assert(!paid); /* an attached effect never happens twice */
	paid = 1; somewhere = 1
}
#endif

/* No other owner counts on the lease. */
#define ALONE(t_) (holder == 0 || holder == t_)

/* Writes a claim where this token had none. */
inline claim(t_, f_, a_) {
	assert(ALONE(t_));                /* a key is not taken while its owner counts on the lease */
	assert(record == 0);              /* a key is not taken once its response is stored */
	assert(may_take);                 /* a key is claimed again only after its release or the end of an unmarked lease */
	assert(!bound || request == f_);  /* a different request does not get the key */
	assert(marker != t_);             /* a token that released the key does not get it back while its marker is kept */
	ISSUE(t_)
	CLAIMED_ANEW(t_)
	may_take = 0; served = 0; bound = 1; request = f_; marker = 0;
	state = claimed; tok = t_; attempt = a_; fingerprint = f_; running = 1; lasting = 0;
#ifdef BUG_CLAIM_SETS_ONCE
	once = ONCE;
#else
	once = 0;
#endif
	res = acquired
}

/* The store says that the lease of t_ runs. */
#define LEASED(t_) (state == claimed && tok == t_ && running)

#ifdef BUG_RENEWAL_WITHOUT_ATTEMPT
#define SAME_ATTEMPT(a_) true
#else
#define SAME_ATTEMPT(a_) (a_ == attempt)
#endif

/* Store.Acquire, row by row. With attempt 0 it is a claim, else a renewal of that
 * attempt, which may ask for Once. */
inline store_acquire(t_, f_, a_, o_) {
	if
	:: state == absent && a_ == 0 -> /* step: claim, absent */
		claim(t_, f_, 1)
#ifdef BUG_RENEWAL_OF_AN_ABSENT_CELL_IS_LOST
	:: state == absent && a_ != 0 -> res = lost
#else
	:: state == absent && a_ != 0 -> /* step: renewal, absent */
		claim(t_, f_, a_);
#ifdef BUG_RENEWAL_OF_AN_ABSENT_CELL_SETS_ONCE
		once = o_
#endif
#endif
#ifndef BUG_LATE_CLAIM_RESURRECTS
	:: state == released && tok == t_ -> /* step: acquire, released under this token */
		res = lost
	:: state == released && tok != t_ && a_ == 0 -> /* step: claim, released */
		claim(t_, f_, attempt + 1)
#else
	:: state == released && a_ == 0 -> claim(t_, f_, attempt + 1)
#endif
#ifdef BUG_RENEWAL_TAKES_A_RELEASED_CELL
	:: state == released && tok != t_ && a_ != 0 -> claim(t_, f_, a_); once = o_
#else
	:: state == released && tok != t_ && a_ != 0 -> /* step: renewal, released */
		res = lost
#endif
#ifndef BUG_TAKES_OVER_ANOTHER_REQUEST
	:: state == claimed && KNOWN && fingerprint != f_ -> /* step: acquire, claimed for a different request */
		res = mismatch
#endif
#ifndef BUG_REPLAYS_TO_ANOTHER_REQUEST
	:: state == completed && fingerprint != f_ -> /* step: acquire, completed for a different request */
		res = mismatch
#endif
	:: else ->
		if
		:: state == completed && a_ == 0 -> /* step: claim, completed */
			assert(tok == record && fingerprint == f_); /* a request is answered with its own stored response */
			res = replay
		:: state == completed && a_ != 0 -> /* step: renewal, completed */
			res = lost
		:: state == claimed && tok == t_ && a_ == 0 -> /* step: claim, claimed under this token */
			USED
			running = 1;
#ifdef BUG_CLAIM_UNSETS_ONCE
			once = 0;
#endif
			res = acquired
		:: state == claimed && tok == t_ && a_ != 0 && SAME_ATTEMPT(a_) -> /* step: renewal, claimed under this token, same attempt */
			USED
			MARKED_ANEW(o_)
			running = 1;
#ifdef BUG_RENEWAL_UNSETS_ONCE
			once = o_;
#else
			once = once || o_;
#endif
			res = acquired
#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
		:: state == claimed && tok != t_ && a_ != 0 && started[t_] -> tok = t_; running = 1; res = acquired
#endif
		:: else ->
			if
			:: a_ != 0 -> /* step: renewal, claimed by another owner or in another attempt */
				res = lost
#ifndef BUG_TAKES_A_RUNNING_LEASE
			:: a_ == 0 && running -> /* step: claim, claimed and the lease runs */
				res = in_progress
#endif
#ifndef BUG_TAKES_A_ONCE_CLAIM
			:: a_ == 0 && !running && once -> /* step: claim, claimed with Once and the lease is over */
				res = abandoned
#endif
#ifdef BUG_NO_TAKE_OVER
			:: a_ == 0 && !running && !once -> res = in_progress
#endif
			:: else -> /* step: claim, claimed and the lease is over */
				claim(t_, f_, attempt + 1)
			fi
		fi
	fi
}

inline write(t_, f_) {
	assert(ALONE(t_));                   /* no response is stored while another owner counts on its lease */
	assert(record == 0 || record == t_); /* a stored response is never overwritten */
	assert(!bound || request == f_);     /* a response is stored for the request that has the key */
	PAID(t_)
	ANSWERED_ANEW(t_)
	record = t_; bound = 1; request = f_; marker = 0; served = 0;
	state = completed; tok = t_; attempt = 0; fingerprint = f_; once = 0; running = 0; lasting = 0;
	res = done
}

/* Store.Complete. */
inline store_complete(t_, f_) {
	if
	:: state == completed && tok == t_ -> /* step: complete, completed under this token */
		res = done
#ifdef BUG_COMPLETE_WRITES_NOTHING
	:: state == absent || state == claimed && tok == t_ -> res = done
#else
	:: state == absent -> /* step: complete, absent */
		write(t_, f_)
	:: state == claimed && tok == t_ -> /* step: complete, claimed under this token */
		write(t_, f_)
#endif
#ifdef BUG_COMPLETE_WITHOUT_TOKEN
	:: state == claimed && tok != t_ -> write(t_, f_)
#endif
#ifdef BUG_COMPLETE_OVERWRITES
	:: state == completed && tok != t_ -> write(t_, f_)
#endif
	:: else -> /* step: complete, released or of another owner */
		res = lost
	fi
}

#ifdef BUG_SHORT_MARKER_OF_A_LATER_ATTEMPT
#define LATER_ATTEMPT 0
#else
#define LATER_ATTEMPT (attempt > 1)
#endif

inline free(t_, k_) {
	assert(holder == 0); /* a claim is not released while its owner counts on the lease */
	assert(!OPEN(t_));   /* a claim is not released while its handler runs unprotected */
	assert(record == 0); /* a stored response is never released */
	USED
	may_take = 1; pledge = 0; bound = 0; request = 0; marker = t_; served = 0;
	fingerprint = 0; once = 0; running = 0; lasting = k_ || LATER_ATTEMPT;
#ifdef BUG_NO_MARKER
	state = absent; tok = 0; attempt = 0; lasting = 0
#else
	state = released; tok = t_
#endif
}

/* Store.Release. The marker has the attempt of the claim, and 0 where the cell was
 * absent. It is kept for the TTL (1) or for one lease (0); but where the attempt is
 * a later one, for what is left of the TTL, so that attempts go on counting. */
inline store_release(t_, k_) {
	if
	:: state == absent -> /* step: release, absent */
		free(t_, k_)
	:: state == claimed && tok == t_ -> /* step: release, claimed under this token */
		free(t_, k_)
#ifdef BUG_RELEASE_WITHOUT_TOKEN
	:: state == claimed && tok != t_ -> free(t_, k_)
#endif
#ifdef BUG_RELEASE_FREES_A_RECORD
	:: state == completed -> free(t_, k_)
#endif
	:: else /* step: release, completed, released or of another owner */
	fi;
	res = done
}
