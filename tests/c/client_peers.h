/* For the tests of the MCP client: servers, good and bad, of both eras over both transports, and
 * the client's owner. The stdio ones are the test program itself (PROGRAM server MODE MARKS),
 * the HTTP ones handlers in the same loop. What a tool of theirs does stands in `call`; a
 * result's "got" is the request's params as they came. */
#ifndef TESTS_CLIENT_PEERS_H
#define TESTS_CLIENT_PEERS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "http/server.h"
#include "mcp/client.h"

enum { LIMIT_BYTES = 64 * 1024, MANY = 3000, MANY_PINGS = 1000 };

#define UNTIL(condition) \
    do { \
        int64_t give_up = orch_now_us() + 60 * 1000 * 1000; \
        while (!(condition)) { \
            if (orch_now_us() > give_up) \
                fail_msg("%s:%d: never came true: %s", __FILE__, __LINE__, #condition); \
            orch_loop_step(loop, 20); \
        } \
    } while (0)

/* ---- the servers */

struct peer {
    const char *mode;
    void (*emit)(struct peer *p, const char *message); /* on the stream of what is being answered */
    struct orch_buf asked; /* id of the call that waits for an answer of the client */
    unsigned cancels, refused;
    bool done; /* the last message was the answer */
};

static bool is(const struct peer *p, const char *mode)
{
    return strncmp(p->mode, mode, strlen(mode)) == 0;
}

static void emit(struct peer *p, const char *fmt, ...) ORCH_PRINTF(2, 3);
static void emit(struct peer *p, const char *fmt, ...)
{
    char *text;
    va_list ap;
    va_start(ap, fmt);
    assert_true(vasprintf(&text, fmt, ap) >= 0);
    va_end(ap);
    p->emit(p, text);
    free(text);
}

static void answer(struct peer *p, const char *id, const char *result)
{
    p->done = true;
    emit(p, "{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":%s}", id, result);
}

static void error(struct peer *p, const char *id, int code, const char *data)
{
    p->done = true;
    emit(p,
         "{\"jsonrpc\":\"2.0\",\"id\":%s,\"error\":{\"code\":%d,\"message\":\"no\",\"data\":%s}}",
         id, code, data);
}

static void got(struct peer *p, const char *id, struct orch_slice params, const char *more)
{
    cleanup_free char *result = orch_xasprintf("{%s\"content\":[],\"got\":%.*s}", more,
                                               (int)params.n, params.p);
    answer(p, id, result);
}

static void strays(struct peer *p)
{
    static const char *const lines[] = {
        "Server listening on stdio",
        "",
        "{",
        "[]",
        "[1]",
        "null",
        "{\"jsonrpc\":\"2.0\"}",
        "{\"id\":1,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":999999,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":\"2\",\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":1.5,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":-1,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":0,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":99999999999999999999999999,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"id\":null,\"result\":{}}",
        "{\"jsonrpc\":\"2.0\",\"method\":7}",
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{},\"error\":{}}",
        "{\"a\":1,\"a\":2}",
        "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
        "progress\",\"params\":{\"progressToken\":77777,\"progress\":1}}",
        "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/cancelled\",\"params\":{\"requestId\":7}}"
    };
    for (size_t i = 0; i < ORCH_ARRAY_LEN(lines); i++)
        p->emit(p, lines[i]);
}

static void call(struct peer *p, const char *id, const char *name, const struct orch_json_doc *d,
                 uint32_t params)
{
    struct orch_slice raw = orch_json_raw(d, params);
    uint32_t meta = orch_json_get(d, params, "_meta"),
             token = meta ? orch_json_get(d, meta, "progressToken") : 0;
    bool modern = is(p, "modern");
    if (strcmp(name, "echo") == 0) {
        got(p, id, raw, modern ? "\"resultType\": \"complete\", " : "");
    } else if (strcmp(name, "steps") == 0) {
        for (int i = 1; i <= 2; i++)
            emit(p,
                 "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
                 "progress\",\"params\":{\"progressToken\":%.*s,\"progress\":%d,\"total\":2,"
                 "\"message\":\"step\"}}",
                 (int)orch_json_raw(d, token).n, orch_json_raw(d, token).p, i);
        got(p, id, raw, "");
    } else if (strcmp(name, "ask") == 0 && !modern) {
        p->asked.n = 0;
        orch_buf_str(&p->asked, id);
        emit(p, "{\"jsonrpc\":\"2.0\",\"id\":\"q1\",\"method\":\"elicitation/"
                "create\",\"params\":{\"message\":\"who?\"}}");
        emit(p,
             /* is refused: it was not declared */
             "{\"jsonrpc\":\"2.0\",\"id\":\"q2\",\"method\":\"roots/list\"}");
    } else if (strcmp(name, "ask") == 0 && !orch_json_get(d, params, "inputResponses")) {
        answer(
            p, id,
            "{\"resultType\":\"input_required\",\"requestState\":\"opaque\\u0041\","
            "\"inputRequests\":{"
            "\"a\":{\"method\":\"elicitation/create\",\"params\":{\"message\":\"who?\"}},"
            "\"b\":{\"method\":\"sampling/createMessage\",\"params\":{\"message\":\"what?\"}}}}");
    } else if (strcmp(name, "odd question") == 0) {
        answer(p, id,
               "{\"resultType\":\"input_required\",\"inputRequests\":{\"a\":{\"method\":\"ping\","
               "\"params\":{}}}}");
    } else if (strcmp(name, "nothing asked") == 0) {
        answer(p, id, "{\"resultType\":\"input_required\"}");
    } else if (strcmp(name, "state only") == 0 && !orch_json_get(d, params, "requestState")) {
        answer(p, id, "{\"resultType\":\"input_required\",\"requestState\":\"s\"}");
    } else if (strcmp(name, "rounds") == 0) {
        answer(p, id, "{\"resultType\":\"input_required\",\"requestState\":\"s\"}");
    } else if (strcmp(name, "odd type") == 0) {
        answer(p, id, "{\"resultType\":\"surprise\"}");
    } else if (strcmp(name, "no object") == 0) {
        answer(p, id, "7");
    } else if (strcmp(name, "fails") == 0) {
        error(p, id, -32602, "{\"why\":\"x\"}");
    } else if (strcmp(name, "strays") == 0) {
        strays(p);
        got(p, id, raw, "");
    } else if (strcmp(name, "long") == 0) {
        cleanup_free char *text = orch_xcalloc(1, LIMIT_BYTES + 100);
        memset(text, 'x', LIMIT_BYTES + 99);
        p->emit(p, text);
    } else if (strcmp(name, "many") == 0) {
        for (int i = 0; i < MANY; i++)
            emit(p,
                 "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
                 "message\",\"params\":{\"level\":\"info\",\"data\":%d}}",
                 i);
        got(p, id, raw, "");
    } else if (strcmp(name, "pings") == 0) {
        cleanup_buf struct orch_buf all = { 0 };
        for (int i = 0; i < MANY_PINGS; i++)
            orch_buf_printf(&all, "%c{\"jsonrpc\":\"2.0\",\"id\":\"p%d\",\"method\":\"ping\"}",
                            i ? ',' : '[', i);
        orch_buf_char(&all, ']');
        p->emit(p, all.p);
        got(p, id, raw, "");
    } else if (strcmp(name, "changes") == 0) {
        emit(p, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}");
        got(p, id, raw, "");
    } else if (strcmp(name, "cancels") == 0) {
        cleanup_free char *n = orch_xasprintf("{\"n\":%u}", p->cancels);
        answer(p, id, n);
    } else if (strcmp(name, "batch") == 0) {
        p->done = true;
        emit(p,
             "[{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
             "message\",\"params\":{}},{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"b\":1}}]",
             id);
    } else if (strcmp(name, "hold") != 0 && strcmp(name, "late") != 0) {
        got(p, id, raw, "");
    }
}

/* One message; what is answered is emitted. */
static void act(struct peer *p, struct orch_slice line)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf method = { 0 };
    cleanup_buf struct orch_buf name = { 0 };
    struct orch_json_fault fault;
    p->done = false;
    if (orch_json_scan(&d, line, &(struct orch_json_limits){ 0 }, &fault) < 0)
        abort();
    uint32_t id_tok = orch_json_get(&d, 0, "id"), params = orch_json_get(&d, 0, "params");
    cleanup_free char *id = id_tok ? orch_xasprintf("%.*s", (int)orch_json_raw(&d, id_tok).n,
                                                    orch_json_raw(&d, id_tok).p)
                                   : NULL;
    orch_json_string(&d, orch_json_get(&d, 0, "method"), &method);
    const char *m = method.n ? method.p : "";
    if (!method.n && id && strcmp(id, "\"q1\"") == 0) { /* what we asked was answered */
        cleanup_free char *of = orch_xasprintf("%.*s", (int)p->asked.n, p->asked.p);
        got(p, of, orch_json_raw(&d, 0), "");
    } else if (!method.n) {
        p->refused += orch_json_get(&d, 0, "error") != 0;
    } else if (strcmp(m, "notifications/cancelled") == 0) {
        p->cancels++;
    } else if (strcmp(m, "server/discover") == 0 && is(p, "modern")) {
        answer(p, id,
               "{\"resultType\":\"complete\",\"supportedVersions\":[\"2026-07-28\",\"2025-11-25\"],"
               "\"capabilities\":{\"tools\":{\"listChanged\":true}},"
               "\"instructions\":\"be "
               "kind\",\"_meta\":{\"io.modelcontextprotocol/serverInfo\":{\"name\":\"m\"}}}");
    } else if (strcmp(m, "initialize") == 0 && is(p, "modern")) {
        error(p, id, -32022, "{\"supported\":[\"2026-07-28\"],\"requested\":\"2025-11-25\"}");
    } else if (strcmp(m, "initialize") == 0) {
        answer(p, id,
               "{\"protocolVersion\":\"2025-06-18\",\"capabilities\":{\"tools\":{}},\"serverInfo\":"
               "{\"name\":\"l\"}}");
    } else if (strcmp(m, "tools/call") == 0) {
        orch_json_string(&d, orch_json_get(&d, params, "name"), &name);
        call(p, id, name.p, &d, params);
    } else if (strcmp(m, "subscriptions/listen") == 0 && is(p, "modern")) {
        emit(p, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/"
                "acknowledged\",\"params\":{}}");
    } else if (id) {
        error(p, id, -32601, "null");
    }
}

