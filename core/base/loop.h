/* The event loop, the only user of libevent. One per process in orch, one per handle when embedded;
 * everything that holds Lua or state runs in it, in one thread. No callback is ever called from
 * inside the function that registered it. */
#ifndef ORCH_BASE_LOOP_H
#define ORCH_BASE_LOOP_H

#include "err.h"

struct orch_loop;
struct orch_watch;
struct orch_timer;

#define ORCH_READ 1
#define ORCH_WRITE 2

typedef void orch_loop_fn(void *ud);
typedef void orch_watch_fn(void *ud, int events);

struct orch_loop *orch_loop_new(struct orch_err *err);
void orch_loop_free(struct orch_loop *l);
/* Runs until orch_loop_stop. */
void orch_loop_run(struct orch_loop *l);
/* Waits at most max_ms (-1: no bound) for one batch of events and handles it. */
void orch_loop_step(struct orch_loop *l, int64_t max_ms);
void orch_loop_stop(struct orch_loop *l);
/* A descriptor, the loop's own, that is readable while orch_loop_step has something to do: ready
 * descriptors, due timers, what is posted; not for signals. Now and then it is readable for
 * nothing. Made at the first call; a negative errno when it cannot be. */
int orch_loop_fd(struct orch_loop *l);
/* Monotonic milliseconds; cached per turn of the loop. orch_now_us is read afresh. */
int64_t orch_loop_now_ms(struct orch_loop *l);
int64_t orch_now_us(void);

/* Calls fn once in the next turn. Safe from any callback; not from other threads. */
void orch_loop_post(struct orch_loop *l, orch_loop_fn *fn, void *ud);
/* Takes back what was posted with exactly these arguments and has not run yet. */
void orch_loop_unpost(struct orch_loop *l, orch_loop_fn *fn, void *ud);

/* Watches fd (which stays the caller's; free the watch before closing it). Persistent. */
struct orch_watch *orch_watch_new(struct orch_loop *l, int fd, int events, orch_watch_fn *fn,
                                  void *ud);
void orch_watch_set(struct orch_watch *w, int events); /* 0 pauses */
/* What it has to say is heard before all else that is at hand. */
void orch_watch_first(struct orch_watch *w);
void orch_watch_free(struct orch_watch *w);

struct orch_timer *orch_timer_new(struct orch_loop *l, orch_loop_fn *fn, void *ud); /* not armed */
void orch_timer_set(struct orch_timer *t, int64_t ms); /* one shot, replaces an earlier time */
void orch_timer_cancel(struct orch_timer *t);
void orch_timer_free(struct orch_timer *t);

/* Takes fd (-1: nothing) and closes it in ms milliseconds, or with the loop: for one whose close
 * would wait now. */
void orch_loop_close(struct orch_loop *l, int fd, int64_t ms);

/* Calls fn when the signal arrives; for the program, not for embedders. Freed with the loop. */
int orch_loop_signal(struct orch_loop *l, int signo, orch_loop_fn *fn, void *ud);

#endif
