#include "task.h"

#include "../base/log.h"

#include <errno.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

const char orch_wait_marker;

enum phase { IDLE, STARTING, RUNNING, WAITING };

struct orch_task {
    struct orch_tasks *room;
    lua_State *T; /* anchored by ref; NULL: to be made */
    int ref;
    enum phase phase;
    int nargs; /* on T while STARTING */

    uint64_t serial; /* of the current wait; never goes back, also when the record is used again */
    bool pending;    /* cancel may be called */
    bool ready;      /* push may be called */
    bool queued;
    orch_loop_fn *cancel;
    void *cancel_ud;
    orch_task_push_fn *push; /* NULL: the wait ends in the reason of the cancellation */
    void *push_ud;

    bool cancelled;
    enum orch_class why_cls;
    char why[256];

    struct orch_meter own, *meter; /* meter: own, or that of the ancestor it shares */
    bool spawned;
    struct orch_timer *sleep;
    struct orch_wait sleeping;

    orch_task_done_fn *done;
    void *ud;
    struct orch_task *parent, *children, *sibling; /* bounded states */
    struct orch_task *prev, *next;                 /* alive; next: free list */
    struct orch_task *next_queued;
};

struct orch_tasks {
    struct orch_state *s;
    struct orch_loop *loop;
    struct orch_task *alive, *spare;
    struct orch_task *first, **last; /* run queue */
    size_t n_alive, n_spawned;
    bool posted;
};

static void run_queue(void *ud);
static void finish(struct orch_task *t, int nres, const struct orch_err *err);

/* ---- Records
 * ----------------------------------------------------------------------------------- */

static void new_thread(lua_State *L, void *ud)
{
    struct orch_task *t = ud;
    lua_State *T = lua_newthread(L);
    t->ref = luaL_ref(L, LUA_REGISTRYINDEX);
    t->T = T;
}

static void drop_thread(struct orch_task *t)
{
    if (t->T)
        luaL_unref(t->room->s->L, LUA_REGISTRYINDEX, t->ref);
    t->T = NULL;
}

static void free_tasks(struct orch_tasks *room)
{
    while (room->alive) {
        struct orch_err err;
        orch_err_setc(&err, ORCH_CLASS_CANCELLED, ECANCELED, "cancelled: its Lua state ends");
        finish(room->alive, 0, &err);
    }
    orch_loop_unpost(room->loop, run_queue, room);
    while (room->spare) {
        struct orch_task *t = room->spare;
        room->spare = t->next;
        orch_timer_free(t->sleep);
        free(t);
    }
    room->s->tasks = NULL;
    free(room);
}

static struct orch_tasks *room_of(struct orch_state *s, struct orch_loop *l)
{
    if (!s->tasks) {
        struct orch_tasks *room = orch_xcalloc(1, sizeof *room);
        room->s = s;
        room->loop = l;
        room->last = &room->first;
        s->tasks = room;
        s->tasks_free = free_tasks;
    }
    return s->tasks;
}

static struct orch_task *take(struct orch_tasks *room, bool spawned, struct orch_err *err)
{
    if (room->n_alive >= ORCH_TASKS_MAX || (spawned && room->n_spawned >= ORCH_TASKS_SPAWNED_MAX)) {
        orch_err_setc(err, ORCH_CLASS_LIMIT, EAGAIN, "limit: %d tasks are running",
                      spawned ? ORCH_TASKS_SPAWNED_MAX : ORCH_TASKS_MAX);
        return NULL;
    }
    struct orch_task *t = room->spare;
    if (t) {
        room->spare = t->next;
    } else {
        t = orch_xcalloc(1, sizeof *t);
        t->room = room;
    }
    if (!t->T && orch_state_protect(room->s, new_thread, t, err) < 0) {
        t->next = room->spare;
        room->spare = t;
        return NULL;
    }
    t->cancelled = t->pending = t->ready = false;
    t->own = (struct orch_meter){ 0 };
    t->meter = &t->own;
    t->parent = t->children = t->sibling = NULL;
    t->prev = NULL;
    t->next = room->alive;
    if (t->next)
        t->next->prev = t;
    room->alive = t;
    room->n_alive++;
    t->spawned = spawned;
    room->n_spawned += spawned;
    return t;
}