/* ---- over stdio: a child. It appends a letter to MARKS for what happens to it. */

static char marks[64];

static void mark(const char *path, const char *what)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, what, strlen(what)) < 0)
        abort();
    close(fd);
}

static void emit_line(struct peer *p, const char *message)
{
    (void)p;
    printf("%s\n", message);
    fflush(stdout);
}

static inline int child(const char *mode, const char *path)
{
    struct peer p = { .mode = mode, .emit = emit_line };
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    bool first = true;
    cleanup_buf struct orch_buf held_probe = { 0 };
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    mark(path, "s"); /* started */
    fprintf(stderr, "about to serve\n");
    if (strcmp(mode, "dead") == 0)
        return 9;
    while (strcmp(mode, "late") == 0 && access(path, X_OK) < 0)
        usleep(1000);
    while ((n = getline(&line, &cap, stdin)) > 0) {
        bool known = strstr(line, "\"initialize\"") != NULL;
        mark(path, strstr(line, "server/discover") ? "d" : known ? "i" : "");
        if (first && !known &&
            (strcmp(mode, "exits") == 0 ||
             (strcmp(mode, "changing") == 0 && access(path, X_OK) < 0)))
            return 3;
        while (first && !known && strcmp(mode, "hangs") == 0)
            pause();
        if (strcmp(mode, "changing") == 0 && access(path, X_OK) == 0)
            p.mode = "modern";
        if (is(&p, "slow") && !known && first) {
            orch_buf_add(&held_probe, line, (size_t)n);
            first = false;
            continue;
        }
        if (is(&p, "slow")) { /* the probe is answered when both are there */
            p.mode = "modern";
            act(&p, (struct orch_slice){ held_probe.p, held_probe.n });
            p.mode = strstr(mode, "strict") ? "modern" : "legacy";
        }
        first = false;
        if (strstr(line, "\"die\"")) {
            fprintf(stderr, "boom\n");
            return 5;
        }
        act(&p, (struct orch_slice){ line, (size_t)n });
    }
    mark(path, "e"); /* ended properly */
    free(line);
    orch_buf_free(&p.asked);
    return 0;
}

