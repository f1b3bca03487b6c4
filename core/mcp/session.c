#include "session_int.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { HELD_MAX_BYTES = 16 << 20 };

static const char *const log_levels[] = { "debug", "info",     "notice", "warning",
                                          "error", "critical", "alert",  "emergency" };

/* A 2025-03-26 batch: answers are collected and sent as one array when the last one is there. */
struct orch_mcp_batch {
    unsigned pending;
    bool closed, awaited; /* awaited: it had a request, so its stream waits for an answer */
    void *stream;
    struct orch_buf out;
};

struct orch_mcp_session *orch_mcp_session_new(const struct orch_mcp_server_ops *ops, void *ud,
                                              const struct orch_json_limits *limits)
{
    struct orch_mcp_session *s = orch_xcalloc(1, sizeof *s);
    s->ops = ops;
    s->ud = ud;
    s->limits = *limits;
    s->log_level = -1;
    return s;
}

static void request_end(struct orch_mcp_request *rq);

void orch_mcp_session_end(struct orch_mcp_session *s)
{
    s->ended = true;
    for (struct orch_mcp_request *rq = s->first, *next; rq; rq = next) {
        next = rq->next;
        if (rq->held) {
            request_end(rq);
        } else if (!rq->cancelled && !rq->filter) {
            rq->cancelled = true;
            s->ops->cancel(s->ud, rq);
        }
    }
}

void orch_mcp_session_free(struct orch_mcp_session *s)
{
    if (!s)
        return;
    orch_mcp_session_end(s);
    s->on_idle = NULL;
    while (s->first) {
        if (!s->first->filter)
            s->ops->detach(s->ud, s->first);
        orch_mcp_request_drop(s->first);
    }
    while (s->spare) {
        struct orch_mcp_request *rq = s->spare;
        s->spare = rq->next;
        free(rq);
    }
    orch_json_doc_free(&s->doc);
    orch_buf_free(&s->out);
    orch_mcp_filter_fini(&s->legacy);
    free(s->questions);
    free(s->client);
    free(s);
}

struct orch_buf *orch_mcp_session_out(struct orch_mcp_session *s)
{
    return &s->out;
}

void orch_mcp_session_on_output(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud)
{
    s->on_output = fn;
    s->on_output_ud = ud;
}

void orch_mcp_session_sink(struct orch_mcp_session *s, orch_mcp_send_fn *send,
                           orch_mcp_check_fn *check, void *ud)
{
    s->send = send;
    s->check = check;
    s->sink_ud = ud;
}

void orch_mcp_session_on_idle(struct orch_mcp_session *s, void (*fn)(void *ud), void *ud)
{
    s->on_idle = fn;
    s->on_idle_ud = ud;
}

struct orch_slice orch_mcp_session_client(const struct orch_mcp_session *s)
{
    return orch_slice_str(s->client);
}

const char *orch_mcp_session_version(const struct orch_mcp_session *s)
{
    return s->version ? s->version : ORCH_MCP_MODERN;
}

bool orch_mcp_session_version_agreed(const struct orch_mcp_session *s)
{
    return s->version != NULL;
}

bool orch_mcp_session_unused(const struct orch_mcp_session *s)
{
    return !s->version && !s->first && !s->ended;
}

unsigned orch_mcp_session_in_flight(const struct orch_mcp_session *s)
{
    return s->in_flight;
}

void orch_mcp_count(struct orch_mcp_session *s, int n)
{
    s->in_flight += (unsigned)n;
    if (s->shared)
        *s->shared += (unsigned)n;
}

void orch_mcp_session_share(struct orch_mcp_session *s, unsigned *in_flight)
{
    if (s->shared)
        *s->shared -= s->in_flight;
    s->shared = in_flight;
    if (in_flight)
        *in_flight += s->in_flight;
}

/* ---- output */

static void announce(struct orch_mcp_session *s)
{
    if (!s->feeding && s->on_output)
        s->on_output(s->on_output_ud);
}

/* The message at from is whole: a line of the output, or handed to the transport at once. */
void orch_mcp_message_end(struct orch_mcp_session *s, size_t from, void *stream, int status)
{
    orch_json_one_line(&s->out, from);
    if (s->send) {
        s->send(s->sink_ud, stream, (struct orch_slice){ s->out.p + from, s->out.n - from },
                status);
        s->out.n = from;
    } else {
        orch_buf_char(&s->out, '\n');
        announce(s);
    }
}

size_t orch_mcp_note_begin(struct orch_mcp_session *s, const char *method)
{
    size_t from = s->out.n;
    orch_buf_slice(&s->out, ORCH_SLICE("{\"jsonrpc\":\"2.0\",\"method\":\""));
    orch_buf_str(&s->out, method);
    orch_buf_slice(&s->out, ORCH_SLICE("\",\"params\":{"));
    return from;
}

