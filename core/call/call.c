#include "call_int.h"

#include <errno.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

enum {
    KEPT_BYTES = 64 * 1024, /* of a record's buffers, for the next call */
    /* After the end of a call's time, while parts of it end by themselves: a command in a microVM
     * was ended by its guest, which takes up to 2 s, and its output is worth an answer; then they
     * are ended, then the call. */
    LATE_GRACE_MS = 6000,
    END_GRACE_MS = 4000,
};

/* ---- lists, records, parts */

void orch_call_list_push(struct orch_call **list, struct orch_call *c)
{
    c->prev = NULL;
    c->next = *list;
    if (*list)
        (*list)->prev = c;
    *list = c;
}

static void list_remove(struct orch_call **list, struct orch_call *c)
{
    if (c->prev)
        c->prev->next = c->next;
    else
        *list = c->next;
    if (c->next)
        c->next->prev = c->prev;
    c->next = c->prev = NULL;
}

struct orch_call *orch_call_list_take(struct orch_call **list)
{
    struct orch_call *in_order = NULL;
    while (*list) {
        struct orch_call *c = *list;
        *list = c->next;
        c->prev = NULL;
        c->next = in_order;
        in_order = c;
    }
    return in_order;
}

static struct orch_call *new_record(struct orch_calls *cs)
{
    struct orch_call *c = cs->spare;
    if (c) {
        cs->spare = c->next;
        return c;
    }
    c = orch_xcalloc(1, sizeof *c);
    cs->slots = orch_xrealloc(cs->slots, (cs->n_slots + 1) * sizeof(struct orch_call *));
    cs->slots[cs->n_slots] = c;
    c->slot = (uint32_t)cs->n_slots++;
    return c;
}

struct orch_call *orch_call_new(struct orch_session *s)
{
    struct orch_calls *cs = s->calls;
    struct orch_call *c = new_record(cs);
    *c = (struct orch_call){ .calls = cs,
                             .session = s,
                             .slot = c->slot,
                             .serial = c->serial + 1,
                             .args_ref = LUA_NOREF,
                             .args = c->args,
                             .text = c->text,
                             .meta = c->meta,
                             .timer = c->timer };
    s->refs++;
    c->args.n = c->text.n = c->meta.n = 0;
    c->gen = orch_generation_ref(cs->current->gen);
    c->begun_us = orch_now_us();
    snprintf(c->id, sizeof c->id, "%s-%llu", cs->prefix, (unsigned long long)++cs->next_call);
    return c;
}

static void keep_little(struct orch_buf *b)
{
    if (b->cap > KEPT_BYTES)
        orch_buf_free(b);
}

void orch_call_free(struct orch_call *c)
{
    if (c->args_ref != LUA_NOREF)
        luaL_unref(orch_state_lua(c->tool->state), LUA_REGISTRYINDEX, c->args_ref);
    if (c->timer)
        orch_timer_cancel(c->timer);
    while (c->parts) {
        struct orch_call_part *p = c->parts;
        c->parts = p->next;
        p->ops->free(p);
    }
    orch_generation_unref(c->gen);
    orch_session_unref(c->session);
    free(c->redact);
    free(c->network);
    orch_buf_free(&c->rpc_data);
    keep_little(&c->meta);
    keep_little(&c->args);
    keep_little(&c->text);
    c->serial++; /* a ctx that is still held finds nothing */
    c->gen = NULL;
    if (!c->owed)
        orch_call_list_push(&c->calls->spare, c);
}

void orch_call_release(struct orch_call *c)
{
    if (c->owed && !c->gen)
        orch_call_list_push(&c->calls->spare, c);
    c->owed = false;
}

struct orch_call *orch_call_find(struct orch_calls *cs, uint32_t slot, uint32_t serial)
{
    struct orch_call *c = slot < cs->n_slots ? cs->slots[slot] : NULL;
    return c && c->gen && c->serial == serial ? c : NULL;
}

void orch_call_add_part(struct orch_call *c, struct orch_call_part *p)
{
    p->next = c->parts;
    c->parts = p;
}

struct orch_call_part *orch_call_part(const struct orch_call *c,
                                      const struct orch_call_part_ops *ops)
{
    struct orch_call_part *p = c->parts;
    while (p && p->ops != ops)
        p = p->next;
    return p;
}

void orch_call_of_request(struct orch_call *c, struct orch_mcp_request *rq)
{
    c->rq = rq;
    c->modern = orch_mcp_request_modern(rq);
    c->server_info = orch_mcp_request_server_info(rq);
    c->caps = orch_mcp_request_caps(rq);
    orch_mcp_request_set_host(rq, c);
}

