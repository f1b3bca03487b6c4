/* Loading a generation's parts: sources are read once, hashed, held against what is trusted, and
 * run in bounded states. See policy_int.h. */
#include "policy_int.h"

#include "../base/log.h"
#include "../script/args.h"
#include "../script/jsonlib.h"
#include "../script/regex.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum {
    SOURCE_MAX_BYTES = 1 << 20,
    FILES_MAX = 1000,
    LOAD_TIME_MS = 500, /* for the files' own top level; judging has its own budget */
};

void orch_load_fail(struct orch_loading *l, enum orch_class cls, const char *fmt, ...)
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

const char *orch_load_display(const struct orch_loading *l, const char *path)
{
    size_t n = l->base ? strlen(l->base) : 0;
    if (n && strncmp(path, l->base, n) == 0 && path[n] == '/')
        return path + n + 1;
    return path;
}

static void keep_source(struct orch_trust_list *list, const char *path, const char *sha)
{
    list->files = orch_xrealloc(list->files, (list->n + 1) * sizeof *list->files);
    list->files[list->n].path = orch_xstrdup(path);
    memcpy(list->files[list->n++].sha256, sha, 65);
}

/* dirfd/name is opened; path is the absolute name. Product files (lua/) are hashed but need no
 * trust. */
int orch_load_read(struct orch_loading *l, int dirfd, const char *name, const char *path,
                   bool product, struct orch_buf *out)
{
    struct stat st;
    if (++l->files > FILES_MAX) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: more than %d files", orch_load_display(l, path),
                       FILES_MAX);
        return -E2BIG;
    }
    cleanup_close int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    int r = fd < 0 || fstat(fd, &st) < 0 ? -errno : S_ISDIR(st.st_mode) ? -EISDIR : 0;
    if (r == 0 && (st.st_mode & S_IWOTH) && !product) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: everybody may write it; run: chmod o-w %s",
                       orch_load_display(l, path), path);
        return -EPERM;
    }
    if (r == 0)
        r = orch_read_fd(fd, SOURCE_MAX_BYTES, out);
    if (r == -EFBIG)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: larger than 1 MiB", orch_load_display(l, path));
    else if (r < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: cannot be read: %s", orch_load_display(l, path),
                       strerror(-r));
    if (r < 0)
        return r;
    orch_sha256_hex(out->p, out->n, l->sha);
    struct orch_err err = { 0 };
    r = orch_load_check_trust(l, fd, (unsigned)st.st_nlink, path, product, &err);
    if (r < 0) {
        orch_load_fail(l, err.cls, "%s: %s", orch_load_display(l, path), err.msg);
        return r;
    }
    if (!product)
        keep_source(&l->g->sources, path, l->sha);
    orch_sha256_update(&l->hash, path, strlen(path) + 1);
    orch_sha256_update(&l->hash, l->sha, 64);
    return 0;
}

void orch_load_fail_file(struct orch_loading *l, const char *shown, const struct orch_err *err)
{
    bool named = strstr(err->msg, shown) != NULL;
    orch_load_fail(l, ORCH_CLASS_CONFIG, "%s%s%s", named ? "" : shown, named ? "" : ": ", err->msg);
}

int orch_load_run(struct orch_loading *l, struct orch_state *s, const char *shown,
                  struct orch_slice text, int n_args)
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

static char *product_path(const struct orch_loading *l, const char *name)
{
    return orch_xasprintf("%s/lua/%s", l->cur->paths->share, name);
}

/* Upvalues: path, text and its SHA-256. */
static int run_later(lua_State *L)
{
    struct orch_err err = { 0 };
    struct orch_slice text;
    int n = lua_gettop(L);
    text.p = lua_tolstring(L, lua_upvalueindex(2), &text.n);
    struct orch_state *s = orch_state_of(L);
    if (orch_state_load_known(s, lua_tostring(L, lua_upvalueindex(1)), text,
                              lua_tostring(L, lua_upvalueindex(3)), &err) < 0)
        return luaL_error(L, "%s", err.msg);
    if (L != orch_state_lua(s)) /* a task's thread */
        lua_xmove(orch_state_lua(s), L, 1);
    lua_insert(L, 1);
    lua_call(L, n, 1);
    return 1;
}

int orch_load_product_later(struct orch_loading *l, struct orch_state *s, const char *name)
{
    cleanup_free char *path = product_path(l, name);
    cleanup_buf struct orch_buf text = { 0 };
    lua_State *L = orch_state_lua(s);
    int r = orch_load_read(l, AT_FDCWD, path, path, true, &text);
    if (r < 0)
        return r;
    lua_pushstring(L, path);
    lua_pushlstring(L, text.p, text.n);
    lua_pushstring(L, l->sha);
    lua_pushcclosure(L, run_later, 3);
    return 0;
}

