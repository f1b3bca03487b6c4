/* HTTP for scripts: the verbs behind orch.http.request and ctx:http, which are written in Lua over
 * them (lua/http.lua). The private module "orch.transport":
 *   http_open{ url, method, headers, body, timeout }
 *                         waits for the head: stream, status, headers, where it redirects
 *   call_open(ctx, …)     the same for a tool's call: each connection is judged by its network
 *                         policy
 *   call_time(ctx)        what is left of the call's time, all of it, in seconds, and what sets
 *                         that
 *   stream:read(timeout)  waits for the next bytes; nil at the end; nil, message, code when it
 *                         failed
 *   stream:close()
 * A stream is bounded by the reader alone: while 1 MiB waits unread nothing more is taken from the
 * peer. Those of a tool's call also by the call: so many at once, less unread, and they end with
 * it. */
#include "bind.h"

#include "../call/call.h"
#include "../http/client.h"

#include <errno.h>
#include <string.h>

enum { UNREAD_BYTES = 1 << 20, CALL_UNREAD_BYTES = 256 << 10, CALL_STREAMS_MAX = 16 };

#define STREAM_META "orch.http.stream"

/* ---- streams */

struct orch_http_stream {
    struct orch_http_stream *next, **link; /* in its tool call's list, as long as judge */
    /* decides on connections; NULL: a script's, or the call has ended */
    struct orch_call *judge;
    struct orch_http_call *call; /* NULL once it is over */
    struct orch_timer *timer;
    struct orch_wait wait;
    bool waiting, opening, paused, timed_out;
    int status;
    char *location;
    struct orch_buf head; /* name NUL value NUL … */
    struct orch_buf data;
    struct orch_err err;
    lua_State *main;
    int self_ref; /* while a task waits */
    int64_t timeout_ms;
    size_t unread_max;
};

static void stream_stop(struct orch_http_stream *s)
{
    if (s->call)
        orch_http_call_cancel(s->call);
    s->call = NULL;
}

static void stream_unlink(struct orch_http_stream *s)
{
    if (!s->judge)
        return;
    s->judge = NULL;
    *s->link = s->next;
    if (s->next)
        s->next->link = s->link;
}

static int stream_gc(lua_State *L)
{
    struct orch_http_stream *s = lua_touserdata(L, 1);
    stream_stop(s);
    stream_unlink(s);
    orch_timer_free(s->timer);
    s->timer = NULL;
    free(s->location);
    s->location = NULL;
    orch_buf_free(&s->head);
    orch_buf_free(&s->data);
    return 0;
}

static void release(struct orch_http_stream *s)
{
    s->waiting = false;
    orch_timer_cancel(s->timer);
    luaL_unref(s->main, LUA_REGISTRYINDEX, s->self_ref);
    s->self_ref = LUA_NOREF;
}

/* Names in lower case; of those that come more than once the values are joined, as HTTP says. */
static void push_head(lua_State *L, const struct orch_http_stream *s)
{
    lua_newtable(L);
    for (const char *p = s->head.p, *end = p + s->head.n; p && p < end;) {
        const char *name = p, *value = p + strlen(p) + 1;
        p = value + strlen(value) + 1;
        lua_getfield(L, -1, name);
        if (lua_isnil(L, -1))
            lua_pushstring(L, value);
        else
            lua_pushfstring(L, "%s, %s", lua_tostring(L, -1), value);
        lua_setfield(L, -3, name);
        lua_pop(L, 1);
    }
}

/* What a read returns: bytes, the end, or why there are none. */
static int push_bytes(lua_State *L, struct orch_http_stream *s)
{
    if (s->data.n) {
        lua_pushlstring(L, s->data.p, s->data.n);
        s->data.n = 0;
        if (s->paused && s->call)
            orch_http_call_pause(s->call, false);
        s->paused = false;
        return 1;
    }
    if (s->timed_out) {
        s->timed_out = false;
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, "nothing came within %lld ms",
                      (long long)s->timeout_ms);
        return orch_push_err(L, &err);
    }
    if (s->err.cls)
        return orch_push_err(L, &s->err);
    lua_pushnil(L);
    return 1;
}

static int stream_push(lua_State *L, void *ud)
{
    struct orch_http_stream *s = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, s->self_ref);
    bool opening = s->opening;
    s->opening = false;
    release(s);
    if (!opening)
        return push_bytes(L, s);
    if (s->timed_out)
        stream_stop(s);
    if (s->timed_out || (s->err.cls && !s->status))
        return push_bytes(L, s);
    lua_pushinteger(L, s->status);
    push_head(L, s);
    lua_pushstring(L, s->location);
    return 4;
}

