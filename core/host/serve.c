/* Serving MCP: who is connected by which transport, and what is offered to them. */
#include "host.h"

#include "../base/hash.h"
#include "../base/log.h"
#include "../mcp/headers.h"
#include "../mcp/stdio.h"
#include "../mcp/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

enum {
    EOF_GRACE_MS = 1000, /* calls under way when the input ends may still answer */
    CANCEL_MS = 500,     /* then they are cancelled, and answered so */
    TICK_MS = 2000,      /* progress of a server's start */
    DRAIN_MS = 200,
    PAGE_TOOLS = 500,
};

#define OWN_INFO "{\"name\":\"orch\",\"version\":\"" ORCH_VERSION "\"}"

/* Who started us: uid and program. */
static char *parent_caller(void)
{
    char link[64], exe[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/%d/exe", getppid());
    ssize_t n = readlink(link, exe, sizeof exe - 1);
    exe[n < 0 ? 0 : n] = 0;
    return orch_xasprintf("uid:%u %s", getuid(), exe[0] ? exe : "unknown");
}

/* One caller: what the ops of its MCP sessions get. */
struct caller {
    struct caller *next;
    struct orch *o;
    struct orch_session *session;
    unsigned in_flight; /* requests of its modern HTTP clients */
};

struct serving {
    struct serving *next;
    struct orch *o;
    struct caller *callers;
    struct orch_mcp_server_ops ops;
    /* stdio */
    struct orch_mcp_session *mcp;
    struct orch_mcp_stdio *stdio;
    struct orch_timer *grace, *tick;
    bool ending, cancelled;
    bool waiting; /* for the upstream: calls and lists are held */
    unsigned ticks;
    /* http */
    struct orch_http_server *http;
    struct orch_mcp_endpoint *endpoint;
    uint8_t token_sha256[ORCH_SHA256_BYTES];
    const char *hosts[5];
    char *host;
    char header_why[256]; /* what http_check_params found */
    int status;
    char why[512];
    void (*done)(void *ud, int status, const char *why);
    void *ud;
};

static struct caller *caller_of(struct serving *v, const char *name)
{
    struct caller *c = v->callers;
    while (c && strcmp(c->session->caller, name) != 0)
        c = c->next;
    if (c)
        return c;
    c = orch_xmalloc(sizeof *c);
    *c = (struct caller){ v->callers, v->o, orch_session_new(&v->o->calls, name), 0 };
    v->callers = c;
    return c;
}

/* ---- what sessions are answered */

static int ops_tools_list(void *ud, struct orch_slice cursor, struct orch_buf *out,
                          struct orch_buf *next, struct orch_err *err)
{
    struct caller *k = ud;
    const struct orch_current *cur = &k->o->current;
    const struct orch_generation *g = cur->gen;
    if (cur->problem)
        return orch_err_setc(err, ORCH_CLASS_UPSTREAM, EIO, "%s", cur->problem);
    if (!cursor.n && g->n_tools <= PAGE_TOOLS) {
        orch_buf_slice(out, (struct orch_slice){ g->list.p, g->list.n });
        return 0;
    }
    /* A cursor is the name that the page before ended with. */
    size_t i = 0, n = 0;
    if (cursor.n) {
        while (i < g->n_tools && !orch_slice_eq(cursor, g->tools[i]->wire_name))
            i++;
        if (i++ == g->n_tools)
            return orch_err_setc(
                err, ORCH_CLASS_USAGE, EINVAL,
                "tools/list: unknown cursor; the list may have changed, begin anew");
    }
    orch_buf_char(out, '[');
    for (; i < g->n_tools && n < PAGE_TOOLS; i++) {
        if (!g->tools[i]->listed)
            continue;
        if (n++)
            orch_buf_char(out, ',');
        orch_buf_str(out, g->tools[i]->definition);
    }
    orch_buf_char(out, ']');
    if (i < g->n_tools)
        orch_buf_str(next, g->tools[i - 1]->wire_name);
    return 0;
}

static void ops_tool_call(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                          const struct orch_mcp_params *p)
{
    struct caller *k = ud;
    if (p->state)
        orch_call_resume(k->session, rq, "tools/call", d, p);
    else
        orch_call_from_mcp(k->session, rq, d, p);
}

static void ops_request(void *ud, struct orch_mcp_request *rq, const struct orch_json_doc *d,
                        const char *method, const struct orch_mcp_params *p)
{
    struct caller *k = ud;
    if (strncmp(method, "tasks/", 6) == 0)
        orch_job_request(k->session, rq, d, method, p);
    else if (p->state)
        orch_call_resume(k->session, rq, method, d, p);
    else
        orch_call_request(k->session, rq, d, method, p);
}

static void ops_cancel(void *ud, struct orch_mcp_request *rq)
{
    (void)ud;
    orch_call_cancel_mcp(rq);
}

static void ops_detach(void *ud, struct orch_mcp_request *rq)
{
    (void)ud;
    orch_call_detach_mcp(rq);
}

static unsigned features_of(const struct orch *o)
{
    const struct orch_offer *offer = &o->calls.offer;
    unsigned own = o->serving.upstream ? 0 : o->current.gen->features;
    return (offer->state ? offer->features : own) | ORCH_MCP_TASKS;
}

static struct orch_mcp_server_ops server_ops(const struct orch *o)
{
    return (struct orch_mcp_server_ops){ .tools_list = ops_tools_list,
                                         .tool_call = ops_tool_call,
                                         .request = ops_request,
                                         .cancel = ops_cancel,
                                         .detach = ops_detach,
                                         .server_info = o->serving.server_info
                                                            ? o->serving.server_info
                                                            : OWN_INFO,
                                         .instructions = o->serving.instructions,
                                         .features = features_of(o),
                                         .max_calls = o->current.gen->cfg.calls };
}

struct change {
    unsigned what;
    struct orch_slice uri, task, members;
};

static void tell(void *ud, struct orch_mcp_session *s)
{
    const struct change *c = ud;
    if (c->task.n)
        orch_mcp_session_task_changed(s, c->task, c->members);
    else if (c->what)
        orch_mcp_session_changed(s, (enum orch_mcp_change)c->what);
    else
        orch_mcp_session_resource_updated(s, c->uri);
}

static void tell_all(struct orch *o, struct change c)
{
    for (struct serving *v = o->serving.list; v; v = v->next) {
        if (v->mcp && !v->waiting) /* which has given no list yet */
            tell(&c, v->mcp);
        if (v->endpoint)
            orch_mcp_endpoint_each(v->endpoint, tell, &c);
    }
}

void orch_serve_changed(void *ud, unsigned what, struct orch_slice uri)
{
    tell_all(ud, (struct change){ .what = what, .uri = uri });
}

void orch_serve_swapped(void *ud, const struct orch_generation *before)
{
    struct orch *o = ud;
    const struct orch_generation *g = o->current.gen;
    bool tools = g->list.n != before->list.n || memcmp(g->list.p, before->list.p, g->list.n) != 0;
    bool offer = memcmp(g->offer_digest, before->offer_digest, sizeof g->offer_digest) != 0;
    unsigned either = g->features | before->features;
    for (struct serving *v = o->serving.list; v; v = v->next)
        v->ops.features = features_of(o);
    unsigned what = (tools ? ORCH_MCP_TOOLS_CHANGED : 0u) |
                    (offer && (either & ORCH_MCP_RESOURCES) ? ORCH_MCP_RESOURCES_CHANGED : 0u) |
                    (offer && (either & ORCH_MCP_PROMPTS) ? ORCH_MCP_PROMPTS_CHANGED : 0u);
    if (what)
        orch_serve_changed(o, what, (struct orch_slice){ 0 });
}

void orch_serve_task_changed(void *ud, struct orch_slice id, struct orch_slice members)
{
    tell_all(ud, (struct change){ .task = id, .members = members });
}

/* Calls under way are cancelled, their outcomes written. */
static void serving_free(struct serving *v, bool hurry)
{
    struct orch *o = v->o;
    for (struct serving **at = &o->serving.list; *at; at = &(*at)->next)
        if (*at == v) {
            *at = v->next;
            break;
        }
    if (v->mcp)
        orch_mcp_session_end(v->mcp);
    for (struct caller *k = v->callers; k; k = k->next)
        orch_calls_unpark(&o->calls, k->session);
    orch_calls_run(&o->calls);
    if (v->stdio)
        orch_mcp_stdio_drain(v->stdio, DRAIN_MS);
    orch_mcp_stdio_free(v->stdio);
    orch_mcp_session_free(v->mcp);
    orch_mcp_endpoint_free(v->endpoint);
    orch_http_server_free(v->http);
    while (v->callers) {
        struct caller *k = v->callers;
        v->callers = k->next;
        k->session->mcp = NULL;
        orch_session_unref(k->session);
        free(k);
    }
    orch_timer_free(v->grace);
    orch_timer_free(v->tick);
    if (v->stdio) {
        orch_upstream_free(o->serving.upstream, hurry);
        o->serving.upstream = NULL;
    }
    free(v->host);
    free(v);
}

void orch_serve_stop(void *ud)
{
    struct orch *o = ud;
    while (o->serving.list)
        serving_free(o->serving.list, true);
}

/* ---- stdio */

static void serving_finish(void *ud)
{
    struct serving *v = ud;
    void (*done)(void *ud, int status, const char *why) = v->done;
    void *done_ud = v->ud;
    int status = v->status;
    char why[sizeof v->why];
    memcpy(why, v->why, sizeof why);
    serving_free(v, false);
    done(done_ud, status, why[0] ? why : NULL);
}

static void finish_when_idle(void *ud)
{
    struct serving *v = ud;
    if (v->ending && orch_mcp_session_in_flight(v->mcp) == 0)
        orch_timer_set(v->grace, 0);
}

static void serving_batch_end(void *ud)
{
    struct serving *v = ud;
    orch_calls_run(&v->o->calls);
}

/* Input ended: what is under way gets a moment to answer, then it is cancelled, then everything
 * ends. What is held for the upstream waits for that, whose start is bounded. */
static void serving_closed(void *ud, const char *why)
{
    struct serving *v = ud;
    if (why)
        snprintf(v->why, sizeof v->why, "%s", why);
    v->ending = true;
    if (why || orch_mcp_session_in_flight(v->mcp) == 0)
        orch_timer_set(v->grace, 0);
    else if (!v->waiting)
        orch_timer_set(v->grace, EOF_GRACE_MS);
}

static void grace_over(void *ud)
{
    struct serving *v = ud;
    if (v->why[0] || v->cancelled || orch_mcp_session_in_flight(v->mcp) == 0) {
        serving_finish(v);
        return;
    }
    v->cancelled = true;
    for (struct caller *k = v->callers; k; k = k->next)
        orch_calls_cancel(k->session, "the client's input ended");
    orch_timer_set(v->grace, CANCEL_MS);
}

/* While the upstream starts: clients that can hear how it goes do not give up so soon. */
static void tick(void *ud)
{
    struct serving *v = ud;
    cleanup_buf struct orch_buf b = { 0 };
    if (v->ending && orch_mcp_stdio_gone(v->stdio)) {
        serving_closed(v, "nobody reads the output");
        return;
    }
    orch_upstream_doing(v->o->serving.upstream, &b);
    /* Progress has to grow, and the server's own, which often counts from 1, comes after it. */
    orch_mcp_session_held_progress(v->mcp, ++v->ticks * (TICK_MS / 1e6),
                                   (struct orch_slice){ b.p, b.n });
    orch_timer_set(v->tick, TICK_MS);
}

/* The server behind the proxy is ready or has failed: what the client sent meanwhile is handled
 * now. */
static void upstream_settled(void *ud)
{
    struct serving *v = ud;
    struct orch *o = v->o;
    if (orch_upstream_ready(o->serving.upstream)) {
        int r = orch_current_reload(&o->current, "the upstream is ready");
        if (r < 0) {
            v->status = orch_class_exit((enum orch_class) - r);
            snprintf(v->why, sizeof v->why, "%s", o->current.error.p);
            orch_timer_set(v->grace, 0);
            return;
        }
    }
    v->waiting = false;
    orch_timer_cancel(v->tick);
    orch_mcp_session_hold(v->mcp, false);
    orch_calls_run(&o->calls);
    if (v->ending)
        serving_closed(v, NULL);
}

static void upstream_changed(void *ud)
{
    struct serving *v = ud;
    orch_current_reload(&v->o->current, "the upstream's tools changed");
}

static int start_upstream(struct serving *v, const struct orch_serve_opts *so, struct orch_err *err)
{
    struct orch *o = v->o;
    if (!so->protect)
        orch_log(ORCH_WARN,
                 "%s: nothing keeps this server from rewriting the policies that judge it", so->as);
    v->waiting = true;
    o->serving.upstream = orch_upstream_start(&o->calls,
                                              &(struct orch_upstream_opts){
                                                  .name = so->as,
                                                  .command = so->command,
                                                  .start_ms = so->start_ms,
                                                  .timeout_ms = so->timeout_ms,
                                                  .via = so->protect ? o->env.protect : NULL,
                                                  .via_ud = o->env.ud,
                                                  .settled = upstream_settled,
                                                  .changed = upstream_changed,
                                                  .ud = v },
                                              err);
    if (!o->serving.upstream)
        return -EIO;
    orch_mcp_session_hold(v->mcp, true);
    v->ops.features = features_of(o);
    v->tick = orch_timer_new(o->loop, tick, v);
    orch_timer_set(v->tick, TICK_MS);
    return 0;
}

static int serve_stdio(struct serving *v, const struct orch_serve_opts *so,
                       const struct orch_json_limits *limits, struct orch_err *err)
{
    struct orch *o = v->o;
    cleanup_free char *name = parent_caller();
    struct caller *k = caller_of(v, name);
    v->mcp = orch_mcp_session_new(&v->ops, k, limits);
    k->session->mcp = v->mcp;
    v->grace = orch_timer_new(o->loop, grace_over, v);
    v->stdio = orch_mcp_stdio_new(o->loop, v->mcp,
                                  &(struct orch_mcp_stdio_opts){ .in_fd = STDIN_FILENO,
                                                                 .out_fd = STDOUT_FILENO,
                                                                 .max_line = limits->bytes,
                                                                 .batch_end = serving_batch_end,
                                                                 .closed = serving_closed,
                                                                 .ud = v },
                                  err);
    if (!v->stdio)
        return -EIO;
    orch_mcp_session_on_idle(v->mcp, finish_when_idle, v);
    if (so->command && start_upstream(v, so, err) < 0)
        return -EIO;
    return 0;
}

/* ---- http */

static void *http_peer(void *ud, const struct orch_http_peer *peer)
{
    char name[32] = "http token";
    if (peer->local)
        snprintf(name, sizeof name, "uid:%u", (unsigned)peer->uid);
    return caller_of(ud, name);
}

static unsigned *http_in_flight(void *peer)
{
    struct caller *k = peer;
    return &k->in_flight;
}

static void http_handled(void *ud)
{
    struct serving *v = ud;
    orch_calls_want(&v->o->calls);
}

static const char *http_check_params(void *ud, const struct orch_http_request *q,
                                     const struct orch_json_doc *d, struct orch_slice tool,
                                     uint32_t args)
{
    struct serving *v = ud;
    const struct orch_tool *t = orch_generation_tool(v->o->current.gen, tool);
    return t ? orch_mcp_params_check(&t->headers, q, d, args, v->header_why, sizeof v->header_why)
             : NULL;
}

static void http_request(void *ud, const struct orch_http_request *q, struct orch_http_reply *r)
{
    struct serving *v = ud;
    if (orch_slice_eq(q->path, "/mcp"))
        orch_mcp_endpoint_request(v->endpoint, q, r);
    else
        orch_http_reply_send(r, 404, NULL, 0, (struct orch_slice){ 0 });
}

/* The token in the state directory, made at the first need. */
static int own_token(struct orch *o, struct orch_buf *token, struct orch_err *err)
{
    cleanup_free char *path = orch_xasprintf("%s/http.token", o->paths.state);
    uint8_t random[32];
    int r = orch_read_file(AT_FDCWD, path, 4096, token);
    if (r == 0) {
        while (token->n && (token->p[token->n - 1] == '\n' || token->p[token->n - 1] == ' '))
            token->p[--token->n] = 0;
        if (token->n >= 16)
            return 0;
        return orch_err_setc(
            err, ORCH_CLASS_CONFIG, EINVAL,
            "%s: a token needs at least 16 characters; remove the file and a new one is made",
            path);
    }
    if (r == -ENOENT && (r = orch_random(random, sizeof random)) == 0) {
        orch_buf_hex(token, random, sizeof random);
        r = orch_write_file(AT_FDCWD, path, token->p, token->n, 0600);
    }
    if (r < 0)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, -r, "%s: the token cannot be read or made: %s",
                             path, strerror(-r));
    orch_log(ORCH_INFO, "mcp http: the bearer token is in %s", path);
    return 0;
}

