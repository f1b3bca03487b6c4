#include "rpc.h"

#include <errno.h>

const char *const orch_rpc_legacy[] = { ORCH_MCP_LEGACY, "2025-06-18", "2025-03-26", "2024-11-05",
                                        NULL };

const char *orch_rpc_legacy_version(struct orch_slice s)
{
    const char *const *v = orch_rpc_legacy;
    while (*v && !orch_slice_eq(s, *v))
        v++;
    return *v;
}

static bool read_id(const struct orch_json_doc *d, uint32_t tok, struct orch_slice *id)
{
    const struct orch_json_tok *t = &d->toks[tok];
    if (t->type != ORCH_JSON_STRING &&
        !(t->type == ORCH_JSON_NUMBER && (t->flags & ORCH_JSON_INTEGER)))
        return false;
    *id = orch_json_raw(d, tok);
    return true;
}

int orch_rpc_read(const struct orch_json_doc *d, uint32_t tok, struct orch_rpc_msg *m,
                  const char **why)
{
    *m = (struct orch_rpc_msg){ 0 };
    if (d->toks[tok].type != ORCH_JSON_OBJECT) {
        *why = "a message must be an object";
        return -EINVAL;
    }
    uint32_t version = 0, id = 0;
    uint32_t k = tok + 1;
    for (uint32_t i = 0; i < d->toks[tok].count; i++) {
        uint32_t v = k + 1;
        struct orch_slice key = { d->text + d->toks[k].start, d->toks[k].end - d->toks[k].start };
        if (orch_slice_eq(key, "id"))
            id = v;
        else if (orch_slice_eq(key, "method"))
            m->method = v;
        else if (orch_slice_eq(key, "params"))
            m->params = v;
        else if (orch_slice_eq(key, "jsonrpc"))
            version = v;
        else if (orch_slice_eq(key, "result"))
            m->result = v;
        else if (orch_slice_eq(key, "error"))
            m->error = v;
        k = d->toks[v].next;
    }
    bool id_ok = !id || read_id(d, id, &m->id);
    if (!version || !orch_json_string_eq(d, version, "2.0"))
        *why = "\"jsonrpc\" must be \"2.0\"";
    else if (!id_ok)
        *why = "\"id\" must be a string or an integer";
    else if (m->method && d->toks[m->method].type != ORCH_JSON_STRING)
        *why = "\"method\" must be a string";
    else if (m->method && (m->result || m->error))
        *why = "a message has either \"method\" or \"result\" or \"error\"";
    else if (m->method && m->params && d->toks[m->params].type != ORCH_JSON_OBJECT)
        *why = "\"params\" must be an object";
    else if (!m->method && !m->result == !m->error)
        *why = "\"method\" is missing";
    else if (!m->method && !id)
        *why = "a response needs an \"id\"";
    else {
        m->kind = !m->method ? ORCH_RPC_RESPONSE : id ? ORCH_RPC_REQUEST : ORCH_RPC_NOTIFICATION;
        return 0;
    }
    return -EINVAL;
}

void orch_rpc_result_head(struct orch_buf *out, struct orch_slice id)
{
    orch_buf_slice(out, ORCH_SLICE("{\"jsonrpc\":\"2.0\",\"id\":"));
    orch_buf_slice(out, id);
    orch_buf_slice(out, ORCH_SLICE(",\"result\":"));
}

void orch_rpc_error(struct orch_buf *out, struct orch_slice id, int code, struct orch_slice text,
                    struct orch_slice data)
{
    orch_buf_slice(out, ORCH_SLICE("{\"jsonrpc\":\"2.0\",\"id\":"));
    orch_buf_slice(out, id.n ? id : ORCH_SLICE("null"));
    orch_buf_printf(out, ",\"error\":{\"code\":%d,\"message\":", code);
    orch_json_quote(out, text);
    if (data.n) {
        orch_buf_slice(out, ORCH_SLICE(",\"data\":"));
        orch_buf_slice(out, data);
    }
    orch_buf_slice(out, ORCH_SLICE("}}"));
}
