/* The host: finds its files, wires the rooms, starts and stops them in order, serves MCP, reloads. The
 * public API of orch.h is here too. */
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum {
    RELOAD_QUIET_MS = 50,
    CLOSE_MS = 1000,
};

/* ---- paths */

static char *xdg(const char *variable, const char *home, const char *below)
{
    const char *v = getenv(variable);
    if (v && *v == '/')
        return orch_xasprintf("%s/orch", v);
    return orch_xasprintf("%s/%s/orch", home, below);
}

/* The folder of the installation that DIR/orch would be part of, if it is one. */
static bool install_at(struct orch_paths *p, const char *dir, bool tree)
{
    cleanup_free char *share = tree ? orch_xstrdup(dir) : orch_xasprintf("%s/../share/orch", dir);
    cleanup_free char *probe = orch_xasprintf("%s/lua/policy.lua", share);
    if (access(probe, R_OK) < 0)
        return false;
    p->share = realpath(share, NULL);
    if (!p->launcher)
        p->launcher = orch_xasprintf("%s/%s", p->share, tree ? "launcher" : "../../libexec/orch/launcher");
    if (!p->agent)
        p->agent = orch_xasprintf("%s/%s", p->share, tree ? "agent" : "../../libexec/orch/agent");
    return true;
}

/* Relative to the program, so that a tree can be moved; for an embedder's program elsewhere the compiled-in
 * prefix, then the orch in PATH. */
static void find_install(struct orch_paths *p)
{
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[n < 0 ? 0 : n] = 0;
    char *slash = strrchr(exe, '/');
    if (slash)
        *slash = 0;
    if (install_at(p, exe, true) || install_at(p, exe, false) || install_at(p, ORCH_PREFIX "/bin", false))
        return;
    cleanup_free char *path = orch_xstrdup(getenv("PATH") ? getenv("PATH") : "");
    for (char *save, *dir = strtok_r(path, ":", &save); dir; dir = strtok_r(NULL, ":", &save)) {
        cleanup_free char *program = orch_xasprintf("%s/orch", dir);
        cleanup_free char *real = dir[0] == '/' ? realpath(program, NULL) : NULL;
        if (real && strrchr(real, '/') && (*strrchr(real, '/') = 0, install_at(p, real, false) || install_at(p, real, true)))
            return;
    }
    /* Not there: what opens the files says so. */
    p->share = orch_xstrdup(ORCH_PREFIX "/share/orch");
    if (!p->launcher)
        p->launcher = orch_xstrdup(ORCH_PREFIX "/libexec/orch/launcher");
    if (!p->agent)
        p->agent = orch_xstrdup(ORCH_PREFIX "/libexec/orch/agent");
}

static bool try_config(struct orch_paths *p, char *path, enum orch_config_origin origin)
{
    if (access(path, F_OK) < 0) {
        free(path);
        return false;
    }
    p->config = realpath(path, NULL);
    if (!p->config)
        p->config = orch_xstrdup(path);
    p->named = path[0] == '/' ? path : orch_xasprintf("%s/%s", p->cwd, path);
    if (p->named != path)
        free(path);
    p->origin = origin;
    return true;
}

static int find_config(struct orch_paths *p, const char *option, struct orch_err *err)
{
    const char *env = getenv("ORCH_CONFIG");
    const char *named = option ? option : env && *env ? env : NULL;
    if (named) {
        if (try_config(p, orch_xstrdup(named), option ? ORCH_CONFIG_OPTION : ORCH_CONFIG_ENV))
            return 0;
        return orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT, "%s: no such configuration (given by %s)", named,
                             option ? "--config" : "ORCH_CONFIG");
    }
    if (try_config(p, orch_xasprintf("%s/orchestrator.lua", p->cwd), ORCH_CONFIG_CWD) ||
        try_config(p, orch_xasprintf("%s/orchestrator.lua", p->user_config), ORCH_CONFIG_XDG) ||
        try_config(p, orch_xstrdup(ORCH_SYSTEM_CONFIG "/orchestrator.lua"), ORCH_CONFIG_ETC) ||
        try_config(p, orch_xasprintf("%s/orchestrator.lua", p->share), ORCH_CONFIG_BUILTIN))
        return 0;
    return orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT, "%s/orchestrator.lua: the built-in configuration is missing; is orch installed whole?",
                         p->share);
}

