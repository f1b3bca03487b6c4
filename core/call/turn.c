/* The turns of all calls: decisions are written, then what may run runs; outcomes are written, then
 * what has one is answered. */
#include "call_int.h"

#include "../base/log.h"

#include <errno.h>
#include <stdio.h>

static void run_later(void *ud)
{
    struct orch_calls *cs = ud;
    cs->run_posted = false;
    orch_calls_run(cs);
}

static void run(struct orch_call *c)
{
    const struct orch_tool *t = c->tool;
    if (t->timeout_ms)
        orch_call_clock(c, t->timeout_ms, t->limit ? t->limit : "the tool's timeout");
    else
        orch_call_clock(c, c->gen->cfg.vm_timeout_ms, "vm.timeout");
    orch_call_running(c);
    c->backend = t->backend;
    c->backend->start(c);
}

/* What to do with the calls that were judged: run them, or end them at once. */
static void run_begun(struct orch_call *list, const struct orch_err *audit_error)
{
    for (struct orch_call *c = list, *next; c; c = next) {
        next = c->next;
        c->next = c->prev = NULL;
        if (audit_error) {
            c->decision = ORCH_DENY;
            c->reserved = false;
            c->rpc_code = 0;
            orch_call_fail_text(c, "not run", orch_slice_str(audit_error->msg));
        } else if (c->cancelled) {
            orch_call_fail_text(c, "cancelled", ORCH_SLICE("before it ran"));
        } else if (c->decision == ORCH_ALLOW && !c->rpc_code) {
            run(c);
            continue;
        }
        orch_call_finish(c);
    }
}

/* ---- answers */

static void answer_host(struct orch_call *c, struct orch_slice text)
{
    cleanup_buf struct orch_buf b = { 0 };
    if (!c->rpc_code) {
        c->done(c->done_ud, text, c->is_error);
        return;
    }
    orch_buf_str(&b, "\"content\":[{\"type\":\"text\",\"text\":");
    orch_json_quote(&b, text);
    orch_buf_str(&b, "}],\"isError\":true");
    c->done(c->done_ud, (struct orch_slice){ b.p, b.n }, true);
}

void orch_call_answer(struct orch_call *c)
{
    struct orch_slice text = { c->text.p, c->text.n };
    for (struct orch_call_part *p = c->parts, *next; p; p = next) {
        next = p->next;
        if (p->ops->answer && p->ops->answer(p, c))
            return;
    }
    if (c->rq && c->rpc_code) /* of one that the client cancelled nothing is sent */
        orch_mcp_respond_error(c->rq, c->rpc_code, text,
                               (struct orch_slice){ c->rpc_data.p, c->rpc_data.n });
    else if (c->rq)
        orch_mcp_respond(c->rq, text);
    if (c->done)
        answer_host(c, text);
    orch_call_free(c);
}

static void answer_ended(struct orch_calls *cs, struct orch_call *ended)
{
    struct orch_err err = { 0 };
    for (struct orch_call *c = ended; c; c = c->next) {
        orch_call_redact(c);
        if (c->reserved && orch_record_outcome(c, &err) < 0)
            orch_call_withhold(c, err.msg);
    }
    if (cs->audit && orch_audit_flush(cs->audit, &err) < 0) {
        orch_log(ORCH_ERROR, "%s", err.msg);
        for (struct orch_call *c = ended; c; c = c->next)
            if (c->reserved)
                orch_call_withhold(c,
                                   "the outcome could not be written to the audit log; the answer "
                                   "is withheld");
    }
    for (struct orch_call *c = ended, *next; c; c = next) {
        next = c->next;
        orch_call_answer(c);
    }
}

void orch_calls_run(struct orch_calls *cs)
{
    struct orch_err err = { 0 };
    if (cs->in_run)
        return;
    cs->in_run = true;
    if (cs->begun) {
        struct orch_call *begun = orch_call_list_take(&cs->begun);
        bool failed = cs->audit && orch_audit_flush(cs->audit, &err) < 0;
        if (failed)
            orch_log(ORCH_ERROR, "%s", err.msg);
        run_begun(begun, failed ? &err : NULL);
    }
    while (cs->ended)
        answer_ended(cs, orch_call_list_take(&cs->ended));
    cs->in_run = false;
    if (cs->begun) /* an answer's callback made another call */
        orch_calls_want(cs);
}

/* ---- all calls */

int orch_calls_init(struct orch_calls *cs, struct orch_err *err)
{
    uint8_t r[4];
    if (orch_random(r, sizeof r) < 0)
        return orch_err_set(err, EIO, "the kernel gives no random bytes");
    cs->run_later = run_later;
    snprintf(cs->prefix, sizeof cs->prefix, "c%02x%02x%02x%02x", r[0], r[1], r[2], r[3]);
    return 0;
}

void orch_calls_fini(struct orch_calls *cs)
{
    orch_loop_unpost(cs->loop, run_later, cs);
    orch_record_close(cs);
    for (size_t i = 0; i < cs->n_slots; i++) {
        struct orch_call *c = cs->slots[i];
        orch_buf_free(&c->args);
        orch_buf_free(&c->text);
        orch_buf_free(&c->meta);
        orch_timer_free(c->timer);
        free(c);
    }
    orch_buf_free(&cs->fields);
    orch_buf_free(&cs->canonical);
    orch_buf_free(&cs->redacted);
    orch_json_doc_free(&cs->recorded);
    free(cs->slots);
    cs->slots = NULL;
    cs->n_slots = 0;
}
