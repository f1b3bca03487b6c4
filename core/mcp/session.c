#include "session_int.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

const char *const orch_mcp_log_levels[ORCH_MCP_LOG_LEVELS] = { "debug",   "info",     "notice",
                                                               "warning", "error",    "critical",
                                                               "alert",   "emergency" };

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

void orch_mcp_request_drop(struct orch_mcp_request *rq);

void orch_mcp_session_end(struct orch_mcp_session *s)
{
    s->ended = true;
    for (struct orch_mcp_request *rq = s->first, *next; rq; rq = next) {
        next = rq->next;
        if (rq->held) {
            orch_mcp_request_drop(rq);
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
int orch_mcp_status_of(int code, bool modern)
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

struct orch_mcp_request *orch_mcp_request_find(struct orch_mcp_session *s, struct orch_slice id)
{
    /* Ids mostly differ in their last byte; no id is empty. */
    for (struct orch_mcp_request *rq = s->first; rq; rq = rq->next)
        if (rq->id_n == id.n && rq->id[id.n - 1] == id.p[id.n - 1] &&
            memcmp(rq->id, id.p, id.n) == 0)
            return rq;
    return NULL;
}

/* An answer goes to the session's output or into its batch. Returns where it starts. */
size_t orch_mcp_answer_begin(struct orch_mcp_session *s, struct orch_mcp_batch *batch,
                             struct orch_buf **out)
{
    s->answers = true;
    *out = batch ? &batch->out : &s->out;
    if (batch)
        orch_buf_char(&batch->out, batch->out.n ? ',' : '[');
    return s->out.n;
}

void orch_mcp_batch_flush(struct orch_mcp_session *s, struct orch_mcp_batch *batch)
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

void orch_mcp_request_drop(struct orch_mcp_request *rq)
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
        orch_mcp_batch_flush(s, rq->batch);
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

void orch_mcp_put_result(struct orch_buf *out, struct orch_slice id, const char *type,
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
        size_t from = orch_mcp_answer_begin(s, rq->batch, &out);
        rq->answered = true;
        orch_mcp_put_result(out, id_of(rq), rq->modern ? type : NULL, members);
        if (!rq->batch)
            orch_mcp_message_end(s, from, rq->stream, 200);
    }
    orch_mcp_request_drop(rq);
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
        size_t from = orch_mcp_answer_begin(s, rq->batch, &out);
        rq->answered = true;
        orch_rpc_error(out, id_of(rq), code, text, data);
        if (!rq->batch)
            orch_mcp_message_end(s, from, rq->stream, orch_mcp_status_of(code, rq->modern));
    }
    orch_mcp_request_drop(rq);
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

int orch_mcp_level(struct orch_slice name)
{
    for (size_t i = 0; i < ORCH_MCP_LOG_LEVELS; i++)
        if (orch_slice_eq(name, orch_mcp_log_levels[i]))
            return (int)i;
    return -1;
}

void orch_mcp_log(struct orch_mcp_request *rq, const char *level, struct orch_slice logger,
                  struct orch_slice data)
{
    struct orch_mcp_session *s = rq->session;
    int least = rq->modern ? rq->log_level : s->log_level;
    if (rq->cancelled || s->out.n > ORCH_MCP_NOTES_MAX_BYTES || least < 0 ||
        orch_mcp_level(orch_slice_str(level)) < least)
        return;
    size_t from = orch_mcp_note_begin(s, "notifications/message");
    orch_buf_printf(&s->out, "\"level\":\"%s\",\"logger\":", level);
    orch_json_quote(&s->out, logger);
    orch_buf_str(&s->out, ",\"data\":");
    orch_buf_slice(&s->out, data);
    orch_mcp_note_end(s, from, rq->stream);
}