int orch_paths_find(struct orch_paths *p, const char *config_option, struct orch_err *err)
{
    const char *home = getenv("HOME");
    struct passwd *pw = home && *home == '/' ? NULL : getpwuid(getuid());
    p->home = orch_xstrdup(home && *home == '/' ? home : pw ? pw->pw_dir : "/nonexistent");
    p->cwd = getcwd(NULL, 0);
    if (!p->cwd)
        return orch_err_set(err, errno, "the working directory cannot be read: %s", strerror(errno));
    if (!p->share)
        find_install(p);
    bool root = geteuid() == 0;
    const char *run = getenv("XDG_RUNTIME_DIR");
    p->state = root && !getenv("XDG_STATE_HOME") ? orch_xstrdup("/var/lib/orch") : xdg("XDG_STATE_HOME", p->home, ".local/state");
    p->cache = root && !getenv("XDG_CACHE_HOME") ? orch_xstrdup("/var/cache/orch") : xdg("XDG_CACHE_HOME", p->home, ".cache");
    p->runtime = root && !run           ? orch_xstrdup("/run/orch")
                 : run && *run == '/' ? orch_xasprintf("%s/orch", run)
                                      : orch_xasprintf("%s/run", p->state);
    p->user_config = xdg("XDG_CONFIG_HOME", p->home, ".config");
    return find_config(p, config_option, err);
}

void orch_paths_fini(struct orch_paths *p)
{
    free(p->share);
    free(p->launcher);
    free(p->agent);
    free(p->state);
    free(p->cache);
    free(p->runtime);
    free(p->cwd);
    free(p->home);
    free(p->config);
    free(p->named);
    free(p->user_config);
    *p = (struct orch_paths){ 0 };
}

struct orch_held {
    struct orch_held *next;
    char *path;
    int fd;
    bool told;
};

