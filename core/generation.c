/* One generation: the configuration, the policies and the tools of a moment, each in Lua states of
 * their own, checked and tested before it is used. See host.h. */
#include "host.h"

#include "base/hash.h"
#include "script/lines.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum {
    SOURCE_MAX_BYTES = 1 << 20,
    FILES_MAX = 1000,
    LOAD_TIME_MS = 500, /* for the files' own top level; judging has its own budget */
    STEPS_PER_MS = 1000000, /* the time is the limit; steps bound what the clock is too coarse for */
};

struct loading {
    struct orch *o;
    struct orch_generation *g;
    enum orch_trust_mode mode;
    struct orch_trust_list *collected;
    struct orch_trust_file *trusted; /* CHECK: what was recorded */
    size_t n_trusted;
    bool trust_edits, needs_trust;
    char *base; /* the configuration's folder */
    struct orch_buf *errors;
    enum orch_class cls;
    struct orch_sha256_ctx hash;
    char sha[65]; /* of the source read last */
    unsigned files;
};

static void fail(struct loading *l, enum orch_class cls, const char *fmt, ...) ORCH_PRINTF(3, 4);
static void fail(struct loading *l, enum orch_class cls, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    cleanup_free char *line = NULL;
    if (vasprintf(&line, fmt, ap) >= 0 && l->errors->n < 64 * 1024) {
        orch_buf_str(l->errors, line);
        orch_buf_char(l->errors, '\n');
    }
    va_end(ap);
    l->cls = cls;
}

/* ---- sources: read once, hashed, held against what is trusted */

/* As messages show it: relative to the configuration's folder when beneath it. */
static const char *display(const struct loading *l, const char *path)
{
    size_t n = l->base ? strlen(l->base) : 0;
    if (n && strncmp(path, l->base, n) == 0 && path[n] == '/')
        return path + n + 1;
    return path;
}

static bool check_trust(struct loading *l, const char *path, const char *sha)
{
    if (l->mode == ORCH_TRUST_COLLECT) {
        struct orch_trust_list *c = l->collected;
        c->files = orch_xrealloc(c->files, (c->n + 1) * sizeof *c->files);
        c->files[c->n].path = orch_xstrdup(path);
        memcpy(c->files[c->n++].sha256, sha, 65);
        return true;
    }
    if (!l->needs_trust)
        return true;
    for (size_t i = 0; i < l->n_trusted; i++) {
        if (strcmp(l->trusted[i].path, path) != 0)
            continue;
        if (l->trust_edits || strcmp(l->trusted[i].sha256, sha) == 0)
            return true;
        fail(l, ORCH_CLASS_CONFIG, "%s: changed since it was trusted; look at it, then run: orch trust %s", display(l, path), l->base);
        return false;
    }
    if (l->trust_edits)
        return true;
    fail(l, ORCH_CLASS_CONFIG, "%s: not trusted; a configuration in the working directory is only loaded after: orch trust %s",
         display(l, path), l->base);
    return false;
}

/* dirfd/name is opened; path is the absolute name. Product files (lua/) are hashed but need no trust. */
static int read_source(struct loading *l, int dirfd, const char *name, const char *path, bool product, struct orch_buf *out)
{
    struct stat st;
    if (++l->files > FILES_MAX) {
        fail(l, ORCH_CLASS_CONFIG, "%s: more than %d files", display(l, path), FILES_MAX);
        return -E2BIG;
    }
    int r = fstatat(dirfd, name, &st, 0) < 0 ? -errno : 0;
    if (r == 0 && (st.st_mode & S_IWOTH) && !product) {
        fail(l, ORCH_CLASS_CONFIG, "%s: everybody may write it; run: chmod o-w %s", display(l, path), path);
        return -EPERM;
    }
    if (r == 0)
        r = orch_read_file(dirfd, name, SOURCE_MAX_BYTES, out);
    if (r == -EFBIG)
        fail(l, ORCH_CLASS_CONFIG, "%s: larger than 1 MiB", display(l, path));
    else if (r < 0)
        fail(l, ORCH_CLASS_CONFIG, "%s: cannot be read: %s", display(l, path), strerror(-r));
    if (r < 0)
        return r;
    orch_sha256_hex(out->p, out->n, l->sha);
    if (!product && !check_trust(l, path, l->sha))
        return -EPERM;
    orch_sha256_update(&l->hash, path, strlen(path) + 1);
    orch_sha256_update(&l->hash, l->sha, 64);
    return 0;
}

/* An error of a file, which is named even where the error's text does not. */
static void fail_file(struct loading *l, const char *shown, const struct orch_err *err)
{
    bool named = strstr(err->msg, shown) != NULL;
    fail(l, ORCH_CLASS_CONFIG, "%s%s%s", named ? "" : shown, named ? "" : ": ", err->msg);
}

/* Compiles and runs a source; its one result is left on the stack. n_args values on the stack are its
 * arguments (they are consumed). */
