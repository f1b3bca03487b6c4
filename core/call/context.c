/* What a tool's ctx reaches of its call. */
#include "call_int.h"

#include "../base/log.h"
#include "../mcp/stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    REFUSED_MAX = 20
}; /* connections of one call that the audit log names; the last says that it is */

struct orch_call *orch_call_live(struct orch_calls *cs, uint32_t slot, uint32_t serial)
{
    struct orch_call *c = orch_call_find(cs, slot, serial);
    return c && !c->finished ? c : NULL;
}

struct orch_call_time orch_call_time(const struct orch_call *c)
{
    int64_t now_us = c->holds ? c->held_since_us : orch_now_us();
    return (struct orch_call_time){ (c->deadline_us - now_us) / 1000, c->time_ms, c->limit };
}

/* What goes to the client before the result is redacted as the result is; false: nothing may go. */
static bool redact_message(const struct orch_call *c, struct orch_slice message,
                           struct orch_buf *out)
{
    orch_buf_reserve(out, message.n);
    orch_buf_slice(out, message);
    return !c->n_redact || orch_redact_text(c->gen, c->redact, c->n_redact, out) >= 0;
}

void orch_call_progress(struct orch_call *c, double done, double total, struct orch_slice message)
{
    cleanup_buf struct orch_buf text = { 0 };
    if (!c->rq || !isfinite(done))
        return;
    if (!redact_message(c, message, &text))
        text.n = 0;
    orch_mcp_progress(c->rq, done, isfinite(total) ? total : -1,
                      (struct orch_slice){ text.p, text.n });
}

static const char *call_name(const struct orch_call *c)
{
    return c->tool ? c->tool->name : c->method;
}

void orch_call_log(struct orch_call *c, const char *level, struct orch_slice message)
{
    cleanup_buf struct orch_buf text = { 0 };
    cleanup_buf struct orch_buf json = { 0 };
    if (!redact_message(c, message, &text))
        return;
    orch_json_quote(&json, (struct orch_slice){ text.p, text.n });
    if (c->rq)
        orch_mcp_log(c->rq, level, orch_slice_str(call_name(c)),
                     (struct orch_slice){ json.p, json.n });
    orch_log(ORCH_INFO, "%s: %s: %.*s", call_name(c), level, (int)text.n, text.p);
}

const char *orch_call_network(const struct orch_call *c)
{
    return c->network ? c->network : "none";
}

static void audit_refused(struct orch_call *c, const char *dst, unsigned port, const char *rule)
{
    cleanup_buf struct orch_buf f = { 0 };
    if (++c->refused > REFUSED_MAX)
        return;
    orch_buf_printf(&f, "\"call\":\"%s\",%s\"rule\":", c->id,
                    c->refused == REFUSED_MAX ? "\"last\":true," : "");
    orch_json_quote(&f, orch_slice_str(rule));
    orch_buf_printf(&f, ",\"dst\":\"%s\",\"proto\":\"tcp\",\"port\":%u", dst, port);
    orch_audit_note(c->calls->audit, "net_deny", (struct orch_slice){ f.p, f.n });
}

/* By the policies in force now, as a microVM started now would be. */
bool orch_call_may_connect(struct orch_call *c, const struct sockaddr *to, struct orch_err *err)
{
    const struct sockaddr_in *in = (const void *)to;
    char rule[128] = "not an IPv4 address", dst[INET_ADDRSTRLEN] = "?";
    bool allowed = false;
    unsigned port = 0;
    if (to->sa_family == AF_INET) {
        inet_ntop(AF_INET, &in->sin_addr, dst, sizeof dst);
        port = ntohs(in->sin_port);
        if (strcmp(orch_call_network(c), "none") == 0)
            snprintf(rule, sizeof rule, "the rule that allows this call names no network");
        else if (orch_generation_explain_packet(c->calls->current->gen, c->network,
                                                ntohl(in->sin_addr.s_addr), IPPROTO_TCP,
                                                (uint16_t)port, &allowed, rule, sizeof rule,
                                                err) < 0)
            return false;
    }
    if (allowed)
        return true;
    audit_refused(c, dst, port, rule);
    orch_err_setc(err, ORCH_CLASS_DENIED, EACCES, "network %s: %s port %u: %s",
                  orch_call_network(c), dst, port, rule);
    return false;
}

void orch_call_let_go(struct orch_call *c, int64_t retry_ms)
{
    void *stream = c->rq ? orch_mcp_request_stream(c->rq) : NULL;
    if (stream)
        orch_mcp_stream_release(stream, retry_ms);
}
