/* One tool call from request to answer: judge, audit the decision, run, audit the outcome, answer.
 * Calls are handled in batches: the decisions of all calls at hand are written with one write before
 * any of them runs, their outcomes with another before any of them is answered. */
#include "call.h"

#include "base/hash.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    ARGS_AUDIT_BYTES = 64 * 1024,
    NAME_AUDIT_BYTES = 256, /* of an unknown tool */
    REASON_AUDIT_BYTES = 4096,
    SPARE_CALLS = 256,
    /* After the end of a call's time, while it has microVMs: a command in one was ended by its guest, which
     * takes up to 2 s, and its output is worth an answer; then the microVMs end, then the call. */
    VM_GRACE_MS = 6000,
    END_GRACE_MS = 4000,
};

#define CALL_OVER "the call is over"

/* orch_answer's handle is the call itself. */
struct orch_tool_call {
    struct orch_toolcall call;
};

/* ---- lists and slots */

static void list_push(struct orch_toolcall **list, struct orch_toolcall *c)
{
    c->prev = NULL;
    c->next = *list;
    if (*list)
        (*list)->prev = c;
    *list = c;
}

static void list_remove(struct orch_toolcall **list, struct orch_toolcall *c)
{
    if (c->prev)
        c->prev->next = c->next;
    else
        *list = c->next;
    if (c->next)
        c->next->prev = c->prev;
    c->next = c->prev = NULL;
}

/* Takes a whole list in the order its elements were pushed. */
static struct orch_toolcall *list_take(struct orch_toolcall **list)
{
    struct orch_toolcall *in_order = NULL;
    while (*list) {
        struct orch_toolcall *c = *list;
        *list = c->next;
        c->prev = NULL;
        c->next = in_order;
        in_order = c;
    }
    return in_order;
}

struct orch_toolcall *orch_call_new(struct orch *o, struct orch_session *s)
{
    struct orch_toolcall *c = o->spare;
    if (c) {
        o->spare = c->next;
    } else {
        c = orch_xcalloc(1, sizeof *c);
        o->slots = orch_xrealloc(o->slots, (o->n_slots + 1) * sizeof(struct orch_toolcall *));
        o->slots[o->n_slots] = c;
        c->slot = (uint32_t)o->n_slots++;
    }
    *c = (struct orch_toolcall){ .o = o, .session = s, .slot = c->slot, .serial = c->serial + 1, .args_ref = LUA_NOREF,
                                 .args = c->args, .text = c->text, .meta = c->meta, .timer = c->timer };
    s->refs++;
    c->args.n = c->text.n = c->meta.n = 0;
    c->gen = orch_generation_ref(o->gen);
    c->begun_us = orch_now_us();
    snprintf(c->id, sizeof c->id, "%s-%llu", o->call_prefix, (unsigned long long)++o->next_call);
    return c;
}

void orch_call_free(struct orch_toolcall *c)
{
    struct orch *o = c->o;
    if (c->args_ref != LUA_NOREF)
        luaL_unref(orch_state_lua(c->tool->state), LUA_REGISTRYINDEX, c->args_ref);
    if (c->timer)
        orch_timer_cancel(c->timer);
    orch_vm_handles_close(&c->vms, CALL_OVER);
    orch_http_streams_close(&c->streams);
    orch_generation_unref(c->gen);
    orch_session_unref(c->session);
    free(c->redact);
    free(c->network);
    orch_buf_free(&c->rpc_data);
    orch_buf_free(&c->inputs);
    free(c->digest);
    if (c->meta.cap > 64 * 1024)
        orch_buf_free(&c->meta);
    if (c->args.cap > 64 * 1024)
        orch_buf_free(&c->args);
    if (c->text.cap > 64 * 1024)
        orch_buf_free(&c->text);
    c->serial++; /* a ctx that is still held finds nothing */
    c->gen = NULL;
    if (!c->owed) {
        c->next = o->spare;
        o->spare = c;
    }
}

/* ---- its time */

static void time_over(void *ud);

void orch_call_clock(struct orch_toolcall *c, int64_t ms, const char *limit)
{
    c->deadline_us = orch_now_us() + ms * 1000;
    c->time_ms = ms;
    c->limit = limit;
}

void orch_call_arm(struct orch_toolcall *c)
{
    if (c->finished || c->holds)
        return;
    if (!c->timer)
        c->timer = orch_timer_new(c->o->loop, time_over, c);
    int64_t left = c->deadline_us / 1000 + c->grace_ms - orch_now_us() / 1000;
    orch_timer_set(c->timer, left > 0 ? left : 0);
}