static int run_source(struct loading *l, struct orch_state *s, const char *shown, struct orch_slice text, int n_args)
{
    lua_State *L = orch_state_lua(s);
    struct orch_err err = { 0 };
    int r = orch_state_load_known(s, shown, text, l->sha, &err);
    if (r == 0) {
        lua_insert(L, -(n_args + 1));
        r = orch_state_pcall(s, n_args, 1, &err);
    } else {
        lua_pop(L, n_args);
    }
    if (r < 0)
        fail_file(l, shown, &err);
    return r;
}

/* One of the product's files below lua/. */
static int run_product(struct loading *l, struct orch_state *s, const char *name, int n_args)
{
    cleanup_free char *path = orch_xasprintf("%s/lua/%s", l->o->paths.share, name);
    cleanup_buf struct orch_buf text = { 0 };
    int r = read_source(l, AT_FDCWD, path, path, true, &text);
    if (r < 0) {
        lua_pop(orch_state_lua(s), n_args);
        return r;
    }
    return run_source(l, s, path, (struct orch_slice){ text.p, text.n }, n_args);
}

/* ---- functions the Lua side depends on */

static int l_nearest(lua_State *L)
{
    const char *word = luaL_checkstring(L, 1);
    const char **list = orch_check_strings(L, 2, "list", 256);
    lua_pushstring(L, orch_nearest(word, list));
    return 1;
}

static int l_duration(lua_State *L)
{
    int64_t ms = lua_type(L, 1) == LUA_TNUMBER   ? (int64_t)(lua_tonumber(L, 1) * 1000)
                 : lua_type(L, 1) == LUA_TSTRING ? orch_parse_duration_ms(lua_tostring(L, 1))
                                                 : -1;
    if (ms < 0)
        return 0;
    lua_pushnumber(L, (double)ms);
    return 1;
}

static int l_size(lua_State *L)
{
    int64_t n = lua_type(L, 1) == LUA_TNUMBER   ? (int64_t)lua_tonumber(L, 1)
                : lua_type(L, 1) == LUA_TSTRING ? orch_parse_size_bytes(lua_tostring(L, 1))
                                                : -1;
    if (n < 0)
        return 0;
    lua_pushnumber(L, (double)n);
    return 1;
}

static int l_is_array(lua_State *L)
{
    lua_pushboolean(L, orch_lua_is_array(L, 1));
    return 1;
}

static int l_is_bigint(lua_State *L)
{
    lua_pushboolean(L, orch_lua_is_bigint(L, 1));
    return 1;
}

static int l_rate(lua_State *L)
{
    struct orch *o = orch_env_of(L)->ud;
    lua_pushboolean(L, orch_rate_take(o, luaL_checkstring(L, 1), luaL_checknumber(L, 2), (int64_t)luaL_checknumber(L, 3)));
    return 1;
}

/* What predicates see of a session, and what its client says of itself. */
static int l_session(lua_State *L)
{
    struct orch *o = orch_env_of(L)->ud;
    const char *id = luaL_checkstring(L, 1);
    struct orch_session *s = o->sessions;
    while (s && strcmp(s->id, id) != 0)
        s = s->next;
    lua_newtable(L);
    lua_pushvalue(L, 1);
    lua_setfield(L, -2, "id");
    lua_newtable(L);
    for (size_t i = 0; s && i < s->n_marks; i++) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, s->marks[i]);
    }
    lua_setfield(L, -2, "marks");
    struct orch_slice client = s && s->mcp ? orch_mcp_session_client(s->mcp) : (struct orch_slice){ 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (client.n && orch_json_scan(&d, client, &(struct orch_json_limits){ 0 }, &fault) == 0)
        orch_lua_push_json(L, &d, 0, 0);
    else
        lua_newtable(L);
    return 2;
}

/* Secrets: env "NAME" in orchestrator.lua. */
static int secret_concat(lua_State *L)
{
    lua_settop(L, 2);
    size_t n = 0;
    cleanup_buf struct orch_buf b = { 0 };
    for (int i = 1; i <= 2; i++) {
        const char *s = lua_type(L, i) == LUA_TUSERDATA ? lua_touserdata(L, i) : lua_tolstring(L, i, &n);
        if (!s)
            return luaL_error(L, "a secret can only be joined with strings");
        orch_buf_str(&b, s);
    }
    memcpy(lua_newuserdata(L, b.n + 1), b.p, b.n + 1);
    luaL_getmetatable(L, "orch.secret");
    lua_setmetatable(L, -2);
    return 1;
}

static int secret_tostring(lua_State *L)
{
    lua_pushliteral(L, "[secret]");
    return 1;
}

static int l_is_secret(lua_State *L)
{
    lua_pushboolean(L, lua_type(L, 1) == LUA_TUSERDATA && luaL_testudata(L, 1, "orch.secret") != NULL);
    return 1;
}

