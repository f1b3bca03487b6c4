/* The MCP server session without a transport: lines in, lines out, in both eras; what is malformed;
 * questions to the client; subscriptions; bounds. And the header values of the modern era. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "odd_locale.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "mcp/headers.h"
#include "mcp/session.h"

#define META(caps) \
    "\"_meta\":{\"io.modelcontextprotocol/" \
    "protocolVersion\":\"2026-07-28\",\"io.modelcontextprotocol/clientCapabilities\":" caps "}"

struct host {
    struct orch_mcp_session *s;
    struct orch_mcp_request *held[2000]; /* calls that wait */
    unsigned n_held, cancelled, detached, replies;
    struct orch_buf reply; /* what a question was answered */
    char method[64], name[64];
    bool has_state;
    bool slow; /* a cancelled call goes on for a while */
};

static int tools_list(void *ud, struct orch_slice cursor, struct orch_buf *out,
                      struct orch_buf *next, struct orch_err *err)
{
    (void)ud;
    if (cursor.n && !orch_slice_eq(cursor, "two"))
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "unknown cursor");
    orch_buf_str(out, cursor.n ? "[{\"name\":\"b\"}]" : "[{\"name\":\"a\"}]");
    if (!cursor.n)
        orch_buf_str(next, "two");
    return 0;
}

static void take(struct host *h, struct orch_mcp_request *rq, const char *method,
                 const struct orch_mcp_params *p)
{
    snprintf(h->method, sizeof h->method, "%s", method);
    snprintf(h->name, sizeof h->name, "%.*s", (int)p->name.n, p->name.p ? p->name.p : "");
    h->has_state = p->state != 0;
    h->held[h->n_held++] = rq;
}

static void tool_call(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                      const struct orch_mcp_params *p)
{
    (void)d;
    take(ud, rq, "tools/call", p);
}

static void request(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                    const char *method, const struct orch_mcp_params *p)
{
    (void)d;
    take(ud, rq, method, p);
}

static void forget(struct host *h, struct orch_mcp_request *rq)
{
    for (unsigned i = 0; i < h->n_held; i++)
        if (h->held[i] == rq)
            h->held[i] = h->held[--h->n_held];
}

static void cancel(void *ud, struct orch_mcp_request *rq)
{
    struct host *h = ud;
    h->cancelled++;
    if (h->slow)
        return;
    forget(h, rq);
    orch_mcp_request_drop(rq);
}

static void detach(void *ud, struct orch_mcp_request *rq)
{
    struct host *h = ud;
    h->detached++;
    forget(h, rq);
}

static const struct orch_mcp_server_ops ops = {
    .tools_list = tools_list,
    .tool_call = tool_call,
    .request = request,
    .cancel = cancel,
    .detach = detach,
    .server_info = "{\"name\":\"t\",\"version\":\"1\"}",
    .features = ORCH_MCP_RESOURCES | ORCH_MCP_PROMPTS | ORCH_MCP_COMPLETIONS | ORCH_MCP_TASKS,
    .max_calls = 1500,
};

static int setup(void **state)
{
    struct host *h = orch_xcalloc(1, sizeof *h);
    h->s = orch_mcp_session_new(&ops, h, &(struct orch_json_limits){ 0 });
    *state = h;
    return 0;
}

static int teardown(void **state)
{
    struct host *h = *state;
    orch_mcp_session_free(h->s);
    orch_buf_free(&h->reply);
    free(h);
    return 0;
}

static bool feed(struct host *h, const char *line)
{
    return orch_mcp_session_feed(h->s, orch_slice_str(line), NULL);
}

/* What was sent since the last time. */
static const char *sent(struct host *h)
{
    static char text[1 << 20];
    struct orch_buf *out = orch_mcp_session_out(h->s);
    assert_true(out->n < sizeof text);
    memcpy(text, out->p ? out->p : "", out->n);
    text[out->n] = 0;
    out->n = 0;
    return text;
}

static void expect(struct host *h, const char *line, const char *has)
{
    feed(h, line);
    const char *text = sent(h);
    if (!strstr(text, has))
        fail_msg("%s\n gave %s\n without %s", line, text, has);
}

