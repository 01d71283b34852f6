/*
 * What requests with one key do to each other: a model of the contract of Store
 * and of the middleware's flow, for the model checker spin. README.md says what
 * is modelled and which function each part of it stands for; check runs it.
 * What only some searches need is in operator.pml and replica.pml.
 */

#ifndef OWNERS
#define OWNERS 2 /* clients, or a client that does not wait for its own answer */
#endif
#ifndef TRIES
#define TRIES 2 /* how often each of them sends its request */
#endif
#ifndef FAULTS
#define FAULTS 1 /* a command or a reply that is lost or late, a command that comes twice */
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
#ifdef FAIL_OPEN /* Options.FailOpen */
#define OPENS (!held)
#ifdef BUG_FAIL_OPEN_IGNORES_THE_OTHERS
#define HELD told = 1;
#else
#define HELD held = 1; told = 1;
#endif
#define NOT_HELD held = 0; told = 0;
#else
#define OPENS 0
#define HELD
#define NOT_HELD
#endif

/* FORGET is how often an operator looks at the key and has it forgotten. FAILOVER
 * is how often a replica becomes the master of a Redis whose MinReplicas is the
 * number of all replicas. With ATTACH handlers have their effect in a transaction
 * that the store commits. */

#define TOKENS (OWNERS * TRIES)
#define PROBE (TOKENS + 1) /* the token of one more request, when all is over */

byte faults = FAULTS;
byte crashes = CRASHES;
bit body[OWNERS + 1]; /* what a request is for */
#define BODY(t_) body[(t_ - 1) / TRIES]

#ifdef FORGET
bit alive[TOKENS + 2]; /* its process has not ended, and may start a handler or runs one */
#define ALIVE alive[t] = 1;
#define ENDED alive[t] = alive[t] && t == i * TRIES; /* which is the last token of another owner */
#else
#define ALIVE
#define ENDED
#endif

#include "store.pml"
#ifdef FAILOVER
#include "replica.pml"
#else
#define REPLICATED
#endif

/* Commands whose senders have stopped waiting: how many, and the attempt that a
 * renewal carries. A mark is a renewal that asks for Once. */
byte late_claim[TOKENS + 1];
byte late_renewal[TOKENS + 1];
byte late_mark[TOKENS + 1];
byte late_marks[TOKENS + 1];
bit late_complete[TOKENS + 1];
byte late_release[TOKENS + 1];

/* What goes on in the background. */
bit completing[TOKENS + 1];
byte releasing[TOKENS + 1];
#define FOR_ONE_LEASE 1
#define UNTIL_ANSWERED 2

/* What Release is called with: the TTL, or else one lease. One lease is enough
 * where nothing was done and no mark was sent. */
bit keep[TOKENS + 1];
#ifdef BUG_SHORT_MARKER_AFTER_A_MARK
#define KEEP ran
#elif defined(BUG_SHORT_MARKER_AFTER_A_FAILURE)
#define KEEP asked
#else
#define KEEP (ran || asked)
#endif
#define END_KEEPING keep[t] = keep[t] && (releasing[t] != 0 || late_release[t] != 0);

/* A ghost: the process died with a mark on its way, or the handler ran
 * unprotected. */
bit excused[TOKENS + 2];

#ifdef BUG_RENEWAL_OF_A_STALE_OWNER
#define RENEWS true
#else
#define RENEWS holder == t
#endif

/* A mark that no handler stands behind, for a reason that README.md gives. */
#ifdef SHOW_DEATH_WITH_A_MARK
#define EXCUSED(t_) 0
#else
#define EXCUSED(t_) excused[t_]
#endif

/* The owner's own clock says that the lease runs which its last answer was about:
 * a late command of its own that renewed the claim since does not count. */
bit in_time[TOKENS + 2];
#ifdef BUG_LEASE_FROM_THE_REPLY
#define IN_TIME true
#else
#define IN_TIME in_time[t]
#endif

/* What Complete is called with. */
#ifdef BUG_COMPLETE_OF_ANOTHER_REQUEST
#define RESULT(t_) (1 - BODY(t_))
#else
#define RESULT(t_) BODY(t_)
#endif

#define OR_CRASH :: d_step { crashes > 0; crashes-- }; goto crashed

