/* The MCP client over HTTP: eras, sessions, streams that break off, headers, tokens. */
#include "client_peers.h"

/* ---- HTTP: eras, sessions, streams */

static void test_url_era(void **state)
{
    (void)state;
    struct owner w = { 0 }, v = { 0 };
    open_any(&w, "old", true);
    assert_string_equal(seen.p, "server/discover  2026-07-28; initialize  ; "
                                "notifications/initialized s-1 2025-06-18; GET s-1 2025-06-18; ");
    fini(&w);
    seen.n = 0;
    open_any(&v, "old", true);
    assert_true(strncmp(seen.p, "initialize  ; ", 14) == 0);
    orch_mcp_client_goodbye(v.c, said, &v);
    UNTIL(v.said);
    assert_true(holds(seen.p, "DELETE s-2 2025-06-18; "));
    fini(&v);
}

static void test_no_evidence(void **state)
{
    (void)state;
    static const char *const modes[] = { "status401", "status403", "status500", "status503",
                                         "moved" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(modes); i++) {
        struct owner w = { 0 };
        seen.n = 0;
        make_http(&w, modes[i],
                  (struct orch_mcp_client_opts){
                      .protocol = strcmp(modes[i], "moved") == 0 ? "2026-07-28" : NULL });
        UNTIL(w.ready);
        assert_true(holds(w.err.msg, i < 4 ? modes[i] + 6 : "HTTP 302") &&
                    w.err.cls == ORCH_CLASS_UPSTREAM);
        assert_string_equal(seen.p, "server/discover  2026-07-28; ");
        fini(&w);
    }
    struct owner w = { 0 };
    make(&w, (struct orch_mcp_client_opts){ .url = "http://127.0.0.1:1/" });
    UNTIL(w.ready);
    assert_int_equal(w.err.cls, ORCH_CLASS_UPSTREAM);
    fini(&w);
}

static void test_session_id(void **state)
{
    (void)state;
    struct owner w = { 0 };
    make_http(&w, "badsession", (struct orch_mcp_client_opts){ .protocol = "2025-11-25" });
    UNTIL(w.ready);
    assert_true(holds(w.err.msg, "is no session's id"));
    fini(&w);
}

/* Two calls find it forgotten at once: it is begun anew once, and both are asked again. */
static void test_session_forgotten(void **state)
{
    (void)state;
    struct owner w = { 0 };
    open_any(&w, "legacy", true);
    for (int times = 1; times <= 2; times++) {
        forget_session = true;
        seen.n = 0;
        start(&w, "echo", "{\"a\":1}");
        start(&w, "echo", "{\"a\":1}");
        UNTIL(w.done == 2u * (unsigned)times);
        assert_true(!w.err.cls && holds(w.result.p, "{\"a\":1}") && w.ready == 1);
        assert_int_equal(count(&seen, "initialize "), 1);
        assert_int_equal(count(&seen, "tools/call"), 4);
    }
    fini(&w);
}

static void test_resumed(void **state)
{
    (void)state;
    struct owner w = { 0 };
    cut = true;
    open_any(&w, "legacy", true);
    assert_string_equal(say(&w, "late", "{}"), "{\"resumed\":\"e-7\"}");
    fini(&w);
    struct owner v = { 0 }; /* in the modern era such a request is lost */
    open_any(&v, "modern", true);
    assert_string_equal(say(&v, "late", "{}"), "peer: the stream ended before the answer");
    assert_int_equal(v.err.cls, ORCH_CLASS_CLOSED);
    fini(&v);
}

static void test_answered_elsewhere(void **state)
{
    (void)state;
    struct owner w = { 0 };
    with_get = true;
    open_any(&w, "legacy", true);
    UNTIL(get_stream);
    start(&w, "late", "{}");
    UNTIL(n_held);
    cleanup_free char *message =
        orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"by\":\"GET\"}}", held_id);
    send_event(get_stream, message, NULL);
    UNTIL(w.done && n_gone);
    assert_string_equal(w.result.p, "{\"by\":\"GET\"}");
    send_event(get_stream, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}",
               NULL);
    UNTIL(w.changed);
    fini(&w);
}

static void test_server_gone(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct owner w = { 0 };
        open_any(&w, i ? "modern" : "legacy", true);
        if (i)
            UNTIL(n_held); /* the subscription */
        start(&w, "hold", "{}");
        UNTIL(n_held == 1u + (unsigned)i);
        end_streams();
        UNTIL(w.done);
        assert_int_equal(w.err.cls, ORCH_CLASS_CLOSED);
        assert_true(orch_mcp_client_alive(w.c) && holds(say(&w, "echo", "{}"), "got"));
        fini(&w);
    }
}

