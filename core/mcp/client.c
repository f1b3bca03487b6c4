#include "client.h"

#include "../base/log.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

enum {
    READ_BYTES = 256 * 1024,
    OUT_MAX_BYTES = 64 << 20,
    STRAY_SHOWN = 10, /* stray lines logged, then silence */
};

struct orch_mcp_client_call {
    struct orch_mcp_client_call *next, **at;
    struct orch_mcp_client *client;
    int64_t id;
    orch_mcp_client_done_fn *done;
    void (*progress)(void *ud, double done, double total, struct orch_slice message);
    void *ud;
};

struct orch_mcp_client {
    struct orch_loop *loop;
    struct orch_mcp_client_opts o;
    char *name;
    struct orch_proc *proc;
    struct orch_watch *in, *out;
    struct orch_buf inbuf, outbuf;
    size_t scanned;
    struct orch_json_doc doc;
    struct orch_mcp_client_call *calls;
    int64_t next_id;
    unsigned stray;
    bool ready, dead, flush_posted;
    struct orch_err why; /* once dead */
};

static void client_fail(struct orch_mcp_client *c, const struct orch_err *err);
static void flush(void *ud);

static void flush_soon(struct orch_mcp_client *c)
{
    if (c->flush_posted)
        return;
    c->flush_posted = true;
    orch_loop_post(c->loop, flush, c);
}

/* What stands in outbuf from byte `from` on becomes a message. */
static void message_end(struct orch_mcp_client *c, size_t from)
{
    orch_json_one_line(&c->outbuf, from);
    orch_buf_char(&c->outbuf, '\n');
    flush_soon(c);
}

static void flush(void *ud)
{
    struct orch_mcp_client *c = ud;
    c->flush_posted = false;
    while (c->outbuf.n && !c->dead) {
        ssize_t w = write(orch_proc_stdin(c->proc), c->outbuf.p, c->outbuf.n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno != EAGAIN)
            c->outbuf.n = 0; /* it is going away: its exit tells why */
        if (w < 0)
            break;
        orch_buf_consume(&c->outbuf, (size_t)w);
    }
    if (c->out)
        orch_watch_set(c->out, c->outbuf.n ? ORCH_WRITE : 0);
}

static void on_writable(void *ud, int events)
{
    (void)events;
    flush(ud);
}

static void call_unlink(struct orch_mcp_client_call *k)
{
    *k->at = k->next;
    if (k->next)
        k->next->at = k->at;
}

static void call_finish(struct orch_mcp_client_call *k, struct orch_slice result,
                        const struct orch_err *err)
{
    orch_mcp_client_done_fn *done = k->done;
    void *ud = k->ud;
    call_unlink(k);
    free(k);
    done(ud, result, err);
}

static void client_fail(struct orch_mcp_client *c, const struct orch_err *err)
{
    if (c->dead)
        return;
    c->dead = true;
    c->why = *err;
    orch_watch_free(c->in);
    orch_watch_free(c->out);
    c->in = c->out = NULL;
    orch_proc_kill(c->proc, SIGKILL);
    bool was_ready = c->ready;
    while (c->calls)
        call_finish(c->calls, (struct orch_slice){ 0 }, &c->why);
    if (was_ready && c->o.lost)
        c->o.lost(c->o.ud, &c->why);
}

void orch_mcp_client_give_up(struct orch_mcp_client *c, const char *why)
{
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf tail = { 0 };
    orch_proc_stderr_describe(c->proc, &tail);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ETIMEDOUT, "%s: %s; %s", c->name, why, tail.p);
    client_fail(c, &err);
}

static void on_exit_status(void *ud, int status)
{
    struct orch_mcp_client *c = ud;
    char how[96];
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf tail = { 0 };
    orch_proc_describe(status, how, sizeof how);
    orch_proc_stderr_describe(c->proc, &tail);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ECHILD, "%s: the server ended (%s); %s", c->name, how,
                  tail.p);
    client_fail(c, &err);
}

static struct orch_mcp_client_call *call_by_id(struct orch_mcp_client *c, int64_t id)
{
    for (struct orch_mcp_client_call *k = c->calls; k; k = k->next)
        if (k->id == id)
            return k;
    return NULL;
}