static void enqueue(struct orch_task *t)
{
    struct orch_tasks *room = t->room;
    if (t->queued)
        return;
    t->queued = true;
    t->next_queued = NULL;
    *room->last = t;
    room->last = &t->next_queued;
    if (!room->posted) {
        room->posted = true;
        orch_loop_post(room->loop, run_queue, room);
    }
}

static void drop_wait(struct orch_task *t)
{
    t->ready = false;
    t->serial++;
    if (!t->pending)
        return;
    t->pending = false;
    if (t->cancel)
        t->cancel(t->cancel_ud);
}

static void set_why(const struct orch_task *t, struct orch_err *err)
{
    orch_err_setc(err, t->why_cls, t->why_cls == ORCH_CLASS_TIMEOUT ? ETIMEDOUT : ECANCELED, "%s",
                  t->why);
}

/* Takes t out of its parent's list. */
static void orphan(struct orch_task *t)
{
    if (!t->parent)
        return;
    struct orch_task **link = &t->parent->children;
    while (*link != t)
        link = &(*link)->sibling;
    *link = t->sibling;
    t->parent = NULL;
}

/* The only way out. t may be used again as soon as done returns; a queue entry of it that is left
 * over is harmless, since the queue looks at the phase. */
static void finish(struct orch_task *t, int nres, const struct orch_err *err)
{
    struct orch_tasks *room = t->room;
    drop_wait(t);
    t->phase = IDLE;
    orphan(t);
    while (t->children) {
        struct orch_err ended;
        orch_err_setc(&ended, ORCH_CLASS_CANCELLED, ECANCELED,
                      "cancelled: the call that spawned it ended");
        finish(t->children, 0, &ended);
    }
    t->done(t->ud, t->T, nres, err);

    if (err)
        drop_thread(t); /* its frames are still on it */
    else if (t->T)
        lua_settop(t->T, 0);
    if (t->prev)
        t->prev->next = t->next;
    else
        room->alive = t->next;
    if (t->next)
        t->next->prev = t->prev;
    room->n_alive--;
    room->n_spawned -= t->spawned;
    t->next = room->spare;
    room->spare = t;
}

/* ---- Running
 * ----------------------------------------------------------------------------------- */

struct results {
    struct orch_task *t;
    const struct orch_err *err; /* nil, message, class instead */
    int n;
};

static void push_results(lua_State *L, void *ud)
{
    struct results *r = ud;
    struct orch_task *t = r->t;
    struct orch_err why;
    if (!r->err && !t->push) {
        set_why(t, &why);
        r->err = &why;
    }
    if (r->err) {
        lua_pushnil(L);
        lua_pushstring(L, r->err->msg);
        lua_pushstring(L, orch_class_name(r->err->cls));
        r->n = 3;
    } else {
        r->n = t->push(L, t->push_ud);
    }
    luaL_checkstack(t->T, r->n, "too many results");
    lua_xmove(L, t->T, r->n);
}

static int results_of_wait(struct orch_task *t)
{
    struct orch_state *s = t->room->s;
    struct orch_err err;
    struct results r = { .t = t };
    t->pending = t->ready = false;
    t->serial++;
    if (orch_state_protect(s, push_results, &r, &err) == 0)
        return r.n;
    r = (struct results){ .t = t, .err = &err };
    return orch_state_protect(s, push_results, &r, NULL) == 0 ? r.n : 0;
}

