/* JSON: the scanner's rules with their byte offsets, values, the canonical form, the builder, and
 * the conversions to and from Lua. */
#include "base/json.h"
#include "script/jsonlib.h"
#include "script/state.h"

#include <setjmp.h>

#include <cmocka.h>

#include "odd_locale.h"
#include <errno.h>
#include <lauxlib.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* A text in memory of exactly its size, so that the sanitizer sees a read past its end. */
static int scan_bytes(struct orch_json_doc *d, const char *p, size_t n,
                      const struct orch_json_limits *lim, struct orch_json_fault *f, char **copy)
{
    *copy = orch_xmalloc(n ? n : 1);
    memcpy(*copy, p, n);
    return orch_json_scan(d, (struct orch_slice){ *copy, n }, lim, f);
}

#define SCAN(d, s) \
    assert_int_equal(orch_json_scan(d, orch_slice_str(s), NULL, &(struct orch_json_fault){ 0 }), 0)

/* ---- the scanner */

struct bad {
    const char *text;
    size_t byte;
    const char *rule;
    size_t n; /* 0: strlen(text) */
};

static const struct bad bad[] = {
    { "", 0, "unexpected end of text", 0 },
    { " \n", 2, "unexpected end of text", 0 },
    { "\xEF\xBB\xBF{}", 0, "byte-order mark", 0 },
    { "{} x", 3, "text after the value", 0 },
    { "1 2", 2, "text after the value", 0 },
    { "{}\0", 2, "text after the value", 3 },
    { "[1,]", 3, "expected a value", 0 },
    { "[,1]", 1, "expected a value", 0 },
    { "[1 2]", 3, "expected ',' or ']'", 0 },
    { "[1}", 2, "expected ',' or ']'", 0 },
    { "[1", 2, "unexpected end of text", 0 },
    { "[", 1, "unexpected end of text", 0 },
    { "{", 1, "unexpected end of text", 0 },
    { "{\"a\":1,}", 7, "expected a key", 0 },
    { "{,}", 1, "expected a key", 0 },
    { "{a:1}", 1, "expected a key", 0 },
    { "{1:1}", 1, "expected a key", 0 },
    { "{\"a\" 1}", 5, "expected ':'", 0 },
    { "{\"a\"", 4, "unexpected end of text", 0 },
    { "{\"a\":}", 5, "expected a value", 0 },
    { "{\"a\":1 \"b\":2}", 7, "expected ',' or '}'", 0 },
    { "{\"a\":1]", 6, "expected ',' or '}'", 0 },
    { "{\"a\":1,", 7, "unexpected end of text", 0 },
    { "\"abc", 4, "unexpected end of text", 0 },
    { "\"a\tb\"", 2, "control character in string", 0 },
    { "\"a\0b\"", 2, "control character in string", 5 },
    { "\"0123456789abcdef\x1f\"", 17, "control character in string", 0 },
    { "\"\\x41\"", 2, "invalid escape", 0 },
    { "\"\\", 2, "unexpected end of text", 0 },
    { "\"\\u12g4\"", 5, "invalid escape", 0 },
    { "\"\\u12", 5, "unexpected end of text", 0 },
    { "\"\\U0041\"", 2, "invalid escape", 0 },
    { "\"a\\ud800\"", 2, "lone surrogate", 0 },
    { "\"\\ud800\\n\"", 1, "lone surrogate", 0 },
    { "\"\\ud800\\u0041\"", 1, "lone surrogate", 0 },
    { "\"\\ud800\\ud800\"", 1, "lone surrogate", 0 },
    { "\"\\udc00\"", 1, "lone surrogate", 0 },
    { "\"\\udc00\\ud800\"", 1, "lone surrogate", 0 },
    { "\"\\udc00\\udc00\"", 1, "lone surrogate", 0 },
    { "\"\\ud800\\u00z0\"", 11, "invalid escape", 0 },
    { "\"ab\x80\"", 3, "invalid UTF-8", 0 },
    { "\"\xC3\"", 1, "invalid UTF-8", 0 },
    { "\"\xC0\xAF\"", 1, "invalid UTF-8", 0 },
    { "\"\xC1\xBF\"", 1, "invalid UTF-8", 0 },
    { "\"\xE0\x9F\xBF\"", 1, "invalid UTF-8", 0 },
    { "\"\xED\xA0\x80\"", 1, "invalid UTF-8", 0 },
    { "\"\xED\xBF\xBF\"", 1, "invalid UTF-8", 0 },
    { "\"\xF0\x8F\xBF\xBF\"", 1, "invalid UTF-8", 0 },
    { "\"\xF4\x90\x80\x80\"", 1, "invalid UTF-8", 0 },
    { "\"\xF5\x80\x80\x80\"", 1, "invalid UTF-8", 0 },
    { "\"\xC3\xA9\xE2\x82\"", 3, "invalid UTF-8", 0 },
    { "\"\xE2\x82", 1, "invalid UTF-8", 0 },
    { "\xC3\xA9", 0, "expected a value", 0 },
    { "trux", 3, "misspelt literal", 0 },
    { "tru", 3, "unexpected end of text", 0 },
    { "True", 0, "expected a value", 0 },
    { "[nul]", 4, "misspelt literal", 0 },
    { "falsy", 4, "misspelt literal", 0 },
    { "nullx", 4, "text after the value", 0 },
    { "01", 1, "leading zero", 0 },
    { "[-012]", 3, "leading zero", 0 },
    { "-", 1, "unexpected end of text", 0 },
    { "-x", 1, "expected a digit", 0 },
    { "+1", 0, "expected a value", 0 },
    { ".5", 0, "expected a value", 0 },
    { "[1.]", 3, "expected a digit", 0 },
    { "1.e5", 2, "expected a digit", 0 },
    { "[1e]", 3, "expected a digit", 0 },
    { "1e+", 3, "unexpected end of text", 0 },
    { "1e-x", 3, "expected a digit", 0 },
    { "1e5.5", 3, "text after the value", 0 },
    { "0x10", 1, "text after the value", 0 },
    { "NaN", 0, "expected a value", 0 },
    { "-Infinity", 1, "expected a digit", 0 },
    { "[1e400]", 1, "number out of range", 0 },
    { "-1e309", 0, "number out of range", 0 },
    { "1.8e308", 0, "number out of range", 0 },
    { "1e99999999999999999999", 0, "number out of range", 0 },
    { " 12345678901234567890123456789012345678901234567890123456789012345", 65, "number too long",
      0 },
    { "{\"a\":1,\"a\":2}", 7, "duplicate key", 0 },
    { "{\"\":1,\"\":2}", 6, "duplicate key", 0 },
    { "{\"a\":1,\"\\u0061\":2}", 7, "duplicate key", 0 },
    { "{\"\\/\":1,\"/\":2}", 8, "duplicate key", 0 },
    { "{\"\\ud83d\\ude00\":1,\"\xF0\x9F\x98\x80\":2}", 18, "duplicate key", 0 },
    { "[{\"b\":{\"x\":[1,2]},\"c\":3,\"b\":4}]", 24, "duplicate key", 0 },
    { "'a'", 0, "expected a value", 0 },
    { "[1]//", 3, "text after the value", 0 },
    { "\f1", 0, "expected a value", 0 },
};

static void malformed_texts_name_rule_and_byte(void **state)
{
    struct orch_json_doc d = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        struct orch_json_fault f = { 0 };
        size_t n = bad[i].n ? bad[i].n : strlen(bad[i].text);
        char *copy;
        int rc = scan_bytes(&d, bad[i].text, n, NULL, &f, &copy);
        if (rc != -EBADMSG || f.byte != bad[i].byte || strcmp(f.rule, bad[i].rule) != 0 || d.n != 0)
            fail_msg("%s: rc %d, \"%s\" at %zu", bad[i].text, rc, f.rule ? f.rule : "", f.byte);
        free(copy);
    }
    orch_json_doc_free(&d);
    (void)state;
}