/* The command will come after its sender has stopped waiting. */
inline delay(a_, o_) {
	if
	:: a_ == 0 -> late_claim[t]++
	:: a_ != 0 && !o_ -> late_renewal[t] = a_
	:: a_ != 0 && o_ && late_mark[t] == a_ -> late_marks[t]++
	:: a_ != 0 && o_ && late_mark[t] != a_ -> late_mark[t] = a_; late_marks[t] = 1
	fi
}

/* A renewal that is on its way while the key is freed is not repeated when its
 * answer tells that it did not mark. */
#ifdef BUG_REPEATS_A_MARK_OF_A_FREED_KEY
#define REPEATED(o_) if :: o_ -> late_marks[t]++ :: else fi
#else
#define REPEATED(o_) skip
#endif

/* The Record that answers an Acquire. That of a renewal tells whether the claim is
 * marked, and every later renewal repeats the mark. */
inline learn(a_) {
	if
	:: res == acquired -> att = attempt; in_time[t] = 1;
		if
		:: a_ != 0 && once -> res = marked; knows = 1
		:: else
		fi
	:: else
	fi
}

/* One store call. It is answered. Or it is answered, and the driver had sent it
 * twice: a copy comes late. Or it takes effect, and the reply is lost. Or the
 * command comes after its sender has stopped waiting. Or the command is lost. */
inline acquire(a_, o_) {
	if
	:: d_step { true; store_acquire(t, BODY(t), a_, o_); REPLICATED learn(a_) }
	:: d_step { faults > 0; faults--; delay(a_, o_); store_acquire(t, BODY(t), a_, o_); REPLICATED learn(a_) }
#ifdef FAILOVER
	:: d_step { faults > 0; faults--; store_acquire(t, BODY(t), a_, o_); unreplicated(a_, 0) }
	:: d_step { faults > 0; faults--; store_acquire(t, BODY(t), a_, o_); unreplicated(a_, 1) }
#endif
	:: d_step { faults > 0; faults--; store_acquire(t, BODY(t), a_, o_); res = unknown }
	:: d_step { faults > 0; faults--; delay(a_, o_); res = unknown }
	:: d_step { faults > 0; faults--; res = unknown }
	OR_CRASH
	fi
}

inline complete() {
	if
#ifdef ATTACH
	:: d_step { faults > 0; faults--; res = rolled_back }
#endif
	:: d_step { true; store_complete(t, RESULT(t)) }
#ifndef ATTACH
	:: d_step { faults > 0; faults--; late_complete[t] = 1; store_complete(t, RESULT(t)) }
#endif
	:: d_step { faults > 0; faults--; store_complete(t, RESULT(t)); res = unknown }
	:: d_step { faults > 0; faults--; late_complete[t] = 1; res = unknown }
	:: d_step { faults > 0; faults--; res = unknown }
	OR_CRASH
	fi
}

inline release() {
	if
	:: d_step { true; store_release(t, KEEP) }
	:: d_step { faults > 0; faults--; late_release[t]++; keep[t] = KEEP; store_release(t, KEEP) }
	:: d_step { faults > 0; faults--; store_release(t, KEEP); res = unknown }
	:: d_step { faults > 0; faults--; late_release[t]++; keep[t] = KEEP; res = unknown }
	:: d_step { faults > 0; faults--; res = unknown }
	OR_CRASH
	fi
}

/* The owner has the reply to a claim or a renewal. It counts the lease from before
 * it sent the command, so it does not count on one that the store has ended. */
inline hold() {
	if
	:: IN_TIME ->
		assert(ALONE(t)); /* two owners never count on the lease at once */
		holder = t
	:: else
	fi;
	in_time[t] = 0
}

inline drop() {
	if
	:: holder == t -> holder = 0
	:: else
	fi
}

/* The handler is called. Between the look at the clock and the first line of
 * the handler time passes in which the lease may end; that is a step of Clock
 * behind this one. What the code can promise is that it did not call a handler
 * whose lease was over when it looked. */
