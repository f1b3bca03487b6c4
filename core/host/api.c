/* The library's functions (orch.h). */
#include "host.h"

#include "../base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

static void fill_error(struct orch_error *out, const struct orch_err *err)
{
    if (!out)
        return;
    out->status = orch_class_exit(err->cls);
    snprintf(out->message, sizeof out->message, "%s", err->msg);
}

static void log_to_embedder(void *ud, enum orch_level level, const char *line, size_t n)
{
    (void)level;
    const struct orch_options *opts = ud;
    opts->log(opts->log_ud, line, n);
}

struct orch *orch_open(const struct orch_options *opts, struct orch_error *error)
{
    struct orch_err err = { 0 };
    if (opts && opts->size < sizeof *opts) {
        orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL,
                      "orch_open: options.size must be sizeof(struct orch_options)");
        fill_error(error, &err);
        return NULL;
    }
    if (opts && opts->log)
        orch_log_sink(&(struct orch_log_sink){ log_to_embedder, (void *)(uintptr_t)opts });
    struct orch *o = orch_host_open(opts ? opts->config : NULL, opts, &err);
    if (o && (orch_current_need(&o->current, &err) < 0 || orch_host_audit(o, &err) < 0)) {
        orch_close(o);
        o = NULL;
    }
    if (!o)
        fill_error(error, &err);
    return o;
}

const char *orch_version(void)
{
    return ORCH_VERSION;
}

int orch_step(struct orch *o, int64_t max_ms)
{
    orch_loop_step(o->loop, max_ms);
    return o->serving.ended ? 0 : 1;
}

int orch_reload(struct orch *o, struct orch_error *error)
{
    struct orch_err err = { 0 };
    int r = orch_current_reload(&o->current, "orch_reload");
    if (r < 0) {
        orch_err_setc(&err, (enum orch_class) - r, EINVAL, "%s", o->current.error.p);
        fill_error(error, &err);
    }
    return r;
}

/* ---- tools and calls of an embedder */

/* A tool's call as orch_answer knows it: the record, which is not used again before. */
static struct orch_call *call_of(struct orch_tool_call *call)
{
    return (struct orch_call *)call;
}

static void start(struct orch_call *c)
{
    const struct orch_tool *t = c->tool;
    orch_tool_fn *fn = (orch_tool_fn *)t->backend_fn;
    c->owed = true;
    orch_call_arm(c);
    fn(t->backend_ud, (struct orch_tool_call *)c, c->args.p);
}

/* Nothing tells it: its answer comes too late. */
static bool stop(struct orch_call *c, enum orch_class cls, const char *why)
{
    (void)c;
    (void)cls;
    (void)why;
    return false;
}

static const struct orch_tool_backend backend = {
    .unfinished = "no answer",
    .start = start,
    .stop = stop,
};

void orch_answer(struct orch_tool_call *call, const char *text, int is_error)
{
    struct orch_call *c = call_of(call);
    if (c->gen && !c->finished) { /* else it was cancelled or timed out, and answered so */
        orch_call_text(c, orch_slice_str(text), is_error != 0);
        orch_call_end(c);
    }
    orch_call_release(c);
}

int orch_add_tool(struct orch *o, const struct orch_tool_def *def, struct orch_error *error)
{
    struct orch_err err = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    size_t n = strlen(def->name);
    int r = 0;
    if (n < 1 || n > 64 || strstr(def->name, "__") ||
        strspn(def->name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") != n)
        r = orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL,
                          "orch_add_tool: name must be 1 to 64 of A-Za-z0-9_.- without \"__\"");
    else if (orch_json_scan(&d, orch_slice_str(def->input), &(struct orch_json_limits){ 0 },
                            &fault) < 0)
        r = orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "orch_add_tool: input: %s at byte %zu",
                          fault.rule, fault.byte);
    if (r == 0) {
        cleanup_buf struct orch_buf definition = { 0 };
        orch_buf_printf(&definition, "{\"name\":\"%s\",\"description\":", def->name);
        orch_json_quote(&definition, orch_slice_str(def->description));
        orch_buf_printf(&definition, ",\"inputSchema\":%s}", def->input);
        struct orch_tool t = { .name = orch_xstrdup(def->name),
                               .wire_name = orch_xstrdup(def->name),
                               .server = orch_xstrdup("local"),
                               .definition = orch_steal_ptr(&definition.p),
                               .input = orch_xstrdup(def->input),
                               .run_ref = LUA_NOREF,
                               .output_ref = LUA_NOREF,
                               .backend = &backend,
                               .backend_fn = (void (*)(void))def->fn,
                               .backend_ud = def->ud };
        r = orch_generation_add_tool(o->current.gen, &t, (struct orch_slice){ 0 }, &err);
        if (r < 0) {
            orch_tool_fini(&t);
        } else {
            orch_generation_list(o->current.gen);
            orch_host_keep_tool(o, &t);
        }
    }
    if (r < 0)
        fill_error(error, &err);
    return r;
}

struct host_call {
    struct orch_session *session;
    orch_result_fn *fn;
    void *ud;
};

static void host_call_done(void *ud, struct orch_slice members, bool is_error)
{
    struct host_call *h = ud;
    cleanup_free char *text = orch_xasprintf("{%.*s}", (int)members.n, members.p);
    h->fn(h->ud, text, is_error);
    orch_session_unref(h->session);
    free(h);
}

int orch_call(struct orch *o, const char *tool, const char *args_json, const char *caller,
              orch_result_fn *fn, void *ud, struct orch_error *error)
{
    struct orch_err err = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    /* so that the object is token 1 */
    cleanup_free char *wrapped = orch_xasprintf("[%s]", args_json);
    if (orch_json_scan(&d, orch_slice_str(wrapped), &(struct orch_json_limits){ 0 }, &fault) < 0 ||
        d.toks[0].count != 1 || d.toks[1].type != ORCH_JSON_OBJECT) {
        orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL,
                      "orch_call: the arguments must be one JSON object");
        fill_error(error, &err);
        return -EINVAL;
    }
    struct host_call *h = orch_xmalloc(sizeof *h);
    *h = (struct host_call){ orch_session_new(&o->calls, caller ? caller : "embedder"), fn, ud };
    orch_call_from_host(h->session, orch_slice_str(tool), &d, 1, host_call_done, h);
    return 0;
}

static void serve_ended(void *ud, int status, const char *why)
{
    (void)status;
    (void)why;
    struct orch *o = ud;
    o->serving.ended = true;
}

int orch_serve_stdio(struct orch *o, struct orch_error *error)
{
    struct orch_err err = { 0 };
    int r = orch_serve(o,
                       &(struct orch_serve_opts){
                           .transport = "stdio", .done = serve_ended, .ud = o },
                       &err);
    if (r < 0)
        fill_error(error, &err);
    return r;
}

int orch_run_file(struct orch *o, const char *path, int argc, const char *const *argv,
                  struct orch_error *error)
{
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    int r = orch_read_file(AT_FDCWD, path, 16 << 20, &text);
    if (r < 0) {
        orch_err_setc(&err, ORCH_CLASS_CONFIG, -r, "%s: %s", path, strerror(-r));
        r = -1;
    } else {
        r = orch_host_run(o, path, (struct orch_slice){ text.p, text.n }, argc, argv, &err);
    }
    if (r < 0)
        fill_error(error, &err);
    return r;
}