/* ---- over HTTP: the path is the mode, and "json" in it: answers are JSON where they can be */

static struct orch_loop *loop;
static struct orch_http_server *server;
static struct orch_http_reply *held[64], *get_stream;
static size_t n_held, n_gone;
static char *url, held_id[32];
static struct orch_buf seen; /* "METHOD-OR-VERB session version; " of each request */
static struct orch_buf last_headers;
static struct peer web;
static struct orch_http_reply *reply_now;
static bool streaming, with_get, forget_session, cut, unauthorized;
static unsigned sessions;

static void send_event(struct orch_http_reply *r, const char *data, const char *id)
{
    orch_http_sse_send(r, &(struct orch_sse_event){ .id = id ? orch_slice_str(id)
                                                             : (struct orch_slice){ 0 },
                                                    .data = orch_slice_str(data),
                                                    .has_data = true,
                                                    .retry_ms = id ? 20 : 0 });
}

static void emit_http(struct peer *p, const char *message)
{
    struct orch_http_header h[2] = { { ORCH_SLICE("Content-Type"), ORCH_SLICE("application/json") },
                                     { ORCH_SLICE("Mcp-Session-Id"), ORCH_SLICE("s-1") } };
    cleanup_free char *session = orch_xasprintf("s-%u", sessions);
    h[1].value = orch_slice_str(is(p, "badsession") ? "a b" : session);
    if (!reply_now)
        return;
    if (!streaming && p->done &&
        (strstr(p->mode, "json") || strstr(message, "\"protocolVersion\"") ||
         strstr(message, "-32601"))) {
        orch_http_reply_send(reply_now, strstr(message, "\"error\"") && is(p, "modern") ? 400 : 200,
                             h, is(p, "modern") ? 1 : 2, orch_slice_str(message));
        reply_now = NULL;
        return;
    }
    if (!streaming)
        orch_http_sse_start(reply_now, NULL, 0);
    streaming = true;
    send_event(reply_now, message, NULL);
}