/* ---- its time */

static void time_over(void *ud);

void orch_call_clock(struct orch_call *c, int64_t ms, const char *limit)
{
    c->deadline_us = orch_now_us() + ms * 1000;
    c->time_ms = ms;
    c->limit = limit;
}

void orch_call_clock_again(struct orch_call *c)
{
    c->deadline_us = (c->holds ? c->held_since_us : orch_now_us()) + c->time_ms * 1000;
    orch_call_arm(c);
}

void orch_call_arm(struct orch_call *c)
{
    if (c->finished || c->holds)
        return;
    if (!c->timer)
        c->timer = orch_timer_new(c->calls->loop, time_over, c);
    int64_t left = c->deadline_us / 1000 + c->grace_ms - orch_now_us() / 1000;
    orch_timer_set(c->timer, left > 0 ? left : 0);
}

void orch_call_hold(struct orch_call *c, bool on)
{
    if (on && c->holds++ == 0) {
        c->held_since_us = orch_now_us();
        if (c->timer)
            orch_timer_cancel(c->timer);
    } else if (!on && --c->holds == 0) {
        c->deadline_us += orch_now_us() - c->held_since_us;
        orch_call_arm(c);
    }
}

/* Ends what runs; the call's end follows now, or from what ends. */
static void stop(struct orch_call *c, enum orch_class cls, const char *why)
{
    if (!c->backend || c->backend->stop(c, cls, why))
        return;
    orch_call_fail_text(c, cls == ORCH_CLASS_CANCELLED ? "cancelled" : "failed",
                        orch_slice_str(why));
    orch_call_end(c);
}

static bool parts_late(struct orch_call *c, bool now)
{
    bool some = false;
    for (struct orch_call_part *p = c->parts, *next; p; p = next) {
        next = p->next;
        some = (p->ops->late && p->ops->late(p, c, now)) || some;
    }
    return some;
}

static void time_over(void *ud)
{
    struct orch_call *c = ud;
    if (c->finished || c->holds) /* by an event of the same turn */
        return;
    if (c->grace_ms > LATE_GRACE_MS || (!c->grace_ms && !parts_late(c, false))) {
        const char *what = c->backend ? c->backend->unfinished : "not done";
        cleanup_free char *why = orch_xasprintf("%s within %g s (%s)", what,
                                                (double)c->time_ms / 1000, c->limit);
        c->timed_out = true;
        stop(c, ORCH_CLASS_TIMEOUT, why);
        return;
    }
    if (c->grace_ms) {
        parts_late(c, true);
        c->grace_ms += END_GRACE_MS;
    } else {
        c->grace_ms = LATE_GRACE_MS;
    }
    orch_call_arm(c);
}

/* ---- its end */

void orch_calls_want(struct orch_calls *cs)
{
    if (cs->run_posted || cs->in_run)
        return;
    cs->run_posted = true;
    orch_loop_post(cs->loop, cs->run_later, cs);
}

void orch_call_running(struct orch_call *c)
{
    orch_call_list_push(&c->calls->running, c);
}

void orch_call_finish(struct orch_call *c)
{
    c->finished = true;
    if (c->timer)
        orch_timer_cancel(c->timer);
    for (struct orch_call_part *p = c->parts, *next; p; p = next) {
        next = p->next;
        if (p->ops->end)
            p->ops->end(p, c);
    }
    orch_call_list_push(&c->calls->ended, c);
    orch_calls_want(c->calls);
}

void orch_call_end(struct orch_call *c)
{
    list_remove(&c->calls->running, c);
    orch_call_finish(c);
}

void orch_call_cancel(struct orch_call *c, const char *why)
{
    if (c->cancelled || c->finished)
        return;
    c->cancelled = true;
    stop(c, ORCH_CLASS_CANCELLED, why);
}

void orch_call_cancel_mcp(struct orch_mcp_request *rq)
{
    struct orch_call *c = orch_mcp_request_host(rq);
    if (c->finished)
        c->cancelled = true;
    orch_call_cancel(c, "the client cancelled the call");
}

void orch_call_detach_mcp(struct orch_mcp_request *rq)
{
    struct orch_call *c = orch_mcp_request_host(rq);
    c->rq = NULL;
}

static void cancel_list(struct orch_call *list, const struct orch_session *s, const char *why)
{
    for (struct orch_call *c = list, *next; c; c = next) {
        next = c->next;
        if (c->session == s)
            orch_call_cancel(c, why);
    }
}

void orch_calls_cancel(struct orch_session *s, const char *why)
{
    cancel_list(s->calls->begun, s, why);
    cancel_list(s->calls->running, s, why);
}