static void take_response(struct orch_mcp_client *c, const struct orch_rpc_msg *m)
{
    char id_text[24];
    int64_t id;
    if (m->id.n >= sizeof id_text)
        return;
    memcpy(id_text, m->id.p, m->id.n);
    id_text[m->id.n] = 0;
    id = strtoll(id_text, NULL, 10);
    struct orch_mcp_client_call *k = call_by_id(c, id);
    if (!k)
        return;
    if (m->result) {
        if (c->doc.toks[m->result].type == ORCH_JSON_OBJECT) {
            call_finish(k, orch_json_raw(&c->doc, m->result), NULL);
            return;
        }
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EPROTO, "%s: \"result\" is no object", c->name);
        call_finish(k, (struct orch_slice){ 0 }, &err);
        return;
    }
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    uint32_t message = orch_json_get(&c->doc, m->error, "message"),
             code = orch_json_get(&c->doc, m->error, "code");
    if (message)
        orch_json_string(&c->doc, message, &text);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EREMOTEIO, "%s: %s (code %.0f)", c->name,
                  text.n ? text.p : "error without a message",
                  code ? orch_json_number(&c->doc, code) : 0);
    call_finish(k, (struct orch_slice){ 0 }, &err);
}

static void take_notification(struct orch_mcp_client *c, const struct orch_rpc_msg *m)
{
    const struct orch_json_doc *d = &c->doc;
    if (orch_json_string_eq(d, m->method, "notifications/progress") && m->params) {
        int64_t token;
        uint32_t t = orch_json_get(d, m->params, "progressToken");
        struct orch_mcp_client_call *k = t && orch_json_int(d, t, &token) ? call_by_id(c, token)
                                                                          : NULL;
        if (!k || !k->progress)
            return;
        uint32_t done = orch_json_get(d, m->params, "progress"),
                 total = orch_json_get(d, m->params, "total");
        uint32_t message = orch_json_get(d, m->params, "message");
        cleanup_buf struct orch_buf text = { 0 };
        if (message)
            orch_json_string(d, message, &text);
        k->progress(k->ud, done ? orch_json_number(d, done) : 0,
                    total ? orch_json_number(d, total) : -1, (struct orch_slice){ text.p, text.n });
    } else if (orch_json_string_eq(d, m->method, "notifications/tools/list_changed") &&
               c->o.tools_changed) {
        c->o.tools_changed(c->o.ud);
    } else if (orch_json_string_eq(d, m->method, "notifications/cancelled") && c->o.withdrawn &&
               m->params) {
        uint32_t id = orch_json_get(d, m->params, "requestId");
        if (id)
            c->o.withdrawn(c->o.ud, orch_json_raw(d, id));
    }
}

/* The server asks something of us. */
static void take_request(struct orch_mcp_client *c, const struct orch_rpc_msg *m)
{
    static const char *const questions[] = { "elicitation/create", "sampling/createMessage" };
    for (size_t i = 0; c->o.asked && i < ORCH_ARRAY_LEN(questions); i++)
        if (orch_json_string_eq(&c->doc, m->method, questions[i])) {
            if (m->params)
                c->o.asked(c->o.ud, m->id, questions[i], &c->doc, m->params);
            else
                orch_mcp_client_refuse(c, m->id, ORCH_RPC_INVALID_PARAMS, "params are missing");
            return;
        }
    if (orch_json_string_eq(&c->doc, m->method, "ping"))
        orch_mcp_client_reply(c, m->id, ORCH_SLICE("{}"));
    else
        orch_mcp_client_refuse(c, m->id, ORCH_RPC_METHOD_NOT_FOUND, "not offered by this client");
}

static void take_line(struct orch_mcp_client *c, struct orch_slice line)
{
    if (line.n && line.p[line.n - 1] == '\r')
        line.n--;
    if (!line.n)
        return;
    struct orch_json_fault fault;
    struct orch_rpc_msg m;
    const char *why = NULL;
    if (orch_json_scan(&c->doc, line, &c->o.limits, &fault) < 0)
        why = fault.rule;
    else if (orch_rpc_read(&c->doc, 0, &m, &why) < 0) {
        if (m.method && m.id.n) /* it waits for an answer */
            orch_mcp_client_refuse(c, m.id, ORCH_RPC_INVALID_REQUEST, why);
    } else if (m.kind == ORCH_RPC_RESPONSE)
        take_response(c, &m);
    else if (m.kind == ORCH_RPC_REQUEST)
        take_request(c, &m);
    else
        take_notification(c, &m);
    if (why && c->stray++ < STRAY_SHOWN)
        orch_log(ORCH_WARN, "%s: a line on its stdout is no JSON-RPC (%s): %.*s", c->name, why,
                 line.n > 200 ? 200 : (int)line.n, line.p);
}

