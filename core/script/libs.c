/* The libraries that a state opens. Bounded ones get only what is harmless and counted: the
 * language's base, math and bit, a little of os, and string and table functions of orch's own
 * (strlib). */
#include "state.h"

#include "../base/log.h"
#include "strlib.h"

#include <lauxlib.h>
#include <lualib.h>
#include <string.h>

/* What else luaopen_base opens (load, getfenv, newproxy, collectgarbage, …) would get around a
 * limit. */
static const char *const bounded_globals[] = {
    "_VERSION", "assert",       "bit",      "coroutine", "error",    "getmetatable",
    "ipairs",   "math",         "next",     "pcall",     "rawequal", "rawget",
    "select",   "setmetatable", "tonumber", "tostring",  "type",     "unpack",
};
static const char *const frozen_libraries[] = {
    "bit", "coroutine", "math", "os", "string", "table"
};

static int next_frozen(lua_State *L)
{
    lua_settop(L, 2);
    return lua_next(L, lua_upvalueindex(1)) ? 2 : 0;
}

/* Upvalue 1 is the interpreter's own next, which its loops recognise. */
static int bounded_pairs(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    if (orch_state_frozen(L, 1)) {
        lua_getmetatable(L, 1);
        lua_getfield(L, -1, "__index");
        lua_pushcclosure(L, next_frozen, 1);
    } else {
        lua_pushvalue(L, lua_upvalueindex(1));
    }
    lua_pushvalue(L, 1);
    lua_pushnil(L);
    return 3;
}

static int bounded_rawset(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    luaL_checkany(L, 2);
    luaL_checkany(L, 3);
    lua_settop(L, 3);
    if (orch_state_frozen(L, 1))
        return luaL_error(L, "rawset: the table is read-only");
    lua_rawset(L, 1);
    return 1;
}

/* print goes to the log, in scripts too: standard output belongs to what they serve. */
static int log_print(lua_State *L)
{
    enum { LINE = 4096 };
    char line[LINE];
    size_t used = 0;
    int n = lua_gettop(L);
    for (int i = 1; i <= n; i++) {
        size_t len;
        const char *text = orch_state_text(L, i, &len);
        if (i > 1 && used < LINE)
            line[used++] = '\t';
        if (len > LINE - used)
            len = LINE - used;
        memcpy(line + used, text, len);
        used += len;
        lua_settop(L, n);
        orch_state_charge(L, 10 + len / 16);
    }
    struct orch_state *s = orch_state_of(L);
    if (s->bounded)
        orch_log(ORCH_INFO, "%s: %.*s", orch_state_name(s), (int)used, line);
    else
        orch_log_print((struct orch_slice){ line, used });
    return 0;
}

/* Local time would make a policy depend on where it runs. Upvalue 1: os.date. */
static int bounded_date(lua_State *L)
{
    size_t n;
    const char *format = luaL_optlstring(L, 1, "!%c", &n);
    if (format[0] != '!')
        return luaL_error(L, "os.date gives UTC only here: write os.date(\"!%s\")",
                          n < 100 ? format : "...");
    luaL_argcheck(L, n <= 256, 1, "longer than 256 bytes");
    lua_settop(L, 2);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_pushstring(L, format);
    if (lua_isnoneornil(L, 2)) {
        lua_call(L, 1, 1);
    } else {
        lua_pushvalue(L, 2);
        lua_call(L, 2, 1);
    }
    return 1;
}

/* A task's own thread is hidden: resuming it is the run queue's business alone. */
static int running(lua_State *L)
{
    if (orch_state_of(L)->task_thread == L || lua_pushthread(L))
        lua_pushnil(L);
    return 1;
}

static int undefined_global(lua_State *L)
{
    if (lua_type(L, 2) == LUA_TSTRING)
        return luaL_error(L, "undefined global '%s'", lua_tostring(L, 2));
    return luaL_error(L, "undefined global (a %s)", luaL_typename(L, 2));
}

static void open_library(lua_State *L, lua_CFunction open, const char *name)
{
    lua_pushcfunction(L, open);
    lua_pushstring(L, name);
    lua_call(L, 1, 0);
}

