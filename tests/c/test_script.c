/* core/script: bounded and trusted states, string and table functions with a step budget, tasks,
 * reload. */
#include "base/log.h"
#include "base/dirwatch.h"
#include "script/task.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include <cmocka.h>

#include "odd_locale.h"

static struct orch_loop *loop;

static int make_loop(void **state)
{
    (void)state;
    loop = orch_loop_new(NULL);
    return loop ? 0 : -1;
}

static int free_loop(void **state)
{
    (void)state;
    orch_loop_free(loop);
    return 0;
}

static struct orch_state *state_with(enum orch_context ctx, size_t memory, uint64_t steps,
                                     int64_t cpu_ms)
{
    struct orch_err err = { 0 };
    struct orch_state_opts o = {
        .ctx = ctx, .memory_bytes = memory, .steps = steps, .cpu_ms = cpu_ms, .lua_dir = "lua"
    };
    struct orch_state *s = orch_state_new(&o, &err);
    if (!s)
        fail_msg("orch_state_new: %s", err.msg);
    return s;
}

static struct orch_state *policy_state(void)
{
    return state_with(ORCH_CTX_POLICY, 64 << 20, 0, 10000);
}

static struct orch_state *trusted_state(void)
{
    return state_with(ORCH_CTX_SCRIPT, 0, 0, 0);
}

/* Loads and calls; the first result is left on the stack. */
static int eval(struct orch_state *s, const char *code, struct orch_err *err)
{
    int r = orch_state_load(s, "test.lua", orch_slice_str(code), err);
    return r < 0 ? r : orch_state_pcall(s, 0, 1, err);
}

static void expect_text(struct orch_state *s, const char *code, const char *expected)
{
    struct orch_err err;
    if (eval(s, code, &err) < 0)
        fail_msg("%s\n%s", code, err.msg);
    const char *text = lua_tostring(orch_state_lua(s), -1);
    assert_string_equal(text ? text : "(none)", expected);
    lua_pop(orch_state_lua(s), 1);
}

static void expect_error(struct orch_state *s, const char *code, const char *expected)
{
    struct orch_err err = { 0 };
    int top = lua_gettop(orch_state_lua(s));
    if (eval(s, code, &err) >= 0)
        fail_msg("no error: %s", code);
    if (!strstr(err.msg, expected))
        fail_msg("%s\nexpected: %s\n     got: %s", code, expected, err.msg);
    assert_int_equal(lua_gettop(orch_state_lua(s)), top);
}

/* ---- Contexts
 * ------------------------------------------------------------------------------------ */

/* The exact surface of a bounded state: what appears here was thought about. */
static const char bounded_surface[] =
    "_VERSION assert bit.arshift bit.band bit.bnot bit.bor bit.bswap bit.bxor bit.lshift bit.rol "
    "bit.ror bit.rshift bit.tobit "
    "bit.tohex coroutine.create coroutine.isyieldable coroutine.resume coroutine.running "
    "coroutine.status coroutine.wrap "
    "coroutine.yield error getmetatable ipairs math.abs math.acos math.asin math.atan math.atan2 "
    "math.ceil math.cos math.cosh "
    "math.deg math.exp math.floor math.fmod math.frexp math.huge math.ldexp math.log math.log10 "
    "math.max math.min math.modf "
    "math.pi math.pow math.rad math.random math.randomseed math.sin math.sinh math.sqrt math.tan "
    "math.tanh next os.clock "
    "os.date os.time pairs pcall print rawequal rawget rawset select setmetatable string.byte "
    "string.char string.find "
    "string.format string.gmatch string.gsub string.len string.lower string.match string.rep "
    "string.reverse string.sub "
    "string.upper table.concat table.insert table.remove table.sort table.unpack tonumber tostring "
    "type unpack xpcall";

static const char list_surface[] =
    "local g = ...\n"
    "local names = {}\n"
    "for name, v in pairs(g) do\n"
    "  if type(v) == 'table' then\n"
    "    for sub in pairs(v) do names[#names + 1] = name .. '.' .. sub end\n"
    "  else names[#names + 1] = name end\n"
    "end\n"
    "table.sort(names)\n"
    "return table.concat(names, ' ')";

static void test_surface(void **state)
{
    (void)state;
    static const enum orch_context contexts[] = { ORCH_CTX_POLICY, ORCH_CTX_TOOL };
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = state_with(contexts[i], 64 << 20, 0, 1000);
        lua_State *L = orch_state_lua(s);
        assert_int_equal(orch_state_context(L), contexts[i]);
        struct orch_err err;
        assert_int_equal(orch_state_load(s, "list.lua", orch_slice_str(list_surface), &err), 0);
        lua_pushvalue(L, LUA_GLOBALSINDEX);
        assert_int_equal(orch_state_pcall(s, 1, 1, &err), 0);
        assert_string_equal(lua_tostring(L, -1), bounded_surface);
        orch_state_free(s);
    }
}

static void test_trusted(void **state)
{
    (void)state;
    struct orch_err err = { 0 };
    setenv("LUA_CPATH", "./?.so;/usr/lib/x/?.so;lib/?.so", 1);
    struct orch_state_opts o = {
        .ctx = ORCH_CTX_SCRIPT, .lua_dir = "lua", .script_dir = "/srv/scripts", .host = &err
    };
    struct orch_state *s = orch_state_new(&o, &err);
    unsetenv("LUA_CPATH");
    assert_non_null(s);
    assert_ptr_equal(orch_state_host(orch_state_lua(s)), &err);
    expect_text(s, "return package.path", "lua/?.lua;/srv/scripts/?.lua");
    expect_text(s, "return package.cpath", "/usr/lib/x/?.so");
    expect_text(s, "return tostring(io and debug and jit.status() and require 'ffi' and true)",
                "true");
    expect_text(s, "undefined_name = 1 return tostring(undefined_name) .. tostring(other)", "1nil");
    expect_error(s, "error('x')", "test.lua:1: x\nstack traceback:");
    orch_state_free(s);

    o.lua_dir = "/nonexistent";
    assert_null(orch_state_new(&o, &err));
    assert_non_null(strstr(err.msg, "/nonexistent/boot.lua: No such file"));
}

static void test_strict(void **state)
{
    (void)state;
    struct orch_state *s = policy_state();
    expect_error(s, "\nreturn foo", "test.lua:2: undefined global 'foo'");
    expect_error(s, "return io", "undefined global 'io'");
    expect_error(s, "return string.dump(print)", "nil value");
    expect_text(s, "a = 1; function b() return a end; return b()", "1");
    expect_error(s, "return a", "undefined global 'a'"); /* every chunk its own environment */
    expect_error(s, "string.rep = nil", "'rep' cannot be set: the table is read-only");
    expect_error(s, "string.new = 1", "'new' cannot be set");
    expect_error(s, "rawset(math, 'pi', 3)", "read-only");
    expect_error(s, "table.insert(string, 1)", "read-only");
    expect_error(s, "table.sort(bit)", "read-only");
    expect_error(s, "setmetatable(string, {})", "protected metatable");
    expect_error(s, "getmetatable('').__index = {}", "");
    expect_text(s, "return tostring(getmetatable(''))", "false");
    expect_text(s, "return ('x'):upper() .. ('%d'):format(3)", "X3");
    /* its own global, nobody else's */
    expect_text(s, "string = { rep = 1 } return string.rep", "1");
    expect_text(s, "return string.rep('x', 2)", "xx");
    expect_text(s, "local n = 0 for k, v in pairs(string) do n = n + 1 end return n", "13");
    expect_text(
        s, "local t = {} for k, v in pairs { a = 1, 2 } do t[#t + 1] = tostring(k) end return #t",
        "2");
    expect_error(s, "pairs(nil)", "bad argument #1 to 'pairs'");
    expect_text(s, "return type(os.time()) .. type(os.clock()) .. #os.date('!%Y-%m-%d')",
                "numbernumber10");
    expect_error(s, "os.date('%Y')", "UTC only here: write os.date(\"!%Y\")");
    expect_error(s, "return x.y.z +", "test.lua:1:");
    struct orch_err err;
    assert_int_equal(orch_state_load(s, "bad.lua", ORCH_SLICE("x ="), &err), -EINVAL);
    assert_int_equal(err.cls, ORCH_CLASS_CONFIG);
    assert_int_equal(strncmp(err.msg, "bad.lua:1:", 10), 0);
    assert_true(orch_state_load(s, "code.lua", ORCH_SLICE("\033LJ\002"), &err) < 0);
    assert_non_null(strstr(err.msg, "bytecode is not accepted"));
    cleanup_free char *big = orch_xcalloc(1, (1 << 20) + 1);
    memset(big, ' ', (1 << 20) + 1);
    assert_int_equal(orch_state_load(s, "big.lua", (struct orch_slice){ big, (1 << 20) + 1 }, &err),
                     -EFBIG);
    assert_int_equal(orch_state_load(s, "big.lua", (struct orch_slice){ big, 1 << 20 }, &err), 0);
    orch_state_free(s);
}

