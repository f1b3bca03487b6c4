#include "regex.h"

#include "state.h"

#include <errno.h>
#include <lauxlib.h>
#include <string.h>
#include <time.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#define TYPE "orch.regex"
#define PATTERN_BYTES (16 * 1024)
#define MATCH_LIMIT 100000
#define HEAP_KIB (8 * 1024)
#define DEADLINE_NS (100 * INT64_C(1000000))
#define DEADLINE_NS_PER_BYTE 100
#define LOOK_EVERY 64 /* callouts between two looks at the clock */
/* match data that served a longer subject may hold much memory: dropped */
#define SUBJECT_KEEP 4096

struct orch_regex {
    pcre2_code *code;
    pcre2_match_context *ctx;
    pcre2_match_data *data; /* NULL until the next match */
    uint64_t steps;         /* callouts of the current match */
    int64_t deadline_ns;
};

/* Of this thread's work: a busy machine does not use up the time. */
static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int count_step(pcre2_callout_block *block, void *ud)
{
    struct orch_regex *re = ud;
    (void)block;
    if (++re->steps % LOOK_EVERY == 0 && now_ns() > re->deadline_ns)
        return PCRE2_ERROR_CALLOUT;
    return 0;
}

void orch_regex_free(struct orch_regex *re)
{
    if (!re)
        return;
    pcre2_match_data_free(re->data);
    pcre2_match_context_free(re->ctx);
    pcre2_code_free(re->code);
    free(re);
}

struct orch_regex *orch_regex_compile(struct orch_slice pattern, struct orch_err *err)
{
    if (pattern.n > PATTERN_BYTES) {
        orch_err_set(err, E2BIG, "pattern of %zu bytes; at most %d are accepted", pattern.n,
                     PATTERN_BYTES);
        return NULL;
    }
    pcre2_compile_context *how = pcre2_compile_context_create(NULL);
    if (!how)
        abort();
    pcre2_set_compile_extra_options(how, PCRE2_EXTRA_ALT_BSUX);
    const uint32_t options = PCRE2_UTF | PCRE2_NEVER_UCP | PCRE2_NEVER_BACKSLASH_C |
                             PCRE2_DOLLAR_ENDONLY | PCRE2_ALT_BSUX | PCRE2_MATCH_UNSET_BACKREF |
                             PCRE2_AUTO_CALLOUT;
    int fault;
    PCRE2_SIZE at;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)(pattern.p ? pattern.p : ""), pattern.n, options,
                                     &fault, &at, how);
    pcre2_compile_context_free(how);
    if (!code) {
        PCRE2_UCHAR text[160];
        pcre2_get_error_message(fault, text, sizeof(text));
        orch_err_set(err, EINVAL, "%s at offset %zu", (const char *)text, (size_t)at);
        return NULL;
    }
    struct orch_regex *re = orch_xcalloc(1, sizeof(*re));
    re->code = code;
    re->ctx = pcre2_match_context_create(NULL);
    if (!re->ctx)
        abort();
    pcre2_set_match_limit(re->ctx, MATCH_LIMIT);
    pcre2_set_depth_limit(re->ctx, MATCH_LIMIT);
    pcre2_set_heap_limit(re->ctx, HEAP_KIB);
    pcre2_set_callout(re->ctx, count_step, re);
    return re;
}

static void start_clock(struct orch_regex *re, size_t n)
{
    re->steps = 0;
    re->deadline_ns = now_ns() + DEADLINE_NS + (int64_t)n * DEADLINE_NS_PER_BYTE;
}

/* 1: found, its ends in `ends`. 0: none. -EOVERFLOW, -EILSEQ, or -EINVAL for a start inside a
 * character. */
static int search(struct orch_regex *re, struct orch_slice s, size_t start, uint32_t options,
                  size_t ends[2])
{
    if (!re->data && !(re->data = pcre2_match_data_create(1, NULL)))
        abort();
    int r = pcre2_match(re->code, (PCRE2_SPTR)(s.p ? s.p : ""), s.n, start, options, re->data,
                        re->ctx);
    if (r >= 0)
        memcpy(ends, pcre2_get_ovector_pointer(re->data), 2 * sizeof(*ends));
    if (s.n > SUBJECT_KEEP || (r < 0 && r != PCRE2_ERROR_NOMATCH)) {
        pcre2_match_data_free(re->data);
        re->data = NULL;
    }
    if (r >= 0)
        return 1;
    if (r == PCRE2_ERROR_NOMATCH)
        return 0;
    if (r == PCRE2_ERROR_BADUTFOFFSET)
        return -EINVAL;
    /* What is left are the limits, and errors that must not pass for "no match" either. */
    return r <= PCRE2_ERROR_UTF8_ERR1 && r >= PCRE2_ERROR_UTF8_ERR21 ? -EILSEQ : -EOVERFLOW;
}

