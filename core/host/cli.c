/* The module "orch.internal" of the commands in lua/cli: what they need of the host beyond the
 * public API. It may change with any version. Functions return a value, or nil, message, code. */
#include "host.h"

#include "../base/hash.h"
#include "../base/log.h"
#include "../base/proc.h"
#include "../launch/launch.h"
#include "../script/jsonlib.h"
#include "../vm/accel.h"
#include "../image/image.h"
#include "../vm/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>

static struct orch *host_of(lua_State *L)
{
    return orch_env_of(L)->ud;
}

static int push_json_text(lua_State *L, struct orch_slice text)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, text, &(struct orch_json_limits){ .bytes = 64 << 20 }, &fault) < 0)
        return luaL_error(L, "internal: %s at byte %d", fault.rule, (int)fault.byte);
    orch_lua_push_json(L, &d, 0, 0);
    return 1;
}

static int i_paths(lua_State *L)
{
    static const char *const origins[] = { "--config", "ORCH_CONFIG", "working directory",
                                           "user",     "system",      "built-in" };
    const struct orch_paths *p = &host_of(L)->paths;
    const char *const fields[][2] = { { "share", p->share },
                                      { "launcher", p->launcher },
                                      { "agent", p->agent },
                                      { "state", p->state },
                                      { "cache", p->cache },
                                      { "runtime", p->runtime },
                                      { "cwd", p->cwd },
                                      { "home", p->home },
                                      { "config", p->config },
                                      { "named", p->named },
                                      { "user_config", p->user_config },
                                      { "origin", origins[p->origin] } };
    lua_newtable(L);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(fields); i++) {
        lua_pushstring(L, fields[i][1]);
        lua_setfield(L, -2, fields[i][0]);
    }
    return 1;
}

/* use_config(file): as --config FILE would. Before anything is loaded. */
static int i_use_config(lua_State *L)
{
    struct orch_paths *p = &host_of(L)->paths;
    const char *path = luaL_checkstring(L, 1);
    char *real = realpath(path, NULL);
    if (!real) {
        struct orch_err err;
        orch_err_setc(&err, ORCH_CLASS_CONFIG, errno, "%s: %s", path, strerror(errno));
        return orch_push_err(L, &err);
    }
    free(p->config);
    p->config = real;
    free(p->named);
    p->named = path[0] == '/' ? orch_xstrdup(path) : orch_xasprintf("%s/%s", p->cwd, path);
    p->origin = ORCH_CONFIG_OPTION;
    lua_pushstring(L, real);
    return 1;
}

static int push_errors(lua_State *L, struct orch_buf *errors, enum orch_class cls)
{
    while (errors->n && errors->p[errors->n - 1] == '\n')
        errors->n--;
    lua_pushnil(L);
    lua_pushlstring(L, errors->p ? errors->p : "?", errors->p ? errors->n : 1);
    lua_pushstring(L, orch_class_name(cls));
    return 3;
}

/* The generation in force, or the first one. */
static struct orch_generation *loaded(struct orch *o, enum orch_trust_mode mode,
                                      struct orch_buf *errors, enum orch_class *cls)
{
    struct orch_current *cur = &o->current;
    if (!cur->gen)
        cur->gen = orch_generation_load(cur, mode, errors, cls);
    return cur->gen;
}

static void set_string(lua_State *L, const char *key, const char *value)
{
    lua_pushstring(L, value);
    lua_setfield(L, -2, key);
}