static void freeze_env(lua_State *L, void *ud)
{
    (void)ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, 4242);
    orch_state_env(L, -1);
    orch_state_freeze(L, -1);
}

static void test_frozen_environment(void **state)
{
    (void)state;
    struct orch_state *s = policy_state();
    lua_State *L = orch_state_lua(s);
    struct orch_err err;
    assert_int_equal(orch_state_load(s, "tool.lua",
                                     ORCH_SLICE("count, list = 0, { 1, 2, 3 }\n"
                                                "return function(how)\n"
                                                "  if how == 'read' then list[4] = 4 return count "
                                                ".. #list .. string.upper('x') end\n"
                                                "  if how == 'undefined' then return typo end\n"
                                                "  if how == 'new' then fresh = 1 end\n"
                                                "  count = count + 1\n"
                                                "end"),
                                     &err),
                     0);
    lua_pushvalue(L, -1);
    lua_rawseti(L, LUA_REGISTRYINDEX, 4242);
    assert_int_equal(orch_state_pcall(s, 0, 1, &err), 0);
    assert_int_equal(orch_state_protect(s, freeze_env, NULL, &err), 0);
    static const char *const calls[][2] = {
        { "read", NULL },
        { "undefined", "tool.lua:4: undefined global 'typo'" },
        { "new", "tool.lua:5: global 'fresh' cannot be set" },
        { "old", "tool.lua:6: global 'count' cannot be set" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(calls); i++) {
        lua_pushvalue(L, -1);
        lua_pushstring(L, calls[i][0]);
        int r = orch_state_pcall(s, 1, 1, &err);
        if (!calls[i][1]) {
            assert_int_equal(r, 0);
            assert_string_equal(lua_tostring(L, -1), "04X");
            lua_pop(L, 1);
        } else {
            assert_true(r < 0);
            assert_non_null(strstr(err.msg, calls[i][1]));
        }
    }
    orch_state_free(s);
}

static char logged[256];

static void keep_line(void *ud, const char *line, size_t n)
{
    (void)ud;
    snprintf(logged, sizeof logged, "%.*s", (int)n, line);
}

static void test_print(void **state)
{
    (void)state;
    orch_log_use(&(struct orch_log){ ORCH_INFO, false, keep_line, NULL });
    struct orch_state *s = policy_state();
    expect_text(s,
                "print('a', 1, nil, setmetatable({}, { __tostring = function() return 'T' end })) "
                "return ''",
                "");
    assert_string_equal(logged, "orch: policy: a\t1\tnil\tT\n");
    expect_text(s, "print(('x'):rep(1e6)) return ''", "");
    orch_log_use(NULL);
    orch_state_free(s);
}

static void test_errors(void **state)
{
    (void)state;
    struct orch_state *s = policy_state();
    expect_error(s, "local function f() error('here') end\nf()",
                 "test.lua:1: here\nstack traceback:\n");
    expect_error(s, "error({})", "table: 0x");
    expect_error(s, "error(setmetatable({}, { __tostring = function() return 'mine' end }))",
                 "mine");
    expect_error(s, "error(setmetatable({}, { __tostring = function() error('again') end }))",
                 "text cannot be had");
    expect_error(s, "error()", "nil");
    expect_error(s, "error(('x'):rep(1e5))", "xxxx");
    expect_text(s, "local ok, e = pcall(error, 'x', 0) return tostring(ok) .. e", "falsex");
    expect_text(s,
                "local ok, e = xpcall(function() error('x', 0) end, function(m) return m .. '!' "
                "end) return e",
                "x!");
    expect_text(s, "return select('#', xpcall(function(...) return ... end, print, 1, nil, nil))",
                "4");
    expect_text(s, "local ok, e = xpcall(error, function(m) error('worse', 0) end) return e",
                "worse");
    expect_text(s, "return select('#', pcall(function() end))", "1");
    orch_state_free(s);
}

/* ---- Budgets
 * ------------------------------------------------------------------------------------- */

static int64_t cpu_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Each would run (nearly) for ever. `memory`: the memory budget may end it first; else time ends it
 * and the place is named. */
static const struct {
    const char *code;
    bool memory;
} hangs[] = {
    { "while true do end", 0 },
    { "repeat until false", 0 },
    { "::a:: goto a", 0 },
    { "for i = 1, math.huge do end", 0 },
    { "local function f() return f() end f()", 0 },
    { "local t = setmetatable({}, { __index = function() while true do end end }) return t.x", 0 },
    { "local t = setmetatable({}, { __newindex = function() while true do end end }) t.x = 1", 0 },
    { "local m = { __eq = function() while true do end end } return setmetatable({}, m) == "
      "setmetatable({}, m)",
      0 },
    { "local m = { __lt = function() while true do end end } return setmetatable({}, m) < "
      "setmetatable({}, m)",
      0 },
    { "local m = { __lt = function() while true do end end } table.sort { setmetatable({}, m), "
      "setmetatable({}, m) }",
      0 },
    { "return setmetatable({}, { __concat = function() while true do end end }) .. 'x'", 0 },
    { "setmetatable({}, { __call = function() while true do end end })()", 0 },
    { "return -setmetatable({}, { __unm = function() while true do end end })", 0 },
    { "return tostring(setmetatable({}, { __tostring = function() while true do end end }))", 0 },
    { "return ('%s'):format(setmetatable({}, { __tostring = function() while true do end end }))",
      0 },
    { "print(setmetatable({}, { __tostring = function() while true do end end }))", 0 },
    { "error(setmetatable({}, { __tostring = function() while true do end end }))", 0 },
    { "for w in ('a'):gmatch('a') do while true do end end", 0 },
    { "while true do for w in ('a b c'):gmatch('%a') do end end", 0 },
    { "for a in ('a'):rep(1e6):gmatch('a-b') do end", 0 },
    { "for i in function() return 1 end do end", 0 },
    { "return ('a'):gsub('a', function() while true do end end)", 0 },
    { "local s = ('a'):gsub('a', setmetatable({}, { __index = function() while true do end end }))",
      0 },
    { "return (('a'):rep(65536):gsub(('a*'):rep(20) .. 'b', ''))", 0 },
    { "return ('a'):rep(65536):find(('a*'):rep(20) .. 'b')", 0 },
    { "return ('a'):rep(65536):match(('a-'):rep(20) .. 'b')", 0 },
    { "return ('a'):rep(65536):match(('a?'):rep(80) .. ('a'):rep(80) .. 'b')", 0 },
    { "return ('('):rep(1e5):find('%b()')", 0 },
    { "return ('ab'):rep(1e5):find('(a[^c]*)%1c')", 0 },
    { "return ('x'):rep(1e6):find('[' .. ('ab'):rep(1e5) .. ']')", 0 },
    { "local s = ('x'):rep(1e6) while true do s:find('y', 1, true) end", 0 },
    { "local s = ('x'):rep(1e6) while true do s:find('y') end", 0 },
    { "local s = ('x'):rep(1e6) while true do s:upper() end", 0 },
    { "local s = ('x'):rep(1e6) while true do s:reverse() end", 0 },
    { "local s = ('x'):rep(1e6) while true do s:sub(2) end", 0 },
    { "local s = ('x'):rep(1e6) while true do s:gsub('.', '%0%0') end", 1 },
    { "local s = ('x'):rep(1e6) while true do ('%q'):format(s) end", 0 },
    { "local s = ('x'):rep(7000) while true do s:byte(1, -1) end", 0 },
    { "local s = ('x'):rep(1e6) while true do local a = s .. 'y' end", 0 },
    { "local a, b = ('x'):rep(1e6) .. 'a', ('x'):rep(1e6) .. 'b' while true do local c = a < b end",
      0 },
    { "while true do ('x'):rep(1e6) end", 0 },
    { "while true do ('x'):rep(10, ('y'):rep(1e5)) end", 0 },
    { "local t = {} for i = 1, 349e3 do t[i] = (i * 7919) % 1000003 end while true do "
      "table.sort(t) end",
      1 },
    { "local t = {} for i = 1, 5e4 do t[i] = i end while true do table.sort(t, function(a, b) "
      "return true end) end",
      1 },
    { "table.sort({ 1, 2 }, function() while true do end end)", 0 },
    { "local t = {} for i = 1, 1e5 do t[i] = 'abc' end while true do table.concat(t, ',') end", 0 },
    { "local t = {} while true do table.insert(t, 1, 0) end", 0 },
    { "table.insert({}, -5e8, 0)", 1 },
    { "local t = {} for i = 1, 1e5 do t[i] = i end while true do table.remove(t, 1) t[#t + 1] = 1 "
      "end",
      0 },
    { "local t = {} for i = 1, 7000 do t[i] = i end while true do unpack(t) end", 0 },
    { "local t = {} for i = 1, 3e5 do t[i] = i end while next(t) do t[next(t)] = nil end while "
      "true do end",
      1 },
    { "while true do pcall(error) end", 0 },
    { "while true do pcall(function() while true do end end) end", 0 },
    { "local function f() pcall(f) while true do end end f()", 0 },
    { "local function f() while true do pcall(f) end end f()", 0 },
    { "return pcall(function() while true do end end)", 0 },
    { "xpcall(error, function() while true do end end)", 0 },
    { "xpcall(function() while true do end end, function() while true do end end)", 0 },
    { "while true do xpcall(error, function() error() end) end", 0 },
    { "coroutine.wrap(function() while true do end end)()", 0 },
    { "coroutine.resume(coroutine.create(function() while true do end end))", 0 },
    { "while true do coroutine.resume(coroutine.create(function() while true do end end)) end", 0 },
    { "local function f(n) if n == 0 then while true do end end coroutine.wrap(f)(n - 1) end f(50)",
      0 },
    { "local co = coroutine.wrap(function() while true do coroutine.yield() end end) while true do "
      "co() end",
      0 },
    { "while true do coroutine.wrap(function() coroutine.yield() end)() end", 1 },
    { "return ('x'):rep(1e9)", 1 },
    { "return ('x'):rep(64 * 1024 * 1024)", 1 },
    { "local s = 'x' while true do s = s .. s end", 1 },
    { "local s = '' while true do s = s .. 'x' end", 1 },
    { "local t = {} for i = 1, 1e5 do t[i] = ('x'):rep(1e4) end return table.concat(t)", 1 },
    { "local t = {} for i = 1, 100 do t[i] = ('x'):rep(4e5) end while true do table.concat(t) end",
      1 },
    { "local t = {} for i = 1, 1e7 do t[i] = i end while true do end", 1 },
    { "local t = {} for i = 1, 1e7 do t[i] = {} end", 1 },
    { "local t = {} for i = 1, 1e7 do t['k' .. i] = true end", 1 },
    { "local t = {} while true do t = { t } end", 1 },
    { "local f while true do local g = f f = function() return g end end", 1 },
    { "local t = {} while true do t[#t + 1] = coroutine.create(print) end", 1 },
    { "while true do pcall(string.rep, 'x', 1e9) end", 1 },
    { "local t = {} while true do pcall(function() while true do t[#t + 1] = ('x'):rep(1e4) .. #t "
      "end end) end",
      1 },
    { "while true do local t = {} for i = 1, 1e4 do t[i] = {} end end", 0 },
};

static void test_hangs(void **state)
{
    (void)state;
    enum { BUDGET_MS = 100 };
    int64_t worst = 0;
    size_t worst_at = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(hangs); i++) {
        struct orch_err err = { 0 };
        struct orch_state *s = state_with(ORCH_CTX_POLICY, 64 << 20, 0, BUDGET_MS);
        if (orch_state_load(s, "hang.lua", orch_slice_str(hangs[i].code), &err) < 0)
            fail_msg("%s", err.msg);
        int64_t start = cpu_ms();
        int r = orch_state_pcall(s, 0, 0, &err);
        int64_t ms = cpu_ms() - start;
        if (ms > worst) {
            worst = ms;
            worst_at = i;
        }
        if (r >= 0 || err.cls != ORCH_CLASS_LIMIT)
            fail_msg("not ended by a limit: %s\n%d %s", hangs[i].code, r, err.msg);
        const char *time_text = "limit: policy time 100 ms used up in hang.lua:1";
        if (strncmp(err.msg, time_text, strlen(time_text)) != 0 &&
            !(hangs[i].memory && strncmp(err.msg, "limit: policy memory 64 MiB used up", 35) == 0))
            fail_msg("%s\n%s", hangs[i].code, err.msg);
        if (ms > 50 * BUDGET_MS) /* of the CPU, which may be a slow one */
            fail_msg("%lld ms: %s (%s)", (long long)ms, hangs[i].code, err.msg);
        /* The next entry has a budget of its own and nothing is left over. */
        expect_text(s, "local n = 0 for i = 1, 1e4 do n = n + i end return n", "50005000");
        orch_state_free(s);
    }
    print_message("slowest to end: %lld ms of %d: %s\n", (long long)worst, BUDGET_MS,
                  hangs[worst_at].code);
}