/* Below one that is held already, since the way to that may lead elsewhere by now. */
static int open_held(struct orch *o, const char *path)
{
    const struct orch_held *best = NULL;
    size_t n = 0;
    for (const struct orch_held *h = o->held; h; h = h->next) {
        size_t len = strlen(h->path);
        if (len > n && strncmp(path, h->path, len) == 0 && path[len] == '/') {
            best = h;
            n = len;
        }
    }
    int fd = openat(best ? best->fd : AT_FDCWD, best ? path + n + 1 : path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int orch_hold_dir(struct orch *o, const char *path)
{
    struct orch_held *h = o->held;
    struct stat is, was;
    while (h && strcmp(h->path, path) != 0)
        h = h->next;
    if (!h) {
        int fd = open_held(o, path);
        if (fd < 0)
            return fd;
        h = orch_xmalloc(sizeof *h);
        *h = (struct orch_held){ .next = o->held, .path = orch_xstrdup(path), .fd = fd };
        o->held = h;
    }
    bool moved = stat(path, &is) < 0 || fstat(h->fd, &was) < 0 || is.st_dev != was.st_dev || is.st_ino != was.st_ino;
    if (moved && !h->told)
        orch_log(ORCH_WARN, "%s: moved or replaced since orch opened it; what is there now is not read before orch is started anew", path);
    h->told = moved;
    return h->fd;
}

/* ---- generations */

static void fill_error(struct orch_error *out, const struct orch_err *err)
{
    if (!out)
        return;
    out->status = orch_class_exit(err->cls);
    snprintf(out->message, sizeof out->message, "%s", err->msg);
}

int orch_host_generation(struct orch *o, struct orch_err *err)
{
    if (o->gen)
        return 0;
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    o->gen = orch_generation_load(o, ORCH_TRUST_CHECK, &errors, &cls);
    if (!o->gen) {
        while (errors.n && errors.p[errors.n - 1] == '\n')
            errors.p[--errors.n] = 0;
        return orch_err_setc(err, cls, EINVAL, "%s", errors.p);
    }
    /* Nobody wrote the built-in configuration: what there is to say of it is no warning. */
    enum orch_level level = o->paths.origin == ORCH_CONFIG_BUILTIN ? ORCH_INFO : ORCH_WARN;
    for (char *line = o->gen->notes.p, *end; line && (end = strchr(line, '\n')); line = end + 1)
        orch_log(level, "%.*s", (int)(end - line), line);
    return 0;
}

int orch_host_audit(struct orch *o, struct orch_err *err)
{
    if (o->audit)
        return 0;
    cleanup_free char *key = orch_xasprintf("%s/audit.key", o->paths.state);
    cleanup_close int dir = orch_own_dir(o->paths.state, err);
    if (dir < 0)
        return dir;
    o->audit = orch_audit_open(o->loop, o->gen->cfg.audit_dir, key, o->gen->cfg.audit_sync, err);
    return o->audit ? 0 : -EIO;
}

void orch_host_event(struct orch *o, const char *event, struct orch_slice fields)
{
    struct orch_err err = { 0 };
    if (o->audit && (orch_audit_add(o->audit, event, fields, false, &err) < 0 || orch_audit_flush(o->audit, &err) < 0))
        orch_log(ORCH_ERROR, "%s", err.msg);
}

int orch_host_reload(struct orch *o, const char *why)
{
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    int64_t started = orch_now_us();
    struct orch_generation *g = orch_generation_load(o, ORCH_TRUST_CHECK, &errors, &cls);
    o->reload_error.n = 0;
    if (!g) {
        orch_buf_slice(&o->reload_error, (struct orch_slice){ errors.p, errors.n });
        orch_log(ORCH_ERROR, "reload failed, the policies and tools before stay in force: %s", errors.p);
    } else if (strcmp(g->hash, o->gen->hash) == 0 && !o->upstream && !o->offer.on) {
        orch_generation_unref(g);
        return 0;
    } else {
        struct orch_generation *before = o->gen;
        o->gen = g;
        o->reloads++;
        orch_host_watch(o);
        orch_serve_reloaded(o, before);
        orch_generation_unref(before);
        orch_log(ORCH_INFO, "reloaded (%s): generation %.12s, %zu tools", why, g->hash, g->n_tools);
    }
    cleanup_buf struct orch_buf fields = { 0 };
    orch_buf_str(&fields, "\"why\":");
    orch_json_quote(&fields, orch_slice_str(why));
    orch_buf_printf(&fields, ",\"ok\":%s,\"ms\":%.1f", g ? "true" : "false", (double)(orch_now_us() - started) / 1000);
    if (!g) {
        orch_buf_str(&fields, ",\"error\":");
        orch_json_quote(&fields, (struct orch_slice){ errors.p, errors.n > 4000 ? 4000 : errors.n });
    }
    orch_buf_slice(&fields, (struct orch_slice){ o->gen->audit_field.p, o->gen->audit_field.n });
    orch_host_event(o, "reload", (struct orch_slice){ fields.p, fields.n });
    return g ? 0 : -(int)cls;
}

static void files_changed(void *ud)
{
    orch_host_reload(ud, "a file changed");
}

void orch_host_watch(struct orch *o)
{
    struct orch_err err = { 0 };
    if (!o->reload && !(o->reload = orch_dirwatch_new(o->loop, RELOAD_QUIET_MS, files_changed, o, &err))) {
        orch_log(ORCH_WARN, "changes of files will not be noticed (orch reload works): %s", err.msg);
        return;
    }
    cleanup_buf struct orch_buf dirs = { 0 }; /* each ended by NUL */
    cleanup_free char *config_dir = orch_xstrdup(o->paths.config);
    *strrchr(config_dir, '/') = 0;
    orch_buf_add(&dirs, config_dir, strlen(config_dir) + 1);
    orch_buf_add(&dirs, o->gen->cfg.policies, strlen(o->gen->cfg.policies) + 1);
    for (char **dir = o->gen->cfg.tools; *dir; dir++)
        orch_buf_add(&dirs, *dir, strlen(*dir) + 1);
    for (const char *const *name = orch_beside; *name; name++) {
        cleanup_free char *dir = orch_xasprintf("%s/%s", config_dir, *name);
        if (access(dir, F_OK) == 0)
            orch_buf_add(&dirs, dir, strlen(dir) + 1);
    }
    orch_buf_printf(&dirs, "%s/lua%c%s/lua/tools", o->paths.share, 0, o->paths.share);
    dirs.n++; /* the last NUL */
    /* The same folders stay watched: what changes while they are loaded must not be missed. */
    if (dirs.n == o->watched.n && memcmp(dirs.p, o->watched.p, dirs.n) == 0)
        return;
    orch_dirwatch_clear(o->reload);
    for (const char *dir = dirs.p; dir < dirs.p + dirs.n; dir += strlen(dir) + 1)
        if (orch_dirwatch_add_dir(o->reload, dir, &err) < 0)
            orch_log(ORCH_WARN, "%s", err.msg);
    orch_buf_free(&o->watched);
    o->watched = dirs;
    dirs = (struct orch_buf){ 0 };
}

/* ---- microVMs */

static void vm_progress(void *ud, const char *line)
{
    (void)ud;
    orch_log_print(orch_slice_str(line));
}

static void vm_event(void *ud, const char *event, struct orch_slice fields)
{
    orch_host_event(ud, event, fields);
}

/* Whoever serves or has microVMs can be asked by other commands of the same user. */
void orch_host_control(struct orch *o)
{
    struct orch_err err = { 0 };
    if (!o->control && !(o->control = orch_control_new(o, &err)))
        orch_log(ORCH_WARN, "%s", err.msg);
}

static struct orch_vms *env_vms(void *ud, struct orch_err *err)
{
    struct orch *o = ud;
    if (o->vms)
        return o->vms;
    if (orch_host_generation(o, err) < 0 || orch_host_audit(o, err) < 0)
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
                                                   .kernel = o->kernel,
                                                   .modules = o->modules,
                                                   .max = o->gen->cfg.vm_max,
                                                   .progress = vm_progress,
                                                   .event = vm_event,
                                                   .ud = o },
                          err);
    if (o->vms)
        orch_host_control(o);
    return o->vms;
}

