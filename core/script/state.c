#include "state.h"

#include "../base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum {
    HOOK_EVERY = 500,         /* instructions between two looks from the hook */
    CHECK_EVERY = 4096,       /* steps between two looks from a C function */
    URGENT_STEPS = 64 * 1024, /* allocated this much (1 MiB) since the last look: look at once */
    LOOK_US = 2000,           /* between two looks at the CPU clock */
    FIRST_LOOK_MAX_US = 10000,
    NEST_MAX = 100,
    FREEZE_DEPTH_MAX = 16,
    SOURCE_MAX = 1024 * 1024,
    BOOT_MAX = 64 * 1024,
    ERROR_TEXT_MAX = 1024,
};

/* Only the addresses matter: the limit error's value, and the key that marks a frozen metatable. */
static const char limit_marker, frozen_marker;

static void *marker(const char *m)
{
    return (void *)(uintptr_t)m;
}

struct orch_state *orch_state_of(lua_State *L)
{
    void *ud;
    lua_getallocf(L, &ud);
    return ud;
}

lua_State *orch_state_lua(struct orch_state *s)
{
    return s->L;
}

enum orch_context orch_state_context(lua_State *L)
{
    return orch_state_of(L)->ctx;
}

void *orch_state_host(lua_State *L)
{
    return orch_state_of(L)->host;
}

size_t orch_state_memory(const struct orch_state *s)
{
    return s->memory;
}

/* LuaJIT collects when memory has doubled, which may be beyond the cap. Half of what is left each
 * time, so that a state near its cap does not collect all the time. */
static void set_collect_at(struct orch_state *s)
{
    size_t least = s->memory_max / 4 * 3;
    s->collect_at = s->memory < s->memory_max ? s->memory + (s->memory_max - s->memory) / 2
                                              : s->memory_max;
    if (s->collect_at < least)
        s->collect_at = least;
}

void orch_state_set_limits(struct orch_state *s, size_t memory_bytes, uint64_t steps,
                           int64_t cpu_ms)
{
    s->memory_max = memory_bytes;
    set_collect_at(s);
    s->steps_max = steps;
    s->cpu_us_max = cpu_ms * 1000;
}

/* ---- Limits
 * ------------------------------------------------------------------------------------ */