/* Not endless, but made to break an interpreter's C stack or a limit: a plain error, caught by
 * pcall. */
static void test_depth(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        { "local function f() return 1 + f() end f()", "stack overflow" },
        { "local function f(x) return (('x'):gsub('x', f)) end f()", "nested more than 100 deep" },
        { "local m = {} m.__lt = function() table.sort { setmetatable({}, m), setmetatable({}, m) "
          "} end\n"
          "return setmetatable({}, m) < setmetatable({}, m)",
          "nested more than 100 deep" },
        { "local m = {} m.__tostring = function(x) return ('%s'):format(x) end return "
          "('%s'):format(setmetatable({}, m))",
          "nested more than 100 deep" },
        { "local function f() coroutine.wrap(f)() end f()",
          "coroutines are nested more than 100 deep" },
        { "local function f() local ok, e = coroutine.resume(coroutine.create(f)) if not ok then "
          "error(e, 0) end end f()",
          "nested more than 100 deep" },
        { "return ('x'):rep(1000):match(('x?'):rep(300))", "pattern too complex" },
        { "return ('x'):rep(1000):match(('('):rep(40))", "too many captures" },
        { "return ('%99999999d'):format(1)", "invalid format" },
        { "return ('%.999f'):format(1)", "invalid format" },
        { "return ('x'):rep(1e10)", "resulting string is too long" },
        { "return ('x'):rep(1e5):byte(1, -1)", "string slice too long" },
        { "local t = {} for i = 1, 1e5 do t[i] = i end return unpack(t)",
          "too many results to unpack" },
        { "local t = setmetatable({}, {}) getmetatable(t).__index = t return t.x",
          "loop in gettable" },
        { "return coroutine.resume(nil)", "bad argument #1 to 'resume'" },
    };
    struct orch_state *s = policy_state();
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++)
        expect_error(s, cases[i][0], cases[i][1]);
    cleanup_buf struct orch_buf deep = { 0 };
    orch_buf_str(&deep, "return ");
    for (int i = 0; i < 100000; i++)
        orch_buf_char(&deep, i % 2 ? '(' : '{');
    expect_error(s, deep.p, "test.lua:1: ");
    expect_text(s, "return select(2, pcall(('x'):rep(9).match, 'x', '%')) .. ''",
                "malformed pattern (ends with '%')");
    orch_state_free(s);
}

static void test_steps(void **state)
{
    (void)state;
    struct orch_state *s = state_with(ORCH_CTX_TOOL, 1536 << 10, 100000, 0);
    expect_error(s, "while true do end", "limit: tool steps 100000 used up in test.lua:1");
    expect_error(s, "while true do ('x'):rep(1000):find('y') end",
                 "limit: tool steps 100000 used up in test.lua:1");
    expect_error(s, "local t = {} while true do t[#t + 1] = #t end",
                 "limit: tool steps 100000 used up");
    expect_text(s, "for i = 1, 2e4 do end return ''", "");
    orch_state_set_limits(s, 1536 << 10, 0, 0);
    expect_error(s, "return ('x'):rep(1e7)", "limit: tool memory 1536 KiB used up");
    expect_error(s, "local t = {} while true do t = { t } end",
                 "limit: tool memory 1536 KiB used up in test.lua:1");
    /* Garbage is collected before the memory counts as used up. */
    expect_text(s, "local s for i = 1, 2000 do s = ('x'):rep(1e5) .. i end return #s", "100004");
    expect_text(s,
                "local t = {} for i = 1, 18 do t[i] = ('x'):rep(5e4) .. i end\n"
                "for i = 1, 200 do local s = ('y'):rep(5e4) .. i end return #t",
                "18");
    lua_gc(orch_state_lua(s), LUA_GCCOLLECT, 0);
    orch_state_set_limits(s, orch_state_memory(s) + 100, 0, 0);
    expect_error(s, "local t = {} for i = 1, 1e4 do t[i] = {} end", "limit: tool memory ");
    orch_state_free(s);
}

