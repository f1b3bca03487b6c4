/* The MCP client of both eras over both transports, and what is special to a child. */
#include "client_peers.h"

/* ---- both eras over both ways */

static const struct way {
    const char *mode;
    bool http;
} ways[] = { { "legacy", false }, { "modern", false },     { "legacy", true },
             { "modern", true },  { "legacy-json", true }, { "modern-json", true } };

static bool modern(const struct way *y)
{
    return y->mode[0] == 'm';
}

#define EACH_WAY(y) for (const struct way *y = ways; y < ways + ORCH_ARRAY_LEN(ways); y++)

static void test_opened(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        struct orch_mcp_about a = orch_mcp_client_about(w.c);
        assert_int_equal(a.modern, modern(y));
        assert_string_equal(a.version, modern(y) ? "2026-07-28" : "2025-06-18");
        assert_true(
            orch_slice_eq(a.server_info, modern(y) ? "{\"name\":\"m\"}" : "{\"name\":\"l\"}"));
        assert_true(orch_slice_eq(a.instructions, modern(y) ? "\"be kind\"" : ""));
        assert_true(orch_mcp_client_ready(w.c) && orch_mcp_client_alive(w.c) && w.ready == 1);
        fini(&w);
    }
}

static void test_bytes(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        const char *r = say(&w, "echo",
                            "{ \"n\":9007199254740993,\"f\":1e2,\"z\":-0,\"s\":\"\\u00e9\\/\" }");
        assert_true(holds(
            r, "\"arguments\":{ \"n\":9007199254740993,\"f\":1e2,\"z\":-0,\"s\":\"\\u00e9\\/\" }"));
        assert_null(strstr(r, "resultType"));
        assert_int_equal(strstr(r, "clientCapabilities") != NULL, modern(y));
        fini(&w);
    }
}

static void test_meta(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        orch_mcp_client_log_level(w.c, "debug");
        orch_mcp_client_call(
            w.c,
            &(struct orch_mcp_client_request){
                .tool = "echo",
                .args = ORCH_SLICE("{}"),
                .done = done,
                .ud = &w,
                .meta = ORCH_SLICE(
                    "{\"vendor/x\":1.0,\"progressToken\":5,\"io.modelcontextprotocol\\/"
                    "protocolVersion\":\"1\",\"traceparent\":\"t\"}") },
            &fault);
        UNTIL(w.done);
        assert_true(holds(w.result.p, "\"_meta\":{\"vendor/x\":1.0,\"traceparent\":\"t\""));
        assert_null(strstr(w.result.p, "progressToken"));
        assert_int_equal(strstr(w.result.p, "logLevel\":\"debug\"") != NULL, modern(y));
        orch_mcp_client_call(w.c,
                             &(struct orch_mcp_client_request){
                                 .method = "tools/call",
                                 .params = ORCH_SLICE("{\"_meta\":{\"a\":1},\"name\":\"echo\"}"),
                                 .done = done,
                                 .ud = &w },
                             &fault);
        UNTIL(w.done == 2);
        assert_true(holds(w.result.p, "\"got\":{\"name\":\"echo\",\"_meta\":{\"a\":1"));
        assert_null(
            orch_mcp_client_call(w.c,
                                 &(struct orch_mcp_client_request){ .method = "x",
                                                                    .params = ORCH_SLICE("[1]"),
                                                                    .done = done,
                                                                    .ud = &w },
                                 &fault));
        assert_string_equal(fault.msg, "params must be an object");
        fini(&w);
    }
}

static void test_progress(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        assert_true(holds(say(&w, "steps", "{}"), "got"));
        assert_int_equal(w.progress, 2);
        fini(&w);
    }
}

static void test_errors(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        assert_string_equal(say(&w, "fails", "{}"), "peer: no (code -32602)");
        assert_int_equal(w.err.cls, ORCH_CLASS_UPSTREAM);
        assert_string_equal(w.error.p,
                            "{\"code\":-32602,\"message\":\"no\",\"data\":{\"why\":\"x\"}}");
        assert_string_equal(say(&w, "no object", "{}"), "peer: \"result\" is no object");
        if (modern(y)) {
            assert_string_equal(say(&w, "odd type", "{}"),
                                "peer: resultType \"surprise\" of tools/call is unknown");
            assert_string_equal(say(&w, "nothing asked", "{}"),
                                "peer: input_required without a question and without a state");
            assert_true(holds(say(&w, "odd question", "{}"),
                              "asks for what cannot be had: \"ping\" is not offered"));
            assert_string_equal(say(&w, "rounds", "{}"),
                                "peer: tools/call was not done after 16 rounds of questions");
            assert_int_equal(w.err.cls, ORCH_CLASS_LIMIT);
            assert_true(holds(say(&w, "state only", "{}"), "\"requestState\":\"s\""));
        }
        assert_true(holds(say(&w, "echo", "{}"), "got"));
        fini(&w);
    }
}

