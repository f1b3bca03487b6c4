/* Whatever a client sends: the session stays within its memory, and each request is answered,
 * cancelled or detached exactly once. The first byte chooses what the host does, the rest is
 * lines. */
#include "mcp/session.h"

#include <errno.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { HELD = 64 };

struct host {
    struct orch_mcp_session *s;
    struct orch_mcp_request *held[HELD];
    unsigned n, questions, replies;
    uint8_t choice;
    bool sunk;
};

static int tools_list(void *ud, struct orch_slice cursor, struct orch_buf *out,
                      struct orch_buf *next, struct orch_err *err)
{
    (void)ud;
    if (cursor.n > 3)
        return orch_err_set(err, EINVAL, "no such cursor");
    orch_buf_str(out, "[]");
    orch_buf_str(next, cursor.n ? "" : "n");
    return 0;
}

static void on_reply(void *ud, const struct orch_json_doc *d, uint32_t result, uint32_t error)
{
    struct host *h = ud;
    if (!result == !error || ++h->replies > h->questions)
        abort();
    orch_json_raw(d, result ? result : error);
}

static void forget(struct host *h, struct orch_mcp_request *rq)
{
    unsigned i = 0;
    while (i < h->n && h->held[i] != rq)
        i++;
    if (i == h->n)
        abort(); /* not ours, or ours no more */
    h->held[i] = h->held[--h->n];
}

static void take(struct host *h, struct orch_mcp_request *rq)
{
    if (h->n == HELD)
        abort(); /* over max_calls */
    h->held[h->n++] = rq;
    orch_mcp_progress(rq, 1, 2, ORCH_SLICE("m"));
    orch_mcp_log(rq, "error", ORCH_SLICE("l"), ORCH_SLICE("{}"));
    if (h->choice & 1 && !orch_mcp_request_modern(rq) &&
        orch_mcp_ask(rq, "roots/list", ORCH_SLICE("{}"), on_reply, h))
        h->questions++;
    if (h->choice & 2) {
        forget(h, rq);
        if (h->choice & 4)
            orch_mcp_respond_typed(rq, "input_required", ORCH_SLICE("\"requestState\":\"x\""));
        else
            orch_mcp_respond_error(rq, -1, ORCH_SLICE("no"), (struct orch_slice){ 0 });
    }
}

static void tool_call(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                      const struct orch_mcp_params *p)
{
    if (p->args && d->toks[p->args].type != ORCH_JSON_OBJECT)
        abort();
    take(ud, rq);
}

static void request(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                    const char *method, const struct orch_mcp_params *p)
{
    (void)method;
    if ((p->inputs && d->toks[p->inputs].type != ORCH_JSON_OBJECT) ||
        (p->state && d->toks[p->state].type != ORCH_JSON_STRING))
        abort();
    take(ud, rq);
}

static void cancel(void *ud, struct orch_mcp_request *rq)
{
    struct host *h = ud;
    if (h->choice & 8)
        return; /* it goes on for a while */
    forget(h, rq);
    orch_mcp_request_drop(rq);
}

static void detach(void *ud, struct orch_mcp_request *rq)
{
    forget(ud, rq);
}

static void send_message(void *ud, void *stream, struct orch_slice message, int status)
{
    struct host *h = ud;
    (void)stream;
    if ((!message.n && status != 202) || (message.n && message.p[message.n - 1] == '\n') ||
        status < 0 || status > 500)
        abort();
    h->sunk = true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct orch_mcp_server_ops ops = {
        .tools_list = tools_list,
        .tool_call = tool_call,
        .request = request,
        .cancel = cancel,
        .detach = detach,
        .server_info = "{\"name\":\"f\",\"version\":\"1\"}",
        .features = 15,
        .max_calls = HELD
    };
    if (!size)
        return 0;
    struct host h = { .choice = data[0] };
    h.s = orch_mcp_session_new(&ops, &h,
                               &(struct orch_json_limits){ .bytes = 1 << 16, .depth = 16 });
    if (h.choice & 16)
        orch_mcp_session_sink(h.s, send_message, NULL, &h);
    const char *p = (const char *)data + 1, *end = (const char *)data + size;
    while (p < end) {
        const char *nl = memchr(p, '\n', (size_t)(end - p));
        size_t n = (size_t)((nl ? nl : end) - p);
        orch_mcp_session_feed(h.s, (struct orch_slice){ p, n }, h.choice & 16 ? &h : NULL);
        orch_mcp_session_changed(h.s, ORCH_MCP_TOOLS_CHANGED);
        orch_mcp_session_resource_updated(h.s, ORCH_SLICE("u"));
        p += n + 1;
    }
    struct orch_buf *out = orch_mcp_session_out(h.s);
    if (!(h.choice & 16) && out->n && out->p[out->n - 1] != '\n')
        abort();
    if (h.choice & 32) {
        while (h.n) {
            struct orch_mcp_request *rq = h.held[h.n - 1];
            forget(&h, rq);
            orch_mcp_respond(rq, ORCH_SLICE("\"x\":1"));
        }
    }
    orch_mcp_session_free(h.s);
    if (h.n)
        abort();
    return 0;
}