static int calls;

static int count_call(lua_State *L)
{
    (void)L;
    calls++;
    return 0;
}

/* Not one more instruction: what follows the pcall does not run. */
static void test_nothing_after_limit(void **state)
{
    (void)state;
    static const char *const codes[] = {
        "pcall(function() while true do end end) called()",
        "xpcall(function() while true do end end, called) called()",
        "pcall(pcall, pcall, function() while true do end end) called()",
        "coroutine.resume(coroutine.create(function() while true do end end)) called()",
        "pcall(string.rep, 'x', 1e9) called()",
        "pcall(string.find, ('a'):rep(1e5), ('a-'):rep(9) .. 'b') called()",
    };
    struct orch_state *s = state_with(ORCH_CTX_POLICY, 64 << 20, 0, 20);
    lua_pushcfunction(orch_state_lua(s), count_call);
    lua_setglobal(orch_state_lua(s), "called");
    calls = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(codes); i++)
        expect_error(s, codes[i], "limit: policy ");
    assert_int_equal(calls, 0);
    orch_state_free(s);
}

static int nested_entry(lua_State *L)
{
    struct orch_state *s = orch_state_of(L);
    struct orch_err err = { 0 };
    lua_rawgeti(orch_state_lua(s), LUA_REGISTRYINDEX, 4242);
    int r = orch_state_pcall(s, 0, 0, &err);
    lua_pushboolean(L, r == 0);
    return 1;
}

static void test_nested_entry(void **state)
{
    (void)state;
    struct orch_state *s = state_with(ORCH_CTX_POLICY, 64 << 20, 0, 50);
    lua_State *L = orch_state_lua(s);
    struct orch_err err;
    lua_pushcfunction(L, nested_entry);
    lua_setglobal(L, "nested");
    assert_int_equal(orch_state_load(s, "inner.lua", ORCH_SLICE("while true do end"), &err), 0);
    lua_rawseti(L, LUA_REGISTRYINDEX, 4242);
    expect_error(s, "while true do pcall(nested) end",
                 "limit: policy time 50 ms used up in inner.lua:1");
    orch_state_free(s);
}

/* ---- string and table against the interpreter's own
 * ------------------------------------------------ */

/* Runs in both kinds of state; the texts must be the same. */
static const char compare_strings[] =
    "local out = {}\n"
    "local function show(...)\n"
    "  local t = {}\n"
    "  for i = 1, select('#', ...) do\n"
    "    local v = select(i, ...)\n"
    "    t[i] = type(v) == 'string' and '<' .. v .. '>' or tostring(v)\n"
    "  end\n"
    "  out[#out + 1] = table.concat(t, ' ')\n"
    "end\n"
    "local function try(f, ...)\n"
    "  local r = { pcall(f, ...) }\n"
    "  if not r[1] then show 'error' else show(unpack(r, 1, 12)) end\n"
    "end\n"
    /* A generator of patterns from pieces, the same sequence in both states. */
    "local seed = SEED\n"
    "local function rnd(n) seed = (seed * 16807) % 2147483647 return seed % n + 1 end\n"
    "local pieces = { 'a', 'b', '.', '%a', '%d', '%s', '[ab]', '[^a]', '[a-c]', '[%d_]', '[]x]', "
    "'[^]]', '[a-]', '%w', '%A', '%.',\n"
    "  '*', '+', '-', '?', '*', '?', '(', ')', '()', '%1', '%2', '^', '$', '%b()', '%f[%a]', "
    "'%f[^%a]', '%', '[', ']', '%x', '%p',\n"
    "  '%c', '%u', '%l', '%z', '%g', '%D', '[%]]', '[%a-z]', '[+--]', '(', ')' }\n"
    "local letters = { 'a', 'b', 'c', 'x', '1', '_', ' ', '(', ')', '.', ']', '-', '%', 'A', "
    "'\\n', '+' }\n"
    "local replacements = { '', 'x', '<%0>', '%1', '%1%2', '%%', { a = 'A', b = false, ab = 7 }, "
    "function(a, b) return b end,\n"
    "  function() return nil end, '%9' }\n"
    "for i = 1, 4000 do\n"
    "  local p, s = {}, {}\n"
    "  for k = 1, rnd(6) do p[k] = pieces[rnd(#pieces)] end\n"
    "  for k = 1, rnd(10) - 1 do s[k] = letters[rnd(#letters)] end\n"
    "  p, s = table.concat(p), table.concat(s)\n"
    "  try(string.find, s, p)\n"
    "  try(string.find, s, p, rnd(15) - 7)\n"
    "  try(string.match, s, p, rnd(5) - 3)\n"
    "  try(string.gsub, s, p, replacements[rnd(#replacements)], rnd(3) == 1 and rnd(3) or nil)\n"
    "  try(function() local t = {} for a, b in s:gmatch(p) do t[#t + 1] = tostring(a) .. '/' .. "
    "tostring(b) end\n"
    "    return table.concat(t, ';') end)\n"
    "  try(string.find, s, s:sub(2, 4), rnd(5), true)\n"
    "  try(string.sub, s, rnd(15) - 7, rnd(15) - 7)\n"
    "  try(string.byte, s, rnd(9) - 5, rnd(9) - 5)\n"
    "end\n"
    "local formats = { '%d', '%5d', '%-5d|', '%05d', '%+d', '% d', '%i', '%u', '%x', '%X', '%#x', "
    "'%o', '%c', '%e', '%.3f', '%10.2f',\n"
    "  '%g', '%G', '%.14g', '%a', '%5.1s|', '%-8s|', '%s', '%q', '%%', '%.0f', '%99d', '%.20f', "
    "'%5c|', '%z', '%', '%123d', '%.3d', '%E',\n"
    "  'a%sb%sc' }\n"
    "local values = { 0, 1, -1, 3.75, -2.5, 1e15, 1e100, -1e100, 255, 65, 2^53, 2^63, -2^63, 1/0, "
    "-1/0, '12', 'text', 'a\\0b', 'q\"\\\\\\n\\r\\1272', '', true, false }\n"
    "for _, f in ipairs(formats) do for _, v in ipairs(values) do try(string.format, f, v) end "
    "try(string.format, f) end\n"
    "try(string.format, '%s', nil)\n"
    "try(string.format, '%s %d', 'x', 1)\n"
    "try(string.format, '%5s|%-5s|%.2s', 'ab', 'cd', 'efgh')\n"
    "try(string.format, '%s', setmetatable({}, { __tostring = function() return 'obj' end }))\n"
    "for _, a in ipairs { { 'ab', 3 }, { 'ab', 0 }, { 'ab', -1 }, { '', 5 }, { 'a', 3, ',' }, { "
    "'a', 1, ',' }, { '', 3, 'x' }, { 'abc', 100, '--' } } do\n"
    "  try(string.rep, unpack(a)) end\n"
    "try(string.char) try(string.char, 72, 105) try(string.char, 256) try(string.char, -1)\n"
    "try(string.upper, 'aZ\\228{`') try(string.lower, 'aZ\\228{@[') try(string.reverse, 'abc') "
    "try(string.len, 'a\\0b')\n"
    "for i = 1, 300 do\n"
    "  local t, n = {}, rnd(20) - 1\n"
    "  for k = 1, n do t[k] = rnd(3) == 1 and rnd(10) or rnd(1000) end\n"
    "  try(table.concat, t, ',') try(table.concat, t, '', rnd(5), rnd(8) - 2)\n"
    "  table.sort(t) show(table.concat(t, ' '))\n"
    "  table.sort(t, function(a, b) return a > b end) show(table.concat(t, ' '))\n"
    "  try(table.insert, t, rnd(99)) show(#t)\n"
    "  if n > 3 then try(table.insert, t, rnd(n), 'in') try(table.remove, t, rnd(n + 3)) "
    "try(table.remove, t) end\n"
    "  show(table.concat(t, ' '))\n"
    "end\n"
    "try(table.remove, {}) try(table.remove, { 1 }, 5) try(table.insert, {}) try(table.insert, { 1 "
    "}, 1, 2, 3)\n"
    "try(table.concat, { 1, {}, 3 }) try(table.concat, { 1, 2 }, ',', 1, 3) try(table.sort, { 1, "
    "'x' }) try(table.sort, { 3, 1 }, 5)\n"
    "try(table.insert, nil, 1) try(string.rep) try(string.rep, 'x', 'y') try(string.find, nil, "
    "'x') try(string.gsub, 'x', 'x')\n"
    "try(string.gsub, 'x', 'x', print, 0) try(string.gsub, 'x', 'x', true) try(string.gsub, 'abc', "
    "'%w', function() return {} end)\n"
    "return table.concat(out, '\\n')";

