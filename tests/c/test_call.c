/* The life of a call, by real policies and over a real MCP session. Its backend and the audit log
 * are fakes that note what happens, in its order. Each row plays steps and says all that comes of
 * them; after each, nothing of a call is left. */
#include "call/call.h"

#include "policy_host.h"

/* ---- what happened, in words */

static struct orch_buf trace, answer; /* answer: the last one */

static void note(const char *word)
{
    if (trace.n)
        orch_buf_char(&trace, ' ');
    orch_buf_str(&trace, word);
}

/* ---- the audit log, in the place of store/audit.c */

struct orch_audit {
    bool full;       /* lines are refused */
    bool withheld;   /* outcomes are refused */
    bool unwritable; /* what is queued cannot be written, and then the log is broken */
    bool broken;
    unsigned reserved; /* outcomes that must follow */
    struct orch_buf queue;
};

static bool has(struct orch_slice s, const char *text)
{
    return memmem(s.p, s.n, text, strlen(text)) != NULL;
}

static void put_member(struct orch_buf *b, struct orch_slice fields, const char *key)
{
    cleanup_buf struct orch_buf json = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    orch_buf_printf(&json, "{%.*s}", (int)fields.n, fields.p);
    assert_int_equal(orch_json_scan(&d, (struct orch_slice){ json.p, json.n },
                                    &(struct orch_json_limits){ 0 }, &fault),
                     0);
    uint32_t tok = orch_json_get(&d, 0, key);
    assert_int_not_equal(tok, 0);
    orch_buf_slice(b, orch_json_raw(&d, tok));
}

int orch_audit_add(struct orch_audit *a, const char *event, struct orch_slice fields, bool reserve,
                   struct orch_err *err)
{
    if (a->full || a->broken)
        return orch_err_set(err, ENOSPC, "no space for the record");
    orch_buf_printf(&a->queue, " %s:", event);
    if (strcmp(event, "decision") == 0) {
        put_member(&a->queue, fields, "decision");
        put_member(&a->queue, fields, "args");
    }
    a->reserved += reserve;
    return 0;
}

int orch_audit_add_outcome(struct orch_audit *a, struct orch_slice fields, struct orch_err *err)
{
    assert_true(a->reserved > 0);
    if (a->withheld || a->broken)
        return orch_err_set(err, EIO, "the outcome is refused");
    a->reserved--;
    orch_buf_printf(&a->queue, " outcome:%s%s", has(fields, "\"is_error\":true") ? "error" : "ok",
                    has(fields, "\"cancelled\":true") ? ",cancelled" : "");
    return 0;
}

int orch_audit_flush(struct orch_audit *a, struct orch_err *err)
{
    a->broken = a->broken || (a->unwritable && a->queue.n);
    if (a->broken) {
        a->queue.n = 0;
        return orch_err_set(err, EIO, "the audit log cannot be written");
    }
    if (a->queue.n)
        note(a->queue.p + 1);
    a->queue.n = 0;
    return 0;
}

bool orch_audit_broken(const struct orch_audit *a)
{
    return a->broken;
}

void orch_audit_note(struct orch_audit *a, const char *event, struct orch_slice fields)
{
    struct orch_err err;
    if (a && orch_audit_add(a, event, fields, false, &err) == 0)
        orch_audit_flush(a, &err);
}

void orch_audit_digest(struct orch_audit *a, struct orch_slice canonical, char out[65])
{
    (void)a;
    orch_sha256_hex(canonical.p, canonical.n, out);
}

/* ---- the host */

static const char rules[] =
    "return { rules = {\n"
    "  { tool = 'yes*', action = 'allow' },\n"
    "  { tool = 'no', action = 'deny', reason = 'not this one' },\n"
    "  { tool = 'ask', action = 'ask', reason = 'changes things' },\n"
    "  { tool = 'broken', action = 'allow', when = function(call) error('bang', 0) end },\n"
    "  { tool = 'rewritten', action = 'allow', rewrite = function(a) a.x = 2; return a end },\n"
    "  { tool = 'spoilt', action = 'allow', rewrite = function(a) a.f = print; return a end },\n"
    "  { tool = 'rated', action = 'allow', rate = '1/day' },\n"
    "  { tool = 'secret', action = 'allow', redact = { [[sk-\\w+]] } },\n"
    "} }\n";
static const char *const tools[] = { "yes",       "yes_short", "no",    "ask",   "broken",
                                     "rewritten", "spoilt",    "rated", "secret" };

static struct orch_audit audit;
static struct orch_calls calls;
static struct orch_session *session;
static struct orch_mcp_session *mcp;

static void push_session(void *ud, lua_State *L, const char *id)
{
    (void)ud;
    orch_session_push(&calls, L, id);
}