const char *orch_host_image(struct orch *o)
{
    if (o->gen->cfg.vm_image)
        return o->gen->cfg.vm_image;
    cleanup_free char *built = orch_xasprintf("%s/images/debian/manifest", o->paths.cache);
    return access(built, F_OK) == 0 ? "debian" : "base";
}

static struct orch_http_client *env_http(void *ud, struct orch_err *err)
{
    struct orch *o = ud;
    if (!o->http)
        o->http = orch_http_client_new(o->loop, err);
    return o->http;
}

static int env_vm_defaults(void *ud, struct orch_vm_opts *v, struct orch_err *err)
{
    struct orch *o = ud;
    const struct orch_config *c = &o->gen->cfg;
    if (v->call && v->memory_bytes > c->vm_memory_bytes)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EINVAL, "memory %llu is over the configured vm.memory (%llu bytes)",
                             (unsigned long long)v->memory_bytes, (unsigned long long)c->vm_memory_bytes);
    if (v->call && v->vcpus > c->vm_vcpus)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EINVAL, "vcpus %d is over the configured vm.vcpus (%d)", v->vcpus, c->vm_vcpus);
    if (!v->memory_bytes)
        v->memory_bytes = c->vm_memory_bytes;
    if (!v->vcpus)
        v->vcpus = c->vm_vcpus;
    if (v->timeout_ms < 0) { /* a call's microVM ends with the call's time */
        v->timeout_ms = v->call ? 0 : c->vm_timeout_ms;
        v->timeout_name = "vm.timeout";
    }
    if (!v->image)
        v->image = orch_host_image(o);
    if (!v->backend)
        v->backend = c->vm_backend;
    v->accel = c->vm_accel;
    return 0;
}

/* ---- networks */