static void test_same_as_lua(void **state)
{
    (void)state;
    struct orch_state *mine = state_with(ORCH_CTX_POLICY, 256 << 20, 0, 60000),
                      *theirs = trusted_state();
    for (int seed = 1; seed <= 5; seed++) {
        struct orch_err err;
        char code[32];
        snprintf(code, sizeof code, "local SEED = %d ", seed * 7919);
        cleanup_buf struct orch_buf b = { 0 };
        orch_buf_str(&b, code);
        orch_buf_str(&b, compare_strings);
        if (eval(mine, b.p, &err) < 0 || eval(theirs, b.p, &err) < 0)
            fail_msg("%s", err.msg);
        const char *a = lua_tostring(orch_state_lua(mine), -1),
                   *e = lua_tostring(orch_state_lua(theirs), -1);
        for (int line = 1; *a || *e; line++) {
            size_t na = strcspn(a, "\n"), ne = strcspn(e, "\n");
            if (na != ne || memcmp(a, e, na) != 0)
                fail_msg("seed %d, line %d\nexpected %.*s\n     got %.*s", seed, line, (int)ne, e,
                         (int)na, a);
            a += na + (a[na] == '\n');
            e += ne + (e[ne] == '\n');
        }
        lua_pop(orch_state_lua(mine), 1);
        lua_pop(orch_state_lua(theirs), 1);
    }
    orch_state_free(mine);
    orch_state_free(theirs);
}

/* Where the functions are meant to differ (strlib.h). */
static void test_own_ways(void **state)
{
    (void)state;
    struct orch_state *s = policy_state();
    expect_text(s, "return tostring(('a\\0b'):find('\\0b'))", "2");
    expect_text(s, "return (('a\\0b'):gsub('%z', '.'))", "a.b");
    expect_text(s, "return tostring(('abc'):match('a\\0c'))", "nil");
    expect_text(s, "return ('%.0f %g'):format(0/0, -(0/0))", "nan nan");
    expect_error(s, "return ('x'):gsub('x', '%')", "invalid replacement string");
    expect_text(s,
                "local t = {} for i = 1, 100 do t[i] = { i % 3, i } end\n"
                "table.sort(t, function(a, b) return a[1] < b[1] end)\n"
                "for i = 2, 100 do if t[i][1] == t[i - 1][1] and t[i][2] < t[i - 1][2] then return "
                "'unstable' end end\n"
                "return 'stable'",
                "stable");
    expect_text(s,
                "local t = { 3, 1, 2 } pcall(table.sort, t, function() error('no') end) return "
                "table.concat(t)",
                "312");
    expect_text(s, "local t = { 3, 1, 2 } table.sort(t, function() return true end) return #t",
                "3");
    expect_text(s,
                "local t = { 3, 1, 2 } table.sort(t, function(a, b) t[1] = nil return a < b end) "
                "return table.concat(t)",
                "123");
    expect_text(s, "return table.unpack({ 1, 2 })", "1");
    orch_state_free(s);
}

/* ---- Cleanup across errors, allocation failures
 * ------------------------------------------------------ */

static int cleanups;

static void count_cleanup(int *p)
{
    cleanups += *p;
}

static int raises_with_cleanup(lua_State *L)
{
    ORCH_CLEANUP(count_cleanup) int one = 1;
    if (lua_gettop(L) == 0)
        return luaL_error(L, "thrown with %d", one);
    luaL_checktype(L, 1, LUA_TTABLE);
    return 0;
}

/* The scope cleanup that the whole program relies on runs when a Lua error passes. */
static void test_cleanup_runs(void **state)
{
    (void)state;
    struct orch_state *s = policy_state();
    lua_State *L = orch_state_lua(s);
    struct orch_err err;
    cleanups = 0;
    lua_pushcfunction(L, raises_with_cleanup);
    assert_true(orch_state_pcall(s, 0, 0, &err) < 0);
    assert_int_equal(cleanups, 1);
    lua_pushcfunction(L, raises_with_cleanup);
    lua_pushnumber(L, 1);
    assert_true(orch_state_pcall(s, 1, 0, &err) < 0);
    assert_int_equal(cleanups, 2);
    lua_pushcfunction(L, raises_with_cleanup);
    lua_setglobal(L, "raises");
    expect_error(s, "for i = 1, 10 do pcall(raises) end coroutine.wrap(raises)()", "thrown with 1");
    assert_int_equal(cleanups, 13);
    orch_state_free(s);
}

static lua_Alloc real_alloc;
static long fail_at, n_allocs; /* the fail_at-th allocation fails, and all after it when fail_all */
static bool fail_all;

static void *failing_alloc(void *ud, void *p, size_t osize, size_t nsize)
{
    if (nsize > osize) {
        n_allocs++;
        if (fail_at && (n_allocs == fail_at || (fail_all && n_allocs > fail_at))) {
            ((struct orch_state *)ud)->no_memory = true; /* as the real one does when it refuses */
            return NULL;
        }
    }
    return real_alloc(ud, p, osize, nsize);
}

static void count_done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    (void)L;
    (void)nres;
    (void)err;
    ++*(int *)ud;
}

static void install_orch(lua_State *L, void *ud)
{
    (void)ud;
    lua_newtable(L);
    orch_luaopen_task(L);
    lua_getfield(L, -1, "sleep");
    lua_setfield(L, -3, "sleep");
    lua_setfield(L, -2, "task");
    lua_setglobal(L, "orch");
}

/* A bit of everything; every step may fail. */
static void use_state(struct orch_state *s)
{
    static const char code[] =
        "local t = {} for i = 1, 20 do t[i] = ('x'):rep(i * 50):gsub('x', 'yy', 3) .. ('%d "
        "%s'):format(i, {}) end\n"
        "table.sort(t) local all = table.concat(t, ',')\n"
        "pcall(error, {}) xpcall(error, function(m) return { m } end)\n"
        "local co = coroutine.wrap(function(a) orch.sleep(0) coroutine.yield(a .. 'x') end) "
        "co('y')\n"
        "local a = orch.task.spawn(function(...) orch.sleep(0) return ... end, 1, all)\n"
        "if a then a:join() end\n"
        "error('end ' .. #all)";
    if (orch_state_protect(s, install_orch, NULL, NULL) < 0 ||
        orch_state_load(s, "use.lua", ORCH_SLICE(code), NULL) < 0)
        return;
    int done = 0;
    orch_task_start(loop, s, 0, count_done, &done);
    for (int i = 0; i < 20 && !done; i++)
        orch_loop_step(loop, 20);
    assert_int_equal(done, 1);
}

static void test_no_memory(void **state)
{
    (void)state;
    for (int all = 0; all < 2; all++) {
        fail_all = all;
        long total = 1;
        for (fail_at = 0; fail_at <= total; fail_at += fail_at < 50 ? 1 : 3) {
            struct orch_state *s = state_with(ORCH_CTX_TOOL, 64 << 20, 0, 10000);
            void *ud;
            real_alloc = lua_getallocf(orch_state_lua(s), &ud);
            n_allocs = 0;
            lua_setallocf(orch_state_lua(s), failing_alloc, ud);
            use_state(s);
            if (!fail_at)
                total = n_allocs; /* the first round counts */
            lua_setallocf(orch_state_lua(s), real_alloc, ud);
            orch_state_free(s);
        }
        assert_true(total > 100);
    }
    /* A cap that is reached at every point of opening. */
    bool opened = false;
    int refused = 0;
    for (size_t cap = 1; !opened && cap < 200000; cap += 211) {
        struct orch_err err;
        struct orch_state_opts o = { .ctx = ORCH_CTX_TOOL, .memory_bytes = cap, .lua_dir = "lua" };
        struct orch_state *s = orch_state_new(&o, &err);
        opened = s;
        refused += !s;
        if (!s)
            assert_int_equal(err.cls, ORCH_CLASS_LIMIT);
        orch_state_free(s);
    }
    assert_true(opened);
    assert_true(refused > 50);
}