static void gone(void *ud, enum orch_http_gone why)
{
    size_t i = (size_t)(uintptr_t)ud;
    (void)why;
    n_gone++;
    orch_http_sse_end(held[i]);
    held[i] = NULL;
}

static void hold(struct orch_http_reply *r)
{
    if (!streaming)
        orch_http_sse_start(r, NULL, 0);
    held[n_held] = r;
    orch_http_reply_on_gone(r, gone, (void *)(uintptr_t)n_held++);
}

static void note_request(const struct orch_http_request *q, const char *method)
{
    struct orch_slice session, version;
    orch_http_header(q, "Mcp-Session-Id", &session);
    orch_http_header(q, "MCP-Protocol-Version", &version);
    orch_buf_printf(&seen, "%s %.*s %.*s; ", method, (int)session.n, session.p ? session.p : "",
                    (int)version.n, version.p ? version.p : "");
    last_headers.n = 0;
    for (size_t i = 0; i < q->n_headers; i++)
        orch_buf_printf(&last_headers, "%.*s: %.*s\n", (int)q->headers[i].name.n,
                        q->headers[i].name.p, (int)q->headers[i].value.n, q->headers[i].value.p);
}

static void get_request(const struct orch_http_request *q, struct orch_http_reply *r)
{
    struct orch_slice id;
    note_request(q, "GET");
    if (orch_http_header(q, "Last-Event-ID", &id) && *held_id) {
        cleanup_free char *message =
            orch_xasprintf("{\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"resumed\":\"%.*s\"}}",
                           held_id, (int)id.n, id.p);
        orch_http_sse_start(r, NULL, 0);
        send_event(r, message, NULL);
        orch_http_sse_end(r);
    } else if (with_get) {
        orch_http_sse_start(r, NULL, 0);
        get_stream = r;
    } else {
        orch_http_reply_send(r, 405, NULL, 0, (struct orch_slice){ 0 });
    }
}