static void limits_are_refused_at_the_byte(void **state)
{
    struct orch_json_doc d = { 0 };
    static const struct {
        const char *text;
        struct orch_json_limits lim;
        size_t byte;
        const char *rule; /* NULL: accepted */
    } cases[] = {
        { "[1]", { .bytes = 2 }, 2, "text too long" },
        { "[1]", { .bytes = 3 }, 0, NULL },
        { "[[[]]]", { .depth = 2 }, 2, "nested too deeply" },
        { "[[[]]]", { .depth = 3 }, 0, NULL },
        { "[{\"a\":[1]}]", { .depth = 2 }, 6, "nested too deeply" },
        { "[[],[],[[]]]", { .depth = 3 }, 0, NULL },
        { "[1,2]", { .tokens = 2 }, 3, "too many values" },
        { "[1,2]", { .tokens = 3 }, 0, NULL },
        { "{\"a\":1}", { .tokens = 1 }, 1, "too many values" },
        { "{\"a\":1}", { .tokens = 2 }, 5, "too many values" },
        { "{\"a\":1}", { .tokens = 3 }, 0, NULL },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_json_fault f = { 0 };
        int rc = orch_json_scan(&d, orch_slice_str(cases[i].text), &cases[i].lim, &f);
        assert_int_equal(rc, cases[i].rule ? -EMSGSIZE : 0);
        if (cases[i].rule) {
            assert_string_equal(f.rule, cases[i].rule);
            assert_int_equal(f.byte, cases[i].byte);
        }
    }

    char deep[4000];
    struct orch_json_fault f;
    memset(deep, '[', 2000);
    memset(deep + 2000, ']', 2000);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ deep + 2000 - 64, 128 }, NULL, &f), 0);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ deep + 2000 - 65, 130 }, NULL, &f),
                     -EMSGSIZE);
    assert_int_equal(f.byte, 64);
    const struct orch_json_limits any = { .depth = 100000, .bytes = SIZE_MAX };
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ deep + 2000 - 1024, 2048 }, &any, &f),
                     0);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ deep + 2000 - 1025, 2050 }, &any, &f),
                     -EMSGSIZE);
    /* Over 4 GiB offsets would not fit; refused before a byte is read. */
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ deep, (size_t)5 << 30 }, &any, &f),
                     -EMSGSIZE);
    assert_string_equal(f.rule, "text too long");
    orch_json_doc_free(&d);
    (void)state;
}

/* In the manner of JSONTestSuite: 'y' must be accepted, 'n' refused. */
static const char *const suite[] = {
    "y[]",
    "y{}",
    "y[[]   ]",
    "y[\"\"]",
    "y[\"a\"]",
    "y[false]",
    "ynull",
    "ytrue",
    "yfalse",
    "y42",
    "y-0.1",
    "y\"asd\"",
    "y\"\"",
    "y\" \"",
    "y[]\n",
    "y \n\t\r[1] \n",
    "y[1,null,\"1\",{}]",
    "y[null,1,{\"2\":null}]",
    "y[2] ",
    "y[0]",
    "y[-0]",
    "y[-0.0]",
    "y[0e1]",
    "y[0e+1]",
    "y[0E-1]",
    "y[1E22]",
    "y[1E-2]",
    "y[1E+2]",
    "y[1e-400]",
    "y[123e65]",
    "y[123.456e78]",
    "y[1.7976931348623157e308]",
    "y[5e-324]",
    "y[2e-324]",
    "y[-123]",
    "y[-1]",
    "y[123.456789]",
    "y[20e1]",
    "y[9007199254740993]",
    "y[18446744073709551616]",
    "y[-237462374673276894279832749832423479823246327846]",
    "y[0.4e006]",
    "y[1e00308]",
    "y[0e99999999]",
    "y[-9223372036854775809]",
    "y[1.0000000000000000000000000000000000000000000000000000000001]",
    "y[1234567890123456789012345678901234567890123456789012345678901234]",
    "y[0.000e-999999]",
    "y{\"asd\":\"sdf\"}",
    "y{\"a\":\"b\",\"c\":\"d\"}",
    "y{\"\":0}",
    "y{\"foo\\u0000bar\":42}",
    "y{\"min\":-1.0e+28,\"max\":1.0e+28}",
    "y{\"a\":[]}",
    "y{\n\"a\": \"b\"\n}",
    "y{\"a\":{\"a\":{\"a\":1}}}",
    "y{\"a\":1,\"A\":2,\"\\u00e1\":3}",
    "y{\"title\":\"\\u041f\\u043e\\u043b\"}",
    "y[[[[[[]]]]],{}]",
    "y[\"\\u0060\\u012a\\u12AB\"]",
    "y[\"\\uD801\\udc37\"]",
    "y[\"\\ud83d\\ude39\\ud83d\\udc8d\"]",
    "y[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]",
    "y[\"\\\\u0000\"]",
    "y[\"\\\"\"]",
    "y[\"a/*b*/c/*d//e\"]",
    "y[\"\\\\a\"]",
    "y[\"\\\\n\"]",
    "y[\"\\u0012\"]",
    "y[\"\\uFFFF\"]",
    "y[\"\\uDBFF\\uDFFE\"]",
    "y[\"new\\u00A0line\"]",
    "y[\"\xF4\x8F\xBF\xBF\"]",
    "y[\"\xEF\xBF\xBF\"]",
    "y[\"\xEF\xBB\xBF\"]",
    "y[\"\\u0000\"]",
    "y[\"\\u002c\"]",
    "y[\"\xCF\x80\"]",
    "y[\"\xE2\x82\xAC\xE2\x82\xAC\"]",
    "y[\"asd \"]",
    "y[\"\\u200B\\u2064\"]",
    "y[\"\xE2\x80\xA8\xE2\x80\xA9\"]",
    "y[\"\\u0821\"]",
    "y[\"\x7F\"]",
    "y[\"\xF0\x9B\xBF\xBF\"]",
    "y[\"\xED\x9F\xBF\xEE\x80\x80\"]",
    "y[\"\xC2\x80\xDF\xBF\xE0\xA0\x80\"]",
    "y[\"0123456\xC3\xA9\"]",
    "y[\"01234567\xC3\xA9 01234567\\n01234567\"]",
    "y[\"12345678\\\"12345678\"]",
    "n[1 true]",
    "n[\"\": 1]",
    "n[\"\"],",
    "n[,1]",
    "n[1,,2]",
    "n[\"x\",,]",
    "n[\"x\"]]",
    "n[\"\",]",
    "n[\"x\"",
    "n[3[4]]",
    "n[:1]",
    "n[,]",
    "n[-]",
    "n[   , \"\"]",
    "n[1,\n1\n,1",
    "n[1,]",
    "n[1,,]",
    "n[\"\x0B\"]",
    "n[*]",
    "n[1,\n",
    "n[{}",
    "n[fals]",
    "n[nul]",
    "n[tru]",
    "n[++1234]",
    "n[+1]",
    "n[-01]",
    "n[-1.0.]",
    "n[-2.]",
    "n[-NaN]",
    "n[.-1]",
    "n[.2e-3]",
    "n[0.1.2]",
    "n[0.3e+]",
    "n[0.3e]",
    "n[0.e1]",
    "n[0E+]",
    "n[0E]",
    "n[0e]",
    "n[1.0e+]",
    "n[1.0e-]",
    "n[1.0e]",
    "n[1 000.0]",
    "n[1eE2]",
    "n[2.e+3]",
    "n[2.e3]",
    "n[9.e+]",
    "n[Inf]",
    "n[NaN]",
    "n[1+2]",
    "n[0x1]",
    "n[0x42]",
    "n[Infinity]",
    "n[-Infinity]",
    "n[-foo]",
    "n[- 1]",
    "n[-012]",
    "n[-.123]",
    "n[1ea]",
    "n[1.8011670033376514H-308]",
    "n[012]",
    "n[00]",
    "n[1e1e1]",
    "n[1e1000]",
    "n{\"x\", null}",
    "n{\"x\"::\"b\"}",
    "n{\"a\":\"a\" 123}",
    "n{key: 'value'}",
    "n{\"a\" \"b\"}",
    "n{:\"b\"}",
    "n{\"a\"",
    "n{1:1}",
    "n{9999E9999:1}",
    "n{null:null}",
    "n{\"id\":0,,,,,}",
    "n{'a':0}",
    "n{\"id\":0,}",
    "n{\"a\":\"b\"}/**/",
    "n{\"a\":\"b\"}//",
    "n{\"a\":\"b\",,\"c\":\"d\"}",
    "n{a: \"b\"}",
    "n{\"a\":\"a",
    "n{ \"a\" : 1",
    "n{\"a\":\"b\"}#",
    "n ",
    "n[\"\\uD800\\u\"]",
    "n[\"\\uD800\\u1\"]",
    "n[\"\\uD800\\u1x\"]",
    "n[\\u0020]",
    "n[\"\\x00\"]",
    "n[\"\\\\\\\"]",
    "n[\"\\\t\"]",
    "n[\"\\\xF0\x9F\x8C\x80\"]",
    "n[\"\\\"]",
    "n[\"\\u00A\"]",
    "n[\"\\uD834\\uDd\"]",
    "n[\"\\uD800\\uD800\\x\"]",
    "n[\"\\a\"]",
    "n[\"\\uqqqq\"]",
    "n[\"\\u\xC3\xA9\"]",
    "n[\xC3\xA9]",
    "n[\"",
    "n['single quote']",
    "nabc",
    "n[\"\\",
    "n[\"new\nline\"]",
    "n[\"\t\"]",
    "n\"\\UA66D\"",
    "n\"\"x",
    "n<.>",
    "n[<null>]",
    "n[1]x",
    "n[1]]",
    "n[\"asd]",
    "na\xC3\xA5",
    "n[True]",
    "n1]",
    "n{\"x\": true,",
    "n[][]",
    "n]",
    "n\xEF\xBB\xBF[]",
    "n\xE2\x81\xA0",
    "n[",
    "n{\"a\":{\"b\":1}",
    "n{}}",
    "n{\"\":",
    "n{[",
    "n*",
    "n[a",
    "n{\"a\":\"b\"}#{}",
    "n[\"a\" b]",
    "n{\"a\":1,\"a\":1}",
    "n{\"a\":{},\"b\":{},\"a\":{}}",
    "n[\x0C]",
    "n[\xE2\x80\x83]",
    "n[\"\xFF\"]",
    "n[\"\xE0\xFF\"]",
    "n[\"\xFC\x80\x80\x80\x80\x80\"]",
    "n[\"\xE9\"]",
    "n[\"\x81\"]",
    "n[\"\xC0\xAF\"]",
    "n[\"\xED\xA0\x80\xED\xB0\x80\"]",
    "n[\"\xF0\x9F\x98\"]",
    "n[\"01234567\x01\"]",
    "n\x01",
    "n[\"a\x00\"]",
};

