/* Loading a generation's parts: sources are read once, hashed, held against what is trusted, and run in
 * bounded states. See loading.h. */
#include "loading.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

enum {
    SOURCE_MAX_BYTES = 1 << 20,
    FILES_MAX = 1000,
    LOAD_TIME_MS = 500, /* for the files' own top level; judging has its own budget */
};

void orch_load_fail(struct loading *l, enum orch_class cls, const char *fmt, ...)
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

const char *orch_load_display(const struct loading *l, const char *path)
{
    size_t n = l->base ? strlen(l->base) : 0;
    if (n && strncmp(path, l->base, n) == 0 && path[n] == '/')
        return path + n + 1;
    return path;
}

static char *trust_db(const struct orch *o)
{
    return orch_xasprintf("%s/state.db", o->paths.state);
}

/* Not the folder that a link leads to: what lies in the working directory is not trusted because it says so elsewhere. */
char *orch_trust_dir(const struct orch *o)
{
    cleanup_free char *dir = orch_xstrdup(o->paths.named);
    char *slash = strrchr(dir, '/');
    slash[slash == dir] = 0; /* "/" stays */
    char *real = realpath(dir, NULL);
    return real ? real : orch_steal_ptr(&dir);
}

/* In the record, an entry with an empty name says `always`. */
int orch_trust_read(struct orch *o, struct orch_trust *t, struct orch_err *err)
{
    *t = (struct orch_trust){ .edits = false };
    cleanup_free char *path = trust_db(o), *dir = orch_trust_dir(o);
    if (!ORCH_FEATURE_TRUST || access(path, F_OK) < 0)
        return 0;
    struct orch_db *db = orch_db_open(path, err);
    if (!db)
        return -EIO;
    int r = orch_db_trust_get(db, dir, &t->edits, &t->list.files, &t->list.n, err);
    orch_db_close(db);
    for (size_t i = 0; i < t->list.n; i++)
        t->always = t->always || !*t->list.files[i].path;
    return r;
}

int orch_trust_record(struct orch *o, const struct orch_trust *t, struct orch_err *err)
{
    cleanup_free char *path = trust_db(o), *dir = orch_trust_dir(o);
    cleanup_close int state = orch_own_dir(o->paths.state, err);
    struct orch_db *db = state < 0 ? NULL : orch_db_open(path, err);
    if (!db)
        return -EIO;
    cleanup_free struct orch_trust_file *files = orch_xcalloc(t->list.n + 1, sizeof *files);
    size_t n = 0;
    for (size_t i = 0; i < t->list.n; i++)
        if (*t->list.files[i].path)
            files[n++] = t->list.files[i];
    if (t->always) {
        files[n].path = (char *)(uintptr_t)"";
        memset(files[n++].sha256, '0', 64);
    }
    int r = orch_db_trust_set(db, dir, t->edits, files, n, err);
    orch_db_close(db);
    return r;
}

void orch_trust_fini(struct orch_trust *t)
{
    orch_trust_files_free(t->list.files, t->list.n);
    *t = (struct orch_trust){ .edits = false };
}

static const struct orch_trust_file *trusted_file(const struct loading *l, const char *path)
{
    for (size_t i = 0; i < l->trust.list.n; i++)
        if (strcmp(l->trust.list.files[i].path, path) == 0)
            return &l->trust.list.files[i];
    return NULL;
}

/* Whether the user has seen these very bytes. */
static bool trusted_content(const struct loading *l, const char *path, const char *sha)
{
    const struct orch_trust_file *f = trusted_file(l, path);
    return f && strcmp(f->sha256, sha) == 0;
}

static bool check_trust(struct loading *l, const char *path, const char *sha)
{
    if (!l->needs_trust || l->trust.edits || trusted_content(l, path, sha))
        return true;
    orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s: orch trust %s", orch_load_display(l, path),
                   trusted_file(l, path)                    ? "changed since it was trusted; look at it, then run"
                   : l->o->paths.origin == ORCH_CONFIG_CWD ? "not trusted; a configuration in the working directory is only loaded after"
                                                           : "not trusted; this configuration is only loaded after",
                   l->trust_dir);
    return false;
}

int orch_load_trust_config(struct loading *l)
{
    if (l->mode != ORCH_TRUST_CHECK || l->needs_trust)
        return 0;
    l->needs_trust = true;
    return check_trust(l, l->o->paths.config, l->sha) ? 0 : -EPERM;
}

static void keep_source(struct orch_trust_list *list, const char *path, const char *sha)
{
    list->files = orch_xrealloc(list->files, (list->n + 1) * sizeof *list->files);
    list->files[list->n].path = orch_xstrdup(path);
    memcpy(list->files[list->n++].sha256, sha, 65);
}