void orch_call_hold(struct orch_toolcall *c, bool on)
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

/* ---- finishing */

static void run_later(void *ud)
{
    struct orch *o = ud;
    o->run_posted = false;
    orch_calls_run(o);
}

void orch_calls_want(struct orch *o)
{
    if (o->run_posted || o->in_run)
        return;
    o->run_posted = true;
    orch_loop_post(o->loop, run_later, o);
}

/* The call has its answer in c->text: queue it for outcome and answer. It must be in no list. */
static void call_end(struct orch_toolcall *c)
{
    c->finished = true;
    if (c->timer)
        orch_timer_cancel(c->timer);
    orch_asking_end(c);
    orch_vm_handles_close(&c->vms, CALL_OVER);
    orch_http_streams_close(&c->streams);
    list_push(&c->o->ended, c);
    orch_calls_want(c->o);
}

void orch_call_running(struct orch_toolcall *c)
{
    list_push(&c->o->running, c);
}

void orch_call_end(struct orch_toolcall *c)
{
    list_remove(&c->o->running, c);
    call_end(c);
}

/* By c->decision; a call that was not judged is denied. */
static const char *const decision_words[] = { "deny", "allow", "ask", "deny" };

static void put_meta(struct orch_toolcall *c)
{
    struct orch_buf *b = &c->text;
    orch_buf_str(b, ",\"_meta\":{\"orch/decision\":\"");
    orch_buf_str(b, decision_words[c->decision]);
    orch_buf_str(b, "\",\"orch/call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_char(b, '"');
    if (c->isolation) {
        orch_buf_str(b, ",\"orch/isolation\":\"");
        orch_buf_str(b, orch_isolation_name(c->isolation));
        orch_buf_char(b, '"');
    }
    if (c->modern) {
        orch_buf_str(b, ",\"io.modelcontextprotocol/serverInfo\":");
        orch_buf_str(b, c->server_info);
    }
    orch_buf_char(b, '}');
}

static void put_text_result(struct orch_toolcall *c, struct orch_slice prefix, struct orch_slice text, bool is_error)
{
    struct orch_buf *b = &c->text;
    b->n = 0;
    orch_buf_str(b, "\"content\":[{\"type\":\"text\",\"text\":");
    if (prefix.n) {
        cleanup_buf struct orch_buf whole = { 0 };
        orch_buf_slice(&whole, prefix);
        orch_buf_slice(&whole, text);
        orch_json_quote(b, (struct orch_slice){ whole.p, whole.n });
    } else {
        orch_json_quote(b, text);
    }
    orch_buf_str(b, "}]");
    if (is_error)
        orch_buf_str(b, ",\"isError\":true");
    c->is_error = is_error;
    put_meta(c);
}

static void set_failure_bytes(struct orch_toolcall *c, const char *kind, struct orch_slice text)
{
    cleanup_free char *prefix = orch_xasprintf("%s: ", kind);
    put_text_result(c, orch_slice_str(prefix), text, true);
}

static void set_failure(struct orch_toolcall *c, const char *kind, const char *text)
{
    set_failure_bytes(c, kind, orch_slice_str(text));
}

void orch_call_fail(struct orch_toolcall *c, const struct orch_err *err)
{
    if (err->cls == ORCH_CLASS_CANCELLED) /* a task's, which says so itself */
        put_text_result(c, (struct orch_slice){ 0 }, orch_slice_str(err->msg), true);
    else
        set_failure(c, err->cls == ORCH_CLASS_ISOLATION ? "not run" : "failed", err->msg);
}

void orch_call_rpc_error(struct orch_toolcall *c, int code, const char *text)
{
    c->rpc_code = code;
    c->is_error = true;
    c->text.n = 0;
    orch_buf_str(&c->text, text);
}

/* ---- judging */

static void put_decision_fields(struct orch_toolcall *c, struct orch_slice name, struct orch_slice args, struct orch_slice canonical,
                                const char *reason, const char *rules, struct orch_buf *b)
{
    orch_buf_str(b, "\"call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_str(b, "\",");
    orch_buf_slice(b, (struct orch_slice){ c->session->audit_fields.p, c->session->audit_fields.n });
    orch_buf_str(b, ",\"tool\":");
    if (c->tool)
        orch_json_quote(b, orch_slice_str(c->tool->name));
    else
        orch_json_quote(b, (struct orch_slice){ name.p, name.n < NAME_AUDIT_BYTES ? name.n : NAME_AUDIT_BYTES });
    if (args.n <= ARGS_AUDIT_BYTES) {
        orch_buf_str(b, ",\"args\":");
        orch_buf_slice(b, args);
    } else {
        orch_buf_printf(b, ",\"args\":null,\"args_bytes\":%zu", args.n);
    }
    char digest[65];
    orch_audit_digest(c->o->audit, canonical, digest);
    orch_buf_str(b, ",\"args_digest\":\"");
    orch_buf_str(b, digest);
    orch_buf_str(b, "\",\"decision\":\"");
    orch_buf_str(b, decision_words[c->decision]);
    orch_buf_char(b, '"');
    if (reason) {
        orch_buf_str(b, ",\"reason\":");
        orch_json_quote(b, (struct orch_slice){ reason, strnlen(reason, REASON_AUDIT_BYTES) });
    }
    orch_buf_str(b, ",\"rules\":");
    orch_buf_str(b, rules);
    orch_buf_slice(b, (struct orch_slice){ c->gen->audit_field.p, c->gen->audit_field.n });
}

/* Queues the decision line. args: the tokens that will be used (rewritten ones when there are). */
static int audit_decision(struct orch_toolcall *c, struct orch_slice name, const struct orch_json_doc *d, uint32_t args, const char *reason,
                          const char *rules, struct orch_err *err)
{
    static _Thread_local struct orch_buf fields, canonical, redacted;
    fields.n = canonical.n = redacted.n = 0;
    struct orch_slice shown = ORCH_SLICE("{}");
    if (args)
        orch_json_canonical(d, args, &canonical);
    else
        orch_buf_str(&canonical, "{}");
    uint16_t all[256];
    size_t n = c->gen->n_redact < ORCH_ARRAY_LEN(all) ? c->gen->n_redact : ORCH_ARRAY_LEN(all);
    for (size_t i = 0; i < n; i++)
        all[i] = (uint16_t)i;
    if (args && c->gen->n_redact) {
        if (n < c->gen->n_redact || orch_redact_json(c->gen, all, n, d, args, &redacted) < 0) {
            redacted.n = 0;
            orch_buf_str(&redacted, "\"[withheld: redaction limit]\"");
        }
        shown = (struct orch_slice){ redacted.p, redacted.n };
    } else if (args) {
        shown = orch_json_raw(d, args);
    }
    cleanup_buf struct orch_buf why = { 0 }; /* a predicate's error may quote an argument */
    if (reason && c->gen->n_redact) {
        orch_buf_str(&why, reason);
        reason = n < c->gen->n_redact || orch_redact_text(c->gen, all, n, &why) < 0 ? "[withheld: redaction limit]" : why.p;
    }
    put_decision_fields(c, name, shown, (struct orch_slice){ canonical.p, canonical.n }, reason, rules, &fields);
    orch_json_one_line(&fields, 0);
    int r = orch_audit_add(c->o->audit, "decision", (struct orch_slice){ fields.p, fields.n }, true, err);
    c->reserved = r == 0;
    return r;
}

/* Keeps the arguments in the form the tool's side wants them. */
static void keep_args(struct orch_toolcall *c, const struct orch_json_doc *d, uint32_t args)
{
    struct orch_tool *t = c->tool;
    if (t->run_ref == LUA_NOREF || t->fn) {
        if (args)
            orch_buf_slice(&c->args, orch_json_raw(d, args));
        else
            orch_buf_str(&c->args, "{}");
        return;
    }
    lua_State *L = orch_state_lua(c->tool->state);
    if (args)
        orch_lua_push_json(L, d, args, 0);
    else
        lua_newtable(L);
    c->args_ref = luaL_ref(L, LUA_REGISTRYINDEX);
}

struct judgement {
    int verdict;
    const char *reason, *rules;
    struct orch_buf args; /* "[" JSON "]", so that the object is token 1: what is called instead; empty: as they came */
    struct orch_json_doc doc; /* of args */
};

static void judgement_fini(struct judgement *j)
{
    orch_buf_free(&j->args);
    orch_json_doc_free(&j->doc);
}

/* Judges and queues the decision; the call then is in the list of begun ones. */
static void call_begin(struct orch_toolcall *c, struct orch_slice name, const struct orch_json_doc *d, uint32_t args, uint32_t meta)
{
    struct orch *o = c->o;
    struct orch_err err = { 0 };
    ORCH_CLEANUP(judgement_fini) struct judgement j = { .rules = "[]" };
    struct orch_slice passed_on = { 0 }; /* the request's _meta */
    if (meta)
        passed_on = orch_json_raw(d, meta);
    c->tool = orch_generation_tool(c->gen, name);
    if (o->upstream && !orch_upstream_ready(o->upstream)) {
        c->tool = NULL;
        c->rpc_code = ORCH_RPC_UPSTREAM_FAILED;
        orch_buf_str(&c->text, orch_upstream_problem(o->upstream));
        j.reason = "the upstream is not running";
    } else if (!c->tool) {
        cleanup_free char *text = orch_xasprintf("Unknown tool: %.*s", name.n > 200 ? 200 : (int)name.n, name.p);
        c->rpc_code = ORCH_RPC_INVALID_PARAMS;
        orch_buf_str(&c->text, text);
        j.reason = "unknown tool";
    } else if (judge(c, d, args, &j, &err) < 0) {
        c->decision = ORCH_DENY;
        j.reason = err.msg;
        set_failure(c, "denied", err.msg);
    } else if (j.verdict == 0) {
        c->rpc_code = ORCH_RPC_INVALID_PARAMS;
        orch_buf_str(&c->text, j.reason ? j.reason : "bad arguments");
    } else if (j.verdict != ORCH_ALLOW) {
        set_failure(c, "denied", j.reason ? j.reason : "?");
    }
    if (j.doc.n) {
        d = &j.doc;
        args = 1;
    }
    if (!o->audit || orch_audit_broken(o->audit)) {
        c->decision = ORCH_DENY;
        c->rpc_code = 0;
        set_failure(c, "not run", "the audit log cannot be written; calls are refused until orch is started again");
    } else if (audit_decision(c, name, d, args, j.reason, j.rules ? j.rules : "[]", &err) < 0) {
        c->decision = ORCH_DENY;
        c->rpc_code = 0;
        set_failure(c, "not run", err.msg);
    } else if (c->decision == ORCH_ALLOW && !c->rpc_code) {
        keep_args(c, d, args);
        if (c->tool->run_ref == LUA_NOREF && !c->tool->fn)
            orch_buf_slice(&c->meta, passed_on);
    }
    lua_settop(orch_state_lua(c->gen->policy), 0);
    list_push(&o->begun, c);
}

void orch_call_from_mcp(struct orch_session *s, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                        const struct orch_mcp_params *p)
{
    struct orch_toolcall *c = orch_call_new(s->host, s);
    c->rq = rq;
    c->modern = orch_mcp_request_modern(rq);
    c->server_info = orch_mcp_request_server_info(rq);
    c->caps = orch_mcp_request_caps(rq);
    orch_mcp_request_set_host(rq, c);
    if (c->caps)
        orch_asking_begin(c, "tools/call", d, p);
    call_begin(c, p->name, d, p->args, p->meta);
}

void orch_call_from_host(struct orch_session *s, struct orch_slice name, const struct orch_json_doc *d, uint32_t args,
                         orch_call_done_fn *done, void *ud)
{
    struct orch_toolcall *c = orch_call_new(s->host, s);
    c->done = done;
    c->done_ud = ud;
    call_begin(c, name, d, args, 0);
    orch_calls_want(s->host);
}

/* ---- running */

/* Raw: no call protects us here, and no budget would end a metamethod. */
static void push_field(lua_State *L, int idx, const char *key)
{
    lua_pushstring(L, key);
    lua_rawget(L, idx);
}

static struct orch_slice get_string(lua_State *L, int idx, const char *key)
{
    struct orch_slice s = { 0 };
    push_field(L, idx, key);
    if (lua_type(L, -1) == LUA_TSTRING)
        s.p = lua_tolstring(L, -1, &s.n);
    lua_pop(L, 1); /* anchored in the result table */
    return s;
}

/* Checks `structured` (at the top) against the tool's output schema; an error text or NULL. */
static const char *check_output(struct orch_toolcall *c, lua_State *L)
{
    struct orch_err err = { 0 };
    static _Thread_local char why[512];
    lua_State *main = orch_state_lua(c->tool->state);
    if (c->tool->output_ref == LUA_NOREF)
        return NULL;
    lua_rawgeti(main, LUA_REGISTRYINDEX, c->tool->output_ref);
    lua_pushvalue(L, -1);
    lua_xmove(L, main, 1);
    if (orch_state_pcall(c->tool->state, 1, 2, &err) < 0) {
        snprintf(why, sizeof why, "%.500s", err.msg);
        return why;
    }
    const char *text = lua_toboolean(main, -2) ? NULL : lua_tostring(main, -1);
    if (text)
        snprintf(why, sizeof why, "structured result: %s", text);
    lua_pop(main, 2);
    return text ? why : NULL;
}

/* The table a tool returned: { text, structured, is_error, content }. */
static void take_result_table(struct orch_toolcall *c, lua_State *L, int idx)
{
    char why[256];
    struct orch_slice text = get_string(L, idx, "text");
    cleanup_buf struct orch_buf structured = { 0 };
    cleanup_buf struct orch_buf content = { 0 };
    push_field(L, idx, "is_error");
    bool is_error = lua_toboolean(L, -1);
    push_field(L, idx, "structured");
    if (!lua_isnil(L, -1)) {
        const char *problem = check_output(c, L);
        if (problem) {
            set_failure(c, "failed", problem);
            return;
        }
        if (orch_lua_encode_json(L, -1, &structured, why, sizeof why) < 0) {
            cleanup_free char *m = orch_xasprintf("structured result: %s", why);
            set_failure(c, "failed", m);
            return;
        }
    }
    push_field(L, idx, "content");
    if (!lua_isnil(L, -1) && orch_lua_encode_json(L, -1, &content, why, sizeof why) < 0) {
        cleanup_free char *m = orch_xasprintf("content: %s", why);
        set_failure(c, "failed", m);
        return;
    }
    if (content.n && content.p[0] != '[') {
        set_failure(c, "failed", "content must be a list of MCP content blocks");
        return;
    }
    struct orch_buf *b = &c->text;
    b->n = 0;
    orch_buf_str(b, "\"content\":");
    if (content.n) {
        orch_buf_slice(b, (struct orch_slice){ content.p, content.n });
    } else {
        orch_buf_str(b, "[{\"type\":\"text\",\"text\":");
        orch_json_quote(b, text.p ? text : (struct orch_slice){ structured.p, structured.n });
        orch_buf_str(b, "}]");
    }
    /* Before 2026-07-28 only an object is allowed there. */
    if (structured.n && (structured.p[0] == '{' || c->modern)) {
        orch_buf_str(b, ",\"structuredContent\":");
        orch_buf_slice(b, (struct orch_slice){ structured.p, structured.n });
    }
    if (is_error)
        orch_buf_str(b, ",\"isError\":true");
    c->is_error = is_error;
    put_meta(c);
}

static void take_result(struct orch_toolcall *c, lua_State *L, int nres)
{
    int first = lua_gettop(L) - nres + 1;
    int type = nres ? lua_type(L, first) : LUA_TNIL;
    if (type == LUA_TTABLE) {
        take_result_table(c, L, first);
    } else if (type == LUA_TSTRING) {
        size_t n;
        const char *s = lua_tolstring(L, first, &n);
        put_text_result(c, (struct orch_slice){ 0 }, (struct orch_slice){ s, n }, false);
    } else if (type == LUA_TNIL && nres >= 2) {
        const char *code = nres >= 3 && lua_type(L, first + 2) == LUA_TSTRING ? lua_tostring(L, first + 2) : NULL;
        struct orch_slice why = ORCH_SLICE("the tool gave no reason");
        const char *text = lua_tolstring(L, first + 1, &why.n); /* a guest's output may be in it */
        if (text)
            why.p = text;
        else
            why = ORCH_SLICE("the tool gave no reason");
        set_failure_bytes(c, code && strcmp(code, "isolation") == 0 ? "not run" : "failed", why);
        if (code && strcmp(code, "capability") == 0 && c->modern && c->missing)
            orch_asking_missing(c);
        else if (nres >= 3 && lua_type(L, first + 2) == LUA_TNUMBER) /* it wants a JSON-RPC error */
            orch_call_rpc_error(c, (int)lua_tonumber(L, first + 2), text ? text : "the tool gave no reason");
    } else {
        cleanup_free char *m = orch_xasprintf("%s: run must return a table, a string, or nil and an error; it returned %s", c->tool->name,
                                              lua_typename(L, type));
        set_failure(c, "failed", m);
    }
}

static void task_done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct orch_toolcall *c = ud;
    c->task = NULL;
    if (err)
        orch_call_fail(c, err);
    else
        take_result(c, L, nres);
    orch_call_end(c);
}

