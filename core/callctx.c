/* What a tool's ctx reaches of its call: orch_env_call_ops. */
#include "call.h"

#include "mcp/stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { REFUSED_MAX = 20 }; /* connections of one call that the audit log names; the last says that it is */

struct orch_toolcall *orch_call_find(struct orch *o, uint32_t slot, uint32_t serial)
{
    struct orch_toolcall *c = slot < o->n_slots ? o->slots[slot] : NULL;
    return c && c->gen && c->serial == serial ? c : NULL;
}

/* One that has its answer is over, also while that is kept for a client to come back. */
static struct orch_toolcall *call_get(void *ud, uint32_t slot, uint32_t serial)
{
    struct orch_toolcall *c = orch_call_find(ud, slot, serial);
    return c && !c->finished ? c : NULL;
}

/* What goes to the client before the result is redacted as the result is; false: nothing may go. */
static bool redact_message(const struct orch_toolcall *c, struct orch_slice message, struct orch_buf *out)
{
    orch_buf_reserve(out, message.n);
    orch_buf_slice(out, message);
    return !c->n_redact || orch_redact_text(c->gen, c->redact, c->n_redact, out) >= 0;
}

static void ctx_progress(struct orch_toolcall *c, double done, double total, struct orch_slice message)
{
    cleanup_buf struct orch_buf text = { 0 };
    if (!c->rq || !isfinite(done))
        return;
    if (!redact_message(c, message, &text))
        text.n = 0;
    orch_mcp_progress(c->rq, done, isfinite(total) ? total : -1, (struct orch_slice){ text.p, text.n });
}

static const char *call_name(const struct orch_toolcall *c)
{
    return c->tool ? c->tool->name : c->method;
}

static void ctx_log(struct orch_toolcall *c, const char *level, struct orch_slice message)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf json = { 0 };
    if (!redact_message(c, message, &text))
        return;
    orch_json_quote(&json, (struct orch_slice){ text.p, text.n });
    if (c->rq)
        orch_mcp_log(c->rq, level, orch_slice_str(call_name(c)), (struct orch_slice){ json.p, json.n });
    orch_log(ORCH_INFO, "%s: %s: %.*s", call_name(c), level, (int)text.n, text.p);
}

static bool ctx_cancelled(const struct orch_toolcall *c)
{
    return c->cancelled;
}

static const char *ctx_id(const struct orch_toolcall *c)
{
    return c->id;
}

static const char *ctx_session(const struct orch_toolcall *c)
{
    return c->session->id;
}

static const char *ctx_workspace(const struct orch_toolcall *c)
{
    return c->gen->cfg.workspace;
}

static const char *ctx_network(const struct orch_toolcall *c)
{
    return c->network ? c->network : "none";
}

static void audit_refused(struct orch_toolcall *c, const char *dst, unsigned port, const char *rule)
{
    cleanup_buf struct orch_buf f = { 0 };
    if (++c->refused > REFUSED_MAX)
        return;
    orch_buf_printf(&f, "\"call\":\"%s\",%s\"rule\":", c->id, c->refused == REFUSED_MAX ? "\"last\":true," : "");
    orch_json_quote(&f, orch_slice_str(rule));
    orch_buf_printf(&f, ",\"dst\":\"%s\",\"proto\":\"tcp\",\"port\":%u", dst, port);
    orch_host_event(c->o, "net_deny", (struct orch_slice){ f.p, f.n });
}

/* By the policies in force now, as a microVM started now would be. */
static bool ctx_may_connect(struct orch_toolcall *c, const struct sockaddr *to, struct orch_err *err)
{
    const struct sockaddr_in *in = (const void *)to;
    char rule[128] = "not an IPv4 address", dst[INET_ADDRSTRLEN] = "?";
    bool allowed = false;
    unsigned port = 0;
    if (to->sa_family == AF_INET) {
        inet_ntop(AF_INET, &in->sin_addr, dst, sizeof dst);
        port = ntohs(in->sin_port);
        if (strcmp(ctx_network(c), "none") == 0)
            snprintf(rule, sizeof rule, "the rule that allows this call names no network");
        else if (orch_generation_explain_packet(c->o->gen, c->network, ntohl(in->sin_addr.s_addr), IPPROTO_TCP, (uint16_t)port, &allowed, rule,
                                                sizeof rule, err) < 0)
            return false;
    }
    if (allowed)
        return true;
    audit_refused(c, dst, port, rule);
    orch_err_setc(err, ORCH_CLASS_DENIED, EACCES, "network %s: %s port %u: %s", ctx_network(c), dst, port, rule);
    return false;
}

static struct orch_http_stream **ctx_streams(struct orch_toolcall *c)
{
    return &c->streams;
}

static struct orch_call_time ctx_time(const struct orch_toolcall *c)
{
    int64_t now = c->holds ? c->held_since_us : orch_now_us();
    return (struct orch_call_time){ (c->deadline_us - now) / 1000, c->time_ms, c->limit };
}

static struct orch_vm_handle **ctx_vms(struct orch_toolcall *c)
{
    return &c->vms;
}

static void ctx_ran(struct orch_toolcall *c, const struct orch_vm *vm)
{
    c->isolation = orch_vm_isolation(vm);
    snprintf(c->vm_id, sizeof c->vm_id, "%s", orch_vm_id(vm));
}

static bool ctx_modern(const struct orch_toolcall *c)
{
    return c->modern;
}

static unsigned ctx_next_key(struct orch_toolcall *c)
{
    return ++c->keys;
}

static void ctx_release(struct orch_toolcall *c, int64_t retry_ms)
{
    void *stream = c->rq ? orch_mcp_request_stream(c->rq) : NULL;
    if (stream)
        orch_mcp_stream_release(stream, retry_ms);
}

static unsigned ctx_caps(const struct orch_toolcall *c)
{
    return c->caps;
}

const struct orch_env_call_ops orch_call_ops = {
    .get = call_get,
    .progress = ctx_progress,
    .log = ctx_log,
    .cancelled = ctx_cancelled,
    .id = ctx_id,
    .session = ctx_session,
    .workspace = ctx_workspace,
    .network = ctx_network,
    .streams = ctx_streams,
    .may_connect = ctx_may_connect,
    .time = ctx_time,
    .hold = orch_call_hold,
    .vms = ctx_vms,
    .ran = ctx_ran,
    .task = orch_job_begin,
    .release = ctx_release,
    .caps = ctx_caps,
    .modern = ctx_modern,
    .next_key = ctx_next_key,
    .ask = orch_asking_start,
    .ask_free = orch_asking_free,
};