static int serve_http(struct serving *v, const struct orch_serve_opts *so,
                      const struct orch_json_limits *limits, struct orch_err *err)
{
    struct orch *o = v->o;
    const char *listen = so->listen                        ? so->listen
                         : o->current.gen->cfg.http_listen ? o->current.gen->cfg.http_listen
                                                           : "127.0.0.1:8700";
    const char *configured = so->token ? so->token : o->current.gen->cfg.http_token;
    bool local = strncmp(listen, "unix:", 5) == 0;
    cleanup_buf struct orch_buf token = { 0 };
    if (configured)
        orch_buf_str(&token, configured);
    else if (!local && own_token(o, &token, err) < 0)
        return -EIO;
    if (configured && token.n < 16)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL,
                             "http.token: a token needs at least 16 characters");
    orch_sha256(token.p, token.n, v->token_sha256);
    const char *colon = strrchr(listen, ':');
    v->host = orch_xstrndup(listen, colon ? (size_t)(colon - listen) : strlen(listen));
    v->hosts[0] = "localhost";
    v->hosts[1] = "127.0.0.1";
    v->hosts[2] = "[::1]";
    v->hosts[3] = v->host;
    v->http = orch_http_server_new(o->loop,
                                   &(struct orch_http_server_opts){
                                       .listen = listen,
                                       .on_request = http_request,
                                       .ud = v,
                                       .limits = { .body_bytes = limits->bytes } },
                                   err);
    if (!v->http)
        return -EIO;
    v->endpoint = orch_mcp_endpoint_new(o->loop,
                                        &(struct orch_mcp_endpoint_opts){
                                            .ops = &v->ops,
                                            .peer = http_peer,
                                            .in_flight = http_in_flight,
                                            .handled = http_handled,
                                            .check_params = http_check_params,
                                            .ud = v,
                                            .limits = *limits,
                                            .token_sha256 = token.n ? v->token_sha256 : NULL,
                                            .hosts = local ? NULL : v->hosts });
    const char *address = orch_http_server_address(v->http);
    cleanup_free char *line = orch_xasprintf("mcp http: listening on %s%s%s",
                                             local ? "" : "http://", address, local ? "" : "/mcp");
    orch_log_print(orch_slice_str(line));
    return 0;
}

