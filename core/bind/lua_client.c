/* The MCP client for scripts: the verbs behind orch.mcp.connect, whose manners are
 * lua/mcp/client.lua. The private module "orch.client": new{ name, command | url, env, cwd,
 * protect, headers, sign, protocol, info_name, capabilities, questions, roots, timeout } a link,
 * which begins at once; sign(method, url) gives the headers that authorize a request
 * link:ready()  waits for the handshake: { modern, version, server_info, capabilities,
 * instructions } link:next()   waits for what the server says unasked: "note", method, params ·
 * "progress", fn, done, total, message · "question", id, method, params · "withdrawn", id ·
 * "challenge", id, status, headers, times · "unchallenged", id; nil once it is closed
 * link:reply(id, result) link:refuse(id, code, message)     answer a question link:decide(id,
 * again, message, code)                     a challenge: true: again; false: as it is; nil: it
 * fails link:request(method, params, { timeout, max_timeout, progress })   waits: the result, or
 * nil, message, code, error link:notify(method, params, timeout)                      waits
 * until it is sent, over HTTP taken link:tool_problem(name) link:log_level(level)             as
 * in mcp/client.h link:close()  waits until the server has been told, and has ended No Lua runs
 * inside the client's callbacks, but sign: what they bring waits for next and is bounded. */
#include "bind.h"

#include "../base/log.h"
#include "../mcp/client.h"
#include "../script/jsonlib.h"

#include <errno.h>
#include <string.h>
#include <sys/queue.h>

enum {
    ARGV_MAX = 4096,
    CHALLENGES_MAX = 64,
    EVENTS_MAX_BYTES = 32 << 20, /* that nobody took yet; further ones are left out, or refused */
    ID_MAX_BYTES = 256,
};

#define LINK_META "orch.mcp.link"

struct link;

struct event {
    TAILQ_ENTRY(event) next;
    enum { NOTE, PROGRESS, QUESTION, WITHDRAWN, CHALLENGE, UNCHALLENGED } kind;
    struct request *of; /* progress */
    double done, total;
    struct orch_buf id, text, params; /* params: JSON; of a challenge name NUL value NUL … */
    bool has_params;
    uint64_t serial; /* of a challenge */
    int status;
    unsigned times;
};

/* A task waits for it. */
struct request {
    LIST_ENTRY(request) entry;
    struct link *link;
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

struct challenge {
    LIST_ENTRY(challenge) entry;
    struct orch_mcp_challenge *q;
    uint64_t serial;
};

struct link {
    struct orch_env *env;
    lua_State *main;
    struct orch_state *state;
    struct orch_mcp_client *c; /* NULL once closed */
    char *name;
    TAILQ_HEAD(events, event) events;
    LIST_HEAD(, request) requests;
    LIST_HEAD(, challenge) challenges;
    size_t event_bytes, n_challenges;
    uint64_t next_serial;
    unsigned left_out;
    int sign_ref;
    struct orch_timer *timer; /* of the handshake */
    int64_t timeout_ms;
    struct orch_wait opening, taking, closing;
    int opening_ref, taking_ref, closing_ref; /* while a task waits */
    bool settled, over_http;                  /* settled: ready or failed */
    struct orch_err why;                      /* why it failed, or was closed; class 0: neither */
};

static struct link *check_link(lua_State *L)
{
    return luaL_checkudata(L, 1, LINK_META);
}

static void release(struct link *k, int *ref)
{
    luaL_unref(k->main, LUA_REGISTRYINDEX, *ref);
    *ref = LUA_NOREF;
}

/* The link at 1 lives as long as somebody waits. */
static int hold(lua_State *L)
{
    lua_pushvalue(L, 1);
    return luaL_ref(L, LUA_REGISTRYINDEX);
}

static void push_text(lua_State *L, const struct orch_buf *b)
{
    lua_pushlstring(L, b->n ? b->p : "", b->n);
}

static void push_json(lua_State *L, struct orch_slice text)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (text.n &&
        orch_json_scan(&d, text, &(struct orch_json_limits){ .bytes = 64 << 20, .depth = 1000 },
                       &fault) == 0)
        orch_lua_push_json(L, &d, 0, ORCH_LUA_JSON_KEEP_NULL);
    else
        lua_pushnil(L);
}

/* The JSON of the value at idx; raises. */
static void check_json(lua_State *L, int idx, const char *what, struct orch_buf *out)
{
    char why[256];
    if (orch_lua_encode_json(L, idx, out, why, sizeof why) < 0)
        luaL_error(L, "%s: %s", what, why);
}