static void test_strays(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        assert_true(holds(say(&w, "strays", "{}"), "got"));
        assert_int_equal(w.done, 1);
        assert_true(holds(say(&w, "batch", "{}"), "{\"b\":1}"));
        assert_true(orch_mcp_client_alive(w.c) && !w.lost);
        fini(&w);
    }
}

static void test_flood(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        unsigned before = w.notified;
        assert_true(holds(say(&w, "many", "{}"), "got"));
        UNTIL(w.notified >= before + MANY); /* that of the subscription may come too */
        fini(&w);
    }
}

static void test_too_long(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        assert_true(holds(say(&w, "long", "{}"), "is over 65536 bytes (limits.message)"));
        assert_int_equal(w.lost, !y->http); /* over HTTP it is this exchange that ends */
        assert_int_equal(orch_mcp_client_alive(w.c), y->http);
        fini(&w);
    }
}

static void test_asked(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        if (y->http && strstr(y->mode, "json"))
            continue;
        struct owner w = { .then = REPLY };
        open_any(&w, y->mode, y->http);
        struct orch_mcp_client_call *k = start(&w, "ask", "{\"x\":1}");
        UNTIL(w.done);
        if (w.err.cls)
            fail_msg("%s: %s", y->mode, w.err.msg);
        assert_int_equal(w.asked, modern(y) ? 2 : 1);
        assert_int_equal(w.withdrawn, 0);
        assert_true(holds(w.questions.p, "elicitation/create {\"message\":\"who?\"}"));
        assert_true(holds(w.result.p, "{\"action\":\"accept\",\"n\":1.0}"));
        assert_ptr_equal(w.asking, modern(y) || y->http ? k : NULL);
        if (modern(y)) {
            assert_true(holds(w.result.p, "\"requestState\":\"opaque\\u0041\""));
            assert_true(
                holds(w.result.p,
                      "\"inputResponses\":{\"a\":{\"action\":\"accept\",\"n\":1.0},\"b\":{"));
            assert_true(holds(w.result.p, "\"arguments\":{\"x\":1}"));
        }
        fini(&w);
    }
}

static void test_refused(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        if (y->http && strstr(y->mode, "json"))
            continue;
        struct owner w = { .then = REFUSE };
        open_any(&w, y->mode, y->http);
        const char *r = say(&w, "ask", "{}");
        assert_true(holds(r, "nobody is there"));
        assert_int_equal(w.err.cls != 0,
                         modern(y)); /* the call ends; the legacy server is told, and answers */
        fini(&w);
    }
}

/* Each answer over HTTP is an exchange of its own. */
static void test_asks_too_much(void **state)
{
    (void)state;
    for (int over_http = 0; over_http < 2; over_http++) {
        struct owner w = { 0 };
        open_any(&w, "legacy", over_http);
        const char *r = say(&w, "pings", "{}");
        assert_true(holds(r, over_http ? "the server asks faster than it takes answers (257 wait)"
                                       : "got"));
        assert_int_equal(w.lost, over_http);
        fini(&w);
        end_streams();
    }
}

/* What the client is asked ends with the call. */
static void test_question_withdrawn(void **state)
{
    (void)state;
    for (int over_http = 0; over_http < 2; over_http++) {
        struct owner w = { .then = KEEP };
        open_any(&w, "modern", over_http);
        struct orch_mcp_client_call *k = start(&w, "ask", "{}");
        UNTIL(w.asked == 2);
        orch_mcp_client_cancel(k, "enough");
        assert_int_equal(w.withdrawn, 2);
        assert_true(holds(say(&w, "echo", "{}"), "got"));
        assert_int_equal(w.done, 1);
        fini(&w);
    }
}

static void test_cancel(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        struct orch_mcp_client_call *k = start(&w, "hold", "{}");
        size_t gone_before = n_gone;
        assert_true(holds(say(&w, "echo", "{}"), "got")); /* it is there by now */
        orch_mcp_client_cancel(k, "enough");
        if (y->http)
            UNTIL(n_gone > gone_before);
        if (!(y->http && modern(y))) /* there closing the stream says it */
            while (!strstr(say(&w, "cancels", "{}"), "{\"n\":1}"))
                ;
        else
            assert_true(holds(say(&w, "cancels", "{}"), "{\"n\":0}"));
        assert_true(orch_mcp_client_alive(w.c));
        fini(&w);
        web.cancels = 0;
        end_streams();
    }
}