static int64_t clock_us(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void start_clock(struct orch_state *s)
{
    s->look_us = clock_us(CLOCK_MONOTONIC);
    s->cpu_us = s->meter->steps ? clock_us(CLOCK_THREAD_CPUTIME_ID) : -1;
    s->next_check = s->meter->steps + CHECK_EVERY;
}

/* The CPU clock is a system call. So in the first entry of a meter the monotonic clock counts until
 * LOOK_US have passed, which few entries take; everywhere else the CPU clock does: a busy machine
 * does not use up a budget. */
static void account(struct orch_state *s, bool leaving)
{
    int64_t now = clock_us(CLOCK_MONOTONIC), elapsed = now - s->look_us;
    if (elapsed < LOOK_US && !leaving)
        return;
    if (s->cpu_us < 0)
        s->meter->used_us += elapsed < FIRST_LOOK_MAX_US ? elapsed : FIRST_LOOK_MAX_US;
    if (s->cpu_us >= 0 || !leaving) {
        int64_t cpu = clock_us(CLOCK_THREAD_CPUTIME_ID);
        if (s->cpu_us >= 0)
            s->meter->used_us += cpu - s->cpu_us;
        s->cpu_us = cpu;
    }
    s->look_us = now;
}

static void hook(lua_State *L, lua_Debug *ar);

static void hook_every(struct orch_state *s, int n)
{
    s->armed = n == 1;
    lua_sethook(s->L, hook, LUA_MASKCOUNT, n);
}

/* lua_sethook only sets fields of the global state (it is made to be called from signal handlers),
 * so that the allocator may do this. */
static void look_soon(struct orch_state *s)
{
    if (!s->armed && s->depth && s->L && s->bounded)
        hook_every(s, 1);
}

static void *allocate(void *ud, void *p, size_t osize, size_t nsize)
{
    struct orch_state *s = ud;
    if (!nsize) {
        s->memory -= osize;
        free(p);
        return NULL;
    }
    if (nsize > osize) {
        size_t more = nsize - osize;
        /* Outside an entry it is host code that allocates, of sizes the host bounds: it must not
         * fail. The next entry then finds itself over the limit. */
        if (s->memory_max && (s->depth || s->guarded)) {
            size_t hard = s->memory_max + s->memory_max / 16;
            if (more > hard || s->memory > hard - more) {
                s->no_memory = true;
                look_soon(s);
                return NULL;
            }
            if (s->memory + more > s->collect_at)
                look_soon(s);
        }
        s->meter->steps += more / 16;
    }
    /* Moving a block is work as well: a deep stack is moved for every overflow that pcall catches,
     * and near its end the hook itself overflows, so that only looking at every instruction gets
     * through. */
    s->meter->steps += (osize < nsize ? osize : nsize) / 64;
    if (s->meter->steps >= s->next_check + URGENT_STEPS)
        look_soon(s);
    void *q = realloc(p, nsize);
    if (q)
        s->memory += nsize - osize;
    return q;
}

const char *orch_state_name(const struct orch_state *s)
{
    return s->ctx == ORCH_CTX_POLICY ? "policy" : s->ctx == ORCH_CTX_TOOL ? "tool" : "script";
}

/* " in path:line" of the innermost Lua function, or nothing. */
static void find_place(lua_State *L, char *out, size_t n)
{
    out[0] = 0;
    lua_Debug ar;
    for (int level = 0; level < 16 && lua_getstack(L, level, &ar); level++) {
        lua_getinfo(L, "Sl", &ar);
        if (ar.currentline <= 0 || strcmp(ar.source, ORCH_BOOT_NAME) == 0)
            continue;
        snprintf(out, n, " in %s:%d", *ar.source == '@' ? ar.source + 1 : ar.short_src,
                 ar.currentline);
        return;
    }
}

static void set_over(struct orch_state *s, lua_State *L, int code, const char *what)
{
    char place[160] = "";
    if (L)
        find_place(L, place, sizeof place);
    s->over = ORCH_CLASS_LIMIT;
    s->over_code = code;
    s->placed = *place;
    snprintf(s->over_msg, sizeof s->over_msg, "limit: %s %s used up%s", orch_state_name(s), what,
             place);
}

static void set_over_memory(struct orch_state *s, lua_State *L)
{
    char what[64];
    size_t n = s->memory_max;
    if (n % (1024 * 1024) == 0)
        snprintf(what, sizeof what, "memory %zu MiB", n / (1024 * 1024));
    else if (n % 1024 == 0)
        snprintf(what, sizeof what, "memory %zu KiB", n / 1024);
    else
        snprintf(what, sizeof what, "memory %zu bytes", n);
    set_over(s, L, ENOMEM, what);
}

/* Allocates nothing, so that it works when memory is gone. */
static int raise_over(lua_State *L, struct orch_state *s)
{
    hook_every(s, 1);
    lua_pushlightuserdata(L, marker(&limit_marker));
    return lua_error(L);
}

/* Clock, limits, memory; raises when one is used up. */
static void check(lua_State *L)
{
    struct orch_state *s = orch_state_of(L);
    if (!s->depth || !s->bounded)
        return;
    if (s->over)
        raise_over(L, s);
    struct orch_meter *m = s->meter;
    s->next_check = m->steps + CHECK_EVERY;
    if (s->steps_max && m->steps > s->steps_max) {
        char what[64];
        snprintf(what, sizeof what, "steps %llu", (unsigned long long)s->steps_max);
        set_over(s, L, ETIME, what);
        raise_over(L, s);
    }
    if (s->cpu_us_max) {
        account(s, false);
        if (m->used_us > s->cpu_us_max) {
            char what[64];
            snprintf(what, sizeof what, "time %lld ms", (long long)s->cpu_us_max / 1000);
            set_over(s, L, ETIME, what);
            raise_over(L, s);
        }
    }
    if (s->no_memory) {
        set_over_memory(s, L);
        raise_over(L, s);
    }
    if (s->memory_max && s->memory > s->collect_at) {
        m->steps += s->memory / 64;
        lua_gc(L, LUA_GCCOLLECT, 0);
        set_collect_at(s);
        if (s->memory > s->memory_max - s->memory_max / 16) {
            set_over_memory(s, L);
            raise_over(L, s);
        }
    }
}

static void hook(lua_State *L, lua_Debug *ar)
{
    (void)ar;
    struct orch_state *s = orch_state_of(L);
    uint64_t n = s->armed ? 1 : HOOK_EVERY;
    if (s->armed && !s->over)
        hook_every(s, HOOK_EVERY);
    if (!s->depth)
        return;
    s->meter->steps += n;
    check(L);
}

void orch_state_charge(lua_State *L, uint64_t n)
{
    struct orch_state *s = orch_state_of(L);
    s->meter->steps += n;
    if (s->meter->steps >= s->next_check)
        check(L);
}

struct orch_state *orch_state_nest(lua_State *L)
{
    struct orch_state *s = orch_state_of(L);
    if (s->nest >= NEST_MAX)
        luaL_error(L, "C functions that call back into Lua are nested more than %d deep", NEST_MAX);
    s->nest++;
    return s;
}

/* ---- Entries
 * ----------------------------------------------------------------------------------- */

bool orch_state_enter(struct orch_state *s, struct orch_entry *e, struct orch_meter *m)
{
    if (s->over)
        return false;
    *e = (struct orch_entry){ s->meter, s->task, s->task_thread, s->nest, m || !s->depth };
    s->task = NULL;
    s->task_thread = NULL;
    if (e->own && s->bounded) {
        if (s->depth)
            account(s, true);
        if (!m) {
            s->own = (struct orch_meter){ 0 };
            m = &s->own;
        }
        s->meter = m;
        start_clock(s);
    }
    s->depth++;
    /* A meter that others share may be used up already. */
    if (s->cpu_us_max && s->meter->used_us > s->cpu_us_max)
        look_soon(s);
    return true;
}

static void collect(lua_State *L, void *ud)
{
    (void)ud;
    lua_gc(L, LUA_GCCOLLECT, 0);
}

bool orch_state_leave(struct orch_state *s, struct orch_entry *e, struct orch_err *err)
{
    if (s->no_memory && !s->over && s->bounded)
        set_over_memory(s, NULL);
    bool hit = s->over;
    if (hit)
        orch_err_setc(err, s->over, s->over_code, "%s", s->over_msg);
    s->depth--;
    s->nest = e->nest;
    s->task = e->task;
    s->task_thread = e->task_thread;
    if (!e->own || !s->bounded)
        return hit;
    account(s, true);
    s->meter = e->meter;
    if (s->depth)
        start_clock(s);
    if (!hit)
        return false;
    bool memory = s->over_code == ENOMEM;
    s->over = 0;
    hook_every(s, HOOK_EVERY);
    if (memory) /* so that the next entry does not pay for this one's garbage */
        orch_state_protect(s, collect, NULL, NULL);
    s->no_memory = false;
    return true;
}

void orch_state_stop(struct orch_state *s, enum orch_class cls, int code, const char *msg)
{
    if (s->over || !s->depth || !s->bounded)
        return;
    s->over = cls;
    s->over_code = code;
    s->placed = true;
    snprintf(s->over_msg, sizeof s->over_msg, "%s", msg);
    hook_every(s, 1);
}

static int call_protected(lua_State *L)
{
    struct orch_state *s = orch_state_of(L);
    s->protect_fn(L, s->protect_ud);
    return 0;
}

int orch_state_protect(struct orch_state *s, orch_state_fn *fn, void *ud, struct orch_err *err)
{
    s->protect_fn = fn;
    s->protect_ud = ud;
    lua_rawgeti(s->L, LUA_REGISTRYINDEX, s->ref_protect);
    s->guarded++;
    int status = lua_pcall(s->L, 0, 0, 0);
    s->guarded--;
    return status ? orch_state_describe(s, status, NULL, err) : 0;
}

struct describe {
    struct orch_err *err;
    lua_State *T;
    int ref;
};

static const char *shorten(lua_State *L, const char *text, size_t n)
{
    if (n <= ERROR_TEXT_MAX)
        return text;
    lua_pushlstring(L, text, ERROR_TEXT_MAX);
    return lua_tostring(L, -1);
}

static void describe_value(lua_State *L, void *ud)
{
    struct describe *d = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, d->ref);
    size_t n;
    const char *text = orch_state_text(L, -1, &n);
    text = shorten(L, text, n);
    if (d->T) {
        luaL_traceback(L, d->T, text, 0);
        text = lua_tostring(L, -1);
    }
    orch_err_set(d->err, 0, "%s", text);
}