static int env_rules(void *ud, const char *network, struct orch_rules **rules, struct orch_err *err)
{
    struct orch *o = ud;
    if (orch_host_generation(o, err) < 0)
        return err->code > 0 ? -err->code : -EIO;
    *rules = orch_generation_rules(o->gen, network, err);
    return *rules ? 0 : -EINVAL;
}

static int env_fill_policy(void *ud, struct orch_policy *p, struct orch_err *err)
{
    return orch_fill_policy(ud, p, err);
}

static struct orch_proc_via *env_protect(void *ud, struct orch_err *err)
{
    return orch_protect_new(ud, err);
}

/* ---- sessions */

struct orch_session *orch_session_new(struct orch *o, const char *caller)
{
    static _Thread_local unsigned n;
    struct orch_session *s = orch_xcalloc(1, sizeof *s);
    s->host = o;
    s->refs = 1;
    s->caller = orch_xstrdup(caller);
    snprintf(s->id, sizeof s->id, "%s-s%u", o->call_prefix, ++n);
    orch_buf_printf(&s->audit_fields, "\"session\":\"%s\",\"caller\":", s->id);
    orch_json_quote(&s->audit_fields, orch_slice_str(caller));
    s->next = o->sessions;
    o->sessions = s;
    return s;
}

void orch_session_unref(struct orch_session *s)
{
    if (--s->refs)
        return;
    for (struct orch_session **at = &s->host->sessions; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    if (s->host->gen)
        orch_generation_forget_session(s->host->gen, s->id);
    for (size_t i = 0; i < s->n_marks; i++)
        free(s->marks[i]);
    free(s->marks);
    free(s->caller);
    orch_buf_free(&s->audit_fields);
    free(s);
}

/* ---- opening and closing */

static void env_exit(void *ud, int status)
{
    struct orch *o = ud;
    orch_control_free(o->control);
    orch_audit_close(o->audit);
    fflush(NULL);
    _exit(status);
}

static void log_to_embedder(void *ud, enum orch_level level, const char *line, size_t n)
{
    (void)level;
    const struct orch_options *opts = ud;
    opts->log(opts->log_ud, line, n);
}

struct orch *orch_host_open(const char *config, const struct orch_options *opts, struct orch_err *err)
{
    struct orch *o = orch_xcalloc(1, sizeof *o);
    uint8_t prefix[4];
    if (opts && opts->share)
        o->paths.share = orch_xstrdup(opts->share);
    if (opts && opts->launcher)
        o->paths.launcher = orch_xstrdup(opts->launcher);
    if (opts && opts->agent)
        o->paths.agent = orch_xstrdup(opts->agent);
    o->started_us = orch_now_us();
    o->loop = orch_loop_new(err);
    if (!o->loop || orch_random(prefix, sizeof prefix) < 0 || orch_paths_find(&o->paths, config, err) < 0) {
        orch_close(o);
        return NULL;
    }
    snprintf(o->call_prefix, sizeof o->call_prefix, "c%02x%02x%02x%02x", prefix[0], prefix[1], prefix[2], prefix[3]);
    o->env = (struct orch_env){ .loop = o->loop, .vms = env_vms, .http = env_http, .vm_defaults = env_vm_defaults,
                                .protect = env_protect, .serve = orch_serve, .serve_stop = orch_serve_stop, .changed = orch_serve_changed, .rules = env_rules,
                                .fill_policy = env_fill_policy, .exit = env_exit, .call = &orch_call_ops, .ud = o };
    return o;
}

struct orch *orch_open(const struct orch_options *opts, struct orch_error *error)
{
    struct orch_err err = { 0 };
    if (opts && opts->size < sizeof *opts) {
        orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "orch_open: options.size must be sizeof(struct orch_options)");
        fill_error(error, &err);
        return NULL;
    }
    if (opts && opts->log)
        orch_log_sink(&(struct orch_log_sink){ log_to_embedder, (void *)(uintptr_t)opts });
    struct orch *o = orch_host_open(opts ? opts->config : NULL, opts, &err);
    if (o && (orch_host_generation(o, &err) < 0 || orch_host_audit(o, &err) < 0)) {
        orch_close(o);
        o = NULL;
    }
    if (!o)
        fill_error(error, &err);
    return o;
}