/* ---- what the server says unasked */

static void event_free(struct link *k, struct event *e)
{
    TAILQ_REMOVE(&k->events, e, next);
    k->event_bytes -= e->params.n + sizeof *e;
    orch_buf_free(&e->id);
    orch_buf_free(&e->text);
    orch_buf_free(&e->params);
    free(e);
}

static void push_headers(lua_State *L, const struct orch_buf *b)
{
    lua_newtable(L);
    for (const char *p = b->p, *end = p + b->n; p && p < end;) {
        const char *value = p + strlen(p) + 1;
        lua_pushstring(L, value);
        lua_setfield(L, -2, p);
        p = value + strlen(value) + 1;
    }
}

static int push_event(lua_State *L, const struct event *e)
{
    static const char *const names[] = { "note",      "progress",  "question",
                                         "withdrawn", "challenge", "unchallenged" };
    lua_pushstring(L, names[e->kind]);
    switch (e->kind) {
    case PROGRESS:
        lua_rawgeti(L, LUA_REGISTRYINDEX, e->of->progress_ref);
        lua_pushnumber(L, e->done);
        if (e->total < 0)
            lua_pushnil(L);
        else
            lua_pushnumber(L, e->total);
        if (e->text.n)
            push_text(L, &e->text);
        else
            lua_pushnil(L);
        return 5;
    case CHALLENGE:
        lua_pushnumber(L, (double)e->serial);
        lua_pushinteger(L, e->status);
        push_headers(L, &e->params);
        lua_pushinteger(L, (lua_Integer)e->times);
        return 5;
    case UNCHALLENGED:
        lua_pushnumber(L, (double)e->serial);
        return 2;
    case NOTE:
        break;
    case QUESTION:
    case WITHDRAWN:
        push_text(L, &e->id);
        break;
    }
    push_text(L, &e->text);
    push_json(L, (struct orch_slice){ e->params.p, e->params.n });
    return lua_gettop(L);
}

static int next_push(lua_State *L, void *ud)
{
    struct link *k = ud;
    struct event *e = TAILQ_FIRST(&k->events);
    int top = lua_gettop(L);
    release(k, &k->taking_ref);
    if (!e || !k->c)
        return 0;
    push_event(L, e);
    event_free(k, e);
    return lua_gettop(L) - top;
}

static void next_cancel(void *ud)
{
    struct link *k = ud;
    release(k, &k->taking_ref);
    k->taking = (struct orch_wait){ 0 };
}

static void wake_taker(struct link *k)
{
    if (k->taking_ref != LUA_NOREF)
        orch_task_ready(k->taking, next_push, k);
}

/* NULL: there is too much already. */
static struct event *event_new(struct link *k, int kind, size_t bytes)
{
    if (k->event_bytes + bytes > EVENTS_MAX_BYTES) {
        if (!k->left_out++)
            orch_log(ORCH_WARN,
                     "%s: notifications come faster than they are taken; some are left out",
                     k->name);
        return NULL;
    }
    struct event *e = orch_xcalloc(1, sizeof *e);
    e->kind = (__typeof__(e->kind))kind;
    TAILQ_INSERT_TAIL(&k->events, e, next);
    k->event_bytes += sizeof *e;
    wake_taker(k);
    return e;
}

static void set_params(struct link *k, struct event *e, struct orch_slice json)
{
    orch_buf_slice(&e->params, json);
    k->event_bytes += json.n;
}

static int l_next(lua_State *L)
{
    struct link *k = check_link(L);
    if (k->taking_ref != LUA_NOREF)
        return luaL_error(L, "another task waits for what comes");
    if (!k->c)
        return 0;
    k->taking_ref = hold(L);
    int rc;
    if (TAILQ_EMPTY(&k->events)) {
        rc = orch_task_wait(L, next_cancel, k, &k->taking);
    } else {
        lua_settop(L, 0);
        rc = next_push(L, k);
    }
    return rc;
}

static void notified(void *ud, const char *method, const struct orch_json_doc *d, uint32_t params)
{
    struct link *k = ud;
    struct orch_slice json = params ? orch_json_raw(d, params) : (struct orch_slice){ "", 0 };
    struct event *e = event_new(k, NOTE, json.n + strlen(method));
    if (!e)
        return;
    orch_buf_str(&e->text, method);
    set_params(k, e, json);
}