static void legacy(struct host *h, const char *capabilities)
{
    cleanup_free char *line = orch_xasprintf(
        "{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{\"protocolVersion\":"
        "\"2025-11-25\","
        "\"capabilities\":%s,\"clientInfo\":{\"name\":\"c\",\"version\":\"1\"}}}",
        capabilities);
    expect(h, line, "\"protocolVersion\":\"2025-11-25\"");
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}");
}

static void test_malformed(void **state)
{
    struct host *h = *state;
    static const struct {
        const char *line, *has;
    } rows[] = {
        { "{", "-32700" },
        { "[]", "-32600" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{" META("{}") "}}",
          "params.name" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
          "call\",\"params\":{\"name\":\"a\",\"arguments\":[]," META("{}") "}}",
          "params.arguments" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
          "call\",\"params\":{\"name\":\"a\",\"inputResponses\":null," META("{}") "}}",
          "inputResponses" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
          "call\",\"params\":{\"name\":\"a\",\"requestState\":7," META("{}") "}}",
          "requestState" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
          "call\",\"params\":{\"name\":\"a\",\"_meta\":{\"io.modelcontextprotocol/"
          "protocolVersion\":\"2026-07-28\"}}}",
          "clientCapabilities" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resources/read\",\"params\":{" META(
              "{}") "}}",
          "params.uri" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"prompts/"
          "get\",\"params\":{\"name\":\"p\",\"arguments\":7," META("{}") "}}",
          "params.arguments" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resources/"
          "subscribe\",\"params\":{\"uri\":\"x\"," META("{}") "}}",
          "-32601" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tasks/list\",\"params\":{" META("{}") "}}",
          "-32601" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"subscriptions/listen\",\"params\":{" META(
              "{}") "}}",
          "params.notifications" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"subscriptions/"
          "listen\",\"params\":{\"notifications\":{\"resourceSubscriptions\":[1]}," META("{}") "}}",
          "lists of at most" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\",\"params\":{\"cursor\":7," META(
              "{}") "}}",
          "cursor" },
        { "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
          "list\",\"params\":{\"cursor\":\"three\"," META("{}") "}}",
          "unknown cursor" },
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(rows); i++)
        expect(h, rows[i].line, rows[i].has);
    assert_int_equal(h->n_held, 0);
    assert_false(feed(h, "{\"jsonrpc\":\"2.0\",\"id\":99,\"result\":{}}"));
    assert_false(feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/whatever\"}"));
    assert_string_equal(sent(h), "");
}

static void test_pages(void **state)
{
    struct host *h = *state;
    expect(h,
           "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\",\"params\":{" META("{}") "}}",
           "\"nextCursor\":\"two\"");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/"
            "list\",\"params\":{\"cursor\":\"two\"," META("{}") "}}");
    const char *text = sent(h);
    assert_non_null(strstr(text, "\"b\""));
    assert_null(strstr(text, "nextCursor"));
}

static void test_features(void **state)
{
    struct host *h = *state;
    static const char *const methods[] = { "resources/list", "resources/templates/list",
                                           "prompts/list", "completion/complete" };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(methods); i++) {
        cleanup_free char *line =
            orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%zu,\"method\":\"%s\",\"params\":{" META(
                               "{}") "}}",
                           i, methods[i]);
        assert_true(feed(h, line));
        assert_string_equal(h->method, methods[i]);
    }
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"resources/"
            "read\",\"params\":{\"uri\":\"t:\\/\\/a\"," META("{}") "}}");
    assert_string_equal(h->name, "t://a");
    orch_mcp_respond(h->held[0], ORCH_SLICE("\"resources\":[]"));
    assert_string_equal(sent(h), "{\"jsonrpc\":\"2.0\",\"id\":0,\"result\":{\"resultType\":"
                                 "\"complete\",\"resources\":[]}}\n");
    assert_int_equal(orch_mcp_session_in_flight(h->s), 4);
}