/* The collector at its most aggressive: what is not anchored goes at once. */
static void test_gc_stress(void **state)
{
    (void)state;
    static const enum orch_context contexts[] = { ORCH_CTX_TOOL, ORCH_CTX_SCRIPT };
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = state_with(contexts[i], 0, 0, 0);
        lua_gc(orch_state_lua(s), LUA_GCSETPAUSE, 0);
        lua_gc(orch_state_lua(s), LUA_GCSETSTEPMUL, 1000000);
        for (int k = 0; k < 5; k++)
            use_state(s);
        orch_state_free(s);
    }
}

/* ---- Tasks
 * ------------------------------------------------------------------------------------------- */

struct op {
    struct orch_wait wait;
    int cancelled, pushed;
};

static struct op ops[8];
static size_t n_ops;

static void cancel_op(void *ud)
{
    ((struct op *)ud)->cancelled++;
}

static int push_op(lua_State *L, void *ud)
{
    struct op *op = ud;
    op->pushed++;
    lua_pushliteral(L, "ready");
    lua_pushinteger(L, op - ops);
    return 2;
}

static int push_raising(lua_State *L, void *ud)
{
    ((struct op *)ud)->pushed++;
    return luaL_error(L, "cannot push");
}

static int lua_wait(lua_State *L)
{
    struct op *op = &ops[n_ops++];
    *op = (struct op){ 0 };
    return orch_task_wait(L, cancel_op, op, &op->wait);
}

struct outcome {
    int done;
    char text[512]; /* results joined by a space */
    struct orch_err err;
};

static void keep_outcome(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct outcome *o = ud;
    o->done++;
    o->text[0] = 0;
    if (err)
        o->err = *err;
    for (int i = lua_gettop(L) - nres + 1; !err && i <= lua_gettop(L); i++) {
        size_t used = strlen(o->text);
        const char *text = lua_isnil(L, i)       ? "nil"
                           : lua_isboolean(L, i) ? (lua_toboolean(L, i) ? "true" : "false")
                           : lua_isstring(L, i)  ? lua_tostring(L, i)
                                                 : luaL_typename(L, i);
        snprintf(o->text + used, sizeof o->text - used, "%s%s", used ? " " : "", text);
    }
}

static struct orch_state *task_state(enum orch_context ctx)
{
    struct orch_state *s = state_with(ctx, ctx == ORCH_CTX_SCRIPT ? 0 : 64 << 20, 0,
                                      ctx == ORCH_CTX_SCRIPT ? 0 : 100);
    assert_int_equal(orch_state_protect(s, install_orch, NULL, NULL), 0);
    lua_pushcfunction(orch_state_lua(s), lua_wait);
    lua_setglobal(orch_state_lua(s), "wait");
    n_ops = 0;
    return s;
}

static struct orch_task *start(struct orch_state *s, const char *code, struct outcome *o)
{
    struct orch_err err;
    *o = (struct outcome){ 0 };
    if (orch_state_load(s, "task.lua", orch_slice_str(code), &err) < 0)
        fail_msg("%s", err.msg);
    return orch_task_start(loop, s, 0, keep_outcome, o);
}

static void settle(struct outcome *o)
{
    for (int64_t start = orch_now_us(); !o->done && orch_now_us() - start < 60000000;)
        orch_loop_step(loop, 50);
    assert_int_equal(o->done, 1);
}

static void turns(int n)
{
    while (n--)
        orch_loop_step(loop, 0);
}

static const enum orch_context task_contexts[] = { ORCH_CTX_TOOL, ORCH_CTX_SCRIPT };

static void test_task_runs(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        assert_null(start(s, "return 1, 'two', nil", &o));
        assert_int_equal(o.done, 1);
        assert_string_equal(o.text, "1 two nil");
        assert_null(start(s, "local t = nil\nreturn t.x", &o));
        assert_int_equal(o.done, 1);
        assert_non_null(strstr(o.err.msg, "task.lua:2: attempt to index"));
        assert_non_null(strstr(o.err.msg, "stack traceback:\n\ttask.lua: in main chunk"));
        assert_null(start(s, "error({})", &o));
        assert_non_null(strstr(o.err.msg, "table: 0x"));

        struct orch_task *t = start(s, "local a, b = wait() return a, b, select('#', wait())", &o);
        assert_non_null(t);
        assert_int_equal(n_ops, 1);
        orch_task_ready(ops[0].wait, push_op, &ops[0]);
        orch_task_ready(ops[0].wait, push_op, &ops[0]); /* twice: once */
        assert_int_equal(ops[0].pushed, 0);             /* not from inside */
        turns(1);
        assert_int_equal(ops[0].pushed, 1);
        orch_task_ready(ops[0].wait, push_op, &ops[0]); /* stale */
        turns(1);
        assert_int_equal(n_ops, 2);
        assert_int_equal(o.done, 0);
        orch_task_ready(ops[1].wait, push_op, &ops[1]);
        settle(&o);
        assert_string_equal(o.text, "ready 0 2");
        orch_task_ready(ops[1].wait, push_op, &ops[1]); /* its task is over */
        turns(2);
        assert_int_equal(ops[1].pushed, 1);
        assert_int_equal(ops[0].cancelled + ops[1].cancelled, 0);
        orch_state_free(s);
    }
}

static void test_task_waits_anywhere(void **state)
{
    (void)state;
    static const char *const codes[][2] = {
        { "return select(2, pcall(wait))", "ready 0" },
        { "for a in wait do return a end", "ready" },
        { "return setmetatable({}, { __index = function() return (wait()) end }).x", "ready" },
        { "return coroutine.wrap(function(a) return a, wait() end)('arg')", "arg ready 0" },
        { "local co = coroutine.create(function(a) local b = coroutine.yield(a) return b, wait() "
          "end)\n"
          "local _, a = coroutine.resume(co, 1)\n"
          "return a, coroutine.resume(co, 2)",
          "1 true 2 ready 0" },
        { "local function f(n) if n == 0 then return wait() end return coroutine.wrap(f)(n - 1) "
          "end return f(90)",
          "ready 0" },
        { "local ok, e = pcall(table.sort, { 1, 2 }, wait) return e",
          "may not wait here: inside a callback of a C function (sort, gsub, …)" },
        { "return coroutine.running()", "nil" },
        { "return coroutine.wrap(function() return type(coroutine.running()) end)()", "thread" },
    };
    for (size_t i = 0; i < 2; i++)
        for (size_t k = 0; k < ORCH_ARRAY_LEN(codes); k++) {
            struct orch_state *s = task_state(task_contexts[i]);
            struct outcome o;
            if (start(s, codes[k][0], &o)) {
                orch_task_ready(ops[0].wait, push_op, &ops[0]);
                settle(&o);
            }
            if (strcmp(o.text, codes[k][1]) != 0)
                fail_msg("%s\nexpected %s\ngot %s %s", codes[k][0], codes[k][1], o.text, o.err.msg);
            orch_state_free(s);
        }
}

static void test_task_may_not_wait(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        expect_error(s, "wait()", "may not wait here: not inside a task");
        assert_int_equal(ops[0].cancelled, 1); /* so that the operation is undone */
        expect_error(s, "orch.sleep(1)", "inside a task only");
        expect_error(s, "orch.task.spawn(print)", "inside a task only");
        start(s, "coroutine.yield(1)", &o);
        assert_non_null(strstr(o.err.msg, "coroutine.yield outside a coroutine"));
        /* The wait's yield cannot pass the sort: it is abandoned, and the next one works. */
        n_ops = 0;
        start(s,
              "local co = coroutine.wrap(wait) local ok, e = pcall(table.sort, { 1, 2 }, "
              "function() co() end)\n"
              "return tostring(ok), wait()",
              &o);
        assert_int_equal(n_ops, 2);
        orch_task_ready(ops[0].wait, push_op, &ops[0]);
        turns(2);
        assert_int_equal(o.done, 0);
        assert_int_equal(ops[0].cancelled, 1);
        orch_task_ready(ops[1].wait, push_op, &ops[1]);
        settle(&o);
        assert_string_equal(o.text, "false ready 1");
        /* Results that cannot be pushed. */
        n_ops = 0;
        start(s, "return wait()", &o);
        orch_task_ready(ops[0].wait, push_raising, &ops[0]);
        settle(&o);
        assert_string_equal(o.text, "nil cannot push failed");
        assert_int_equal(ops[0].pushed, 1);
        orch_state_free(s);
    }
}