/* Of a task the end comes when its last wait has been told. */
static void expire(struct orch_toolcall *c)
{
    double s = (double)c->time_ms / 1000;
    cleanup_free char *m = orch_xasprintf("%s within %g s (%s)",
                                          c->task ? "not done" : c->upstream ? "no answer and no progress" : "no answer", s, c->limit);
    if (c->task) {
        orch_task_end(c->task, ORCH_CLASS_TIMEOUT, m);
        return;
    }
    if (c->upstream)
        orch_mcp_client_cancel(c->upstream, "timeout");
    c->upstream = NULL;
    set_failure(c, "failed", m);
    orch_call_end(c);
}

static void time_over(void *ud)
{
    struct orch_toolcall *c = ud;
    struct orch_err err;
    if (c->finished || c->holds) /* by an event of the same turn */
        return;
    if (c->grace_ms > VM_GRACE_MS || (!c->grace_ms && !c->vms)) {
        expire(c);
        return;
    }
    if (c->grace_ms) {
        orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, ORCH_VM_TIME_OVER, (double)c->time_ms / 1000, c->limit);
        orch_vm_handles_end(c->vms, &err);
        c->grace_ms += END_GRACE_MS;
    } else {
        c->grace_ms = VM_GRACE_MS;
    }
    orch_call_arm(c);
}