/* ---- the backend: what the tool does is the row's matter */

enum does {
    ANSWERS, /* at once */
    FAILS,   /* at once: nothing was run */
    WAITS,   /* nothing of it runs once it is stopped */
    ENDS,    /* stopped, it ends by itself */
    LINGERS, /* past its time a part of it ends by itself */
    ASKS,    /* its client, and answers with what that said */
    ASKS_ON, /* the same, but never answers */
    BECOMES_TASK,
};

struct row {
    const char *name;
    enum { LEGACY, MODERN, MUTE, HOST } client; /* mute: it cannot be asked */
    const char *tool;
    enum does does;
    const char *steps, *trace, *answer; /* answer: in the last one; NULL: there is none */
};

static const struct row *row;
static struct orch_call *call;      /* that runs; not after it has ended */
static struct orch_ask *ask, *also; /* that it asks */
static uint32_t slot, serial;

static void part_end(struct orch_call_part *p, struct orch_call *c)
{
    (void)p;
    assert_true(c->finished);
    call = NULL;
    note("end");
}

static bool part_late(struct orch_call_part *p, struct orch_call *c, bool now)
{
    (void)p;
    (void)c;
    assert_false(now);
    if (row->does == LINGERS)
        note("late");
    return row->does == LINGERS;
}

static void part_free(struct orch_call_part *p)
{
    note("free");
    free(p);
}

static const struct orch_call_part_ops part_ops = {
    .end = part_end,
    .late = part_late,
    .free = part_free,
};

static void take_answer(void *ud)
{
    size_t n;
    const struct orch_ask_item *it = orch_ask_items(ask, &n);
    struct orch_call *c = orch_call_live(&calls, slot, serial);
    (void)ud;
    assert_true(orch_ask_done(ask));
    if (c && row->does == ASKS) {
        orch_call_text(c, orch_slice_str(it->failed ? it->error.p : it->answer.p), it->failed != 0);
        orch_call_end(c);
    }
    orch_ask_free(ask);
    ask = NULL;
}

static void told(void *ud)
{
    note("told");
    orch_loop_post(loop, take_answer, ud);
}

static void free_also(void *ud)
{
    (void)ud;
    assert_true(orch_ask_done(also));
    orch_ask_free(also);
    also = NULL;
}

static void told_also(void *ud)
{
    note("told_also");
    orch_loop_post(loop, free_also, ud);
}

static struct orch_ask *ask_for(struct orch_call *c, const char *key, orch_loop_fn *done,
                                struct orch_err *err)
{
    struct orch_ask_item *it = orch_xcalloc(1, sizeof *it);
    it->key = orch_xstrdup(key);
    it->method = "elicitation/create";
    it->needs = ORCH_MCP_CAP_FORM;
    orch_buf_str(&it->params, "{\"message\":\"who?\",\"requestedSchema\":{\"type\":\"object\","
                              "\"properties\":{}}}");
    return orch_ask_start(c, it, 1, done, NULL, err);
}

static void start(struct orch_call *c)
{
    struct orch_err err = { 0 };
    struct orch_call_part *p = orch_xcalloc(1, sizeof *p);
    cleanup_free char *word = orch_xasprintf("run%s", c->args.p);
    note(word);
    p->ops = &part_ops;
    orch_call_add_part(c, p);
    call = c;
    slot = c->slot;
    serial = c->serial;
    if (row->does == ANSWERS) {
        orch_call_text(c, ORCH_SLICE("here is sk-123"), false);
        orch_call_end(c);
        return;
    }
    bool fails = row->does == FAILS || (row->does == BECOMES_TASK && orch_job_begin(c, &err) < 0);
    if (row->does == FAILS)
        orch_err_setc(&err, ORCH_CLASS_ISOLATION, EIO, "no microVM");
    if (row->does == ASKS || row->does == ASKS_ON)
        fails = !(ask = ask_for(c, "who", told, &err));
    if (fails) {
        orch_call_fail(c, &err);
        orch_call_end(c);
        return;
    }
    orch_call_arm(c);
}

static bool stop(struct orch_call *c, enum orch_class cls, const char *why)
{
    (void)c;
    (void)why;
    note(cls == ORCH_CLASS_TIMEOUT ? "stop:timeout" : "stop:cancelled");
    return row->does == ENDS;
}

static const struct orch_tool_backend backend = {
    .unfinished = "no answer",
    .start = start,
    .stop = stop,
};

static void start_other(struct orch_call *c)
{
    note("run_by_another");
    orch_call_end(c);
}

static const struct orch_tool_backend other = { .start = start_other, .lua_args = true };