/* What is wrong before the message counts; false: nothing is. */
static bool refuse(const struct orch_http_request *q, struct orch_http_reply *r, const char *method)
{
    struct orch_slice session, authorization;
    bool has = orch_http_header(q, "Mcp-Session-Id", &session);
    cleanup_free char *current = orch_xasprintf("s-%u", sessions);
    int status = is(&web, "status") ? atoi(web.mode + 6)
                 : unauthorized && !(orch_http_header(q, "Authorization", &authorization) &&
                                     orch_slice_eq(authorization, "Bearer good"))
                     ? 401
                 : has && (forget_session || !orch_slice_eq(session, current)) ? 404
                 : is(&web, "old") && strcmp(method, "server/discover") == 0   ? 400
                 : is(&web, "moved")                                           ? 302
                                                                               : 0;
    struct orch_http_header h = { ORCH_SLICE("Location"), ORCH_SLICE("http://127.0.0.1:1/") };
    if (status)
        orch_http_reply_send(r, status, &h, status == 302, ORCH_SLICE("not for you"));
    return status != 0;
}

static void handle(void *ud, const struct orch_http_request *q, struct orch_http_reply *r)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf method = { 0 };
    struct orch_json_fault fault;
    (void)ud;
    if (orch_slice_eq(q->method, "GET")) {
        get_request(q, r);
        return;
    }
    if (orch_slice_eq(q->method, "DELETE")) {
        note_request(q, "DELETE");
        orch_http_reply_send(r, 200, NULL, 0, (struct orch_slice){ 0 });
        return;
    }
    assert_int_equal(orch_json_scan(&d, q->body, &(struct orch_json_limits){ 0 }, &fault), 0);
    orch_json_string(&d, orch_json_get(&d, 0, "method"), &method);
    note_request(q, method.n ? method.p : "answer");
    if (refuse(q, r, method.n ? method.p : "answer"))
        return;
    if (method.n && strcmp(method.p, "initialize") == 0) {
        forget_session = false;
        sessions++;
    }
    uint32_t id = orch_json_get(&d, 0, "id"), params = orch_json_get(&d, 0, "params");
    uint32_t name = params ? orch_json_get(&d, params, "name") : 0;
    streaming = false;
    reply_now = method.n && id ? r : held[0];
    if (method.n && id)
        snprintf(held_id, sizeof held_id, "%.*s", (int)orch_json_raw(&d, id).n,
                 orch_json_raw(&d, id).p);
    if (name && orch_json_string_eq(&d, name,
                                    "late")) { /* the stream breaks off, or is answered elsewhere */
        orch_http_sse_start(r, NULL, 0);
        if (cut)
            send_event(r, "", "e-7");
        if (cut || is(&web, "modern"))
            orch_http_sse_end(r);
        else
            streaming = true, hold(r);
        return;
    }
    if (!method.n || !id) { /* an answer of the client may let a held call go on */
        streaming = reply_now != NULL;
        web.done = false;
        act(&web, q->body);
        if (web.done && reply_now) {
            orch_http_sse_end(reply_now);
            held[0] = NULL;
            n_held = 0;
        }
        orch_http_reply_send(r, 202, NULL, 0, (struct orch_slice){ 0 });
        return;
    }
    act(&web, q->body);
    if (reply_now && streaming && web.done)
        orch_http_sse_end(reply_now);
    else if (reply_now)
        hold(reply_now);
}

/* ---- the client's owner */