static void asked(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params)
{
    struct link *k = ud;
    struct orch_slice json = params ? orch_json_raw(d, params) : ORCH_SLICE("{}");
    struct event *e = id.n <= ID_MAX_BYTES ? event_new(k, QUESTION, json.n) : NULL;
    if (!e) {
        orch_mcp_client_refuse(k->c, id, ORCH_RPC_INTERNAL_ERROR,
                               "too many questions wait to be seen");
        return;
    }
    orch_buf_slice(&e->id, id);
    orch_buf_str(&e->text, method);
    set_params(k, e, json);
}

static void withdrawn(void *ud, struct orch_slice id)
{
    struct link *k = ud;
    struct event *e = id.n <= ID_MAX_BYTES ? event_new(k, WITHDRAWN, 0) : NULL;
    if (e)
        orch_buf_slice(&e->id, id);
}

static int l_reply(lua_State *L)
{
    struct link *k = check_link(L);
    cleanup_buf struct orch_buf json = { 0 };
    struct orch_slice id;
    id.p = luaL_checklstring(L, 2, &id.n);
    luaL_checktype(L, 3, LUA_TTABLE);
    check_json(L, 3, "the answer", &json);
    if (k->c)
        orch_mcp_client_reply(k->c, id, (struct orch_slice){ json.p, json.n });
    return 0;
}

static int l_refuse(lua_State *L)
{
    struct link *k = check_link(L);
    struct orch_slice id;
    id.p = luaL_checklstring(L, 2, &id.n);
    int code = (int)luaL_checkinteger(L, 3);
    const char *why = luaL_checkstring(L, 4);
    if (k->c)
        orch_mcp_client_refuse(k->c, id, code, why);
    return 0;
}

/* ---- tokens */

struct signing {
    struct link *k;
    struct orch_mcp_headers *h;
    const char *method, *url;
};

