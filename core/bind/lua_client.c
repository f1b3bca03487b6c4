/* The MCP client for scripts: the verbs behind orch.mcp.connect, whose manners are
 * lua/mcp/client.lua. The private module "orch.client":
 *   new{ name, command | url, env, cwd, protect, headers, sign, protocol, info_name, capabilities,
 *        questions, roots, timeout }
 *                         a link, which begins at once; sign(method, url) gives the headers that
 *                         authorize a request, and must not wait
 *   link:ready()          waits for the handshake: { modern, version, server_info, capabilities,
 *                         instructions }
 *   link:next()           waits for what comes unasked: "note", method, params · "progress", fn,
 *                         done, total, message (fn nil: nobody waits any more) · "question", id,
 *                         method, params · "withdrawn", id · "challenge", id, status, headers,
 *                         times · "unchallenged", id; nil once it is closed
 *   link:reply(id, result) link:refuse(id, code, message)
 *                         answer a question
 *   link:decide(id, again, message, code)
 *                         a challenge: true: again; false: as it is; nil: it fails
 *   link:request(method, params, { timeout, max_timeout, progress })
 *                         waits: the result, or nil, message, code, error
 *   link:notify(method, params, timeout)
 *                         waits until it is sent, over HTTP taken
 *   link:tool_problem(name) link:log_level(level)
 *                         as in mcp/client.h
 *   link:close()          waits until the server has been told */
#include "client_link.h"

#include <errno.h>
#include <string.h>

enum { ARGV_MAX = 4096 };

#define VERDICTS "orch.mcp.verdicts" /* of the state, for all its clients */

/* ---- the handshake */

static void set_text(lua_State *L, const char *key, struct orch_slice json)
{
    orch_client_push_json(L, json);
    lua_setfield(L, -2, key);
}

static int ready_push(lua_State *L, void *ud)
{
    struct orch_client_link *k = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, k->opening_ref); /* it stays while this goes on */
    orch_client_release(k, &k->opening_ref);
    if (k->why.cls)
        return orch_push_err(L, &k->why);
    struct orch_mcp_about a = orch_mcp_client_about(k->c);
    lua_newtable(L);
    lua_pushboolean(L, a.modern);
    lua_setfield(L, -2, "modern");
    lua_pushstring(L, a.version);
    lua_setfield(L, -2, "version");
    set_text(L, "server_info", a.server_info);
    set_text(L, "capabilities", a.capabilities);
    set_text(L, "instructions", a.instructions);
    return 1;
}

static void ready_cancel(void *ud)
{
    struct orch_client_link *k = ud;
    orch_client_release(k, &k->opening_ref);
}

static void ready(void *ud, const struct orch_err *err)
{
    struct orch_client_link *k = ud;
    k->settled = true;
    orch_timer_cancel(k->timer);
    if (err)
        k->why = *err;
    if (k->opening_ref != LUA_NOREF)
        orch_task_ready(k->opening, ready_push, k);
}

static void lost(void *ud, const struct orch_err *err)
{
    struct orch_client_link *k = ud;
    k->why = *err;
}

static void late(void *ud)
{
    struct orch_client_link *k = ud;
    cleanup_free char *why = orch_xasprintf("no %s answer within %g s (timeout)",
                                            orch_mcp_client_opening(k->c),
                                            (double)k->timeout_ms / 1000);
    orch_mcp_client_give_up(k->c, why);
    k->why.cls = ORCH_CLASS_TIMEOUT;
}

static int l_ready(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    if (k->opening_ref != LUA_NOREF)
        return luaL_error(L, "another task waits for the handshake");
    k->opening_ref = orch_client_hold(L);
    if (k->settled)
        return ready_push(L, k);
    return orch_task_wait(L, ready_cancel, k, &k->opening);
}

/* ---- its life */

/* Whoever waits is told why; nothing comes any more. */
static void hang_up(struct orch_client_link *k)
{
    if (!k->why.cls)
        orch_err_setc(&k->why, ORCH_CLASS_CLOSED, ECANCELED, "%s: the client was closed", k->name);
    orch_timer_cancel(k->timer);
    orch_client_requests_end(k);
    orch_client_forget(k);
}

static void link_free_client(struct orch_client_link *k, int64_t eof_ms, int64_t term_ms)
{
    orch_mcp_client_free(orch_steal_ptr(&k->c), eof_ms, term_ms);
    orch_client_wake(k);
}

static int close_push(lua_State *L, void *ud)
{
    struct orch_client_link *k = ud;
    (void)L;
    orch_client_release(k, &k->closing_ref);
    return 0;
}

static void said(void *ud)
{
    struct orch_client_link *k = ud;
    link_free_client(k, ORCH_PROC_EOF_MS, ORCH_PROC_TERM_MS);
    orch_task_ready(k->closing, close_push, k);
}