void orch_mcp_note_end(struct orch_mcp_session *s, size_t from, void *stream)
{
    orch_buf_slice(&s->out, ORCH_SLICE("}}"));
    orch_mcp_message_end(s, from, stream, 0);
}

/* What HTTP says beside a JSON-RPC error of the modern era. */
static int status_of(int code, bool modern)
{
    if (!modern)
        return code == ORCH_RPC_PARSE_ERROR || code == ORCH_RPC_INVALID_REQUEST ? 400 : 200;
    return code == ORCH_RPC_METHOD_NOT_FOUND ? 404
           : code == ORCH_RPC_PARSE_ERROR || code == ORCH_RPC_INVALID_REQUEST ||
                   code == ORCH_RPC_HEADER_MISMATCH || code == ORCH_RPC_MISSING_CAPABILITY ||
                   code == ORCH_RPC_UNSUPPORTED_VERSION
               ? 400
               : 200;
}

/* ---- requests in flight */

static struct orch_slice id_of(const struct orch_mcp_request *rq)
{
    return (struct orch_slice){ rq->id, rq->id_n };
}

struct orch_mcp_request *orch_mcp_request_new(struct orch_mcp_incoming *in, struct orch_slice token)
{
    struct orch_mcp_session *s = in->s;
    struct orch_slice id = in->m.id;
    struct orch_mcp_request *rq = s->spare;
    if (rq)
        s->spare = rq->next;
    else
        rq = orch_xmalloc(sizeof *rq);
    *rq = (struct orch_mcp_request){
        .session = s, .batch = in->batch, .stream = s->stream, .modern = in->modern, .log_level = -1
    };
    rq->id = orch_xmalloc(id.n + token.n + 1);
    memcpy(rq->id, id.p, id.n);
    if (token.n)
        memcpy(rq->id + id.n, token.p, token.n);
    rq->id_n = (uint32_t)id.n;
    rq->token_n = (uint32_t)token.n;
    rq->next = s->first;
    if (s->first)
        s->first->prev = rq;
    s->first = rq;
    orch_mcp_count(s, 1);
    s->answers = true;
    if (in->batch) {
        in->batch->pending++;
        in->batch->awaited = true;
    }
    return rq;
}

static struct orch_mcp_request *request_find(struct orch_mcp_session *s, struct orch_slice id)
{
    /* Ids mostly differ in their last byte; no id is empty. */
    for (struct orch_mcp_request *rq = s->first; rq; rq = rq->next)
        if (rq->id_n == id.n && rq->id[id.n - 1] == id.p[id.n - 1] &&
            memcmp(rq->id, id.p, id.n) == 0)
            return rq;
    return NULL;
}

/* An answer goes to the session's output or into its batch. Returns where it starts. */
static size_t answer_begin(struct orch_mcp_session *s, struct orch_mcp_batch *batch,
                           struct orch_buf **out)
{
    s->answers = true;
    *out = batch ? &batch->out : &s->out;
    if (batch)
        orch_buf_char(&batch->out, batch->out.n ? ',' : '[');
    return s->out.n;
}

static void batch_flush(struct orch_mcp_session *s, struct orch_mcp_batch *batch)
{
    if (!batch->closed || batch->pending)
        return;
    if (batch->out.n) {
        size_t from = s->out.n;
        orch_buf_slice(&s->out, (struct orch_slice){ batch->out.p, batch->out.n });
        orch_buf_char(&s->out, ']');
        orch_mcp_message_end(s, from, batch->stream, 200);
    } else if (batch->awaited && s->send) {
        s->send(s->sink_ud, batch->stream, ORCH_MCP_NO_DATA, 202);
    }
    orch_buf_free(&batch->out);
    free(batch);
}

static void request_end(struct orch_mcp_request *rq)
{
    struct orch_mcp_session *s = rq->session;
    if (s->send && !rq->answered && !rq->batch)
        s->send(s->sink_ud, rq->stream, ORCH_MCP_NO_DATA, 202);
    if (rq->asks)
        orch_mcp_ask_drop(rq, !s->ended);
    if (rq->held) {
        s->held_bytes -= rq->held_n;
        free(rq->held);
    }
    if (rq->prev)
        rq->prev->next = rq->next;
    else
        s->first = rq->next;
    if (rq->next)
        rq->next->prev = rq->prev;
    if (rq->filter) {
        s->listening--;
        orch_mcp_filter_fini(rq->filter);
        free(rq->filter);
    } else {
        orch_mcp_count(s, -1);
    }
    if (rq->batch) {
        rq->batch->pending--;
        batch_flush(s, rq->batch);
    }
    free(rq->id);
    rq->next = s->spare;
    s->spare = rq;
    if (!s->in_flight && s->on_idle)
        s->on_idle(s->on_idle_ud);
}

void orch_mcp_request_set_host(struct orch_mcp_request *rq, void *host)
{
    rq->host = host;
}