/* Resumes until the next wait or the end; true when it goes on waiting. */
static bool run(struct orch_task *t)
{
    struct orch_state *s = t->room->s;
    struct orch_entry e;
    struct orch_err err;
    if (!orch_state_enter(s, &e, t->meter)) {
        orch_err_setc(&err, s->over, s->over_code, "%s", s->over_msg);
        finish(t, 0, &err);
        return false;
    }
    s->task = t;
    s->task_thread = t->T;
    int n = t->phase == STARTING ? t->nargs : results_of_wait(t);
    t->phase = RUNNING;
    int status = lua_resume(t->T, n);
    bool waits = status == LUA_YIELD && t->pending && lua_touserdata(t->T, -1) == &orch_wait_marker;
    bool failed = !waits && status != 0;
    if (waits) {
        lua_pop(t->T, 1);
    } else if (status == LUA_YIELD) {
        orch_err_set(&err, 0,
                     "coroutine.yield outside a coroutine: to wait, call orch.sleep or another "
                     "function that waits");
    } else if (failed) {
        lua_xmove(t->T, s->L, 1);
        orch_state_describe(s, status, t->T, &err);
    }
    failed |= orch_state_leave(s, &e, &err);
    if (s->task && s->task->cancelled) /* the outer task, by this one */
        orch_state_stop(s, s->task->why_cls, ECANCELED, s->task->why);
    if (waits && !failed) {
        t->phase = WAITING;
        if (t->ready)
            enqueue(t);
        return true;
    }
    if (t->cancelled) {
        failed = true;
        set_why(t, &err);
    }
    finish(t, failed ? 0 : lua_gettop(t->T), failed ? &err : NULL);
    return false;
}

static void run_queue(void *ud)
{
    struct orch_tasks *room = ud;
    struct orch_task *t = room->first;
    room->first = NULL;
    room->last = &room->first;
    room->posted = false;
    while (t) {
        struct orch_task *next = t->next_queued;
        t->queued = false;
        if (t->cancelled && (t->phase == STARTING || (t->phase == WAITING && room->s->bounded))) {
            struct orch_err err;
            set_why(t, &err);
            finish(t, 0, &err);
        } else if (t->phase == STARTING || (t->phase == WAITING && t->ready)) {
            run(t);
        }
        t = next;
    }
}

struct orch_task *orch_task_start(struct orch_loop *l, struct orch_state *s, int nargs,
                                  orch_task_done_fn *done, void *ud)
{
    struct orch_err err;
    struct orch_task *t = NULL;
    if (nargs > ORCH_TASK_ARGS_MAX)
        orch_err_set(&err, E2BIG, "a task is started with %d arguments; at most %d", nargs,
                     ORCH_TASK_ARGS_MAX);
    else
        t = take(room_of(s, l), false, &err);
    if (!t) {
        lua_pop(s->L, nargs + 1);
        done(ud, s->L, 0, &err);
        return NULL;
    }
    lua_xmove(s->L, t->T, nargs + 1);
    t->nargs = nargs;
    t->phase = STARTING;
    t->done = done;
    t->ud = ud;
    return run(t) ? t : NULL;
}

void orch_task_end(struct orch_task *t, enum orch_class cls, const char *why)
{
    if (t->cancelled || t->phase == IDLE)
        return;
    t->cancelled = true;
    t->why_cls = cls;
    snprintf(t->why, sizeof t->why, "%s: %s", orch_class_name(cls), why);
    struct orch_state *s = t->room->s;
    if (t->phase == RUNNING) {
        if (s->task == t) /* else when the tasks on top of it have ended, see run */
            orch_state_stop(s, cls, ECANCELED, t->why);
        return;
    }
    if (t->phase == WAITING) {
        drop_wait(t);
        t->ready = true;
        t->push = NULL;
    }
    enqueue(t);
}

void orch_task_cancel(struct orch_task *t, const char *why)
{
    orch_task_end(t, ORCH_CLASS_CANCELLED, why);
}

struct orch_task *orch_task_current(lua_State *L)
{
    return orch_state_of(L)->task;
}

/* ---- Waiting
 * ----------------------------------------------------------------------------------- */

int orch_task_wait(lua_State *L, orch_loop_fn *cancel_fn, void *ud, struct orch_wait *w)
{
    struct orch_task *t = orch_task_current(L);
    const char *refused = NULL;
    if (!t)
        refused = "may not wait here: not inside a task";
    else if (!lua_isyieldable(L))
        refused = "may not wait here: inside a callback of a C function (sort, gsub, …)";
    else if (t->cancelled)
        refused = t->why;
    if (refused) {
        if (cancel_fn)
            cancel_fn(ud);
        return luaL_error(L, "%s", refused);
    }
    /* An earlier wait whose yield did not get through (a coroutine inside a sort callback). */
    drop_wait(t);
    t->pending = true;
    t->cancel = cancel_fn;
    t->cancel_ud = ud;
    *w = (struct orch_wait){ t, t->serial };
    lua_settop(L, 0);
    lua_pushlightuserdata(L, (void *)(uintptr_t)&orch_wait_marker);
    return lua_yield(L, 1);
}