static void set_count(lua_State *L, struct orch_generation *g, const char *key)
{
    lua_State *policy = orch_state_lua(g->policy);
    lua_rawgeti(policy, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(policy, -1, key);
    lua_pushinteger(L, (lua_Integer)lua_objlen(policy, -1));
    lua_setfield(L, -2, key);
    lua_pop(policy, 2);
}

/* load(): { generation, tools = { { name, server, listed, file }… }, sources = { path… }, rules,
 * tests, notes, policies, audit_dir, workspace, image } of the configuration as it is on disk; or
 * nil, all errors, class. */
static int i_load(lua_State *L)
{
    struct orch *o = host_of(L);
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    struct orch_generation *g = loaded(o, ORCH_TRUST_CHECK, &errors, &cls);
    if (!g)
        return push_errors(L, &errors, cls);
    lua_newtable(L);
    set_string(L, "generation", g->hash);
    set_string(L, "notes", g->notes.p ? g->notes.p : "");
    set_string(L, "policies", g->cfg.policies);
    set_string(L, "workspace", g->cfg.workspace);
    set_string(L, "audit_dir", g->cfg.audit_dir);
    set_string(L, "image", orch_bind_image(&o->current));
    set_count(L, g, "rules");
    set_count(L, g, "tests");
    lua_newtable(L);
    for (size_t i = 0; i < g->n_tools; i++) {
        lua_newtable(L);
        set_string(L, "name", g->tools[i]->name);
        set_string(L, "server", g->tools[i]->server);
        set_string(L, "file", g->tools[i]->file);
        lua_pushboolean(L, g->tools[i]->listed);
        lua_setfield(L, -2, "listed");
        lua_rawseti(L, -2, (int)i + 1);
    }
    lua_setfield(L, -2, "tools");
    lua_newtable(L);
    for (size_t i = 0; i < g->sources.n; i++) {
        lua_pushstring(L, g->sources.files[i].path);
        lua_rawseti(L, -2, (int)i + 1);
    }
    lua_setfield(L, -2, "sources");
    return 1;
}

static int i_config(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    if (orch_current_need(&o->current, &err) < 0)
        return orch_push_err(L, &err);
    return push_json_text(L, orch_slice_str(
                                 o->current.gen->config_show ? o->current.gen->config_show : "[]"));
}

static int i_explain(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    size_t n;
    cleanup_buf struct orch_buf out = { 0 };
    const char *tool = luaL_checkstring(L, 1), *args = luaL_optlstring(L, 2, "{}", &n);
    if (lua_isnoneornil(L, 2))
        n = 2;
    if (orch_current_need(&o->current, &err) < 0 ||
        orch_generation_explain(o->current.gen, tool, (struct orch_slice){ args, n }, &out, &err) <
            0)
        return orch_push_err(L, &err);
    return push_json_text(L, (struct orch_slice){ out.p, out.n });
}

static int i_rules(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    if (orch_current_need(&o->current, &err) < 0 ||
        orch_generation_show(o->current.gen, &out, &err) < 0)
        return orch_push_err(L, &err);
    return push_json_text(L, (struct orch_slice){ out.p, out.n });
}

/* nft(network) -> the packet filter of a network policy as text. */
static int i_nft(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    if (orch_current_need(&o->current, &err) < 0 ||
        orch_generation_rules_text(o->current.gen, luaL_checkstring(L, 1), &out, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushlstring(L, out.p, out.n);
    return 1;
}

/* packet(network, address, proto, port) -> decision, rule. */
static int i_packet(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    struct orch_cidr to;
    char rule[128];
    bool allowed;
    const char *proto = luaL_checkstring(L, 3);
    if (orch_cidr_parse(luaL_checkstring(L, 2), &to, &err) < 0 || to.bits != 32) {
        orch_err_setc(&err, ORCH_CLASS_USAGE, EINVAL, "%s: an IPv4 address is needed",
                      lua_tostring(L, 2));
        return orch_push_err(L, &err);
    }
    if (orch_current_need(&o->current, &err) < 0 ||
        orch_generation_explain_packet(o->current.gen, luaL_checkstring(L, 1), to.addr,
                                       strcmp(proto, "udp") == 0 ? IPPROTO_UDP : IPPROTO_TCP,
                                       (uint16_t)luaL_checkinteger(L, 4), &allowed, rule,
                                       sizeof rule, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushstring(L, allowed ? "allow" : "deny");
    lua_pushstring(L, rule);
    return 2;
}

/* trust_look(): reads the configuration whether it is trusted or not: { { path, sha256, text,
 * before = SHA-256 recorded or nil }… }, and its list `gone` of paths that were recorded and are no
 * more. Before anything is loaded. */
static int i_trust_look(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    struct orch_trust known = { .edits = false };
    cleanup_buf struct orch_buf errors = { 0 };
    enum orch_class cls = ORCH_CLASS_CONFIG;
    const struct orch_generation *g = loaded(o, ORCH_TRUST_ANY, &errors, &cls);
    if (!g)
        return push_errors(L, &errors, cls);
    if (orch_trust_read(&o->paths, &known, &err) < 0)
        return orch_push_err(L, &err);
    const struct orch_trust_list *list = &g->sources;
    lua_newtable(L);
    for (size_t i = 0; i < list->n && !err.cls; i++) {
        const struct orch_trust_file *f = &list->files[i];
        cleanup_buf struct orch_buf text = { 0 };
        char sha[65];
        int r = orch_read_file(AT_FDCWD, f->path, 1 << 20, &text);
        orch_sha256_hex(text.p, text.n, sha);
        if (r < 0 || strcmp(sha, f->sha256) != 0)
            orch_err_set(&err, r < 0 ? -r : ESTALE, "%s: it changes while it is read; try again",
                         f->path);
        lua_newtable(L);
        set_string(L, "path", f->path);
        set_string(L, "sha256", f->sha256);
        lua_pushlstring(L, text.p ? text.p : "", text.n);
        lua_setfield(L, -2, "text");
        for (size_t k = 0; k < known.list.n; k++)
            if (strcmp(known.list.files[k].path, f->path) == 0) {
                set_string(L, "before", known.list.files[k].sha256);
                known.list.files[k].path[0] = 0; /* seen */
            }
        lua_rawseti(L, -2, (int)i + 1);
    }
    lua_newtable(L);
    for (size_t k = 0, n = 0; k < known.list.n; k++)
        if (*known.list.files[k].path) {
            lua_pushstring(L, known.list.files[k].path);
            lua_rawseti(L, -2, (int)++n);
        }
    lua_setfield(L, -2, "gone");
    orch_trust_fini(&known);
    return err.cls ? orch_push_err(L, &err) : 1;
}

/* trust(edits): records what trust_look read. */
static int i_trust(lua_State *L)
{
    struct orch *o = host_of(L);
    struct orch_err err = { 0 };
    struct orch_trust t = { .list = o->current.gen->sources,
                            .edits = lua_toboolean(L, 1),
                            .always = o->current.gen->cfg.trust_always };
    if (orch_trust_record(&o->paths, &t, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* Whether a person can see and type: standard input and standard error are terminals. */
static int i_terminal(lua_State *L)
{
    lua_pushboolean(L, isatty(STDIN_FILENO) && isatty(STDERR_FILENO));
    return 1;
}

static void read_link(int pid, const char *name, char *out, size_t n)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    ssize_t got = readlink(path, out, n - 1);
    out[got < 0 ? 0 : got] = 0;
}

static bool same_name(int pid)
{
    char path[64];
    cleanup_buf struct orch_buf own = { 0 }, its = { 0 };
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    return orch_read_file(AT_FDCWD, "/proc/self/comm", 64, &own) == 0 &&
           orch_read_file(AT_FDCWD, path, 64, &its) == 0 && own.n == its.n &&
           memcmp(own.p, its.p, own.n) == 0;
}

/* Refused where an agent could reach it: below a process that an orch started. What orch protects
 * itself from cannot see its program, so there the name says it; what it then could do, the kernel
 * refuses. */
static int i_below_orch(lua_State *L)
{
    char self[4096], exe[4096];
    read_link(getpid(), "exe", self, sizeof self);
    for (int pid = getppid(), depth = 0; pid > 1 && depth < ORCH_ANCESTORS_MAX;
         depth++, pid = orch_proc_parent(pid)) {
        read_link(pid, "exe", exe, sizeof exe);
        if (exe[0] ? self[0] && strcmp(self, exe) == 0 : same_name(pid)) {
            lua_pushinteger(L, pid);
            return 1;
        }
    }
    return 0;
}

static int i_audit_list(lua_State *L)
{
    struct orch_err err = { 0 };
    char **paths;
    size_t n;
    if (orch_audit_list(luaL_checkstring(L, 1), &paths, &n, &err) < 0)
        return orch_push_err(L, &err);
    lua_newtable(L);
    for (size_t i = 0; i < n; i++) {
        lua_pushstring(L, paths[i]);
        lua_rawseti(L, -2, (int)i + 1);
    }
    orch_audit_list_free(paths, n);
    return 1;
}

static int i_audit_running(lua_State *L)
{
    lua_pushboolean(L, orch_audit_running(luaL_checkstring(L, 1)));
    return 1;
}

static void set_bool(lua_State *L, const char *key, bool value)
{
    lua_pushboolean(L, value);
    lua_setfield(L, -2, key);
}

static void set_number(lua_State *L, const char *key, double value)
{
    lua_pushnumber(L, value);
    lua_setfield(L, -2, key);
}

static void push_report(lua_State *L, const struct orch_audit_report *r)
{
    lua_newtable(L);
    set_bool(L, "ok", r->ok);
    set_bool(L, "running", r->running);
    set_bool(L, "ended", r->ended);
    set_bool(L, "missing", r->missing);
    set_number(L, "lines", (double)r->lines);
    set_number(L, "unsigned_lines", (double)r->unsigned_lines);
    set_number(L, "cut", (double)r->cut);
    set_string(L, "problem", r->problem);
    set_string(L, "head", r->head_hash);
}

static char *audit_key(lua_State *L)
{
    char *key = orch_xasprintf("%s/audit.key", host_of(L)->paths.state);
    if (access(key, R_OK) == 0)
        return key;
    free(key);
    return NULL;
}

/* audit_verify(file, head or nil): what is found in one file. */
static int i_audit_verify(lua_State *L)
{
    struct orch_err err = { 0 };
    struct orch_audit_report r = { 0 };
    cleanup_free char *key = audit_key(L);
    if (orch_audit_verify(luaL_checkstring(L, 1), key, luaL_optstring(L, 2, NULL), &r, &err) < 0)
        return orch_push_err(L, &err);
    push_report(L, &r);
    return 1;
}

static void add_report(void *ud, const char *path, const struct orch_audit_report *r)
{
    lua_State *L = ud; /* the list at the top */
    push_report(L, r);
    set_string(L, "file", path);
    lua_rawseti(L, -2, (int)lua_objlen(L, -2) + 1);
}

/* audit_verify_dir(dir, head or nil): a list of what is found in each file, missing ones too, and
 * of all of them. */
static int i_audit_verify_dir(lua_State *L)
{
    struct orch_err err = { 0 };
    struct orch_audit_summary s;
    cleanup_free char *key = audit_key(L);
    const char *dir = luaL_checkstring(L, 1), *head = luaL_optstring(L, 2, NULL);
    lua_newtable(L);
    if (orch_audit_verify_dir(dir, key, head, add_report, L, &s, &err) < 0)
        return orch_push_err(L, &err);
    lua_newtable(L);
    set_bool(L, "ok", s.ok);
    set_bool(L, "head_seen", s.head_seen);
    set_number(L, "files", (double)s.files);
    set_number(L, "bad", (double)s.bad);
    set_number(L, "running", (double)s.running);
    set_number(L, "crashed", (double)s.crashed);
    set_number(L, "lines", (double)s.lines);
    set_number(L, "unsigned_lines", (double)s.unsigned_lines);
    set_string(L, "pruned", s.pruned);
    set_string(L, "problem", s.problem);
    set_string(L, "head", s.head_hash);
    return 2;
}

/* control(request as JSON, pid or nil): what every running orch process answered. */
static int i_control(lua_State *L)
{
    cleanup_buf struct orch_buf out = { 0 };
    orch_control_ask(host_of(L)->paths.runtime, (int)luaL_optinteger(L, 2, 0),
                     orch_slice_str(luaL_checkstring(L, 1)), &out);
    return push_json_text(L, (struct orch_slice){ out.p, out.n });
}

static int i_escape(lua_State *L)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    cleanup_buf struct orch_buf out = { 0 };
    orch_escape_terminal(&out, (struct orch_slice){ s, n }, lua_toboolean(L, 2));
    lua_pushlstring(L, out.p ? out.p : "", out.n);
    return 1;
}

static int i_nearest(lua_State *L)
{
    lua_pushstring(L, orch_nearest(luaL_checkstring(L, 1), orch_check_strings(L, 2, "list", 1024)));
    return 1;
}

static int i_launch_check(lua_State *L)
{
    struct orch_err err = { 0 };
    if (orch_launch_check(host_of(L)->paths.launcher, &err) < 0)
        return orch_push_err(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* protect_check(): can a program be kept from changing orch's files? */
static int i_protect_check(lua_State *L)
{
    struct orch_err err = { 0 };
    if (orch_protect_check(host_of(L), &err) < 0)
        return orch_push_err(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* isolation(): what a start with accel "auto" would use, "none" while that is open; and why. Writes
 * nothing. */
static int i_isolation(lua_State *L)
{
    struct orch *o = host_of(L);
    cleanup_buf struct orch_buf why = { 0 };
    enum orch_isolation i = orch_known_isolation(o->loop,
                                                 &(struct orch_vms_opts){
                                                     .cache_dir = o->paths.cache,
                                                     .runtime_dir = o->paths.runtime,
                                                     .agent_path = o->paths.agent },
                                                 &why);
    lua_pushstring(L, orch_isolation_name(i));
    lua_pushstring(L, why.p ? why.p : "");
    return 2;
}

static int i_kvm_device(lua_State *L)
{
    struct orch_err err = { 0 };
    if (orch_accel_device(&err) < 0)
        return orch_push_err(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* disk(path): { writable, free_bytes }. */
static int i_disk(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    struct statvfs fs;
    lua_newtable(L);
    lua_pushboolean(L, faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0);
    lua_setfield(L, -2, "writable");
    lua_pushnumber(L, statvfs(path, &fs) < 0 ? 0 : (double)fs.f_bavail * (double)fs.f_frsize);
    lua_setfield(L, -2, "free_bytes");
    return 1;
}

/* Whether -v or a log level below warn was given. */
static int i_verbose(lua_State *L)
{
    lua_pushboolean(L, orch_log_on(ORCH_INFO));
    return 1;
}

/* utf8(s): what is not UTF-8 becomes U+FFFD, as orch.json.encode needs it. */
static int i_utf8(lua_State *L)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    cleanup_buf struct orch_buf quoted = { 0 };
    if (orch_utf8_valid((struct orch_slice){ s, n })) {
        lua_settop(L, 1);
        return 1;
    }
    orch_json_quote(&quoted, (struct orch_slice){ s, n });
    return push_json_text(L, (struct orch_slice){ quoted.p, quoted.n });
}

/* set_kernel(file, modules): before the first microVM or image build. */
static int i_set_kernel(lua_State *L)
{
    struct orch *o = host_of(L);
    free(o->paths.kernel);
    free(o->paths.modules);
    o->paths.kernel = orch_xstrdup(luaL_checkstring(L, 1));
    o->paths.modules = orch_xstrdup(luaL_optstring(L, 2, NULL));
    return 0;
}

/* ---- images */

struct building {
    struct orch_wait wait;
    struct orch_image_build *build;
    struct orch_err err;
    struct orch_image image;
};

static void push_image(lua_State *L, const struct orch_image *i)
{
    lua_newtable(L);
    lua_pushstring(L, i->name);
    lua_setfield(L, -2, "name");
    lua_pushstring(L, i->id);
    lua_setfield(L, -2, "id");
    lua_pushstring(L, i->kernel);
    lua_setfield(L, -2, "kernel");
    lua_pushstring(L, i->initrd);
    lua_setfield(L, -2, "initrd");
    lua_pushstring(L, i->disk);
    lua_setfield(L, -2, "disk");
    lua_pushstring(L, i->kernel_release);
    lua_setfield(L, -2, "kernel_release");
    lua_pushnumber(L, (double)i->bytes);
    lua_setfield(L, -2, "bytes");
}

static int build_push(lua_State *L, void *ud)
{
    struct building *b = ud;
    int n = 1;
    if (b->err.cls)
        n = orch_push_err(L, &b->err);
    else
        push_image(L, &b->image);
    orch_image_fini(&b->image);
    free(b);
    return n;
}

static void build_done(void *ud, const struct orch_image *image, const struct orch_err *err)
{
    struct building *b = ud;
    b->build = NULL;
    if (err) {
        b->err = *err;
    } else {
        orch_image_copy(&b->image, image);
    }
    orch_task_ready(b->wait, build_push, b);
}

static void build_cancel(void *ud)
{
    struct building *b = ud;
    orch_image_build_cancel(b->build);
    orch_image_fini(&b->image);
    free(b);
}

static void build_progress(void *ud, const char *line)
{
    (void)ud;
    orch_log_print(orch_slice_str(line));
}

static struct orch_image_opts image_opts(struct orch *o, char *dir)
{
    return (struct orch_image_opts){ .cache_dir = dir,
                                     .agent_path = o->paths.agent,
                                     .kernel = o->paths.kernel,
                                     .modules = o->paths.modules,
                                     .progress = build_progress };
}

/* recipe(file): the table that the file returns. It is data: the file runs bounded, like a
 * policy. */
static int i_recipe(lua_State *L)
{
    struct orch *o = host_of(L);
    const char *path = luaL_checkstring(L, 1);
    struct orch_err err = { 0 };
    cleanup_buf struct orch_buf text = { 0 };
    int r = orch_read_file(AT_FDCWD, path, 1 << 20, &text);
    if (r < 0) {
        orch_err_set(&err, -r, "%s: %s", path, strerror(-r));
        return orch_push_err(L, &err);
    }
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", o->paths.share);
    struct orch_state *s = orch_state_new(&(struct orch_state_opts){ .ctx = ORCH_CTX_POLICY,
                                                                     .memory_bytes = 32 << 20,
                                                                     .steps = 100 * 1000 * 1000,
                                                                     .cpu_ms = 1000,
                                                                     .lua_dir = lua_dir,
                                                                     .host = &o->env },
                                          &err);
    if (!s)
        return orch_push_err(L, &err);
    lua_State *R = orch_state_lua(s);
    orch_luaopen_orch(R);
    lua_settop(R, 0);
    lua_getglobal(R, "orch");
    lua_getfield(R, 1, "json");
    lua_getfield(R, 2, "encode");
    size_t n = 0;
    const char *json = NULL;
    if (orch_state_load(s, path, (struct orch_slice){ text.p ? text.p : "", text.n }, &err) == 0 &&
        orch_state_pcall(s, 0, 1, &err) == 0 && orch_state_pcall(s, 1, 1, &err) == 0)
        json = lua_tolstring(R, -1, &n);
    if (!json) {
        orch_state_free(s);
        orch_err_wrap(&err, "%s", path);
        err.cls = ORCH_CLASS_CONFIG;
        return orch_push_err(L, &err);
    }
    int results = push_json_text(L, (struct orch_slice){ json, n });
    orch_state_free(s);
    return results;
}

/* image_build(name[, { suite, options, sources, fresh }]): the table is a recipe's, as
 * lua/recipe.lua makes it. */
static int i_image_build(lua_State *L)
{
    struct orch *o = host_of(L);
    cleanup_free char *dir = orch_xasprintf("%s/images", o->paths.cache);
    struct orch_image_opts opts = image_opts(o, dir);
    struct orch_recipe recipe;
    luaL_checkstring(L, 1);
    if (lua_istable(L, 2)) {
        lua_getfield(L, 2, "options");
        recipe.options = orch_check_strings(L, -1, "options", 10000);
        lua_getfield(L, 2, "sources");
        recipe.sources = orch_check_strings(L, -1, "sources", 1000);
        lua_getfield(L, 2, "suite");
        recipe.suite = luaL_checkstring(L, -1);
        lua_getfield(L, 2, "fresh");
        opts.fresh = lua_toboolean(L, -1);
        opts.recipe = &recipe;
    }
    struct orch_err err = { 0 };
    cleanup_close int cache = orch_own_dir(o->paths.cache, &err);
    if (cache < 0)
        return orch_push_err(L, &err);
    struct building *b = orch_xcalloc(1, sizeof *b);
    b->build = orch_image_build_start(o->loop, luaL_checkstring(L, 1), &opts, build_done, b);
    return orch_task_wait(L, build_cancel, b, &b->wait);
}

static int i_image_find(lua_State *L)
{
    struct orch *o = host_of(L);
    cleanup_free char *dir = orch_xasprintf("%s/images", o->paths.cache);
    struct orch_image_opts opts = image_opts(o, dir);
    opts.digests = lua_toboolean(L, 2);
    struct orch_image image = { 0 };
    struct orch_err err = { 0 };
    if (orch_image_find(luaL_checkstring(L, 1), &opts, &image, &err) < 0)
        return orch_push_err(L, &err);
    push_image(L, &image);
    orch_image_fini(&image);
    return 1;
}

int orch_luaopen_internal(lua_State *L)
{
    static const struct luaL_Reg functions[] = {
        { "paths", i_paths },
        { "use_config", i_use_config },
        { "load", i_load },
        { "config", i_config },
        { "explain", i_explain },
        { "rules", i_rules },
        { "nft", i_nft },
        { "packet", i_packet },
        { "trust_look", i_trust_look },
        { "trust", i_trust },
        { "terminal", i_terminal },
        { "protect_check", i_protect_check },
        { "below_orch", i_below_orch },
        { "audit_list", i_audit_list },
        { "audit_running", i_audit_running },
        { "audit_verify", i_audit_verify },
        { "audit_verify_dir", i_audit_verify_dir },
        { "control", i_control },
        { "escape", i_escape },
        { "nearest", i_nearest },
        { "utf8", i_utf8 },
        { "kvm_device", i_kvm_device },
        { "disk", i_disk },
        { "verbose", i_verbose },
        { "launch_check", i_launch_check },
        { "isolation", i_isolation },
        { "set_kernel", i_set_kernel },
        { "recipe", i_recipe },
        { "image_build", i_image_build },
        { "image_find", i_image_find },
        { NULL, NULL },
    };
    lua_newtable(L);
    luaL_setfuncs(L, functions, 0);
    lua_pushliteral(L, ORCH_FEATURES);
    lua_setfield(L, -2, "features");
    lua_pushliteral(L, ORCH_PREFIX);
    lua_setfield(L, -2, "prefix");
    lua_pushinteger(L, (lua_Integer)geteuid());
    lua_setfield(L, -2, "uid");
    return 1;
}