void *orch_mcp_request_host(const struct orch_mcp_request *rq)
{
    return rq->host;
}

bool orch_mcp_request_modern(const struct orch_mcp_request *rq)
{
    return rq->modern;
}

unsigned orch_mcp_request_caps(const struct orch_mcp_request *rq)
{
    return rq->caps;
}

const char *orch_mcp_request_server_info(const struct orch_mcp_request *rq)
{
    return rq->session->ops->server_info;
}

void *orch_mcp_request_stream(const struct orch_mcp_request *rq)
{
    return rq->stream;
}

void orch_mcp_request_drop(struct orch_mcp_request *rq)
{
    request_end(rq);
}

static void put_result(struct orch_buf *out, struct orch_slice id, const char *type,
                       struct orch_slice members)
{
    orch_rpc_result_head(out, id);
    orch_buf_char(out, '{');
    if (type) {
        orch_buf_slice(out, ORCH_SLICE("\"resultType\":\""));
        orch_buf_str(out, type);
        orch_buf_slice(out, members.n ? ORCH_SLICE("\",") : ORCH_SLICE("\""));
    }
    orch_buf_slice(out, members);
    orch_buf_slice(out, ORCH_SLICE("}}"));
}

void orch_mcp_respond_typed(struct orch_mcp_request *rq, const char *type,
                            struct orch_slice members)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->cancelled) {
        struct orch_buf *out;
        size_t from = answer_begin(s, rq->batch, &out);
        rq->answered = true;
        put_result(out, id_of(rq), rq->modern ? type : NULL, members);
        if (!rq->batch)
            orch_mcp_message_end(s, from, rq->stream, 200);
    }
    request_end(rq);
}

void orch_mcp_respond(struct orch_mcp_request *rq, struct orch_slice members)
{
    orch_mcp_respond_typed(rq, "complete", members);
}

void orch_mcp_respond_error(struct orch_mcp_request *rq, int code, struct orch_slice text,
                            struct orch_slice data)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->cancelled) {
        struct orch_buf *out;
        size_t from = answer_begin(s, rq->batch, &out);
        rq->answered = true;
        orch_rpc_error(out, id_of(rq), code, text, data);
        if (!rq->batch)
            orch_mcp_message_end(s, from, rq->stream, status_of(code, rq->modern));
    }
    request_end(rq);
}

void orch_mcp_progress(struct orch_mcp_request *rq, double done, double total,
                       struct orch_slice message)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->token_n || rq->cancelled || s->out.n > ORCH_MCP_NOTES_MAX_BYTES)
        return;
    size_t from = orch_mcp_note_begin(s, "notifications/progress");
    orch_buf_str(&s->out, "\"progressToken\":");
    orch_buf_add(&s->out, rq->id + rq->id_n, rq->token_n);
    orch_buf_str(&s->out, ",\"progress\":");
    orch_json_put_number(&s->out, done);
    if (total >= 0) {
        orch_buf_str(&s->out, ",\"total\":");
        orch_json_put_number(&s->out, total);
    }
    if (message.n && (rq->modern || strcmp(s->version, "2024-11-05") != 0)) {
        orch_buf_str(&s->out, ",\"message\":");
        orch_json_quote(&s->out, message);
    }
    orch_mcp_note_end(s, from, rq->stream);
}

static int level_index(struct orch_slice name)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(log_levels); i++)
        if (orch_slice_eq(name, log_levels[i]))
            return (int)i;
    return -1;
}

void orch_mcp_log(struct orch_mcp_request *rq, const char *level, struct orch_slice logger,
                  struct orch_slice data)
{
    struct orch_mcp_session *s = rq->session;
    int least = rq->modern ? rq->log_level : s->log_level;
    if (rq->cancelled || s->out.n > ORCH_MCP_NOTES_MAX_BYTES || least < 0 ||
        level_index(orch_slice_str(level)) < least)
        return;
    size_t from = orch_mcp_note_begin(s, "notifications/message");
    orch_buf_printf(&s->out, "\"level\":\"%s\",\"logger\":", level);
    orch_json_quote(&s->out, logger);
    orch_buf_str(&s->out, ",\"data\":");
    orch_buf_slice(&s->out, data);
    orch_mcp_note_end(s, from, rq->stream);
}

/* ---- one message */

static void refuse_status(struct orch_mcp_incoming *in, int code, int status,
                          struct orch_slice data, const char *fmt, va_list ap) ORCH_PRINTF(5, 0);
static void refuse_status(struct orch_mcp_incoming *in, int code, int status,
                          struct orch_slice data, const char *fmt, va_list ap)
{
    char text[2048];
    struct orch_buf *out;
    vsnprintf(text, sizeof text, fmt, ap);
    size_t from = answer_begin(in->s, in->batch, &out);
    orch_rpc_error(out, in->m.id, code, orch_slice_str(text), data);
    if (!in->batch)
        orch_mcp_message_end(in->s, from, in->s->stream, status);
}