int orch_serve(void *ud, const struct orch_serve_opts *so, struct orch_err *err)
{
    struct orch *o = ud;
    bool stdio = strcmp(so->transport, "stdio") == 0;
    for (struct serving *v = o->serving.list; v && stdio; v = v->next)
        if (v->mcp)
            return orch_err_setc(err, ORCH_CLASS_USAGE, EBUSY,
                                 "standard input and output are served already");
    if (!stdio && strcmp(so->transport, "http") != 0)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "unknown transport \"%s\"; there are \"stdio\" and \"http\"",
                             so->transport);
    if (so->command && !stdio)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "a command is served over stdio only, not over http yet");
    if (so->command && o->paths.origin == ORCH_CONFIG_BUILTIN)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT,
                             "there is no configuration, so nothing says what this server's tools "
                             "may do. Write %s/orchestrator.lua:\n"
                             "  return {}\n"
                             "and %s/policies/tools.lua, for instance:\n"
                             "  return { rules = { { tool = \"%s__*\", action = \"allow\" } } }\n"
                             "then run: orch trust",
                             o->paths.cwd, o->paths.cwd, so->as);
    if (orch_script_offer(o, so, err) < 0 || orch_current_need(&o->current, err) < 0 ||
        orch_host_audit(o, err) < 0)
        return err->code > 0 ? -err->code : -EIO;
    struct serving *v = orch_xcalloc(1, sizeof *v);
    v->o = o;
    v->ops = server_ops(o);
    v->next = o->serving.list;
    o->serving.list = v;
    struct orch_json_limits limits = { .bytes = o->current.gen->cfg.message_bytes,
                                       .depth = o->current.gen->cfg.depth };
    if ((stdio ? serve_stdio(v, so, &limits, err) : serve_http(v, so, &limits, err)) < 0) {
        serving_free(v, true);
        return -EIO;
    }
    v->done = so->done;
    v->ud = so->ud;
    orch_current_watch(&o->current);
    orch_host_control(o);
    return 0;
}