static void suite_is_judged(void **state)
{
    struct orch_json_doc d = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(suite); i++) {
        struct orch_json_fault f = { 0 };
        char *copy;
        int rc = scan_bytes(&d, suite[i] + 1, strlen(suite[i] + 1), NULL, &f, &copy);
        if ((rc == 0) != (suite[i][0] == 'y'))
            fail_msg("%s: %d %s", suite[i], rc, f.rule ? f.rule : "");
        free(copy);
    }
    assert_true(ORCH_ARRAY_LEN(suite) >= 120);
    orch_json_doc_free(&d);
    (void)state;
}

/* Each special byte at each place of the eight that are looked at together, and at each length. */
static void string_bytes_are_found_wherever_they_stand(void **state)
{
    struct orch_json_doc d = { 0 };
    struct orch_json_fault f;
    for (size_t n = 1; n <= 24; n++) {
        for (size_t at = 0; at < n; at++) {
            for (int c = 0; c < 256; c++) {
                char text[32];
                memset(text, 'x', sizeof text);
                text[0] = text[n + 1] = '"';
                text[at + 1] = (char)c;
                bool good = c >= 0x20 && c < 0x80 && c != '"' && c != '\\';
                int rc = orch_json_scan(&d, (struct orch_slice){ text, n + 2 }, NULL, &f);
                if ((rc == 0) != good)
                    fail_msg("byte %02x at %zu of %zu: %d", c, at, n, rc);
                if (good)
                    assert_int_equal(d.toks[0].end, n + 1);
                else if (c == '"')
                    assert_int_equal(f.byte, at + 2);
                else if (c != '\\')
                    assert_int_equal(f.byte, at + 1);
            }
        }
    }
    orch_json_doc_free(&d);
    (void)state;
}

static void tokens_describe_the_text(void **state)
{
    static const char text[] = " {\"a\": [1, {\"b\":\"\\u0000x\"}], \"c\":-5.5 , \"d\":\"\" }";
    cleanup_json struct orch_json_doc d = { 0 };
    static const struct orch_json_tok want[] = {
        { 1, 48, 11, 3, ORCH_JSON_OBJECT, 0 },
        { 3, 4, 2, 0, ORCH_JSON_STRING, 0 },
        { 7, 27, 7, 2, ORCH_JSON_ARRAY, 0 },
        { 8, 9, 4, 0, ORCH_JSON_NUMBER, ORCH_JSON_INTEGER },
        { 11, 26, 7, 1, ORCH_JSON_OBJECT, 0 },
        { 13, 14, 6, 0, ORCH_JSON_STRING, 0 },
        { 17, 24, 7, 0, ORCH_JSON_STRING, ORCH_JSON_ESCAPED | ORCH_JSON_HAS_NUL },
        { 30, 31, 8, 0, ORCH_JSON_STRING, 0 },
        { 33, 37, 9, 0, ORCH_JSON_NUMBER, 0 },
        { 41, 42, 10, 0, ORCH_JSON_STRING, 0 },
        { 45, 45, 11, 0, ORCH_JSON_STRING, 0 },
    };
    SCAN(&d, text);
    assert_int_equal(d.n, ORCH_ARRAY_LEN(want));
    assert_int_equal(d.nul_flag, 1);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(want); i++) {
        const struct orch_json_tok *t = &d.toks[i], *w = &want[i];
        if (t->start != w->start || t->end != w->end || t->next != w->next ||
            t->count != w->count || t->type != w->type || t->flags != w->flags)
            fail_msg("token %zu: %u..%u next %u count %u type %u flags %u", i, t->start, t->end,
                     t->next, t->count, t->type, t->flags);
    }

    uint32_t a = orch_json_get(&d, 0, "a"), c = orch_json_get(&d, 0, "c");
    assert_int_equal(a, 2);
    assert_true(orch_slice_eq(orch_json_raw(&d, a), "[1, {\"b\":\"\\u0000x\"}]"));
    assert_true(orch_slice_eq(orch_json_raw(&d, c), "-5.5"));
    assert_true(orch_slice_eq(orch_json_raw(&d, orch_json_get(&d, 0, "d")), "\"\""));
    assert_true(orch_slice_eq(orch_json_raw(&d, 6), "\"\\u0000x\""));
    assert_int_equal(orch_json_get(&d, 0, "x"), 0);
    assert_int_equal(orch_json_get(&d, 0, "b"), 0);
    assert_int_equal(orch_json_get(&d, a, "b"), 0);
    assert_int_equal(orch_json_get(&d, c, "b"), 0);

    SCAN(&d, "{\"\\u0061\\n\":1,\"\\ud83d\\ude00\":2}"); /* the same doc again */
    assert_int_equal(d.nul_flag, 0);
    assert_int_equal(orch_json_get(&d, 0, "a\n"), 2);
    assert_int_equal(orch_json_get(&d, 0, "\xF0\x9F\x98\x80"), 4);
    assert_int_equal(orch_json_get(&d, 0, "a"), 0);
    assert_int_equal(orch_json_get(&d, 0, "a\nb"), 0);
    (void)state;
}