static int add_tool(struct orch_generation *g, const char *name, const struct orch_tool_backend *by,
                    struct orch_err *err)
{
    struct orch_tool t = {
        .name = (char *)(uintptr_t)name,
        .wire_name = (char *)(uintptr_t)name,
        .server = (char *)(uintptr_t) "local",
        .definition = (char *)(uintptr_t) "{}",
        .input = (char *)(uintptr_t) "{\"type\":\"object\"}",
        .limit = (char *)(uintptr_t) "the row",
        .timeout_ms = strcmp(name, "yes_short") == 0 ? 1 : 60000,
        .run_ref = LUA_NOREF,
        .output_ref = LUA_NOREF,
        .backend = by,
    };
    return orch_generation_add_tool(g, &t, (struct orch_slice){ 0 }, err);
}

static int add_tools(void *ud, struct orch_generation *g, struct orch_err *err)
{
    (void)ud;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(tools); i++)
        if (add_tool(g, tools[i], &backend, err) < 0)
            return -1;
    return 0;
}

static int open_host(void **state)
{
    static struct orch_tool_source source = { .alone = true, .add = add_tools };
    struct orch_err err;
    (void)state;
    host_ops.session = push_session;
    host_open("return { workspace = '.' }", rules);
    orch_current_add_source(&current, &source);
    assert_int_equal(orch_current_need(&current, &err), 0);
    calls = (struct orch_calls){ .loop = loop, .current = &current };
    return orch_calls_init(&calls, &err);
}

static int close_host(void **state)
{
    (void)state;
    orch_calls_unpark(&calls, NULL);
    orch_calls_fini(&calls);
    host_close();
    orch_buf_free(&audit.queue);
    orch_buf_free(&trace);
    orch_buf_free(&answer);
    return 0;
}

/* ---- the client */

#define MODERN_META \
    ",\"_meta\":{\"io.modelcontextprotocol/protocolVersion\":\"2026-07-28\"," \
    "\"io.modelcontextprotocol/clientCapabilities\":{\"elicitation\":{},\"extensions\":{" \
    "\"io.modelcontextprotocol/tasks\":{}}}}"

static char question[32], request_state[128], task_id[64];
static unsigned n_calls;

static void take_text(struct orch_slice message, const char *key, char *out, size_t n)
{
    const char *at = memmem(message.p, message.n, key, strlen(key));
    if (at)
        snprintf(out, n, "%.*s", (int)strcspn(at + strlen(key), "\",}"), at + strlen(key));
}

static void sent(void *ud, void *stream, struct orch_slice message, int status)
{
    (void)ud;
    (void)stream;
    (void)status;
    if (!message.n || has(message, "\"protocolVersion\""))
        return;
    if (has(message, "\"method\":\"notifications/cancelled\"")) {
        note("withdrawn");
        return;
    }
    if (has(message, "\"method\"") && !has(message, "\"input_required\"")) {
        take_text(message, "\"id\":", question, sizeof question);
        note("asked");
        return;
    }
    take_text(message, "\"requestState\":\"", request_state, sizeof request_state);
    take_text(message, "\"taskId\":\"", task_id, sizeof task_id);
    note(has(message, "\"input_required\"") ? "input_required"
         : has(message, "\"task\"")         ? "task"
                                            : "answer");
    answer.n = 0;
    orch_buf_slice(&answer, message);
}

static void on_call(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                    const struct orch_mcp_params *p)
{
    (void)ud;
    if (p->state)
        orch_call_resume(session, rq, "tools/call", d, p);
    else
        orch_call_from_mcp(session, rq, d, p);
}

static void on_request(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                       const char *method, const struct orch_mcp_params *p)
{
    (void)ud;
    orch_job_request(session, rq, d, method, p);
}

static void on_cancel(void *ud, struct orch_mcp_request *rq)
{
    (void)ud;
    orch_call_cancel_mcp(rq);
}

static void on_detach(void *ud, struct orch_mcp_request *rq)
{
    (void)ud;
    orch_call_detach_mcp(rq);
}

static void feed(const char *fmt, ...) ORCH_PRINTF(1, 2);

static void feed(const char *fmt, ...)
{
    cleanup_free char *line = NULL;
    va_list ap;
    va_start(ap, fmt);
    assert_true(vasprintf(&line, fmt, ap) >= 0);
    va_end(ap);
    orch_mcp_session_feed(mcp, orch_slice_str(line), NULL);
}

static void host_answered(void *ud, struct orch_slice members, bool is_error)
{
    (void)ud;
    (void)is_error;
    note("answer");
    answer.n = 0;
    orch_buf_slice(&answer, members);
}

