#include "session.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MODERN_VERSION "2026-07-28"
#define META_PREFIX "io.modelcontextprotocol/"
#define SERVER_INFO "{\"name\":\"orch\",\"version\":\"" ORCH_VERSION "\"}"
#define MODERN_META "\"_meta\":{\"" META_PREFIX "serverInfo\":" SERVER_INFO "}"

/* Progress and log notifications are left out while this much output waits for a slow reader. */
enum { NOTES_MAX_BYTES = 1 << 20 };

static const char *const legacy_versions[] = { "2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05" };
static const char *const log_levels[] = { "debug", "info", "notice", "warning", "error", "critical", "alert", "emergency" };

/* A 2025-03-26 batch: answers are collected and sent as one array when the last one is there. */
struct batch {
    unsigned pending;
    bool closed;
    struct orch_buf out;
};

struct orch_mcp_request {
    struct orch_mcp_request *prev, *next;
    struct orch_mcp_session *session;
    struct batch *batch;
    void *host;
    char *id; /* id bytes, then progress token bytes */
    uint32_t id_n, token_n;
    int8_t log_level; /* -1: none */
    bool modern, is_call, cancelled;
};

struct orch_mcp_session {
    const struct orch_mcp_server_ops *ops;
    void *ud;
    struct orch_json_limits limits;
    struct orch_json_doc doc;
    struct orch_buf out;
    struct orch_mcp_request *first, *spare;
    unsigned in_flight;
    const char *version; /* legacy, after initialize */
    bool initialized_seen, ended, feeding;
    int8_t log_level;
    char *client;
    void (*on_output)(void *ud);
    void *on_output_ud;
    void (*on_idle)(void *ud);
    void *on_idle_ud;
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

void orch_mcp_session_end(struct orch_mcp_session *s)
{
    s->ended = true;
    for (struct orch_mcp_request *rq = s->first, *next; rq; rq = next) {
        next = rq->next;
        if (!rq->cancelled) {
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
    while (s->first)
        orch_mcp_request_drop(s->first);
    while (s->spare) {
        struct orch_mcp_request *rq = s->spare;
        s->spare = rq->next;
        free(rq);
    }
    orch_json_doc_free(&s->doc);
    orch_buf_free(&s->out);
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
    return s->version ? s->version : MODERN_VERSION;
}

unsigned orch_mcp_session_in_flight(const struct orch_mcp_session *s)
{
    return s->in_flight;
}

static void announce(struct orch_mcp_session *s)
{
    if (!s->feeding && s->on_output)
        s->on_output(s->on_output_ud);
}

void orch_mcp_session_tools_changed(struct orch_mcp_session *s)
{
    if (!s->initialized_seen)
        return;
    orch_buf_str(&s->out, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}\n");
    announce(s);
}

/* ---- requests in flight */

static struct orch_slice id_of(const struct orch_mcp_request *rq)
{
    return (struct orch_slice){ rq->id, rq->id_n };
}

static struct orch_mcp_request *request_new(struct orch_mcp_session *s, struct orch_slice id, struct orch_slice token,
                                            struct batch *batch, bool modern)
{
    struct orch_mcp_request *rq = s->spare;
    if (rq)
        s->spare = rq->next;
    else
        rq = orch_xmalloc(sizeof *rq);
    *rq = (struct orch_mcp_request){ .session = s, .batch = batch, .modern = modern, .log_level = -1 };
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
    s->in_flight++;
    return rq;
}

static struct orch_mcp_request *request_find(struct orch_mcp_session *s, struct orch_slice id)
{
    /* Ids mostly differ in their last byte; no id is empty. */
    for (struct orch_mcp_request *rq = s->first; rq; rq = rq->next)
        if (rq->id_n == id.n && rq->id[id.n - 1] == id.p[id.n - 1] && memcmp(rq->id, id.p, id.n) == 0)
            return rq;
    return NULL;
}

/* Where an answer goes: the session's output or its batch. Ends with answer_end. */
static struct orch_buf *answer_begin(struct orch_mcp_session *s, struct batch *batch)
{
    if (!batch)
        return &s->out;
    orch_buf_char(&batch->out, batch->out.n ? ',' : '[');
    return &batch->out;
}

static void batch_flush(struct orch_mcp_session *s, struct batch *batch)
{
    if (!batch->closed || batch->pending)
        return;
    if (batch->out.n) {
        orch_buf_slice(&s->out, (struct orch_slice){ batch->out.p, batch->out.n });
        orch_buf_str(&s->out, "]\n");
    }
    orch_buf_free(&batch->out);
    free(batch);
}

static void request_end(struct orch_mcp_request *rq)
{
    struct orch_mcp_session *s = rq->session;
    if (rq->prev)
        rq->prev->next = rq->next;
    else
        s->first = rq->next;
    if (rq->next)
        rq->next->prev = rq->prev;
    s->in_flight--;
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

void orch_mcp_request_drop(struct orch_mcp_request *rq)
{
    request_end(rq);
}

static void put_result(struct orch_buf *out, struct orch_slice id, bool modern, struct orch_slice members)
{
    orch_rpc_result_head(out, id);
    if (modern)
        orch_buf_slice(out, members.n ? ORCH_SLICE("{\"resultType\":\"complete\",") : ORCH_SLICE("{\"resultType\":\"complete\""));
    else
        orch_buf_char(out, '{');
    orch_buf_slice(out, members);
    orch_buf_slice(out, ORCH_SLICE("}}"));
}

void orch_mcp_respond(struct orch_mcp_request *rq, struct orch_slice members)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->cancelled) {
        put_result(answer_begin(s, rq->batch), id_of(rq), rq->modern, members);
        if (!rq->batch)
            orch_buf_char(&s->out, '\n');
    }
    request_end(rq);
    announce(s);
}

void orch_mcp_respond_error(struct orch_mcp_request *rq, int code, struct orch_slice text, struct orch_slice data)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->cancelled) {
        orch_rpc_error(answer_begin(s, rq->batch), id_of(rq), code, text, data);
        if (!rq->batch)
            orch_buf_char(&s->out, '\n');
    }
    request_end(rq);
    announce(s);
}