/* What a child may have written is the law only when the user has seen it. */
static int check_writers(struct loading *l, int fd, const struct stat *st, const char *path, bool product)
{
    struct orch *o = l->o;
    if (trusted_content(l, path, l->sha))
        return 0;
    if (!orch_protect_holds(o, fd)) {
        l->unheld = l->unheld || !product;
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: put there while a program runs that orch started and that may write to it; %s%s",
                       orch_load_display(l, path), product ? "start orch anew" : "look at it, then run: orch trust ", product ? "" : l->trust_dir);
        return -EPERM;
    }
    if (product || st->st_nlink < 2)
        return 0;
    if (!l->g->linked)
        l->g->linked = orch_xstrdup(path);
    if (!o->protects)
        return 0;
    orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: it has another name (a hard link), by which a program that orch started may write to it; remove that one",
                   orch_load_display(l, path));
    return -EPERM;
}

/* dirfd/name is opened; path is the absolute name. Product files (lua/) are hashed but need no trust. */
int orch_load_read(struct loading *l, int dirfd, const char *name, const char *path, bool product, struct orch_buf *out)
{
    struct stat st;
    if (++l->files > FILES_MAX) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: more than %d files", orch_load_display(l, path), FILES_MAX);
        return -E2BIG;
    }
    cleanup_close int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    int r = fd < 0 || fstat(fd, &st) < 0 ? -errno : S_ISDIR(st.st_mode) ? -EISDIR : 0;
    if (r == 0 && (st.st_mode & S_IWOTH) && !product) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: everybody may write it; run: chmod o-w %s", orch_load_display(l, path), path);
        return -EPERM;
    }
    if (r == 0)
        r = orch_read_fd(fd, SOURCE_MAX_BYTES, out);
    if (r == -EFBIG)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: larger than 1 MiB", orch_load_display(l, path));
    else if (r < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: cannot be read: %s", orch_load_display(l, path), strerror(-r));
    if (r < 0)
        return r;
    orch_sha256_hex(out->p, out->n, l->sha);
    if (!product && !check_trust(l, path, l->sha))
        return -EPERM;
    if ((r = check_writers(l, fd, &st, path, product)) < 0)
        return r;
    if (!product)
        keep_source(&l->g->sources, path, l->sha);
    orch_sha256_update(&l->hash, path, strlen(path) + 1);
    orch_sha256_update(&l->hash, l->sha, 64);
    return 0;
}

void orch_load_fail_file(struct loading *l, const char *shown, const struct orch_err *err)
{
    bool named = strstr(err->msg, shown) != NULL;
    orch_load_fail(l, ORCH_CLASS_CONFIG, "%s%s%s", named ? "" : shown, named ? "" : ": ", err->msg);
}

int orch_load_run(struct loading *l, struct orch_state *s, const char *shown, struct orch_slice text, int n_args)
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
        orch_load_fail_file(l, shown, &err);
    return r;
}

int orch_load_run_product(struct loading *l, struct orch_state *s, const char *name, int n_args)
{
    cleanup_free char *path = orch_xasprintf("%s/lua/%s", l->o->paths.share, name);
    cleanup_buf struct orch_buf text = { 0 };
    int r = orch_load_read(l, AT_FDCWD, path, path, true, &text);
    if (r < 0) {
        lua_pop(orch_state_lua(s), n_args);
        return r;
    }
    return orch_load_run(l, s, path, (struct orch_slice){ text.p, text.n }, n_args);
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

void orch_load_set_function(lua_State *L, const char *name, lua_CFunction fn)
{
    lua_pushcfunction(L, fn);
    lua_setfield(L, -2, name);
}

/* ---- states */

struct orch_state *orch_load_state(struct loading *l, enum orch_context ctx, size_t memory_bytes)
{
    struct orch_err err = { 0 };
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", l->o->paths.share);
    struct orch_state *s = orch_state_new(
        &(struct orch_state_opts){ .ctx = ctx,
                                   .memory_bytes = memory_bytes,
                                   .steps = (uint64_t)LOAD_TIME_MS * ORCH_STEPS_PER_MS,
                                   .cpu_ms = LOAD_TIME_MS,
                                   .lua_dir = lua_dir,
                                   .host = &l->o->env },
        &err);
    if (!s) {
        orch_load_fail(l, ORCH_CLASS_FAILED, "%s", err.msg);
        return NULL;
    }
    orch_luaopen_orch(orch_state_lua(s));
    lua_settop(orch_state_lua(s), 0);
    return s;
}

void orch_load_push_deps(lua_State *L)
{
    lua_newtable(L);
    lua_getglobal(L, "orch");
    lua_getfield(L, -1, "json");
    lua_setfield(L, -3, "json");
    lua_pop(L, 1);
    orch_load_set_function(L, "nearest", l_nearest);
    orch_load_set_function(L, "duration", l_duration);
    orch_load_set_function(L, "size", l_size);
}

int orch_load_push_schema(struct loading *l, struct orch_state *s)
{
    lua_State *L = orch_state_lua(s);
    orch_load_push_deps(L);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    orch_load_set_function(L, "is_array", l_is_array);
    orch_load_set_function(L, "is_bigint", l_is_bigint);
    return orch_load_run_product(l, s, "schema.lua", 1);
}

void orch_load_take_lines(lua_State *L, const char *where, void (*each)(void *ud, const char *line), void *ud)
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

void orch_load_add_error(void *ud, const char *line)
{
    orch_load_fail(ud, ORCH_CLASS_CONFIG, "%s", line);
}
