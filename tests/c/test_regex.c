#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "odd_locale.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <lualib.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

#include "script/jsonlib.h"
#include "script/regex.h"
#include "script/state.h"

static struct orch_slice str(const char *s)
{
    return (struct orch_slice){ s, strlen(s) };
}

static struct orch_regex *must(const char *pattern)
{
    struct orch_err err = { 0 };
    struct orch_regex *re = orch_regex_compile(str(pattern), &err);
    if (!re)
        fail_msg("%s: %s", pattern, err.msg);
    return re;
}

static void replaced(const char *pattern, const char *in, int count, const char *want)
{
    struct orch_regex *re = must(pattern);
    struct orch_buf out = { 0 };
    orch_buf_str(&out, "<");
    assert_int_equal(orch_regex_replace(re, str(in), ORCH_SLICE("[redacted]"), &out), count);
    assert_string_equal(out.p, want);
    orch_buf_free(&out);
    orch_regex_free(re);
}

static void test_replace(void **state)
{
    (void)state;
    replaced("sk-\\w+", "key sk-abc and sk-def.", 2, "<key [redacted] and [redacted].");
    replaced("sk-\\w+", "sk-abc", 1, "<[redacted]");
    replaced("sk-\\w+", "nothing here", 0, "<");
    replaced("sk-\\w+", "", 0, "<");
    replaced("x*", "axxb", 1, "<a[redacted]b"); /* empty matches are not replaced */
    replaced("a|b", "ab", 2, "<[redacted][redacted]");
    replaced("(?<=id=)\\d+", "id=12 id=34", 2, "<id=[redacted] id=[redacted]");
    replaced("id=\\K\\d+", "id=12 id=34", 2, "<id=[redacted] id=[redacted]");
    replaced("ü+", "müüde", 1, "<m[redacted]de");
    replaced("\\w+", "mü", 1, "<[redacted]ü"); /* classes are ASCII */
}

static void test_replace_keeps_nul(void **state)
{
    (void)state;
    struct orch_regex *re = must("b");
    struct orch_buf out = { 0 };
    assert_int_equal(orch_regex_replace(re, (struct orch_slice){ "a\0b\0c", 5 }, ORCH_SLICE("X"),
                                        &out),
                     1);
    assert_int_equal(out.n, 5);
    assert_memory_equal(out.p, "a\0X\0c", 5);
    orch_buf_free(&out);
    orch_regex_free(re);
}

static void test_replace_refuses(void **state)
{
    (void)state;
    struct orch_buf out = { 0 };
    orch_buf_str(&out, "kept");
    struct orch_regex *re = must("^(a+)+$");
    assert_int_equal(orch_regex_replace(re, str("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"),
                                        ORCH_SLICE("X"), &out),
                     -EOVERFLOW);
    assert_int_equal(orch_regex_replace(re, str("aaa\xff"), ORCH_SLICE("X"), &out), -EILSEQ);
    /* usable afterwards */
    assert_int_equal(orch_regex_replace(re, str("aaa"), ORCH_SLICE("X"), &out), 1);
    assert_string_equal(out.p, "keptX");
    orch_regex_free(re);

    /* A match before the limit is not left behind half-done. */
    re = must("x|(a+)+c$");
    out.n = 0;
    orch_buf_str(&out, "kept");
    assert_int_equal(orch_regex_replace(re, str("xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac!"),
                                        ORCH_SLICE("Y"), &out),
                     -EOVERFLOW);
    assert_string_equal(out.p, "kept");
    orch_regex_free(re);
    orch_buf_free(&out);
}

/* Scanning that the match limit does not count ends by the deadline. */
static void test_deadline(void **state)
{
    (void)state;
    static const char *const patterns[] = { "a*a*[bc]", "a{60000}[bc]" };
    struct orch_buf in = { 0 }, out = { 0 };
    orch_buf_reserve(&in, 120000);
    for (size_t i = 0; i < 120000; i++)
        orch_buf_char(&in, 'a');
    for (size_t i = 0; i < ORCH_ARRAY_LEN(patterns); i++) {
        struct orch_regex *re = must(patterns[i]);
        assert_int_equal(orch_regex_replace(re, (struct orch_slice){ in.p, in.n }, ORCH_SLICE("X"),
                                            &out),
                         -EOVERFLOW);
        orch_regex_free(re);
    }
    orch_buf_free(&in);
    orch_buf_free(&out);
}

