/*
 * The store: one cell, the three operations on it, and what the promise says
 * about each change. Tokens are numbers from 1; a response is named by the
 * token of the run that made it.
 *
 * A ghost is no part of the protocol: the operations never read it. Ghosts
 * write down the history that the promise is about.
 */

mtype:cell = { absent, claimed, completed, released };
mtype:answer = { acquired, in_progress, replay, mismatch, abandoned, lost, done, unknown };

mtype:cell state = absent;
byte tok;        /* who claimed, completed or released it */
bit fingerprint;
bit once;
bit running;     /* the lease */

/* Ghosts. The end of a TTL resets what is about the key. */
byte holder;     /* who counts on the lease: its lease.end is to come */
byte record;     /* the stored response */
byte claimer;    /* who took the key last */
bit may_take;    /* and something has happened since that lets another have it */
bit pledge;      /* a handler was told that it committed */
bit served;      /* a handler was called for the present claim */
bit orphaned;    /* a claim was made, or left, that nobody is there to end */
bit bound;       /* the key belongs to a request: */
bit request;     /* this one */
byte marker;     /* who freed the key, for one lease from then on */
bit charged;     /* a handler has had its effect */

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
#if defined(SHOW_LATE_CLAIM) || defined(BUG_RENEWAL_OF_A_STALE_OWNER)
bit started[TOKENS + 2];
bit given_back[TOKENS + 2]; /* a claim that was never served */
#define NOTE_START(t_) started[t_] = 1;
#else
#define NOTE_START(t_)
#endif

/* Nobody else counts on the lease. */
#define ALONE(t_) (holder == 0 || holder == t_)

/* A claim that is no renewal. */
inline claim(t_, f_, o_) {
	assert(ALONE(t_));
	assert(record == 0);                 /* after Complete nobody runs, */
	assert(claimer == 0 || may_take);    /* nor without a reason, */
	assert(!bound || request == f_);     /* nor a different request, */
	assert(marker != t_);                /* nor who has freed the key */
#ifdef SHOW_LATE_CLAIM
	assert(!given_back[t_]);
#endif
	ISSUE(t_)
	claimer = t_; may_take = 0; served = 0; bound = 1; request = f_; marker = 0;
	state = claimed; tok = t_; fingerprint = f_; once = o_; running = 1;
	res = acquired
}

/* Store.Acquire, row by row. */
inline store_acquire(t_, f_, o_) {
	if
	:: state == absent -> claim(t_, f_, o_)
#ifndef BUG_LATE_CLAIM_RESURRECTS
	:: state == released && tok == t_ -> res = lost
	:: state == released && tok != t_ -> claim(t_, f_, o_)
#else
	:: state == released -> claim(t_, f_, o_)
#endif
#ifndef BUG_TAKES_OVER_ANOTHER_REQUEST
	:: state == claimed && fingerprint != f_ -> res = mismatch
#endif
#ifndef BUG_REPLAYS_TO_ANOTHER_REQUEST
	:: state == completed && fingerprint != f_ -> res = mismatch
#endif
	:: else ->
		if
		:: state == completed ->
			assert(tok == record && fingerprint == f_); /* the answer to this very request */
			res = replay
#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
		:: state == claimed && (tok == t_ || started[t_]) ->
#else
		:: state == claimed && tok == t_ ->
#endif
			running = 1; tok = t_;
#ifdef BUG_RENEWAL_UNSETS_ONCE
			once = o_;
#else
			once = once || o_;
#endif
			res = acquired
		:: else ->
			if
#ifndef BUG_TAKES_A_RUNNING_LEASE
			:: running -> res = in_progress
#endif
#ifndef BUG_TAKES_A_ONCE_CLAIM
			:: !running && once -> res = abandoned
#endif
#ifdef BUG_NO_TAKE_OVER
			:: !running && !once -> res = in_progress
#endif
			:: else -> claim(t_, f_, o_)
			fi
		fi
	fi
}

inline write(t_, f_) {
	assert(ALONE(t_));
	assert(record == 0 || record == t_); /* one response, and never another */
	assert(!bound || request == f_);
	record = t_; bound = 1; request = f_; marker = 0;
	state = completed; tok = t_; fingerprint = f_; once = 0; running = 0;
	res = done
}

/* Store.Complete. */
inline store_complete(t_, f_) {
	if
	:: state == completed && tok == t_ -> res = done
	:: state == absent || state == claimed && tok == t_ -> write(t_, f_)
#ifdef BUG_COMPLETE_WITHOUT_TOKEN
	:: state == claimed && tok != t_ -> write(t_, f_)
#endif
#ifdef BUG_COMPLETE_OVERWRITES
	:: state == completed && tok != t_ -> write(t_, f_)
#endif
	:: else -> res = lost
	fi
}

inline free(t_) {
	assert(holder == 0); /* nobody's run is robbed of its lease, not even t_'s, */
	assert(record == 0); /* and no response is thrown away */
	may_take = 1; bound = 0; request = 0; marker = t_;
#ifdef SHOW_LATE_CLAIM
	given_back[t_] = !started[t_];
#endif
	fingerprint = 0; once = 0; running = 0;
#ifdef BUG_NO_MARKER
	state = absent; tok = 0
#else
	state = released; tok = t_
#endif
}

/* Store.Release. */
inline store_release(t_) {
	if
	:: state == absent || state == claimed && tok == t_ -> free(t_)
#ifdef BUG_RELEASE_WITHOUT_TOKEN
	:: state == claimed && tok != t_ -> free(t_)
#endif
#ifdef BUG_RELEASE_FREES_A_RECORD
	:: state == completed -> free(t_)
#endif
	:: else
	fi;
	res = done
}
