#include "args.h"

#include <lauxlib.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

int orch_push_err(lua_State *L, const struct orch_err *err)
{
    lua_pushnil(L);
    lua_pushstring(L, err->msg);
    lua_pushstring(L, orch_class_name(err->cls));
    return 3;
}

struct orch_opts orch_opts_begin(lua_State *L, int idx, const char *what)
{
    struct orch_opts o = { .L = L, .what = what };
    if (lua_isnoneornil(L, idx))
        return o;
    if (!lua_istable(L, idx))
        luaL_error(L, "%s: options must be a table, got %s", what, luaL_typename(L, idx));
    o.idx = idx < 0 ? lua_gettop(L) + idx + 1 : idx;
    return o;
}

/* Pushes the value of key; false (nothing pushed) when absent. */
static bool opt_get(struct orch_opts *o, const char *key)
{
    if (o->n_known < (int)ORCH_ARRAY_LEN(o->known) - 1)
        o->known[o->n_known++] = key;
    if (!o->idx)
        return false;
    lua_getfield(o->L, o->idx, key);
    if (!lua_isnil(o->L, -1))
        return true;
    lua_pop(o->L, 1);
    return false;
}

static void opt_type(struct orch_opts *o, const char *key, const char *wanted)
{
    luaL_error(o->L, "%s: %s must be %s, got %s", o->what, key, wanted, luaL_typename(o->L, -1));
}

const char *orch_opt_string(struct orch_opts *o, const char *key, const char *def)
{
    if (!opt_get(o, key))
        return def;
    size_t n;
    if (lua_type(o->L, -1) != LUA_TSTRING)
        opt_type(o, key, "a string");
    const char *s = lua_tolstring(o->L, -1, &n);
    if (strlen(s) != n)
        luaL_error(o->L, "%s: %s must not contain a zero byte", o->what, key);
    lua_pop(o->L, 1); /* still anchored in the option table */
    return s;
}

double orch_opt_number(struct orch_opts *o, const char *key, double def, double least, double most)
{
    if (!opt_get(o, key))
        return def;
    if (lua_type(o->L, -1) != LUA_TNUMBER)
        opt_type(o, key, "a number");
    double v = lua_tonumber(o->L, -1);
    if (!(v >= least && v <= most))
        luaL_error(o->L, "%s: %s must be from %f to %f, got %f", o->what, key, least, most, v);
    lua_pop(o->L, 1);
    return v;
}

bool orch_opt_bool(struct orch_opts *o, const char *key, bool def)
{
    if (!opt_get(o, key))
        return def;
    if (lua_type(o->L, -1) != LUA_TBOOLEAN)
        opt_type(o, key, "true or false");
    bool v = lua_toboolean(o->L, -1);
    lua_pop(o->L, 1);
    return v;
}

int64_t orch_check_duration_ms(lua_State *L, int idx, const char *what)
{
    int64_t ms = -1;
    if (lua_type(L, idx) == LUA_TNUMBER) {
        double v = lua_tonumber(L, idx);
        if (v >= 0 && v <= 1e9)
            ms = (int64_t)llround(v * 1000);
    } else if (lua_type(L, idx) == LUA_TSTRING) {
        ms = orch_parse_duration_ms(lua_tostring(L, idx));
    }
    if (ms < 0)
        luaL_error(L, "%s must be a duration: seconds or a text like \"250ms\", \"30s\", \"5m\"",
                   what);
    return ms;
}

int64_t orch_opt_duration_ms(struct orch_opts *o, const char *key, int64_t def)
{
    if (!opt_get(o, key))
        return def;
    char what[96];
    snprintf(what, sizeof what, "%s: %s", o->what, key);
    int64_t ms = orch_check_duration_ms(o->L, -1, what);
    lua_pop(o->L, 1);
    return ms;
}

int64_t orch_opt_size_bytes(struct orch_opts *o, const char *key, int64_t def)
{
    if (!opt_get(o, key))
        return def;
    int64_t bytes = -1;
    if (lua_type(o->L, -1) == LUA_TNUMBER) {
        double v = lua_tonumber(o->L, -1);
        if (v >= 0 && v <= 9e15)
            bytes = (int64_t)v;
    } else if (lua_type(o->L, -1) == LUA_TSTRING) {
        bytes = orch_parse_size_bytes(lua_tostring(o->L, -1));
    }
    if (bytes < 0)
        luaL_error(o->L, "%s: %s must be a size: bytes or a text like \"64K\", \"256M\"", o->what,
                   key);
    lua_pop(o->L, 1);
    return bytes;
}

bool orch_opt_push(struct orch_opts *o, const char *key, int type)
{
    if (!opt_get(o, key))
        return false;
    if (lua_type(o->L, -1) != type)
        opt_type(o, key, lua_typename(o->L, type));
    return true;
}

void orch_opts_done(struct orch_opts *o)
{
    if (!o->idx)
        return;
    o->known[o->n_known] = NULL;
    lua_pushnil(o->L);
    while (lua_next(o->L, o->idx)) {
        lua_pop(o->L, 1);
        const char *key = lua_type(o->L, -1) == LUA_TSTRING ? lua_tostring(o->L, -1) : NULL;
        bool found = false;
        for (int i = 0; key && i < o->n_known; i++)
            found = found || strcmp(key, o->known[i]) == 0;
        if (found)
            continue;
        if (!key)
            luaL_error(o->L, "%s: option keys must be strings", o->what);
        const char *near = orch_nearest(key, o->known);
        luaL_error(o->L, "%s: unknown option '%s'%s%s%s", o->what, key,
                   near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
    }
}

const char **orch_check_strings(lua_State *L, int idx, const char *what, size_t max)
{
    if (idx < 0)
        idx = lua_gettop(L) + idx + 1;
    if (!lua_istable(L, idx))
        luaL_error(L, "%s must be a list of strings, got %s", what, luaL_typename(L, idx));
    size_t n = lua_objlen(L, idx);
    if (n > max)
        luaL_error(L, "%s has %d entries, at most %d are allowed", what, (int)n, (int)max);
    const char **list = lua_newuserdata(L, (n + 1) * sizeof *list);
    for (size_t i = 0; i < n; i++) {
        lua_rawgeti(L, idx, (int)i + 1);
        size_t length = 0;
        if (lua_type(L, -1) != LUA_TSTRING)
            luaL_error(L, "%s[%d] must be a string, got %s", what, (int)i + 1,
                       luaL_typename(L, -1));
        list[i] = lua_tolstring(L, -1, &length); /* anchored in the list at idx */
        if (strlen(list[i]) != length)
            luaL_error(L, "%s[%d] must not contain a zero byte", what, (int)i + 1);
        lua_pop(L, 1);
    }
    list[n] = NULL;
    return list;
}