static void close_cancel(void *ud)
{
    struct orch_client_link *k = ud;
    link_free_client(k, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    orch_client_release(k, &k->closing_ref);
}

static int l_close(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    if (!k->c || k->closing_ref != LUA_NOREF)
        return 0;
    hang_up(k);
    if (!k->over_http) {
        link_free_client(k, ORCH_PROC_EOF_MS, ORCH_PROC_TERM_MS);
        return 0;
    }
    k->closing_ref = orch_client_hold(L);
    orch_mcp_client_goodbye(k->c, said, k);
    return orch_task_wait(L, close_cancel, k, &k->closing);
}

static int link_gc(lua_State *L)
{
    struct orch_client_link *k = lua_touserdata(L, 1);
    if (k->c)
        hang_up(k);
    link_free_client(k, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    orch_client_requests_free(k);
    orch_timer_free(orch_steal_ptr(&k->timer));
    orch_client_release(k, &k->sign_ref);
    free(orch_steal_ptr(&k->name));
    return 0;
}

static int l_tool_problem(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    const char *name = luaL_checkstring(L, 2);
    lua_pushstring(L, k->c ? orch_mcp_client_tool_problem(k->c, name) : NULL);
    return 1;
}

static int l_log_level(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    const char *level = luaL_optstring(L, 2, NULL);
    if (k->c)
        orch_mcp_client_log_level(k->c, level);
    return 0;
}

/* Leaves it on the stack; it does nothing yet. sign_at: where the function is, or 0. */
static struct orch_client_link *link_new(lua_State *L, struct orch_env *env,
                                         const struct orch_mcp_client_opts *c, int sign_at)
{
    struct orch_client_link *k = lua_newuserdata(L, sizeof *k);
    *k = (struct orch_client_link){ .env = env,
                                    .main = orch_state_lua(orch_state_of(L)),
                                    .state = orch_state_of(L),
                                    .sign_ref = LUA_NOREF,
                                    .opening_ref = LUA_NOREF,
                                    .taking_ref = LUA_NOREF,
                                    .closing_ref = LUA_NOREF,
                                    .timeout_ms = c->start_ms,
                                    .over_http = c->url != NULL };
    TAILQ_INIT(&k->events);
    luaL_getmetatable(L, ORCH_CLIENT_META);
    lua_setmetatable(L, -2);
    k->name = orch_xstrdup(c->name);
    if (sign_at) {
        lua_pushvalue(L, sign_at);
        k->sign_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    }
    k->timer = orch_timer_new(env->loop, late, k);
    return k;
}

static int t_new(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_err err = { 0 };
    struct orch_opts o = orch_opts_begin(L, 1, "orch.mcp.connect");
    struct orch_mcp_client_opts c = { .name = orch_opt_string(&o, "name", "?"),
                                      .url = orch_opt_string(&o, "url", NULL),
                                      .cwd = orch_opt_string(&o, "cwd", NULL),
                                      .protocol = orch_opt_string(&o, "protocol", NULL),
                                      .info_name = orch_opt_string(&o, "info_name", NULL),
                                      .roots = orch_opt_bool(&o, "roots", false),
                                      .start_ms = orch_opt_duration_ms(&o, "timeout", 60000),
                                      .ready = ready,
                                      .lost = lost };
    struct orch_mcp_auth auth = { 0 };
    lua_getfield(L, LUA_REGISTRYINDEX, VERDICTS);
    c.verdicts = lua_touserdata(L, -1);
    cleanup_buf struct orch_buf capabilities = { 0 };
    orch_client_hear(&c, &auth, orch_opt_bool(&o, "questions", false));
    if (orch_opt_bool(&o, "protect", false)) {
        c.via = env->protect;
        c.via_ud = env->ud;
    }
    c.env = orch_opt_push(&o, "env", LUA_TTABLE) ? orch_check_strings(L, -1, "env", ARGV_MAX)
                                                 : (const char *const *)environ;
    if (orch_opt_push(&o, "capabilities", LUA_TTABLE))
        orch_client_check_json(L, -1, "capabilities", &capabilities);
    c.capabilities = capabilities.p;
    c.headers = orch_take_headers(L, &o, &c.n_headers);
    if (orch_opt_push(&o, "command", LUA_TTABLE))
        c.argv = orch_check_strings(L, -1, "command", ARGV_MAX);
    bool signs = orch_opt_push(&o, "sign", LUA_TFUNCTION);
    int sign_at = lua_gettop(L);
    orch_opts_done(&o);
    if (!c.url && (!c.argv || !c.argv[0]))
        return luaL_error(L, "orch.mcp.connect: command is missing or empty (a list: program and "
                             "arguments), and so is url");
    struct orch_client_link *k = link_new(L, env, &c, signs ? sign_at : 0);
    auth.ud = c.ud = k;
    c.auth = signs ? &auth : NULL;
    if (c.url && !(c.http = env->http(env->ud, &err)))
        return orch_push_err(L, &err);
    k->c = orch_mcp_client_new(env->loop, &c, &err);
    if (!k->c)
        return orch_push_err(L, &err);
    orch_timer_set(k->timer, k->timeout_ms);
    return 1;
}

int orch_luaopen_client(lua_State *L)
{
    static const luaL_Reg methods[] = { { "ready", l_ready },
                                        { "next", orch_client_next },
                                        { "reply", orch_client_reply },
                                        { "refuse", orch_client_refuse },
                                        { "decide", orch_client_decide },
                                        { "request", orch_client_request },
                                        { "notify", orch_client_notify },
                                        { "close", l_close },
                                        { "tool_problem", l_tool_problem },
                                        { "log_level", l_log_level },
                                        { NULL, NULL } };
    orch_class_new(L, ORCH_CLIENT_META, methods, link_gc);
    memset(lua_newuserdata(L, sizeof(struct orch_mcp_verdicts)), 0,
           sizeof(struct orch_mcp_verdicts));
    lua_setfield(L, LUA_REGISTRYINDEX, VERDICTS);
    lua_newtable(L);
    lua_pushcfunction(L, t_new);
    lua_setfield(L, -2, "new");
    return 1;
}
