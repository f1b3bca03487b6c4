/* What a handle is made of: opened in order, closed in reverse. What is NULL to open is made at its
 * first need. */
#include "host.h"

#include "../base/log.h"
#include "../http/client.h"
#include "../net/hostaddr.h"
#include "../vm/vm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { CLOSE_MS = 1000 };

struct opening {
    const char *config;
    const struct orch_options *opts;
};

/* ---- paths and loop */

static int open_paths(struct orch *o, const struct opening *with, struct orch_err *err)
{
    const struct orch_options *opts = with->opts;
    if (opts && opts->share)
        o->paths.share = orch_xstrdup(opts->share);
    if (opts && opts->launcher)
        o->paths.launcher = orch_xstrdup(opts->launcher);
    if (opts && opts->agent)
        o->paths.agent = orch_xstrdup(opts->agent);
    int r = orch_paths_find(&o->paths, with->config, err);
    if (r < 0)
        orch_paths_fini(&o->paths);
    return r;
}

static void close_paths(struct orch *o)
{
    orch_paths_fini(&o->paths);
}

static int open_loop(struct orch *o, const struct opening *with, struct orch_err *err)
{
    (void)with;
    o->loop = orch_loop_new(err);
    return o->loop ? 0 : -ENOMEM;
}

static void close_loop(struct orch *o)
{
    orch_loop_free(o->loop);
}

/* ---- the audit log */

static void close_audit(struct orch *o)
{
    orch_audit_close(o->calls.audit);
}

/* ---- calls */

static int open_calls(struct orch *o, const struct opening *with, struct orch_err *err)
{
    (void)with;
    o->calls = (struct orch_calls){
        .loop = o->loop, .current = &o->current, .task_changed = orch_serve_task_changed, .ud = o
    };
    return orch_calls_init(&o->calls, err);
}

static void close_calls(struct orch *o)
{
    orch_calls_fini(&o->calls);
}

/* Cancelled calls end in the next turns of the loop; each still writes its outcome. */
static void end_calls(struct orch *o)
{
    orch_calls_unpark(&o->calls, NULL);
    for (struct orch_session *s = o->calls.sessions; s; s = s->next)
        orch_calls_cancel(s, "orch is closing");
    int64_t deadline = orch_now_us() + CLOSE_MS * 1000;
    while (o->calls.running && orch_now_us() < deadline)
        orch_loop_step(o->loop, 20);
    orch_calls_run(&o->calls);
}

/* ---- policy */

static void push_session(void *ud, lua_State *L, const char *id)
{
    struct orch *o = ud;
    orch_session_push(&o->calls, L, id);
}

static bool steered(void *ud)
{
    const struct orch *o = ud;
    return o->protects != NULL;
}

static bool held(void *ud, int fd)
{
    return orch_protect_holds(ud, fd);
}

static int open_policy(struct orch *o, const struct opening *with, struct orch_err *err)
{
    static const struct orch_current_ops ops = { .lua_tools = &orch_lua_backend,
                                                 .open = orch_bind_open,
                                                 .open_tools = orch_bind_open_tools,
                                                 .session = push_session,
                                                 .steered = steered,
                                                 .held = held,
                                                 .swapped = orch_serve_swapped };
    (void)with;
    (void)err;
    o->current = (struct orch_current){ .loop = o->loop,
                                        .paths = &o->paths,
                                        .hostaddr = orch_hostaddr_new(o->loop),
                                        .ops = &ops,
                                        .ud = o,
                                        .states_host = &o->env };
    return 0;
}

static void close_policy(struct orch *o)
{
    orch_current_fini(&o->current);
    orch_hostaddr_free(o->current.hostaddr);
}

static void close_reload(struct orch *o)
{
    orch_current_unwatch(&o->current);
}

/* ---- tools of its own */

static int add_own(void *ud, struct orch_generation *g, struct orch_err *err)
{
    const struct orch *o = ud;
    for (size_t i = 0; i < o->tools.n; i++)
        if (orch_generation_add_tool(g, &o->tools.list[i], (struct orch_slice){ 0 }, err) < 0)
            return orch_err_wrap(err, "%s: input", o->tools.list[i].name);
    return 0;
}

static int open_tools(struct orch *o, const struct opening *with, struct orch_err *err)
{
    (void)with;
    (void)err;
    o->tools.source = (struct orch_tool_source){ .add = add_own, .ud = o };
    orch_current_add_source(&o->current, &o->tools.source);
    return 0;
}

static void close_tools(struct orch *o)
{
    for (size_t i = 0; i < o->tools.n; i++)
        orch_tool_fini(&o->tools.list[i]);
    free(o->tools.list);
}