static void test_input_required(void **state)
{
    struct host *h = *state;
    feed(h,
         "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"a\"," META(
             "{\"elicitation\":{},\"roots\":{}}") "}}");
    assert_int_equal(orch_mcp_request_caps(h->held[0]), ORCH_MCP_CAP_FORM | ORCH_MCP_CAP_ROOTS);
    orch_mcp_respond_typed(h->held[0], "input_required", ORCH_SLICE("\"requestState\":\"x\""));
    assert_string_equal(sent(h), "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"resultType\":\"input_"
                                 "required\",\"requestState\":\"x\"}}\n");
    h->n_held = 0;
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/"
            "call\",\"params\":{\"name\":\"a\",\"requestState\":\"x\",\"inputResponses\":{}," META(
                "{\"elicitation\":{\"url\":{}},\"sampling\":{\"tools\":{}},\"extensions\":{\"io."
                "modelcontextprotocol/tasks\":{}}}") "}}");
    assert_true(h->has_state);
    assert_int_equal(orch_mcp_request_caps(h->held[0]), ORCH_MCP_CAP_URL | ORCH_MCP_CAP_SAMPLING |
                                                            ORCH_MCP_CAP_SAMPLING_TOOLS |
                                                            ORCH_MCP_CAP_TASKS);
}

static void on_reply(void *ud, const struct orch_json_doc *d, uint32_t result, uint32_t error)
{
    struct host *h = ud;
    h->replies++;
    h->reply.n = 0;
    orch_buf_str(&h->reply, result ? "result " : "error ");
    orch_buf_slice(&h->reply, orch_json_raw(d, result ? result : error));
}

static void test_questions(void **state)
{
    struct host *h = *state;
    legacy(h, "{\"elicitation\":{\"form\":{},\"url\":{}}}");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"a\"}}");
    struct orch_mcp_request *rq = h->held[0];
    assert_int_equal(orch_mcp_request_caps(rq), ORCH_MCP_CAP_FORM | ORCH_MCP_CAP_URL);
    uint64_t id = orch_mcp_ask(rq, "elicitation/create", ORCH_SLICE("{\"message\":\"m\"}"),
                               on_reply, h);
    assert_int_not_equal(id, 0);
    cleanup_free char *wanted =
        orch_xasprintf("{\"jsonrpc\":\"2.0\",\"method\":\"elicitation/"
                       "create\",\"params\":{\"message\":\"m\"},\"id\":%llu}\n",
                       (unsigned long long)id);
    assert_string_equal(sent(h), wanted);
    /* Answers that are none: another id, a string, a serial that is over. */
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":\"1\",\"result\":{}}");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":0,\"result\":{}}");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":65537,\"result\":{}}");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":99999999999999999999,\"result\":{}}");
    assert_int_equal(h->replies, 0);
    cleanup_free char *answer =
        orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%llu,\"result\":{\"action\":\"accept\"}}",
                       (unsigned long long)id);
    feed(h, answer);
    assert_int_equal(h->replies, 1);
    assert_string_equal(h->reply.p, "result {\"action\":\"accept\"}");
    feed(h, answer); /* once */
    assert_int_equal(h->replies, 1);
    /* Taken back, and taken back by the call's end: the client is told. */
    id = orch_mcp_ask(rq, "roots/list", ORCH_SLICE("{}"), on_reply, h);
    sent(h);
    orch_mcp_ask_cancel(rq, id);
    assert_non_null(strstr(sent(h), "notifications/cancelled"));
    id = orch_mcp_ask(rq, "roots/list", ORCH_SLICE("{}"), on_reply, h);
    sent(h);
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
            "cancelled\",\"params\":{\"requestId\":1}}");
    assert_non_null(strstr(sent(h), "\"requestId\""));
    assert_int_equal(h->cancelled, 1);
    cleanup_free char *late =
        orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%llu,\"error\":{\"code\":1,\"message\":\"x\"}}",
                       (unsigned long long)id);
    feed(h, late);
    assert_int_equal(h->replies, 1);
}

