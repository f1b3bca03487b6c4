#include "client_link.h"

#include "../base/log.h"
#include "../script/jsonlib.h"

#include <errno.h>
#include <string.h>

enum {
    CHALLENGES_MAX = 64,
    EVENTS_MAX_BYTES = 32 << 20, /* that nobody took yet; further ones are left out, or refused */
    ID_MAX_BYTES = 256,
};

struct orch_client_event {
    TAILQ_ENTRY(orch_client_event) next;
    enum { NOTE, PROGRESS, QUESTION, WITHDRAWN, CHALLENGE, UNCHALLENGED } kind;
    size_t bytes;
    const void *of; /* progress: whose it is, and its function; LUA_NOREF: nobody waits any more */
    int function_ref;
    double done, total;
    struct orch_buf id, text, params; /* params: JSON; of a challenge name NUL value NUL … */
    uint64_t serial;                  /* of a challenge */
    int status;
    unsigned times;
};

struct orch_client_challenge {
    LIST_ENTRY(orch_client_challenge) entry;
    struct orch_mcp_challenge *q;
    uint64_t serial;
};

/* ---- values */

static void push_text(lua_State *L, const struct orch_buf *b)
{
    lua_pushlstring(L, b->n ? b->p : "", b->n);
}

void orch_client_push_json(lua_State *L, struct orch_slice text)
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

void orch_client_check_json(lua_State *L, int idx, const char *what, struct orch_buf *out)
{
    char why[256];
    if (orch_lua_encode_json(L, idx, out, why, sizeof why) < 0)
        luaL_error(L, "%s: %s", what, why);
}

/* ---- what the server says unasked */

