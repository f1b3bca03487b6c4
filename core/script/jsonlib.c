/* Lua <-> JSON by the C API. */
#include "jsonlib.h"

#include "state.h"

#include <errno.h>
#include <lauxlib.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* Registry keys; the metatables' __metatable field holds the same text. */
#define NAME_NULL "orch.json.null"
#define NAME_ARRAY "orch.json.array"
#define NAME_INTEGER "orch.json.integer"

enum {
    ENCODE_DEPTH = 64, /* what the scanner accepts by default */
    ENCODE_BYTES = 64 << 20,
    STEPS_PER_VALUE = 4,
    BYTES_PER_STEP = 16,
};

static void charge(lua_State *L, size_t values, size_t bytes)
{
    orch_state_charge(L, values * STEPS_PER_VALUE + bytes / BYTES_PER_STEP);
}

/* ---- null, arrays, large integers */

static int null_tostring(lua_State *L)
{
    lua_pushliteral(L, "null");
    return 1;
}

static int integer_tostring(lua_State *L)
{
    lua_pushstring(L, luaL_checkudata(L, 1, NAME_INTEGER));
    return 1;
}

static int integer_eq(lua_State *L)
{
    const char *a = luaL_checkudata(L, 1, NAME_INTEGER), *b = luaL_checkudata(L, 2, NAME_INTEGER);
    lua_pushboolean(L, strcmp(a, b) == 0); /* JSON integers have one spelling each */
    return 1;
}

/* Pushes the metatable of that name. It is registered only when it is complete: memory may end at
 * any step, and a metatable without __metatable would be open to scripts. */
static void push_meta(lua_State *L, const char *name)
{
    static const luaL_Reg null_meta[] = { { "__tostring", null_tostring }, { NULL, NULL } };
    static const luaL_Reg array_meta[] = { { NULL, NULL } };
    static const luaL_Reg integer_meta[] = { { "__tostring", integer_tostring },
                                             { "__eq", integer_eq },
                                             { NULL, NULL } };
    lua_getfield(L, LUA_REGISTRYINDEX, name);
    if (!lua_isnil(L, -1))
        return;
    lua_pop(L, 1);
    lua_createtable(L, 0, 4);
    luaL_setfuncs(L,
                  strcmp(name, NAME_NULL) == 0      ? null_meta
                  : strcmp(name, NAME_INTEGER) == 0 ? integer_meta
                                                    : array_meta,
                  0);
    lua_pushstring(L, name);
    lua_setfield(L, -2, "__metatable");
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, name);
}

static bool has_meta(lua_State *L, int idx, const char *name)
{
    if (!lua_getmetatable(L, idx))
        return false;
    lua_getfield(L, LUA_REGISTRYINDEX, name);
    bool same = lua_rawequal(L, -1, -2);
    lua_pop(L, 2);
    return same;
}

static bool is_null(lua_State *L, int idx)
{
    return lua_type(L, idx) == LUA_TUSERDATA && has_meta(L, idx, NAME_NULL);
}

bool orch_lua_is_array(lua_State *L, int idx)
{
    return lua_type(L, idx) == LUA_TTABLE && has_meta(L, idx, NAME_ARRAY);
}

bool orch_lua_is_bigint(lua_State *L, int idx)
{
    return lua_type(L, idx) == LUA_TUSERDATA && has_meta(L, idx, NAME_INTEGER);
}

/* The one null of the state lies in the registry. */
static void push_null(lua_State *L)
{
    static const char key[] = NAME_NULL ".value";
    lua_getfield(L, LUA_REGISTRYINDEX, key);
    if (!lua_isnil(L, -1))
        return;
    lua_pop(L, 1);
    lua_newuserdata(L, 1);
    push_meta(L, NAME_NULL);
    lua_setmetatable(L, -2);
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, key);
}

/* ---- to Lua */

struct push {
    lua_State *L;
    const struct orch_json_doc *d;
    struct orch_buf scratch; /* of the string being unescaped */
    bool keep_null, met_null;
};

static void push_free(struct push *p)
{
    orch_buf_free(&p->scratch);
}

static void push_string(struct push *p, uint32_t tok)
{
    const struct orch_json_tok *t = &p->d->toks[tok];
    if (!(t->flags & ORCH_JSON_ESCAPED)) {
        lua_pushlstring(p->L, p->d->text + t->start, t->end - t->start);
        return;
    }
    p->scratch.n = 0;
    orch_json_string(p->d, tok, &p->scratch);
    lua_pushlstring(p->L, p->scratch.p, p->scratch.n);
}