static void on_readable(void *ud, int events)
{
    (void)events;
    struct orch_mcp_client *c = ud;
    orch_buf_reserve(&c->inbuf, READ_BYTES);
    ssize_t r = read(orch_proc_stdout(c->proc), c->inbuf.p + c->inbuf.n,
                     c->inbuf.cap - c->inbuf.n - 1);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r <= 0) {
        /* the exit status follows; a server that only closed its stdout is ended */
        orch_watch_set(c->in, 0);
        orch_proc_kill(c->proc, SIGTERM);
        return;
    }
    c->inbuf.n += (size_t)r;
    char *start = c->inbuf.p, *from = start + c->scanned, *nl;
    while (!c->dead && (nl = memchr(from, '\n', (size_t)(c->inbuf.p + c->inbuf.n - from)))) {
        take_line(c, (struct orch_slice){ start, (size_t)(nl - start) });
        start = from = nl + 1;
    }
    orch_buf_consume(&c->inbuf, (size_t)(start - c->inbuf.p));
    c->scanned = c->inbuf.n;
    if (c->inbuf.n > c->o.limits.bytes) {
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EMSGSIZE,
                      "%s: a line of its stdout is over %zu bytes (limits.message)", c->name,
                      c->o.limits.bytes);
        client_fail(c, &err);
    }
}

static void initialized(void *ud, struct orch_slice result, const struct orch_err *err)
{
    (void)result;
    struct orch_mcp_client *c = ud;
    if (err) {
        c->o.ready(c->o.ud, err);
        if (!c->dead)
            client_fail(c, err);
        return;
    }
    c->ready = true;
    orch_buf_str(&c->outbuf, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n");
    flush_soon(c);
    c->o.ready(c->o.ud, NULL);
}

struct orch_mcp_client *orch_mcp_client_new(struct orch_loop *l,
                                            const struct orch_mcp_client_opts *o,
                                            struct orch_err *err)
{
    struct orch_mcp_client *c = orch_xcalloc(1, sizeof *c);
    c->loop = l;
    c->o = *o;
    c->name = orch_xstrdup(o->name);
    if (!c->o.limits.bytes)
        c->o.limits.bytes = 16 << 20;
    c->proc = orch_proc_start(l,
                              &(struct orch_proc_opts){ .argv = o->argv,
                                                        .env = o->env,
                                                        .cwd = o->cwd,
                                                        .via = o->via,
                                                        .on_exit = on_exit_status,
                                                        .log_as = c->name,
                                                        .ud = c },
                              err);
    if (!c->proc) {
        orch_err_wrap(err, "%s", c->name);
        if (err && err->cls != ORCH_CLASS_ISOLATION)
            err->cls = ORCH_CLASS_UPSTREAM;
        free(c->name);
        free(c);
        return NULL;
    }
    c->in = orch_watch_new(l, orch_proc_stdout(c->proc), ORCH_READ, on_readable, c);
    c->out = orch_watch_new(l, orch_proc_stdin(c->proc), 0, on_writable, c);
    /* No roots: a server that takes its folders from them would leave those of its command line. */
    const char *capabilities = o->asked
                                   ? "{\"elicitation\":{\"form\":{},\"url\":{}},\"sampling\":{}}"
                                   : "{}";
    cleanup_free char *params = orch_xasprintf(
        "{\"protocolVersion\":\"2025-11-25\",\"capabilities\":%s,\"clientInfo\":{\"name\":\"orch\","
        "\"version\":\"" ORCH_VERSION "\"}}",
        capabilities);
    orch_mcp_client_call(c,
                         &(struct orch_mcp_client_request){ .method = "initialize",
                                                            .params = orch_slice_str(params),
                                                            .done = initialized,
                                                            .ud = c },
                         NULL);
    return c;
}

void orch_mcp_client_free(struct orch_mcp_client *c, int64_t eof_ms, int64_t term_ms)
{
    if (!c)
        return;
    while (c->calls) {
        struct orch_mcp_client_call *k = c->calls;
        call_unlink(k);
        free(k);
    }
    orch_loop_unpost(c->loop, flush, c);
    orch_watch_free(c->in);
    orch_watch_free(c->out);
    if (!c->dead)
        orch_proc_end(c->proc, eof_ms, term_ms);
    orch_proc_free(c->proc);
    orch_json_doc_free(&c->doc);
    orch_buf_free(&c->inbuf);
    orch_buf_free(&c->outbuf);
    free(c->name);
    free(c);
}

bool orch_mcp_client_alive(const struct orch_mcp_client *c)
{
    return !c->dead;
}

bool orch_mcp_client_ready(const struct orch_mcp_client *c)
{
    return c->ready;
}

struct orch_slice orch_mcp_client_stderr_line(const struct orch_mcp_client *c)
{
    return orch_proc_stderr_line(c->proc);
}

/* params._meta as it came, without the modern era's keys, with our own progress token. */
static void put_meta(struct orch_buf *out, struct orch_slice meta, int64_t token)
{
    orch_buf_printf(out, "\"_meta\":{\"progressToken\":%lld", (long long)token);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (meta.n && orch_json_scan(&d, meta, &(struct orch_json_limits){ 0 }, &fault) == 0) {
        static const char reserved[] = "io.modelcontextprotocol/";
        uint32_t k = 1;
        for (uint32_t i = 0; i < d.toks[0].count; i++) {
            struct orch_slice key = orch_json_raw(&d, k);
            bool skip = orch_json_string_eq(&d, k, "progressToken") ||
                        (key.n > sizeof reserved &&
                         memcmp(key.p + 1, reserved, sizeof reserved - 1) == 0);
            if (!skip) {
                orch_buf_char(out, ',');
                orch_buf_slice(out, key);
                orch_buf_char(out, ':');
                orch_buf_slice(out, orch_json_raw(&d, k + 1));
            }
            k = d.toks[k + 1].next;
        }
    }
    orch_buf_char(out, '}');
}

struct orch_mcp_client_call *orch_mcp_client_call(struct orch_mcp_client *c,
                                                  const struct orch_mcp_client_request *r,
                                                  struct orch_err *err)
{
    if (c->dead) {
        if (err)
            *err = c->why;
        return NULL;
    }
    if (c->outbuf.n + r->args.n + r->params.n > OUT_MAX_BYTES) {
        orch_err_setc(err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server does not read its input (%zu bytes wait)", c->name,
                      c->outbuf.n);
        return NULL;
    }
    struct orch_mcp_client_call *k = orch_xcalloc(1, sizeof *k);
    *k = (struct orch_mcp_client_call){ .next = c->calls,
                                        .at = &c->calls,
                                        .client = c,
                                        .id = ++c->next_id,
                                        .done = r->done,
                                        .progress = r->progress,
                                        .ud = r->ud };
    if (k->next)
        k->next->at = &k->next;
    c->calls = k;
    struct orch_buf *b = &c->outbuf;
    size_t from = b->n;
    orch_buf_printf(b, "{\"jsonrpc\":\"2.0\",\"id\":%lld,\"method\":\"%s\"", (long long)k->id,
                    r->method ? r->method : "tools/call");
    if (!r->method) {
        orch_buf_str(b, ",\"params\":{\"name\":");
        orch_json_quote(b, orch_slice_str(r->tool));
        orch_buf_str(b, ",\"arguments\":");
        orch_buf_slice(b, r->args);
        orch_buf_char(b, ',');
        put_meta(b, r->meta, k->id);
        orch_buf_char(b, '}');
    } else if (r->params.n) {
        orch_buf_str(b, ",\"params\":");
        orch_buf_slice(b, r->params);
    }
    orch_buf_char(b, '}');
    message_end(c, from);
    return k;
}

static void reply_end(struct orch_mcp_client *c, size_t from)
{
    message_end(c, from);
    if (c->outbuf.n > OUT_MAX_BYTES) {
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server asks but does not read its input (%zu bytes wait)", c->name,
                      c->outbuf.n);
        client_fail(c, &err);
    }
}

