/* Tasks: one coroutine per call, the only user of lua_resume. A function that waits ends in `return
 * orch_task_wait(L, …)`; when its event comes, orch_task_ready posts the task; only the loop's run
 * queue resumes, never a callback. Time inside Lua counts against the state's budget, waiting does
 * not; deadlines are their owners' matter, who end the task (core/call/call.c).
 *
 * User coroutines: boot.lua's coroutine.resume/wrap pass the wait marker up, so a wait inside a
 * user's coroutine suspends the whole task. A plain coroutine.yield outside a coroutine ends the
 * task.
 *
 * The end of a task that was cancelled, or whose time is over (class TIMEOUT), while it waits: -
 * bounded states: none of its code runs again. - trusted states: the wait returns nil, message,
 * "cancelled" (or "timeout"), so that the script can
 *    clean up; every later wait raises that message. done gets the class whatever the script
 *    returns.
 * In bounded states a spawned task belongs to the one that spawned it: it shares its budget, and is
 * cancelled when that one ends. */
#ifndef ORCH_SCRIPT_TASK_H
#define ORCH_SCRIPT_TASK_H

#include "../base/loop.h"
#include "state.h"

struct orch_task;

#define ORCH_TASKS_MAX 16384        /* alive in one state; most may wait for people */
#define ORCH_TASKS_SPAWNED_MAX 1023 /* of them by orch.task.spawn */
#define ORCH_TASK_ARGS_MAX 16

/* The task ended. ok: results are at the top of L, nres of them (L is the task's thread; popped
 * after return). Otherwise err says why: the Lua error with traceback, class LIMIT, TIMEOUT or
 * CANCELLED. Must not raise. */
typedef void orch_task_done_fn(void *ud, lua_State *L, int nres, const struct orch_err *err);
/* Pushes the results of a wait onto L (the main thread, called protected) and returns how many.
 * When it raises, the wait returns nil, message, "failed". */
typedef int orch_task_push_fn(lua_State *L, void *ud);

/* Starts a task on the function and nargs (≤ ORCH_TASK_ARGS_MAX) arguments at the top of the
 * state's main stack (they are popped). It runs at once until its first wait; when it ended at
 * once, done was already called and NULL is returned. Threads are pooled. A state's tasks all use
 * one loop. */
struct orch_task *orch_task_start(struct orch_loop *l, struct orch_state *s, int nargs,
                                  orch_task_done_fn *done, void *ud);
/* Asks it to end (see above), for this reason: class CANCELLED or TIMEOUT; its wait's cancel is
 * called now, done later from the run queue. Safe at any time before done, also from the task
 * itself. */
void orch_task_end(struct orch_task *t, enum orch_class cls, const char *why);
void orch_task_cancel(struct orch_task *t, const char *why); /* class CANCELLED */
struct orch_task *orch_task_current(lua_State *L);           /* NULL outside a task */

/* A wait in progress, refused when stale. Zero-initialised: refused as well. */
struct orch_wait {
    struct orch_task *task;
    uint64_t serial;
};

/* Ends a C function that waits: make and arm the operation, then `return orch_task_wait(L, cancel,
 * ud, &op->wait)`. For every wait either push is called once or cancel(ud) is called once,
 * whichever comes first releases what ud holds; afterwards orch_task_ready with this wait is
 * ignored. Raises, after calling cancel, when the task may not wait here: outside a task, inside a
 * callback of a C function (table.sort, string.gsub), or when the task is cancelled. Once the state
 * is freed (which calls cancel) orch_task_ready must not be called any more. */
int orch_task_wait(lua_State *L, orch_loop_fn *cancel, void *ud, struct orch_wait *w);
/* The event came: push(L, ud) will be called when the task is resumed (next turn of the run
 * queue). */
void orch_task_ready(struct orch_wait w, orch_task_push_fn *push, void *ud);

/* Returns { spawn, sleep }; the binder puts sleep at orch.sleep. They work inside tasks only.
 * spawn(fn, …): a task object, fn starts in the next turn; nil, message, "limit" with too many
 * tasks. task:join(): fn's results, or nil, message, class. task:cancel(): false when it has ended
 * already. Collecting a task object does not end the task. A failure nobody joined is logged. */
int orch_luaopen_task(lua_State *L);

#endif