static void sign_protected(lua_State *L, void *ud)
{
    const struct signing *s = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, s->k->sign_ref);
    lua_pushstring(L, s->method);
    lua_pushstring(L, s->url);
    lua_call(L, 2, 1);
    if (!lua_istable(L, -1))
        return;
    lua_pushnil(L);
    while (lua_next(L, -2)) {
        if (lua_type(L, -2) == LUA_TSTRING && lua_type(L, -1) == LUA_TSTRING) {
            struct orch_slice value;
            value.p = lua_tolstring(L, -1, &value.n);
            orch_mcp_header_add(s->h, lua_tostring(L, -2), value);
        }
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

static void sign(void *ud, struct orch_mcp_headers *h, const char *method, const char *url)
{
    struct link *k = ud;
    struct orch_err err = { 0 };
    struct signing s = { k, h, method, url };
    if (orch_state_protect(k->state, sign_protected, &s, &err) < 0)
        orch_log(ORCH_WARN, "%s: a request could not be signed: %s", k->name, err.msg);
}

static void challenge_free(struct link *k, struct challenge *q)
{
    LIST_REMOVE(q, entry);
    k->n_challenges--;
    free(q);
}

static void challenged(void *ud, struct orch_mcp_challenge *q, const struct orch_http_response *r,
                       unsigned times)
{
    struct link *k = ud;
    struct event *e = k->n_challenges < CHALLENGES_MAX ? event_new(k, CHALLENGE, 0) : NULL;
    if (!e) {
        orch_mcp_challenge_end(q, ORCH_MCP_AS_IT_IS, NULL);
        return;
    }
    struct challenge *own = orch_xcalloc(1, sizeof *own);
    *own = (struct challenge){ .q = q, .serial = ++k->next_serial };
    LIST_INSERT_HEAD(&k->challenges, own, entry);
    k->n_challenges++;
    e->serial = own->serial;
    e->status = r->status;
    e->times = times;
    for (size_t i = 0; i < r->n_headers; i++) {
        for (size_t c = 0; c < r->headers[i].name.n; c++) {
            char ch = r->headers[i].name.p[c];
            orch_buf_char(&e->params, ch >= 'A' && ch <= 'Z' ? (char)(ch | 0x20) : ch);
        }
        orch_buf_char(&e->params, 0);
        orch_buf_slice(&e->params, r->headers[i].value);
        orch_buf_char(&e->params, 0);
    }
    k->event_bytes += e->params.n;
}

static struct challenge *find_challenge(struct link *k, const struct orch_mcp_challenge *q,
                                        uint64_t serial)
{
    struct challenge *own;
    LIST_FOREACH (own, &k->challenges, entry)
        if (q ? own->q == q : own->serial == serial)
            return own;
    return NULL;
}

static void unchallenged(void *ud, struct orch_mcp_challenge *q)
{
    struct link *k = ud;
    struct challenge *own = find_challenge(k, q, 0);
    if (!own)
        return;
    struct event *e = event_new(k, UNCHALLENGED, 0);
    if (e)
        e->serial = own->serial;
    challenge_free(k, own);
}

static enum orch_class class_of(const char *name)
{
    for (int cls = ORCH_CLASS_FAILED; cls <= ORCH_CLASS_CLOSED; cls++)
        if (strcmp(orch_class_name((enum orch_class)cls), name) == 0)
            return (enum orch_class)cls;
    return ORCH_CLASS_FAILED;
}

static int l_decide(lua_State *L)
{
    struct link *k = check_link(L);
    struct challenge *own = find_challenge(k, NULL, (uint64_t)luaL_checknumber(L, 2));
    struct orch_err err = { 0 };
    orch_err_setc(&err, class_of(luaL_optstring(L, 5, "denied")), EACCES, "%s",
                  luaL_optstring(L, 4, "no token is to be had"));
    if (!own)
        return 0;
    struct orch_mcp_challenge *q = own->q;
    challenge_free(k, own);
    orch_mcp_challenge_end(q,
                           lua_isnil(L, 3)       ? ORCH_MCP_REFUSED
                           : lua_toboolean(L, 3) ? ORCH_MCP_AGAIN
                                                 : ORCH_MCP_AS_IT_IS,
                           &err);
    return 0;
}

/* ---- requests */

static void request_free(struct request *r)
{
    struct link *k = r->link;
    struct event *e, *next;
    for (e = TAILQ_FIRST(&k->events); e; e = next) {
        next = TAILQ_NEXT(e, next);
        if (e->of == r)
            event_free(k, e);
    }
    LIST_REMOVE(r, entry);
    orch_timer_free(r->timer);
    orch_buf_free(&r->result);
    orch_buf_free(&r->error);
    free(r->method);
    luaL_unref(k->main, LUA_REGISTRYINDEX, r->progress_ref);
    luaL_unref(k->main, LUA_REGISTRYINDEX, r->self_ref); /* k may go with it */
    free(r);
}

static void request_free_at(struct request **r)
{
    request_free(*r);
}

static int request_push(lua_State *L, void *ud)
{
    ORCH_CLEANUP(request_free_at) struct request *r = ud;
    if (r->err.cls) {
        orch_push_err(L, &r->err);
        push_json(L, (struct orch_slice){ r->error.p, r->error.n });
        return 4;
    }
    if (r->note)
        lua_pushboolean(L, 1);
    else
        push_json(L, (struct orch_slice){ r->result.p, r->result.n });
    return 1;
}

static void request_cancel(void *ud)
{
    struct request *r = ud;
    if (r->call)
        orch_mcp_client_cancel(r->call, "cancelled");
    request_free(r);
}

static void request_over(struct request *r, const struct orch_err *err)
{
    r->call = NULL;
    orch_timer_cancel(r->timer);
    if (err)
        r->err = *err;
    orch_task_ready(r->wait, request_push, r);
}

static void request_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct request *r = ud;
    orch_buf_slice(&r->result, result);
    orch_buf_slice(&r->error, orch_mcp_client_error(r->link->c));
    request_over(r, err);
}

static void request_late(void *ud)
{
    struct request *r = ud;
    struct link *k = r->link;
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
    struct request *r = ud;
    struct link *k = r->link;
    int64_t left = r->hard_at - orch_loop_now_ms(k->env->loop);
    r->moved = true;
    orch_timer_set(r->timer, left < r->timeout_ms ? (left > 0 ? left : 0) : r->timeout_ms);
    struct event *e = event_new(k, PROGRESS, message.n);
    if (!e)
        return;
    e->of = r;
    e->done = done;
    e->total = total;
    orch_buf_slice(&e->text, message);
}