static void wake(struct orch_http_stream *s)
{
    if (s->waiting)
        orch_task_ready(s->wait, stream_push, s);
    s->waiting = false;
}

static void on_head(void *ud, const struct orch_http_response *r)
{
    struct orch_http_stream *s = ud;
    s->status = r->status;
    s->location = orch_xstrdup(r->location);
    for (size_t i = 0; i < r->n_headers; i++) {
        for (size_t k = 0; k < r->headers[i].name.n; k++) {
            char c = r->headers[i].name.p[k];
            orch_buf_char(&s->head, c >= 'A' && c <= 'Z' ? (char)(c | 0x20) : c);
        }
        orch_buf_char(&s->head, 0);
        orch_buf_slice(&s->head, r->headers[i].value);
        orch_buf_char(&s->head, 0);
    }
    if (s->opening)
        wake(s);
}

static void on_data(void *ud, struct orch_slice data)
{
    struct orch_http_stream *s = ud;
    orch_buf_slice(&s->data, data);
    if (s->data.n > s->unread_max && !s->paused) {
        s->paused = true;
        orch_http_call_pause(s->call, true);
    }
    if (!s->opening)
        wake(s);
}

static void on_done(void *ud, const struct orch_http_response *r, const struct orch_err *err)
{
    (void)r;
    struct orch_http_stream *s = ud;
    s->call = NULL;
    if (err)
        s->err = *err;
    wake(s);
}

static bool may_connect(void *ud, const struct sockaddr *to, struct orch_err *err)
{
    struct orch_http_stream *s = ud;
    return orch_call_may_connect(s->judge, to, err); /* a call that ends stops its streams */
}

static void stream_late(void *ud)
{
    struct orch_http_stream *s = ud;
    s->timed_out = true;
    wake(s);
}

static void stream_cancel(void *ud)
{
    struct orch_http_stream *s = ud;
    if (s->opening)
        stream_stop(s);
    release(s);
}

/* Nothing more comes, and what was not read is forgotten. */
static void stream_close(struct orch_http_stream *s, const char *why)
{
    stream_stop(s);
    stream_unlink(s);
    orch_buf_free(&s->data);
    if (!s->err.cls)
        orch_err_setc(&s->err, ORCH_CLASS_CLOSED, ECANCELED, "%s", why);
    wake(s);
}

/* The requests of a tool's call end with it. */
struct streams {
    struct orch_call_part part;
    struct orch_http_stream *list;
};

static void streams_end(struct orch_call_part *p, struct orch_call *c)
{
    struct streams *all = (struct streams *)p;
    (void)c;
    while (all->list)
        stream_close(all->list, "the call is over");
}

static void streams_free(struct orch_call_part *p)
{
    free(p);
}

static const struct orch_call_part_ops streams_ops = { .end = streams_end, .free = streams_free };

static struct streams *streams_of(struct orch_call *c)
{
    struct streams *all = (struct streams *)orch_call_part(c, &streams_ops);
    if (all)
        return all;
    all = orch_xcalloc(1, sizeof *all);
    all->part.ops = &streams_ops;
    orch_call_add_part(c, &all->part);
    return all;
}

/* false: the call has too many. */
static bool stream_adopt(struct orch_http_stream *s, struct orch_call *call, struct orch_err *err)
{
    struct streams *all = streams_of(call);
    unsigned n = 0;
    for (struct orch_http_stream *other = all->list; other; other = other->next)
        n++;
    if (n >= CALL_STREAMS_MAX) {
        orch_err_setc(err, ORCH_CLASS_LIMIT, EMFILE, "the call has %d requests under way",
                      CALL_STREAMS_MAX);
        return false;
    }
    s->judge = call;
    s->next = all->list;
    s->link = &all->list;
    if (s->next)
        s->next->link = &s->next;
    all->list = s;
    return true;
}

/* The stream is at idx. */
static int stream_wait(lua_State *L, int idx, struct orch_http_stream *s, int64_t timeout_ms)
{
    lua_pushvalue(L, idx);
    s->self_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    s->waiting = true;
    s->timeout_ms = timeout_ms;
    if (timeout_ms >= 0)
        orch_timer_set(s->timer, timeout_ms);
    return orch_task_wait(L, stream_cancel, s, &s->wait);
}