static void test_questions_bounded(void **state)
{
    struct host *h = *state;
    legacy(h, "{}");
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/call\",\"params\":{\"name\":\"a\"}}");
    unsigned n = 0;
    while (n < 5000 && orch_mcp_ask(h->held[0], "roots/list", ORCH_SLICE("{}"), on_reply, h))
        n++;
    assert_int_equal(n, 1024);
    orch_mcp_request_drop(h->held[0]);
    h->n_held = 0;
    sent(h);
    feed(h, "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/call\",\"params\":{\"name\":\"a\"}}");
    assert_int_not_equal(orch_mcp_ask(h->held[0], "roots/list", ORCH_SLICE("{}"), on_reply, h), 0);
}

static void test_calls_bounded(void **state)
{
    struct host *h = *state;
    for (int i = 0; i < 1510; i++) {
        cleanup_free char *line =
            orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%d,\"method\":\"tools/"
                           "call\",\"params\":{\"name\":\"a\"," META("{}") "}}",
                           i);
        feed(h, line);
    }
    assert_int_equal(h->n_held, 1500);
    assert_non_null(strstr(sent(h), "too many calls in flight (limit 1500"));
    orch_mcp_session_end(h->s);
    assert_int_equal(h->cancelled, 1500);
    assert_false(feed(h, "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}"));
}

#define HELD \
    "{\"jsonrpc\":\"2.0\",\"id\":%d,\"method\":\"tools/" \
    "%s\",\"params\":{%s\"_meta\":{\"progressToken\":%d}}}"

static void feed_held(struct host *h, int id, const char *method, const char *params)
{
    cleanup_free char *line = orch_xasprintf(HELD, id, method, params, id);
    assert_true(feed(h, line));
}

static void test_hold(void **state)
{
    struct host *h = *state;
    orch_mcp_session_hold(h->s, true);
    legacy(h, "{}");
    sent(h);
    feed_held(h, 1, "list", "");
    feed_held(h, 2, "call", "\"name\":\"two\",");
    feed_held(h, 3, "list", "\"cursor\":\"none\",");
    feed_held(h, 4, "call", "\"name\":\"four\",");
    feed_held(h, 5, "call", "\"name\":\"five\",");
    assert_string_equal(sent(h), "");
    assert_int_equal(orch_mcp_session_in_flight(h->s), 5);
    expect(h, "{\"jsonrpc\":\"2.0\",\"id\":6,\"method\":\"ping\"}", "\"id\":6,\"result\":{}");
    expect(h, "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"ping\"}", "id is in use");
    expect(h, "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"tools/call\",\"params\":{}}",
           "params.name must be a string");
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
            "cancelled\",\"params\":{\"requestId\":4}}");
    assert_int_equal(orch_mcp_session_in_flight(h->s), 4);
    orch_mcp_session_held_progress(h->s, 0.5, ORCH_SLICE("soon"));
    const char *notes = sent(h);
    assert_non_null(strstr(notes, "{\"progressToken\":1,\"progress\":0.5,\"message\":\"soon\"}"));
    assert_null(strstr(notes, "\"progressToken\":4"));
    orch_mcp_session_hold(h->s, false);
    const char *answers = sent(h),
               *first = strstr(answers, "\"id\":1,\"result\":{\"tools\":[{\"name\":\"a\"}]"),
               *third = strstr(answers, "\"id\":3,\"error\"");
    assert_true(first && third && first < third && h->cancelled == 0);
    assert_int_equal(h->n_held, 2);
    assert_string_equal(h->name, "five"); /* the last one */
    orch_mcp_session_held_progress(h->s, 0.6, ORCH_SLICE("soon"));
    assert_string_equal(sent(h), "");
    orch_mcp_respond(h->held[0], ORCH_SLICE("\"content\":[]"));
    assert_non_null(strstr(sent(h), "\"id\":2,"));
    h->held[0] = h->held[--h->n_held];

    /* What is held ends with the session, unknown to the host. */
    orch_mcp_session_hold(h->s, true);
    feed_held(h, 8, "call", "\"name\":\"x\",");
    orch_mcp_session_end(h->s);
    assert_int_equal(h->cancelled, 1); /* five */
    assert_int_equal(orch_mcp_session_in_flight(h->s), 0);
}

