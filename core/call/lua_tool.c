/* Tools written in Lua: run(args, ctx) in a task of its own. ctx names its call by slot and serial,
 * so that one that was kept beyond the call finds nothing. */
#include "call_int.h"

#include <errno.h>
#include <lauxlib.h>

struct ctx {
    uint32_t slot, serial;
};

void orch_push_ctx(lua_State *L, uint32_t slot, uint32_t serial)
{
    struct ctx *x = lua_newuserdata(L, sizeof *x);
    *x = (struct ctx){ slot, serial };
    luaL_getmetatable(L, ORCH_CTX_META);
    lua_setmetatable(L, -2);
}

struct orch_call *orch_check_call(lua_State *L, struct orch_calls *cs)
{
    const struct ctx *x = luaL_checkudata(L, 1, ORCH_CTX_META);
    struct orch_call *c = orch_call_live(cs, x->slot, x->serial);
    if (!c)
        luaL_error(L, "ctx: the call is over");
    return c;
}

static void done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct orch_call *c = ud;
    c->run = NULL;
    if (err)
        orch_call_fail(c, err);
    else
        orch_call_take_lua(c, L, nres);
    orch_call_end(c);
}

void orch_lua_start(struct orch_call *c, struct orch_state *s, int nargs, orch_task_done_fn *take)
{
    c->backend = &orch_lua_backend;
    /* It may end at once: then it is in the list of ended ones, which only our caller's caller
     * empties. */
    struct orch_task *task = orch_task_start(c->calls->loop, s, nargs, take, c);
    if (c->finished)
        return;
    c->run = task;
    orch_call_arm(c);
}

/* The task of the tasks extension that the tool wants to be. */
static int begin_job(struct orch_call *c, struct orch_err *err)
{
    const struct orch_tool *t = c->tool;
    bool can = (c->caps & ORCH_MCP_CAP_TASKS) && c->rq;
    if (!t->task || (!can && t->task != ORCH_TOOL_TASK_ONLY))
        return 0;
    if (can)
        return orch_job_begin(c, err);
    c->missing = ORCH_MCP_CAP_TASKS;
    return orch_err_set(err, ENOTSUP, "this tool needs a client that offers the tasks extension");
}

static void start(struct orch_call *c)
{
    struct orch_err err = { 0 };
    if (begin_job(c, &err) < 0) {
        orch_call_fail(c, &err);
        if (c->missing && c->modern)
            orch_call_missing(c);
        orch_call_end(c);
        return;
    }
    lua_State *L = orch_state_lua(c->tool->state);
    lua_rawgeti(L, LUA_REGISTRYINDEX, c->tool->run_ref);
    lua_rawgeti(L, LUA_REGISTRYINDEX, c->args_ref);
    orch_push_ctx(L, c->slot, c->serial);
    orch_lua_start(c, c->tool->state, 2, done);
}

/* Its end comes when its last wait has been told. */
static bool stop(struct orch_call *c, enum orch_class cls, const char *why)
{
    if (c->run)
        orch_task_end(c->run, cls, why);
    return true;
}

const struct orch_tool_backend orch_lua_backend = {
    .lua_args = true,
    .unfinished = "not done",
    .start = start,
    .stop = stop,
};
