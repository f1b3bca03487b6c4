#include "client_int.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { STRAY_SHOWN = 10 }; /* stray messages logged, then silence */

static const struct orch_slice NOTHING = { "", 0 };

/* ---- what comes */

static void stray(struct orch_mcp_client *c, struct orch_slice text, const char *why)
{
    if (c->stray++ < STRAY_SHOWN)
        orch_log(ORCH_WARN, "%s: %s is no JSON-RPC (%s): %.*s", c->name,
                 c->proc ? "a line on its stdout" : "a message of it", why,
                 text.n > 200 ? 200 : (int)text.n, text.p);
}

static void finish_with_error(struct orch_mcp_client_call *k, uint32_t error)
{
    struct orch_mcp_client *c = k->client;
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    uint32_t message = orch_json_get(&c->doc, error, "message"),
             code = orch_json_get(&c->doc, error, "code");
    if (message)
        orch_json_string(&c->doc, message, &text);
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, EREMOTEIO, "%s: %s (code %.0f)", c->name,
                  text.n ? text.p : "error without a message",
                  code ? orch_json_number(&c->doc, code) : 0);
    c->error = error;
    orch_mcp_call_finish(k, NOTHING, &err);
    c->error = 0;
}

static bool is_result_type(const struct orch_json_doc *d, uint32_t key)
{
    return orch_json_string_eq(d, key, "resultType");
}

static void finish_with_result(struct orch_mcp_client_call *k, uint32_t result)
{
    struct orch_mcp_client *c = k->client;
    cleanup_buf struct orch_buf less = { 0 };
    uint32_t type = orch_json_get(&c->doc, result, "resultType");
    if (!type) {
        orch_mcp_call_finish(k, orch_json_raw(&c->doc, result), NULL);
        return;
    }
    orch_buf_char(&less, '{');
    orch_mcp_copy_members(&c->doc, result, is_result_type, &less);
    orch_buf_char(&less, '}');
    orch_mcp_call_finish(k, (struct orch_slice){ less.p, less.n }, NULL);
}

static void take_result(struct orch_mcp_client_call *k, uint32_t result)
{
    struct orch_mcp_client *c = k->client;
    const struct orch_json_doc *d = &c->doc;
    if (d->toks[result].type != ORCH_JSON_OBJECT) {
        orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EPROTO, "\"result\" is no object");
        return;
    }
    uint32_t type = c->modern ? orch_json_get(d, result, "resultType") : 0,
             tools = c->modern ? orch_json_get(d, result, "tools") : 0;
    if (type && orch_json_string_eq(d, type, "input_required")) {
        orch_mcp_call_round(k, result);
        return;
    }
    if (type && !orch_json_string_eq(d, type, "complete")) {
        struct orch_slice kind = orch_json_raw(d, type);
        cleanup_free char *why = orch_xasprintf("resultType %.*s of %s is unknown",
                                                kind.n > 100 ? 100 : (int)kind.n, kind.p,
                                                orch_mcp_call_method(k));
        orch_mcp_call_fail(k, ORCH_CLASS_UPSTREAM, EPROTO, why);
        return;
    }
    if (tools && c->o.url && strcmp(orch_mcp_call_method(k), "tools/list") == 0)
        orch_mcp_http_listed(c->t, d, tools);
    finish_with_result(k, result);
}

/* stream: of the request on whose stream it came. */
static bool take_response(struct orch_mcp_client *c, const struct orch_rpc_msg *m, int64_t stream,
                          int status)
{
    char text[24];
    if (m->id.n >= sizeof text)
        return false;
    memcpy(text, m->id.p, m->id.n);
    text[m->id.n] = 0;
    int64_t id = strtoll(text, NULL, 10); /* 0 of a string: none of ours */
    struct orch_mcp_client_call *k = orch_mcp_call_by_id(c, id);
    if (!k || k->note)
        return false;
    c->status = status;
    c->t->ops->release(c->t, id);
    if (m->result)
        take_result(k, m->result);
    else
        finish_with_error(k, m->error);
    c->status = 0;
    return id == stream;
}

