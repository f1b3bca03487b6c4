#include "upstream.h"

#include "../base/log.h"
#include "../mcp/client.h"

#include <errno.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

enum {
    PAGES_MAX = 100,
    TOOLS_MAX = 1000,
    QUALIFIED_MAX = 64, /* characters of SERVER__TOOL */
    RELIST_MS = 200,
    LINE_SHOWN = 200,
    QUESTIONS_MAX = 64,
    ID_MAX_BYTES = 256,
};

/* What the server asks the client's user or model, until it is answered. */
struct question {
    struct question *next;
    struct orch_upstream *u;
    char *id; /* the server's, as JSON */
    struct orch_ask *ask;
};

struct orch_upstream {
    struct orch_calls *calls;
    struct orch_tool_source source;
    char *name, *program;
    struct orch_mcp_client *client;
    int64_t start_ms, timeout_ms;
    struct orch_timer *late;                /* its start, or its list, takes too long */
    struct orch_mcp_client_call *list_call; /* under way */
    struct orch_buf tools;                  /* JSON: [page.tools, page.tools, …] */
    struct orch_buf listing;                /* the same while it is being asked for */
    unsigned pages;
    struct question *questions;
    unsigned n_questions;
    struct orch_timer *relist;
    bool settled, relisting, relist_wanted; /* settled: ready or failed once */
    void (*on_settled)(void *ud);
    void (*changed)(void *ud);
    void *ud;
    struct orch_err problem; /* class 0: none */
    struct orch_err start_error;
};

static void list_page(struct orch_upstream *u, struct orch_slice cursor);

static void settle(struct orch_upstream *u, const struct orch_err *err)
{
    bool relisting = u->relisting;
    u->relisting = false;
    orch_timer_cancel(u->late);
    if (err) {
        /* A list that cannot be had again leaves the one before in force, unless the server is
         * gone. */
        if (!relisting || !orch_mcp_client_alive(u->client))
            u->problem = *err;
        orch_log(ORCH_ERROR, "%s", err->msg);
    }
    u->calls->current->problem = u->problem.cls ? u->problem.msg : NULL;
    if (!u->settled) {
        u->settled = true;
        u->on_settled(u->ud);
    } else if (relisting && !err) {
        u->changed(u->ud);
    }
}

static void page_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_upstream *u = ud;
    u->list_call = NULL;
    if (err) {
        settle(u, err);
        return;
    }
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    struct orch_err wrong = { 0 };
    if (orch_json_scan(&d, result, &(struct orch_json_limits){ 0 }, &fault) < 0) {
        orch_err_setc(&wrong, ORCH_CLASS_UPSTREAM, EPROTO, "%s: its tools/list answer: %s", u->name,
                      fault.rule);
        settle(u, &wrong);
        return;
    }
    uint32_t tools = orch_json_get(&d, 0, "tools"), next = orch_json_get(&d, 0, "nextCursor");
    if (!tools || d.toks[tools].type != ORCH_JSON_ARRAY) {
        orch_err_setc(&wrong, ORCH_CLASS_UPSTREAM, EPROTO,
                      "%s: its tools/list answer has no list of tools", u->name);
        settle(u, &wrong);
        return;
    }
    orch_buf_char(&u->listing, u->listing.n ? ',' : '[');
    orch_buf_slice(&u->listing, orch_json_raw(&d, tools));
    if (next && d.toks[next].type == ORCH_JSON_STRING && ++u->pages < PAGES_MAX) {
        list_page(u, orch_json_raw(&d, next));
        return;
    }
    orch_buf_char(&u->listing, ']');
    orch_buf_free(&u->tools);
    u->tools = u->listing;
    u->listing = (struct orch_buf){ 0 };
    settle(u, NULL);
}

static void list_page(struct orch_upstream *u, struct orch_slice cursor)
{
    cleanup_buf struct orch_buf params = { 0 };
    struct orch_err err = { 0 };
    if (cursor.n) {
        orch_buf_str(&params, "{\"cursor\":");
        orch_buf_slice(&params, cursor);
        orch_buf_char(&params, '}');
    }
    u->list_call = orch_mcp_client_call(u->client,
                                        &(struct orch_mcp_client_request){
                                            .method = "tools/list",
                                            .params = { params.p, params.n },
                                            .done = page_done,
                                            .ud = u },
                                        &err);
    if (!u->list_call)
        settle(u, &err);
}