/* Recursion is as deep as the scanner lets documents be. */
static void push_value(struct push *p, uint32_t tok)
{
    lua_State *L = p->L;
    const struct orch_json_tok *t = &p->d->toks[tok];

    charge(L, 1, t->type == ORCH_JSON_STRING ? t->end - t->start : 0);
    luaL_checkstack(L, 4, "JSON nested too deeply");
    switch ((enum orch_json_type)t->type) {
    case ORCH_JSON_NULL:
        push_null(L);
        return;
    case ORCH_JSON_FALSE:
    case ORCH_JSON_TRUE:
        lua_pushboolean(L, t->type == ORCH_JSON_TRUE);
        return;
    case ORCH_JSON_NUMBER:
        if (t->flags & ORCH_JSON_BIG) {
            size_t n = t->end - t->start;
            char *digits = lua_newuserdata(L, n + 1);
            memcpy(digits, p->d->text + t->start, n);
            digits[n] = 0;
            push_meta(L, NAME_INTEGER);
            lua_setmetatable(L, -2);
        } else {
            lua_pushnumber(L, orch_json_number(p->d, tok));
        }
        return;
    case ORCH_JSON_STRING:
        push_string(p, tok);
        return;
    case ORCH_JSON_ARRAY:
        lua_createtable(L, (int)t->count, 0);
        push_meta(L, NAME_ARRAY);
        lua_setmetatable(L, -2);
        for (uint32_t e = tok + 1, i = 1; i <= t->count; i++, e = p->d->toks[e].next) {
            push_value(p, e);
            lua_rawseti(L, -2, (int)i);
        }
        return;
    case ORCH_JSON_OBJECT:
        lua_createtable(L, 0, (int)t->count);
        for (uint32_t k = tok + 1, i = 0; i < t->count; i++, k = p->d->toks[k + 1].next) {
            if (p->d->toks[k + 1].type == ORCH_JSON_NULL) {
                p->met_null = true;
                if (!p->keep_null)
                    continue;
            }
            charge(L, 1, p->d->toks[k].end - p->d->toks[k].start);
            push_string(p, k);
            push_value(p, k + 1);
            lua_rawset(L, -3);
        }
        return;
    }
}

bool orch_lua_push_json(lua_State *L, const struct orch_json_doc *d, uint32_t tok, unsigned mode)
{
    ORCH_CLEANUP(push_free)
    struct push p = { .L = L, .d = d, .keep_null = (mode & ORCH_LUA_JSON_KEEP_NULL) != 0 };
    push_value(&p, tok);
    return p.met_null;
}

/* Replaces the value at the top by its copy. A cycle ends when the Lua stack is full. */
static void strip_top(lua_State *L)
{
    charge(L, 1, 0);
    if (!lua_istable(L, -1))
        return;
    luaL_checkstack(L, 6, "JSON nested too deeply");
    int from = lua_gettop(L);
    lua_createtable(L, (int)lua_objlen(L, from), 0);
    if (has_meta(L, from, NAME_ARRAY)) {
        push_meta(L, NAME_ARRAY);
        lua_setmetatable(L, -2);
    }
    lua_pushnil(L);
    while (lua_next(L, from)) {
        if (lua_type(L, -2) == LUA_TSTRING && is_null(L, -1)) {
            lua_pop(L, 1);
            continue;
        }
        strip_top(L);
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, from + 1);
    }
    lua_remove(L, from);
}

void orch_lua_strip_nulls(lua_State *L, int idx)
{
    lua_pushvalue(L, idx);
    strip_top(L);
}

static void put_less(struct push *p, uint32_t tok, struct orch_buf *out)
{
    lua_State *L = p->L;
    const struct orch_json_tok *t = &p->d->toks[tok];
    bool object = t->type == ORCH_JSON_OBJECT;

    charge(L, 1, 0);
    if (!object && t->type != ORCH_JSON_ARRAY) {
        orch_buf_slice(out, orch_json_raw(p->d, tok));
        return;
    }
    luaL_checkstack(L, 4, "JSON nested too deeply");
    orch_buf_char(out, object ? '{' : '[');
    size_t begun = out->n;
    for (uint32_t e = tok + 1, i = 1; i <= t->count; i++, e = p->d->toks[e].next) {
        uint32_t key = e;
        if (object)
            push_string(p, e++);
        else
            lua_pushinteger(L, (lua_Integer)i);
        lua_rawget(L, -2);
        if (!lua_isnil(L, -1)) {
            if (out->n > begun)
                orch_buf_char(out, ',');
            if (object) {
                orch_buf_slice(out, orch_json_raw(p->d, key));
                orch_buf_char(out, ':');
            }
            put_less(p, e, out);
        }
        lua_pop(L, 1);
    }
    orch_buf_char(out, object ? '}' : ']');
}

