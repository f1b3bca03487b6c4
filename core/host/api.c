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

/* ---- coming in: each function of a handle is a visit, with the handle's log in force */

struct visit {
    struct orch *o;
    const struct orch_log *log;
};

static struct visit enter(struct orch *o)
{
    o->visits.depth++;
    return (struct visit){ o, orch_log_use(&o->visits.log) };
}

static void leave(struct visit *v)
{
    orch_log_use(v->log);
    if (v->o)
        v->o->visits.depth--;
}

#define VISIT(o) ORCH_CLEANUP(leave) struct visit visit = enter(o)

/* Whether the function may not be called here: by another thread, or from inside a visit, which
 * alone is one of step, close, run. Why is said to error, or to the log where there is none. */
static int refuse(struct orch *o, const char *function, bool alone, struct orch_error *error)
{
    struct orch_err err = { 0 };
    if (!pthread_equal(o->visits.thread, pthread_self()))
        orch_err_setc(&err, ORCH_CLASS_USAGE, EPERM,
                      "%s: called by another thread than orch_open; a handle belongs to one",
                      function);
    else if (alone && o->visits.depth)
        orch_err_setc(&err, ORCH_CLASS_USAGE, EDEADLK,
                      "%s: called from inside a callback of the handle; return from it first",
                      function);
    else
        return 0;
    if (error)
        fill_error(error, &err);
    else
        orch_log(ORCH_ERROR, "%s", err.msg);
    return -err.code;
}

/* ---- opening, closing, stepping */

/* The options of a program that was built with an older orch.h, or with a newer one whose new
 * members it does not use. */
static int take_options(const struct orch_options *given, struct orch_options *opts,
                        struct orch_err *err)
{
    *opts = (struct orch_options){ 0 };
    if (!given)
        return 0;
    if (given->size < sizeof given->size || given->size % _Alignof(struct orch_options))
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "orch_open: options.size is %zu; it must be sizeof(struct "
                             "orch_options)",
                             given->size);
    for (size_t i = sizeof *opts; i < given->size; i++)
        if (((const char *)given)[i])
            return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                                 "orch_open: options has members that are set and that orch %s "
                                 "does not know; link with the orch whose orch.h the program is "
                                 "built with",
                                 ORCH_VERSION);
    memcpy(opts, given, given->size < sizeof *opts ? given->size : sizeof *opts);
    if (opts->log_level < ORCH_LOG_DEFAULT || opts->log_level > ORCH_LOG_ERROR)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL,
                             "orch_open: options.log_level is %d; it must be one of enum "
                             "orch_log_level",
                             opts->log_level);
    return 0;
}

struct orch *orch_open(const struct orch_options *given, struct orch_error *error)
{
    struct orch_err err = { 0 };
    struct orch_options opts;
    if (take_options(given, &opts, &err) < 0) {
        fill_error(error, &err);
        return NULL;
    }
    struct orch_log log = {
        .least = opts.log_level ? (enum orch_level)(opts.log_level - ORCH_LOG_DEBUG) : ORCH_WARN,
        .json = opts.log_json,
        .write = opts.log,
        .ud = opts.log_ud,
    };
    ORCH_CLEANUP(leave) struct visit visit = { NULL, orch_log_use(&log) };
    struct orch *o = orch_host_open(opts.config, &opts, &err);
    if (o && (orch_current_need(&o->current, &err) < 0 || orch_host_audit(o, &err) < 0)) {
        orch_host_close(o);
        o = NULL;
    }
    if (!o) {
        fill_error(error, &err);
        return NULL;
    }
    o->visits = (struct visits){ .thread = pthread_self(), .log = log };
    return o;
}

void orch_close(struct orch *o)
{
    if (!o || refuse(o, "orch_close", true, NULL) < 0)
        return;
    VISIT(o);
    struct orch_log log = o->visits.log; /* the last lines come when o is gone */
    orch_log_use(&log);
    orch_host_close(o);
    visit.o = NULL;
}

const char *orch_version(void)
{
    return ORCH_VERSION;
}

int orch_step(struct orch *o, int64_t max_ms)
{
    int r = refuse(o, "orch_step", true, NULL);
    if (r < 0)
        return r;
    VISIT(o);
    orch_loop_step(o->loop, max_ms);
    return o->serving.ended ? 0 : 1;
}

int orch_fd(struct orch *o)
{
    int r = refuse(o, "orch_fd", false, NULL);
    if (r < 0)
        return r;
    VISIT(o);
    r = orch_loop_fd(o->loop);
    if (r < 0)
        orch_log(ORCH_ERROR, "orch_fd: %s", strerror(-r));
    return r;
}

int orch_reload(struct orch *o, struct orch_error *error)
{
    struct orch_err err = { 0 };
    int r = refuse(o, "orch_reload", false, error);
    if (r < 0)
        return r;
    VISIT(o);
    r = orch_current_reload(&o->current, "orch_reload");
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
    struct orch *o = c->calls->ud;
    if (refuse(o, "orch_answer", false, NULL) < 0)
        return;
    VISIT(o);
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
    int r = refuse(o, "orch_add_tool", false, error);
    if (r < 0)
        return r;
    VISIT(o);
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
    int r = refuse(o, "orch_call", false, error);
    if (r < 0)
        return r;
    VISIT(o);
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
    int r = refuse(o, "orch_serve_stdio", false, error);
    if (r < 0)
        return r;
    VISIT(o);
    r = orch_serve(o,
                   &(struct orch_serve_opts){ .transport = "stdio", .done = serve_ended, .ud = o },
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
    if (refuse(o, "orch_run_file", true, error) < 0)
        return -1;
    VISIT(o);
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