/* One limit for all from the start to the list's last page, and for each later list. */
static void too_late(void *ud)
{
    struct orch_upstream *u = ud;
    char why[128];
    snprintf(why, sizeof why, "no %s answer within %g s (--start-timeout)",
             orch_mcp_client_ready(u->client) ? "tools/list" : orch_mcp_client_opening(u->client),
             (double)u->start_ms / 1000);
    if (!u->settled) {
        orch_mcp_client_give_up(u->client, why); /* which settles it */
        return;
    }
    struct orch_err err = { 0 };
    orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ETIMEDOUT, "%s: %s; the list before stays in force",
                  u->name, why);
    orch_mcp_client_cancel(orch_steal_ptr(&u->list_call), "timeout");
    settle(u, &err);
}

static void ready(void *ud, const struct orch_err *err)
{
    struct orch_upstream *u = ud;
    if (err)
        settle(u, err);
    else
        list_page(u, (struct orch_slice){ 0 });
}

static void lost(void *ud, const struct orch_err *err)
{
    struct orch_upstream *u = ud;
    if (!u->problem.cls)
        settle(u, err);
}

/* However often the server says so, the list is asked for a few times a second at most. */
static void tools_changed(void *ud)
{
    struct orch_upstream *u = ud;
    if (!u->settled || u->relisting || u->relist_wanted)
        return;
    u->relist_wanted = true;
    orch_timer_set(u->relist, RELIST_MS);
}

static void relist(void *ud)
{
    struct orch_upstream *u = ud;
    u->relist_wanted = false;
    u->relisting = true;
    u->listing.n = 0;
    u->pages = 0;
    orch_timer_set(u->late, u->start_ms);
    list_page(u, (struct orch_slice){ 0 });
}

/* ---- calls of its tools */

static void call_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct orch_call *c = ud;
    c->run = NULL;
    if (err) {
        orch_call_rpc_error(c, ORCH_RPC_UPSTREAM_FAILED, orch_slice_str(err->msg));
        orch_call_end(c);
        return;
    }
    /* The result's members as they came, without its braces and the space around them. */
    struct orch_slice members = { result.p + 1, result.n - 2 };
    for (; members.n && strchr(" \t\r\n", *members.p); members.n--)
        members.p++;
    orch_call_members(c, members);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, result, &(struct orch_json_limits){ 0 }, &fault) == 0) {
        uint32_t tok = orch_json_get(&d, 0, "isError");
        c->is_error = tok && d.toks[tok].type == ORCH_JSON_TRUE;
    }
    orch_call_end(c);
}

static void call_progress(void *ud, double done, double total, struct orch_slice message)
{
    orch_call_clock_again(ud);
    orch_call_progress(ud, done, total, message);
}

static void call_start(struct orch_call *c)
{
    struct orch_upstream *u = c->tool->backend_ud;
    struct orch_err err = { 0 };
    c->run = orch_mcp_client_call(u->client,
                                  &(struct orch_mcp_client_request){
                                      .tool = c->tool->name + strlen(u->name) + 2,
                                      .args = { c->args.p, c->args.n },
                                      .meta = { c->meta.p, c->meta.n },
                                      .done = call_done,
                                      .progress = call_progress,
                                      .ud = c },
                                  &err);
    if (c->run)
        orch_call_arm(c);
    else
        call_done(c, (struct orch_slice){ 0 }, &err);
}

static bool call_stop(struct orch_call *c, enum orch_class cls, const char *why)
{
    if (c->run)
        orch_mcp_client_cancel(c->run, cls == ORCH_CLASS_TIMEOUT ? "timeout" : why);
    c->run = NULL;
    return false;
}

static const struct orch_tool_backend backend = {
    .unfinished = "no answer and no progress",
    .start = call_start,
    .stop = call_stop,
};

/* ---- its tools */