static int l_config_env(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    const char *value = getenv(name);
    if (!value) {
        if (lua_gettop(L) < 2)
            return luaL_error(L, "the environment variable %s is not set; set it, or give a default: env(\"%s\", nil)", name, name);
        lua_settop(L, 2);
        return 1;
    }
    memcpy(lua_newuserdata(L, strlen(value) + 1), value, strlen(value) + 1);
    if (luaL_newmetatable(L, "orch.secret")) {
        lua_pushcfunction(L, secret_concat);
        lua_setfield(L, -2, "__concat");
        lua_pushcfunction(L, secret_tostring);
        lua_setfield(L, -2, "__tostring");
        lua_pushboolean(L, 0);
        lua_setfield(L, -2, "__metatable");
    }
    lua_setmetatable(L, -2);
    return 1;
}

static void set_function(lua_State *L, const char *name, lua_CFunction fn)
{
    lua_pushcfunction(L, fn);
    lua_setfield(L, -2, name);
}

/* ---- states */

static struct orch_state *state_new(struct loading *l, enum orch_context ctx, size_t memory_bytes)
{
    struct orch_err err = { 0 };
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", l->o->paths.share);
    struct orch_state *s = orch_state_new(
        &(struct orch_state_opts){ .ctx = ctx,
                                   .memory_bytes = memory_bytes,
                                   .steps = (uint64_t)LOAD_TIME_MS * STEPS_PER_MS,
                                   .cpu_ms = LOAD_TIME_MS,
                                   .lua_dir = lua_dir,
                                   .host = &l->o->env },
        &err);
    if (!s) {
        fail(l, ORCH_CLASS_FAILED, "%s", err.msg);
        return NULL;
    }
    orch_luaopen_orch(orch_state_lua(s));
    lua_settop(orch_state_lua(s), 0);
    return s;
}

/* Pushes a deps table with json and what the caller sets on top. */
static void push_deps(lua_State *L)
{
    lua_newtable(L);
    lua_getglobal(L, "orch");
    lua_getfield(L, -1, "json");
    lua_setfield(L, -3, "json");
    lua_pop(L, 1);
    set_function(L, "nearest", l_nearest);
    set_function(L, "duration", l_duration);
    set_function(L, "size", l_size);
}

/* Pushes the schema module, loaded into this state; 0, or a negative errno with nothing pushed. */
static int push_schema(struct loading *l, struct orch_state *s)
{
    lua_State *L = orch_state_lua(s);
    push_deps(L);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    set_function(L, "is_array", l_is_array);
    set_function(L, "is_bigint", l_is_bigint);
    return run_product(l, s, "schema.lua", 1);
}

/* ---- the configuration */

/* Walks a dotted path in the table at the top; pushes the value (nil when absent). */
static void push_path(lua_State *L, const char *path)
{
    cleanup_free char *copy = orch_xstrdup(path);
    lua_pushvalue(L, -1);
    for (char *save, *part = strtok_r(copy, ".", &save); part; part = strtok_r(NULL, ".", &save)) {
        if (lua_istable(L, -1)) {
            lua_getfield(L, -1, part);
        } else {
            lua_pushnil(L);
        }
        lua_remove(L, -2);
    }
}

static char *config_string(lua_State *L, const char *path)
{
    push_path(L, path);
    char *s = lua_type(L, -1) == LUA_TSTRING ? orch_xstrdup(lua_tostring(L, -1)) : NULL;
    lua_pop(L, 1);
    return s;
}

static double config_number(lua_State *L, const char *path)
{
    push_path(L, path);
    double v = lua_tonumber(L, -1);
    lua_pop(L, 1);
    return v;
}