static void test_task_cancel(void **state)
{
    (void)state;
    static const char cancel_self[] = "local self = orch.task.spawn(function() local _ = wait() "
                                      "end)\nself:cancel() return self:join()";
    for (size_t i = 0; i < 2; i++) {
        bool trusted = task_contexts[i] == ORCH_CTX_SCRIPT;
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        /* While it waits. */
        struct orch_task *t = start(s,
                                    "local r, why, class = wait()\nafter = class\nlocal ok, e = "
                                    "pcall(wait)\nlast = e return 1",
                                    &o);
        assert_int_equal(ops[0].cancelled, 0);
        orch_task_cancel(t, "test");
        orch_task_cancel(t, "again");
        assert_int_equal(ops[0].cancelled, 1);
        assert_int_equal(o.done, 0); /* never from inside */
        orch_task_ready(ops[0].wait, push_op, &ops[0]);
        settle(&o);
        assert_int_equal(ops[0].pushed, 0);
        assert_int_equal(o.err.cls, ORCH_CLASS_CANCELLED);
        assert_string_equal(o.err.msg, "cancelled: test");
        if (trusted) { /* it could clean up, but not wait again */
            expect_text(s, "return after", "cancelled");
            expect_text(s, "return last", "cancelled: test");
        }
        /* Between event and resumption. */
        n_ops = 0;
        t = start(s, "wait()", &o);
        orch_task_ready(ops[0].wait, push_op, &ops[0]);
        orch_task_cancel(t, "late");
        settle(&o);
        assert_int_equal(ops[0].pushed, 0);
        assert_int_equal(ops[0].cancelled, 1);
        assert_int_equal(o.err.cls, ORCH_CLASS_CANCELLED);
        /* Inside a coroutine, and a pcall that must not keep it alive in a bounded state. */
        n_ops = 0;
        t = start(s,
                  "coroutine.wrap(function() while n_waits == nil do if not pcall(wait) then "
                  "return end end end)()",
                  &o);
        if (trusted) {
            orch_task_cancel(t, "inner");
            settle(&o);
            assert_int_equal(o.err.cls, ORCH_CLASS_CANCELLED);
        }
        /* Before it ran, by another. */
        n_ops = 0;
        start(s, cancel_self, &o);
        settle(&o);
        assert_string_equal(o.text, "nil cancelled: by its script cancelled");
        assert_int_equal(n_ops, 0);
        orch_state_free(s);
    }
}

static struct orch_task *running_task;

static int lua_cancel_me(lua_State *L)
{
    running_task = orch_task_current(L);
    orch_task_cancel(running_task, "itself");
    return 0;
}

static void test_task_cancel_running(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        lua_pushcfunction(orch_state_lua(s), lua_cancel_me);
        lua_setglobal(orch_state_lua(s), "cancel_me");
        /* A bounded state ends at the next instruction whatever it does, a trusted one at its next
         * wait. */
        start(s, "cancel_me() while true do pcall(error) wait() end", &o);
        settle(&o);
        assert_int_equal(o.err.cls, ORCH_CLASS_CANCELLED);
        assert_string_equal(o.err.msg, "cancelled: itself");
        orch_state_free(s);
    }
}

static void test_task_time_over(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        struct orch_task *t = start(s, "local _, why, class = wait() after = class .. ' ' .. why",
                                    &o);
        orch_task_end(t, ORCH_CLASS_TIMEOUT, "not done within 2 s (vm.timeout)");
        assert_int_equal(o.done, 0); /* never from inside */
        settle(&o);
        assert_int_equal(o.err.cls, ORCH_CLASS_TIMEOUT);
        assert_string_equal(o.err.msg, "timeout: not done within 2 s (vm.timeout)");
        assert_int_equal(ops[0].cancelled, 1);
        if (task_contexts[i] == ORCH_CTX_SCRIPT)
            expect_text(s, "return after", "timeout timeout: not done within 2 s (vm.timeout)");
        n_ops = 0;
        start(s, "wait()", &o);
        orch_state_free(s); /* ends it */
        assert_int_equal(o.done, 1);
        assert_int_equal(ops[0].cancelled, 1);
        assert_int_equal(o.err.cls, ORCH_CLASS_CANCELLED);
    }
}

static void test_task_budget(void **state)
{
    (void)state;
    struct orch_state *s = task_state(ORCH_CTX_TOOL);
    struct outcome o;
    int64_t begin = cpu_ms();
    /* Waiting is free; the time inside adds up over the resumptions. */
    start(s,
          "local t = {} for i = 1, 1e9 do local n = 0 for k = 1, 1e5 do n = n + k end "
          "orch.sleep(0) end",
          &o);
    settle(&o);
    assert_int_equal(o.err.cls, ORCH_CLASS_LIMIT);
    assert_non_null(strstr(o.err.msg, "limit: tool time 100 ms used up in task.lua:1"));
    assert_true(cpu_ms() - begin >= 50);
    start(s, "orch.sleep(0.15) return 'slept'", &o);
    settle(&o);
    assert_string_equal(o.text, "slept");
    /* Spawned ones use the budget of the one that spawned them. */
    begin = cpu_ms();
    start(s,
          "local t for i = 1, 50 do t = orch.task.spawn(function() while true do for k = 1, 1e4 do "
          "end orch.sleep(0) end end) end\n"
          "local r = t:join() return r",
          &o);
    settle(&o);
    assert_int_equal(o.err.cls, ORCH_CLASS_LIMIT);
    assert_in_range(cpu_ms() - begin, 50, 50 * 100 / 2);
    orch_state_free(s);
    s = task_state(ORCH_CTX_TOOL);
    start(s, "pcall(string.rep, 'x', 1e9) return 1", &o);
    assert_string_equal(o.err.msg, "limit: tool memory 64 MiB used up in task.lua:1");
    start(s, "local t = {} for i = 1, 1e9 do t[i] = {} end", &o);
    assert_non_null(strstr(o.err.msg, "limit: tool "));
    orch_state_free(s);
}

static void test_spawn(void **state)
{
    (void)state;
    static const char *const codes[][2] = {
        { "local t = orch.task.spawn(function(a, b) orch.sleep('1ms') return a + b, nil, 'x' end, "
          "1, 2) return t:join()",
          "3 nil x" },
        { "local t = orch.task.spawn(function() error('bad', 0) end) local r, e, c = t:join() "
          "return r, e:match('^bad\\n') and 'bad', c",
          "nil bad failed" },
        { "local t = orch.task.spawn(function() return 7 end) orch.sleep(0.002) return t:join(), "
          "t:join()",
          "7 7" },
        { "local log = {} for i = 1, 3 do orch.task.spawn(function() log[#log + 1] = i end) end "
          "log[1] = 'first'\n"
          "orch.sleep(0.001) return table.concat(log, ' ')",
          "first 1 2 3" },
        { "local t = orch.task.spawn(function() return 'v' end)\n"
          "local a = orch.task.spawn(function() return t:join() end) local b = "
          "orch.task.spawn(function() return t:join() end)\n"
          "return a:join() .. b:join()",
          "vv" },
        { "local t t = orch.task.spawn(function() return pcall(t.join, t) end) return select(2, "
          "t:join())",
          "a task cannot join itself" },
        { "local t = orch.task.spawn(function() orch.sleep(100) end) orch.sleep(0.001)\n"
          "return t:cancel(), select(3, t:join()), t:cancel(), tostring(t)",
          "true cancelled false task (cancelled)" },
        { "return select('#', orch.task.spawn(function() end):join())", "0" },
        { "local ok, e = pcall(orch.sleep, 'soon') return e",
          "orch.sleep: not a duration: \"soon\"; seconds, or text like "
          "\"250ms\" \"30s\" \"5m\"" },
        { "local n, e, c = 0 repeat local t, m, k = orch.task.spawn(orch.sleep, 50) n, e, c = n + "
          "1, m, k until not t return n, c",
          "1024 limit" },
        { "return orch.task.spawn(select, '#', 1, 2, 3):join()", "3" },
        { "return pcall(orch.task.spawn, select, unpack({}, 1, 17))",
          "false bad argument #18 to '?' (too many arguments)" },
    };
    for (size_t i = 0; i < 2; i++)
        for (size_t k = 0; k < ORCH_ARRAY_LEN(codes); k++) {
            struct orch_state *s = task_state(task_contexts[i]);
            struct outcome o;
            if (start(s, codes[k][0], &o))
                settle(&o);
            if (strcmp(o.text, codes[k][1]) != 0)
                fail_msg("%s\nexpected %s\ngot %s %s", codes[k][0], codes[k][1], o.text, o.err.msg);
            orch_state_free(s);
        }
}