static void open_client(void)
{
    static const struct orch_mcp_server_ops ops = { .tool_call = on_call,
                                                    .request = on_request,
                                                    .cancel = on_cancel,
                                                    .detach = on_detach,
                                                    .server_info = "{\"name\":\"test\"}",
                                                    .features = ORCH_MCP_TASKS,
                                                    .max_calls = 8 };
    session = orch_session_new(&calls, "test");
    mcp = orch_mcp_session_new(&ops, NULL, &(struct orch_json_limits){ 0 });
    orch_mcp_session_sink(mcp, sent, NULL, NULL);
    if (row->client == MODERN)
        return;
    feed("{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{\"protocolVersion\":"
         "\"2025-11-25\",\"capabilities\":%s}}",
         row->client == MUTE ? "{}" : "{\"elicitation\":{}}");
    feed("{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}");
}

/* ---- steps */

static void call_tool(const char *more)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (row->client == HOST) {
        orch_json_scan(&d, ORCH_SLICE("[{\"x\":1}]"), &(struct orch_json_limits){ 0 }, &fault);
        orch_call_from_host(session, orch_slice_str(row->tool), &d, 1, host_answered, NULL);
        return;
    }
    feed("{\"jsonrpc\":\"2.0\",\"id\":%u,\"method\":\"tools/call\",\"params\":{\"name\":\"%s\","
         "\"arguments\":{\"x\":1}%s%s}}",
         ++n_calls, row->tool, more, row->client == MODERN ? MODERN_META : "");
}

static void step_call(void)
{
    call_tool("");
}

static void step_turn(void)
{
    orch_calls_run(&calls);
}

static void step_loop(void)
{
    orch_loop_step(loop, 0);
}

static void step_await(void) /* something */
{
    size_t n = trace.n;
    while (trace.n == n)
        orch_loop_step(loop, 100);
}

static void step_cancel(void)
{
    feed("{\"jsonrpc\":\"2.0\",\"method\":\"notifications/cancelled\",\"params\":{"
         "\"requestId\":%u}}",
         n_calls);
}

static void step_gone(void)
{
    orch_mcp_session_free(mcp);
    mcp = NULL;
}

static void step_close(void)
{
    orch_calls_cancel(session, "orch is closing");
}

static void step_end(void)
{
    assert_non_null(call);
    orch_call_text(call, ORCH_SLICE("done"), false);
    orch_call_end(call);
}

static void reply(const char *result)
{
    feed("{\"jsonrpc\":\"2.0\",\"id\":%s,%s}", question, result);
}

static void step_accept(void)
{
    reply("\"result\":{\"action\":\"accept\",\"content\":{}}");
}

static void step_refuse(void)
{
    reply("\"error\":{\"code\":-1,\"message\":\"not now\"}");
}

static void step_back(void)
{
    cleanup_free char *more = orch_xasprintf(
        ",\"requestState\":\"%s\",\"inputResponses\":{\"who\":{\"action\":\"accept\","
        "\"content\":{}}}",
        request_state);
    call_tool(more);
}

static void step_unpark(void)
{
    orch_calls_unpark(&calls, session);
}

static void step_ask(void)
{
    struct orch_err err = { 0 };
    assert_non_null(call);
    also = ask_for(call, "also", told_also, &err);
    note(also ? "asks_also" : err.msg);
}

static void step_cancel_task(void)
{
    feed("{\"jsonrpc\":\"2.0\",\"id\":%u,\"method\":\"tasks/cancel\",\"params\":{\"taskId\":\"%s\","
         "\"inputResponses\":{}" MODERN_META "}}",
         ++n_calls, task_id);
}

static void step_unlogged(void)
{
    calls.audit = NULL;
}

static void step_swap(void)
{
    struct orch_generation *before = current.gen;
    assert_int_equal(orch_current_reload(&current, "the row"), 0);
    assert_ptr_not_equal(current.gen, before);
}

static void step_replace(void)
{
    struct orch_err err = { 0 };
    struct orch_slice name = orch_slice_str(row->tool);
    assert_int_equal(add_tool(current.gen, row->tool, &other, &err), 0);
    assert_ptr_equal(orch_generation_tool(current.gen, name)->backend, &other);
}

static const struct {
    const char *word;
    void (*fn)(void);
    bool *flips; /* or does that */
} steps[] = {
    { "call", step_call, NULL },
    { "turn", step_turn, NULL },
    { "loop", step_loop, NULL },
    { "await", step_await, NULL },
    { "cancel", step_cancel, NULL },
    { "gone", step_gone, NULL },
    { "close", step_close, NULL },
    { "end", step_end, NULL },
    { "accept", step_accept, NULL },
    { "refuse", step_refuse, NULL },
    { "back", step_back, NULL },
    { "unpark", step_unpark, NULL },
    { "ask", step_ask, NULL },
    { "cancel_task", step_cancel_task, NULL },
    { "unlogged", step_unlogged, NULL },
    { "swap", step_swap, NULL },
    { "replace", step_replace, NULL },
    { "full", NULL, &audit.full },
    { "unwritable", NULL, &audit.unwritable },
    { "withheld", NULL, &audit.withheld },
};