void orch_mcp_progress(struct orch_mcp_request *rq, double done, double total, struct orch_slice message)
{
    struct orch_mcp_session *s = rq->session;
    if (!rq->token_n || rq->cancelled || s->out.n > NOTES_MAX_BYTES)
        return;
    orch_buf_str(&s->out, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":");
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
    orch_buf_str(&s->out, "}}\n");
    announce(s);
}

static int level_index(struct orch_slice name)
{
    for (size_t i = 0; i < ORCH_ARRAY_LEN(log_levels); i++)
        if (orch_slice_eq(name, log_levels[i]))
            return (int)i;
    return -1;
}

void orch_mcp_log(struct orch_mcp_request *rq, const char *level, struct orch_slice logger, struct orch_slice data)
{
    struct orch_mcp_session *s = rq->session;
    int least = rq->modern ? rq->log_level : s->log_level;
    if (rq->cancelled || s->out.n > NOTES_MAX_BYTES || least < 0 || level_index(orch_slice_str(level)) < least)
        return;
    orch_buf_printf(&s->out, "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"%s\",\"logger\":", level);
    orch_json_quote(&s->out, logger);
    orch_buf_str(&s->out, ",\"data\":");
    orch_buf_slice(&s->out, data);
    orch_buf_str(&s->out, "}}\n");
    announce(s);
}

/* ---- one message */

struct incoming {
    struct orch_mcp_session *s;
    const struct orch_json_doc *d;
    struct orch_rpc_msg m;
    struct batch *batch;
    uint32_t meta; /* params._meta when it is an object */
    bool modern;
};

static void refuse(struct incoming *in, int code, struct orch_slice data, const char *fmt, ...) ORCH_PRINTF(4, 5);
static void refuse(struct incoming *in, int code, struct orch_slice data, const char *fmt, ...)
{
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    orch_rpc_error(answer_begin(in->s, in->batch), in->m.id, code, orch_slice_str(text), data);
    if (!in->batch)
        orch_buf_char(&in->s->out, '\n');
}

#define NO_DATA ((struct orch_slice){ 0 })

static void answer(struct incoming *in, struct orch_slice members)
{
    put_result(answer_begin(in->s, in->batch), in->m.id, in->modern, members);
    if (!in->batch)
        orch_buf_char(&in->s->out, '\n');
}

static bool method_is(const struct incoming *in, const char *name)
{
    return orch_json_string_eq(in->d, in->m.method, name);
}

