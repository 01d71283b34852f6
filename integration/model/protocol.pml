/*
 * What requests with one key do to each other: a model of the contract of Store
 * and of the middleware's flow, for the model checker spin. README.md says what
 * is modelled and which function each part of it stands for; check runs it.
 */

#ifndef OWNERS
#define OWNERS 2 /* clients, or a client that does not wait for its own answer */
#endif
#ifndef TRIES
#define TRIES 2 /* how often each of them sends its request */
#endif
#ifndef FAULTS
#define FAULTS 2 /* a command or a reply that is lost or late, a command that comes twice */
#endif
#ifndef CRASHES
#define CRASHES 1 /* panics as well */
#endif
#ifdef AT_MOST_ONCE /* Options.AtMostOnce */
#define ONCE 1
#else
#define ONCE 0
#endif
#ifdef COMMIT /* handlers call Execution.Commit: before they charge, */
#define COMMITS 1
#else
#define COMMITS 0
#endif
#ifdef COMMIT_AFTER /* or afterwards */
#define COMMITS_LATE 1
#else
#define COMMITS_LATE 0
#endif

/* A command that comes when nobody waits for it any more may make a claim that
 * nobody is there to end. */
#if defined(SHOW_LATE_CLAIM) || defined(SHOW_UNKNOWN_WITHOUT_A_RUN)
#define EXCUSED 0
#else
#define EXCUSED orphaned
#endif

#define TOKENS (OWNERS * TRIES)
#define PROBE (TOKENS + 1) /* the token of one more request, when all is over */

byte faults = FAULTS;
byte crashes = CRASHES;
bit body[OWNERS + 1]; /* what a request is for */
#define BODY(t_) body[(t_ - 1) / TRIES]

#include "store.pml"

/* A renewal (1), or a Commit (2), that is on its way when its run frees the key:
 * of the handler's goroutines, which need not have ended when it returns. */
byte straggler[TOKENS + 1];

/* Commands that nobody waits for any more. */
bit late_claim[TOKENS + 1];
bit late_commit[TOKENS + 1];
bit late_complete[TOKENS + 1];
bit late_release[TOKENS + 1];

/* What goes on in the background. */
bit completing[TOKENS + 1];
bit releasing[TOKENS + 1];

#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
#define RENEWS true
#else
#define RENEWS holder == t
#endif

/* The owner's own clock says that the lease runs. */
#ifdef BUG_LEASE_FROM_THE_REPLY
#define IN_TIME true
#else
#define IN_TIME LEASED(t)
#endif

/* What Complete is called with. */
#ifdef BUG_COMPLETE_OF_ANOTHER_REQUEST
#define RESULT(t_) (1 - BODY(t_))
#else
#define RESULT(t_) BODY(t_)
#endif

#define OR_CRASH :: d_step { crashes > 0; crashes-- }; goto crashed

/* One store call: it is answered; or it takes effect, and the reply is lost; or
 * the command comes when nobody waits for it any more, or never. */
inline acquire(o_) {
	if
	:: d_step { true; store_acquire(t, BODY(t), o_) }
	:: d_step { faults > 0; faults--; store_acquire(t, BODY(t), o_); res = unknown }
	:: d_step {
		faults > 0; faults--;
		if
		:: (o_) > ONCE -> late_commit[t] = 1
		:: else -> late_claim[t] = 1
		fi;
		res = unknown
	}
	OR_CRASH
	fi
}

inline complete() {
	if
	:: d_step { true; store_complete(t, RESULT(t)) }
	:: d_step { faults > 0; faults--; store_complete(t, RESULT(t)); res = unknown }
	:: d_step { faults > 0; faults--; late_complete[t] = 1; res = unknown }
	OR_CRASH
	fi
}

inline release() {
	if
	:: d_step { true; store_release(t) }
	:: d_step { faults > 0; faults--; store_release(t); res = unknown }
	:: d_step { faults > 0; faults--; late_release[t] = 1; res = unknown }
	OR_CRASH
	fi
}

/* The owner has the reply to a claim. It counts the lease from before it sent
 * the command, so it does not count on one that the store has ended. */
inline hold() {
	if
	:: IN_TIME ->
		assert(ALONE(t)); /* never two owners count on a lease */
		holder = t
	:: else
	fi
}