void orch_lua_json_less(lua_State *L, int idx, const struct orch_json_doc *d, uint32_t tok,
                        struct orch_buf *out)
{
    ORCH_CLEANUP(push_free) struct push p = { .L = L, .d = d };
    lua_pushvalue(L, idx);
    put_less(&p, tok, out);
    lua_pop(L, 1);
}

/* ---- from Lua */

struct enc {
    lua_State *L;
    struct orch_buf *out;
    size_t base;        /* out->n at the start */
    const char *reason; /* static text, with `type` before it when that is set */
    const char *type;
    unsigned depth;
    struct step { /* where in its container the current value is; key NULL: at index */
        const char *key;
        size_t n;
        int index;
    } path[ENCODE_DEPTH];
};

static bool refuse(struct enc *e, const char *reason)
{
    e->reason = reason;
    return false;
}

static bool put_string(struct enc *e, const char *s, size_t n, const char *reason)
{
    charge(e->L, 0, n);
    if (!orch_utf8_valid((struct orch_slice){ s, n }))
        return refuse(e, reason);
    orch_json_quote(e->out, (struct orch_slice){ s, n });
    return true;
}

static bool put_value(struct enc *e, int idx);

static bool put_array(struct enc *e, int idx, size_t n)
{
    e->path[e->depth++].key = NULL;
    orch_buf_char(e->out, '[');
    for (size_t i = 1; i <= n; i++) {
        if (i > 1)
            orch_buf_char(e->out, ',');
        e->path[e->depth - 1].index = (int)i;
        lua_rawgeti(e->L, idx, (int)i);
        if (!put_value(e, lua_gettop(e->L)))
            return false;
        lua_pop(e->L, 1);
    }
    orch_buf_char(e->out, ']');
    e->depth--;
    return true;
}

static bool put_table(struct enc *e, int idx)
{
    static const char mixed[] = "mixed keys (they must be strings, or 1 to n)";
    lua_State *L = e->L;
    if (e->depth == ENCODE_DEPTH)
        return refuse(e, "nested deeper than 64 levels, or inside itself");
    if (!lua_checkstack(L, 6))
        return refuse(e, "the Lua stack is full");

    bool array = has_meta(L, idx, NAME_ARRAY);
    lua_pushnil(L);
    if (!lua_next(L, idx)) {
        /* Whatever shows through such a table would be lost in silence. */
        if (!array && lua_getmetatable(L, idx))
            return refuse(e, "an empty table with a metatable cannot be JSON");
        orch_buf_str(e->out, array ? "[]" : "{}");
        return true;
    }
    if (array || lua_type(L, -2) != LUA_TSTRING) {
        size_t n = lua_objlen(L, idx), count = 0;
        do {
            lua_pop(L, 1);
            count++;
        } while (lua_next(L, idx));
        charge(L, count, 0);
        /* With n keys and t[1] to t[n] present there is no other key. */
        for (size_t i = 1; i <= n && count == n; i++) {
            lua_rawgeti(L, idx, (int)i);
            count += lua_isnil(L, -1);
            lua_pop(L, 1);
        }
        return count == n ? put_array(e, idx, n) : refuse(e, mixed);
    }

    struct step *here = &e->path[e->depth++];
    char before = '{';
    do {
        if (lua_type(L, -2) != LUA_TSTRING) {
            e->depth--;
            return refuse(e, mixed);
        }
        here->key = lua_tolstring(L, -2, &here->n);
        orch_buf_char(e->out, before);
        before = ',';
        if (!put_string(e, here->key, here->n, "key is not UTF-8"))
            return false;
        orch_buf_char(e->out, ':');
        if (!put_value(e, lua_gettop(L)))
            return false;
        lua_pop(L, 1);
    } while (lua_next(L, idx));
    orch_buf_char(e->out, '}');
    e->depth--;
    return true;
}