void orch_mcp_client_reply(struct orch_mcp_client *c, struct orch_slice id,
                           struct orch_slice result)
{
    size_t from = c->outbuf.n;
    if (c->dead)
        return;
    orch_rpc_result_head(&c->outbuf, id);
    orch_buf_slice(&c->outbuf, result);
    orch_buf_char(&c->outbuf, '}');
    reply_end(c, from);
}

void orch_mcp_client_refuse(struct orch_mcp_client *c, struct orch_slice id, int code,
                            const char *why)
{
    size_t from = c->outbuf.n;
    if (c->dead)
        return;
    orch_rpc_error(&c->outbuf, id, code, orch_slice_str(why), (struct orch_slice){ 0 });
    reply_end(c, from);
}

void orch_mcp_client_cancel(struct orch_mcp_client_call *k, const char *why)
{
    struct orch_mcp_client *c = k->client;
    if (!c->dead) {
        size_t from = c->outbuf.n;
        orch_buf_printf(&c->outbuf,
                        "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/"
                        "cancelled\",\"params\":{\"requestId\":%lld,\"reason\":",
                        (long long)k->id);
        orch_json_quote(&c->outbuf, orch_slice_str(why));
        orch_buf_str(&c->outbuf, "}}");
        message_end(c, from);
    }
    call_unlink(k);
    free(k);
}