inline drop() {
	if
	:: holder == t -> holder = 0
	:: else
	fi
}

/* Nobody is there any more to end the claim of t, if it has one. */
inline leave() {
	orphaned = orphaned || state == claimed && tok == t && !served
}

/* The handler is called. Between the look at the clock and the first line of
 * the handler time passes in which the lease may end; that is a step of Clock
 * behind this one. What the code can promise is that it did not call a handler
 * whose lease was over when it looked. */
inline start() {
	hold();
	assert(holder == t); /* a handler starts only with the lease */
	NOTE_START(t)
	served = served || tok == t;
#ifdef BUG_GIVES_A_RUNNING_CLAIM_BACK
	releasing[t] = uncertain;
#endif
	res = 0; late = 0
}

/* An answer goes out that the handler made. */
inline send() {
	assert(res == unknown || record == t || OLD(t)); /* stored before sent */
	assert(res != unknown || !seen || committed)     /* no answer that is not stored, after another owner was seen */
}

/* A renewal or a Commit found that another owner has the key, or had it. */
inline lose() {
#ifdef BUG_IGNORES_A_LATE_ANSWER
	taken = taken || holder == t;
#else
	taken = 1;
#endif
	seen = 1;
	drop()
}

/* The tries of one client, and the middleware that serves them. A try begins
 * when the one before has an answer or has failed; a client that does not wait
 * so long is two owners. */