static void do_initialize(struct incoming *in)
{
    struct orch_mcp_session *s = in->s;
    uint32_t wanted = in->m.params ? orch_json_get(in->d, in->m.params, "protocolVersion") : 0;
    if (!wanted || in->d->toks[wanted].type != ORCH_JSON_STRING) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "initialize: params.protocolVersion must be a string");
        return;
    }
    if (s->version) {
        refuse(in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "initialize: this session is initialized already");
        return;
    }
    if (in->batch) {
        refuse(in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "initialize must not be part of a batch");
        return;
    }
    s->version = legacy_versions[0];
    for (size_t i = 0; i < ORCH_ARRAY_LEN(legacy_versions); i++)
        if (orch_json_string_eq(in->d, wanted, legacy_versions[i]))
            s->version = legacy_versions[i];
    uint32_t client = orch_json_get(in->d, in->m.params, "clientInfo");
    if (client && in->d->toks[client].type == ORCH_JSON_OBJECT) {
        struct orch_slice raw = orch_json_raw(in->d, client);
        if (raw.n <= 4096)
            s->client = orch_xstrndup(raw.p, raw.n);
    }
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_printf(&b, "\"protocolVersion\":\"%s\",\"capabilities\":{\"tools\":{\"listChanged\":true},\"logging\":{}},\"serverInfo\":%s",
                    s->version, SERVER_INFO);
    if (s->ops->instructions) {
        orch_buf_str(&b, ",\"instructions\":");
        orch_json_quote(&b, orch_slice_str(s->ops->instructions));
    }
    answer(in, (struct orch_slice){ b.p, b.n });
}

static void do_discover(struct incoming *in)
{
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_str(&b, "\"supportedVersions\":[\"" MODERN_VERSION "\"");
    for (size_t i = 0; i < ORCH_ARRAY_LEN(legacy_versions); i++)
        orch_buf_printf(&b, ",\"%s\"", legacy_versions[i]);
    orch_buf_str(&b, "],\"capabilities\":{\"tools\":{},\"logging\":{}}");
    if (in->s->ops->instructions) {
        orch_buf_str(&b, ",\"instructions\":");
        orch_json_quote(&b, orch_slice_str(in->s->ops->instructions));
    }
    orch_buf_str(&b, ",\"ttlMs\":0,\"cacheScope\":\"private\"," MODERN_META);
    answer(in, (struct orch_slice){ b.p, b.n });
}

static void do_tools_list(struct incoming *in)
{
    if (in->m.params && orch_json_get(in->d, in->m.params, "cursor")) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/list: unknown cursor (the list has one page)");
        return;
    }
    cleanup_buf struct orch_buf b = { 0 };
    struct orch_err err = { 0 };
    orch_buf_str(&b, "\"tools\":");
    if (in->s->ops->tools_list(in->s->ud, &b, &err) < 0) {
        refuse(in, ORCH_RPC_UPSTREAM_FAILED, NO_DATA, "%s", err.msg);
        return;
    }
    if (in->modern)
        orch_buf_str(&b, ",\"ttlMs\":0,\"cacheScope\":\"private\"," MODERN_META);
    answer(in, (struct orch_slice){ b.p, b.n });
}