static bool put_value(struct enc *e, int idx)
{
    lua_State *L = e->L;
    const char *s;
    size_t n = 0;

    charge(L, 1, 0);
    s = lua_type(L, idx) == LUA_TSTRING ? lua_tolstring(L, idx, &n) : NULL;
    if (e->out->n - e->base + n > ENCODE_BYTES)
        return refuse(e, "more than 64 MiB of JSON");
    switch (lua_type(L, idx)) {
    case LUA_TBOOLEAN:
        orch_buf_str(e->out, lua_toboolean(L, idx) ? "true" : "false");
        return true;
    case LUA_TNUMBER:
        if (!isfinite(lua_tonumber(L, idx)))
            return refuse(e, "NaN and infinity cannot be JSON");
        orch_json_put_number(e->out, lua_tonumber(L, idx));
        return true;
    case LUA_TSTRING:
        return put_string(e, s, n, "string is not UTF-8");
    case LUA_TTABLE:
        return put_table(e, idx);
    case LUA_TNIL:
        return refuse(e, "nil cannot be JSON (orch.json.null is its null)");
    case LUA_TUSERDATA:
        if (is_null(L, idx)) {
            orch_buf_str(e->out, "null");
            return true;
        }
        if (has_meta(L, idx, NAME_INTEGER)) {
            orch_buf_str(e->out, lua_touserdata(L, idx));
            return true;
        }
        /* fallthrough */
    default:
        e->type = lua_typename(L, lua_type(L, idx));
        return refuse(e, " cannot be JSON");
    }
}

/* "args.items[3]: function cannot be JSON"; keys that are no identifiers as ["key"]. */
static void explain(const struct enc *e, char *why, size_t n_why)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789";
    enum { SHOWN = 200 };
    cleanup_buf struct orch_buf path = { 0 };
    for (unsigned i = 0; i < e->depth && path.n < SHOWN; i++) {
        const struct step *s = &e->path[i];
        if (!s->key) {
            orch_buf_printf(&path, "[%d]", s->index);
        } else if (s->n > 0 && s->n < SHOWN && strspn(s->key, letters) == s->n) {
            orch_buf_printf(&path, "%s%s", i ? "." : "", s->key);
        } else {
            orch_buf_char(&path, '[');
            orch_json_quote(&path, (struct orch_slice){ s->key, s->n < SHOWN ? s->n : SHOWN });
            orch_buf_char(&path, ']');
        }
    }
    snprintf(why, n_why, "%s%s: %s%s", path.n ? path.p : "value", path.n < SHOWN ? "" : "…",
             e->type ? e->type : "", e->reason);
}

int orch_lua_encode_json(lua_State *L, int idx, struct orch_buf *out, char *why, size_t n_why)
{
    struct enc e = { .L = L, .out = out, .base = out->n };
    int top = lua_gettop(L);
    bool ok = put_value(&e, idx > 0 || idx <= LUA_REGISTRYINDEX ? idx : top + idx + 1);
    if (!ok) {
        explain(&e, why, n_why); /* while the keys are on the stack */
        out->n = e.base;
        if (out->p)
            out->p[out->n] = 0;
    }
    lua_settop(L, top);
    return ok ? 0 : -EINVAL;
}

/* ---- orch.json */

static int json_encode(lua_State *L)
{
    luaL_checkany(L, 1);
    cleanup_buf struct orch_buf out = { 0 };
    char why[512];
    if (orch_lua_encode_json(L, 1, &out, why, sizeof why) < 0)
        return luaL_error(L, "orch.json.encode: %s", why);
    lua_pushlstring(L, out.p, out.n);
    return 1;
}

static int json_decode(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TSTRING);
    struct orch_slice text;
    text.p = lua_tolstring(L, 1, &text.n);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;

    charge(L, 1, text.n);
    if (orch_json_scan(&d, text, NULL, &fault) < 0) {
        lua_pushnil(L);
        lua_pushfstring(L, "%s at byte %d", fault.rule, (int)fault.byte);
        lua_pushstring(L, orch_class_name(ORCH_CLASS_FAILED));
        return 3;
    }
    bool policy = orch_state_context(L) == ORCH_CTX_POLICY;
    orch_lua_push_json(L, &d, 0, policy ? 0 : ORCH_LUA_JSON_KEEP_NULL);
    return 1;
}

static int json_array(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 1);
    if (!has_meta(L, 1, NAME_ARRAY)) {
        luaL_argcheck(L, !lua_getmetatable(L, 1), 1, "table has a metatable");
        push_meta(L, NAME_ARRAY);
        lua_setmetatable(L, 1);
    }
    return 1;
}

int orch_luaopen_json(lua_State *L)
{
    static const luaL_Reg functions[] = {
        { "encode", json_encode },
        { "decode", json_decode },
        { "array", json_array },
        { NULL, NULL },
    };
    lua_createtable(L, 0, 4);
    luaL_setfuncs(L, functions, 0);
    push_null(L);
    lua_setfield(L, -2, "null");
    return 1;
}