void orch_mcp_refuse(struct orch_mcp_incoming *in, int code, struct orch_slice data,
                     const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    refuse_status(in, code, status_of(code, in->modern), data, fmt, ap);
    va_end(ap);
}

/* The envelope is wrong, which HTTP says too. */
static void refuse_envelope(struct orch_mcp_incoming *in, const char *fmt, ...) ORCH_PRINTF(2, 3);
static void refuse_envelope(struct orch_mcp_incoming *in, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    refuse_status(in, ORCH_RPC_INVALID_PARAMS, 400, ORCH_MCP_NO_DATA, fmt, ap);
    va_end(ap);
}

void orch_mcp_answer(struct orch_mcp_incoming *in, struct orch_slice members)
{
    struct orch_buf *out;
    size_t from = answer_begin(in->s, in->batch, &out);
    put_result(out, in->m.id, in->modern ? "complete" : NULL, members);
    if (!in->batch)
        orch_mcp_message_end(in->s, from, in->s->stream, 200);
}

static bool method_is(const struct orch_mcp_incoming *in, const char *name)
{
    return orch_json_string_eq(in->d, in->m.method, name);
}

static void put_server_meta(const struct orch_mcp_session *s, struct orch_buf *b)
{
    orch_buf_str(b, ",\"_meta\":{\"" ORCH_MCP_META "serverInfo\":");
    orch_buf_str(b, s->ops->server_info);
    orch_buf_char(b, '}');
}

static void put_capabilities(const struct orch_mcp_session *s, bool modern, struct orch_buf *b)
{
    unsigned f = s->ops->features;
    orch_buf_str(b, "\"capabilities\":{\"tools\":{\"listChanged\":true},\"logging\":{}");
    if (f & ORCH_MCP_RESOURCES)
        orch_buf_str(b, ",\"resources\":{\"subscribe\":true,\"listChanged\":true}");
    if (f & ORCH_MCP_PROMPTS)
        orch_buf_str(b, ",\"prompts\":{\"listChanged\":true}");
    if (f & ORCH_MCP_COMPLETIONS)
        orch_buf_str(b, ",\"completions\":{}");
    if (modern && (f & ORCH_MCP_TASKS))
        orch_buf_str(b, ",\"extensions\":{\"" ORCH_MCP_META "tasks\":{}}");
    orch_buf_char(b, '}');
}

static void put_instructions(const struct orch_mcp_session *s, struct orch_buf *b)
{
    if (!s->ops->instructions)
        return;
    orch_buf_str(b, ",\"instructions\":");
    orch_json_quote(b, orch_slice_str(s->ops->instructions));
}

static void do_initialize(struct orch_mcp_incoming *in)
{
    struct orch_mcp_session *s = in->s;
    uint32_t wanted = in->m.params ? orch_json_get(in->d, in->m.params, "protocolVersion") : 0;
    if (!wanted || in->d->toks[wanted].type != ORCH_JSON_STRING) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "initialize: params.protocolVersion must be a string");
        return;
    }
    if (s->version) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                        "initialize: this session is initialized already");
        return;
    }
    if (in->batch) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                        "initialize must not be part of a batch");
        return;
    }
    s->version = ORCH_MCP_LEGACY;
    for (const char *const *v = orch_rpc_legacy; *v; v++)
        if (orch_json_string_eq(in->d, wanted, *v))
            s->version = *v;
    uint32_t client = orch_json_get(in->d, in->m.params, "clientInfo");
    if (client && in->d->toks[client].type == ORCH_JSON_OBJECT) {
        struct orch_slice raw = orch_json_raw(in->d, client);
        if (raw.n <= 4096)
            s->client = orch_xstrndup(raw.p, raw.n);
    }
    uint32_t capabilities = orch_json_get(in->d, in->m.params, "capabilities");
    s->caps = (uint8_t)orch_mcp_caps_read(in->d, capabilities);
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_printf(&b, "\"protocolVersion\":\"%s\",", s->version);
    put_capabilities(s, false, &b);
    orch_buf_str(&b, ",\"serverInfo\":");
    orch_buf_str(&b, s->ops->server_info);
    put_instructions(s, &b);
    orch_mcp_answer(in, (struct orch_slice){ b.p, b.n });
}

static void do_discover(struct orch_mcp_incoming *in)
{
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_str(&b, "\"supportedVersions\":[\"" ORCH_MCP_MODERN "\"");
    for (const char *const *v = orch_rpc_legacy; *v; v++)
        orch_buf_printf(&b, ",\"%s\"", *v);
    orch_buf_str(&b, "],");
    put_capabilities(in->s, true, &b);
    put_instructions(in->s, &b);
    orch_buf_str(&b, ",\"ttlMs\":0,\"cacheScope\":\"private\"");
    put_server_meta(in->s, &b);
    orch_mcp_answer(in, (struct orch_slice){ b.p, b.n });
}

