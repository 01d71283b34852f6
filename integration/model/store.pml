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
mtype:answer = { acquired, in_progress, replay, mismatch, abandoned, lost, done, unknown };

mtype:cell state = absent;
byte tok;        /* who claimed, completed or released it */
bit fingerprint;
bit once;
bit running;     /* the lease */

/* Ghosts. The end of a TTL resets what is about the key. */
byte holder;     /* who counts on the lease: its lease.end is to come */
byte record;     /* the stored response */
bit may_take = 1; /* nobody has taken the key, or something has happened since that lets another have it */
bit pledge;      /* a handler was told that it committed */
bit served;      /* a handler was called for the present claim */
bit orphaned;    /* the present claim was made, or left, and nobody is there to end it */
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
#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
bit started[TOKENS + 2];
#define NOTE_START(t_) started[t_] = 1;
#else
#define NOTE_START(t_)
#endif

/* Nobody else counts on the lease. */
#define ALONE(t_) (holder == 0 || holder == t_)

/* A claim that is no renewal. */
inline claim(t_, f_, o_) {
	assert(ALONE(t_));                /* nobody takes a key whose owner counts on its lease */
	assert(record == 0);              /* nobody takes a key whose response is stored */
	assert(may_take);                /* a handler runs again only for a reason */
	assert(!bound || request == f_);  /* a different request does not get the key */
	assert(marker != t_);             /* who freed a key does not have it again while its marker is there */
	ISSUE(t_)
	may_take = 0; served = 0; orphaned = 0; bound = 1; request = f_; marker = 0;
	state = claimed; tok = t_; fingerprint = f_; once = o_; running = 1;
	res = acquired
}

/* The store says that the lease of t_ runs. */
#define LEASED(t_) (state == claimed && tok == t_ && running)

/* Store.Acquire, row by row. */
inline store_acquire(t_, f_, o_) {
	if
	:: state == absent -> /* step: acquire, absent */
		claim(t_, f_, o_)
#ifndef BUG_LATE_CLAIM_RESURRECTS
	:: state == released && tok == t_ -> /* step: acquire, released under this token */
		res = lost
	:: state == released && tok != t_ -> /* step: acquire, released */
		claim(t_, f_, o_)
#else
	:: state == released -> claim(t_, f_, o_)
#endif
#ifndef BUG_TAKES_OVER_ANOTHER_REQUEST
	:: state == claimed && fingerprint != f_ -> /* step: acquire, claimed for a different request */
		res = mismatch
#endif
#ifndef BUG_REPLAYS_TO_ANOTHER_REQUEST
	:: state == completed && fingerprint != f_ -> /* step: acquire, completed for a different request */
		res = mismatch
#endif
	:: else ->
		if
		:: state == completed -> /* step: acquire, completed */
			assert(tok == record && fingerprint == f_); /* a request is answered with its own stored response */
			res = replay
#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
		:: state == claimed && (tok == t_ || started[t_]) ->
#else
		:: state == claimed && tok == t_ -> /* step: acquire, claimed under this token */
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
			:: running -> /* step: acquire, claimed and the lease runs */
				res = in_progress
#endif
#ifndef BUG_TAKES_A_ONCE_CLAIM
			:: !running && once -> /* step: acquire, claimed with Once and the lease is over */
				res = abandoned
#endif
#ifdef BUG_NO_TAKE_OVER
			:: !running && !once -> res = in_progress
#endif
			:: else -> /* step: acquire, claimed and the lease is over */
				claim(t_, f_, o_)
			fi
		fi
	fi
}

inline write(t_, f_) {
	assert(ALONE(t_));                   /* nobody stores a response while another counts on its lease */
	assert(record == 0 || record == t_); /* a stored response is never overwritten */
	assert(!bound || request == f_);     /* a response is stored for the request that has the key */
	record = t_; bound = 1; request = f_; marker = 0; served = 0; orphaned = 0;
	state = completed; tok = t_; fingerprint = f_; once = 0; running = 0;
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

inline free(t_) {
	assert(holder == 0); /* nobody's running claim is freed, not even its own */
	assert(record == 0); /* no stored response is thrown away */
	may_take = 1; bound = 0; request = 0; marker = t_; served = 0; orphaned = 0;
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
	:: state == absent -> /* step: release, absent */
		free(t_)
	:: state == claimed && tok == t_ -> /* step: release, claimed under this token */
		free(t_)
#ifdef BUG_RELEASE_WITHOUT_TOKEN
	:: state == claimed && tok != t_ -> free(t_)
#endif
#ifdef BUG_RELEASE_FREES_A_RECORD
	:: state == completed -> free(t_)
#endif
	:: else /* step: release, completed, released or of another owner */
	fi;
	res = done
}