struct orch_http_header *orch_take_headers(lua_State *L, struct orch_opts *o, size_t *n)
{
    *n = 0;
    if (!orch_opt_push(o, "headers", LUA_TTABLE))
        return NULL;
    int t = lua_gettop(L);
    struct orch_http_header *list = lua_newuserdata(L, ORCH_HTTP_HEADERS_MAX * sizeof *list);
    lua_pushnil(L);
    while (lua_next(L, t)) {
        if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
            luaL_error(L, "%s: headers must be strings by their names", o->what);
        if (*n == ORCH_HTTP_HEADERS_MAX)
            luaL_error(L, "%s: over %d headers", o->what, ORCH_HTTP_HEADERS_MAX);
        struct orch_http_header *h = &list[(*n)++];
        h->name.p = lua_tolstring(L, -2, &h->name.n);
        h->value.p = lua_tolstring(L, -1, &h->value.n);
        lua_pop(L, 1);
    }
    return list;
}

/* The option table is at idx. call: NULL in scripts. */
static int http_open(lua_State *L, int idx, const char *what, struct orch_call *call)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, idx, what);
    struct orch_http_call_opts c = { .url = orch_opt_string(&o, "url", NULL),
                                     .method = orch_opt_string(&o, "method", NULL),
                                     .total_ms = -1,
                                     .idle_ms = -1,
                                     .max_body_bytes = SIZE_MAX / 2,
                                     .on_head = on_head,
                                     .on_data = on_data,
                                     .on_done = on_done };
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", 60000);
    if (!c.url)
        return luaL_error(L, "%s: url is missing", what);
    if (orch_opt_push(&o, "body", LUA_TSTRING))
        c.body.p = lua_tolstring(L, -1, &c.body.n);
    c.headers = orch_take_headers(L, &o, &c.n_headers);
    orch_opts_done(&o);
    c.connect_ms = timeout + 1000; /* the stream's timer is the one clock */
    if (call)
        c.may_connect = may_connect;

    struct orch_http_stream *s = lua_newuserdata(L, sizeof *s);
    *s = (struct orch_http_stream){ .opening = true,
                                    .main = orch_state_lua(orch_state_of(L)),
                                    .self_ref = LUA_NOREF,
                                    .unread_max = call ? CALL_UNREAD_BYTES : UNREAD_BYTES };
    luaL_getmetatable(L, STREAM_META);
    lua_setmetatable(L, -2);
    struct orch_err err = { 0 };
    struct orch_http_client *h = env->http(env->ud, &err);
    c.ud = s;
    if (!h || (call && !stream_adopt(s, call, &err)) ||
        !(s->call = orch_http_call_start(h, &c, &err))) {
        stream_unlink(s);
        return orch_push_err(L, &err);
    }
    s->timer = orch_timer_new(env->loop, stream_late, s);
    return stream_wait(L, lua_gettop(L), s, timeout);
}

static int t_http_open(lua_State *L)
{
    return http_open(L, 1, "orch.http.request", NULL);
}

static int t_call_open(lua_State *L)
{
    return http_open(L, 2, "ctx:http", orch_ctx_call(L));
}

static int t_call_time(lua_State *L)
{
    struct orch_call_time t = orch_call_time(orch_ctx_call(L));
    lua_pushnumber(L, (double)(t.left_ms > 0 ? t.left_ms : 0) / 1000);
    lua_pushnumber(L, (double)t.whole_ms / 1000);
    lua_pushstring(L, t.limit);
    return 3;
}

static int l_stream_read(lua_State *L)
{
    struct orch_http_stream *s = luaL_checkudata(L, 1, STREAM_META);
    int64_t timeout = lua_isnoneornil(L, 2) ? -1 : orch_check_duration_ms(L, 2, "timeout");
    if (s->self_ref != LUA_NOREF)
        return luaL_error(L, "the stream is being read by another task");
    if (s->data.n || !s->call)
        return push_bytes(L, s);
    return stream_wait(L, 1, s, timeout);
}

static int l_stream_close(lua_State *L)
{
    stream_close(luaL_checkudata(L, 1, STREAM_META), "the stream was closed");
    return 0;
}

static void open_streams(lua_State *L)
{
    static const luaL_Reg stream[] = { { "read", l_stream_read },
                                       { "close", l_stream_close },
                                       { NULL, NULL } };
    orch_class_new(L, STREAM_META, stream, stream_gc);
}

int orch_luaopen_call_transport(lua_State *L)
{
    open_streams(L);
    lua_newtable(L);
    lua_pushcfunction(L, t_call_open);
    lua_setfield(L, -2, "call_open");
    lua_pushcfunction(L, t_call_time);
    lua_setfield(L, -2, "call_time");
    return 1;
}

int orch_luaopen_transport(lua_State *L)
{
    orch_luaopen_call_transport(L);
    lua_pushcfunction(L, t_http_open);
    lua_setfield(L, -2, "http_open");
    return 1;
}