static void keep(struct orch_mcp_incoming *in, const char *method);

/* rq: NULL, or the list was held. */
static void do_tools_list(struct orch_mcp_incoming *in, struct orch_mcp_request *rq)
{
    uint32_t cursor = in->m.params ? orch_json_get(in->d, in->m.params, "cursor") : 0;
    cleanup_buf struct orch_buf b = { 0 };
    cleanup_buf struct orch_buf at = { 0 };
    cleanup_buf struct orch_buf next = { 0 };
    struct orch_err err = { 0 };
    if (cursor && (orch_json_string(in->d, cursor, &at) < 0 || !at.n)) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "tools/list: params.cursor must be one that a list gave");
        return;
    }
    if (in->s->holding) {
        keep(in, "tools/list");
        return;
    }
    orch_buf_str(&b, "\"tools\":");
    int r = in->s->ops->tools_list(in->s->ud, (struct orch_slice){ at.p, at.n }, &b, &next, &err);
    if (r < 0) {
        int code = r == -EINVAL ? ORCH_RPC_INVALID_PARAMS : ORCH_RPC_UPSTREAM_FAILED;
        if (rq)
            orch_mcp_respond_error(rq, code, orch_slice_str(err.msg), ORCH_MCP_NO_DATA);
        else
            orch_mcp_refuse(in, code, ORCH_MCP_NO_DATA, "%s", err.msg);
        return;
    }
    if (next.n) {
        orch_buf_str(&b, ",\"nextCursor\":");
        orch_json_quote(&b, (struct orch_slice){ next.p, next.n });
    }
    if (in->modern) {
        orch_buf_str(&b, ",\"ttlMs\":0,\"cacheScope\":\"private\"");
        put_server_meta(in->s, &b);
    }
    if (rq)
        orch_mcp_respond(rq, (struct orch_slice){ b.p, b.n });
    else
        orch_mcp_answer(in, (struct orch_slice){ b.p, b.n });
}

/* Reads params of a request that the host answers; false when it was refused. name_key NULL:
 * none. */
static bool read_params(struct orch_mcp_incoming *in, const char *method, const char *name_key,
                        struct orch_mcp_params *p, struct orch_buf *unescaped)
{
    const struct orch_json_doc *d = in->d;
    p->all = in->m.params;
    p->meta = in->meta;
    if (name_key) {
        uint32_t name = in->m.params ? orch_json_get(d, in->m.params, name_key) : 0;
        if (!name || d->toks[name].type != ORCH_JSON_STRING) {
            orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                            "%s: params.%s must be a string", method, name_key);
            return false;
        }
        p->name = (struct orch_slice){ d->text + d->toks[name].start,
                                       d->toks[name].end - d->toks[name].start };
        if (d->toks[name].flags & ORCH_JSON_ESCAPED) {
            orch_json_string(d, name, unescaped);
            p->name = (struct orch_slice){ unescaped->p, unescaped->n };
        }
        p->args = orch_json_get(d, in->m.params, "arguments");
        if (p->args && d->toks[p->args].type != ORCH_JSON_OBJECT) {
            orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                            "%s: params.arguments must be an object", method);
            return false;
        }
    }
    if (d->nul_flag) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "%s: U+0000 is not allowed in a string", method);
        return false;
    }
    if (!in->modern || !in->m.params)
        return true;
    p->inputs = orch_json_get(d, in->m.params, "inputResponses");
    p->state = orch_json_get(d, in->m.params, "requestState");
    if ((p->inputs && d->toks[p->inputs].type != ORCH_JSON_OBJECT) ||
        (p->state && d->toks[p->state].type != ORCH_JSON_STRING)) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "%s: params.inputResponses must be an object, params.requestState a string",
                        method);
        return false;
    }
    return true;
}

/* The request object of what the host answers, or NULL when it was refused. */
static struct orch_mcp_request *accept(struct orch_mcp_incoming *in, const char *method)
{
    struct orch_mcp_session *s = in->s;
    const struct orch_json_doc *d = in->d;
    if ((s->shared ? *s->shared : s->in_flight) >= s->ops->max_calls) {
        orch_mcp_refuse(in, ORCH_RPC_TOO_MANY_CALLS, ORCH_MCP_NO_DATA,
                        "too many calls in flight (limit %u; limits.calls)", s->ops->max_calls);
        return NULL;
    }
    uint32_t token = in->meta ? orch_json_get(d, in->meta, "progressToken") : 0;
    struct orch_slice token_raw = token ? orch_json_raw(d, token) : ORCH_MCP_NO_DATA;
    if (token && d->toks[token].type != ORCH_JSON_STRING &&
        d->toks[token].type != ORCH_JSON_NUMBER) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "%s: _meta.progressToken must be a string or a number", method);
        return NULL;
    }
    if (token_raw.n > 1024) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "%s: _meta.progressToken is over 1024 bytes", method);
        return NULL;
    }
    struct orch_mcp_request *rq = orch_mcp_request_new(in, token_raw);
    rq->caps = s->caps;
    if (in->modern) {
        uint32_t level = orch_json_get(d, in->meta, ORCH_MCP_META "logLevel");
        if (level)
            rq->log_level = (int8_t)level_index((struct orch_slice){
                d->text + d->toks[level].start, d->toks[level].end - d->toks[level].start });
        rq->caps = (uint8_t)orch_mcp_caps_read(d,
                                               orch_json_get(d, in->meta,
                                                             ORCH_MCP_META "clientCapabilities"));
    }
    return rq;
}