static volatile sig_atomic_t slept;

static void sleep_once(int signal_number)
{
    (void)signal_number;
    if (!slept++)
        nanosleep(&(struct timespec){ .tv_nsec = 500000000 }, NULL);
}

/* The time that a busy machine gives to others is none of the match's. */
static void test_deadline_is_of_work(void **state)
{
    (void)state;
    struct orch_buf in = { 0 }, out = { 0 };
    struct orch_regex *re = must("a*a*[bc]");
    signal(SIGALRM, sleep_once);
    for (size_t n = 64; !slept; n *= 2) { /* until a match takes long enough to be met */
        orch_buf_consume(&in, in.n);
        for (size_t i = 0; i < n; i++)
            orch_buf_char(&in, 'a');
        setitimer(ITIMER_REAL, &(struct itimerval){ .it_value.tv_usec = 500 }, NULL);
        int r = orch_regex_replace(re, (struct orch_slice){ in.p, in.n }, ORCH_SLICE("X"), &out);
        setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
        assert_int_equal(r, 0);
    }
    orch_regex_free(re);
    orch_buf_free(&in);
    orch_buf_free(&out);
}

static void test_compile_refuses(void **state)
{
    (void)state;
    static const struct {
        const char *pattern, *want;
    } cases[] = {
        { "a(b", "missing closing parenthesis at offset 3" },
        { "[a-", "missing terminating ] for character class at offset 3" },
        { "*a", "quantifier does not follow a repeatable item at offset 0" },
        { "(*UCP)a", "using UCP is disabled by the application at offset 6" },
        { "\\C", "using \\C is disabled by the application at offset 2" },
        { "\xff", "UTF-8 error: illegal byte (0xfe or 0xff) at offset 0" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_err err = { 0 };
        assert_null(orch_regex_compile(str(cases[i].pattern), &err));
        assert_string_equal(err.msg, cases[i].want);
    }
    struct orch_err err = { 0 };
    struct orch_buf big = { 0 };
    for (int i = 0; i < 16 * 1024 + 1; i++)
        orch_buf_char(&big, 'a');
    assert_null(orch_regex_compile((struct orch_slice){ big.p, big.n }, &err));
    assert_string_equal(err.msg, "pattern of 16385 bytes; at most 16384 are accepted");
    orch_buf_free(&big);
}

static struct orch_state *new_state(enum orch_context ctx, uint64_t steps)
{
    struct orch_err err;
    struct orch_state *s =
        orch_state_new(&(struct orch_state_opts){ .ctx = ctx,
                                                  .lua_dir = "lua",
                                                  .steps = steps,
                                                  .memory_bytes = ctx == ORCH_CTX_SCRIPT
                                                                      ? 0
                                                                      : 64 << 20 },
                       &err);
    if (!s)
        fail_msg("%s", err.msg);
    lua_State *L = orch_state_lua(s);
    lua_pushliteral(L, "compile");
    orch_luaopen_regex(L);
    lua_rawset(L, LUA_GLOBALSINDEX);
    lua_pushliteral(L, "json");
    orch_luaopen_json(L);
    lua_rawset(L, LUA_GLOBALSINDEX);
    return s;
}

static void must_run(struct orch_state *s, const char *name, struct orch_slice code, int nargs,
                     int nresults)
{
    struct orch_err err;
    if (orch_state_load(s, name, code, &err) < 0)
        fail_msg("%s", err.msg);
    lua_insert(orch_state_lua(s), -1 - nargs);
    if (orch_state_pcall(s, nargs, nresults, &err) < 0)
        fail_msg("%s", err.msg);
}

static void run_lua(const char *code)
{
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT, 0);
    must_run(s, "test", str(code), 0, 0);
    orch_state_free(s);
}

static void test_lua(void **state)
{
    (void)state;
    run_lua("local m = assert(compile('^a+$'))\n"
            "assert(m('aaa') == true and m('aab') == false and m('') == false and m('aaa\\n') == "
            "false)\n"
            "assert(compile('b')('abc') == true and compile('')('') == true)\n"
            "assert(compile([[^\\u00e9\\x41$]])('\\195\\169A'))\n"
            "assert(compile('^.$')('\\195\\169') and not compile([[^\\w$]])('\\195\\169'))\n"
            "assert(compile('a%zb') and compile('a\\0b')('xa\\0b'))\n"
            "local f = compile('b+')\n"
            "local i, j = f:find('abbcb') assert(i == 2 and j == 3)\n"
            "i, j = f:find('abbcb', 4) assert(i == 5 and j == 5)\n"
            "assert(f:find('abbcb', 6) == nil and f:find('aaa') == nil)\n"
            "i, j = compile('x*'):find('ab', 2) assert(i == 2 and j == 1)\n");
}