static void take_progress(struct orch_mcp_client *c, uint32_t params)
{
    const struct orch_json_doc *d = &c->doc;
    int64_t token;
    uint32_t t = orch_json_get(d, params, "progressToken");
    struct orch_mcp_client_call *k = t && orch_json_int(d, t, &token)
                                         ? orch_mcp_call_by_id(c, token)
                                         : NULL;
    if (!k || !k->progress)
        return;
    uint32_t done = orch_json_get(d, params, "progress"), total = orch_json_get(d, params, "total");
    uint32_t message = orch_json_get(d, params, "message");
    cleanup_buf struct orch_buf text = { 0 };
    if (message)
        orch_json_string(d, message, &text);
    k->progress(k->ud, done ? orch_json_number(d, done) : 0,
                total ? orch_json_number(d, total) : -1, (struct orch_slice){ text.p, text.n });
}

static void take_notification(struct orch_mcp_client *c, const struct orch_rpc_msg *m)
{
    const struct orch_json_doc *d = &c->doc;
    if (orch_json_string_eq(d, m->method, "notifications/progress")) {
        if (m->params)
            take_progress(c, m->params);
    } else if (orch_json_string_eq(d, m->method, "notifications/tools/list_changed") &&
               c->o.tools_changed) {
        c->tries = 0;
        c->o.tools_changed(c->o.ud);
    } else if (orch_json_string_eq(d, m->method, "notifications/cancelled")) {
        uint32_t id = m->params && c->o.withdrawn && !c->modern
                          ? orch_json_get(d, m->params, "requestId")
                          : 0;
        if (id)
            c->o.withdrawn(c->o.ud, orch_json_raw(d, id));
    } else if (c->o.notified) {
        cleanup_buf struct orch_buf method = { 0 };
        orch_json_string(d, m->method, &method);
        c->o.notified(c->o.ud, method.p ? method.p : "", d, m->params);
    }
}

/* The server asks something of us, in the legacy era. */
static void take_request(struct orch_mcp_client *c, const struct orch_rpc_msg *m, int64_t stream)
{
    const struct orch_json_doc *d = &c->doc;
    const char *name;
    if (orch_json_string_eq(d, m->method, "ping")) {
        orch_mcp_client_reply(c, m->id, ORCH_SLICE("{}"));
    } else if (!orch_mcp_is_question(c, d, m->method, &name)) {
        orch_mcp_client_refuse(c, m->id, ORCH_RPC_METHOD_NOT_FOUND, "not offered by this client");
    } else if (!m->params && strcmp(name, "roots/list") != 0) {
        orch_mcp_client_refuse(c, m->id, ORCH_RPC_INVALID_PARAMS, "params are missing");
    } else {
        c->asks = orch_mcp_call_by_id(c, stream);
        c->o.asked(c->o.ud, m->id, name, d, m->params);
        c->asks = NULL;
    }
}

static bool take_message(struct orch_mcp_client *c, uint32_t tok, int64_t stream, int status)
{
    const struct orch_json_doc *d = &c->doc;
    struct orch_rpc_msg m;
    const char *why = NULL;
    if (orch_rpc_read(d, tok, &m, &why) < 0) {
        uint32_t error = status >= 400 ? orch_mcp_object_at(d, tok, "error") : 0;
        struct orch_mcp_client_call *k = error ? orch_mcp_call_by_id(c, stream) : NULL;
        if (k) { /* HTTP errors have no id */
            c->status = status;
            finish_with_error(k, error);
            c->status = 0;
            return true;
        }
        if (m.method && m.id.n && !c->modern) /* it waits for an answer */
            orch_mcp_client_refuse(c, m.id, ORCH_RPC_INVALID_REQUEST, why);
        stray(c, orch_json_raw(d, tok), why);
        return false;
    }
    if (m.kind == ORCH_RPC_RESPONSE)
        return take_response(c, &m, stream, status);
    if (m.kind == ORCH_RPC_NOTIFICATION)
        take_notification(c, &m);
    else if (!c->modern)
        take_request(c, &m, stream);
    else
        stray(c, orch_json_raw(d, tok), "servers of this era do not ask by requests");
    return false;
}