static void upstream_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_toolcall *c = ud;
    c->upstream = NULL;
    if (err) {
        c->rpc_code = ORCH_RPC_UPSTREAM_FAILED;
        c->is_error = true;
        c->text.n = 0;
        orch_buf_str(&c->text, err->msg);
    } else {
        /* The result's members as they came, without its braces and the space around them. */
        struct orch_slice members = { result.p + 1, result.n - 2 };
        for (; members.n && strchr(" \t\r\n", *members.p); members.n--)
            members.p++;
        c->text.n = 0;
        orch_buf_slice(&c->text, members);
        c->raw = true;
        cleanup_json struct orch_json_doc d = { 0 };
        struct orch_json_fault fault;
        if (orch_json_scan(&d, result, &(struct orch_json_limits){ 0 }, &fault) == 0) {
            uint32_t tok = orch_json_get(&d, 0, "isError");
            c->is_error = tok && d.toks[tok].type == ORCH_JSON_TRUE;
        }
    }
    orch_call_end(c);
}

/* A server that says how far it is has its time anew, from now or from when what it asked is answered. */
static void upstream_progress(void *ud, double done, double total, struct orch_slice message)
{
    struct orch_toolcall *c = ud;
    c->deadline_us = (c->holds ? c->held_since_us : orch_now_us()) + c->time_ms * 1000;
    orch_call_arm(c);
    orch_call_ops.progress(c, done, total, message);
}