/* The subscription's stream broke off: it is opened anew, and the list may have changed
 * meanwhile. */
static void test_subscribed_again(void **state)
{
    (void)state;
    struct owner w = { 0 };
    open_any(&w, "modern", true);
    UNTIL(w.notified && n_held);
    end_streams();
    UNTIL(w.notified == 2);
    assert_true(w.changed == 1 && count(&seen, "subscriptions/listen") == 2);
    fini(&w);
}

static void test_headers(void **state)
{
    (void)state;
    struct owner w = { 0 };
    open_any(&w, "modern", true);
    say(&w, "Zürich ", "{}");
    assert_true(holds(last_headers.p, "Mcp-Method: tools/call\n") &&
                holds(last_headers.p, "Mcp-Name: =?base64?WsO8cmljaCA=?=\n"));
    assert_true(holds(last_headers.p, "MCP-Protocol-Version: 2026-07-28\n"));
    fini(&w);
}

/* ---- a giver of tokens */

struct giver {
    const char *token;
    unsigned signs, challenges, withdrawn;
    enum { AGAIN_NOW, AGAIN_LATER, AS_IT_IS, NO, WAIT } then;
    struct orch_mcp_challenge *q;
};

static void sign(void *ud, struct orch_mcp_headers *h, const char *method, const char *at)
{
    struct giver *g = ud;
    g->signs++;
    assert_true(strcmp(at, url) == 0 &&
                (strcmp(method, "POST") == 0 || strcmp(method, "GET") == 0));
    if (g->token)
        orch_mcp_header_add(h, "Authorization", orch_slice_str(g->token));
}

static void decide(void *ud)
{
    struct giver *g = ud;
    struct orch_err why = { 0 };
    orch_err_setc(&why, ORCH_CLASS_DENIED, EACCES, "no token is to be had");
    g->token = "Bearer good";
    orch_mcp_challenge_end(g->q,
                           g->then == AS_IT_IS ? ORCH_MCP_AS_IT_IS
                           : g->then == NO     ? ORCH_MCP_REFUSED
                                               : ORCH_MCP_AGAIN,
                           &why);
}

static void challenged(void *ud, struct orch_mcp_challenge *q, const struct orch_http_response *r,
                       unsigned times)
{
    struct giver *g = ud;
    assert_true(r->status == 401 && times == 1);
    g->challenges++;
    g->q = q;
    if (g->then == AGAIN_LATER)
        orch_loop_post(loop, decide, g);
    else if (g->then != WAIT)
        decide(g);
}

static void challenge_withdrawn(void *ud, struct orch_mcp_challenge *q)
{
    struct giver *g = ud;
    assert_ptr_equal(q, g->q);
    g->withdrawn++;
}

static void test_tokens(void **state)
{
    (void)state;
    for (int then = AGAIN_NOW; then <= WAIT; then++) {
        struct giver g = { .then = (__typeof__(g.then))then };
        struct orch_mcp_auth auth = { sign, challenged, challenge_withdrawn, &g };
        struct owner w = { 0 };
        unauthorized = true;
        seen.n = 0;
        make_http(&w, "modern", (struct orch_mcp_client_opts){ .auth = &auth });
        if (then == WAIT) {
            UNTIL(g.challenges);
            orch_mcp_client_give_up(w.c, "enough");
            assert_int_equal(g.withdrawn, 1);
        }
        UNTIL(w.ready);
        assert_int_equal(g.challenges, 1);
        if (then == AS_IT_IS)
            assert_true(holds(w.err.msg, "HTTP 401 to server/discover: it wants authorization") &&
                        w.err.cls == ORCH_CLASS_UPSTREAM);
        else if (then == NO)
            assert_true(holds(w.err.msg, "peer: no token is to be had") &&
                        w.err.cls == ORCH_CLASS_DENIED);
        else if (then == WAIT)
            assert_true(holds(w.err.msg, "peer: enough"));
        else
            assert_true(!w.err.cls && holds(say(&w, "echo", "{}"), "got") &&
                        count(&seen, "server/discover") == 2);
        fini(&w);
        end_streams();
    }
}

int main(void)
{
    begin();
    const struct CMUnitTest tests[] = { T(test_url_era),     T(test_no_evidence),
                                        T(test_session_id),  T(test_session_forgotten),
                                        T(test_resumed),     T(test_answered_elsewhere),
                                        T(test_server_gone), T(test_subscribed_again),
                                        T(test_headers),     T(test_tokens) };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    end();
    return failed;
}