/* ---- microVMs and HTTP */

static void vm_progress(void *ud, const char *line)
{
    (void)ud;
    orch_log_print(orch_slice_str(line));
}

static void vm_event(void *ud, const char *event, struct orch_slice fields)
{
    struct orch *o = ud;
    orch_audit_note(o->calls.audit, event, fields);
}

static struct orch_vms *need_vms(void *ud, struct orch_err *err)
{
    struct orch *o = ud;
    if (o->vms)
        return o->vms;
    if (orch_current_need(&o->current, err) < 0 || orch_host_audit(o, err) < 0)
        return NULL;
    cleanup_close int cache = orch_own_dir(o->paths.cache, err);
    cleanup_close int runtime = cache < 0 ? -1 : orch_own_dir(o->paths.runtime, err);
    if (runtime < 0) {
        err->cls = ORCH_CLASS_ISOLATION;
        return NULL;
    }
    o->vms = orch_vms_new(o->loop,
                          &(struct orch_vms_opts){ .launcher_path = o->paths.launcher,
                                                   .agent_path = o->paths.agent,
                                                   .cache_dir = o->paths.cache,
                                                   .runtime_dir = o->paths.runtime,
                                                   .kernel = o->paths.kernel,
                                                   .modules = o->paths.modules,
                                                   .hostaddr = o->current.hostaddr,
                                                   .max = o->current.gen->cfg.vm_max,
                                                   .progress = vm_progress,
                                                   .event = vm_event,
                                                   .ud = o },
                          err);
    if (o->vms)
        orch_host_control(o);
    return o->vms;
}

static void close_vms(struct orch *o)
{
    orch_vms_free(o->vms);
}

static struct orch_http_client *need_http(void *ud, struct orch_err *err)
{
    struct orch *o = ud;
    if (!o->http)
        o->http = orch_http_client_new(o->loop, err);
    return o->http;
}

static void close_http(struct orch *o)
{
    orch_http_client_free(o->http);
}

/* ---- scripts, serving, control */

static struct orch_proc_via *protect(void *ud, struct orch_err *err)
{
    return orch_protect_new(ud, err);
}

static void exit_now(void *ud, int status)
{
    struct orch *o = ud;
    orch_control_free(o->control);
    orch_record_close(&o->calls);
    orch_audit_close(o->calls.audit);
    status = orch_host_flush(status);
    fflush(NULL);
    _exit(status);
}

static int open_env(struct orch *o, const struct opening *with, struct orch_err *err)
{
    (void)with;
    (void)err;
    o->env = (struct orch_env){ .loop = o->loop,
                                .current = &o->current,
                                .calls = &o->calls,
                                .vms = need_vms,
                                .http = need_http,
                                .protect = protect,
                                .serve = orch_serve,
                                .serve_stop = orch_serve_stop,
                                .changed = orch_serve_changed,
                                .exit = exit_now,
                                .ud = o };
    return 0;
}

static void close_script(struct orch *o)
{
    orch_state_free(o->script.state);
    orch_bind_close(&o->env);
    free(o->script.file);
}

static void close_serving(struct orch *o)
{
    orch_serve_stop(o);
    orch_upstream_free(o->serving.upstream, true);
    free(o->serving.server_info);
    free(o->serving.instructions);
}

static void close_control(struct orch *o)
{
    orch_control_free(o->control);
}

/* ---- all of them */

static const struct service {
    int (*open)(struct orch *o, const struct opening *with, struct orch_err *err);
    void (*close)(struct orch *o);
} services[] = {
    { open_paths, close_paths },   { open_loop, close_loop },   { NULL, close_audit },
    { open_calls, close_calls },   { NULL, close_http }, /* streams of Lua states are on it */
    { open_policy, close_policy }, { open_tools, close_tools }, { NULL, close_vms },
    { open_env, close_script },    { NULL, end_calls },         { NULL, close_serving },
    { NULL, close_reload },        { NULL, close_control },
};

struct orch *orch_host_open(const char *config, const struct orch_options *opts,
                            struct orch_err *err)
{
    struct opening with = { config, opts };
    struct orch *o = orch_xcalloc(1, sizeof *o);
    o->started_us = orch_now_us();
    for (; o->n_open < ORCH_ARRAY_LEN(services); o->n_open++)
        if (services[o->n_open].open && services[o->n_open].open(o, &with, err) < 0) {
            orch_host_close(o);
            return NULL;
        }
    return o;
}

void orch_host_close(struct orch *o)
{
    if (!o)
        return;
    while (o->n_open)
        services[--o->n_open].close(o);
    free(o);
}