static char *string_member(const struct orch_json_doc *d, uint32_t obj, const char *key)
{
    cleanup_buf struct orch_buf b = { 0 };
    uint32_t tok = orch_json_get(d, obj, key);
    if (!tok || orch_json_string(d, tok, &b) < 0)
        return NULL;
    return orch_steal_ptr(&b.p);
}

/* What the server says of a tool, as predicates may see it: everything but the schemas. */
static void put_untrusted(const struct orch_json_doc *d, uint32_t tool, struct orch_buf *out)
{
    static const char *const keys[] = { "title", "description", "annotations" };
    orch_buf_char(out, '{');
    for (size_t i = 0; i < ORCH_ARRAY_LEN(keys); i++) {
        uint32_t v = orch_json_get(d, tool, keys[i]);
        if (!v)
            continue;
        orch_buf_printf(out, "%s\"%s\":", out->n > 1 ? "," : "", keys[i]);
        orch_buf_slice(out, orch_json_raw(d, v));
    }
    orch_buf_char(out, '}');
}

static void add_tool(struct orch_upstream *u, struct orch_generation *g,
                     const struct orch_json_doc *d, uint32_t tok)
{
    cleanup_free char *name = string_member(d, tok, "name");
    uint32_t schema = orch_json_get(d, tok, "inputSchema");
    if (!name || !*name || strlen(u->name) + 2 + strlen(name) > QUALIFIED_MAX) {
        orch_buf_printf(
            &g->notes,
            "%s: a tool is left out: its name %s__%.64s is empty or over %d characters\n", u->name,
            u->name, name ? name : "", QUALIFIED_MAX);
        return;
    }
    struct orch_slice definition = orch_json_raw(d, tok),
                      input = schema ? orch_json_raw(d, schema) : ORCH_SLICE("{}");
    struct orch_tool t = { .wire_name = orch_xstrdup(name),
                           .name = orch_xasprintf("%s__%s", u->name, name),
                           .server = orch_xstrdup(u->name),
                           .definition = orch_xstrndup(definition.p, definition.n),
                           .input = orch_xstrndup(input.p, input.n),
                           .run_ref = LUA_NOREF,
                           .output_ref = LUA_NOREF,
                           .backend = &backend,
                           .backend_ud = u,
                           .timeout_ms = u->timeout_ms,
                           .limit = orch_xstrdup("--timeout") };
    cleanup_buf struct orch_buf untrusted = { 0 };
    struct orch_err err = { 0 };
    put_untrusted(d, tok, &untrusted);
    if (orch_generation_add_tool(g, &t, (struct orch_slice){ untrusted.p, untrusted.n }, &err) < 0)
        orch_buf_printf(&g->notes, "%s: left out: its inputSchema cannot be used: %s\n", t.name,
                        err.msg);
    orch_tool_fini(&t);
}