static void do_tools_call(struct incoming *in)
{
    struct orch_mcp_session *s = in->s;
    const struct orch_json_doc *d = in->d;
    uint32_t name = in->m.params ? orch_json_get(d, in->m.params, "name") : 0;
    if (!name || d->toks[name].type != ORCH_JSON_STRING) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/call: params.name must be a string");
        return;
    }
    uint32_t args = orch_json_get(d, in->m.params, "arguments");
    if (args && d->toks[args].type != ORCH_JSON_OBJECT) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/call: params.arguments must be an object");
        return;
    }
    if (d->nul_flag) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/call: U+0000 is not allowed in a string");
        return;
    }
    if (s->in_flight >= s->ops->max_calls) {
        refuse(in, ORCH_RPC_TOO_MANY_CALLS, NO_DATA, "too many calls in flight (limit %u; limits.calls)", s->ops->max_calls);
        return;
    }
    uint32_t token = in->meta ? orch_json_get(d, in->meta, "progressToken") : 0;
    struct orch_slice token_raw = token ? orch_json_raw(d, token) : NO_DATA;
    if (token && d->toks[token].type != ORCH_JSON_STRING && d->toks[token].type != ORCH_JSON_NUMBER) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/call: _meta.progressToken must be a string or a number");
        return;
    }
    if (token_raw.n > 1024) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "tools/call: _meta.progressToken is over 1024 bytes");
        return;
    }
    cleanup_buf struct orch_buf unescaped = { 0 };
    struct orch_slice name_text = { d->text + d->toks[name].start, d->toks[name].end - d->toks[name].start };
    if (d->toks[name].flags & ORCH_JSON_ESCAPED) {
        orch_json_string(d, name, &unescaped);
        name_text = (struct orch_slice){ unescaped.p, unescaped.n };
    }
    struct orch_mcp_request *rq = request_new(s, in->m.id, token_raw, in->batch, in->modern);
    rq->is_call = true;
    if (in->batch)
        in->batch->pending++;
    if (in->modern) {
        uint32_t level = orch_json_get(d, in->meta, META_PREFIX "logLevel");
        if (level)
            rq->log_level = (int8_t)level_index((struct orch_slice){ d->text + d->toks[level].start, d->toks[level].end - d->toks[level].start });
    }
    s->ops->tool_call(s->ud, rq, d, name_text, args, in->meta);
}

static void do_set_level(struct incoming *in)
{
    uint32_t level = in->m.params ? orch_json_get(in->d, in->m.params, "level") : 0;
    int i = -1;
    for (size_t k = 0; level && k < ORCH_ARRAY_LEN(log_levels); k++)
        if (orch_json_string_eq(in->d, level, log_levels[k]))
            i = (int)k;
    if (i < 0) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "logging/setLevel: params.level must be one of debug … emergency");
        return;
    }
    in->s->log_level = (int8_t)i;
    answer(in, NO_DATA);
}

/* The modern era's checks of _meta; true when the request may go on. */
static bool check_modern(struct incoming *in)
{
    const struct orch_json_doc *d = in->d;
    uint32_t version = in->meta ? orch_json_get(d, in->meta, META_PREFIX "protocolVersion") : 0;
    if (!version || d->toks[version].type != ORCH_JSON_STRING) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA,
               "not initialized: send initialize first, or put " META_PREFIX "protocolVersion (a string) into params._meta");
        return false;
    }
    if (!orch_json_string_eq(d, version, MODERN_VERSION)) {
        cleanup_buf struct orch_buf data = { 0 };
        orch_buf_str(&data, "{\"supported\":[\"" MODERN_VERSION "\"],\"requested\":");
        orch_buf_slice(&data, orch_json_raw(d, version));
        orch_buf_char(&data, '}');
        refuse(in, ORCH_RPC_UNSUPPORTED_VERSION, (struct orch_slice){ data.p, data.n }, "Unsupported protocol version");
        return false;
    }
    uint32_t capabilities = orch_json_get(d, in->meta, META_PREFIX "clientCapabilities");
    if (!capabilities || d->toks[capabilities].type != ORCH_JSON_OBJECT) {
        refuse(in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "params._meta must have " META_PREFIX "clientCapabilities (an object)");
        return false;
    }
    return true;
}

static void unknown_method(struct incoming *in)
{
    struct orch_slice raw = orch_json_raw(in->d, in->m.method);
    int n = raw.n > 200 ? 200 : (int)raw.n;
    refuse(in, ORCH_RPC_METHOD_NOT_FOUND, NO_DATA, "Method not found: %.*s%s", n, raw.p,
           in->modern ? " (revision " MODERN_VERSION ")" : "");
}

static void handle_request(struct incoming *in)
{
    struct orch_mcp_session *s = in->s;
    if (request_find(s, in->m.id)) {
        refuse(in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "id is in use by a request in flight");
        return;
    }
    in->modern = (in->meta && orch_json_get(in->d, in->meta, META_PREFIX "protocolVersion")) || method_is(in, "server/discover") ||
                 (!s->version && !method_is(in, "initialize") && !method_is(in, "ping"));
    if (in->modern) {
        if (!check_modern(in))
            return;
        if (method_is(in, "tools/call"))
            do_tools_call(in);
        else if (method_is(in, "tools/list"))
            do_tools_list(in);
        else if (method_is(in, "server/discover"))
            do_discover(in);
        else
            unknown_method(in);
        return;
    }
    if (method_is(in, "tools/call"))
        do_tools_call(in);
    else if (method_is(in, "tools/list"))
        do_tools_list(in);
    else if (method_is(in, "ping"))
        answer(in, NO_DATA);
    else if (method_is(in, "initialize"))
        do_initialize(in);
    else if (method_is(in, "logging/setLevel"))
        do_set_level(in);
    else
        unknown_method(in);
}