/* Sends it and waits. The link is at 1, a function for progress on top, or nil. */
static int request_start(lua_State *L, struct link *k, const char *method, struct orch_slice params,
                         int64_t timeout_ms, int64_t most_ms, bool note)
{
    struct orch_err err = { 0 };
    if (!k->c)
        return orch_push_err(L, &k->why);
    struct request *r = orch_xcalloc(1, sizeof *r);
    *r = (struct request){ .link = k,
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
    r->self_ref = hold(L);
    r->hard_at = orch_loop_now_ms(k->env->loop) + r->most_ms;
    r->timer = orch_timer_new(k->env->loop, request_late, r);
    orch_timer_set(r->timer, timeout_ms);
    r->call = orch_mcp_client_call(
        k->c,
        &(struct orch_mcp_client_request){ .method = method,
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

static int l_request(lua_State *L)
{
    struct link *k = check_link(L);
    cleanup_buf struct orch_buf params = { 0 };
    const char *method = luaL_checkstring(L, 2);
    if (!lua_isnil(L, 3))
        check_json(L, 3, "params", &params);
    struct orch_opts o = orch_opts_begin(L, 4, "request");
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", 0),
            most = orch_opt_duration_ms(&o, "max_timeout", timeout);
    if (!orch_opt_push(&o, "progress", LUA_TFUNCTION))
        lua_pushnil(L);
    orch_opts_done(&o);
    return request_start(L, k, method, (struct orch_slice){ params.p, params.n }, timeout, most,
                         false);
}

static int l_notify(lua_State *L)
{
    struct link *k = check_link(L);
    cleanup_buf struct orch_buf params = { 0 };
    const char *method = luaL_checkstring(L, 2);
    if (!lua_isnil(L, 3))
        check_json(L, 3, "params", &params);
    int64_t timeout = orch_check_duration_ms(L, 4, "timeout");
    lua_pushnil(L);
    return request_start(L, k, method, (struct orch_slice){ params.p, params.n }, timeout, timeout,
                         true);
}

/* ---- the handshake */

static void set_text(lua_State *L, const char *key, struct orch_slice json)
{
    push_json(L, json);
    lua_setfield(L, -2, key);
}

static int ready_push(lua_State *L, void *ud)
{
    struct link *k = ud;
    release(k, &k->opening_ref);
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
    struct link *k = ud;
    release(k, &k->opening_ref);
}

static void ready(void *ud, const struct orch_err *err)
{
    struct link *k = ud;
    k->settled = true;
    orch_timer_cancel(k->timer);
    if (err)
        k->why = *err;
    if (k->opening_ref != LUA_NOREF)
        orch_task_ready(k->opening, ready_push, k);
}

static void lost(void *ud, const struct orch_err *err)
{
    struct link *k = ud;
    k->why = *err;
}

static void late(void *ud)
{
    struct link *k = ud;
    cleanup_free char *why = orch_xasprintf("no %s answer within %g s (timeout)",
                                            orch_mcp_client_opening(k->c),
                                            (double)k->timeout_ms / 1000);
    orch_mcp_client_give_up(k->c, why);
    k->why.cls = ORCH_CLASS_TIMEOUT;
}

static int l_ready(lua_State *L)
{
    struct link *k = check_link(L);
    if (k->opening_ref != LUA_NOREF)
        return luaL_error(L, "another task waits for the handshake");
    k->opening_ref = hold(L);
    if (k->settled)
        return ready_push(L, k);
    return orch_task_wait(L, ready_cancel, k, &k->opening);
}

/* ---- its life */

/* Whoever waits is told why; nothing comes any more. Over HTTP the client lives on to say
 * goodbye. */
static void hang_up(struct link *k)
{
    struct request *r;
    struct orch_mcp_client_call *call;
    if (!k->why.cls)
        orch_err_setc(&k->why, ORCH_CLASS_CLOSED, ECANCELED, "%s: the client was closed", k->name);
    orch_timer_cancel(k->timer);
    LIST_FOREACH (r, &k->requests, entry)
        if ((call = r->call)) {
            request_over(r, &k->why);
            if (k->over_http)
                orch_mcp_client_cancel(call, "closed");
        }
    struct event *e, *next;
    for (e = TAILQ_FIRST(&k->events); e; e = next) {
        next = TAILQ_NEXT(e, next);
        event_free(k, e);
    }
    while (!LIST_EMPTY(&k->challenges))
        challenge_free(k, LIST_FIRST(&k->challenges));
}

static void link_free_client(struct link *k, int64_t eof_ms, int64_t term_ms)
{
    orch_mcp_client_free(orch_steal_ptr(&k->c), eof_ms, term_ms);
    wake_taker(k);
}

static int close_push(lua_State *L, void *ud)
{
    struct link *k = ud;
    (void)L;
    release(k, &k->closing_ref);
    return 0;
}

static void said(void *ud)
{
    struct link *k = ud;
    link_free_client(k, ORCH_PROC_EOF_MS, ORCH_PROC_TERM_MS);
    orch_task_ready(k->closing, close_push, k);
}

static void close_cancel(void *ud)
{
    struct link *k = ud;
    link_free_client(k, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    release(k, &k->closing_ref);
}

static int l_close(lua_State *L)
{
    struct link *k = check_link(L);
    if (!k->c || k->closing_ref != LUA_NOREF)
        return 0;
    hang_up(k);
    if (!k->over_http) {
        link_free_client(k, ORCH_PROC_EOF_MS, ORCH_PROC_TERM_MS);
        return 0;
    }
    k->closing_ref = hold(L);
    orch_mcp_client_goodbye(k->c, said, k);
    return orch_task_wait(L, close_cancel, k, &k->closing);
}

static int link_gc(lua_State *L)
{
    struct link *k = lua_touserdata(L, 1);
    if (k->c)
        hang_up(k);
    link_free_client(k, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    while (!LIST_EMPTY(&k->requests))
        request_free(LIST_FIRST(&k->requests));
    orch_timer_free(orch_steal_ptr(&k->timer));
    release(k, &k->sign_ref);
    free(orch_steal_ptr(&k->name));
    return 0;
}

static int l_tool_problem(lua_State *L)
{
    struct link *k = check_link(L);
    const char *name = luaL_checkstring(L, 2);
    lua_pushstring(L, k->c ? orch_mcp_client_tool_problem(k->c, name) : NULL);
    return 1;
}

static int l_log_level(lua_State *L)
{
    struct link *k = check_link(L);
    const char *level = luaL_optstring(L, 2, NULL);
    if (k->c)
        orch_mcp_client_log_level(k->c, level);
    return 0;
}

static struct orch_proc_via *protect(void *ud, struct orch_err *err)
{
    struct orch_env *env = ud;
    return env->protect(env->ud, err);
}

/* Leaves it on the stack; it does nothing yet. sign_at: where the function is, or 0. */
static struct link *link_new(lua_State *L, struct orch_env *env,
                             const struct orch_mcp_client_opts *c, int sign_at)
{
    struct link *k = lua_newuserdata(L, sizeof *k);
    *k = (struct link){ .env = env,
                        .main = orch_state_lua(orch_state_of(L)),
                        .state = orch_state_of(L),
                        .sign_ref = LUA_NOREF,
                        .opening_ref = LUA_NOREF,
                        .taking_ref = LUA_NOREF,
                        .closing_ref = LUA_NOREF,
                        .timeout_ms = c->start_ms,
                        .over_http = c->url != NULL };
    TAILQ_INIT(&k->events);
    luaL_getmetatable(L, LINK_META);
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
                                      .lost = lost,
                                      .withdrawn = withdrawn,
                                      .notified = notified };
    struct orch_mcp_auth auth = { .sign = sign,
                                  .challenged = challenged,
                                  .withdrawn = unchallenged };
    cleanup_buf struct orch_buf capabilities = { 0 };
    if (orch_opt_bool(&o, "questions", false))
        c.asked = asked;
    if (orch_opt_bool(&o, "protect", false)) {
        c.via = protect;
        c.via_ud = env;
    }
    c.env = orch_opt_push(&o, "env", LUA_TTABLE) ? orch_check_strings(L, -1, "env", ARGV_MAX)
                                                 : (const char *const *)environ;
    if (orch_opt_push(&o, "capabilities", LUA_TTABLE))
        check_json(L, -1, "capabilities", &capabilities);
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
    struct link *k = link_new(L, env, &c, signs ? sign_at : 0);
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
    static const luaL_Reg methods[] = {
        { "ready", l_ready },         { "next", l_next },     { "reply", l_reply },
        { "refuse", l_refuse },       { "decide", l_decide }, { "request", l_request },
        { "notify", l_notify },       { "close", l_close },   { "tool_problem", l_tool_problem },
        { "log_level", l_log_level }, { NULL, NULL }
    };
    orch_class_new(L, LINK_META, methods, link_gc);
    lua_newtable(L);
    lua_pushcfunction(L, t_new);
    lua_setfield(L, -2, "new");
    return 1;
}