proctype Owner(byte i) {
	byte t = i * TRIES; /* this try, and its token */
	mtype:answer res;
	bit late;      /* the answer to a claim came when its lease was over */
	bit uncertain; /* a claim may come, or have come, that the owner does not know of */
	bit committed, ran, taken;
	bit seen;      /* a ghost: what taken has to be */

again:
	atomic {
		res = 0; late = 0; uncertain = 0; committed = 0; ran = 0; taken = 0; seen = 0;
		if
		:: t == (i + 1) * TRIES -> goto finished
		:: else -> t++ /* step: a try begins, under a new token */
		fi
	}

claiming: /* and claiming again, when it was late, and for as long as it waits */
	acquire(ONCE); /* step: claiming, asks for the key */
	if
	:: res == unknown -> uncertain = 1; acquire(ONCE) /* step: claiming, once more when the answer is lost */
	:: else
	fi;
	if
#ifdef BUG_RUNS_AFTER_ITS_LEASE
	:: atomic { res == acquired -> start(); goto executing }
#else
	:: atomic { res == acquired && IN_TIME -> start(); goto executing } /* step: claiming, has the key */
#endif
	:: atomic { res == acquired && !IN_TIME && !late -> late = 1; res = 0; goto claiming } /* step: claiming, once more when it was late */
	:: atomic { res == acquired && !IN_TIME && late -> releasing[t] = 1; goto again } /* step: claiming, refuses when it was late again */
	:: atomic { res == replay -> goto again } /* step: claiming, replays */
	:: atomic { res == in_progress -> res = 0; late = 0; goto claiming } /* step: claiming, waits */
#ifdef BUG_RUNS_WITHOUT_A_CLAIM
	:: atomic { res == unknown -> res = 0; goto executing }
#endif
#ifdef BUG_KEEPS_AN_UNCERTAIN_CLAIM
	:: atomic { res != acquired && res != replay -> goto again }
#else
	:: atomic { res != acquired && res != replay -> releasing[t] = uncertain; goto again } /* step: claiming, refuses */
#endif
	OR_CRASH
	fi;

executing:
	do
	:: RENEWS -> /* step: renewing, while it has the lease; the command comes later */
		atomic {
			acquire(ONCE || committed);
			if
			:: res == acquired -> hold() /* step: renewing, has it longer */
			:: res == unknown -> uncertain = 1 /* step: renewing, does not know, and tries again */
			:: else -> lose() /* step: renewing, finds another owner, though its lease ended meanwhile */
			fi;
			served = served || state == claimed && tok == t;
			res = 0
		}
	:: atomic { COMMITS && !committed && ran == COMMITS_LATE -> acquire(1) }; /* step: committing, marks the claim */
		if
		:: res == unknown -> uncertain = 1; acquire(1) /* step: committing, once more when the answer is lost */
		:: else
		fi;
		atomic {
			if
			:: res == acquired -> hold(); committed = 1; pledge = pledge || !OLD(t) /* step: committing, has committed */
			:: res == unknown /* step: committing, does not know, and promises nothing */
#ifdef BUG_COMMITS_REGARDLESS
			:: else -> committed = 1
#else
			:: else -> lose() /* step: committing, finds another owner */
#endif
			fi;
			served = served || state == claimed && tok == t;
			res = 0
		}
	:: d_step {
		!ran && (committed || !COMMITS || COMMITS_LATE) -> ran = 1; /* step: executing, has its effect */
		assert(!charged || OLD(t)); /* an effect that is at-most-once happens once */
		charged = charged || (ONCE || COMMITS && !COMMITS_LATE) && !OLD(t)
	}
	:: atomic { ran -> ran = 0; uncertain = 0; goto keeping } /* step: executing, returns a final answer */
	:: atomic { !ran && !committed -> taken = 0; seen = 0; goto freeing } /* step: executing, returns an answer that says that nothing was done */
#ifdef BUG_RELEASES_AFTER_COMMIT
	:: committed -> goto freeing
#else
	:: atomic { !ran && committed -> uncertain = 0; goto keeping } /* step: executing, which makes no difference after Commit */
#endif
	:: atomic { crashes > 0; crashes--; drop(); goto again } /* step: executing, panics */
	OR_CRASH
	od;

freeing:
	atomic {
		drop();
		if
		:: true
		:: faults > 0 -> faults--; straggler[t] = 1 /* step: releasing, while a renewal is on its way */
		:: COMMITS && faults > 0 -> faults--; straggler[t] = 2 /* step: releasing, while a Commit is on its way */
		fi;
		release() /* step: releasing, frees the key */
	};
	if
	:: res == unknown -> release() /* step: releasing, once more when the answer is lost */
	:: else
	fi;
	/* step: releasing, goes on in the background */
	atomic { releasing[t] = releasing[t] || res == unknown || uncertain; goto again }

keeping:
	complete(); /* step: completing, stores the answer */
	if
	:: res == unknown -> complete() /* step: completing, once more when the answer is lost */
	:: else
	fi;
	atomic {
		if
		:: res == done -> send(); drop() /* step: completing, sends what is stored */
		:: res == lost -> /* step: completing, withholds what could not be stored */
#ifdef BUG_ANSWERS_AFTER_A_LOST_LEASE
			send();
#endif
			drop()
		:: res == unknown && (!taken || committed) -> /* step: completing, sends when the store fails, and goes on in the background */
			send(); completing[t] = 1
		:: res == unknown && taken && !committed -> /* step: completing, withholds when the store fails and another owner was seen */
#ifdef BUG_A_STALE_OWNER_ANSWERS
			send();
#endif
			drop()
		fi;
		goto again
	}

crashed:
	atomic { /* step: the process dies */
		drop(); completing[t] = 0; releasing[t] = 0;
		if
		:: straggler[t] == 1 -> late_claim[t] = 1
		:: straggler[t] == 2 -> late_commit[t] = 1
		:: else
		fi;
		straggler[t] = 0;
		leave();
		goto again
	}

finished:
	skip
}

/* A late command comes; or a copy of it does; or it never comes. */
#define LATE(flag, op) \
	:: d_step { flag[t] -> flag[t] = 0; op; res = 0 } /* step: late, a command comes */ \
	:: d_step { flag[t] && faults > 0 -> faults--; op; res = 0 } /* step: late, it comes twice */ \
	:: flag[t] -> flag[t] = 0 /* step: late, it never comes */

/* A repetition in the background is answered; or its reply is lost; or it comes
 * late. */
#define REPEAT(flag, op, late) \
	:: d_step { flag[t] -> flag[t] = 0; op; res = 0 } /* step: background, is answered */ \
	:: d_step { flag[t] && faults > 0 -> faults--; op; res = 0 } /* step: background, goes on when the answer is lost */ \
	:: d_step { flag[t] && faults > 0 -> faults--; late[t] = 1 } /* step: background, goes on when the command is late */

inline late_acquire(o_) {
	store_acquire(t, BODY(t), o_);
	leave()
}

/* A renewal or a Commit arrives after its run has tried to free the key. */
inline straggle() {
	store_acquire(t, BODY(t), ONCE || straggler[t] == 2);
	straggler[t] = 0
}