static void handle_notification(struct incoming *in)
{
    struct orch_mcp_session *s = in->s;
    if (method_is(in, "notifications/initialized")) {
        s->initialized_seen = s->version != NULL;
    } else if (method_is(in, "notifications/cancelled")) {
        uint32_t id = in->m.params ? orch_json_get(in->d, in->m.params, "requestId") : 0;
        struct orch_mcp_request *rq = id ? request_find(s, orch_json_raw(in->d, id)) : NULL;
        if (rq && !rq->cancelled) {
            rq->cancelled = true;
            s->ops->cancel(s->ud, rq);
        }
    }
}

static void handle_message(struct orch_mcp_session *s, uint32_t tok, struct batch *batch)
{
    struct incoming in = { .s = s, .d = &s->doc, .batch = batch };
    const char *why = NULL;
    if (orch_rpc_read(in.d, tok, &in.m, &why) < 0) {
        refuse(&in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "Invalid request: %s", why);
        return;
    }
    if (in.m.id.n > 1024) {
        in.m.id = NO_DATA;
        refuse(&in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "Invalid request: \"id\" is over 1024 bytes");
        return;
    }
    if (in.m.params) {
        in.meta = orch_json_get(in.d, in.m.params, "_meta");
        if (in.meta && in.d->toks[in.meta].type != ORCH_JSON_OBJECT) {
            if (in.m.kind == ORCH_RPC_REQUEST)
                refuse(&in, ORCH_RPC_INVALID_PARAMS, NO_DATA, "params._meta must be an object");
            return;
        }
    }
    if (in.m.kind == ORCH_RPC_REQUEST)
        handle_request(&in);
    else if (in.m.kind == ORCH_RPC_NOTIFICATION)
        handle_notification(&in);
    else
        orch_log(ORCH_DEBUG, "mcp: a response to a request that was never sent was ignored");
}

static void handle_batch(struct orch_mcp_session *s)
{
    struct incoming in = { .s = s, .d = &s->doc };
    if (!s->version || strcmp(s->version, "2025-03-26") != 0) {
        refuse(&in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "Invalid request: batches belong to revision 2025-03-26, this session has %s",
               s->version ? s->version : "not been initialized");
        return;
    }
    uint32_t count = s->doc.toks[0].count;
    if (count == 0 || count > 100) {
        refuse(&in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "Invalid request: a batch has 1 to 100 messages");
        return;
    }
    struct batch *batch = orch_xcalloc(1, sizeof *batch);
    uint32_t tok = 1;
    for (uint32_t i = 0; i < count; i++) {
        handle_message(s, tok, batch);
        tok = s->doc.toks[tok].next;
    }
    batch->closed = true;
    batch_flush(s, batch);
}

void orch_mcp_session_line(struct orch_mcp_session *s, struct orch_slice line)
{
    if (s->ended)
        return;
    if (line.n && line.p[line.n - 1] == '\r')
        line.n--;
    if (!line.n)
        return;
    s->feeding = true;
    struct orch_json_fault fault;
    struct incoming in = { .s = s, .d = &s->doc };
    if (orch_json_scan(&s->doc, line, &s->limits, &fault) < 0)
        refuse(&in, ORCH_RPC_PARSE_ERROR, NO_DATA, "Parse error: %s at byte %zu", fault.rule, fault.byte);
    else if (s->doc.toks[0].type == ORCH_JSON_ARRAY)
        handle_batch(s);
    else
        handle_message(s, 0, NULL);
    s->feeding = false;
}

void orch_mcp_session_oversized(struct orch_mcp_session *s, size_t limit)
{
    struct incoming in = { .s = s, .d = &s->doc };
    refuse(&in, ORCH_RPC_INVALID_REQUEST, NO_DATA, "Invalid request: message over %zu bytes (limits.message)", limit);
}