int orch_load_run_product(struct orch_loading *l, struct orch_state *s, const char *name,
                          int n_args)
{
    cleanup_free char *path = product_path(l, name);
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

struct orch_state *orch_load_state(struct orch_loading *l, enum orch_context ctx,
                                   size_t memory_bytes)
{
    struct orch_err err = { 0 };
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", l->cur->paths->share);
    struct orch_state *s =
        orch_state_new(&(struct orch_state_opts){ .ctx = ctx,
                                                  .memory_bytes = memory_bytes,
                                                  .steps = (uint64_t)LOAD_TIME_MS *
                                                           ORCH_STEPS_PER_MS,
                                                  .cpu_ms = LOAD_TIME_MS,
                                                  .lua_dir = lua_dir,
                                                  .host = l->cur->states_host },
                       &err);
    if (!s) {
        orch_load_fail(l, ORCH_CLASS_FAILED, "%s", err.msg);
        return NULL;
    }
    l->cur->ops->open(orch_state_lua(s));
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

int orch_load_push_schema(struct orch_loading *l, struct orch_state *s)
{
    lua_State *L = orch_state_lua(s);
    orch_load_push_deps(L);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    orch_load_set_function(L, "is_array", l_is_array);
    orch_load_set_function(L, "is_bigint", l_is_bigint);
    lua_pushvalue(L, -1);
    if (orch_load_run_product(l, s, "policy/values.lua", 1) < 0) {
        lua_pop(L, 1);
        return -1;
    }
    lua_setfield(L, -2, "values");
    return orch_load_run_product(l, s, "policy/schema.lua", 1);
}

void orch_load_take_lines(lua_State *L, const char *where, void (*each)(void *ud, const char *line),
                          void *ud)
{
    size_t n = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    for (size_t i = 1; i <= n; i++) {
        lua_rawgeti(L, -1, (int)i);
        if (lua_istable(L, -1)) {
            lua_getfield(L, -1, "path");
            lua_getfield(L, -2, "message");
            const char *path = lua_tostring(L, -2), *message = lua_tostring(L, -1);
            cleanup_free char *line = orch_xasprintf("%s: %s%s%s", where, path ? path : "",
                                                     path && *path ? ": " : "",
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

/* Where everybody may write, everybody can put another file in the place of one. Borrowed. */
int orch_load_open_dir(struct orch_loading *l, const char *path, const char *what, const char *fix)
{
    struct stat st;
    int fd = orch_hold_dir(l->cur, path);
    if (fd < 0 || fstat(fd, &st) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: the %s directory cannot be opened: %s%s",
                       orch_load_display(l, path), what, strerror(fd < 0 ? -fd : errno), fix);
        return -1;
    }
    if (st.st_mode & S_IWOTH) {
        orch_load_fail(l, ORCH_CLASS_CONFIG,
                       "%s: everybody may write to the %s directory; run: chmod o-w %s",
                       orch_load_display(l, path), what, path);
        return -1;
    }
    return fd;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int orch_load_list(struct orch_loading *l, int dirfd, const char *path, char ***names, size_t *n)
{
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    if (!d) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s", path, strerror(errno));
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

void orch_load_free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

int orch_load_dir(struct orch_loading *l, const char *dir, const char *what, bool product,
                  orch_load_each_fn *each, void *ud)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    int dirfd = orch_load_open_dir(l, dir, what, "");
    if (dirfd < 0)
        return -1;
    char **names;
    size_t n;
    if (orch_load_list(l, dirfd, dir, &names, &n) < 0)
        return -1;
    int r = 0;
    for (size_t i = 0; i < n; i++) {
        cleanup_free char *path = orch_xasprintf("%s/%s", dir, names[i]);
        const char *shown = orch_load_display(l, path);
        cleanup_buf struct orch_buf text = { 0 };
        if (orch_load_read(l, dirfd, names[i], path, product, &text) < 0) {
            r = -1;
            continue;
        }
        struct orch_err err = { 0 };
        if (orch_state_load_known(g->tools_state, shown, (struct orch_slice){ text.p, text.n },
                                  l->sha, &err) < 0) {
            orch_load_fail_file(l, shown, &err);
            r = -1;
            continue;
        }
        orch_state_env(L, -1);
        int env_ref = luaL_ref(L, LUA_REGISTRYINDEX);
        if (orch_state_pcall(g->tools_state, 0, 1, &err) < 0) {
            orch_load_fail_file(l, shown, &err);
            r = -1;
        } else {
            lua_rawgeti(L, LUA_REGISTRYINDEX, env_ref);
            orch_state_freeze(L, lua_gettop(L));
            lua_pop(L, 1);
            if (each(l, ud, path, shown, product) < 0)
                r = -1;
        }
        luaL_unref(L, LUA_REGISTRYINDEX, env_ref);
    }
    orch_load_free_names(names, n);
    return r;
}