static void test_list_changed(void **state)
{
    (void)state;
    EACH_WAY(y)
    {
        struct owner w = { 0 };
        open_any(&w, y->mode, y->http);
        if (modern(y))
            UNTIL(w.notified); /* the subscription is acknowledged */
        say(&w, "changes", "{}");
        UNTIL(w.changed);
        fini(&w);
    }
}

static void test_freed_inside(void **state)
{
    (void)state;
    static const struct {
        int at;
        const char *tool;
    } when[] = { { AT_READY, NULL },
                 { AT_DONE, "echo" },
                 { AT_NOTE, "many" },
                 { AT_ASKED, "ask" },
                 { AT_LOST, "long" } };
    EACH_WAY(y)
    for (size_t i = 0; i < ORCH_ARRAY_LEN(when); i++) {
        struct owner w = { .then = KEEP };
        if ((when[i].at == AT_LOST && y->http) || strstr(y->mode, "json"))
            continue;
        w.free_at = when[i].at;
        if (y->http)
            make_http(&w, y->mode, (struct orch_mcp_client_opts){ 0 });
        else
            make_child(&w, y->mode, (struct orch_mcp_client_opts){ 0 });
        UNTIL(w.ready);
        if (w.c && when[i].tool)
            start(&w, when[i].tool, "{}");
        UNTIL(!w.c);
        for (int turn = 0; turn < 5; turn++)
            orch_loop_step(loop, 0);
        assert_true(w.done <= 1 && w.ready == 1);
        fini(&w);
        end_streams();
    }
}

/* ---- a child: eras */

static void test_same_process(void **state)
{
    (void)state;
    struct owner w = { 0 };
    open_any(&w, "legacy, asked", false);
    assert_string_equal(marked(), "sdi");
    fini(&w);
    assert_string_equal(marked(), "sdie");
    struct owner v = { 0 }; /* known by now: it is not asked again */
    open_any(&v, "legacy, asked", false);
    assert_string_equal(marked(), "sdiesi");
    fini(&v);
}

static void started_again(const char *mode, int64_t start_ms)
{
    struct owner w = { 0 }, v = { 0 };
    make_child(&w, mode, (struct orch_mcp_client_opts){ .start_ms = start_ms });
    struct orch_mcp_client_call *early = start(&w, "echo",
                                               "{}"); /* waits for whichever process it will be */
    UNTIL(w.done);
    assert_non_null(early);
    assert_true(holds(w.err.cls ? w.err.msg : w.result.p, "got") && w.ready == 1 && !w.lost);
    assert_string_equal(marked(), "sdsi");
    fini(&w);
    make_child(&v, mode, (struct orch_mcp_client_opts){ 0 });
    UNTIL(v.ready);
    assert_string_equal(marked(), "sdsiesi");
    fini(&v);
}

static void test_exits_at_probe(void **state)
{
    (void)state;
    started_again("exits", 0);
}

static void test_hangs_at_probe(void **state)
{
    (void)state;
    started_again("hangs", 20);
}

static void test_late_is_not_silent(void **state)
{
    (void)state;
    struct owner w = { 0 };
    make_child(&w, "late", (struct orch_mcp_client_opts){ .start_ms = 10 });
    for (int64_t end = orch_now_us() + 300 * 1000;
         orch_now_us() < end;) /* many times the probe's, which is what is tested */
        orch_loop_step(loop, 10);
    UNTIL(strcmp(marked(), "s") == 0);
    assert_int_equal(w.ready, 0);
    chmod(marks, 0700);
    UNTIL(w.ready);
    assert_int_equal(w.err.cls, 0);
    assert_int_equal(strncmp(marked(), "sdi", 3), 0);
    fini(&w);
}

/* It answers the probe late, when initialize is on its way: what it says to that counts, which is
 * the last that it was told. */
static void test_late_answer(void **state)
{
    (void)state;
    for (int strict = 0; strict < 2; strict++) {
        struct owner w = { 0 };
        unlink(marks);
        make_child(&w, strict ? "slow, strict" : "slow",
                   (struct orch_mcp_client_opts){ .start_ms = 400 });
        UNTIL(w.ready);
        assert_int_equal(w.err.cls, 0);
        assert_int_equal(orch_mcp_client_about(w.c).modern, strict);
        assert_int_equal(strstr(say(&w, "echo", "{}"), "clientCapabilities") != NULL, strict);
        assert_string_equal(marked(), "sdi");
        fini(&w);
    }
}