/* The run frees the key once more. */
#ifdef BUG_FORGETS_A_STRAGGLER
#define FREES_AGAIN
#else
#define FREES_AGAIN releasing[t] = 1;
#endif

/* What goes on under a token beside its request and after it. */
proctype Wire(byte t) {
	mtype:answer res;

end:	do
	LATE(late_claim, late_acquire(ONCE))
	LATE(late_commit, late_acquire(1))
	LATE(late_complete, store_complete(t, RESULT(t)))
	LATE(late_release, store_release(t))
	:: d_step { straggler[t] != 0 ->
		straggle();
		if
		:: res == acquired -> FREES_AGAIN res = 0 /* step: straggling, has made a claim, or renewed it */
		:: else -> res = 0 /* step: straggling, has changed nothing */
		fi
	}
	:: d_step { straggler[t] != 0 && faults > 0 -> faults--; /* step: straggling, the answer is lost */
		straggle(); FREES_AGAIN res = 0
	}
	:: d_step { straggler[t] != 0 && faults > 0 -> faults--; /* step: straggling, the command comes when nobody waits for it any more */
		if
		:: straggler[t] == 2 -> late_commit[t] = 1
		:: else -> late_claim[t] = 1
		fi;
		straggler[t] = 0; FREES_AGAIN
	}
	REPEAT(completing, store_complete(t, RESULT(t)); drop(), late_complete)
	REPEAT(releasing, store_release(t), late_release)
	/* Both end when the store was down for all of the time, or the process dies. */
	:: d_step { completing[t] && holder != t -> completing[t] = 0 } /* step: background, stores no longer than the lease */
	:: d_step { completing[t] && crashes > 0 -> crashes--; completing[t] = 0; drop() } /* step: background, the process dies while it stores */
	:: d_step { releasing[t] -> releasing[t] = 0; leave() } /* step: background, frees no longer than it makes sense */
	od
}

/* Time passes. */
proctype Clock() {
	byte n;

end:	do
	/* A lease is over: by its owner's own clock and then by the store's, which
	 * began to count later, when the command came. */
	:: d_step {
		state == claimed && running -> running = 0; /* step: a lease is over */
		may_take = may_take || !(ONCE || pledge);
		if
		:: holder == tok -> holder = 0
		:: else
		fi
	}
	/* One lease has passed since the key was freed. */
	:: d_step {
		marker != 0 -> marker = 0; /* step: a marker is over */
		if
		:: state == released -> state = absent; tok = 0
		:: else
		fi
	}
#ifdef TTL
	/* The cell expires, and what was promised with it. */
	:: d_step {
#ifdef BUG_EXPIRES_BEFORE_ITS_LEASE
		ttls > 0 && (state == completed || state == claimed) -> ttls--;
#else
		ttls > 0 && (state == completed && holder != tok || state == claimed && !running) -> ttls--;
#endif
		state = absent; tok = 0; fingerprint = 0; once = 0; running = 0; /* step: a TTL is over */
		record = 0; may_take = 1; pledge = 0; bound = 0; request = 0; charged = 0; served = 0; orphaned = 0;
		n = 1;
		do
		:: n > TOKENS -> break
		:: n <= TOKENS && since[n] == 0 -> n++
		:: else -> since[n] = 2; n++
		od;
		n = 0
	}
#endif
#ifdef LOSES_RECORDS
	/* The store forgets, and nobody else does. */
	:: d_step { state != absent -> state = absent; tok = 0; fingerprint = 0; once = 0; running = 0 }
#endif
	od
}

/* When all is over, the key is not stuck: one lease after the last command, a
 * request gets it or an answer. */
proctype Probe() {
	mtype:answer res;

	timeout;
	d_step {
		assert(state != claimed || served || EXCUSED || OLD(tok)); /* no claim is left that nobody was served for */
		store_acquire(PROBE, fingerprint, ONCE);
		assert(res == acquired || res == replay || res == abandoned && (ONCE || COMMITS) && (served || EXCUSED || OLD(tok))) /* no key is stuck */
	}
}

init {
	byte n;

	atomic {
		if
		:: true
		:: body[OWNERS - 1] = 1
		fi;
		for (n : 0 .. OWNERS - 1) { run Owner(n) }
		for (n : 1 .. TOKENS) { run Wire(n) }
		n = 0;
		run Clock();
		run Probe()
	}
}