static void strings_are_unescaped(void **state)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf b = { 0 };
    SCAN(&d, "[\"\\\"\\\\\\/"
             "\\b\\f\\n\\r\\t|\\u0041\\u00e9\\u20AC\\uD83D\\uDE00z\",\"plain\",\"a\\u0000b\",1]");
    assert_int_equal(orch_json_string(&d, 1, &b), 0);
    assert_string_equal(b.p, "\"\\/\b\f\n\r\t|A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z");
    assert_true(orch_json_string_eq(&d, 1, b.p));
    b.n = 0;
    assert_int_equal(orch_json_string(&d, 2, &b), 0);
    assert_string_equal(b.p, "plain");
    assert_true(orch_json_string_eq(&d, 2, "plain"));
    assert_false(orch_json_string_eq(&d, 2, "plai"));
    assert_false(orch_json_string_eq(&d, 2, "plain "));
    b.n = 0;
    assert_int_equal(orch_json_string(&d, 3, &b), 0);
    assert_int_equal(b.n, 3);
    assert_memory_equal(b.p, "a\0b", 3);
    assert_false(orch_json_string_eq(&d, 3, "a"));
    assert_int_equal(orch_json_string(&d, 4, &b), -EINVAL);
    assert_false(orch_json_string_eq(&d, 4, "1"));
    (void)state;
}

static void numbers_are_read_exactly(void **state)
{
    static const struct {
        const char *text;
        double v;
        uint8_t flags;
        bool is_int;
        int64_t i;
    } cases[] = {
        { "0", 0, ORCH_JSON_INTEGER, true, 0 },
        { "-0", -0.0, ORCH_JSON_INTEGER, true, 0 },
        { "-17", -17, ORCH_JSON_INTEGER, true, -17 },
        { "9007199254740992", 9007199254740992.0, ORCH_JSON_INTEGER, true,
          INT64_C(9007199254740992) },
        { "9007199254740993", 9007199254740992.0, ORCH_JSON_INTEGER | ORCH_JSON_BIG, true,
          INT64_C(9007199254740993) },
        { "-9007199254740993", -9007199254740992.0, ORCH_JSON_INTEGER | ORCH_JSON_BIG, true,
          -INT64_C(9007199254740993) },
        { "9223372036854775807", 0x1p63, ORCH_JSON_INTEGER | ORCH_JSON_BIG, true, INT64_MAX },
        { "9223372036854775808", 0x1p63, ORCH_JSON_INTEGER | ORCH_JSON_BIG, false, 0 },
        { "-9223372036854775808", -0x1p63, ORCH_JSON_INTEGER | ORCH_JSON_BIG, true, INT64_MIN },
        { "-9223372036854775809", -0x1p63, ORCH_JSON_INTEGER | ORCH_JSON_BIG, false, 0 },
        { "18446744073709551617", 0x1p64, ORCH_JSON_INTEGER | ORCH_JSON_BIG, false, 0 },
        { "1.0", 1, 0, false, 0 },
        { "1e3", 1000, 0, false, 0 },
        { "0.1", 0.1, 0, false, 0 },
        { "-0.0", -0.0, 0, false, 0 },
        { "1E-400", 0, 0, false, 0 },
        { "0e999999", 0, 0, false, 0 },
        { "5e-324", 5e-324, 0, false, 0 },
        { "2.2250738585072011e-308", 0x0.fffffffffffffp-1022, 0, false, 0 },
        { "1.7976931348623157e308", 1.7976931348623157e308, 0, false, 0 },
        { "17976931348623157e292", 1.7976931348623157e308, 0, false, 0 },
        { "1e23", 1e23, 0, false, 0 },
        { "123456789012345678901234567890.5", 123456789012345678901234567890.5, 0, false, 0 },
        { "9007199254740993.0000000000000000000000000000000000000000000000", 9007199254740992.0, 0,
          false, 0 },
        { "9007199254740993.0000000000000000000000000000000000000000000001", 9007199254740994.0, 0,
          false, 0 },
        { "0.0000000000000000000000000000000000000000000000000000000001e60", 100, 0, false, 0 },
    };
    cleanup_json struct orch_json_doc d = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        int64_t got = 0;
        SCAN(&d, cases[i].text);
        double v = orch_json_number(&d, 0);
        if (memcmp(&v, &cases[i].v, sizeof v) != 0)
            fail_msg("%s: %a", cases[i].text, v);
        assert_int_equal(d.toks[0].flags, cases[i].flags);
        assert_int_equal(orch_json_int(&d, 0, &got), cases[i].is_int);
        if (got != cases[i].i)
            fail_msg("%s: %lld", cases[i].text, (long long)got);
    }
    SCAN(&d, "\"1\"");
    assert_true(isnan(orch_json_number(&d, 0)));
    assert_false(orch_json_int(&d, 0, &(int64_t){ 0 }));
    (void)state;
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* An object of that many keys, left in b; what it takes. */
static double scan_keys(struct orch_buf *b, int keys, size_t *last)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf canon = { 0 };
    struct orch_json_fault f;
    orch_buf_consume(b, b->n);
    orch_buf_char(b, '{');
    for (int i = 0; i < keys; i++)
        orch_buf_printf(b, "\"%s a long prefix that all keys share %06d\":%d,",
                        i & 1 ? "\\u006b" : "k", i, i);
    *last = b->n;
    orch_buf_str(b, "\"last\":0}");
    double start = cpu_seconds();
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ b->p, b->n }, NULL, &f), 0);
    assert_int_equal(d.toks[0].count, keys + 1);
    orch_json_canonical(&d, 0, &canon);
    return cpu_seconds() - start;
}

/* With pairwise comparison ten times the keys take a hundred times as long. */
static void large_objects_stay_linear(void **state)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf b = { 0 };
    struct orch_json_fault f;
    enum { KEYS = 100000 };
    size_t last;

    double few = scan_keys(&b, KEYS / 10, &last), many = scan_keys(&b, KEYS, &last);
    if (many > 40 * few)
        fail_msg("%d keys: %g s, %d: %g s", KEYS / 10, few, KEYS, many);

    b.n = last;
    orch_buf_printf(&b, "\"k a long prefix that all keys share %06d\":0}", KEYS - 1);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ b.p, b.n }, NULL, &f), -EBADMSG);
    assert_string_equal(f.rule, "duplicate key");
    assert_int_equal(f.byte, last);
    (void)state;
}

/* 15 to 18 keys: on both sides of the border between the two ways. */
static void duplicates_are_found_at_every_distance(void **state)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault f;
    for (int n = 2; n <= 18; n++) {
        for (int i = 0; i < n; i++) {
            for (int j = i + 1; j < n; j++) {
                cleanup_buf struct orch_buf b = { 0 };
                for (int k = 0; k < n; k++)
                    orch_buf_printf(&b, "%c\"%c\":[{\"a\":1}]", k ? ',' : '{',
                                    'a' + (k == j ? i : k));
                orch_buf_char(&b, '}');
                assert_int_equal(orch_json_scan(&d, (struct orch_slice){ b.p, b.n }, NULL, &f),
                                 -EBADMSG);
                assert_string_equal(f.rule, "duplicate key");
                assert_int_equal(f.byte, 1 + j * 14);
            }
        }
    }
    (void)state;
}