/* Children end with their parent in a tool, and go on in a script. */
static void test_children(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct orch_state *s = task_state(task_contexts[i]);
        struct outcome o;
        start(s, "orch.task.spawn(function() orch.task.spawn(wait) wait() end) orch.sleep(0.001)",
              &o);
        settle(&o);
        assert_int_equal(n_ops, 2);
        bool bounded = task_contexts[i] == ORCH_CTX_TOOL;
        assert_int_equal(ops[0].cancelled, bounded);
        assert_int_equal(ops[1].cancelled, bounded);
        lua_gc(orch_state_lua(s), LUA_GCCOLLECT, 0); /* nobody holds the task objects */
        for (int k = 0; k < 2; k++)
            orch_task_ready(ops[k].wait, push_op, &ops[k]);
        turns(2);
        assert_int_equal(ops[0].pushed + ops[1].pushed, bounded ? 0 : 2);
        orch_state_free(s);
    }
}

/* After warm-up a task that runs to its end allocates nothing. */
static void test_task_reuse(void **state)
{
    (void)state;
    struct orch_state *s = task_state(ORCH_CTX_TOOL);
    lua_State *L = orch_state_lua(s);
    struct orch_err err;
    assert_int_equal(orch_state_load(s, "task.lua", ORCH_SLICE("return ..."), &err), 0);
    void *ud;
    real_alloc = lua_getallocf(L, &ud);
    fail_at = 0;
    lua_setallocf(L, failing_alloc, ud);
    for (int i = 0; i < 100; i++) {
        if (i == 2)
            n_allocs = 0;
        int done = 0;
        lua_pushvalue(L, -1);
        lua_pushinteger(L, i);
        assert_null(orch_task_start(loop, s, 1, count_done, &done));
        assert_int_equal(done, 1);
    }
    assert_int_equal(n_allocs, 0);
    lua_setallocf(L, real_alloc, ud);
    orch_state_free(s);
}

/* ---- Reload
 * ------------------------------------------------------------------------------------------ */

static char dir[64];
static int reloads;

static int make_dir(void **state)
{
    (void)state;
    strcpy(dir, "/tmp/orch-test-script-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    return system(cmd);
}

static const char *in_dir(const char *name)
{
    static char paths[4][256];
    static size_t next;
    char *p = paths[next++ % 4];
    snprintf(p, sizeof paths[0], "%s/%s", dir, name);
    return p;
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(orch_write_all(fd, text, strlen(text)), 0);
    close(fd);
}

static void count_reload(void *ud)
{
    (void)ud;
    reloads++;
}

static void expect_reload(const char *what)
{
    int before = reloads;
    for (int i = 0; i < 1200 && reloads == before; i++)
        orch_loop_step(loop, 50);
    if (reloads == before)
        fail_msg("not noticed: %s", what);
    for (int i = 0; i < 3; i++) /* one change, one call */
        orch_loop_step(loop, 20);
    if (reloads != before + 1)
        fail_msg("%d calls: %s", reloads - before, what);
}

static void test_reload(void **state)
{
    (void)state;
    struct orch_err err = { 0 };
    struct orch_dirwatch *r = orch_dirwatch_new(loop, 20, count_reload, NULL, &err);
    assert_non_null(r);
    reloads = 0;
    assert_int_equal(mkdir(in_dir("policies"), 0700), 0);
    write_file(in_dir("policies/tools.lua"), "1");
    assert_int_equal(orch_dirwatch_add_dir(r, in_dir("policies/"), &err), 0);
    for (int i = 0; i < 3; i++)
        orch_loop_step(loop, 20);
    assert_int_equal(reloads, 0);

    write_file(in_dir("policies/tools.lua"), "2");
    expect_reload("written in place");
    write_file(in_dir("policies/.tools.lua.tmp"), "3");
    assert_int_equal(rename(in_dir("policies/.tools.lua.tmp"), in_dir("policies/tools.lua")), 0);
    expect_reload("renamed over");
    assert_int_equal(unlink(in_dir("policies/tools.lua")), 0);
    write_file(in_dir("policies/tools.lua"), "4");
    expect_reload("unlinked and made again");
    assert_int_equal(rename(in_dir("policies/tools.lua"), in_dir("policies/tools.lua~")), 0);
    write_file(in_dir("policies/tools.lua"), "5");
    expect_reload("moved to a backup and made again");
    assert_int_equal(chmod(in_dir("policies/tools.lua"), 0000), 0);
    expect_reload("mode changed");

    assert_int_equal(rename(in_dir("policies"), in_dir("old")), 0);
    assert_int_equal(mkdir(in_dir("policies"), 0700), 0);
    expect_reload("directory replaced");
    write_file(in_dir("old/tools.lua"), "not ours");
    write_file(in_dir("neighbour"), "not ours");
    for (int i = 0; i < 5; i++)
        orch_loop_step(loop, 20);
    write_file(in_dir("policies/tools.lua"), "6");
    expect_reload("written in the new directory");
    unlink(in_dir("policies/tools.lua"));
    assert_int_equal(rmdir(in_dir("policies")), 0);
    expect_reload("directory removed");
    assert_int_equal(symlink("old", in_dir("policies")), 0);
    expect_reload("symbolic link in its place");
    write_file(in_dir("old/tools.lua"), "7");
    expect_reload("written through the link");

    /* One that does not exist yet, two levels down. */
    assert_int_equal(orch_dirwatch_add_dir(r, in_dir("a/b"), &err), 0);
    assert_int_equal(mkdir(in_dir("a"), 0700), 0);
    expect_reload("parent made");
    assert_int_equal(mkdir(in_dir("a/b"), 0700), 0);
    expect_reload("directory made");
    write_file(in_dir("a/b/x.lua"), "1");
    expect_reload("written in it");

    /* A stream of changes is cut off. */
    int before = reloads;
    int64_t start = orch_now_us();
    while (reloads == before) {
        write_file(in_dir("a/b/x.lua"), "again");
        orch_loop_step(loop, 2);
        assert_true(orch_now_us() - start < 60000000);
    }
    write_file(in_dir("a/b/x.lua"), "last");
    expect_reload("rest of the stream");

    orch_dirwatch_clear(r);
    write_file(in_dir("a/b/x.lua"), "2");
    for (int i = 0; i < 5; i++)
        orch_loop_step(loop, 20);
    before = reloads;
    write_file(in_dir("a/b/x.lua"), "3");
    for (int i = 0; i < 5; i++)
        orch_loop_step(loop, 20);
    assert_int_equal(reloads, before);
    char long_path[5000];
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    assert_int_equal(orch_dirwatch_add_dir(r, long_path, &err), -ENAMETOOLONG);
    orch_dirwatch_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_surface),
        cmocka_unit_test(test_trusted),
        cmocka_unit_test(test_strict),
        cmocka_unit_test(test_frozen_environment),
        cmocka_unit_test(test_print),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_hangs),
        cmocka_unit_test(test_depth),
        cmocka_unit_test(test_steps),
        cmocka_unit_test(test_nothing_after_limit),
        cmocka_unit_test(test_nested_entry),
        cmocka_unit_test(test_same_as_lua),
        cmocka_unit_test(test_own_ways),
        cmocka_unit_test(test_cleanup_runs),
        cmocka_unit_test_setup_teardown(test_no_memory, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_gc_stress, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_runs, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_waits_anywhere, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_may_not_wait, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_cancel, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_cancel_running, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_time_over, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_budget, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_spawn, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_children, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_task_reuse, make_loop, free_loop),
        cmocka_unit_test_setup_teardown(test_reload, make_loop, free_loop),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