static void read_config(struct loading *l, lua_State *L)
{
    struct orch_config *c = &l->g->cfg;
    c->policies = config_string(L, "policies");
    c->workspace = config_string(L, "workspace");
    c->vm_backend = config_string(L, "vm.backend");
    c->vm_accel = config_string(L, "vm.accel");
    c->vm_image = config_string(L, "vm.image");
    c->vm_memory_bytes = (uint64_t)config_number(L, "vm.memory");
    c->vm_vcpus = (int)config_number(L, "vm.vcpus");
    c->vm_max = (int)config_number(L, "vm.max");
    c->vm_timeout_ms = (int64_t)config_number(L, "vm.timeout");
    c->message_bytes = (size_t)config_number(L, "limits.message");
    c->depth = (unsigned)config_number(L, "limits.depth");
    c->calls = (unsigned)config_number(L, "limits.calls");
    c->policy_time_ms = (int64_t)config_number(L, "limits.policy.time");
    c->policy_memory_bytes = (size_t)config_number(L, "limits.policy.memory");
    c->tool_cpu_ms = (int64_t)config_number(L, "limits.tool.cpu");
    c->tool_memory_bytes = (size_t)config_number(L, "limits.tool.memory");
    c->audit_dir = config_string(L, "audit.dir");
    if (!c->audit_dir)
        c->audit_dir = orch_xasprintf("%s/audit", l->o->paths.state);
    cleanup_free char *sync = config_string(L, "audit.sync");
    c->audit_sync = !sync || strcmp(sync, "none") == 0 ? ORCH_AUDIT_SYNC_NONE
                    : strcmp(sync, "each") == 0        ? ORCH_AUDIT_SYNC_EACH
                                                       : ORCH_AUDIT_SYNC_INTERVAL;
    push_path(L, "net.permit_private");
    c->n_permit = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    c->permit = orch_xcalloc(c->n_permit, sizeof *c->permit);
    size_t kept = 0;
    for (size_t i = 0; i < c->n_permit; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        if (orch_cidr_parse(lua_tostring(L, -1), &c->permit[kept], NULL) == 0) /* IPv6: nothing is reachable by it */
            kept++;
        lua_pop(L, 1);
    }
    c->n_permit = kept;
    lua_pop(L, 1);
    push_path(L, "tools");
    size_t n = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    c->tools = orch_xcalloc(n + 1, sizeof *c->tools);
    for (size_t i = 0; i < n; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        c->tools[i] = orch_xstrdup(lua_tostring(L, -1));
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

/* Appends each string of the list at the top (entries may be { path =, message = }) and pops it. */
static void take_lines(lua_State *L, const char *where, void (*each)(void *ud, const char *line), void *ud)
{
    size_t n = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    for (size_t i = 1; i <= n; i++) {
        lua_rawgeti(L, -1, (int)i);
        if (lua_istable(L, -1)) {
            lua_getfield(L, -1, "path");
            lua_getfield(L, -2, "message");
            const char *path = lua_tostring(L, -2), *message = lua_tostring(L, -1);
            cleanup_free char *line = orch_xasprintf("%s: %s%s%s", where, path ? path : "", path && *path ? ": " : "",
                                                     message ? message : "?");
            each(ud, line);
            lua_pop(L, 2);
        } else {
            const char *text = lua_tostring(L, -1);
            each(ud, text ? text : "?");
        }
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

static void add_error(void *ud, const char *line)
{
    fail(ud, ORCH_CLASS_CONFIG, "%s", line);
}

static void add_note(void *ud, const char *line)
{
    struct loading *l = ud;
    orch_buf_str(&l->g->notes, line);
    orch_buf_char(&l->g->notes, '\n');
}

static int load_config(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    cleanup_buf struct orch_buf text = { 0 };
    if (read_source(l, AT_FDCWD, o->paths.config, o->paths.config, o->paths.origin == ORCH_CONFIG_BUILTIN, &text) < 0)
        return -1;
    const char *shown = display(l, o->paths.config);
    struct orch_err err = { 0 };
    if (orch_state_load(g->policy, shown, (struct orch_slice){ text.p, text.n }, &err) < 0) {
        fail_file(l, shown, &err);
        return -1;
    }
    orch_state_env(L, -1);
    set_function(L, "env", l_config_env);
    lua_pop(L, 1);
    if (orch_state_pcall(g->policy, 0, 1, &err) < 0) {
        fail_file(l, shown, &err);
        return -1;
    }
    push_deps(L);
    set_function(L, "is_secret", l_is_secret);
    lua_pushstring(L, o->paths.home);
    lua_setfield(L, -2, "home");
    lua_pushstring(L, o->paths.cwd);
    lua_setfield(L, -2, "cwd");
    if (run_product(l, g->policy, "config.lua", 1) < 0)
        return -1;
    lua_getfield(L, -1, "check"); /* value, module, check */
    lua_pushvalue(L, -3);
    lua_newtable(L);
    lua_pushstring(L, l->base);
    lua_setfield(L, -2, "dir");
    lua_pushstring(L, shown);
    lua_setfield(L, -2, "file");
    if (orch_state_pcall(g->policy, 2, 2, &err) < 0) {
        fail(l, ORCH_CLASS_CONFIG, "%s: %s", shown, err.msg);
        return -1;
    }
    if (lua_isnil(L, -2)) {
        take_lines(L, shown, add_error, l);
        return -1;
    }
    lua_pop(L, 1);
    read_config(l, L);
    push_path(L, "notes");
    take_lines(L, shown, add_note, l);
    lua_getfield(L, -2, "show"); /* value, module, cfg, show */
    lua_pushvalue(L, -2);
    if (orch_state_pcall(g->policy, 1, 1, &err) == 0) {
        cleanup_buf struct orch_buf json = { 0 };
        char why[256];
        if (orch_lua_encode_json(L, -1, &json, why, sizeof why) == 0)
            g->config_show = orch_steal_ptr(&json.p);
    }
    lua_settop(L, 0);
    struct stat st;
    if (g->cfg.workspace && (stat(g->cfg.workspace, &st) < 0 || !S_ISDIR(st.st_mode))) {
        fail(l, ORCH_CLASS_CONFIG, "%s: workspace: %s is not a directory", shown, g->cfg.workspace);
        return -1;
    }
    return 0;
}

/* ---- policies */

static int engine_call(struct loading *l, const char *method, int n_args, int n_results)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    struct orch_err err = { 0 };
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, method);
    lua_remove(L, -2);
    lua_insert(L, -(n_args + 1));
    int r = orch_state_pcall(g->policy, n_args, n_results, &err);
    if (r < 0)
        fail(l, ORCH_CLASS_CONFIG, "%s", err.msg);
    return r;
}

static int load_policy_file(struct loading *l, int dirfd, const char *name)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    cleanup_free char *path = orch_xasprintf("%s/%s", g->cfg.policies, name);
    const char *shown = display(l, path);
    cleanup_buf struct orch_buf text = { 0 };
    if (read_source(l, dirfd, name, path, l->o->paths.origin == ORCH_CONFIG_BUILTIN, &text) < 0)
        return -1;
    struct orch_slice source = { text.p, text.n };
    if (run_source(l, g->policy, shown, source, 0) < 0)
        return -1;
    bool tools = strcmp(name, "tools.lua") == 0;
    lua_pushstring(L, shown);
    lua_insert(L, -2);
    orch_lines_push(L, source);
    if (engine_call(l, tools ? "load_tools" : "load_network", 3, 1) < 0)
        return -1;
    size_t before = l->errors->n;
    take_lines(L, shown, add_error, l);
    return l->errors->n == before ? 0 : -1;
}

static int open_dir(const char *path)
{
    return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The sorted names of *.lua in a directory; -1 with a failure noted. Frees nothing on error. */
static int list_lua(struct loading *l, int dirfd, const char *path, char ***names, size_t *n)
{
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    if (!d) {
        fail(l, ORCH_CLASS_CONFIG, "%s: %s", path, strerror(errno));
        return -1;
    }
    *names = NULL;
    *n = 0;
    for (struct dirent *e; (e = readdir(d));) {
        size_t len = strlen(e->d_name);
        if (len < 5 || e->d_name[0] == '.' || strcmp(e->d_name + len - 4, ".lua") != 0)
            continue;
        *names = orch_xrealloc(*names, (*n + 1) * sizeof **names);
        (*names)[(*n)++] = orch_xstrdup(e->d_name);
    }
    closedir(d);
    if (*n)
        qsort(*names, *n, sizeof **names, by_name);
    return 0;
}

static void free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

static int load_policies(struct loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    push_deps(L);
    set_function(L, "rate", l_rate);
    set_function(L, "session", l_session);
    orch_luaopen_network_deps(L, g);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    if (push_schema(l, g->policy) < 0)
        return -1;
    lua_setfield(L, -2, "schema");
    if (run_product(l, g->policy, "policy.lua", 1) < 0)
        return -1;
    lua_getfield(L, -1, "judge");
    g->judge_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    g->engine_ref = luaL_ref(L, LUA_REGISTRYINDEX);

    cleanup_close int dirfd = open_dir(g->cfg.policies);
    if (dirfd < 0) {
        fail(l, ORCH_CLASS_CONFIG, "%s: the policies directory cannot be opened: %s; run: orch init", display(l, g->cfg.policies),
             strerror(errno));
        return -1;
    }
    char **names;
    size_t n;
    if (list_lua(l, dirfd, g->cfg.policies, &names, &n) < 0)
        return -1;
    int r = 0;
    bool tools = false;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], "tools.lua") != 0 && strcmp(names[i], "network.lua") != 0) {
            fail(l, ORCH_CLASS_CONFIG, "%s/%s: not a policy file; only tools.lua and network.lua belong here", display(l, g->cfg.policies),
                 names[i]);
            r = -1;
        } else if (load_policy_file(l, dirfd, names[i]) < 0) {
            r = -1;
        }
        tools = tools || strcmp(names[i], "tools.lua") == 0;
    }
    free_names(names, n);
    if (!tools) {
        fail(l, ORCH_CLASS_CONFIG, "%s/tools.lua: missing; without rules every call would be denied; run: orch init",
             display(l, g->cfg.policies));
        return -1;
    }
    return r;
}