int orch_state_describe(struct orch_state *s, int status, lua_State *T, struct orch_err *err)
{
    if (status == LUA_ERRMEM && s->memory_max) {
        lua_pop(s->L, 1);
        set_over_memory(s, T);
        int r = orch_err_setc(err, ORCH_CLASS_LIMIT, ENOMEM, "%s", s->over_msg);
        if (!s->depth || !s->bounded) { /* no entry to be ended */
            s->over = 0;
            s->no_memory = false;
        }
        return r;
    }
    struct orch_err own;
    struct describe d = { err ? err : &own, T, s->ref_slot };
    lua_rawseti(s->L, LUA_REGISTRYINDEX, s->ref_slot);
    if (s->over)
        return orch_err_setc(err, s->over, s->over_code, "%s", s->over_msg);
    /* Set first, for when describing fails as well (an endless __tostring, no memory). */
    int r = orch_err_set(err, 0, "Lua error whose text cannot be had");
    s->protect_fn = describe_value;
    s->protect_ud = &d;
    lua_rawgeti(s->L, LUA_REGISTRYINDEX, s->ref_protect);
    if (lua_pcall(s->L, 0, 0, 0))
        lua_pop(s->L, 1);
    lua_pushnil(s->L);
    lua_rawseti(s->L, LUA_REGISTRYINDEX, s->ref_slot);
    return r;
}