static void a_large_token_array_is_given_back(void **state)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf b = { 0 };
    struct orch_json_fault f;
    enum { VALUES = 500000 };
    orch_buf_str(&b, "[1");
    for (int i = 1; i < VALUES; i++)
        orch_buf_str(&b, ",1");
    orch_buf_char(&b, ']');
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ b.p, b.n }, NULL, &f), 0);
    assert_int_equal(d.n, VALUES + 1);
    assert_int_equal(d.toks[0].count, VALUES);
    SCAN(&d, "[1]");
    assert_true(d.cap < 1000);
    const struct orch_json_tok *before = d.toks;
    SCAN(&d, "[2]");
    assert_ptr_equal(d.toks, before);
    (void)state;
}

/* ---- text */

static void quote_escapes_and_repairs(void **state)
{
    static const struct {
        const char *in;
        size_t n;
        const char *want;
    } cases[] = {
        { NULL, 0, "\"\"" },
        { "plain", 5, "\"plain\"" },
        { "a\"b\\c/d", 7, "\"a\\\"b\\\\c/d\"" },
        { "\b\t\n\f\r\x01\x1f\x7f", 8, "\"\\b\\t\\n\\f\\r\\u0001\\u001f\x7f\"" },
        { "a\0b", 3, "\"a\\u0000b\"" },
        { "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 9, "\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\"" },
        { "x\xFFy", 3, "\"x\xEF\xBF\xBDy\"" },
        { "\x80\x80", 2, "\"\xEF\xBF\xBD\xEF\xBF\xBD\"" },
        { "\xE2\x82", 2, "\"\xEF\xBF\xBD\"" }, /* a cut sequence is one */
        { "\xF0\x9F\x98z", 4, "\"\xEF\xBF\xBDz\"" },
        { "\xE0\x80\x80", 3,
          "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"" }, /* an overlong one is none */
        { "\xED\xA0\x80", 3, "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"" },
        { "0123456789\n0123456789\xC3\xA9"
          "0123456789",
          33,
          "\"0123456789\\n0123456789\xC3\xA9"
          "0123456789\"" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        cleanup_buf struct orch_buf b = { 0 };
        orch_json_quote(&b, (struct orch_slice){ cases[i].in, cases[i].n });
        assert_string_equal(b.p, cases[i].want);
        bool valid = strstr(cases[i].want, "\xEF\xBF\xBD") == NULL;
        assert_int_equal(orch_utf8_valid((struct orch_slice){ cases[i].in, cases[i].n }), valid);
    }
    (void)state;
}

/* RFC 8785, appendix B. */
static void numbers_are_written_as_ecmascript_does(void **state)
{
    static const struct {
        uint64_t bits;
        const char *want;
    } cases[] = {
        { 0x0000000000000000, "0" },
        { 0x8000000000000000, "-0" }, /* canonical "0": below */
        { 0x0000000000000001, "5e-324" },
        { 0x8000000000000001, "-5e-324" },
        { 0x7fefffffffffffff, "1.7976931348623157e+308" },
        { 0xffefffffffffffff, "-1.7976931348623157e+308" },
        { 0x4340000000000000, "9007199254740992" },
        { 0xc340000000000000, "-9007199254740992" },
        { 0x4430000000000000, "295147905179352830000" },
        { 0x7fffffffffffffff, "null" },
        { 0x7ff0000000000000, "null" },
        { 0x44b52d02c7e14af5, "9.999999999999997e+22" },
        { 0x44b52d02c7e14af6, "1e+23" },
        { 0x44b52d02c7e14af7, "1.0000000000000001e+23" },
        { 0x444b1ae4d6e2ef4e, "999999999999999700000" },
        { 0x444b1ae4d6e2ef4f, "999999999999999900000" },
        { 0x444b1ae4d6e2ef50, "1e+21" },
        { 0x3eb0c6f7a0b5ed8c, "9.999999999999997e-7" },
        { 0x3eb0c6f7a0b5ed8d, "0.000001" },
        { 0x41b3de4355555553, "333333333.3333332" },
        { 0x41b3de4355555554, "333333333.33333325" },
        { 0x41b3de4355555555, "333333333.3333333" },
        { 0x41b3de4355555556, "333333333.3333334" },
        { 0x41b3de4355555557, "333333333.33333343" },
        { 0xbecbf647612f3696, "-0.0000033333333333333333" },
        { 0x43143ff3c1cb0959, "1424953923781206.2" },
        /* powers of two whose shortest text is not the nearest of its length */
        { 0x3d30000000000000, "5.684341886080802e-14" },
        { 0x0010000000000000, "2.2250738585072014e-308" },
        { 0x3ff8000000000000, "1.5" },
        { 0x3fb999999999999a, "0.1" },
        { 0x000fffffffffffff, "2.225073858507201e-308" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        cleanup_buf struct orch_buf b = { 0 };
        double v;
        memcpy(&v, &cases[i].bits, sizeof v);
        orch_json_put_number(&b, v);
        assert_string_equal(b.p, cases[i].want);
    }
    (void)state;
}

static void numbers_survive_the_round_trip(void **state)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf b = { 0 };
    uint64_t bits = 88172645463325252u; /* xorshift: the same values each run */
    for (int i = 0; i < 20000; i++) {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        uint64_t u = i % 4 == 0 ? bits & ~UINT64_C(0xFFFFFFFFFFFFF) : bits;
        double v, back;
        memcpy(&v, &u, sizeof v);
        if (!isfinite(v))
            continue;
        b.n = 0;
        orch_json_put_number(&b, v);
        SCAN(&d, b.p);
        back = orch_json_number(&d, 0);
        if (memcmp(&v, &back, sizeof v) != 0)
            fail_msg("%a became %s", v, b.p);
    }
    (void)state;
}

static void canonical_form_follows_rfc_8785(void **state)
{
    static const struct {
        const char *in, *want;
    } cases[] = {
        /* section 3.2.2 and 3.2.4 */
        { "{\"numbers\":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],\n"
          "\"string\":\"\\u20ac$\\u000F\\u000aA'\\u0042\\u0022\\u005c\\\\\\\"\\/"
          "\",\"literals\":[null,true,false]}",
          "{\"literals\":[null,true,false],\"numbers\":[333333333.3333333,1e+30,4.5,0.002,1e-27],"
          "\"string\":\"\xE2\x82\xAC$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"}" },
        /* section 3.2.3: by UTF-16 code units */
        { "{\"\\u20ac\":\"Euro Sign\",\"\\r\":\"Carriage Return\",\"\\ufb33\":\"Hebrew Letter "
          "Dalet With Dagesh\","
          "\"1\":\"One\",\"\\ud83d\\ude00\":\"Emoji: Grinning Face\",\"\\u0080\":\"Control\","
          "\"\\u00f6\":\"Latin Small Letter O With Diaeresis\"}",
          "{\"\\r\":\"Carriage Return\",\"1\":\"One\",\"\xC2\x80\":\"Control\","
          "\"\xC3\xB6\":\"Latin Small Letter O With Diaeresis\",\"\xE2\x82\xAC\":\"Euro Sign\","
          "\"\xF0\x9F\x98\x80\":\"Emoji: Grinning Face\",\"\xEF\xAC\xB3\":\"Hebrew Letter Dalet "
          "With Dagesh\"}" },
        { "{\"\xEF\xAC\xB3\":1,\"\xF0\x9F\x98\x80\":2,\"\xEE\x80\x80\":3,\"\xED\x9F\xBF\":4}",
          "{\"\xED\x9F\xBF\":4,\"\xF0\x9F\x98\x80\":2,\"\xEE\x80\x80\":3,\"\xEF\xAC\xB3\":1}" },
        { " { } ", "{}" },
        { "[ ]", "[]" },
        { "{ \"a\" : 1 }", "{\"a\":1}" },
        { "[-0, -0.0, 0e5, 10, -10, 1.0, 100e-2]", "[0,0,0,10,-10,1,1]" },
        { "[9007199254740993, 1e21, 123456789012345678901]",
          "[9007199254740992,1e+21,123456789012345680000]" },
        { "{\"b\":{\"z\":1,\"y\":[{\"d\":1,\"c\":2}]},\"a\":\"\\/\"}",
          "{\"a\":\"/\",\"b\":{\"y\":[{\"c\":2,\"d\":1}],\"z\":1}}" },
        { "{\"aa\":1,\"a\":2,\"\":3,\"a\\u0000\":4,\"B\":5}",
          "{\"\":3,\"B\":5,\"a\":2,\"a\\u0000\":4,\"aa\":1}" },
        { "{\"q\":1,\"p\":2,\"o\":3,\"n\":4,\"m\":5,\"l\":6,\"k\":7,\"j\":8,\"i\":9,"
          "\"h\":10,\"g\":11,\"f\":12,\"e\":13,"
          "\"\\u0064\":14,\"c\":15,\"b\":16,\"a\":17}",
          "{\"a\":17,\"b\":16,\"c\":15,\"d\":14,\"e\":13,\"f\":12,\"g\":11,"
          "\"h\":10,\"i\":9,\"j\":8,\"k\":7,\"l\":6,\"m\":5,"
          "\"n\":4,\"o\":3,\"p\":2,\"q\":1}" },
        { "\"\\u007f\\u0000\\b\"", "\"\x7f\\u0000\\b\"" },
    };
    cleanup_json struct orch_json_doc d = { 0 };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        cleanup_buf struct orch_buf once = { 0 };
        cleanup_buf struct orch_buf twice = { 0 };
        SCAN(&d, cases[i].in);
        orch_json_canonical(&d, 0, &once);
        assert_string_equal(once.p, cases[i].want);
        SCAN(&d, once.p);
        orch_json_canonical(&d, 0, &twice);
        assert_string_equal(twice.p, once.p);
    }
    (void)state;
}

static void builder_composes_documents(void **state)
{
    struct orch_json *o = orch_json_object(), *a = orch_json_array(), *in = orch_json_object();
    cleanup_buf struct orch_buf b = { 0 };
    orch_json_set_str(o, "s", "a\"\xFF");
    orch_json_set_str(o, "none", NULL);
    orch_json_set_num(o, "n", 1e15);
    orch_json_set_num(o, "f", 0.1);
    orch_json_set_num(o, "bad", NAN);
    orch_json_set_bool(o, "yes", true);
    orch_json_set_bool(o, "no", false);
    orch_json_add_take(a, orch_json_array());
    orch_json_set_num(in, "k", 1);
    orch_json_set_num(in, "k", 2);
    orch_json_add_take(a, in);
    orch_json_set_take(o, "list", a);
    orch_json_print(o, false, &b);
    assert_string_equal(
        b.p,
        "{\"s\":\"a\\\"\xEF\xBF\xBD\",\"none\":null,\"n\":1000000000000000,\"f\":0.1,\"bad\":null,"
        "\"yes\":true,\"no\":false,\"list\":[[],{\"k\":2}]}");
    size_t before = b.n;
    orch_json_print(o, true, &b);
    assert_true(b.n > 2 * before);
    cleanup_json struct orch_json_doc d = { 0 };
    SCAN(&d, b.p + before);
    orch_json_free(o);
    (void)state;
}

/* ---- Lua */

static struct orch_state *new_state(enum orch_context ctx)
{
    struct orch_err err;
    struct orch_state *s =
        orch_state_new(&(struct orch_state_opts){ .ctx = ctx,
                                                  .lua_dir = "lua",
                                                  .memory_bytes = ctx == ORCH_CTX_SCRIPT
                                                                      ? 0
                                                                      : 64 << 20 },
                       &err);
    if (!s)
        fail_msg("%s", err.msg);
    lua_State *L = orch_state_lua(s);
    assert_int_equal(orch_luaopen_json(L), 1);
    lua_pushliteral(L, "json");
    lua_insert(L, -2);
    lua_rawset(L, LUA_GLOBALSINDEX); /* a bounded state's globals are read-only for scripts alone */
    return s;
}

/* Runs the text; its result, if any, is on the stack. */
static int run(struct orch_state *s, const char *text, int nresults, struct orch_err *err)
{
    int rc = orch_state_load(s, "test", orch_slice_str(text), err);
    return rc < 0 ? rc : orch_state_pcall(s, 0, nresults, err);
}

/* Each must end without an error. */
static const char *const scripts[] = {
    /* values */
    "local v = json.decode('{\"a\":[1,2.5,\"x\",true,false,null],\"b\":{}}')\n"
    "assert(v.a[1] == 1 and v.a[2] == 2.5 and v.a[3] == 'x' and v.a[4] == true and v.a[5] == "
    "false)\n"
    "assert(v.a[6] == json.null and #v.a == 6 and next(v.b) == nil)",
    "local n = 0 for i, e in ipairs(json.decode('[5,6,7]')) do n = n + i * e end assert(n == 38)",
    "assert(json.decode('null') == json.null and json.decode('\"\\\\u00e9\\\\u0000\"') == "
    "'\\195\\169\\0')",
    "assert(json.decode(' -0 ') == 0 and 1 / json.decode('-0') < 0 and json.decode('1e-400') == 0)",
    "local t = json.decode('{\"a\":null,\"b\":1}') assert(t.a == json.null and t.b == 1)",
    /* malformed text is the world's fault, a wrong type the caller's */
    "local v, m, c = json.decode('[1,]') assert(v == nil and m == 'expected a value at byte 3' and "
    "c == 'failed')",
    "local v, m = json.decode('{\"a\":1,\"a\":1}') assert(v == nil and m == 'duplicate key at byte "
    "7')",
    "local v, m = json.decode(('['):rep(65)) assert(v == nil and m == 'nested too deeply at byte "
    "64')",
    "assert(not pcall(json.decode, 12) and not pcall(json.decode) and not pcall(json.decode, {}))",
    "assert(not pcall(json.encode) and not pcall(json.array, 1) and not pcall(json.array))",
    /* [] and {} */
    "assert(json.encode(json.decode('[]')) == '[]' and json.encode(json.decode('{}')) == '{}')",
    "assert(json.encode({}) == '{}' and json.encode(json.array{}) == '[]' and json.encode({1,2}) "
    "== '[1,2]')",
    "local t = {} assert(json.array(t) == t and json.array(t) == t) t[1] = 'x' "
    "assert(json.encode(t) == '[\"x\"]')",
    "local t = {} for i = 100, 1, -1 do t[i] = i end assert(#json.decode(json.encode(t)) == 100)",
    "assert(getmetatable(json.decode('[]')) == 'orch.json.array')",
    "assert(not pcall(setmetatable, json.decode('[]'), {}) and not pcall(json.array, "
    "setmetatable({}, {})))",
    "assert(tostring(json.null) == 'null' and json.encode(json.null) == 'null')\n"
    "assert(json.encode({json.null}) == '[null]')",
    "assert(json.encode({a = json.null}) == '{\"a\":null}' and type(json.null) == 'userdata')",
    "assert(not pcall(function() return json.null.x end) and not pcall(function() json.null.x = 1 "
    "end))",
    /* numbers */
    "assert(json.encode(0.1) == '0.1' and json.encode(1e300) == '1e+300' and json.encode(2^53) == "
    "'9007199254740992')",
    "local v = "
    "json.decode('[9007199254740993,9007199254740993,-9007199254740994,9007199254740992]')\n"
    "assert(type(v[1]) == 'userdata' and tostring(v[1]) == '9007199254740993' and v[1] == v[2] and "
    "v[1] ~= v[3])\n"
    "assert(v[4] == 2^53 and v[1] ~= json.null and v[1] ~= v[4])\n"
    "assert(json.encode(v) == "
    "'[9007199254740993,9007199254740993,-9007199254740994,9007199254740992]')\n"
    "assert(not pcall(function() return v[1] + 1 end) and not pcall(function() return v[1] < v[2] "
    "end))\n"
    "assert(getmetatable(v[1]) == 'orch.json.integer')",
    "local s = ('7'):rep(64) assert(json.encode(json.decode(s)) == s)",
    /* strings */
    "local s = '' for i = 0, 127 do s = s .. string.char(i) end s = s .. "
    "'\\195\\169\\240\\159\\152\\128'\n"
    "assert(json.decode(json.encode(s)) == s and json.decode(json.encode({[s] = s}))[s] == s)",
    "assert(json.encode('\\n\"\\\\\\1/') == [[\"\\n\\\"\\\\\\u0001/\"]])",
    /* depth: 64 is the most */
    "local t = {} for i = 1, 63 do t = {t} end assert(json.decode(json.encode(t))) assert(not "
    "pcall(json.encode, {t}))",
    "local s = ('['):rep(64) .. (']'):rep(64) assert(json.encode(json.decode(s)) == s)",
    "local t = {a = {b = {1, {c = 'd'}}}} assert(json.encode(json.decode(json.encode(t))) == "
    "json.encode(t))",
};

static void lua_scripts_hold(void **state)
{
    static const enum orch_context contexts[] = { ORCH_CTX_SCRIPT, ORCH_CTX_TOOL };
    struct orch_err err;
    for (size_t c = 0; c < ORCH_ARRAY_LEN(contexts); c++) {
        struct orch_state *s = new_state(contexts[c]);
        for (size_t i = 0; i < ORCH_ARRAY_LEN(scripts); i++) {
            if (run(s, scripts[i], 0, &err) < 0)
                fail_msg("%s\n%s", scripts[i], err.msg);
        }
        orch_state_free(s);
    }
    struct orch_state *s = new_state(ORCH_CTX_POLICY);
    static const char nulls[] = "local t = json.decode('{\"a\":null,\"b\":[null]}')\n"
                                "assert(t.a == nil and t.b[1] == json.null)";
    if (run(s, nulls, 0, &err) < 0)
        fail_msg("%s", err.msg);
    orch_state_free(s);
    (void)state;
}

static void encode_names_what_it_refuses(void **state)
{
    static const struct {
        const char *expr, *why;
    } cases[] = {
        { "print", "value: function cannot be JSON" },
        { "nil", "value: nil cannot be JSON (orch.json.null is its null)" },
        { "{args={items={1,2,print}}}", "args.items[3]: function cannot be JSON" },
        { "{[\"a b\"]={x=coroutine.create(print)}}", "[\"a b\"].x: thread cannot be JSON" },
        { "{a=io.stdout}", "a: userdata cannot be JSON" },
        { "{a={0/0}}", "a[1]: NaN and infinity cannot be JSON" },
        { "{-1/0}", "[1]: NaN and infinity cannot be JSON" },
        { "{a=\"\\255\"}", "a: string is not UTF-8" },
        { "{a={[\"\\255\"]=1}}", "a[\"\xEF\xBF\xBD\"]: key is not UTF-8" },
        { "{a={1,2,x=3}}", "a: mixed keys (they must be strings, or 1 to n)" },
        { "{a={x=3,[true]=1}}", "a: mixed keys (they must be strings, or 1 to n)" },
        { "{[1.5]=1}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "{[2]=1}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "{[0]=1,2}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "{1,2,nil,4}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "{1,2,nil,4,x=1}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "json.array{x=1}", "value: mixed keys (they must be strings, or 1 to n)" },
        { "{p=setmetatable({},{__index={x=1}})}",
          "p: an empty table with a metatable cannot be JSON" },
        { "(function() local t={} t.t=t return t end)()",
          "t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t."
          "t.t.t.t.t.t.t.t."
          "t.t.t.t.t.t.t.t.t.t.t.t: nested deeper than 64 levels, or inside itself" },
        { "(function() local s=('x'):rep(2^20) local t={} for i=1,65 do t[i]=s end return t end)()",
          "[64]: more than 64 MiB of JSON" },
    };
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT);
    struct orch_err err;
    lua_State *L = orch_state_lua(s);
    int top = lua_gettop(L);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        cleanup_buf struct orch_buf out = { 0 };
        cleanup_buf struct orch_buf text = { 0 };
        char why[512] = "", tiny[8];
        orch_buf_str(&out, "before");
        orch_buf_printf(&text, "return %s", cases[i].expr);
        assert_int_equal(run(s, text.p, 1, &err), 0);
        assert_int_equal(orch_lua_encode_json(L, -1, &out, why, sizeof why), -EINVAL);
        assert_string_equal(why, cases[i].why);
        assert_string_equal(out.p, "before");
        assert_int_equal(lua_gettop(L), top + 1);
        assert_int_equal(orch_lua_encode_json(L, top + 1, &out, tiny, sizeof tiny), -EINVAL);
        assert_memory_equal(tiny, why, sizeof tiny - 1);
        assert_int_equal(orch_lua_encode_json(L, top + 1, &out, NULL, 0), -EINVAL);
        lua_settop(L, top);
    }
    assert_int_equal(run(s, "return select(2, pcall(json.encode, {a=print}))", 1, &err), 0);
    assert_string_equal(lua_tostring(L, -1), "orch.json.encode: a: function cannot be JSON");
    orch_state_free(s);
    (void)state;
}

static void nulls_are_dropped_kept_and_stripped(void **state)
{
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT);
    lua_State *L = orch_state_lua(s);
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf out = { 0 };

    SCAN(&d, "{\"a\":null,\"b\":[null,{\"c\":null},[]]}");
    assert_true(orch_lua_push_json(L, &d, 0, 0));
    assert_int_equal(orch_lua_encode_json(L, -1, &out, NULL, 0), 0);
    assert_string_equal(out.p, "{\"b\":[null,{},[]]}");

    assert_true(orch_lua_push_json(L, &d, 0, ORCH_LUA_JSON_KEEP_NULL));
    lua_getfield(L, -1, "a");
    lua_getglobal(L, "json");
    lua_getfield(L, -1, "null");
    assert_true(lua_rawequal(L, -1, -3));
    lua_pop(L, 3);
    orch_lua_strip_nulls(L, -1);
    out.n = 0;
    assert_int_equal(orch_lua_encode_json(L, -1, &out, NULL, 0), 0);
    assert_string_equal(out.p, "{\"b\":[null,{},[]]}");
    lua_pop(L, 1);
    lua_getfield(L, -1, "a"); /* the original is as it was */
    assert_int_equal(lua_type(L, -1), LUA_TUSERDATA);
    assert_int_equal(lua_gettop(L), 3);

    SCAN(&d, "[null,{\"a\":[1]}]");
    assert_false(orch_lua_push_json(L, &d, 0, 0));
    assert_int_equal(lua_objlen(L, -1), 2);
    assert_false(orch_lua_push_json(L, &d, 2, ORCH_LUA_JSON_KEEP_NULL));
    lua_getfield(L, -1, "a");
    assert_int_equal(lua_objlen(L, -1), 1);
    orch_state_free(s);
    (void)state;
}