static void test_hold_bounded(void **state)
{
    struct host *h = *state;
    legacy(h, "{}");
    orch_mcp_session_hold(h->s, true);
    cleanup_buf struct orch_buf big = { 0 };
    orch_buf_str(&big, "\"name\":\"x\",\"arguments\":{\"a\":\"");
    for (int i = 0; i < 5 << 20; i++)
        orch_buf_char(&big, 'x');
    orch_buf_str(&big, "\"},");
    sent(h);
    for (int i = 1; i <= 3; i++)
        feed_held(h, i, "call", big.p);
    assert_string_equal(sent(h), "");
    feed_held(h, 4, "call", big.p);
    assert_non_null(strstr(sent(h), "\"id\":4,\"error\":{\"code\":-31001,\"message\":\"tools/call: "
                                    "over 16777216 bytes of calls wait"));
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
            "cancelled\",\"params\":{\"requestId\":1}}");
    feed_held(h, 5, "call", big.p);
    assert_string_equal(sent(h), "");
    orch_mcp_session_hold(h->s, false);
    assert_int_equal(h->n_held, 3);
}

static void test_detached_at_the_end(void **state)
{
    struct host *h = *state;
    legacy(h, "{}");
    feed(h,
         "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"prompts/get\",\"params\":{\"name\":\"a\"}}");
    h->slow = true;
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
            "cancelled\",\"params\":{\"requestId\":1}}");
    orch_mcp_session_end(h->s);
    assert_int_equal(h->cancelled, 1); /* once */
    orch_mcp_session_free(h->s);
    assert_int_equal(h->detached, 1);
    assert_int_equal(h->n_held, 0);
    h->s = orch_mcp_session_new(&ops, h, &(struct orch_json_limits){ 0 });
}

static void test_listen(void **state)
{
    struct host *h = *state;
    expect(h,
           "{\"jsonrpc\":\"2.0\",\"id\":\"L\",\"method\":\"subscriptions/"
           "listen\",\"params\":{\"notifications\":{\"toolsListChanged\":true,"
           "\"promptsListChanged\":false,\"resourceSubscriptions\":[\"t://a\",\"t://"
           "a\"],\"taskIds\":[\"id\"]}," META("{}") "}}",
           "{\"toolsListChanged\":true,\"resourceSubscriptions\":[\"t://"
           "a\"],\"taskIds\":[\"id\"]},\"_meta\":{\"io.modelcontextprotocol/"
           "subscriptionId\":\"L\"}}}");
    assert_int_equal(orch_mcp_session_in_flight(h->s), 0);
    orch_mcp_session_changed(h->s, ORCH_MCP_PROMPTS_CHANGED);
    orch_mcp_session_resource_updated(h->s, ORCH_SLICE("t://b"));
    orch_mcp_session_task_changed(h->s, ORCH_SLICE("other"), ORCH_SLICE("\"status\":\"working\""));
    assert_string_equal(sent(h), "");
    orch_mcp_session_changed(h->s, ORCH_MCP_TOOLS_CHANGED);
    assert_non_null(strstr(sent(h), "notifications/tools/list_changed"));
    orch_mcp_session_resource_updated(h->s, ORCH_SLICE("t://a"));
    assert_non_null(strstr(sent(h), "\"uri\":\"t://a\""));
    orch_mcp_session_task_changed(h->s, ORCH_SLICE("id"), ORCH_SLICE("\"status\":\"working\""));
    assert_non_null(strstr(sent(h), "notifications/tasks"));
    feed(h, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
            "cancelled\",\"params\":{\"requestId\":\"L\"}}");
    orch_mcp_session_changed(h->s, ORCH_MCP_TOOLS_CHANGED);
    assert_string_equal(sent(h), "");
}

static void test_listens_bounded(void **state)
{
    struct host *h = *state;
    for (int i = 0; i < 65; i++) {
        cleanup_free char *line =
            orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%d,\"method\":\"subscriptions/"
                           "listen\",\"params\":{\"notifications\":{}," META("{}") "}}",
                           i);
        feed(h, line);
    }
    assert_non_null(strstr(sent(h), "too many subscriptions/listen"));
}