static int add_traceback(lua_State *L)
{
    struct orch_state *s = orch_state_of(L);
    if (s->over || lua_type(L, 1) != LUA_TSTRING)
        return 1;
    size_t n;
    const char *text = lua_tolstring(L, 1, &n);
    luaL_traceback(L, L, shorten(L, text, n), 1);
    return 1;
}

/* A C function that was tail-called has no line to name any more: then the entry's function is
 * named. */
static void add_function(lua_State *L, int idx, struct orch_err *err)
{
    lua_Debug ar;
    lua_pushvalue(L, idx);
    lua_getinfo(L, ">S", &ar);
    if (*ar.source != '@')
        return;
    size_t n = strlen(err->msg);
    snprintf(err->msg + n, sizeof err->msg - n, " in %s:%d", ar.source + 1,
             ar.linedefined ? ar.linedefined : 1);
}

int orch_state_pcall(struct orch_state *s, int nargs, int nresults, struct orch_err *err)
{
    lua_State *L = s->L;
    int base = lua_gettop(L) - nargs;
    struct orch_entry e;
    if (!orch_state_enter(s, &e, NULL)) {
        lua_settop(L, base - 1);
        return orch_err_setc(err, s->over, s->over_code, "%s", s->over_msg);
    }
    /* base: function (kept), traceback, function, arguments */
    lua_pushvalue(L, base);
    lua_insert(L, base);
    lua_rawgeti(L, LUA_REGISTRYINDEX, s->ref_traceback);
    lua_insert(L, base + 1);
    int status = lua_pcall(L, nargs, nresults, base + 1);
    int r = status ? orch_state_describe(s, status, NULL, err) : 0;
    struct orch_err limit;
    if (orch_state_leave(s, &e, &limit)) {
        if (!s->placed)
            add_function(L, base, &limit);
        if (err)
            *err = limit;
        r = -limit.code;
    }
    if (r) {
        lua_settop(L, base - 1);
        return r;
    }
    lua_remove(L, base + 1);
    lua_remove(L, base);
    return 0;
}

/* ---- Loading
 * ----------------------------------------------------------------------------------- */

struct load {
    const char *path;
    struct orch_slice text;
    const char *sha256;
    struct orch_state *s;
    int status;
};

static void load_chunk(lua_State *L, void *ud)
{
    struct load *a = ud;
    const char *name = lua_pushfstring(L, "@%s", a->path);
    const struct orch_compiled *c = orch_compiled;
    while (c->n && !(a->sha256 && strcmp(c->sha256, a->sha256) == 0))
        c++;
    /* Another LuaJIT than the one it was made with refuses it. */
    if (!c->n || luaL_loadbufferx(L, c->code, c->n, name, "b"))
        a->status = luaL_loadbufferx(L, a->text.p, a->text.n, name, "t");
    if (a->status)
        lua_error(L);
    if (a->s->bounded) {
        lua_createtable(L, 0, 8);
        lua_rawgeti(L, LUA_REGISTRYINDEX, a->s->ref_env);
        lua_setmetatable(L, -2);
        lua_setfenv(L, -2);
    }
    lua_rawseti(L, LUA_REGISTRYINDEX, a->s->ref_slot);
    lua_settop(L, 0);
}

int orch_state_load(struct orch_state *s, const char *path, struct orch_slice text,
                    struct orch_err *err)
{
    return orch_state_load_known(s, path, text, NULL, err);
}