static void play(const char *script)
{
    cleanup_free char *copy = orch_xstrdup(script);
    for (char *save, *word = strtok_r(copy, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        size_t i = 0;
        while (i < ORCH_ARRAY_LEN(steps) && strcmp(steps[i].word, word) != 0)
            i++;
        if (i == ORCH_ARRAY_LEN(steps))
            fail_msg("no such step: %s", word);
        if (steps[i].fn)
            steps[i].fn();
        else
            *steps[i].flips = !*steps[i].flips;
    }
}

/* Each call's record is back among the spare ones. */
static bool all_free(void)
{
    size_t n = 0;
    for (const struct orch_call *c = calls.spare; c; c = c->next)
        if (++n > calls.n_slots)
            fail_msg("a record is spare twice");
    return n == calls.n_slots;
}

static void run_row(const struct row *r)
{
    row = r;
    trace.n = answer.n = 0;
    n_calls = 0;
    audit = (struct orch_audit){ .queue = audit.queue };
    audit.queue.n = 0;
    calls.audit = &audit;
    current.audit = NULL;
    orch_rates_free(&current.rates);
    open_client();
    play(r->steps);
    for (int i = 0; i < 100 && (!all_free() || ask || also); i++)
        orch_loop_step(loop, 100);
    const char *got = trace.n ? trace.p : "";
    expect(r->name, strcmp(got, r->trace) == 0, got, r->trace);
    got = answer.n ? answer.p : "no answer";
    expect(r->name, r->answer ? strstr(got, r->answer) != NULL : !answer.n, got, r->answer);
    expect(r->name, all_free(), "a call that is left", "none");
    expect(r->name, !ask && !also && !calls.parked.n && !calls.parked.asking && !calls.jobs,
           "parts of it", "none");
    expect(r->name, audit.broken || audit.withheld || !audit.reserved, "an outcome that is owed",
           "none");
    orch_mcp_session_free(mcp);
    mcp = NULL;
    assert_int_equal(session->refs, 1);
    orch_session_unref(session);
    assert_int_equal(current.gen->refs, 1);
}

static void run_rows(const struct row *rows, size_t n)
{
    wrong = 0;
    for (size_t i = 0; i < n; i++)
        run_row(&rows[i]);
    assert_int_equal(wrong, 0);
}

/* ---- the rows */

#define ALLOW "decision:\"allow\"{\"x\":1}"
#define DENY "decision:\"deny\"{\"x\":1}"
#define RUN "run{\"x\":1}"

/* What is decided, recorded, run and answered when nothing comes between. */
static void decisions(void **state)
{
    (void)state;
    static const struct row rows[] = {
        { "allowed", LEGACY, "yes", ANSWERS, "call turn",
          ALLOW " " RUN " end outcome:ok answer free", "here is sk-123" },
        { "allowed, by the program", HOST, "yes", ANSWERS, "call",
          ALLOW " " RUN " end outcome:ok answer free", "here is sk-123" },
        { "allowed, answered later", LEGACY, "yes", WAITS, "call turn end",
          ALLOW " " RUN " end outcome:ok answer free", "\"done\"" },
        { "denied", LEGACY, "no", ANSWERS, "call turn", DENY " outcome:error answer",
          "denied: not this one (policies/tools.lua:3)" },
        { "denied, by the program", HOST, "no", ANSWERS, "call", DENY " outcome:error answer",
          "denied: not this one" },
        { "nobody can be asked", LEGACY, "ask", ANSWERS, "call turn",
          "decision:\"ask\"{\"x\":1} outcome:error answer",
          "denied: nobody to ask: changes things (policies/tools.lua:4)" },
        { "a predicate fails", LEGACY, "broken", ANSWERS, "call turn", DENY " outcome:error answer",
          "denied: `when` failed: bang (policies/tools.lua:5)" },
        { "rewritten: what runs is what is recorded", LEGACY, "rewritten", ANSWERS, "call turn",
          "decision:\"allow\"{\"x\":2} run{\"x\":2} end outcome:ok answer free", "here" },
        { "rewritten into what no JSON can be", LEGACY, "spoilt", ANSWERS, "call turn",
          DENY " outcome:error answer", "denied: the rewritten arguments cannot be JSON" },
        { "over its rate", LEGACY, "rated", ANSWERS, "call turn call turn",
          ALLOW " " RUN " end outcome:ok answer free " DENY " outcome:error answer",
          "denied: rate limit 1/day is used up (policies/tools.lua:8)" },
        { "redacted", LEGACY, "secret", ANSWERS, "call turn",
          ALLOW " " RUN " end outcome:ok answer free", "here is [redacted]" },
        { "unknown", LEGACY, "nothing", ANSWERS, "call turn", DENY " outcome:error answer",
          "\"code\":-32602,\"message\":\"Unknown tool: nothing\"" },
        { "unknown, by the program", HOST, "nothing", ANSWERS, "call", DENY " outcome:error answer",
          "\"text\":\"Unknown tool: nothing\"}],\"isError\":true" },
        { "it cannot start", LEGACY, "yes", FAILS, "call turn",
          ALLOW " " RUN " end outcome:error answer free", "not run: no microVM" },
        { "two in one turn: no line of one waits for the other", LEGACY, "yes", ANSWERS,
          "call call turn",
          ALLOW " " ALLOW " " RUN " end " RUN " end outcome:ok outcome:ok answer free answer free",
          "here" },
    };
    run_rows(rows, ORCH_ARRAY_LEN(rows));
}

/* The client, the host or time ends it, at each step. */
static void ends(void **state)
{
    (void)state;
    static const struct row rows[] = {
        { "cancelled before it is recorded", LEGACY, "yes", ANSWERS, "call cancel turn",
          ALLOW " outcome:error,cancelled", NULL },
        { "cancelled while it runs", LEGACY, "yes", WAITS, "call turn cancel",
          ALLOW " " RUN " stop:cancelled end outcome:error,cancelled free", NULL },
        { "cancelled, it ends by itself", LEGACY, "yes", ENDS, "call turn cancel end",
          ALLOW " " RUN " stop:cancelled end outcome:ok,cancelled free", NULL },
        { "cancelled twice, it is stopped once", LEGACY, "yes", ENDS, "call turn cancel close end",
          ALLOW " " RUN " stop:cancelled end outcome:ok,cancelled free", NULL },
        { "cancelled between its end and its answer", LEGACY, "yes", WAITS, "call turn end cancel",
          ALLOW " " RUN " end outcome:ok,cancelled free", NULL },
        { "cancelled after its answer", LEGACY, "yes", ANSWERS, "call turn cancel",
          ALLOW " " RUN " end outcome:ok answer free", "here" },
        { "denied, cancelled", LEGACY, "no", ANSWERS, "call cancel turn",
          DENY " outcome:error,cancelled", NULL },
        { "its client goes before it is recorded", LEGACY, "yes", ANSWERS, "call gone turn",
          ALLOW " outcome:error,cancelled", NULL },
        { "its client goes while it runs", LEGACY, "yes", WAITS, "call turn gone",
          ALLOW " " RUN " stop:cancelled end outcome:error,cancelled free", NULL },
        { "its client goes between its end and its answer", LEGACY, "yes", WAITS,
          "call turn end gone", ALLOW " " RUN " end outcome:ok,cancelled free", NULL },
        { "orch closes before it is recorded", LEGACY, "yes", ANSWERS, "call close turn",
          ALLOW " outcome:error,cancelled answer", "cancelled: before it ran" },
        { "orch closes before it is recorded, by the program", HOST, "yes", ANSWERS, "call close",
          ALLOW " outcome:error,cancelled answer", "cancelled: before it ran" },
        { "orch closes while it runs", LEGACY, "yes", WAITS, "call turn close",
          ALLOW " " RUN " stop:cancelled end outcome:error,cancelled answer free",
          "cancelled: orch is closing" },
        { "never an answer", LEGACY, "yes_short", WAITS, "call turn",
          ALLOW " " RUN " stop:timeout end outcome:error answer free",
          "failed: no answer within 0.001 s (the row)" },
        { "never an answer, it ends by itself", LEGACY, "yes_short", ENDS, "call turn await end",
          ALLOW " " RUN " stop:timeout end outcome:ok answer free", "\"done\"" },
        { "past its time a part of it ends by itself", LEGACY, "yes_short", LINGERS,
          "call turn await end", ALLOW " " RUN " late end outcome:ok answer free", "\"done\"" },
        { "cancelled past its time", LEGACY, "yes_short", LINGERS, "call turn await cancel",
          ALLOW " " RUN " late stop:cancelled end outcome:error,cancelled free", NULL },
        { "the policies are swapped while it runs", LEGACY, "yes", WAITS, "call turn swap end",
          ALLOW " " RUN " end outcome:ok answer free", "\"done\"" },
        { "the policies are swapped before it is recorded", LEGACY, "yes", WAITS,
          "call swap turn end", ALLOW " " RUN " end outcome:ok answer free", "\"done\"" },
        { "its tool is replaced while it runs", LEGACY, "yes", WAITS,
          "call turn replace end turn swap", ALLOW " " RUN " end outcome:ok answer free",
          "\"done\"" },
        { "its tool is replaced before it is recorded", LEGACY, "yes", WAITS,
          "call replace turn end turn swap", ALLOW " " RUN " end outcome:ok answer free",
          "\"done\"" },
    };
    run_rows(rows, ORCH_ARRAY_LEN(rows));
}

/* No line, no call; no outcome, no answer. */
static void unrecorded(void **state)
{
    (void)state;
    static const struct row rows[] = {
        { "there is no log", LEGACY, "yes", ANSWERS, "unlogged call turn", "answer",
          "not run: the audit log cannot be written" },
        { "there is no log, denied", LEGACY, "no", ANSWERS, "unlogged call turn", "answer",
          "not run: the audit log cannot be written" },
        { "there is no log, unknown", LEGACY, "nothing", ANSWERS, "unlogged call turn", "answer",
          "not run: the audit log cannot be written" },
        { "no space for its decision", LEGACY, "yes", ANSWERS, "full call turn", "answer",
          "not run: no space for the record" },
        { "no space for its decision, cancelled", LEGACY, "yes", ANSWERS, "full call cancel turn",
          "", NULL },
        { "no space for the decision of one, space for the next's", LEGACY, "yes", ANSWERS,
          "full call full call turn", ALLOW " " RUN " end outcome:ok answer answer free", "here" },
        { "its decision cannot be written", LEGACY, "yes", ANSWERS, "unwritable call turn",
          "answer", "not run: the audit log cannot be written" },
        { "its decision cannot be written, unknown", LEGACY, "nothing", ANSWERS,
          "unwritable call turn", "answer", "not run: the audit log cannot be written" },
        { "its decision cannot be written, by the program", HOST, "yes", ANSWERS, "unwritable call",
          "answer", "not run: the audit log cannot be written" },
        { "its decision cannot be written, cancelled", LEGACY, "yes", ANSWERS,
          "unwritable call cancel turn", "", NULL },
        { "after that, each is refused", LEGACY, "yes", ANSWERS, "unwritable call turn call turn",
          "answer answer", "not run: the audit log cannot be written" },
        { "its outcome is refused", LEGACY, "yes", WAITS, "call turn withheld end",
          ALLOW " " RUN " end answer free", "failed: the outcome is refused" },
        { "its outcome cannot be written", LEGACY, "yes", WAITS, "call turn unwritable end",
          ALLOW " " RUN " end answer free", "the answer is withheld" },
        { "its outcome cannot be written, by the program", HOST, "yes", WAITS,
          "call turn unwritable end", ALLOW " " RUN " end answer free", "the answer is withheld" },
        { "the outcome of a denial cannot be written", LEGACY, "no", ANSWERS,
          "unwritable call turn", "answer", "not run: the audit log cannot be written" },
        { "its outcome cannot be written, cancelled", LEGACY, "yes", WAITS,
          "call turn unwritable cancel", ALLOW " " RUN " stop:cancelled end free", NULL },
        { "its outcome cannot be written, its time is over", LEGACY, "yes_short", WAITS,
          "call turn unwritable", ALLOW " " RUN " stop:timeout end answer free",
          "the answer is withheld" },
    };
    run_rows(rows, ORCH_ARRAY_LEN(rows));
}

/* What hangs on it: questions and the task of the tasks extension, whatever ends it. */
static void parts(void **state)
{
    (void)state;
#define NOBODY "nobody waits for the call any more"
#define ASKED ALLOW " " RUN " asked "
#define PARKED ALLOW " " RUN " input_required "
    static const struct row rows[] = {
        { "answered", LEGACY, "yes", ASKS, "call turn accept",
          ASKED "told end outcome:ok answer free", "\\\"action\\\":\\\"accept\\\"" },
        { "refused", LEGACY, "yes", ASKS, "call turn refuse",
          ASKED "told end outcome:error answer free",
          "the client refused elicitation/create: not now" },
        { "it cannot be asked", MUTE, "yes", ASKS, "call turn",
          ALLOW " " RUN " end outcome:error answer free", "the client does not offer elicitation" },
        { "cancelled while asked", LEGACY, "yes", ASKS, "call turn cancel",
          ASKED "stop:cancelled withdrawn told end outcome:error,cancelled free", NULL },
        { "it answers what it has cancelled", LEGACY, "yes", ASKS, "call turn cancel accept",
          ASKED "stop:cancelled withdrawn told end outcome:error,cancelled free", NULL },
        { "its client goes while asked", LEGACY, "yes", ASKS, "call turn gone",
          ASKED "stop:cancelled told end outcome:error,cancelled free", NULL },
        { "it ends while asked", LEGACY, "yes", ASKS, "call turn end",
          ASKED "withdrawn told end outcome:ok answer free", "\"done\"" },
        { "it ends while asked, and is answered then", LEGACY, "yes", ASKS, "call turn end accept",
          ASKED "withdrawn told end outcome:ok answer free", "\"done\"" },
        { "its time stands still while it asks", LEGACY, "yes_short", ASKS,
          "call turn loop loop loop accept", ASKED "told end outcome:ok answer free", "accept" },
        { "its time goes on when it was answered", LEGACY, "yes_short", ASKS_ON,
          "call turn loop accept", ASKED "told stop:timeout end outcome:error answer free",
          "no answer within" },
        { "its outcome cannot be written while asked", LEGACY, "yes", ASKS,
          "call turn unwritable accept", ASKED "told end answer free", "the answer is withheld" },
        { "its client is gone when it asks", LEGACY, "yes", ENDS, "call turn gone ask end",
          ALLOW " " RUN " stop:cancelled " NOBODY " end outcome:ok,cancelled free", NULL },
        { "cancelled when it asks", LEGACY, "yes", ENDS, "call turn cancel ask end",
          ALLOW " " RUN " stop:cancelled " NOBODY " end outcome:ok,cancelled free", NULL },

        { "parked, answered", MODERN, "yes", ASKS, "call turn loop back",
          PARKED "told end outcome:ok answer free", "accept" },
        { "parked, its session ends", MODERN, "yes", ASKS, "call turn loop unpark",
          PARKED "stop:cancelled end told outcome:error,cancelled free", "input_required" },
        { "parked, answered in vain", MODERN, "yes", ASKS, "call turn loop unpark back",
          PARKED "stop:cancelled end told answer outcome:error,cancelled free",
          "requestState is not valid" },
        { "parked, it ends, and the answer waits", MODERN, "yes", ASKS,
          "call turn loop end loop loop back", PARKED "end told outcome:ok answer free",
          "\"done\"" },
        { "parked, it ends, nobody comes back", MODERN, "yes", ASKS,
          "call turn loop end loop loop unpark", PARKED "end told outcome:ok free",
          "input_required" },
        { "cancelled before it is parked", MODERN, "yes", ASKS, "call turn cancel",
          ALLOW " " RUN " stop:cancelled end told outcome:error,cancelled free", NULL },
        { "cancelled and answered before it is parked", MODERN, "yes", ASKS,
          "call turn cancel turn",
          ALLOW " " RUN " stop:cancelled end told outcome:error,cancelled free", NULL },
        { "its client is gone before it is parked", MODERN, "yes", ASKS, "call turn gone",
          ALLOW " " RUN " stop:cancelled end told outcome:error,cancelled free", NULL },
        { "its modern client is gone when it asks", MODERN, "yes", ENDS, "call turn gone ask end",
          ALLOW " " RUN " stop:cancelled " NOBODY " end outcome:ok,cancelled free", NULL },
        { "parked, it asks once more", MODERN, "yes", ASKS, "call turn loop ask back",
          PARKED "asks_also told end told_also outcome:ok answer free", "accept" },

        { "a task", MODERN, "yes", BECOMES_TASK, "call turn end",
          ALLOW " " RUN " task end outcome:ok free", "\"status\":\"working\"" },
        { "a task, orch closes", MODERN, "yes", BECOMES_TASK, "call turn close",
          ALLOW " " RUN " task stop:cancelled end outcome:error,cancelled free", "working" },
        { "a task outlives its client", MODERN, "yes", BECOMES_TASK, "call turn gone end",
          ALLOW " " RUN " task end outcome:ok free", "working" },
        { "a task is cancelled", MODERN, "yes", BECOMES_TASK, "call turn cancel_task",
          ALLOW " " RUN " task answer stop:cancelled end outcome:error,cancelled free",
          "\"resultType\":\"complete\"" },
        { "no task for such a client", LEGACY, "yes", BECOMES_TASK, "call turn",
          ALLOW " " RUN " end outcome:error answer free", "does not offer the tasks extension" },
    };
    run_rows(rows, ORCH_ARRAY_LEN(rows));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decisions),
        cmocka_unit_test(ends),
        cmocka_unit_test(unrecorded),
        cmocka_unit_test(parts),
    };
    return cmocka_run_group_tests(tests, open_host, close_host);
}
