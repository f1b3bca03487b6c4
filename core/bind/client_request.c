#include "client_link.h"

#include <errno.h>

/* A task waits for it. */
struct orch_client_request {
    LIST_ENTRY(orch_client_request) entry;
    struct orch_client_link *link;
    struct orch_mcp_client_call *call; /* NULL once it is over */
    struct orch_wait wait;
    struct orch_timer *timer;
    char *method;
    int64_t timeout_ms, most_ms, hard_at; /* hard_at: progress does not help beyond */
    bool moved, note;
    struct orch_buf result, error;
    struct orch_err err;
    int self_ref, progress_ref; /* of the link, of a function */
};

static void request_free(struct orch_client_request *r)
{
    struct orch_client_link *k = r->link;
    orch_client_disown(k, r);
    LIST_REMOVE(r, entry);
    orch_timer_free(r->timer);
    orch_buf_free(&r->result);
    orch_buf_free(&r->error);
    free(r->method);
    luaL_unref(k->main, LUA_REGISTRYINDEX, r->progress_ref);
    luaL_unref(k->main, LUA_REGISTRYINDEX, r->self_ref); /* k may go with it */
    free(r);
}

static void request_free_at(struct orch_client_request **r)
{
    request_free(*r);
}

static int request_push(lua_State *L, void *ud)
{
    ORCH_CLEANUP(request_free_at) struct orch_client_request *r = ud;
    if (r->err.cls) {
        orch_push_err(L, &r->err);
        orch_client_push_json(L, (struct orch_slice){ r->error.p, r->error.n });
        return 4;
    }
    if (r->note)
        lua_pushboolean(L, 1);
    else
        orch_client_push_json(L, (struct orch_slice){ r->result.p, r->result.n });
    return 1;
}

static void request_cancel(void *ud)
{
    struct orch_client_request *r = ud;
    if (r->call)
        orch_mcp_client_cancel(r->call, "cancelled");
    request_free(r);
}

static void request_over(struct orch_client_request *r, const struct orch_err *err)
{
    r->call = NULL;
    orch_timer_cancel(r->timer);
    if (err)
        r->err = *err;
    orch_task_ready(r->wait, request_push, r);
}

static void request_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_client_request *r = ud;
    orch_buf_slice(&r->result, result);
    orch_buf_slice(&r->error, orch_mcp_client_error(r->link->c));
    request_over(r, err);
}

static void request_late(void *ud)
{
    struct orch_client_request *r = ud;
    struct orch_client_link *k = r->link;
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf tail = { 0 };
    bool hard = r->moved && orch_loop_now_ms(k->env->loop) >= r->hard_at;
    orch_mcp_client_tail(k->c, &tail);
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "%s: no %s answer within %g s%s%s", k->name,
                  r->method, (double)(hard ? r->most_ms : r->timeout_ms) / 1000,
                  hard       ? ", for all its progress (max_timeout)"
                  : r->moved ? " of its last progress (timeout)"
                             : " (timeout)",
                  tail.n ? tail.p : "");
    orch_mcp_client_cancel(r->call, err.msg);
    request_over(r, &err);
}

static void request_progress(void *ud, double done, double total, struct orch_slice message)
{
    struct orch_client_request *r = ud;
    struct orch_client_link *k = r->link;
    int64_t left = r->hard_at - orch_loop_now_ms(k->env->loop);
    r->moved = true;
    orch_timer_set(r->timer, left < r->timeout_ms ? (left > 0 ? left : 0) : r->timeout_ms);
    orch_client_progress(k, r, r->progress_ref, done, total, message);
}

/* Sends it and waits. The link is at 1, a function for progress on top, or nil. */
static int request_start(lua_State *L, struct orch_client_link *k, const char *method,
                         struct orch_slice params, int64_t timeout_ms, int64_t most_ms, bool note)
{
    struct orch_err err = { 0 };
    if (k->why.cls)
        return orch_push_err(L, &k->why);
    struct orch_client_request *r = orch_xcalloc(1, sizeof *r);
    *r = (struct orch_client_request){ .link = k,
                                       .method = orch_xstrdup(method),
                                       .timeout_ms = timeout_ms,
                                       .most_ms = most_ms > timeout_ms ? most_ms : timeout_ms,
                                       .note = note,
                                       .self_ref = LUA_NOREF,
                                       .progress_ref = LUA_NOREF };
    LIST_INSERT_HEAD(&k->requests, r, entry);
    bool progress = lua_isfunction(L, -1);
    if (progress)
        r->progress_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    r->self_ref = orch_client_hold(L);
    r->hard_at = orch_loop_now_ms(k->env->loop) + r->most_ms;
    r->timer = orch_timer_new(k->env->loop, request_late, r);
    orch_timer_set(r->timer, timeout_ms);
    r->call = orch_mcp_client_call(k->c,
                                   &(struct orch_mcp_client_request){
                                       .method = method,
                                       .params = params,
                                       .note = note,
                                       .done = request_done,
                                       .progress = progress ? request_progress : NULL,
                                       .ud = r },
                                   &err);
    if (!r->call) {
        request_free(r);
        return orch_push_err(L, &err);
    }
    return orch_task_wait(L, request_cancel, r, &r->wait);
}

int orch_client_request(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    cleanup_buf struct orch_buf params = { 0 };
    const char *method = luaL_checkstring(L, 2);
    if (!lua_isnil(L, 3))
        orch_client_check_json(L, 3, "params", &params);
    struct orch_opts o = orch_opts_begin(L, 4, "request");
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", 0),
            most = orch_opt_duration_ms(&o, "max_timeout", timeout);
    if (!orch_opt_push(&o, "progress", LUA_TFUNCTION))
        lua_pushnil(L);
    orch_opts_done(&o);
    return request_start(L, k, method, (struct orch_slice){ params.p, params.n }, timeout, most,
                         false);
}

int orch_client_notify(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    cleanup_buf struct orch_buf params = { 0 };
    const char *method = luaL_checkstring(L, 2);
    if (!lua_isnil(L, 3))
        orch_client_check_json(L, 3, "params", &params);
    int64_t timeout = orch_check_duration_ms(L, 4, "timeout");
    lua_pushnil(L);
    return request_start(L, k, method, (struct orch_slice){ params.p, params.n }, timeout, timeout,
                         true);
}

/* Over HTTP the client lives on to say goodbye. */
void orch_client_requests_end(struct orch_client_link *k)
{
    struct orch_client_request *r;
    struct orch_mcp_client_call *call;
    LIST_FOREACH (r, &k->requests, entry)
        if ((call = r->call)) {
            request_over(r, &k->why);
            if (k->over_http)
                orch_mcp_client_cancel(call, "closed");
        }
}

void orch_client_requests_free(struct orch_client_link *k)
{
    while (!LIST_EMPTY(&k->requests))
        request_free(LIST_FIRST(&k->requests));
}