bool orch_mcp_client_take(struct orch_mcp_client *c, struct orch_slice text, int64_t id, int status)
{
    struct orch_json_doc *d = &c->doc;
    struct orch_json_fault fault;
    bool answered = false;
    if (!text.n || c->dead)
        return false;
    if (orch_json_scan(d, text, &c->o.limits, &fault) < 0) {
        stray(c, text, fault.rule);
        return false;
    }
    if (d->toks[0].type != ORCH_JSON_ARRAY)
        return take_message(c, 0, id, status);
    uint32_t tok = 1; /* a batch of 2025-03-26 */
    for (uint32_t i = 0; i < d->toks[0].count && !c->dead; i++, tok = d->toks[tok].next)
        answered |= take_message(c, tok, id, status);
    return answered;
}

void orch_mcp_client_sent(struct orch_mcp_client *c, int64_t id)
{
    struct orch_mcp_client_call *k = TAILQ_FIRST(&c->calls);
    while (k) {
        struct orch_mcp_client_call *next = TAILQ_NEXT(k, link);
        if (k->note && !k->waits && (!id || k->id == id)) {
            orch_mcp_call_finish(k, NOTHING, NULL);
            next = TAILQ_FIRST(&c->calls);
        }
        k = next;
    }
}

/* ---- what goes wrong */

void orch_mcp_client_failed(struct orch_mcp_client *c, int64_t id, int status,
                            const struct orch_err *err)
{
    struct orch_mcp_client_call *k = orch_mcp_call_by_id(c, id);
    if (!k)
        return;
    c->status = status;
    orch_mcp_call_finish(k, NOTHING, err);
    c->status = 0;
}

void orch_mcp_client_forgotten(struct orch_mcp_client *c, int64_t id, bool stale,
                               const struct orch_err *err)
{
    struct orch_mcp_client_call *k = orch_mcp_call_by_id(c, id);
    if (!k || k->note || k->own || k->again) {
        orch_mcp_client_failed(c, id, 404, err);
        return;
    }
    k->again = k->waits = true;
    k->id = 0;
    c->session_lost |= !stale;
    if (c->state != ORCH_MCP_READY)
        return;
    if (c->session_lost)
        orch_mcp_era_reopen(c);
    else
        orch_mcp_call_send(k, NULL, NULL);
}

void orch_mcp_client_fail(struct orch_mcp_client *c, const struct orch_err *err)
{
    if (c->dead)
        return;
    orch_mcp_client_enter(c);
    c->dead = true;
    c->why = *err;
    orch_timer_cancel(c->timer);
    c->t->ops->stop(c->t);
    c->probe = c->opening = c->listening = NULL;
    struct orch_mcp_client_call *k;
    while ((k = TAILQ_FIRST(&c->calls)))
        if (k->own)
            orch_mcp_client_drop(k);
        else
            orch_mcp_call_finish(k, NOTHING, &c->why);
    if (!c->freed && !c->told)
        c->o.ready(c->o.ud, &c->why);
    else if (!c->freed && c->o.lost)
        c->o.lost(c->o.ud, &c->why);
    orch_mcp_client_leave(c);
}

void orch_mcp_client_tail(const struct orch_mcp_client *c, struct orch_buf *out)
{
    if (!c->proc)
        return;
    orch_buf_str(out, "; ");
    orch_proc_stderr_describe(c->proc, out);
}

void orch_mcp_client_give_up(struct orch_mcp_client *c, const char *why)
{
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf tail = { 0 };
    orch_mcp_client_tail(c, &tail);
    orch_err_setc(&err, c->proc ? ORCH_CLASS_UPSTREAM : ORCH_CLASS_TIMEOUT, ETIMEDOUT, "%s: %s%s",
                  c->name, why, tail.n ? tail.p : "");
    orch_mcp_client_fail(c, &err);
}