/* Cancelled calls end in the next turns of the loop; each still writes its outcome. */
static void end_calls(struct orch *o)
{
    for (struct orch_session *s = o->sessions; s; s = s->next)
        orch_calls_cancel(o, s, "orch is closing");
    int64_t deadline = orch_now_us() + CLOSE_MS * 1000;
    while (o->running && orch_now_us() < deadline)
        orch_loop_step(o->loop, 20);
    if (o->loop)
        orch_calls_run(o);
}

void orch_close(struct orch *o)
{
    if (!o)
        return;
    /* In the reverse of the order in which things lean on each other. */
    orch_control_free(o->control);
    orch_dirwatch_free(o->reload);
    orch_serve_stop(o);
    orch_asking_stop(o, NULL);
    end_calls(o);
    orch_upstream_free(o->upstream, true);
    orch_state_free(o->script);
    orch_vm_handles_close(&o->env.vm_handles, "orch is closing");
    orch_vms_free(o->vms);
    orch_generation_unref(o->gen);
    orch_http_client_free(o->http); /* streams of Lua states are on it */
    orch_calls_free(o);
    for (size_t i = 0; i < o->n_c_tools; i++)
        orch_tool_fini(&o->c_tools[i]);
    free(o->c_tools);
    free(o->host_addresses);
    orch_audit_close(o->audit);
    orch_loop_free(o->loop);
    orch_paths_fini(&o->paths);
    for (struct orch_held *h; (h = o->held);) {
        o->held = h->next;
        close(h->fd);
        free(h->path);
        free(h);
    }
    free(o->script_file);
    orch_buf_free(&o->reload_error);
    orch_buf_free(&o->watched);
    free(o->offer.server_info);
    free(o->offer.instructions);
    free(o->kernel);
    free(o->modules);
    free(o);
}

const char *orch_version(void)
{
    return ORCH_VERSION;
}

int orch_step(struct orch *o, int64_t max_ms)
{
    orch_loop_step(o->loop, max_ms);
    return o->served ? 0 : 1;
}

int orch_reload(struct orch *o, struct orch_error *error)
{
    struct orch_err err = { 0 };
    int r = orch_host_reload(o, "orch_reload");
    if (r < 0) {
        orch_err_setc(&err, (enum orch_class)-r, EINVAL, "%s", o->reload_error.p);
        fill_error(error, &err);
    }
    return r;
}

/* ---- tools and calls of an embedder */

int orch_add_tool(struct orch *o, const struct orch_tool_def *def, struct orch_error *error)
{
    struct orch_err err = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    size_t n = strlen(def->name);
    int r = 0;
    if (n < 1 || n > 64 || strstr(def->name, "__") ||
        strspn(def->name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") != n)
        r = orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "orch_add_tool: name must be 1 to 64 of A-Za-z0-9_.- without \"__\"");
    else if (orch_json_scan(&d, orch_slice_str(def->input), &(struct orch_json_limits){ 0 }, &fault) < 0)
        r = orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "orch_add_tool: input: %s at byte %zu", fault.rule, fault.byte);
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
                               .fn = def->fn,
                               .fn_ud = def->ud };
        r = orch_generation_add_tool(o->gen, &t, (struct orch_slice){ 0 }, &err);
        if (r < 0) {
            orch_tool_fini(&t);
        } else {
            orch_generation_list(o->gen);
            o->c_tools = orch_xrealloc(o->c_tools, (o->n_c_tools + 1) * sizeof *o->c_tools);
            o->c_tools[o->n_c_tools++] = t;
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

int orch_call(struct orch *o, const char *tool, const char *args_json, const char *caller, orch_result_fn *fn, void *ud,
              struct orch_error *error)
{
    struct orch_err err = { 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    cleanup_free char *wrapped = orch_xasprintf("[%s]", args_json); /* so that the object is token 1 */
    if (orch_json_scan(&d, orch_slice_str(wrapped), &(struct orch_json_limits){ 0 }, &fault) < 0 || d.toks[0].count != 1 ||
        d.toks[1].type != ORCH_JSON_OBJECT) {
        orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "orch_call: the arguments must be one JSON object");
        fill_error(error, &err);
        return -EINVAL;
    }
    struct host_call *h = orch_xmalloc(sizeof *h);
    *h = (struct host_call){ orch_session_new(o, caller ? caller : "embedder"), fn, ud };
    orch_call_from_host(h->session, orch_slice_str(tool), &d, 1, host_call_done, h);
    return 0;
}

static void serve_ended(void *ud, int status, const char *why)
{
    (void)status;
    (void)why;
    struct orch *o = ud;
    o->served = true;
}

int orch_serve_stdio(struct orch *o, struct orch_error *error)
{
    struct orch_err err = { 0 };
    int r = orch_serve(o, &(struct orch_serve_opts){ .transport = "stdio", .done = serve_ended, .ud = o }, &err);
    if (r < 0)
        fill_error(error, &err);
    return r;
}

/* ---- scripts */

struct running {
    bool done;
    int status;
    struct orch_err err;
};

static void script_done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct running *r = ud;
    r->done = true;
    if (err)
        r->err = *err;
    else if (nres > 0 && lua_type(L, -nres) == LUA_TNUMBER)
        r->status = (int)lua_tonumber(L, -nres);
}