static void call_run(struct orch_toolcall *c)
{
    struct orch *o = c->o;
    struct orch_tool *t = c->tool;
    if (t->timeout_ms)
        orch_call_clock(c, t->timeout_ms, t->limit ? t->limit : "the tool's timeout");
    else
        orch_call_clock(c, c->gen->cfg.vm_timeout_ms, "vm.timeout");
    list_push(&o->running, c);
    struct orch_err task_err = { 0 };
    bool with_task = t->task && (c->caps & ORCH_MCP_CAP_TASKS) && c->rq;
    if (with_task && orch_job_begin(c, &task_err) < 0) {
        orch_call_fail(c, &task_err);
        orch_call_end(c);
        return;
    }
    if (t->task == ORCH_TOOL_TASK_ONLY && !with_task) {
        orch_err_set(&task_err, ENOTSUP, "this tool needs a client that offers the tasks extension");
        orch_call_fail(c, &task_err);
        c->missing = ORCH_MCP_CAP_TASKS;
        if (c->modern)
            orch_asking_missing(c);
        orch_call_end(c);
        return;
    }
    if (t->fn || t->run_ref == LUA_NOREF)
        orch_call_arm(c);
    if (t->fn) {
        c->owed = true;
        t->fn(t->fn_ud, (struct orch_tool_call *)c, c->args.p);
        return;
    }
    if (t->run_ref == LUA_NOREF) {
        struct orch_err err = { 0 };
        c->upstream = orch_mcp_client_call(orch_upstream_client(o->upstream),
                                           &(struct orch_mcp_client_request){ .tool = strstr(t->name, "__") + 2,
                                                                              .args = { c->args.p, c->args.n },
                                                                              .meta = { c->meta.p, c->meta.n },
                                                                              .done = upstream_done,
                                                                              .progress = upstream_progress,
                                                                              .ud = c },
                                           &err);
        if (!c->upstream)
            upstream_done(c, (struct orch_slice){ 0 }, &err);
        return;
    }
    lua_State *L = orch_state_lua(c->tool->state);
    lua_rawgeti(L, LUA_REGISTRYINDEX, t->run_ref);
    lua_rawgeti(L, LUA_REGISTRYINDEX, c->args_ref);
    orch_push_ctx(L, c->slot, c->serial);
    /* It may end at once: then it is in the list of ended ones, which only our caller empties. */
    struct orch_task *task = orch_task_start(o->loop, c->tool->state, 2, task_done, c);
    if (c->finished)
        return;
    c->task = task;
    orch_call_arm(c);
}