int orch_state_load_known(struct orch_state *s, const char *path, struct orch_slice text,
                          const char *sha256, struct orch_err *err)
{
    if (text.n > SOURCE_MAX)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EFBIG,
                             "%s: %zu bytes; a Lua file may have 1 MiB", path, text.n);
    if (text.n && text.p[0] == LUA_SIGNATURE[0])
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "%s: bytecode is not accepted, only source text", path);
    struct orch_entry e;
    struct orch_err limit;
    struct load a = { path, text, sha256, s, 0 };
    if (!orch_state_enter(s, &e, NULL))
        return orch_err_setc(err, s->over, s->over_code, "%s", s->over_msg);
    int r = orch_state_protect(s, load_chunk, &a, err);
    if (orch_state_leave(s, &e, &limit)) {
        if (err)
            *err = limit;
        return -limit.code;
    }
    if (r && a.status == LUA_ERRSYNTAX) {
        if (err) {
            err->cls = ORCH_CLASS_CONFIG;
            err->code = EINVAL;
        }
        return -EINVAL;
    }
    if (r)
        return r;
    lua_rawgeti(s->L, LUA_REGISTRYINDEX, s->ref_slot);
    lua_pushnil(s->L);
    lua_rawseti(s->L, LUA_REGISTRYINDEX, s->ref_slot);
    return 0;
}

int orch_state_env(lua_State *L, int fn_idx)
{
    lua_getfenv(L, fn_idx);
    return 1;
}

/* ---- Read-only tables
 * -------------------------------------------------------------------------- */

bool orch_state_frozen(lua_State *L, int idx)
{
    if (!lua_getmetatable(L, idx))
        return false;
    lua_pushlightuserdata(L, marker(&frozen_marker));
    lua_rawget(L, -2);
    bool frozen = lua_toboolean(L, -1);
    lua_pop(L, 2);
    return frozen;
}

static int refuse_write(lua_State *L)
{
    size_t n;
    const char *key = orch_state_text(L, 2, &n);
    if (lua_toboolean(L, lua_upvalueindex(1)))
        return luaL_error(
            L, "global '%s' cannot be set: globals are read-only after load, use a local", key);
    return luaL_error(L, "'%s' cannot be set: the table is read-only", key);
}

static void freeze(lua_State *L, int idx, int depth)
{
    luaL_checkstack(L, 12, "read-only tables");
    if (depth > FREEZE_DEPTH_MAX)
        luaL_error(L, "tables are nested more than %d deep", FREEZE_DEPTH_MAX);
    bool env = false;
    if (lua_getmetatable(L, idx)) {
        lua_rawgeti(L, LUA_REGISTRYINDEX, orch_state_of(L)->ref_env);
        env = lua_rawequal(L, -1, -2);
        lua_pop(L, 2);
        if (!env)
            return; /* frozen already, or a class of its own */
    } else if (lua_objlen(L, idx)) {
        return;
    }
    lua_newtable(L);
    int content = lua_gettop(L);
    lua_pushnil(L);
    while (lua_next(L, idx)) {
        if (!env && lua_istable(L, -1))
            freeze(L, lua_gettop(L), depth + 1);
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, content); /* content[key] = value */
        lua_pushvalue(L, -1);
        lua_pushnil(L);
        lua_rawset(L, idx); /* allowed while traversing */
    }
    lua_createtable(L, 0, 4);
    lua_pushvalue(L, content);
    lua_setfield(L, -2, "__index");
    lua_pushboolean(L, env);
    lua_pushcclosure(L, refuse_write, 1);
    lua_setfield(L, -2, "__newindex");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pushlightuserdata(L, marker(&frozen_marker));
    lua_pushboolean(L, 1);
    lua_rawset(L, -3);
    lua_setmetatable(L, idx);
    if (env) {
        lua_rawgeti(L, LUA_REGISTRYINDEX, orch_state_of(L)->ref_env);
        lua_setmetatable(L, content);
    }
    lua_settop(L, content - 1);
}

void orch_state_freeze(lua_State *L, int idx)
{
    if (idx < 0)
        idx = lua_gettop(L) + idx + 1;
    luaL_checktype(L, idx, LUA_TTABLE);
    freeze(L, idx, 0);
}