/* ---- tools */

static int by_wire_name(const void *a, const void *b)
{
    return strcmp((*(struct orch_tool *const *)a)->wire_name, (*(struct orch_tool *const *)b)->wire_name);
}

struct orch_tool *orch_generation_tool(const struct orch_generation *g, struct orch_slice name)
{
    size_t low = 0, high = g->n_tools;
    while (low < high) {
        size_t mid = (low + high) / 2;
        const char *w = g->tools[mid]->wire_name;
        int c = strncmp(name.p, w, name.n);
        if (c == 0)
            c = w[name.n] ? -1 : 0;
        if (c == 0)
            return g->tools[mid];
        if (c < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return NULL;
}

void orch_tool_fini(struct orch_tool *t)
{
    free(t->name);
    free(t->wire_name);
    free(t->server);
    free(t->file);
    free(t->definition);
    free(t->input);
}

int orch_generation_add_tool(struct orch_generation *g, const struct orch_tool *def, struct orch_slice untrusted, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc schema = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&schema, orch_slice_str(def->input), &(struct orch_json_limits){ .bytes = 1 << 20 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s at byte %zu", fault.rule, fault.byte);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "add_tool");
    lua_remove(L, -2);
    lua_pushstring(L, def->name);
    lua_pushstring(L, def->server);
    orch_lua_push_json(L, &schema, 0, ORCH_LUA_JSON_KEEP_NULL); /* const: null is a schema too */
    if (untrusted.n)
        lua_pushlstring(L, untrusted.p, untrusted.n);
    else
        lua_pushnil(L);
    int r = orch_state_pcall(g->policy, 4, 2, err);
    if (r < 0)
        return r;
    if (!lua_toboolean(L, -2)) {
        const char *why = lua_tostring(L, -1);
        r = orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s", why ? why : "input schema is wrong");
        lua_pop(L, 2);
        return r;
    }
    if (lua_isstring(L, -1))
        orch_buf_printf(&g->notes, "%s: schema keywords that are not checked: %s\n", def->name, lua_tostring(L, -1));
    lua_pop(L, 2);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "listed");
    lua_remove(L, -2);
    lua_pushstring(L, def->name);
    r = orch_state_pcall(g->policy, 1, 1, err);
    if (r < 0)
        return r;
    struct orch_tool *t = orch_generation_tool(g, orch_slice_str(def->wire_name));
    if (t) { /* an own tool of the same name replaces a shipped one */
        orch_tool_fini(t);
    } else {
        t = orch_xmalloc(sizeof *t);
        g->tools = orch_xrealloc(g->tools, (g->n_tools + 1) * sizeof(struct orch_tool *));
        g->tools[g->n_tools++] = t;
    }
    *t = *def;
    t->name = orch_xstrdup(def->name);
    t->wire_name = orch_xstrdup(def->wire_name);
    t->server = orch_xstrdup(def->server);
    t->file = orch_xstrdup(def->file);
    t->definition = orch_xstrdup(def->definition);
    t->input = orch_xstrdup(def->input);
    t->listed = lua_toboolean(L, -1);
    lua_pop(L, 1);
    lua_pushstring(L, t->name);
    t->name_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    qsort(g->tools, g->n_tools, sizeof(struct orch_tool *), by_wire_name);
    return 0;
}

void orch_generation_list(struct orch_generation *g)
{
    g->list.n = 0;
    orch_buf_char(&g->list, '[');
    for (size_t i = 0; i < g->n_tools; i++) {
        if (!g->tools[i]->listed)
            continue;
        if (g->list.n > 1)
            orch_buf_char(&g->list, ',');
        orch_buf_str(&g->list, g->tools[i]->definition);
    }
    orch_buf_char(&g->list, ']');
}

/* dispatch.register(where, table) with its table on the stack; the tool is added. */
static int register_tool(struct loading *l, int dispatch_ref, const char *path, const char *shown, bool shipped)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    struct orch_err err = { 0 };
    lua_rawgeti(L, LUA_REGISTRYINDEX, dispatch_ref);
    lua_getfield(L, -1, "register");
    lua_remove(L, -2);
    lua_pushstring(L, shown);
    lua_pushvalue(L, -3);
    lua_remove(L, -4);
    if (orch_state_pcall(g->tools_state, 2, 6, &err) < 0) {
        fail(l, ORCH_CLASS_CONFIG, "%s", err.msg);
        return -1;
    }
    if (lua_isnil(L, -6)) {
        fail(l, ORCH_CLASS_CONFIG, "%s", lua_tostring(L, -5));
        lua_pop(L, 6);
        return -1;
    }
    struct orch_tool t = { .shipped = shipped, .timeout_ms = (int64_t)lua_tonumber(L, -2) };
    if (lua_isnil(L, -1)) {
        t.output_ref = LUA_NOREF;
        lua_pop(L, 1);
    } else {
        t.output_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    }
    lua_pop(L, 1); /* name, run, definition, input */
    lua_pushvalue(L, -3);
    t.run_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    t.name = orch_xstrdup(lua_tostring(L, -4));
    t.wire_name = orch_xstrdup(t.name);
    t.server = orch_xstrdup("local");
    t.file = orch_xstrdup(path);
    t.definition = orch_xstrdup(lua_tostring(L, -2));
    t.input = orch_xstrdup(lua_tostring(L, -1));
    lua_pop(L, 4);
    const struct orch_tool *same = orch_generation_tool(g, orch_slice_str(t.wire_name));
    int r;
    if (same && !same->shipped)
        r = orch_err_set(&err, EEXIST, "the name %s is taken by %s", t.name, display(l, same->file));
    else
        r = orch_generation_add_tool(g, &t, (struct orch_slice){ 0 }, &err);
    orch_tool_fini(&t);
    if (r < 0)
        fail(l, ORCH_CLASS_CONFIG, "%s: %s%s", shown, r == -EEXIST ? "" : "input: ", err.msg);
    return r;
}

static int load_tool_dir(struct loading *l, int dispatch_ref, const char *dir, bool product)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    cleanup_close int dirfd = open_dir(dir);
    if (dirfd < 0) {
        fail(l, ORCH_CLASS_CONFIG, "%s: the tools directory cannot be opened: %s", display(l, dir), strerror(errno));
        return -1;
    }
    char **names;
    size_t n;
    if (list_lua(l, dirfd, dir, &names, &n) < 0)
        return -1;
    int r = 0;
    for (size_t i = 0; i < n; i++) {
        cleanup_free char *path = orch_xasprintf("%s/%s", dir, names[i]);
        const char *shown = display(l, path);
        cleanup_buf struct orch_buf text = { 0 };
        if (read_source(l, dirfd, names[i], path, product, &text) < 0) {
            r = -1;
            continue;
        }
        struct orch_err err = { 0 };
        if (orch_state_load_known(g->tools_state, shown, (struct orch_slice){ text.p, text.n }, l->sha, &err) < 0) {
            fail_file(l, shown, &err);
            r = -1;
            continue;
        }
        orch_state_env(L, -1);
        int env_ref = luaL_ref(L, LUA_REGISTRYINDEX);
        if (orch_state_pcall(g->tools_state, 0, 1, &err) < 0) {
            fail_file(l, shown, &err);
            r = -1;
        } else {
            lua_rawgeti(L, LUA_REGISTRYINDEX, env_ref);
            orch_state_freeze(L, lua_gettop(L));
            lua_pop(L, 1);
            if (register_tool(l, dispatch_ref, path, shown, product) < 0)
                r = -1;
        }
        luaL_unref(L, LUA_REGISTRYINDEX, env_ref);
    }
    free_names(names, n);
    return r;
}