static void what_a_value_lost_is_left_out_of_its_json(void **state)
{
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT);
    lua_State *L = orch_state_lua(s);
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf out = { 0 };

    SCAN(&d, "{ \"z\" : 1.0, \"n\":null, \"\\u0061\":9007199254740993, \"l\":[ {\"x\":null, "
             "\"y\":1e2},null ,[]], \"o\":{}, \"p\":{\"q\":null} }");
    orch_lua_push_json(L, &d, 0, ORCH_LUA_JSON_KEEP_NULL);
    orch_lua_json_less(L, -1, &d, 0, &out);
    assert_string_equal(out.p, "{\"z\":1.0,\"n\":null,\"\\u0061\":9007199254740993,\"l\":[{\"x\":"
                               "null,\"y\":1e2},null,[]],\"o\":{},\"p\":{\"q\":null}}");
    lua_setglobal(L, "v");
    assert_int_equal(luaL_dostring(L, "v.n = nil v.l[1].x = nil v.p.q = nil return v"), 0);
    out.n = 0;
    orch_lua_json_less(L, 1, &d, 0, &out);
    assert_string_equal(
        out.p,
        "{\"z\":1.0,\"\\u0061\":9007199254740993,\"l\":[{\"y\":1e2},null,[]],\"o\":{},\"p\":{}}");
    assert_int_equal(luaL_dostring(L, "v.a = nil return v"), 0);
    out.n = 0;
    orch_lua_json_less(L, -1, &d, 0, &out);
    assert_null(strstr(out.p, "9007"));
    assert_int_equal(lua_gettop(L), 2);
    orch_state_free(s);
    (void)state;
}

