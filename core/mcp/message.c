/* What a client sends, one message at a time: checked, answered here or handed to the host. */
#include "session_int.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static void refuse_status(struct orch_mcp_incoming *in, int code, int status,
                          struct orch_slice data, const char *fmt, va_list ap) ORCH_PRINTF(5, 0);
static void refuse_status(struct orch_mcp_incoming *in, int code, int status,
                          struct orch_slice data, const char *fmt, va_list ap)
{
    char text[2048];
    struct orch_buf *out;
    vsnprintf(text, sizeof text, fmt, ap);
    size_t from = orch_mcp_answer_begin(in->s, in->batch, &out);
    orch_rpc_error(out, in->m.id, code, orch_slice_str(text), data);
    if (!in->batch)
        orch_mcp_message_end(in->s, from, in->s->stream, status);
}

void orch_mcp_refuse(struct orch_mcp_incoming *in, int code, struct orch_slice data,
                     const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    refuse_status(in, code, orch_mcp_status_of(code, in->modern), data, fmt, ap);
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
    size_t from = orch_mcp_answer_begin(in->s, in->batch, &out);
    orch_mcp_put_result(out, in->m.id, in->modern ? "complete" : NULL, members);
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
            rq->log_level = (int8_t)orch_mcp_level((struct orch_slice){
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
    if (s->held_bytes && s->held_bytes + text.n > ORCH_MCP_HELD_MAX_BYTES) {
        orch_mcp_refuse(in, ORCH_RPC_TOO_MANY_CALLS, ORCH_MCP_NO_DATA,
                        "%s: over %d bytes of calls wait for the server to start", method,
                        ORCH_MCP_HELD_MAX_BYTES);
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
    for (size_t k = 0; level && k < ORCH_MCP_LOG_LEVELS; k++)
        if (orch_json_string_eq(in->d, level, orch_mcp_log_levels[k]))
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
    if (orch_mcp_request_find(s, in->m.id)) {
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
        struct orch_mcp_request *rq = id ? orch_mcp_request_find(s, orch_json_raw(in->d, id))
                                         : NULL;
        if (rq && (rq->filter || rq->held)) {
            orch_mcp_request_drop(rq);
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
    orch_mcp_batch_flush(s, batch);
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