inline start() {
	hold();
	assert(holder == t); /* a handler starts only with the lease */
	assert(!somewhere || att > 1 || OLD(t)); /* a handler is told when an earlier one has had its effect */
	NOTE_START(t)
	served = served || tok == t;
	pledge = pledge || ONCE && !OLD(t);
#ifdef BUG_GIVES_A_RUNNING_CLAIM_BACK
	releasing[t] = (uncertain -> FOR_ONE_LEASE : 0);
#endif
	res = 0; wasted = 0; back = 0; uncertain = 0; NOT_HELD
}

/* The request ends, and no handler was called. Its key may be claimed when a claim
 * was not answered, or when the caller says so: then it is released. */
inline refuse(claimed_) {
	keep[t] = KEEP;
	if
#ifdef BUG_SHORT_RELEASE_AFTER_A_MARK
	:: asked && (uncertain || claimed_) -> releasing[t] = FOR_ONE_LEASE
#else
#ifdef BUG_KEEPS_AN_UNCERTAIN_MARK
	:: asked && (uncertain || claimed_)
#else
	:: asked && (uncertain || claimed_) -> releasing[t] = UNTIL_ANSWERED
#endif
#endif
	:: !asked && (uncertain || claimed_) -> releasing[t] = FOR_ONE_LEASE
	:: else
	fi;
	END_KEEPING
}

/* An answer goes out that the handler made. */
inline send() {
	assert(res == unknown || record == t || OLD(t) || GONE(t)); /* stored before sent */
#ifdef ATTACH
	assert(record == t); /* an attached answer is sent only with its effect */
#endif
	assert(res != unknown || !seen || committed)     /* an owner that saw another owner sends no answer that is not stored */
}