static void test_subscribe(void **state)
{
    struct host *h = *state;
    legacy(h, "{}");
    sent(h);
    orch_mcp_session_resource_updated(h->s, ORCH_SLICE("t://a"));
    assert_string_equal(sent(h), "");
    expect(h,
           "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"resources/"
           "subscribe\",\"params\":{\"uri\":\"t://a\"}}",
           "\"result\":{}");
    orch_mcp_session_resource_updated(h->s, ORCH_SLICE("t://a"));
    assert_string_equal(sent(h), "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/"
                                 "updated\",\"params\":{\"uri\":\"t://a\"}}\n");
    orch_mcp_session_changed(h->s, ORCH_MCP_RESOURCES_CHANGED);
    assert_string_equal(
        sent(h), "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/list_changed\"}\n");
    expect(h,
           "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"resources/"
           "unsubscribe\",\"params\":{\"uri\":\"t://a\"}}",
           "\"result\":{}");
    orch_mcp_session_resource_updated(h->s, ORCH_SLICE("t://a"));
    assert_string_equal(sent(h), "");
    for (int i = 0; i < 1001; i++) {
        cleanup_free char *line =
            orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":3,\"method\":\"resources/"
                           "subscribe\",\"params\":{\"uri\":\"t://%d\"}}",
                           i);
        feed(h, line);
    }
    assert_non_null(strstr(sent(h), "at most 1000 URIs"));
}

/* ---- a transport with streams */

struct sink {
    void *stream;
    struct orch_buf text;
    int status;
};

static void send_message(void *ud, void *stream, struct orch_slice message, int status)
{
    struct sink *k = ud;
    k->stream = stream;
    k->status = status;
    k->text.n = 0;
    orch_buf_slice(&k->text, message);
}

static void test_sink(void **state)
{
    struct host *h = *state;
    struct sink k = { 0 };
    int a, b;
    orch_mcp_session_sink(h->s, send_message, NULL, &k);
    orch_mcp_session_feed(h->s,
                          ORCH_SLICE(
                              "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"nope\",\"params\":{" META(
                                  "{}") "}}"),
                          &a);
    assert_int_equal(k.status, 404);
    orch_mcp_session_feed(
        h->s, ORCH_SLICE("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\",\"params\":{}}"),
        &a);
    assert_int_equal(k.status, 400);
    orch_mcp_session_feed(h->s, ORCH_SLICE(""), &a);
    assert_int_equal(k.status, 400);
    orch_mcp_session_feed(
        h->s,
        ORCH_SLICE(
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/"
            "call\",\"params\":{\"name\":\"a\",\"_meta\":{\"progressToken\":1,"
            "\"io.modelcontextprotocol/protocolVersion\":\"2026-07-28\",\"io.modelcontextprotocol/"
            "clientCapabilities\":{}}}}"),
        &a);
    orch_mcp_session_feed(
        h->s,
        ORCH_SLICE(
            "{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"tools/list\",\"params\":{" META("{}") "}}"),
        &b);
    assert_ptr_equal(k.stream, &b);
    orch_mcp_progress(h->held[0], 1, -1, (struct orch_slice){ 0 });
    assert_ptr_equal(k.stream, &a);
    assert_int_equal(k.status, 0);
    orch_mcp_respond_error(h->held[0], ORCH_RPC_MISSING_CAPABILITY, ORCH_SLICE("x"),
                           (struct orch_slice){ 0 });
    assert_int_equal(k.status, 400);
    orch_buf_free(&k.text);
}

/* ---- header values */

static const char *decoded(const char *value)
{
    static char text[256];
    cleanup_buf struct orch_buf out = { 0 };
    if (orch_mcp_header_decode(orch_slice_str(value), &out) < 0)
        return NULL;
    snprintf(text, sizeof text, "%.*s", (int)out.n, out.p ? out.p : "");
    return text;
}

static void test_header_values(void **state)
{
    (void)state;
    assert_string_equal(decoded("plain text"), "plain text");
    assert_string_equal(decoded("=?base64?SGVsbG8=?="), "Hello");
    assert_string_equal(decoded("=?base64?w7w=?="), "ü");
    assert_string_equal(decoded("=?base64?"
                                "?="),
                        "");
    assert_string_equal(decoded("SGVsbG8="), "SGVsbG8=");
    assert_string_equal(decoded("=?base64?SGVsbG8="), "=?base64?SGVsbG8=");
    assert_null(decoded("=?base64?SGVsbG8?="));
    assert_null(decoded("=?base64?SGVs!!!bG8=?="));
    assert_null(decoded("=?base64?SG=sbG8=?="));
    assert_null(decoded("\xc3\xbc"));
}