/* ---- outcome and answer */

static void withhold(struct orch_toolcall *c, const char *text)
{
    c->rpc_code = 0;
    c->raw = false;
    set_failure(c, "failed", text);
}

/* Applies the deciding rules' redact patterns to the finished result. */
static void redact_result(struct orch_toolcall *c)
{
    if (!c->n_redact || c->decision != ORCH_ALLOW)
        return;
    cleanup_buf struct orch_buf whole = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (c->rpc_code)
        orch_json_quote(&whole, (struct orch_slice){ c->text.p, c->text.n });
    else {
        orch_buf_char(&whole, '{');
        orch_buf_slice(&whole, (struct orch_slice){ c->text.p, c->text.n });
        orch_buf_char(&whole, '}');
    }
    if (orch_json_scan(&d, (struct orch_slice){ whole.p, whole.n }, &(struct orch_json_limits){ .bytes = 256 << 20, .depth = 1000 }, &fault) < 0 ||
        orch_redact_json(c->gen, c->redact, c->n_redact, &d, 0, &out) < 0) {
        withhold(c, "the result was withheld: a redact pattern hit its match limit");
        return;
    }
    c->text.n = 0;
    if (c->rpc_code) {
        cleanup_json struct orch_json_doc text = { 0 };
        if (orch_json_scan(&text, (struct orch_slice){ out.p, out.n }, &(struct orch_json_limits){ 0 }, &fault) == 0)
            orch_json_string(&text, 0, &c->text);
    } else {
        orch_buf_add(&c->text, out.p + 1, out.n - 2);
    }
}