static struct orch_state *script_state(struct orch *o, const char *script_dir, struct orch_err *err)
{
    if (o->script)
        return o->script;
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", o->paths.share);
    o->script = orch_state_new(
        &(struct orch_state_opts){ .ctx = ORCH_CTX_SCRIPT, .lua_dir = lua_dir, .script_dir = script_dir, .host = &o->env }, err);
    if (!o->script)
        return NULL;
    lua_State *L = orch_state_lua(o->script);
    orch_luaopen_orch(L);
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "preload");
    lua_pushcfunction(L, orch_luaopen_internal);
    lua_setfield(L, -2, "orch.internal");
    lua_pushcfunction(L, orch_luaopen_transport);
    lua_setfield(L, -2, "orch.transport");
    lua_pushcfunction(L, orch_luaopen_client);
    lua_setfield(L, -2, "orch.client");
    lua_settop(L, 0);
    return o->script;
}

int orch_host_run(struct orch *o, const char *name, struct orch_slice text, int argc, const char *const *argv, struct orch_err *err)
{
    cleanup_free char *dir = strchr(name, '/') ? orch_xstrndup(name, (size_t)(strrchr(name, '/') - name)) : orch_xstrdup(".");
    struct orch_state *s = script_state(o, dir, err);
    if (!s)
        return -1;
    lua_State *L = orch_state_lua(s);
    if (!o->script_file)
        o->script_file = realpath(name, NULL); /* NULL: it is no file */
    if (text.n > 2 && text.p[0] == '#') { /* keep the line's number */
        const char *nl = memchr(text.p, '\n', text.n);
        size_t skip = nl ? (size_t)(nl - text.p) : text.n;
        text.p += skip;
        text.n -= skip;
    }
    lua_createtable(L, argc, 1);
    lua_pushstring(L, name);
    lua_rawseti(L, -2, 0);
    for (int i = 0; i < argc; i++) {
        lua_pushstring(L, argv[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setglobal(L, "arg");
    if (orch_state_load(s, name, text, err) < 0) {
        err->cls = ORCH_CLASS_CONFIG;
        return -1;
    }
    /* A task takes few arguments; a script's may be many. */
    if (luaL_loadstring(L, "local script, arg = ... return script(unpack(arg))"))
        return orch_err_set(err, ENOMEM, "%s", lua_tostring(L, -1)), -1;
    lua_insert(L, -2);
    lua_getglobal(L, "arg");
    struct running r = { 0 };
    o->main = orch_task_start(o->loop, s, 2, script_done, &r);
    while (!r.done)
        orch_loop_step(o->loop, -1);
    o->main = NULL;
    if (r.err.cls) {
        *err = r.err;
        return -1;
    }
    return r.status;
}

int orch_run_file(struct orch *o, const char *path, int argc, const char *const *argv, struct orch_error *error)
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