/* Keeps the message until the session is let go. */
static void keep(struct orch_mcp_incoming *in, const char *method)
{
    struct orch_mcp_session *s = in->s;
    struct orch_slice text = orch_json_raw(in->d, in->tok);
    if (s->held_bytes && s->held_bytes + text.n > HELD_MAX_BYTES) {
        orch_mcp_refuse(in, ORCH_RPC_TOO_MANY_CALLS, ORCH_MCP_NO_DATA,
                        "%s: over %d bytes of calls wait for the server to start", method,
                        HELD_MAX_BYTES);
        return;
    }
    struct orch_mcp_request *rq = accept(in, method);
    if (!rq)
        return;
    rq->held = orch_xstrndup(text.p, text.n);
    rq->held_n = (uint32_t)text.n;
    s->held_bytes += text.n;
}

/* rq: NULL, or the call was held. */
static void do_tools_call(struct orch_mcp_incoming *in, struct orch_mcp_request *rq)
{
    struct orch_mcp_params p = { 0 };
    cleanup_buf struct orch_buf unescaped = { 0 };
    if (!read_params(in, "tools/call", "name", &p, &unescaped))
        return;
    if (in->s->holding)
        keep(in, "tools/call");
    else if (rq || (rq = accept(in, "tools/call")))
        in->s->ops->tool_call(in->s->ud, rq, in->d, &p);
}

/* What the host answers beside tools, and where it is offered. */
static const struct feature {
    const char *method, *name_key;
    unsigned feature;
} features[] = {
    { "resources/list", NULL, ORCH_MCP_RESOURCES },
    { "resources/templates/list", NULL, ORCH_MCP_RESOURCES },
    { "resources/read", "uri", ORCH_MCP_RESOURCES },
    { "prompts/list", NULL, ORCH_MCP_PROMPTS },
    { "prompts/get", "name", ORCH_MCP_PROMPTS },
    { "completion/complete", NULL, ORCH_MCP_COMPLETIONS },
    { "tasks/get", "taskId", ORCH_MCP_TASKS },
    { "tasks/update", "taskId", ORCH_MCP_TASKS },
    { "tasks/cancel", "taskId", ORCH_MCP_TASKS },
};

/* false: no such method here. */
static bool do_feature(struct orch_mcp_incoming *in)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(features); i++) {
        const struct feature *f = &features[i];
        if (!method_is(in, f->method))
            continue;
        if (!(in->s->ops->features & f->feature) || (f->feature == ORCH_MCP_TASKS && !in->modern))
            return false;
        struct orch_mcp_params p = { 0 };
        cleanup_buf struct orch_buf unescaped = { 0 };
        struct orch_mcp_request *rq = read_params(in, f->method, f->name_key, &p, &unescaped)
                                          ? accept(in, f->method)
                                          : NULL;
        if (rq)
            in->s->ops->request(in->s->ud, rq, in->d, f->method, &p);
        return true;
    }
    return false;
}

static void do_set_level(struct orch_mcp_incoming *in)
{
    uint32_t level = in->m.params ? orch_json_get(in->d, in->m.params, "level") : 0;
    int i = -1;
    for (size_t k = 0; level && k < ORCH_ARRAY_LEN(log_levels); k++)
        if (orch_json_string_eq(in->d, level, log_levels[k]))
            i = (int)k;
    if (i < 0) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                        "logging/setLevel: params.level must be one of debug … emergency");
        return;
    }
    in->s->log_level = (int8_t)i;
    orch_mcp_answer(in, ORCH_MCP_NO_DATA);
}