/* The schema module of the tool state: few tools have an output schema, and compiling it costs a fifth of
 * the start, so it is loaded when the first one asks. */
static int l_schema_module(lua_State *L)
{
    struct loading *l = lua_touserdata(L, lua_upvalueindex(1));
    lua_getfield(L, LUA_REGISTRYINDEX, "orch.schema");
    if (!lua_isnil(L, -1))
        return 1;
    if (push_schema(l, l->g->tools_state) < 0)
        return luaL_error(L, "the schema module cannot be loaded");
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, "orch.schema");
    return 1;
}

static int load_tools(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    push_deps(L);
    lua_pushlightuserdata(L, l);
    lua_pushcclosure(L, l_schema_module, 1);
    lua_setfield(L, -2, "schema"); /* called while loading only: l is gone afterwards */
    if (run_product(l, g->tools_state, "dispatch.lua", 1) < 0)
        return -1;
    int dispatch_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    cleanup_free char *shipped = orch_xasprintf("%s/lua/tools", o->paths.share);
    int r = load_tool_dir(l, dispatch_ref, shipped, true);
    for (char **dir = g->cfg.tools; *dir; dir++)
        if (strcmp(*dir, shipped) != 0 && load_tool_dir(l, dispatch_ref, *dir, false) < 0)
            r = -1;
    luaL_unref(L, LUA_REGISTRYINDEX, dispatch_ref);
    struct orch_err err = { 0 };
    for (size_t i = 0; i < o->n_c_tools; i++)
        if (orch_generation_add_tool(g, &o->c_tools[i], (struct orch_slice){ 0 }, &err) < 0) {
            fail(l, ORCH_CLASS_CONFIG, "%s: input: %s", o->c_tools[i].name, err.msg);
            r = -1;
        }
    return r;
}