/* A handler has its effect. */
inline charge() {
	assert(!charged || OLD(t)); /* an at-most-once effect never happens twice */
	charged = charged || (ONCE || COMMITS && !COMMITS_LATE) && !OLD(t);
	somewhere = somewhere || !OLD(t)
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
	byte att;           /* Record.Attempt */
	mtype:answer res;
	bit wasted;    /* an answer came when the lease was over, or told that the claim is not marked */
	bit back;      /* a mark found another owner */
	bit uncertain; /* a claim was not answered, and no handler was called since */
#ifdef FAIL_OPEN
	bit held;      /* another execution may be running, so this one does not run unprotected */
	bit told;      /* a ghost: what held has to be */
#endif
	bit asked;     /* a mark was sent */
	bit knows;     /* the store said that the claim is marked */
	bit committed, ran, taken;
	bit seen;      /* a ghost: what taken has to be */

again:
	atomic {
		ENDED
		in_time[t] = 0; att = 0; res = 0; wasted = 0; back = 0; uncertain = 0; NOT_HELD asked = 0; knows = 0; committed = 0; ran = 0; taken = 0; seen = 0;
		if
		:: t == (i + 1) * TRIES -> goto finished
		:: else -> t++; ALIVE /* step: a try begins, under a new token */
		fi
	}

claiming: /* and claiming again, when it was late, and for as long as it waits */
	acquire(0, 0); /* step: claiming, asks for the key */
	if
	:: res == unknown -> uncertain = 1; acquire(0, 0) /* step: claiming, once more when the answer is lost */
#ifdef BUG_ASKS_AGAIN_AFTER_TOO_FEW_REPLICAS
	:: res == too_few -> uncertain = 1; acquire(0, 0)
#endif
	:: else
	fi;
	if
#ifdef FAILOVER
#ifdef BUG_FAIL_OPEN_AFTER_TOO_FEW_REPLICAS
	:: atomic { res == too_few -> res = 0; goto unprotected }
#endif
	:: atomic { res == too_few -> uncertain = 1; refuse(0); goto again } /* step: claiming, refuses when too few replicas have the claim */
#endif
	:: atomic { res == acquired && ONCE -> in_time[t] = 0; res = 0; goto marking } /* step: claiming, has the key and marks it */
#ifdef BUG_RUNS_AFTER_ITS_LEASE
	:: atomic { res == acquired && !ONCE -> start(); goto executing }
#else
	:: atomic { res == acquired && !ONCE && IN_TIME -> start(); goto executing } /* step: claiming, has the key */
#endif
	:: atomic { res == acquired && !ONCE && !IN_TIME && !wasted -> wasted = 1; HELD res = 0; goto claiming } /* step: claiming, once more when it was late */
	:: atomic { res == acquired && !ONCE && !IN_TIME && wasted -> refuse(1); goto again } /* step: claiming, refuses when it was late again */
	:: atomic { res == replay -> goto again } /* step: claiming, replays */
	:: atomic { res == in_progress -> HELD res = 0; goto claiming } /* step: claiming, waits */
#ifdef BUG_RUNS_WITHOUT_A_CLAIM
	:: atomic { res == unknown -> res = 0; goto executing }
#endif
	:: atomic { res == unknown && OPENS -> res = 0; goto unprotected } /* step: claiming, runs unprotected */
	:: atomic { res != acquired && res != replay && res != too_few && !(res == unknown && OPENS) -> refuse(0); goto again } /* step: claiming, refuses */
	OR_CRASH
	fi;

marking: /* AtMostOnce */
	asked = 1;
	acquire(att, 1); /* step: marking, asks for Once */
#ifdef BUG_STARTS_BEFORE_ITS_MARK
	if
	:: atomic { res == unknown && LEASED(t) -> in_time[t] = 1; start(); goto executing }
	:: else
	fi;
#endif
	if
	:: res == unknown -> acquire(att, 1) /* step: marking, once more when the answer is lost */
	:: else
	fi;
#ifndef BUG_STARTS_UNMARKED
	if
	:: res == acquired -> acquire(att, 1); /* step: marking, once more when it did not mark */
		if
		:: res == unknown -> acquire(att, 1)
		:: else
		fi
	:: else
	fi;
#endif
	if
	:: atomic { res == marked && IN_TIME -> start(); goto executing } /* step: marking, has the key */
#ifdef BUG_STARTS_UNMARKED
	:: atomic { res == acquired && IN_TIME -> start(); goto executing }
#endif
	:: atomic { (res == acquired || res == marked && !IN_TIME) && !wasted -> wasted = 1; HELD in_time[t] = 0; att = 0; res = 0; goto claiming } /* step: marking, claims once more when it was late or did not mark */
	:: atomic { (res == acquired || res == marked && !IN_TIME) && wasted -> refuse(1); goto again } /* step: marking, refuses when it was late again or did not mark */
	:: atomic { (res == lost || res == mismatch) && !back -> back = 1; HELD att = 0; res = 0; goto claiming } /* step: marking, finds another owner and asks as a waiter does */
	:: atomic { (res == lost || res == mismatch) && back -> refuse(0); goto again } /* step: marking, finds another owner when its time is over */
	:: atomic { res == unknown && OPENS -> res = 0; goto unprotected } /* step: marking, runs unprotected */
	:: atomic { res == unknown && !OPENS -> refuse(1); goto again } /* step: marking, refuses */
#ifdef FAILOVER
	:: atomic { res == too_few -> refuse(1); goto again } /* step: marking, refuses when too few replicas have the mark */
#endif
	OR_CRASH
	fi;

executing:
	do
	:: RENEWS -> /* step: renewing, while it has the lease; the command comes later */
		atomic {
			acquire(att, knows);
			if
			:: res == acquired && knows -> acquire(att, 1) /* step: renewing, once more when it did not repeat the mark */
			:: else
			fi;
			if
			:: res == acquired || res == marked -> hold() /* step: renewing, has it longer */
			:: res == unknown || res == too_few /* step: renewing, does not know, and tries again */
			:: else -> /* step: renewing, finds another owner, though its lease ended meanwhile */
				assert(state != absent); /* an owner is not told that it lost a key that no other owner has had */
				lose()
			fi;
			served = served || state == claimed && tok == t;
			res = 0
		}
	:: atomic { COMMITS && !committed && ran == COMMITS_LATE -> asked = 1; acquire(att, 1) }; /* step: committing, marks the claim */
		if
		:: res == unknown -> acquire(att, 1) /* step: committing, once more when the answer is lost */
		:: else
		fi;
		if
		:: res == acquired -> acquire(att, 1); /* step: committing, once more when it did not mark */
			if
			:: res == unknown -> acquire(att, 1)
			:: else
			fi
		:: else
		fi;
		atomic {
			if
			:: res == marked -> hold(); committed = 1; pledge = pledge || !OLD(t) /* step: committing, has committed */
			:: res == unknown || res == too_few || res == acquired /* step: committing, does not know, and promises nothing */
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
#ifndef ATTACH
		charge()
#endif
#ifdef BUG_COMMITS_BEFORE_THE_RECORD
		pay()
#endif
	}
	:: atomic { ran -> ran = 0; asked = 0; knows = 0; att = 0; goto keeping } /* step: executing, returns a final answer */
	:: atomic { ran && !committed && !ONCE -> taken = 0; seen = 0; goto freeing } /* step: executing, returns an answer after which a retry runs */
	:: atomic { !ran && !committed -> taken = 0; seen = 0; goto freeing } /* step: executing, returns an answer that says that nothing was done */
#ifdef BUG_RELEASES_AFTER_COMMIT
	:: committed -> goto freeing
#else
	:: atomic { !ran && committed -> asked = 0; knows = 0; att = 0; goto keeping } /* step: executing, which makes no difference after Commit */
#endif
	:: atomic { crashes > 0; crashes--; drop(); goto again } /* step: executing, panics */
	OR_CRASH
	od;

freeing:
	atomic {
		drop();
		if
		:: true
		:: faults > 0 -> faults--; delay(att, knows); REPEATED(knows) /* step: releasing, while a renewal is on its way */
		:: COMMITS && faults > 0 -> faults--; delay(att, 1); asked = 1; REPEATED(1) /* step: releasing, while a Commit is on its way */
		fi;
		release() /* step: releasing, frees the key */
	};
	if
	:: res == unknown -> release() /* step: releasing, once more when the answer is lost */
	:: else
	fi;
	atomic {
		keep[t] = KEEP;
		if
		:: res == unknown && asked -> releasing[t] = UNTIL_ANSWERED /* step: releasing, goes on in the background until it is answered, after a mark */
		:: res == unknown && !asked -> releasing[t] = FOR_ONE_LEASE /* step: releasing, goes on in the background for one lease, without a mark */
		:: else
		fi;
		END_KEEPING
		goto again
	}

keeping:
	complete(); /* step: completing, stores the answer */
#ifdef ATTACH
#ifdef BUG_STORES_AN_ATTACHED_ANSWER_AGAIN
	if
	:: res == unknown -> d_step { on_tx = 0; store_complete(t, RESULT(t)); on_tx = 1 }
	:: else
	fi;
#endif
	atomic {
		if
		:: res == done -> send(); drop(); goto again /* step: completing, sends what its transaction has stored */
		:: res == unknown -> /* step: completing, withholds when nothing is known of its transaction */
#ifdef BUG_SENDS_AN_ATTACHED_ANSWER_THAT_IS_NOT_KNOWN
			send();
#endif
			drop(); goto again
		:: else -> ran = 1; res = 0; goto freeing /* step: completing, frees the key when its transaction is rolled back */
		fi
	}
#else
	if
	:: res == unknown -> complete() /* step: completing, once more when the answer is lost */
	:: else
	fi;
	atomic {
		if
		:: res == done -> send(); drop() /* step: completing, sends what is stored */
		:: res == lost -> /* step: completing, withholds what could not be stored */
#ifdef FORGET
			assert(state != released || tok != 0 || answer_forgotten); /* a claim that is forgotten stays open to its owner */
#endif
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
#endif

unprotected: /* FailOpen */
	atomic {
#ifdef FAIL_OPEN
		assert(!told); /* no handler runs unprotected beside an execution that its request was told of */
#endif
#ifdef SHOW_FAIL_OPEN_CHARGES
		charge();
#endif
#ifdef FAIL_OPEN
		exposed[t] = 1;
#endif
#ifdef BUG_FAIL_OPEN_RELEASES
		releasing[t] = FOR_ONE_LEASE;
#endif
		excused[t] = 1
	};
	if
	:: atomic { true -> /* step: unprotected, the handler runs and its answer is sent */
#ifdef FAIL_OPEN
		exposed[t] = 0;
#endif
		goto again
	}
	OR_CRASH
	fi;

crashed:
	atomic { /* step: the process dies */
		drop(); completing[t] = 0; releasing[t] = 0;
		excused[t] = excused[t] || asked;
		END_KEEPING
#ifdef FAIL_OPEN
		exposed[t] = 0;
#endif
		goto again
	}

finished:
	skip
}

/* A late command comes; or a copy of it does. */
#define LATE(flag, op) \
	:: d_step { flag[t] > 0 -> flag[t]--; op; res = 0 } /* step: late, a command comes */ \
	:: d_step { flag[t] > 0 && faults > 0 -> faults--; op; res = 0 } /* step: late, it comes twice */

/* What goes on under a token beside its request and after it. */
proctype Wire(byte t) {
	mtype:answer res;

end:	do
	LATE(late_claim, store_acquire(t, BODY(t), 0, 0))
	LATE(late_complete, store_complete(t, RESULT(t)))
	:: d_step { late_release[t] > 0 -> late_release[t]--; store_release(t, keep[t]); res = 0; END_KEEPING } /* step: late, a Release comes */
	:: d_step { late_release[t] > 0 && faults > 0 -> faults--; store_release(t, keep[t]); res = 0 }
	:: d_step { late_renewal[t] != 0 -> /* step: late, a renewal comes */
		store_acquire(t, BODY(t), late_renewal[t], 0); late_renewal[t] = 0; res = 0 }
	:: d_step { late_renewal[t] != 0 && faults > 0 -> faults--;
		store_acquire(t, BODY(t), late_renewal[t], 0); res = 0 }
	:: d_step { late_mark[t] != 0 -> /* step: late, a mark comes */
		store_acquire(t, BODY(t), late_mark[t], 1); res = 0;
		late_marks[t]--;
		if
		:: late_marks[t] == 0 -> late_mark[t] = 0
		:: else
		fi
	}
	:: d_step { late_mark[t] != 0 && faults > 0 -> faults--;
		store_acquire(t, BODY(t), late_mark[t], 1); res = 0 }
	:: d_step { completing[t] && holder == t -> completing[t] = 0; store_complete(t, RESULT(t)); drop(); res = 0 } /* step: background, stores the answer */
	:: d_step { completing[t] && holder != t -> completing[t] = 0; store_complete(t, RESULT(t)); res = 0 } /* step: background, stores the answer after the lease */
	:: d_step { completing[t] && faults > 0 -> faults--; store_complete(t, RESULT(t)); drop(); res = 0 } /* step: background, goes on when the answer is lost */
	:: d_step { completing[t] && faults > 0 -> faults--; late_complete[t] = 1 } /* step: background, goes on when the command is late */
	:: d_step { completing[t] && holder != t -> completing[t] = 0 } /* step: background, stores no more, some time after the lease */
	:: d_step { completing[t] && crashes > 0 -> crashes--; completing[t] = 0; drop() } /* step: background, the process dies while it stores */
	:: d_step { releasing[t] != 0 -> store_release(t, keep[t]); releasing[t] = 0; res = 0; END_KEEPING } /* step: background, frees the key */
	:: d_step { releasing[t] != 0 && faults > 0 -> faults--; store_release(t, keep[t]); res = 0 } /* step: background, frees again when the answer is lost */
	:: d_step { releasing[t] != 0 && faults > 0 -> faults--; late_release[t]++ } /* step: background, frees again when the command is late */
	:: d_step { releasing[t] == FOR_ONE_LEASE -> releasing[t] = 0; END_KEEPING } /* step: background, frees no more, without a mark */
#ifdef SHOW_LONG_OUTAGE
	:: d_step { releasing[t] == UNTIL_ANSWERED -> releasing[t] = 0 }
#endif
	:: d_step { releasing[t] != 0 && crashes > 0 -> crashes--; /* step: background, the process dies while it frees */
		excused[t] = excused[t] || releasing[t] == UNTIL_ANSWERED; releasing[t] = 0; END_KEEPING }
	od
}

#ifdef FORGET
/* An operator forgets what became of a run that has ended. */
proctype Operator() {
	byte looks = FORGET;

end:	do
	:: d_step { looks > 0 && SEES != nothing && SETTLED(tok) -> looks--; /* step: operator, looks at the key */
		shown = SEES; seen_tok = tok; seen_attempt = attempt; changed = 0 }
	:: d_step { shown != nothing -> store_forget(); shown = nothing } /* step: operator, forgets the key */
	:: d_step { shown != nothing && faults > 0 -> faults--; store_forget() } /* step: operator, forgets it again when the answer is lost */
	od
}
#endif

/* Time passes. */
proctype Clock() {
	byte n;
#if defined(LOSES_RECORDS) || defined(SHOW_LOSS_AND_LATE_MARKS) || defined(FORGETS_UNUSED_CLAIMS)
	byte losses = 1;
#endif

end:	do
	/* A lease is over: by its owner's own clock and then by the store's, which
	 * began to count later, when the command came. */
	:: d_step {
		state == claimed && running -> running = 0; /* step: a lease is over */
		may_take = may_take || !pledge;
		in_time[tok] = 0;
		if
		:: holder == tok -> holder = 0
		:: else
		fi;
#ifdef FAILOVER
		r_running = r_running && r_tok != tok
#endif
	}
#ifdef FAILOVER
	/* The replica has not got the last renewal, and its owner no answer to that. */
	:: d_step {
		r_state == claimed && r_running -> r_running = 0; /* step: a lease is over on the replica */
		in_time[r_tok] = 0;
		if
		:: holder == r_tok -> holder = 0
		:: else
		fi
	}
	:: d_step { !REPLICA_IS_UP_TO_DATE -> replicate() } /* step: the replica gets what the master has */
	:: d_step { failovers > 0 -> failovers--; promote() } /* step: the replica becomes the master */
#endif
	/* One lease has passed since the key was freed. */
	:: d_step {
		marker != 0 && !lasting -> marker = 0; /* step: a marker is over */
		if
		:: state == released -> state = absent; tok = 0; attempt = 0
		:: else
		fi
	}
#ifdef TTL
	/* The cell expires, and what was promised with it. */
	:: d_step {
#ifdef BUG_EXPIRES_BEFORE_ITS_LEASE
		ttls > 0 && (state == completed || state == claimed || state == released && lasting) -> ttls--;
#else
		ttls > 0 && (state == completed && holder != tok || state == claimed && !running || state == released && lasting) -> ttls--;
#endif
		state = absent; tok = 0; attempt = 0; fingerprint = 0; once = 0; running = 0; lasting = 0; /* step: a TTL is over */
		record = 0; may_take = 1; pledge = 0; bound = 0; request = 0; charged = 0; served = 0; somewhere = 0; marker = 0;
		n = 1;
		do
		:: n > TOKENS -> break
		:: n <= TOKENS && since[n] == 0 -> n++
		:: else -> since[n] = 2; n++
		od;
		n = 0
	}
#endif
#if defined(LOSES_RECORDS) || defined(SHOW_LOSS_AND_LATE_MARKS)
	/* The store forgets, and the owners do not. */
	:: d_step { losses > 0 && state != absent -> losses--;
		state = absent; tok = 0; attempt = 0; fingerprint = 0; once = 0; running = 0; lasting = 0 }
#endif
#ifdef FORGETS_UNUSED_CLAIMS
	/* The store forgets a claim before its mark. */
	:: d_step { losses > 0 && state == claimed && !once && !served -> losses--;
		state = absent; tok = 0; attempt = 0; fingerprint = 0; running = 0;
		may_take = 1; bound = 0; request = 0 }
#endif
	od
}

/* When all is over, and one lease after the last command, nothing holds the key
 * but a handler that ran: a request gets it or an answer. */
proctype Probe() {
	mtype:answer res;
#ifdef FORGET
	bit forgotten;
#endif

	timeout;
	d_step {
		assert(!(state == claimed && once) || served || EXCUSED(tok) || OLD(tok)); /* no late command holds a key for longer than one lease */
#ifdef FORGET
		forgotten = settled;
		store_acquire(PROBE, (settled -> 1 - fingerprint : fingerprint), 0, 0);
		assert(!forgotten || res == acquired); /* a forgotten key is free for any request */
#else
		store_acquire(PROBE, fingerprint, 0, 0);
#endif
		assert(res == acquired || res == replay || res == abandoned && (ONCE || COMMITS)) /* no key is stuck */
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
#ifdef FORGET
		run Operator();
#endif
		run Probe()
	}
}