/* The modern era's checks of _meta; true when the request may go on. */
static bool check_modern(struct orch_mcp_incoming *in)
{
    const struct orch_json_doc *d = in->d;
    uint32_t version = in->meta ? orch_json_get(d, in->meta, ORCH_MCP_META "protocolVersion") : 0;
    const char *against = in->s->check ? in->s->check(in->s->sink_ud, in->s->stream, d, &in->m)
                                       : NULL;
    if (!version || d->toks[version].type != ORCH_JSON_STRING) {
        refuse_envelope(in, "not initialized: send initialize first, or put " ORCH_MCP_META
                            "protocolVersion (a string) into params._meta");
    } else if (against) {
        orch_mcp_refuse(in, ORCH_RPC_HEADER_MISMATCH, ORCH_MCP_NO_DATA, "%s", against);
    } else if (!orch_json_string_eq(d, version, ORCH_MCP_MODERN)) {
        cleanup_buf struct orch_buf data = { 0 };
        orch_buf_str(&data, "{\"supported\":[\"" ORCH_MCP_MODERN "\"],\"requested\":");
        orch_buf_slice(&data, orch_json_raw(d, version));
        orch_buf_char(&data, '}');
        orch_mcp_refuse(in, ORCH_RPC_UNSUPPORTED_VERSION, (struct orch_slice){ data.p, data.n },
                        "Unsupported protocol version");
    } else {
        uint32_t capabilities = orch_json_get(d, in->meta, ORCH_MCP_META "clientCapabilities");
        if (capabilities && d->toks[capabilities].type == ORCH_JSON_OBJECT)
            return true;
        refuse_envelope(in,
                        "params._meta must have " ORCH_MCP_META "clientCapabilities (an object)");
    }
    return false;
}

static void unknown_method(struct orch_mcp_incoming *in)
{
    struct orch_slice raw = orch_json_raw(in->d, in->m.method);
    int n = raw.n > 200 ? 200 : (int)raw.n;
    orch_mcp_refuse(in, ORCH_RPC_METHOD_NOT_FOUND, ORCH_MCP_NO_DATA, "Method not found: %.*s%s", n,
                    raw.p, in->modern ? " (revision " ORCH_MCP_MODERN ")" : "");
}

static void handle_request(struct orch_mcp_incoming *in)
{
    struct orch_mcp_session *s = in->s;
    if (request_find(s, in->m.id)) {
        orch_mcp_refuse(in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                        "id is in use by a request in flight");
        return;
    }
    in->modern = (in->meta && orch_json_get(in->d, in->meta, ORCH_MCP_META "protocolVersion")) ||
                 method_is(in, "server/discover") ||
                 (!s->version && !method_is(in, "initialize") && !method_is(in, "ping"));
    if (in->modern) {
        if (!check_modern(in))
            return;
        if (method_is(in, "tools/call"))
            do_tools_call(in, NULL);
        else if (method_is(in, "tools/list"))
            do_tools_list(in, NULL);
        else if (method_is(in, "server/discover"))
            do_discover(in);
        else if (method_is(in, "subscriptions/listen"))
            orch_mcp_listen(in);
        else if (!do_feature(in))
            unknown_method(in);
        return;
    }
    if (method_is(in, "tools/call"))
        do_tools_call(in, NULL);
    else if (method_is(in, "tools/list"))
        do_tools_list(in, NULL);
    else if (method_is(in, "ping"))
        orch_mcp_answer(in, ORCH_MCP_NO_DATA);
    else if (method_is(in, "initialize"))
        do_initialize(in);
    else if (method_is(in, "logging/setLevel"))
        do_set_level(in);
    else if ((s->ops->features & ORCH_MCP_RESOURCES) && method_is(in, "resources/subscribe"))
        orch_mcp_subscribe(in, true);
    else if ((s->ops->features & ORCH_MCP_RESOURCES) && method_is(in, "resources/unsubscribe"))
        orch_mcp_subscribe(in, false);
    else if (!do_feature(in))
        unknown_method(in);
}

static void handle_notification(struct orch_mcp_incoming *in)
{
    struct orch_mcp_session *s = in->s;
    if (method_is(in, "notifications/initialized")) {
        s->initialized_seen = s->version != NULL;
    } else if (method_is(in, "notifications/cancelled")) {
        uint32_t id = in->m.params ? orch_json_get(in->d, in->m.params, "requestId") : 0;
        struct orch_mcp_request *rq = id ? request_find(s, orch_json_raw(in->d, id)) : NULL;
        if (rq && (rq->filter || rq->held)) {
            request_end(rq);
        } else if (rq && !rq->cancelled) {
            rq->cancelled = true;
            s->ops->cancel(s->ud, rq);
        }
    }
}