/* ---- all of it */

static int compile_redact(struct loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "redact");
    g->n_redact = lua_objlen(L, -1);
    g->redact = orch_xcalloc(g->n_redact, sizeof(struct orch_regex *));
    g->redact_text = orch_xcalloc(g->n_redact, sizeof(char *));
    int r = 0;
    for (size_t i = 0; i < g->n_redact; i++) {
        struct orch_err err = { 0 };
        lua_rawgeti(L, -1, (int)i + 1);
        g->redact_text[i] = orch_xstrdup(lua_tostring(L, -1));
        lua_pop(L, 1);
        g->redact[i] = orch_regex_compile(orch_slice_str(g->redact_text[i]), &err);
        if (!g->redact[i]) {
            fail(l, ORCH_CLASS_CONFIG, "redact: %s", err.msg);
            r = -1;
        }
    }
    lua_pop(L, 2);
    return r;
}

static int run_policy_tests(struct loading *l)
{
    size_t before = l->errors->n;
    if (engine_call(l, "run_tests", 0, 1) < 0)
        return -1;
    take_lines(orch_state_lua(l->g->policy), "tests", add_error, l);
    return l->errors->n == before ? 0 : -1;
}

static int find_trust(struct loading *l)
{
    struct orch *o = l->o;
    l->needs_trust = l->mode == ORCH_TRUST_CHECK && o->paths.origin == ORCH_CONFIG_CWD;
    if (!l->needs_trust)
        return 0;
    struct orch_err err = { 0 };
    cleanup_free char *path = orch_xasprintf("%s/state.db", o->paths.state);
    struct orch_db *db = access(path, F_OK) == 0 ? orch_db_open(path, &err) : NULL;
    if (!db) {
        if (err.msg[0]) {
            fail(l, ORCH_CLASS_CONFIG, "trust: %s", err.msg);
            return -1;
        }
        return 0; /* nothing was ever trusted: read_source says so */
    }
    int r = orch_db_trust_get(db, l->base, &l->trust_edits, &l->trusted, &l->n_trusted, &err);
    orch_db_close(db);
    if (r < 0)
        fail(l, ORCH_CLASS_CONFIG, "trust: %s", err.msg);
    return r < 0 ? -1 : 0;
}