void orch_task_ready(struct orch_wait w, orch_task_push_fn *push, void *ud)
{
    struct orch_task *t = w.task;
    if (!t || !t->pending || t->ready || t->serial != w.serial)
        return;
    t->ready = true;
    t->push = push;
    t->push_ud = ud;
    if (t->phase == WAITING)
        enqueue(t);
}

/* ---- orch.task and orch.sleep
 * --------------------------------------------------------------------- */

#define TASK_CLASS "orch.task"

/* What a task object refers to; also held by the running task and by those that join it. */
struct spawned {
    struct orch_state *s;
    struct orch_task *task; /* NULL: ended */
    int refs;
    lua_State *T; /* the results are on it; taken over from the task */
    int ref, nres;
    enum orch_class cls; /* 0: ended well */
    char *msg;
    bool joined;
    struct joiner *joiners;
};

struct joiner {
    struct joiner *next;
    struct spawned *sp;
    struct orch_wait wait;
};

static void unref(struct spawned *sp)
{
    if (!sp || --sp->refs)
        return;
    if (sp->cls && sp->cls != ORCH_CLASS_CANCELLED && sp->cls != ORCH_CLASS_LIMIT && !sp->joined)
        orch_log(ORCH_WARN, "a task that nobody joined failed: %s", sp->msg);
    if (sp->T)
        luaL_unref(sp->s->L, LUA_REGISTRYINDEX, sp->ref);
    free(sp->msg);
    free(sp);
}

static void unref_at_exit(struct spawned **sp)
{
    unref(*sp);
}

static int push_outcome(lua_State *L, struct spawned *sp)
{
    sp->joined = true;
    if (sp->cls) {
        lua_pushnil(L);
        lua_pushstring(L, sp->msg);
        lua_pushstring(L, orch_class_name(sp->cls));
        return 3;
    }
    luaL_checkstack(L, sp->nres, "too many results");
    for (int i = 1; i <= sp->nres; i++) {
        lua_pushvalue(sp->T, i);
        lua_xmove(sp->T, L, 1);
    }
    return sp->nres;
}

static int push_joined(lua_State *L, void *ud)
{
    struct joiner *j = ud;
    ORCH_CLEANUP(unref_at_exit) struct spawned *sp = j->sp;
    free(j);
    return push_outcome(L, sp);
}

static void cancel_join(void *ud)
{
    struct joiner *j = ud;
    for (struct joiner **link = &j->sp->joiners; *link; link = &(*link)->next)
        if (*link == j) {
            *link = j->next;
            break;
        }
    unref(j->sp);
    free(j);
}

static void spawned_done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct spawned *sp = ud;
    if (err) {
        sp->cls = err->cls;
        sp->msg = orch_xstrdup(err->msg);
    } else if (sp->refs > 1) {
        sp->T = L;
        sp->ref = sp->task->ref;
        sp->nres = nres;
        sp->task->T = NULL;
    }
    sp->task = NULL;
    while (sp->joiners) {
        struct joiner *j = sp->joiners;
        sp->joiners = j->next;
        orch_task_ready(j->wait, push_joined, j);
    }
    unref(sp);
}

static struct orch_task *check_in_task(lua_State *L)
{
    struct orch_task *t = orch_task_current(L);
    if (!t)
        luaL_error(L, "may be called inside a task only");
    return t;
}

static int task_spawn(lua_State *L)
{
    struct orch_task *self = check_in_task(L);
    struct orch_tasks *room = self->room;
    luaL_checktype(L, 1, LUA_TFUNCTION);
    int nargs = lua_gettop(L) - 1;
    luaL_argcheck(L, nargs <= ORCH_TASK_ARGS_MAX, ORCH_TASK_ARGS_MAX + 2, "too many arguments");
    struct spawned **box = lua_newuserdata(L, sizeof(struct spawned *));
    *box = NULL;
    luaL_getmetatable(L, TASK_CLASS);
    lua_setmetatable(L, -2);
    lua_insert(L, 1);

    struct orch_err err;
    struct orch_task *t = take(room, true, &err);
    if (!t) {
        lua_pushnil(L);
        lua_pushstring(L, err.msg);
        lua_pushstring(L, orch_class_name(err.cls));
        return 3;
    }
    struct spawned *sp = orch_xcalloc(1, sizeof *sp);
    *sp = (struct spawned){ .s = room->s, .task = t, .refs = 2 };
    *box = sp;
    t->done = spawned_done;
    t->ud = sp;
    lua_xmove(L, t->T, nargs + 1);
    t->nargs = nargs;
    t->phase = STARTING;
    if (room->s->bounded) {
        t->meter = self->meter;
        t->parent = self;
        t->sibling = self->children;
        self->children = t;
    }
    enqueue(t);
    return 1;
}