const char *orch_state_text(lua_State *L, int idx, size_t *n)
{
    if (idx < 0)
        idx = lua_gettop(L) + idx + 1;
    if (luaL_getmetafield(L, idx, "__tostring")) {
        ORCH_NEST(L);
        lua_pushvalue(L, idx);
        lua_call(L, 1, 1);
        if (!lua_isstring(L, -1))
            luaL_error(L, "'__tostring' must return a string");
        return lua_tolstring(L, -1, n);
    }
    switch (lua_type(L, idx)) {
    case LUA_TNUMBER:
    case LUA_TSTRING:
        lua_pushvalue(L, idx);
        break;
    case LUA_TBOOLEAN:
        lua_pushstring(L, lua_toboolean(L, idx) ? "true" : "false");
        break;
    case LUA_TNIL:
        lua_pushliteral(L, "nil");
        break;
    default:
        lua_pushfstring(L, "%s: %p", luaL_typename(L, idx), lua_topointer(L, idx));
    }
    return lua_tolstring(L, -1, n);
}

/* ---- Opening
 * ----------------------------------------------------------------------------------- */

struct open {
    struct orch_state *s;
    const struct orch_state_opts *o;
    orch_state_open_fn *open;
    struct orch_slice boot;
};

static int open_state(lua_State *L)
{
    const struct open *a = lua_touserdata(L, 1);
    struct orch_state *s = a->s;
    lua_settop(L, 0);
    lua_pushcfunction(L, add_traceback);
    s->ref_traceback = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_pushcfunction(L, call_protected);
    s->ref_protect = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_pushboolean(L, 0);
    s->ref_slot = luaL_ref(L, LUA_REGISTRYINDEX);
    /* Later unrefs must not have to make the free list's slot. */
    lua_pushboolean(L, 0);
    luaL_unref(L, LUA_REGISTRYINDEX, luaL_ref(L, LUA_REGISTRYINDEX));
    lua_pushlightuserdata(L, marker(&limit_marker));
    lua_pop(L, 1);

    a->open(L, a->o, a->boot);
    return 0;
}

static int die(lua_State *L)
{
    const char *text = lua_tostring(L, -1);
    orch_log(ORCH_ERROR, "Lua error outside a protected call: %s", text ? text : "(not a string)");
    abort();
}

struct orch_state *orch_state_make(const struct orch_state_opts *o, orch_state_open_fn *open,
                                   struct orch_err *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/boot.lua", o->lua_dir);
    cleanup_buf struct orch_buf boot = { 0 };
    int r = orch_read_file(AT_FDCWD, path, BOOT_MAX, &boot);
    if (r < 0) {
        orch_err_setc(err, ORCH_CLASS_CONFIG, -r,
                      "%s: %s; orch's Lua files are not installed there", path, strerror(-r));
        return NULL;
    }
    struct orch_state *s = orch_xcalloc(1, sizeof *s);
    s->ctx = o->ctx;
    s->bounded = o->ctx != ORCH_CTX_SCRIPT;
    s->host = o->host;
    s->meter = &s->own;
    s->next_check = UINT64_MAX - URGENT_STEPS;
    /* No cap yet: lua_newstate does not survive a failed allocation. */
    s->L = lua_newstate(allocate, s);
    if (!s->L) {
        orch_state_free(s);
        orch_err_setc(err, ORCH_CLASS_LIMIT, ENOMEM, "Lua: no memory for a new state");
        return NULL;
    }
    orch_state_set_limits(s, o->memory_bytes, o->steps, o->cpu_ms);
    lua_atpanic(s->L, die);
    lua_gc(s->L, LUA_GCSTOP, 0); /* nothing to collect while opening */
    struct open a = { s, o, open, { boot.p, boot.n } };
    s->guarded++; /* the cap counts */
    int status = lua_cpcall(s->L, open_state, &a);
    s->guarded--;
    if (status) {
        const char *text = lua_tostring(s->L, -1);
        if (s->no_memory)
            orch_err_setc(err, ORCH_CLASS_LIMIT, ENOMEM,
                          "limit: %s memory %zu bytes is too little to start", orch_state_name(s),
                          o->memory_bytes);
        else
            orch_err_set(err, 0, "Lua: %s", text ? text : "cannot open the libraries");
        orch_state_free(s);
        return NULL;
    }
    s->no_memory = false;
    lua_gc(s->L, LUA_GCRESTART, 0);
    if (s->bounded)
        hook_every(s, HOOK_EVERY);
    return s;
}

void orch_state_free(struct orch_state *s)
{
    if (!s)
        return;
    if (s->tasks)
        s->tasks_free(s->tasks);
    if (s->L) {
        lua_sethook(s->L, NULL, 0, 0);
        lua_close(s->L);
    }
    free(s);
}