struct owner {
    struct orch_mcp_client *c;
    unsigned ready, lost, changed, notified, asked, withdrawn, done, progress, said;
    struct orch_err err;
    struct orch_buf result, error, questions, last_note;
    enum { NOTHING, REPLY, REFUSE, KEEP } then; /* to a question */
    enum { NEVER, AT_READY, AT_DONE, AT_NOTE, AT_ASKED, AT_LOST } free_at;
    struct orch_mcp_client_call *asking;
};

static void free_now(struct owner *w, int at)
{
    if ((int)w->free_at != at || !w->c)
        return;
    orch_mcp_client_free(w->c, 500, 500);
    w->c = NULL;
}

static void ready(void *ud, const struct orch_err *err)
{
    struct owner *w = ud;
    w->ready++;
    if (err)
        w->err = *err;
    free_now(w, AT_READY);
}

static void lost(void *ud, const struct orch_err *err)
{
    struct owner *w = ud;
    w->lost++;
    w->err = *err;
    free_now(w, AT_LOST);
}

static void changed(void *ud)
{
    ((struct owner *)ud)->changed++;
}

static void notified(void *ud, const char *method, const struct orch_json_doc *d, uint32_t params)
{
    struct owner *w = ud;
    (void)d, (void)params;
    w->notified++;
    w->last_note.n = 0;
    orch_buf_str(&w->last_note, method);
    free_now(w, AT_NOTE);
}

static void asked(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params)
{
    struct owner *w = ud;
    w->asked++;
    w->asking = orch_mcp_client_asking(w->c);
    orch_buf_printf(&w->questions, "%.*s %s %.*s; ", (int)id.n, id.p, method,
                    (int)orch_json_raw(d, params).n, orch_json_raw(d, params).p);
    if (w->then == REPLY)
        orch_mcp_client_reply(w->c, id, ORCH_SLICE("{\"action\":\"accept\",\"n\":1.0}"));
    else if (w->then == REFUSE)
        orch_mcp_client_refuse(w->c, id, -32603, "nobody is there");
    free_now(w, AT_ASKED);
}

static void withdrawn(void *ud, struct orch_slice id)
{
    (void)id;
    ((struct owner *)ud)->withdrawn++;
}

static void done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct owner *w = ud;
    w->done++;
    w->result.n = w->error.n = 0;
    orch_buf_slice(&w->result, result);
    orch_buf_char(&w->result, 0);
    w->err = err ? *err : (struct orch_err){ 0 };
    if (w->c)
        orch_buf_slice(&w->error, orch_mcp_client_error(w->c));
    orch_buf_char(&w->error, 0);
    free_now(w, AT_DONE);
}

static void progress(void *ud, double at, double total, struct orch_slice message)
{
    struct owner *w = ud;
    w->progress++;
    assert_true(at == w->progress && total == 2 && orch_slice_eq(message, "step"));
}

static inline void said(void *ud)
{
    ((struct owner *)ud)->said++;
}

static struct orch_http_client *http;
static struct orch_err fault;
static struct orch_mcp_verdicts verdicts;

static void make(struct owner *w, struct orch_mcp_client_opts o)
{
    o.name = "peer";
    o.limits.bytes = LIMIT_BYTES;
    o.http = http;
    o.verdicts = &verdicts;
    o.ready = ready;
    o.lost = lost;
    o.asked = asked;
    o.withdrawn = withdrawn;
    o.notified = notified;
    if (!o.tools_changed)
        o.tools_changed = changed;
    o.ud = w;
    w->c = orch_mcp_client_new(loop, &o, &fault);
    if (!w->c)
        fail_msg("%s", fault.msg);
}

static const char *self;

static void make_child(struct owner *w, const char *mode, struct orch_mcp_client_opts o)
{
    const char *const argv[] = { self, "server", mode, marks, NULL };
    static const char *const env[] = { "ASAN_OPTIONS=detect_leaks=0",
                                       NULL }; /* it ends as it is told to */
    o.argv = argv;
    o.env = env;
    make(w, o);
}