static int add_tools(void *ud, struct orch_generation *g, struct orch_err *err)
{
    struct orch_upstream *u = ud;
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (!orch_upstream_ready(u) || !u->tools.n)
        return 0;
    if (orch_json_scan(&d, (struct orch_slice){ u->tools.p, u->tools.n },
                       &(struct orch_json_limits){ .bytes = 256 << 20 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_UPSTREAM, EPROTO,
                             "%s: its lists of tools together are too large: %s", u->name,
                             fault.rule);
    uint32_t page = 1;
    size_t n = 0;
    for (uint32_t p = 0; p < d.toks[0].count; p++, page = d.toks[page].next) {
        uint32_t tool = page + 1;
        for (uint32_t i = 0; i < d.toks[page].count && n < TOOLS_MAX;
             i++, n++, tool = d.toks[tool].next)
            if (d.toks[tool].type == ORCH_JSON_OBJECT)
                add_tool(u, g, &d, tool);
    }
    return 0;
}

/* ---- what the server asks */

static void forward_answer(void *ud);

static void question_free(struct question *q)
{
    struct orch_upstream *u = q->u;
    for (struct question **at = &u->questions; *at; at = &(*at)->next)
        if (*at == q) {
            *at = q->next;
            u->n_questions--;
            break;
        }
    orch_loop_unpost(u->calls->loop, forward_answer, q);
    orch_ask_free(q->ask);
    free(q->id);
    free(q);
}

static void forward_answer(void *ud)
{
    struct question *q = ud;
    size_t n;
    const struct orch_ask_item *it = orch_ask_items(q->ask, &n);
    if (it->failed)
        orch_mcp_client_refuse(q->u->client, orch_slice_str(q->id), ORCH_RPC_INTERNAL_ERROR,
                               it->error.p);
    else
        orch_mcp_client_reply(q->u->client, orch_slice_str(q->id),
                              (struct orch_slice){ it->answer.p, it->answer.n });
    question_free(q);
}

static void answered(void *ud) /* in the midst of the call's own affairs */
{
    struct question *q = ud;
    orch_loop_post(q->u->calls->loop, forward_answer, q);
}

/* The call that the server asks for. In the legacy era over stdio it does not say, and the call's
 * rules say what is redacted: so it must be the only one. */
static struct orch_call *asking_call(const struct orch_upstream *u, const char **why)
{
    const struct orch_mcp_client_call *asking = orch_mcp_client_asking(u->client);
    struct orch_call *found = NULL;
    unsigned n = 0;
    for (struct orch_call *c = u->calls->running; c; c = c->next)
        if (c->backend == &backend && c->run && !c->cancelled && (!asking || c->run == asking)) {
            found = c;
            n++;
        }
    *why = n ? "several calls are under way, and it cannot be told for which of them this is asked"
             : "nobody can be asked outside a call";
    return n == 1 ? found : NULL;
}

static unsigned needs_of(const char *method, const struct orch_json_doc *d, uint32_t params)
{
    if (strcmp(method, "sampling/createMessage") == 0)
        return ORCH_MCP_CAP_SAMPLING |
               (orch_json_get(d, params, "tools") ? ORCH_MCP_CAP_SAMPLING_TOOLS : 0);
    uint32_t mode = orch_json_get(d, params, "mode");
    return mode && orch_json_string_eq(d, mode, "url") ? ORCH_MCP_CAP_URL : ORCH_MCP_CAP_FORM;
}

static void asked(void *ud, struct orch_slice id, const char *method, const struct orch_json_doc *d,
                  uint32_t params)
{
    struct orch_upstream *u = ud;
    struct orch_err err = { 0 };
    const char *why = id.n > ID_MAX_BYTES ? "the id is too long"
                                          : "too many questions wait for their answers";
    struct orch_call *c = u->n_questions < QUESTIONS_MAX && id.n <= ID_MAX_BYTES
                              ? asking_call(u, &why)
                              : NULL;
    if (!c) {
        orch_mcp_client_refuse(u->client, id, ORCH_RPC_INTERNAL_ERROR, why);
        return;
    }
    struct question *q = orch_xcalloc(1, sizeof *q);
    *q = (struct question){ .next = u->questions, .u = u, .id = orch_xstrndup(id.p, id.n) };
    struct orch_ask_item *item = orch_xcalloc(1, sizeof *item);
    *item = (struct orch_ask_item){ .key = orch_xasprintf("%s-%u", u->name, ++c->questions),
                                    .method = method,
                                    .needs = needs_of(method, d, params) };
    orch_buf_slice(&item->params, orch_json_raw(d, params));
    q->ask = orch_ask_start(c, item, 1, answered, q, &err);
    if (!q->ask) {
        orch_mcp_client_refuse(u->client, id,
                               err.code == ENOTSUP ? ORCH_RPC_METHOD_NOT_FOUND
                                                   : ORCH_RPC_INTERNAL_ERROR,
                               err.msg);
        free(q->id);
        free(q);
        return;
    }
    u->questions = q;
    u->n_questions++;
    if (orch_ask_done(q->ask))
        answered(q);
}

static void withdrawn(void *ud, struct orch_slice id)
{
    struct orch_upstream *u = ud;
    for (struct question *q = u->questions; q; q = q->next)
        if (orch_slice_eq(id, q->id)) {
            question_free(q);
            return;
        }
}

static void settled_at_start(void *ud)
{
    struct orch_upstream *u = ud;
    settle(u, &u->start_error);
}

static struct orch_mcp_client *start_client(struct orch_upstream *u,
                                            const struct orch_upstream_opts *uo,
                                            struct orch_err *err)
{
    /* Children on the host get PATH, HOME and LANG, nothing else (ORCH_DEPTH: see main.c). */
    static const char *const passed[] = { "PATH", "HOME", "LANG", "ORCH_DEPTH" };
    char *env[ORCH_ARRAY_LEN(passed) + 1];
    size_t n = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(passed); i++)
        if (getenv(passed[i]))
            env[n++] = orch_xasprintf("%s=%s", passed[i], getenv(passed[i]));
    env[n] = NULL;
    struct orch_mcp_client *client =
        orch_mcp_client_new(u->calls->loop,
                            &(struct orch_mcp_client_opts){
                                .name = u->name,
                                .argv = uo->command,
                                .env = (const char *const *)env,
                                .via = uo->via,
                                .via_ud = uo->via_ud,
                                .start_ms = uo->start_ms,
                                .limits = { .bytes = u->calls->current->gen->cfg.message_bytes },
                                .ready = ready,
                                .lost = lost,
                                .tools_changed = tools_changed,
                                .asked = asked,
                                .withdrawn = withdrawn,
                                .ud = u },
                            err);
    while (n)
        free(env[--n]);
    return client;
}

struct orch_upstream *orch_upstream_start(struct orch_calls *cs,
                                          const struct orch_upstream_opts *uo, struct orch_err *err)
{
    struct orch_upstream *u = orch_xcalloc(1, sizeof *u);
    u->calls = cs;
    u->source = (struct orch_tool_source){ .alone = true, .add = add_tools, .ud = u };
    u->relist = orch_timer_new(cs->loop, relist, u);
    u->late = orch_timer_new(cs->loop, too_late, u);
    u->start_ms = uo->start_ms;
    u->timeout_ms = uo->timeout_ms;
    u->on_settled = uo->settled;
    u->changed = uo->changed;
    u->ud = uo->ud;
    u->name = orch_xstrdup(uo->name);
    u->program = orch_xstrdup(uo->command[0]);
    orch_current_add_source(cs->current, &u->source);
    cs->current->problem = "starting";
    u->client = start_client(u, uo, &u->start_error);
    if (!u->client && u->start_error.cls != ORCH_CLASS_UPSTREAM) { /* not to be had protected */
        *err = u->start_error;
        orch_upstream_free(u, true);
        return NULL;
    }
    if (u->client)
        orch_timer_set(u->late, u->start_ms);
    else
        orch_loop_post(cs->loop, settled_at_start, u);
    return u;
}

void orch_upstream_free(struct orch_upstream *u, bool hurry)
{
    if (!u)
        return;
    hurry = hurry || !u->settled;
    orch_current_remove_source(u->calls->current, &u->source);
    u->calls->current->problem = NULL;
    orch_loop_unpost(u->calls->loop, settled_at_start, u);
    orch_timer_free(u->relist);
    orch_timer_free(u->late);
    while (u->questions)
        question_free(u->questions);
    orch_mcp_client_free(u->client, hurry ? ORCH_PROC_HURRY_EOF_MS : ORCH_PROC_EOF_MS,
                         hurry ? ORCH_PROC_HURRY_TERM_MS : ORCH_PROC_TERM_MS);
    orch_buf_free(&u->tools);
    orch_buf_free(&u->listing);
    free(u->name);
    free(u->program);
    free(u);
}

bool orch_upstream_ready(const struct orch_upstream *u)
{
    return u->settled && !u->problem.cls;
}

void orch_upstream_doing(const struct orch_upstream *u, struct orch_buf *out)
{
    struct orch_slice line = u->client ? orch_mcp_client_stderr_line(u->client)
                                       : (struct orch_slice){ 0 };
    orch_buf_str(out, "starting ");
    orch_buf_str(out, u->program);
    if (line.n)
        orch_buf_str(out, ": ");
    orch_escape_terminal(out,
                         (struct orch_slice){ line.p, line.n < LINE_SHOWN ? line.n : LINE_SHOWN },
                         false);
}