static void test_lua_errors(void **state)
{
    (void)state;
    run_lua("local m, err = compile('a(b')\n"
            "assert(m == nil and err == 'missing closing parenthesis at offset 3', err)\n"
            "local function raises(want, f, ...)\n"
            "  local ok, got = pcall(f, ...)\n"
            "  assert(not ok and got:find(want, 1, true), tostring(got))\n"
            "end\n"
            "raises('string expected', compile, 12)\n"
            "raises('string expected', compile)\n"
            "m = compile('^(a+)+$')\n"
            "local ok, got = pcall(m, ('a'):rep(40) .. 'b')\n"
            "assert(not ok and got == 'pattern match limit', got)\n"
            "raises('not valid UTF-8', m, 'a\\255')\n"
            "raises('string expected', m, 12)\n"
            "raises('outside of the string', m.find, m, 'abc', 5)\n"
            "raises('outside of the string', m.find, m, 'abc', 0)\n"
            "raises('outside of the string', m.find, m, 'abc', 0/0)\n"
            "raises('inside a character', m.find, m, '\\195\\169', 2)\n"
            "raises('orch.regex expected', m.find, io.stdout, 'abc')\n"
            "assert(getmetatable(m) == false)\n"
            "raises('', function() m.find = 1 end)\n");
}

/* Both the bytes and the work of a match are steps of the state; the sanitizer sees what is not
 * freed. */
static void test_lua_charges(void **state)
{
    (void)state;
    static const char *const spent[] = {
        "local m = compile('b') local s = ('a'):rep(80000) for i = 1, 20 do m(s) end",
        "local m = compile('^(a+)+$') for i = 1, 2 do pcall(m, ('a'):rep(40) .. 'b') end",
        "for i = 1, 500 do compile('(abc|def){1,100}' .. i) end",
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(spent); i++) {
        struct orch_err err;
        struct orch_state *s = new_state(ORCH_CTX_POLICY, 100000);
        must_run(s, "test", str("local m = compile('b') for i = 1, 100 do m('abc') end"), 0, 0);
        assert_int_equal(orch_state_load(s, "test", str(spent[i]), &err), 0);
        assert_true(orch_state_pcall(s, 0, 0, &err) < 0);
        assert_int_equal(err.cls, ORCH_CLASS_LIMIT);
        orch_state_free(s);
    }
}

/* Patterns that became garbage are collected although the collector does not see their memory. */
static void test_lua_collects(void **state)
{
    (void)state;
    run_lua("local heap = {} for i = 1, 200000 do heap[i] = {} end collectgarbage()\n"
            "local alive = setmetatable({}, { __mode = 'k' })\n"
            "local most = 0\n"
            "for i = 1, 20000 do\n"
            "  alive[compile('(abc|def){1,60}' .. i)] = true\n"
            "  if i % 1000 == 0 then local n = 0 for _ in pairs(alive) do n = n + 1 end most = "
            "math.max(most, n) end\n"
            "end\n"
            "assert(most < 10000, most)\n");
}

static int is_array(lua_State *L)
{
    lua_pushboolean(L, orch_lua_is_array(L, 1));
    return 1;
}

static int is_bigint(lua_State *L)
{
    lua_pushboolean(L, orch_lua_is_bigint(L, 1));
    return 1;
}

/* Pushes the schema module of lua/policy. */
static void load_schema(struct orch_state *s)
{
    cleanup_buf struct orch_buf values = { 0 }, schema = { 0 };
    assert_int_equal(orch_read_file(AT_FDCWD, "lua/policy/values.lua", 1 << 20, &values), 0);
    assert_int_equal(orch_read_file(AT_FDCWD, "lua/policy/schema.lua", 1 << 20, &schema), 0);
    must_run(
        s, "deps",
        str("return { json = json, regex = compile, is_array = is_array, is_bigint = is_bigint }"),
        0, 1);
    lua_pushvalue(orch_state_lua(s), -1);
    must_run(s, "lua/policy/values.lua", (struct orch_slice){ values.p, values.n }, 1, 1);
    lua_setfield(orch_state_lua(s), -2, "values");
    must_run(s, "lua/policy/schema.lua", (struct orch_slice){ schema.p, schema.n }, 1, 1);
}