static struct spawned *check_task(lua_State *L)
{
    return *(struct spawned **)luaL_checkudata(L, 1, TASK_CLASS);
}

static int task_join(lua_State *L)
{
    struct spawned *sp = check_task(L);
    if (!sp->task)
        return push_outcome(L, sp);
    struct orch_task *self = check_in_task(L);
    if (sp->task == self)
        return luaL_error(L, "a task cannot join itself");
    struct joiner *j = orch_xcalloc(1, sizeof *j);
    *j = (struct joiner){ sp->joiners, sp, { 0 } };
    sp->joiners = j;
    sp->refs++;
    return orch_task_wait(L, cancel_join, j, &j->wait);
}

static int task_cancel(lua_State *L)
{
    struct spawned *sp = check_task(L);
    lua_pushboolean(L, sp->task != NULL);
    if (sp->task)
        orch_task_cancel(sp->task, "by its script");
    return 1;
}

static int task_gc(lua_State *L)
{
    unref(check_task(L));
    return 0;
}

static int task_tostring(lua_State *L)
{
    struct spawned *sp = check_task(L);
    lua_pushfstring(L, "task (%s)",
                    sp->task  ? "running"
                    : sp->cls ? orch_class_name(sp->cls)
                              : "done");
    return 1;
}

static int push_nothing(lua_State *L, void *ud)
{
    (void)L;
    (void)ud;
    return 0;
}

static void sleep_over(void *ud)
{
    struct orch_task *t = ud;
    orch_task_ready(t->sleeping, push_nothing, NULL);
}

static void cancel_sleep(void *ud)
{
    struct orch_task *t = ud;
    orch_timer_cancel(t->sleep);
}

static int task_sleep(lua_State *L)
{
    int64_t ms;
    if (lua_type(L, 1) == LUA_TSTRING) {
        ms = orch_parse_duration_ms(lua_tostring(L, 1));
        if (ms < 0)
            return luaL_error(L,
                              "orch.sleep: not a duration: \"%s\"; seconds, or text like \"250ms\" "
                              "\"30s\" \"5m\"",
                              lua_tostring(L, 1));
    } else {
        lua_Number seconds = luaL_checknumber(L, 1);
        luaL_argcheck(L, seconds >= 0 && seconds <= 1e9, 1, "seconds out of range");
        ms = (int64_t)(seconds * 1000 + 0.999);
    }
    struct orch_task *t = check_in_task(L);
    if (!t->sleep)
        t->sleep = orch_timer_new(t->room->loop, sleep_over, t);
    orch_timer_set(t->sleep, ms);
    return orch_task_wait(L, cancel_sleep, t, &t->sleeping);
}

static const luaL_Reg task_methods[] = { { "join", task_join },
                                         { "cancel", task_cancel },
                                         { NULL, NULL } };
static const luaL_Reg task_functions[] = { { "spawn", task_spawn },
                                           { "sleep", task_sleep },
                                           { NULL, NULL } };

int orch_luaopen_task(lua_State *L)
{
    luaL_newmetatable(L, TASK_CLASS);
    lua_createtable(L, 0, 2);
    luaL_setfuncs(L, task_methods, 0);
    lua_setfield(L, -2, "__index");
    lua_pushcfunction(L, task_gc);
    lua_setfield(L, -2, "__gc");
    lua_pushcfunction(L, task_tostring);
    lua_setfield(L, -2, "__tostring");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
    lua_createtable(L, 0, 2);
    luaL_setfuncs(L, task_functions, 0);
    return 1;
}