static int load_all(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_generation *g = l->g;
    if (find_trust(l) < 0)
        return -1;
    g->policy = state_new(l, ORCH_CTX_POLICY, 64 << 20);
    if (!g->policy || load_config(l) < 0)
        return -1;
    g->tools_state = state_new(l, ORCH_CTX_TOOL, g->cfg.tool_memory_bytes);
    if (!g->tools_state)
        return -1;
    /* Both are tried, so that one run shows the errors of policies and tools alike. */
    int r = load_policies(l);
    if (g->engine_ref <= 0 || load_tools(l) < 0 || r < 0)
        return -1;
    struct orch_err err = { 0 };
    if (o->upstream && orch_upstream_add_tools(o->upstream, g, &err) < 0) {
        fail(l, err.cls, "%s", err.msg);
        return -1;
    }
    if (compile_redact(l) < 0 || run_policy_tests(l) < 0)
        return -1;
    orch_generation_list(g);
    orch_state_set_limits(g->policy, g->cfg.policy_memory_bytes, (uint64_t)g->cfg.policy_time_ms * STEPS_PER_MS, g->cfg.policy_time_ms);
    orch_state_set_limits(g->tools_state, g->cfg.tool_memory_bytes, (uint64_t)g->cfg.tool_cpu_ms * STEPS_PER_MS, g->cfg.tool_cpu_ms);
    uint8_t digest[ORCH_SHA256_BYTES];
    orch_sha256_final(&l->hash, digest);
    cleanup_buf struct orch_buf hex = { 0 };
    orch_buf_hex(&hex, digest, sizeof digest);
    memcpy(g->hash, hex.p, 65);
    orch_buf_printf(&g->audit_field, ",\"generation\":\"%s\"", g->hash);
    return 0;
}

struct orch_generation *orch_generation_load(struct orch *o, enum orch_trust_mode mode, struct orch_trust_list *collected,
                                             struct orch_buf *errors, enum orch_class *cls)
{
    struct loading l = { .o = o, .mode = mode, .collected = collected, .errors = errors, .cls = ORCH_CLASS_CONFIG };
    l.g = orch_xcalloc(1, sizeof *l.g);
    l.g->host = o;
    l.g->refs = 1;
    l.base = orch_xstrdup(o->paths.config);
    *strrchr(l.base, '/') = 0;
    orch_sha256_init(&l.hash);
    int r = load_all(&l);
    orch_trust_files_free(l.trusted, l.n_trusted);
    free(l.base);
    if (r < 0) {
        *cls = l.cls;
        orch_generation_unref(l.g);
        return NULL;
    }
    return l.g;
}

struct orch_generation *orch_generation_ref(struct orch_generation *g)
{
    g->refs++;
    return g;
}

void orch_generation_unref(struct orch_generation *g)
{
    if (!g || --g->refs)
        return;
    orch_state_free(g->policy);
    orch_state_free(g->tools_state);
    for (size_t i = 0; i < g->n_tools; i++) {
        orch_tool_fini(g->tools[i]);
        free(g->tools[i]);
    }
    free(g->tools);
    for (size_t i = 0; i < g->n_redact; i++) {
        orch_regex_free(g->redact[i]);
        free(g->redact_text[i]);
    }
    free(g->redact);
    free(g->redact_text);
    struct orch_config *c = &g->cfg;
    for (char **dir = c->tools; dir && *dir; dir++)
        free(*dir);
    free(c->tools);
    free(c->permit);
    free(c->policies);
    free(c->workspace);
    free(c->audit_dir);
    free(c->vm_backend);
    free(c->vm_accel);
    free(c->vm_image);
    free(g->config_show);
    orch_buf_free(&g->list);
    orch_buf_free(&g->audit_field);
    orch_buf_free(&g->notes);
    free(g);
}

/* Calls engine.METHOD with n_args values already pushed; its one result as JSON. */
static int engine_json(struct orch_generation *g, const char *method, int n_args, struct orch_buf *out, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    char why[256];
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, method);
    lua_remove(L, -2);
    lua_insert(L, -(n_args + 1));
    int r = orch_state_pcall(g->policy, n_args, 1, err);
    if (r < 0)
        return r;
    r = orch_lua_encode_json(L, -1, out, why, sizeof why);
    lua_pop(L, 1);
    return r < 0 ? orch_err_set(err, EINVAL, "%s", why) : 0;
}

int orch_generation_explain(struct orch_generation *g, const char *tool, struct orch_slice args, struct orch_buf *out, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, args, &(struct orch_json_limits){ 0 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "arguments: %s at byte %zu", fault.rule, fault.byte);
    if (d.toks[0].type != ORCH_JSON_OBJECT)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "arguments: must be a JSON object");
    lua_pushstring(L, tool);
    orch_lua_push_json(L, &d, 0, 0);
    lua_pushliteral(L, "explain");
    lua_pushliteral(L, "explain");
    return engine_json(g, "explain", 4, out, err);
}

int orch_generation_show(struct orch_generation *g, struct orch_buf *out, struct orch_err *err)
{
    return engine_json(g, "show", 0, out, err);
}