static void open_bounded(lua_State *L)
{
    open_library(L, luaopen_base, "");
    open_library(L, luaopen_math, LUA_MATHLIBNAME);
    open_library(L, luaopen_bit, LUA_BITLIBNAME);
    open_library(L, luaopen_os, LUA_OSLIBNAME);

    lua_createtable(L, 0, 32);
    int g = lua_gettop(L);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bounded_globals); i++) {
        lua_getglobal(L, bounded_globals[i]);
        lua_setfield(L, g, bounded_globals[i]);
    }
    lua_getglobal(L, "next");
    lua_pushcclosure(L, bounded_pairs, 1);
    lua_setfield(L, g, "pairs");
    lua_pushcfunction(L, bounded_rawset);
    lua_setfield(L, g, "rawset");

    lua_getglobal(L, "os");
    lua_createtable(L, 0, 3);
    lua_getfield(L, -2, "time");
    lua_setfield(L, -2, "time");
    lua_getfield(L, -2, "clock");
    lua_setfield(L, -2, "clock");
    lua_getfield(L, -2, "date");
    lua_pushcclosure(L, bounded_date, 1);
    lua_setfield(L, -2, "date");
    lua_setfield(L, g, "os");

    orch_strlib_push(L);
    lua_setfield(L, g, "string");
    orch_tablib_push(L);
    lua_getfield(L, g, "unpack");
    lua_setfield(L, -2, "unpack");
    lua_setfield(L, g, "table");

    lua_pushvalue(L, g);
    lua_replace(L, LUA_GLOBALSINDEX);

    /* Environments of chunks. */
    lua_createtable(L, 0, 1);
    lua_pushvalue(L, g);
    lua_setfield(L, -2, "__index");
    orch_state_of(L)->ref_env = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_settop(L, g - 1);
}

static void open_trusted(lua_State *L, const struct orch_state_opts *o)
{
    luaL_openlibs(L);
    lua_getglobal(L, "package");
    lua_pushfstring(L, "%s/?.lua", o->lua_dir);
    if (o->script_dir) {
        lua_pushfstring(L, ";%s/?.lua", o->script_dir);
        lua_concat(L, 2);
    }
    lua_setfield(L, -2, "path");
    /* A C module must not be taken from the working directory. */
    lua_getfield(L, -1, "cpath");
    cleanup_buf struct orch_buf kept = { 0 };
    for (const char *p = lua_tostring(L, -1); *p;) {
        size_t n = strcspn(p, ";");
        if (*p == '/') {
            if (kept.n)
                orch_buf_char(&kept, ';');
            orch_buf_add(&kept, p, n);
        }
        p += n + (p[n] == ';');
    }
    lua_pushlstring(L, kept.n ? kept.p : "", kept.n);
    lua_setfield(L, -3, "cpath");
    lua_pop(L, 2);
    lua_newtable(L); /* so that a bounded state's environments have their reference in both kinds */
    orch_state_of(L)->ref_env = luaL_ref(L, LUA_REGISTRYINDEX);
}

static void seed_random(lua_State *L)
{
    uint32_t seed = 0;
    (void)orch_random(&seed, sizeof seed);
    lua_getglobal(L, "math");
    lua_getfield(L, -1, "randomseed");
    lua_pushnumber(L, seed);
    lua_call(L, 1, 0);
    lua_pop(L, 1);
}

static void open_libraries(lua_State *L, const struct orch_state_opts *o, struct orch_slice boot)
{
    bool bounded = orch_state_of(L)->bounded;
    if (bounded)
        open_bounded(L);
    else
        open_trusted(L, o);
    lua_pushcfunction(L, log_print);
    lua_setglobal(L, "print");
    seed_random(L);

    if (luaL_loadbufferx(L, boot.p, boot.n, ORCH_BOOT_NAME, "t"))
        lua_error(L);
    lua_pushboolean(L, bounded);
    lua_pushlightuserdata(L, (void *)(uintptr_t)&orch_wait_marker);
    lua_call(L, 2, 0);
    lua_getglobal(L, "coroutine");
    lua_pushcfunction(L, running);
    lua_setfield(L, -2, "running");
    lua_pop(L, 1);

    if (!bounded)
        return;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(frozen_libraries); i++) {
        lua_getglobal(L, frozen_libraries[i]);
        orch_state_freeze(L, -1);
        lua_pop(L, 1);
    }
    lua_pushvalue(L, LUA_GLOBALSINDEX);
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, undefined_global);
    lua_setfield(L, -2, "__index");
    lua_setmetatable(L, -2);
}

struct orch_state *orch_state_new(const struct orch_state_opts *o, struct orch_err *err)
{
    return orch_state_make(o, open_libraries, err);
}