static void event_free(struct orch_client_link *k, struct orch_client_event *e)
{
    TAILQ_REMOVE(&k->events, e, next);
    k->event_bytes -= e->bytes;
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

static void push_event(lua_State *L, const struct orch_client_event *e)
{
    static const char *const names[] = { "note",      "progress",  "question",
                                         "withdrawn", "challenge", "unchallenged" };
    lua_pushstring(L, names[e->kind]);
    switch (e->kind) {
    case PROGRESS:
        lua_rawgeti(L, LUA_REGISTRYINDEX, e->function_ref); /* nil for LUA_NOREF */
        lua_pushnumber(L, e->done);
        if (e->total < 0)
            lua_pushnil(L);
        else
            lua_pushnumber(L, e->total);
        if (e->text.n)
            push_text(L, &e->text);
        else
            lua_pushnil(L);
        return;
    case CHALLENGE:
        lua_pushnumber(L, (double)e->serial);
        lua_pushinteger(L, e->status);
        push_headers(L, &e->params);
        lua_pushinteger(L, (lua_Integer)e->times);
        return;
    case UNCHALLENGED:
        lua_pushnumber(L, (double)e->serial);
        return;
    case NOTE:
        break;
    case QUESTION:
    case WITHDRAWN:
        push_text(L, &e->id);
        break;
    }
    push_text(L, &e->text);
    orch_client_push_json(L, (struct orch_slice){ e->params.p, e->params.n });
}

static int next_push(lua_State *L, void *ud)
{
    struct orch_client_link *k = ud;
    struct orch_client_event *e = TAILQ_FIRST(&k->events);
    lua_rawgeti(L, LUA_REGISTRYINDEX, k->taking_ref); /* it stays while this goes on */
    int top = lua_gettop(L);
    orch_client_release(k, &k->taking_ref);
    if (!e || !k->c)
        return 0;
    push_event(L, e);
    event_free(k, e);
    return lua_gettop(L) - top;
}

static void next_cancel(void *ud)
{
    struct orch_client_link *k = ud;
    orch_client_release(k, &k->taking_ref);
    k->taking = (struct orch_wait){ 0 };
}

void orch_client_wake(struct orch_client_link *k)
{
    if (k->taking_ref != LUA_NOREF)
        orch_task_ready(k->taking, next_push, k);
}

/* NULL: there is too much already. */
static struct orch_client_event *event_new(struct orch_client_link *k, int kind, size_t bytes)
{
    bytes += sizeof(struct orch_client_event);
    if (k->event_bytes + bytes > EVENTS_MAX_BYTES) {
        if (!k->left_out++)
            orch_log(ORCH_WARN,
                     "%s: notifications come faster than they are taken; some are left out",
                     k->name);
        return NULL;
    }
    struct orch_client_event *e = orch_xcalloc(1, sizeof *e);
    e->kind = (__typeof__(e->kind))kind;
    e->bytes = bytes;
    TAILQ_INSERT_TAIL(&k->events, e, next);
    k->event_bytes += bytes;
    orch_client_wake(k);
    return e;
}

int orch_client_next(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    if (k->taking_ref != LUA_NOREF)
        return luaL_error(L, "another task waits for what comes");
    if (!k->c)
        return 0;
    k->taking_ref = orch_client_hold(L);
    if (TAILQ_EMPTY(&k->events))
        return orch_task_wait(L, next_cancel, k, &k->taking);
    return next_push(L, k);
}

static void notified(void *ud, const char *method, const struct orch_json_doc *d, uint32_t params)
{
    struct orch_client_link *k = ud;
    struct orch_slice json = params ? orch_json_raw(d, params) : (struct orch_slice){ "", 0 };
    struct orch_client_event *e = event_new(k, NOTE, json.n + strlen(method));
    if (!e)
        return;
    orch_buf_str(&e->text, method);
    orch_buf_slice(&e->params, json);
}

static void asked(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params)
{
    struct orch_client_link *k = ud;
    struct orch_slice json = params ? orch_json_raw(d, params) : ORCH_SLICE("{}");
    struct orch_client_event *e = id.n <= ID_MAX_BYTES ? event_new(k, QUESTION, json.n + id.n)
                                                       : NULL;
    if (!e) {
        orch_mcp_client_refuse(k->c, id, ORCH_RPC_INTERNAL_ERROR,
                               "too many questions wait to be seen");
        return;
    }
    orch_buf_slice(&e->id, id);
    orch_buf_str(&e->text, method);
    orch_buf_slice(&e->params, json);
}

static void withdrawn(void *ud, struct orch_slice id)
{
    struct orch_client_link *k = ud;
    struct orch_client_event *e = id.n <= ID_MAX_BYTES ? event_new(k, WITHDRAWN, 0) : NULL;
    if (e)
        orch_buf_slice(&e->id, id);
}

int orch_client_reply(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    cleanup_buf struct orch_buf json = { 0 };
    struct orch_slice id;
    id.p = luaL_checklstring(L, 2, &id.n);
    luaL_checktype(L, 3, LUA_TTABLE);
    orch_client_check_json(L, 3, "the answer", &json);
    if (k->c)
        orch_mcp_client_reply(k->c, id, (struct orch_slice){ json.p, json.n });
    return 0;
}

int orch_client_refuse(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
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
    struct orch_client_link *k;
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
    struct orch_client_link *k = ud;
    struct orch_err err = { 0 };
    struct signing s = { k, h, method, url };
    if (orch_state_protect(k->state, sign_protected, &s, &err) < 0)
        orch_log(ORCH_WARN, "%s: a request could not be signed: %s", k->name, err.msg);
}

static void challenge_free(struct orch_client_link *k, struct orch_client_challenge *q)
{
    LIST_REMOVE(q, entry);
    k->n_challenges--;
    free(q);
}

static void put_headers(struct orch_buf *b, const struct orch_http_response *r)
{
    for (size_t i = 0; i < r->n_headers; i++) {
        struct orch_slice name = r->headers[i].name;
        for (size_t c = 0; c < name.n; c++)
            orch_buf_char(b, name.p[c] >= 'A' && name.p[c] <= 'Z' ? (char)(name.p[c] | 0x20)
                                                                  : name.p[c]);
        orch_buf_char(b, 0);
        orch_buf_slice(b, r->headers[i].value);
        orch_buf_char(b, 0);
    }
}

static void challenged(void *ud, struct orch_mcp_challenge *q, const struct orch_http_response *r,
                       unsigned times)
{
    struct orch_client_link *k = ud;
    cleanup_buf struct orch_buf headers = { 0 };
    put_headers(&headers, r);
    struct orch_client_event *e = k->n_challenges < CHALLENGES_MAX
                                      ? event_new(k, CHALLENGE, headers.n)
                                      : NULL;
    if (!e) {
        orch_mcp_challenge_end(q, ORCH_MCP_AS_IT_IS, NULL);
        return;
    }
    struct orch_client_challenge *own = orch_xcalloc(1, sizeof *own);
    *own = (struct orch_client_challenge){ .q = q, .serial = ++k->next_serial };
    LIST_INSERT_HEAD(&k->challenges, own, entry);
    k->n_challenges++;
    e->serial = own->serial;
    e->status = r->status;
    e->times = times;
    e->params = headers;
    headers = (struct orch_buf){ 0 };
}

static struct orch_client_challenge *find_challenge(struct orch_client_link *k,
                                                    const struct orch_mcp_challenge *q,
                                                    uint64_t serial)
{
    struct orch_client_challenge *own;
    LIST_FOREACH (own, &k->challenges, entry)
        if (q ? own->q == q : own->serial == serial)
            return own;
    return NULL;
}

static void unchallenged(void *ud, struct orch_mcp_challenge *q)
{
    struct orch_client_link *k = ud;
    struct orch_client_challenge *own = find_challenge(k, q, 0);
    if (!own)
        return;
    struct orch_client_event *e = event_new(k, UNCHALLENGED, 0);
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

int orch_client_decide(lua_State *L)
{
    struct orch_client_link *k = orch_client_check(L);
    struct orch_client_challenge *own = find_challenge(k, NULL, (uint64_t)luaL_checknumber(L, 2));
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

/* ---- the link's */

void orch_client_progress(struct orch_client_link *k, const void *of, int function_ref, double done,
                          double total, struct orch_slice message)
{
    struct orch_client_event *e = event_new(k, PROGRESS, message.n);
    if (!e)
        return;
    e->of = of;
    e->function_ref = function_ref;
    e->done = done;
    e->total = total;
    orch_buf_slice(&e->text, message);
}

/* It stays in the queue: who waits for what comes may have been woken by it. */
void orch_client_disown(struct orch_client_link *k, const void *of)
{
    struct orch_client_event *e;
    TAILQ_FOREACH (e, &k->events, next)
        if (e->kind == PROGRESS && e->of == of)
            e->function_ref = LUA_NOREF;
}

void orch_client_forget(struct orch_client_link *k)
{
    while (!TAILQ_EMPTY(&k->events))
        event_free(k, TAILQ_FIRST(&k->events));
    while (!LIST_EMPTY(&k->challenges))
        challenge_free(k, LIST_FIRST(&k->challenges));
}

void orch_client_hear(struct orch_mcp_client_opts *o, struct orch_mcp_auth *auth, bool questions)
{
    o->notified = notified;
    o->asked = questions ? asked : NULL;
    o->withdrawn = withdrawn;
    auth->sign = sign;
    auth->challenged = challenged;
    auth->withdrawn = unchallenged;
}