static void handle_message(struct orch_mcp_session *s, uint32_t tok, struct orch_mcp_batch *batch)
{
    struct orch_mcp_incoming in = { .s = s, .d = &s->doc, .batch = batch, .tok = tok };
    const char *why = NULL;
    if (orch_rpc_read(in.d, tok, &in.m, &why) < 0) {
        orch_mcp_refuse(&in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA, "Invalid request: %s",
                        why);
        return;
    }
    if (in.m.id.n > 1024) {
        in.m.id = ORCH_MCP_NO_DATA;
        orch_mcp_refuse(&in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                        "Invalid request: \"id\" is over 1024 bytes");
        return;
    }
    if (in.m.params) {
        in.meta = orch_json_get(in.d, in.m.params, "_meta");
        if (in.meta && in.d->toks[in.meta].type != ORCH_JSON_OBJECT) {
            if (in.m.kind == ORCH_RPC_REQUEST)
                orch_mcp_refuse(&in, ORCH_RPC_INVALID_PARAMS, ORCH_MCP_NO_DATA,
                                "params._meta must be an object");
            return;
        }
    }
    if (in.m.kind == ORCH_RPC_REQUEST)
        handle_request(&in);
    else if (in.m.kind == ORCH_RPC_NOTIFICATION)
        handle_notification(&in);
    else
        orch_mcp_ask_reply(&in);
}

static void handle_batch(struct orch_mcp_session *s)
{
    struct orch_mcp_incoming in = { .s = s, .d = &s->doc };
    if (!s->version || strcmp(s->version, "2025-03-26") != 0) {
        orch_mcp_refuse(
            &in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
            "Invalid request: batches belong to revision 2025-03-26, this session has %s",
            s->version ? s->version : "not been initialized");
        return;
    }
    uint32_t count = s->doc.toks[0].count;
    if (count == 0 || count > 100) {
        orch_mcp_refuse(&in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                        "Invalid request: a batch has 1 to 100 messages");
        return;
    }
    struct orch_mcp_batch *batch = orch_xcalloc(1, sizeof *batch);
    batch->stream = s->stream;
    uint32_t tok = 1;
    for (uint32_t i = 0; i < count; i++) {
        handle_message(s, tok, batch);
        tok = s->doc.toks[tok].next;
    }
    batch->closed = true;
    batch_flush(s, batch);
}

bool orch_mcp_session_feed(struct orch_mcp_session *s, struct orch_slice line, void *stream)
{
    if (s->ended)
        return false;
    if (line.n && line.p[line.n - 1] == '\r')
        line.n--;
    if (!line.n && !s->send)
        return false;
    s->feeding = true;
    s->answers = false;
    s->stream = stream;
    struct orch_json_fault fault;
    struct orch_mcp_incoming in = { .s = s, .d = &s->doc };
    if (orch_json_scan(&s->doc, line, &s->limits, &fault) < 0)
        orch_mcp_refuse(&in, ORCH_RPC_PARSE_ERROR, ORCH_MCP_NO_DATA, "Parse error: %s at byte %zu",
                        fault.rule, fault.byte);
    else if (s->doc.toks[0].type == ORCH_JSON_ARRAY)
        handle_batch(s);
    else
        handle_message(s, 0, NULL);
    s->feeding = false;
    return s->answers;
}

/* ---- held requests */

static void let_go(struct orch_mcp_request *rq)
{
    struct orch_mcp_session *s = rq->session;
    cleanup_free char *text = orch_steal_ptr(&rq->held);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    struct orch_mcp_incoming in = { .s = s, .d = &d, .batch = rq->batch, .modern = rq->modern };
    const char *why;
    s->held_bytes -= rq->held_n;
    /* It was read before, so it can be again. */
    if (orch_json_scan(&d, (struct orch_slice){ text, rq->held_n }, &s->limits, &fault) < 0 ||
        orch_rpc_read(&d, 0, &in.m, &why) < 0) {
        orch_mcp_respond_error(rq, ORCH_RPC_INTERNAL_ERROR,
                               ORCH_SLICE("the held message cannot be read"), ORCH_MCP_NO_DATA);
        return;
    }
    in.meta = in.m.params ? orch_json_get(&d, in.m.params, "_meta") : 0;
    if (method_is(&in, "tools/list"))
        do_tools_list(&in, rq);
    else
        do_tools_call(&in, rq);
}

void orch_mcp_session_hold(struct orch_mcp_session *s, bool on)
{
    struct orch_mcp_request *rq = s->first, *before;
    s->holding = on;
    if (on)
        return;
    while (rq && rq->next) /* the oldest */
        rq = rq->next;
    for (; rq; rq = before) {
        before = rq->prev;
        if (rq->held)
            let_go(rq);
    }
}

void orch_mcp_session_held_progress(struct orch_mcp_session *s, double done,
                                    struct orch_slice message)
{
    for (struct orch_mcp_request *rq = s->first; rq; rq = rq->next)
        if (rq->held)
            orch_mcp_progress(rq, done, -1, message);
}

void orch_mcp_session_oversized(struct orch_mcp_session *s, size_t limit)
{
    struct orch_mcp_incoming in = { .s = s, .d = &s->doc };
    orch_mcp_refuse(&in, ORCH_RPC_INVALID_REQUEST, ORCH_MCP_NO_DATA,
                    "Invalid request: message over %zu bytes (limits.message)", limit);
}