/* lua/policy/schema.lua with the real patterns and JSON, in a bounded state. */
static void test_schema(void **state)
{
    (void)state;
    struct orch_state *s = new_state(ORCH_CTX_TOOL, 0);
    lua_State *L = orch_state_lua(s);
    lua_pushliteral(L, "is_array");
    lua_pushcfunction(L, is_array);
    lua_rawset(L, LUA_GLOBALSINDEX);
    lua_pushliteral(L, "is_bigint");
    lua_pushcfunction(L, is_bigint);
    lua_rawset(L, LUA_GLOBALSINDEX);
    load_schema(s);
    must_run(
        s, "test",
        str("local schema = ...\n"
            "local function try(s, v, want)\n"
            "  local ok, got = assert(schema.compile(json.decode(s)))(json.decode(v))\n"
            "  assert(got == want and (ok == true) == (want == nil), tostring(got))\n"
            "end\n"
            "local object = "
            "'{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"array\",\"items\":{\"type\":"
            "\"string\",\"pattern\":\"^[a-z]+$\"}},'\n"
            "  .. "
            "'\"n\":{\"const\":null},\"i\":{\"type\":\"integer\",\"maximum\":9223372036854775807}},"
            "\"additionalProperties\":false}'\n"
            "try(object, '{\"a\":[],\"n\":null,\"i\":9223372036854775807}')\n"
            "try(object, '{\"a\":[\"abc\"]}')\n"
            "try(object, '{\"a\":[\"abc\",\"abc\\\\n\"]}', 'arguments.a[1]: must match "
            "\"^[a-z]+$\" (pattern)')\n"
            "try(object, '{\"a\":{}}', 'arguments.a: expected array, got object (type)')\n"
            "try(object, '[]', 'arguments: expected object, got array (type)')\n"
            "try(object, '{\"n\":1}', 'arguments.n: must be null (const)')\n"
            "try(object, '{\"i\":9223372036854775808}', 'arguments.i: must be at most "
            "9223372036854775807 (maximum)')\n"
            "try(object, '{\"i\":null}', 'arguments.i: expected integer, got null (type)')\n"
            "try(object, '{\"b\":1}', 'arguments: unknown property \"b\" (additionalProperties)')\n"
            "try('{\"not\":{\"pattern\":\"^(a+)+$\"}}', '\"' .. ('a'):rep(40) .. 'b\"', "
            "'arguments: pattern match limit')\n"
            "try('{\"multipleOf\":0.01}', '4.35')\n"
            "try('{\"maxLength\":2}', '\"äö\"')\n"
            "local bad, why = schema.compile({ pattern = 'a(' })\n"
            "assert(not bad and why == '#/pattern: bad pattern: missing closing parenthesis at "
            "offset 2', why)\n"
            "local nested = {} for i = 1, 1000 do nested = { items = nested } end\n"
            "assert(not schema.compile(nested))\n"),
        1, 0);

    /* A check that would take for ever ends by the budget, whatever pcall does. */
    orch_state_set_limits(s, 64 << 20, 2000000, 0);
    load_schema(s);
    struct orch_err err;
    assert_int_equal(orch_state_load(s, "test",
                                     str("local schema = ...\n"
                                         "local s = { type = 'null' } for i = 1, 40 do s = { anyOf "
                                         "= { { allOf = { s } }, { allOf = { s, s } } } } end\n"
                                         "schema.compile(s)(1)"),
                                     &err),
                     0);
    lua_insert(orch_state_lua(s), -2);
    assert_true(orch_state_pcall(s, 1, 0, &err) < 0);
    assert_int_equal(err.cls, ORCH_CLASS_LIMIT);
    orch_state_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_replace),
        cmocka_unit_test(test_replace_keeps_nul),
        cmocka_unit_test(test_replace_refuses),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_deadline_is_of_work),
        cmocka_unit_test(test_compile_refuses),
        cmocka_unit_test(test_lua),
        cmocka_unit_test(test_lua_errors),
        cmocka_unit_test(test_lua_charges),
        cmocka_unit_test(test_lua_collects),
        cmocka_unit_test(test_schema),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