static int audit_outcome(struct orch_toolcall *c, struct orch_err *err)
{
    static _Thread_local struct orch_buf fields;
    char sha[65];
    struct orch_buf *b = &fields;
    b->n = 0;
    orch_sha256_hex(c->text.p, c->text.n, sha);
    orch_buf_str(b, "\"call\":\"");
    orch_buf_str(b, c->id);
    orch_buf_str(b, "\",\"tool\":");
    orch_json_quote(b, orch_slice_str(c->tool ? c->tool->name : "?"));
    if (c->vm_id[0])
        orch_buf_printf(b, ",\"vm\":\"%s\"", c->vm_id);
    if (c->isolation)
        orch_buf_printf(b, ",\"isolation\":\"%s\"", orch_isolation_name(c->isolation));
    if (c->cancelled)
        orch_buf_str(b, ",\"cancelled\":true");
    int64_t us = orch_now_us() - c->begun_us;
    orch_buf_str(b, ",\"ms\":");
    orch_json_put_number(b, (double)(us / 1000)); /* whole numbers are cheap to print, fractions are not */
    int part = (int)(us % 1000);
    orch_buf_add(b, (char[]){ '.', (char)('0' + part / 100), (char)('0' + part / 10 % 10), (char)('0' + part % 10) }, 4);
    orch_buf_str(b, c->is_error || c->rpc_code ? ",\"result\":{\"is_error\":true,\"bytes\":" : ",\"result\":{\"is_error\":false,\"bytes\":");
    orch_json_put_number(b, (double)c->text.n);
    orch_buf_str(b, ",\"sha256\":\"");
    orch_buf_str(b, sha);
    orch_buf_str(b, "\"}");
    return orch_audit_add_outcome(c->o->audit, (struct orch_slice){ b->p, b->n }, err);
}

void orch_call_answer(struct orch_toolcall *c)
{
    struct orch_slice text = { c->text.p, c->text.n };
    if (orch_asking_answer(c))
        return;
    if (c->job)
        orch_job_end(c);
    if (c->rq) { /* of one that the client cancelled nothing is sent */
        if (c->rpc_code)
            orch_mcp_respond_error(c->rq, c->rpc_code, text, (struct orch_slice){ c->rpc_data.p, c->rpc_data.n });
        else
            orch_mcp_respond(c->rq, text);
    }
    if (c->done) {
        if (c->rpc_code) {
            cleanup_buf struct orch_buf b = { 0 };
            orch_buf_str(&b, "\"content\":[{\"type\":\"text\",\"text\":");
            orch_json_quote(&b, text);
            orch_buf_str(&b, "}],\"isError\":true");
            c->done(c->done_ud, (struct orch_slice){ b.p, b.n }, true);
        } else {
            c->done(c->done_ud, text, c->is_error);
        }
    }
    orch_call_free(c);
}