static int strip_it(lua_State *L)
{
    orch_lua_strip_nulls(L, 1);
    return 1;
}

static void strip_refuses_cycles(void **state)
{
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT);
    lua_State *L = orch_state_lua(s);
    lua_pushcfunction(L, strip_it);
    assert_int_equal(luaL_dostring(L, "local t = {} t.t = t return t"), 0);
    assert_int_equal(lua_pcall(L, 1, 1, 0), LUA_ERRRUN);
    assert_non_null(strstr(lua_tostring(L, -1), "nested too deeply"));
    orch_state_free(s);
    (void)state;
}

/* As deep as any scanner limit allows. */
static void deep_documents_become_lua(void **state)
{
    struct orch_state *s = new_state(ORCH_CTX_SCRIPT);
    lua_State *L = orch_state_lua(s);
    cleanup_json struct orch_json_doc d = { 0 };
    char text[2048];
    struct orch_json_fault f;
    memset(text, '[', 1024);
    memset(text + 1024, ']', 1024);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ text, sizeof text },
                                    &(struct orch_json_limits){ .depth = 1024 }, &f),
                     0);
    orch_lua_push_json(L, &d, 0, 0);
    orch_lua_strip_nulls(L, -1);
    assert_int_equal(lua_gettop(L), 2);
    orch_state_free(s);
    (void)state;
}