static void test_dead_is_no_evidence(void **state)
{
    (void)state;
    struct owner w = { 0 };
    make_child(&w, "dead", (struct orch_mcp_client_opts){ 0 });
    UNTIL(w.ready);
    assert_string_equal(w.err.msg,
                        "peer: the server ended (exit status 9); its stderr ends: about to serve");
    assert_string_equal(marked(), "s");
    assert_null(
        orch_mcp_client_call(w.c,
                             &(struct orch_mcp_client_request){ .method = "ping", .done = done },
                             &fault));
    assert_string_equal(fault.msg, w.err.msg);
    assert_int_equal(w.lost, 0);
    fini(&w);
}

/* Remembered as legacy, it is of the modern era now. */
static void test_verdict_outdated(void **state)
{
    (void)state;
    struct owner w = { 0 }, v = { 0 }, u = { 0 };
    open_any(&w, "changing", false);
    assert_false(orch_mcp_client_about(w.c).modern);
    fini(&w);
    chmod(marks, 0700);
    open_any(&v, "changing", false);
    assert_true(orch_mcp_client_about(v.c).modern);
    assert_true(holds(say(&v, "echo", "{}"), "got"));
    fini(&v);
    open_any(&u, "changing", false);
    assert_string_equal(marked(), "sdsiesidesd");
    fini(&u);
}

static void test_pinned(void **state)
{
    (void)state;
    static const struct {
        const char *mode, *protocol, *marks, *err;
    } cases[] = { { "legacy", "2025-11-25", "si", NULL },
                  { "modern", "2026-07-28", "sd", NULL },
                  { "legacy", "2026-07-28", "sd", "peer: no (code -32601)" },
                  { "modern", "2025-11-25", "si", "peer: no (code -32022)" },
                  { "exits", "2026-07-28", "sd", "peer: the server ended (exit status 3)" } };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(cases); i++) {
        struct owner w = { 0 };
        unlink(marks);
        make_child(&w, cases[i].mode,
                   (struct orch_mcp_client_opts){ .protocol = cases[i].protocol });
        UNTIL(w.ready);
        assert_int_equal(strncmp(marked(), cases[i].marks, 2), 0);
        assert_true(cases[i].err ? holds(w.err.msg, cases[i].err) : !w.err.cls);
        fini(&w);
    }
}

static void test_lost(void **state)
{
    (void)state;
    struct owner w = { 0 };
    open_any(&w, "legacy", false);
    start(&w, "hold", "{}");
    start(&w, "hold", "{}");
    start(&w, "die", "{}");
    UNTIL(w.lost);
    assert_int_equal(w.done, 3);
    assert_string_equal(
        w.err.msg, "peer: the server ended (exit status 5); its stderr ends: about to serve\nboom");
    assert_false(orch_mcp_client_alive(w.c));
    fini(&w);
}

static void test_given_up(void **state)
{
    (void)state;
    struct owner w = { 0 };
    make_child(&w, "hangs", (struct orch_mcp_client_opts){ .protocol = "2026-07-28" });
    start(&w, "echo", "{}");
    UNTIL(strcmp(marked(), "sd") == 0);
    assert_string_equal(orch_mcp_client_opening(w.c), "server/discover");
    orch_mcp_client_give_up(w.c, "no answer in time");
    assert_int_equal(w.ready, 1);
    assert_int_equal(w.done, 1);
    assert_string_equal(w.err.msg, "peer: no answer in time; its stderr ends: about to serve");
    fini(&w);
}

static void test_not_started(void **state)
{
    (void)state;
    const char *const argv[] = { "/no/such/server", NULL };
    struct orch_mcp_client_opts o = { .name = "peer", .argv = argv, .ready = ready };
    assert_null(orch_mcp_client_new(loop, &o, &fault));
    assert_int_equal(fault.cls, ORCH_CLASS_UPSTREAM);
    assert_true(holds(fault.msg, "peer: /no/such/server: "));
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "server") == 0)
        return child(argv[2], argv[3]);
    begin();
    const struct CMUnitTest tests[] = { T(test_opened),
                                        T(test_bytes),
                                        T(test_meta),
                                        T(test_progress),
                                        T(test_errors),
                                        T(test_strays),
                                        T(test_flood),
                                        T(test_too_long),
                                        T(test_asked),
                                        T(test_refused),
                                        T(test_asks_too_much),
                                        T(test_question_withdrawn),
                                        T(test_cancel),
                                        T(test_list_changed),
                                        T(test_freed_inside),
                                        T(test_same_process),
                                        T(test_exits_at_probe),
                                        T(test_hangs_at_probe),
                                        T(test_late_is_not_silent),
                                        T(test_late_answer),
                                        T(test_dead_is_no_evidence),
                                        T(test_verdict_outdated),
                                        T(test_pinned),
                                        T(test_lost),
                                        T(test_given_up),
                                        T(test_not_started) };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    end();
    return failed;
}