/* What to do with the calls that were judged: run them, or end them at once. */
static void run_begun(struct orch_toolcall *list, const struct orch_err *audit_error)
{
    for (struct orch_toolcall *c = list, *next; c; c = next) {
        next = c->next;
        c->next = c->prev = NULL;
        if (audit_error) {
            c->decision = ORCH_DENY;
            c->reserved = false;
            c->rpc_code = 0;
            set_failure(c, "not run", audit_error->msg);
        } else if (c->cancelled) {
            set_failure(c, "cancelled", "before it ran");
        } else if (c->decision == ORCH_ALLOW && !c->rpc_code) {
            call_run(c);
            continue;
        }
        call_end(c);
    }
}

void orch_calls_run(struct orch *o)
{
    struct orch_err err = { 0 };
    if (o->in_run)
        return;
    o->in_run = true;
    if (o->begun) {
        struct orch_toolcall *begun = list_take(&o->begun);
        bool failed = o->audit && orch_audit_flush(o->audit, &err) < 0;
        if (failed)
            orch_log(ORCH_ERROR, "%s", err.msg);
        run_begun(begun, failed ? &err : NULL);
    }
    while (o->ended) {
        struct orch_toolcall *ended = list_take(&o->ended);
        for (struct orch_toolcall *c = ended; c; c = c->next) {
            redact_result(c);
            if (c->reserved && audit_outcome(c, &err) < 0)
                withhold(c, err.msg);
        }
        if (o->audit && orch_audit_flush(o->audit, &err) < 0) {
            orch_log(ORCH_ERROR, "%s", err.msg);
            for (struct orch_toolcall *c = ended; c; c = c->next)
                if (c->reserved)
                    withhold(c, "the outcome could not be written to the audit log; the answer is withheld");
        }
        for (struct orch_toolcall *c = ended, *next; c; c = next) {
            next = c->next;
            orch_call_answer(c);
        }
    }
    o->in_run = false;
    if (o->begun) /* an answer's callback made another call */
        orch_calls_want(o);
}

/* ---- cancelling */

void orch_call_cancel(struct orch_toolcall *c, const char *why)
{
    if (c->cancelled || c->finished)
        return;
    c->cancelled = true;
    if (c->task) {
        orch_task_cancel(c->task, why);
    } else if (c->upstream || c->owed) {
        if (c->upstream)
            orch_mcp_client_cancel(c->upstream, why);
        c->upstream = NULL;
        set_failure(c, "cancelled", why);
        orch_call_end(c);
    }
}

void orch_call_cancel_mcp(struct orch_mcp_request *rq)
{
    struct orch_toolcall *c = orch_mcp_request_host(rq);
    if (c->finished)
        c->cancelled = true;
    orch_call_cancel(c, "the client cancelled the call");
}

void orch_calls_cancel(struct orch *o, struct orch_session *s, const char *why)
{
    for (struct orch_toolcall *c = o->running, *next; c; c = next) {
        next = c->next;
        if (c->session == s)
            orch_call_cancel(c, why);
    }
}

void orch_call_detach_mcp(struct orch_mcp_request *rq)
{
    struct orch_toolcall *c = orch_mcp_request_host(rq);
    c->rq = NULL;
}

void orch_calls_free(struct orch *o)
{
    for (size_t i = 0; i < o->n_slots; i++) {
        orch_buf_free(&o->slots[i]->args);
        orch_buf_free(&o->slots[i]->text);
        orch_buf_free(&o->slots[i]->meta);
        orch_timer_free(o->slots[i]->timer);
        free(o->slots[i]);
    }
    free(o->slots);
    orch_loop_unpost(o->loop, run_later, o);
    orch_rates_free(o);
}

/* ---- tools written in C */

void orch_answer(struct orch_tool_call *call, const char *text, int is_error)
{
    struct orch_toolcall *c = &call->call;
    c->owed = false;
    if (!c->gen) { /* cancelled or timed out before, and answered so */
        c->next = c->o->spare;
        c->o->spare = c;
    }
    if (!c->gen || c->finished)
        return;
    put_text_result(c, (struct orch_slice){ 0 }, orch_slice_str(text), is_error != 0);
    orch_call_end(c);
}