static void make_http(struct owner *w, const char *mode, struct orch_mcp_client_opts o)
{
    web.mode = mode;
    web.emit = emit_http;
    free(url);
    url = orch_xasprintf("http://%s/%s", orch_http_server_address(server), mode);
    o.url = url;
    make(w, o);
}

static void open_any(struct owner *w, const char *mode, bool over_http)
{
    if (over_http)
        make_http(w, mode, (struct orch_mcp_client_opts){ 0 });
    else
        make_child(w, mode, (struct orch_mcp_client_opts){ 0 });
    UNTIL(w->ready);
    if (w->err.cls)
        fail_msg("%s: %s", mode, w->err.msg);
}

static void fini(struct owner *w)
{
    orch_mcp_client_free(w->c, 2000, 2000);
    orch_buf_free(&w->result);
    orch_buf_free(&w->error);
    orch_buf_free(&w->questions);
    orch_buf_free(&w->last_note);
}

static struct orch_mcp_client_call *start(struct owner *w, const char *tool, const char *args)
{
    struct orch_mcp_client_call *k = orch_mcp_client_call(w->c,
                                                          &(struct orch_mcp_client_request){
                                                              .tool = tool,
                                                              .args = orch_slice_str(args),
                                                              .done = done,
                                                              .progress = progress,
                                                              .ud = w },
                                                          &fault);
    if (!k)
        fail_msg("%s: %s", tool, fault.msg);
    return k;
}

/* Waits for the answer: its result, or the error's message. */
static inline const char *say(struct owner *w, const char *tool, const char *args)
{
    unsigned before = w->done;
    w->progress = 0;
    start(w, tool, args);
    UNTIL(w->done > before);
    return w->err.cls ? w->err.msg : w->result.p;
}

static bool holds(const char *text, const char *part)
{
    if (strstr(text, part))
        return true;
    print_error("%s\n  has no %s\n", text, part);
    return false;
}

static inline size_t count(const struct orch_buf *b, const char *what)
{
    size_t n = 0;
    for (const char *p = b->n ? b->p : NULL; p && (p = strstr(p, what)); p++)
        n++;
    return n;
}

static inline const char *marked(void)
{
    static char text[256];
    int fd = open(marks, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    text[n < 0 ? 0 : n] = 0;
    if (fd >= 0)
        close(fd);
    return text;
}

static int setup(void **state)
{
    (void)state;
    seen.n = last_headers.n = n_held = n_gone = 0;
    memset(held, 0, sizeof held);
    *held_id = 0;
    get_stream = NULL;
    sessions = 0;
    with_get = forget_session = cut = unauthorized = false;
    web = (struct peer){ 0 };
    unlink(marks);
    server = orch_http_server_new(loop,
                                  &(struct orch_http_server_opts){ .listen = "127.0.0.1:0",
                                                                   .on_request = handle },
                                  &fault);
    http = orch_http_client_new(loop, &fault);
    if (!server || !http)
        fail_msg("%s", fault.msg);
    return 0;
}

static void end_streams(void)
{
    for (size_t i = 0; i < n_held; i++)
        if (held[i])
            orch_http_sse_end(held[i]);
    n_held = 0;
    if (get_stream)
        orch_http_sse_end(get_stream);
    get_stream = NULL;
}

static int teardown(void **state)
{
    (void)state;
    end_streams();
    orch_http_client_free(http);
    orch_http_server_free(server);
    orch_buf_free(&web.asked);
    return 0;
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

static void begin(void)
{
    static char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[n < 0 ? 0 : n] = 0;
    self = exe;
    snprintf(marks, sizeof marks, "/tmp/orch-test-client-%d", (int)getpid());
    signal(SIGPIPE, SIG_IGN);
    static const struct orch_log errors = { .least = ORCH_ERROR };
    orch_log_use(&errors);
    loop = orch_loop_new(&fault);
}

static void end(void)
{
    free(url);
    orch_buf_free(&seen);
    orch_buf_free(&last_headers);
    unlink(marks);
    orch_loop_free(loop);
}

#endif
