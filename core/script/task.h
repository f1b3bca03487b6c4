/* Tasks: one coroutine per call, the only user of lua_resume. A function that waits ends in
 * `return orch_task_wait(L, …)`; when its event comes, orch_task_ready pushes the results and posts
 * the task; only the loop's run queue resumes, never a callback. Time inside Lua counts against the
 * state's budget, waiting does not; the deadline is wall time.
 *
 * User coroutines: boot.lua's coroutine.resume/wrap pass the wait marker up, so a wait inside a
 * user's coroutine suspends the whole task. */
#ifndef ORCH_SCRIPT_TASK_H
#define ORCH_SCRIPT_TASK_H

#include "../base/loop.h"
#include "state.h"

struct orch_task;

/* The task ended. ok: results are at the top of L, nres of them (L is the task's thread; popped
 * after return). Otherwise err says why: the Lua error, class LIMIT, TIMEOUT or CANCELLED. */
typedef void orch_task_done_fn(void *ud, lua_State *L, int nres, const struct orch_err *err);
/* Pushes the results of a wait onto L and returns how many; may raise (the error then surfaces at
 * the waiting line of the script). */
typedef int orch_task_push_fn(lua_State *L, void *ud);

/* Starts a task on the function and nargs arguments at the top of the state's main stack (they are
 * popped). It runs at once until its first wait; when it ended at once, done was already called and
 * NULL is returned. deadline_ms: from now; 0: none. Threads are pooled. */
struct orch_task *orch_task_start(struct orch_loop *l, struct orch_state *s, int nargs, int64_t deadline_ms,
                                  orch_task_done_fn *done, void *ud);
/* Asks it to end: the current wait's cancel runs, the task resumes with an error that pcall in
 * bounded states does not catch twice, done gets class CANCELLED. Safe at any time before done. */
void orch_task_cancel(struct orch_task *t, const char *why);
struct orch_task *orch_task_current(lua_State *L); /* NULL outside a task */
bool orch_task_cancelled(const struct orch_task *t);
int64_t orch_task_left_ms(const struct orch_task *t); /* until the deadline; INT64_MAX without */

/* A wait in progress, refused when stale. */
struct orch_wait {
    struct orch_task *task;
    uint64_t serial;
};

/* Ends a C function that waits: `return orch_task_wait(L, cancel, ud, &w)`. Raises when L is not in a
 * task ("may not wait here"). cancel(ud) is called when the task is cancelled or times out first; after
 * it, orch_task_ready with this wait is ignored. */
int orch_task_wait(lua_State *L, orch_loop_fn *cancel, void *ud, struct orch_wait *w);
/* The event came: push(L, ud) will be called when the task is resumed (next turn of the run queue). */
void orch_task_ready(struct orch_wait w, orch_task_push_fn *push, void *ud);

/* Lua's orch.task.spawn, task:join, task:cancel, orch.sleep. */
int orch_luaopen_task(lua_State *L);

#endif