static const char *annotated(const char *schema, struct orch_mcp_param_list *list)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    const char *why = NULL;
    assert_int_equal(orch_json_scan(&d, orch_slice_str(schema), &(struct orch_json_limits){ 0 },
                                    &fault),
                     0);
    orch_mcp_params_read(&d, 0, list, &why);
    return why;
}

static const char *checked(const struct orch_mcp_param_list *list, const char *args,
                           const char *name, const char *value)
{
    static struct orch_http_request q;
    static char why[256];
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    cleanup_free char *wrapped = orch_xasprintf("[%s]", args);
    q.n_headers = name ? 1 : 0;
    if (name)
        q.headers[0] = (struct orch_http_header){ orch_slice_str(name), orch_slice_str(value) };
    assert_int_equal(orch_json_scan(&d, orch_slice_str(wrapped), &(struct orch_json_limits){ 0 },
                                    &fault),
                     0);
    return orch_mcp_params_check(list, &q, &d, 1, why, sizeof why);
}

static void test_param_headers(void **state)
{
    (void)state;
    struct orch_mcp_param_list list = { 0 };
    static const char *const bad[] = {
        "{\"properties\":{\"a\":{\"type\":\"number\",\"x-mcp-header\":\"A\"}}}",
        "{\"properties\":{\"a\":{\"type\":\"string\",\"x-mcp-header\":\"\"}}}",
        "{\"properties\":{\"a\":{\"type\":\"string\",\"x-mcp-header\":\"a b\"}}}",
        "{\"properties\":{\"a\":{\"type\":\"string\",\"x-mcp-header\":7}}}",
        "{\"properties\":{\"a\":{\"type\":\"string\",\"x-mcp-header\":\"A\"},\"b\":{\"type\":"
        "\"string\",\"x-mcp-header\":\"a\"}}}",
        "{\"x-mcp-header\":\"A\"}",
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(bad); i++) {
        assert_non_null(annotated(bad[i], &list));
        assert_int_equal(list.n, 0);
    }
    assert_null(annotated("{\"properties\":{\"a\":{\"properties\":{\"n\":{\"type\":\"integer\",\"x-"
                          "mcp-header\":\"N\"}}}}}",
                          &list));
    assert_string_equal(list.params[0].header, "Mcp-Param-N");
    assert_null(checked(&list, "{\"a\":{\"n\":7}}", "mcp-param-n", "7"));
    assert_null(checked(&list, "{\"a\":{\"n\":7}}", "Mcp-Param-N", "7.0"));
    assert_null(checked(&list, "{\"a\":{\"n\":null}}", NULL, NULL));
    assert_null(checked(&list, "{}", NULL, NULL));
    assert_non_null(checked(&list, "{\"a\":{\"n\":7}}", NULL, NULL));
    assert_non_null(checked(&list, "{\"a\":{\"n\":7}}", "Mcp-Param-N", "8"));
    assert_non_null(checked(&list, "{\"a\":{\"n\":7}}", "Mcp-Param-N", "0x7"));
    assert_non_null(checked(&list, "{}", "Mcp-Param-N", "7"));
    orch_mcp_params_free(&list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_malformed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_pages, setup, teardown),
        cmocka_unit_test_setup_teardown(test_features, setup, teardown),
        cmocka_unit_test_setup_teardown(test_input_required, setup, teardown),
        cmocka_unit_test_setup_teardown(test_questions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_questions_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_calls_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hold, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hold_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_detached_at_the_end, setup, teardown),
        cmocka_unit_test_setup_teardown(test_listen, setup, teardown),
        cmocka_unit_test_setup_teardown(test_listens_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_subscribe, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sink, setup, teardown),
        cmocka_unit_test(test_header_values),
        cmocka_unit_test(test_param_headers),
    };
    odd_locale();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