/* ---- the client's life */

static char **copy_list(const char *const *list)
{
    size_t n = 0;
    while (list && list[n])
        n++;
    char **out = orch_xcalloc(n + 1, sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = orch_xstrdup(list[i]);
    return out;
}

static void free_list(const char *const *list)
{
    for (size_t i = 0; list && list[i]; i++)
        free((char *)(uintptr_t)list[i]);
    free((void *)(uintptr_t)list);
}

static void copy_opts(struct orch_mcp_client *c, const struct orch_mcp_client_opts *o)
{
    c->o = *o;
    c->o.name = c->name = orch_xstrdup(o->name);
    c->o.argv = (const char *const *)copy_list(o->argv);
    c->o.env = (const char *const *)copy_list(o->env);
    c->o.cwd = orch_xstrdup(o->cwd);
    c->o.url = orch_xstrdup(o->url);
    c->o.protocol = orch_xstrdup(o->protocol);
    c->o.info_name = orch_xstrdup(o->info_name ? o->info_name : "orch");
    /* No roots by default: a server that takes its folders from them would leave those of its
     * command line. */
    c->o.capabilities = orch_xstrdup(
        o->capabilities ? o->capabilities
        : o->asked      ? "{\"elicitation\":{\"form\":{},\"url\":{}},\"sampling\":{}}"
                        : "{}");
    c->headers = orch_xcalloc(o->n_headers + 1, sizeof *c->headers);
    for (size_t i = 0; i < o->n_headers; i++)
        c->headers[i] = (struct orch_http_header){
            { orch_xstrndup(o->headers[i].name.p, o->headers[i].name.n), o->headers[i].name.n },
            { orch_xstrndup(o->headers[i].value.p, o->headers[i].value.n), o->headers[i].value.n }
        };
    c->o.headers = c->headers;
    if (o->auth)
        c->auth = *o->auth;
    c->o.auth = o->auth ? &c->auth : NULL;
    if (!c->o.limits.bytes)
        c->o.limits.bytes = 16 << 20;
}

static void free_opts(struct orch_mcp_client *c)
{
    for (size_t i = 0; i < c->o.n_headers; i++) {
        free((char *)(uintptr_t)c->headers[i].name.p);
        free((char *)(uintptr_t)c->headers[i].value.p);
    }
    free(c->headers);
    free_list(c->o.argv);
    free_list(c->o.env);
    free((char *)(uintptr_t)c->o.cwd);
    free((char *)(uintptr_t)c->o.url);
    free((char *)(uintptr_t)c->o.protocol);
    free((char *)(uintptr_t)c->o.info_name);
    free((char *)(uintptr_t)c->o.capabilities);
    free(c->name);
}

static void destroy(struct orch_mcp_client *c)
{
    c->t->ops->free(c->t);
    if (c->rounds_posted)
        orch_loop_unpost(c->loop, orch_mcp_rounds_go, c);
    orch_loop_unpost(c->loop, orch_mcp_client_said, c);
    orch_timer_free(c->timer);
    orch_json_doc_free(&c->doc);
    orch_buf_free(&c->out);
    orch_buf_free(&c->meta);
    orch_buf_free(&c->server_info);
    orch_buf_free(&c->capabilities);
    orch_buf_free(&c->instructions);
    free(c->log_level);
    free_opts(c);
    free(c);
}

void orch_mcp_client_enter(struct orch_mcp_client *c)
{
    c->depth++;
}

void orch_mcp_client_leave(struct orch_mcp_client *c)
{
    if (--c->depth == 0 && c->freed)
        destroy(c);
}

struct orch_mcp_client *orch_mcp_client_new(struct orch_loop *l,
                                            const struct orch_mcp_client_opts *o,
                                            struct orch_err *err)
{
    struct orch_mcp_client *c = orch_xcalloc(1, sizeof *c);
    c->loop = l;
    TAILQ_INIT(&c->calls);
    copy_opts(c, o);
    c->timer = orch_timer_new(l, orch_mcp_era_timer, c);
    orch_buf_printf(&c->meta, "\"" ORCH_MCP_META "protocolVersion\":\"" ORCH_MCP_MODERN
                              "\",\"" ORCH_MCP_META "clientInfo\":{\"name\":");
    orch_json_quote(&c->meta, orch_slice_str(c->o.info_name));
    orch_buf_printf(&c->meta,
                    ",\"version\":\"" ORCH_VERSION "\"},\"" ORCH_MCP_META "clientCapabilities\":%s",
                    c->o.capabilities);
    c->t = o->url ? orch_mcp_http_new(c) : orch_mcp_child_new(c);
    if (c->t->ops->start(c->t, err) < 0) {
        c->dead = true;
        destroy(c);
        return NULL;
    }
    orch_mcp_era_begin(c);
    return c;
}

void orch_mcp_client_free(struct orch_mcp_client *c, int64_t eof_ms, int64_t term_ms)
{
    if (!c || c->freed)
        return;
    orch_mcp_client_enter(c);
    c->freed = true;
    struct orch_mcp_client_call *k;
    while ((k = TAILQ_FIRST(&c->calls)))
        orch_mcp_client_drop(k);
    c->probe = c->opening = c->listening = NULL;
    orch_timer_cancel(c->timer);
    if (!c->dead)
        c->t->ops->end(c->t, eof_ms, term_ms);
    c->dead = true;
    orch_mcp_client_leave(c);
}

void orch_mcp_client_goodbye(struct orch_mcp_client *c, orch_loop_fn *said, void *ud)
{
    c->said = said;
    c->said_ud = ud;
    if (c->dead || !c->o.url)
        orch_loop_post(c->loop, orch_mcp_client_said, c);
    else
        c->t->ops->goodbye(c->t);
}

void orch_mcp_client_said(void *ud)
{
    struct orch_mcp_client *c = ud;
    orch_loop_fn *said = c->said;
    c->said = NULL;
    if (!said)
        return;
    orch_mcp_client_enter(c);
    said(c->said_ud);
    orch_mcp_client_leave(c);
}

bool orch_mcp_client_alive(const struct orch_mcp_client *c)
{
    return !c->dead;
}

bool orch_mcp_client_ready(const struct orch_mcp_client *c)
{
    return c->ready;
}

const char *orch_mcp_client_opening(const struct orch_mcp_client *c)
{
    bool only = c->o.url || (c->o.protocol && strcmp(c->o.protocol, ORCH_MCP_MODERN) == 0) ||
                c->fell_back;
    return c->state == ORCH_MCP_PROBING && only ? "server/discover" : "initialize";
}

struct orch_slice orch_mcp_client_stderr_line(const struct orch_mcp_client *c)
{
    return c->proc ? orch_proc_stderr_line(c->proc) : NOTHING;
}

struct orch_mcp_about orch_mcp_client_about(const struct orch_mcp_client *c)
{
    return (struct orch_mcp_about){ .modern = c->modern,
                                    .version = c->version,
                                    .server_info = { c->server_info.p, c->server_info.n },
                                    .capabilities = { c->capabilities.p, c->capabilities.n },
                                    .instructions = { c->instructions.p, c->instructions.n } };
}

struct orch_slice orch_mcp_client_error(const struct orch_mcp_client *c)
{
    return c->error ? orch_json_raw(&c->doc, c->error) : NOTHING;
}

void orch_mcp_client_log_level(struct orch_mcp_client *c, const char *level)
{
    free(c->log_level);
    c->log_level = orch_xstrdup(level);
}

const char *orch_mcp_client_tool_problem(const struct orch_mcp_client *c, const char *name)
{
    return c->o.url && c->modern ? orch_mcp_http_tool_problem(c->t, name) : NULL;
}