int orch_regex_replace(struct orch_regex *re, struct orch_slice in, struct orch_slice with,
                       struct orch_buf *out)
{
    const size_t before = out->n;
    size_t pos = 0, ends[2];
    int r, count = 0;
    start_clock(re, in.n);
    while ((r = search(re, in, pos, PCRE2_NOTEMPTY | (count ? PCRE2_NO_UTF_CHECK : 0), ends)) > 0) {
        orch_buf_add(out, in.p + pos, ends[0] - pos);
        orch_buf_slice(out, with);
        pos = ends[1];
        count++;
    }
    if (r < 0) {
        out->n = before;
        if (out->p)
            out->p[before] = 0;
        return r;
    }
    if (count)
        orch_buf_add(out, in.p + pos, in.n - pos);
    return count;
}

/* Lua */

static struct orch_regex *check_regex(lua_State *L)
{
    struct orch_regex **box = luaL_checkudata(L, 1, TYPE);
    if (!*box)
        luaL_error(L, "pattern was freed");
    return *box;
}

static struct orch_slice check_string(lua_State *L, int arg)
{
    struct orch_slice s;
    luaL_checktype(L, arg, LUA_TSTRING);
    s.p = lua_tolstring(L, arg, &s.n);
    return s;
}

static bool run(lua_State *L, struct orch_slice s, size_t start, size_t ends[2])
{
    struct orch_regex *re = check_regex(L);
    orch_state_charge(L, s.n / 8 + 1);
    start_clock(re, s.n);
    int r = search(re, s, start, 0, ends);
    orch_state_charge(L, re->steps);
    if (r >= 0)
        return r > 0;
    /* Without a position, since the message is shown to whoever sent the string. */
    if (r == -EOVERFLOW)
        lua_pushliteral(L, "pattern match limit");
    else
        lua_pushstring(L, r == -EILSEQ ? "pattern: the string is not valid UTF-8"
                                       : "pattern: the start is inside a character");
    return lua_error(L);
}

static int regex_call(lua_State *L)
{
    size_t ends[2];
    lua_pushboolean(L, run(L, check_string(L, 2), 0, ends));
    return 1;
}

static int regex_find(lua_State *L)
{
    size_t ends[2];
    struct orch_slice s = check_string(L, 2);
    lua_Number init = luaL_optnumber(L, 3, 1);
    luaL_argcheck(L, init >= 1 && init <= (lua_Number)s.n + 1, 3, "outside of the string");
    if (!run(L, s, (size_t)init - 1, ends))
        return 0;
    lua_pushnumber(L, (lua_Number)ends[0] + 1);
    lua_pushnumber(L, (lua_Number)ends[1]);
    return 2;
}

static int regex_gc(lua_State *L)
{
    struct orch_regex **box = luaL_checkudata(L, 1, TYPE);
    orch_regex_free(*box);
    *box = NULL;
    return 0;
}

static int compile(lua_State *L)
{
    struct orch_slice pattern = check_string(L, 1);
    orch_state_charge(L, pattern.n + 1);
    /* before the pattern, which it then owns */
    struct orch_regex **box = lua_newuserdata(L, sizeof(*box));
    *box = NULL;
    luaL_getmetatable(L, TYPE);
    lua_setmetatable(L, -2);
    struct orch_err err;
    *box = orch_regex_compile(pattern, &err);
    if (!*box) {
        lua_pushnil(L);
        lua_pushstring(L, err.msg);
        return 2;
    }
    size_t bytes = 0;
    pcre2_pattern_info((*box)->code, PCRE2_INFO_SIZE, &bytes);
    orch_state_charge(L, bytes / 16);
    lua_gc(L, LUA_GCSTEP, (int)(bytes / 1024)); /* the collector does not see this memory */
    return 1;
}

int orch_luaopen_regex(lua_State *L)
{
    if (luaL_newmetatable(L, TYPE)) {
        lua_pushcfunction(L, regex_call);
        lua_setfield(L, -2, "__call");
        lua_pushcfunction(L, regex_gc);
        lua_setfield(L, -2, "__gc");
        lua_pushboolean(L, 0);
        lua_setfield(L, -2, "__metatable");
        lua_createtable(L, 0, 1);
        lua_pushcfunction(L, regex_find);
        lua_setfield(L, -2, "find");
        lua_setfield(L, -2, "__index");
    }
    lua_pop(L, 1);
    lua_pushcfunction(L, compile);
    return 1;
}