static void exercise(lua_State *L, void *ud)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    SCAN(&d, "{\"list\":[1,\"\\u00e9scaped\",null,{\"k\":null},12345678901234567890],\"o\":{\"p\":{"
             "\"q\":[[]]}}}");
    orch_luaopen_json(L);
    int json = lua_gettop(L);
    orch_lua_push_json(L, &d, 0, ORCH_LUA_JSON_KEEP_NULL);
    orch_lua_strip_nulls(L, -1);
    orch_lua_json_less(L, -1, &d, 0, &out);
    out.n = 0;
    if (orch_lua_encode_json(L, -1, &out, NULL, 0) < 0)
        luaL_error(L, "encode");
    lua_getfield(L, json, "decode");
    lua_pushlstring(L, out.p, out.n);
    lua_call(L, 1, 1);
    lua_getfield(L, json, "encode");
    lua_insert(L, -2);
    lua_call(L, 1, 1);
    lua_settop(L, json - 1);
    (void)ud;
}

/* Memory ends a little later each time, until it suffices: nothing leaks (the sanitizer looks at
 * the C side) and the state goes on. */
static void memory_may_end_anywhere(void **state)
{
    struct orch_err err;
    int failed = 0;
    for (size_t more = 0;; more += 16) {
        struct orch_state *s = orch_state_new(&(struct orch_state_opts){ .ctx = ORCH_CTX_SCRIPT,
                                                                         .lua_dir = "lua" },
                                              &err);
        assert_non_null(s);
        /* The allocator's limit has a reserve of 1/16. */
        orch_state_set_limits(s, (orch_state_memory(s) + more) * 16 / 17, 0, 0);
        int rc = orch_state_protect(s, exercise, NULL, &err);
        if (rc == 0) {
            orch_state_free(s);
            break;
        }
        assert_int_equal(rc, -ENOMEM);
        failed++;
        orch_state_set_limits(s, 0, 0, 0);
        assert_int_equal(orch_state_protect(s, exercise, NULL, &err), 0);
        orch_state_free(s);
    }
    assert_true(failed > 30);
    (void)state;
}

/* What is done in C counts: no loop around these calls outlasts the budget. */
static void work_is_charged(void **state)
{
    static const char script[] =
        "local big = json.decode('[' .. string.rep('[],', 5000) .. '0]')\n"
        "local blank = string.rep(' ', 100000) local bad = blank .. '\\255'\n"
        "for i = 1, 1000 do %s end";
    static const char *const work[] = { "json.encode(big)", "pcall(json.encode, bad)",
                                        "json.decode(blank)", "pcall(json.encode, {[bad] = 1})",
                                        "json.decode(json.encode(big))" };
    struct orch_err err;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(work); i++) {
        cleanup_buf struct orch_buf text = { 0 };
        struct orch_state *s = new_state(ORCH_CTX_POLICY);
        orch_buf_printf(&text, script, work[i]);
        orch_state_set_limits(s, 64 << 20, 1000000, 0);
        assert_true(run(s, text.p, 0, &err) < 0);
        assert_int_equal(err.cls, ORCH_CLASS_LIMIT);
        orch_state_free(s);
    }
    (void)state;
}

static void one_line_for_every_reader(void **state)
{
    static const char *const cases[][2] = {
        { "", "" },
        { "{\"a\":1}", "{\"a\":1}" },
        { "{\r\n\"a\":\r1\n}", "{  \"a\": 1 }" },
        { "[\"\xc2\x85 \xe2\x80\xa8\xe2\x80\xa9\"]", "[\"\\u0085 \\u2028\\u2029\"]" },
        { "[\"\xc3\xa9\xe2\x82\xac\xe2\x80\xaa\xc2\x84\xc2\xa0\"]",
          "[\"\xc3\xa9\xe2\x82\xac\xe2\x80\xaa\xc2\x84\xc2\xa0\"]" },
        { "\xe2\x80", "\xe2\x80" },
        { "\xc2", "\xc2" },
    };
    (void)state;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct orch_buf b = { 0 };
        orch_buf_str(&b, "before\n");
        orch_buf_str(&b, cases[i][0]);
        orch_json_one_line(&b, 7);
        assert_int_equal(b.n, 7 + strlen(cases[i][1]));
        assert_memory_equal(b.p, "before\n", 7);
        assert_string_equal(b.p + 7, cases[i][1]);
        orch_buf_free(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(malformed_texts_name_rule_and_byte),
        cmocka_unit_test(limits_are_refused_at_the_byte),
        cmocka_unit_test(suite_is_judged),
        cmocka_unit_test(string_bytes_are_found_wherever_they_stand),
        cmocka_unit_test(tokens_describe_the_text),
        cmocka_unit_test(strings_are_unescaped),
        cmocka_unit_test(numbers_are_read_exactly),
        cmocka_unit_test(large_objects_stay_linear),
        cmocka_unit_test(duplicates_are_found_at_every_distance),
        cmocka_unit_test(a_large_token_array_is_given_back),
        cmocka_unit_test(quote_escapes_and_repairs),
        cmocka_unit_test(numbers_are_written_as_ecmascript_does),
        cmocka_unit_test(numbers_survive_the_round_trip),
        cmocka_unit_test(canonical_form_follows_rfc_8785),
        cmocka_unit_test(builder_composes_documents),
        cmocka_unit_test(lua_scripts_hold),
        cmocka_unit_test(encode_names_what_it_refuses),
        cmocka_unit_test(nulls_are_dropped_kept_and_stripped),
        cmocka_unit_test(strip_refuses_cycles),
        cmocka_unit_test(what_a_value_lost_is_left_out_of_its_json),
        cmocka_unit_test(deep_documents_become_lua),
        cmocka_unit_test(memory_may_end_anywhere),
        cmocka_unit_test(work_is_charged),
        cmocka_unit_test(one_line_for_every_reader),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
