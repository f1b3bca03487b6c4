/* The methods of ctx, which a tool's run gets beside its arguments. */
#include "bind.h"

#include "../call/call.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { FILE_MAX_BYTES = 16 << 20, ENTRIES_MAX = 10000 };

static int l_vm(lua_State *L)
{
    struct orch_call *c = orch_ctx_call(L);
    return orch_vm_spawn_wait(L, 2, c);
}

static int l_progress(lua_State *L)
{
    struct orch_call *c = orch_ctx_call(L);
    size_t n = 0;
    double done = luaL_checknumber(L, 2), total = luaL_optnumber(L, 3, -1);
    const char *message = luaL_optlstring(L, 4, "", &n);
    orch_call_progress(c, done, total, (struct orch_slice){ message, n });
    return 0;
}

static int l_log(lua_State *L)
{
    static const char *const levels[] = { "debug",    "info",  "notice",    "warning", "error",
                                          "critical", "alert", "emergency", NULL };
    struct orch_call *c = orch_ctx_call(L);
    size_t n;
    const char *level = levels[luaL_checkoption(L, 2, NULL, levels)];
    const char *message = luaL_checklstring(L, 3, &n);
    orch_call_log(c, level, (struct orch_slice){ message, n });
    return 0;
}

static int l_cancelled(lua_State *L)
{
    lua_pushboolean(L, orch_ctx_call(L)->cancelled);
    return 1;
}

/* ctx:release(retry): over HTTP a legacy client's connection is ended and the answer kept; the
 * client comes back for it after retry. For long calls; elsewhere without effect. */
static int l_release(lua_State *L)
{
    struct orch_call *c = orch_ctx_call(L);
    orch_call_let_go(c, lua_isnoneornil(L, 2) ? 0 : orch_check_duration_ms(L, 2, "release: retry"));
    return 0;
}

/* ctx:task(): the client gets a task's id as its answer and asks for the rest. true, or nil,
 * message, code. */
static int l_task(lua_State *L)
{
    struct orch_err err = { 0 };
    if (orch_job_begin(orch_ctx_call(L), &err) < 0) {
        orch_push_err(L, &err);
        if (err.code == ENOTSUP) {
            lua_pop(L, 1);
            lua_pushliteral(L, "capability");
        }
        return 3;
    }
    lua_pushboolean(L, 1);
    return 1;
}

/* ---- the workspace: opened beneath its directory, no symlink leads out */

static int open_beneath(lua_State *L, const char *path, int flags)
{
    const char *root = orch_ctx_call(L)->gen->cfg.workspace;
    if (!root)
        return -ENOTDIR; /* no workspace: started where none is by accident, see config show */
    cleanup_close int rootfd = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (rootfd < 0)
        return -errno;
    struct open_how how = { .flags = (uint64_t)(flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY),
                            .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS };
    while (*path == '/')
        path++; /* "/a" is "a" of the workspace */
    long fd = syscall(SYS_openat2, rootfd, *path ? path : ".", &how, sizeof how);
    return fd < 0 ? -errno : (int)fd;
}

static int file_fail(lua_State *L, const char *path, int e)
{
    struct orch_err err;
    orch_err_set(&err, e, "%s: %s", path, e == EXDEV ? "leads out of the workspace" : strerror(e));
    return orch_push_err(L, &err);
}

static int l_read_file(lua_State *L)
{
    const char *path = luaL_checkstring(L, 2);
    cleanup_close int fd = open_beneath(L, path, O_RDONLY);
    struct stat st;
    if (fd < 0)
        return file_fail(L, path, -fd);
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return file_fail(L, path, S_ISDIR(st.st_mode) ? EISDIR : EINVAL);
    if (st.st_size > FILE_MAX_BYTES)
        return file_fail(L, path, EFBIG);
    cleanup_buf struct orch_buf b = { 0 };
    orch_buf_reserve(&b, (size_t)st.st_size);
    int r = orch_read_fd(fd, FILE_MAX_BYTES, &b);
    if (r < 0)
        return file_fail(L, path, -r);
    lua_pushlstring(L, b.p, b.n);
    return 1;
}

static int l_list_dir(lua_State *L)
{
    const char *path = luaL_optstring(L, 2, ".");
    int fd = open_beneath(L, path, O_RDONLY | O_DIRECTORY);
    if (fd < 0)
        return file_fail(L, path, -fd);
    DIR *d = fdopendir(fd);
    if (!d) {
        close(fd);
        return file_fail(L, path, ENOMEM);
    }
    lua_newtable(L);
    int i = 0;
    for (struct dirent *e; i < ENTRIES_MAX && (e = readdir(d));) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 ||
            fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        lua_newtable(L);
        lua_pushstring(L, e->d_name);
        lua_setfield(L, -2, "name");
        lua_pushstring(L, S_ISREG(st.st_mode)   ? "file"
                          : S_ISDIR(st.st_mode) ? "directory"
                          : S_ISLNK(st.st_mode) ? "link"
                                                : "other");
        lua_setfield(L, -2, "type");
        lua_pushnumber(L, (double)st.st_size);
        lua_setfield(L, -2, "size");
        lua_rawseti(L, -2, ++i);
    }
    closedir(d);
    return 1;
}

/* What its client can be asked for. */
static void push_client(lua_State *L, unsigned caps)
{
    static const struct {
        const char *name;
        unsigned cap;
    } words[] = { { "elicit", ORCH_MCP_CAP_FORM },
                  { "elicit_url", ORCH_MCP_CAP_URL },
                  { "sample", ORCH_MCP_CAP_SAMPLING },
                  { "sample_tools", ORCH_MCP_CAP_SAMPLING_TOOLS },
                  { "roots", ORCH_MCP_CAP_ROOTS } };
    lua_createtable(L, 0, ORCH_ARRAY_LEN(words));
    for (size_t i = 0; i < ORCH_ARRAY_LEN(words); i++) {
        lua_pushboolean(L, (caps & words[i].cap) != 0);
        lua_setfield(L, -2, words[i].name);
    }
}

/* The table of ctx's methods lies in the registry under this name. */
#define METHODS "orch.ctx.methods"

/* Stands for a method until it is used; upvalue 1 loads it. */
static int lazy_method(lua_State *L)
{
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_call(L, 0, 1);
    return 1;
}

void orch_ctx_set_lazy(lua_State *L, const char *name)
{
    lua_pushcclosure(L, lazy_method, 1);
    lua_getfield(L, LUA_REGISTRYINDEX, METHODS);
    lua_insert(L, -2);
    lua_setfield(L, -2, name);
    lua_pop(L, 1);
}

static int ctx_index(lua_State *L)
{
    struct orch_call *c = orch_ctx_call(L);
    const char *key = luaL_checkstring(L, 2);
    lua_pushvalue(L, 2);
    lua_rawget(L, lua_upvalueindex(1));
    if (lua_tocfunction(L, -1) == lazy_method) {
        lua_call(L, 0, 1);
        lua_pushvalue(L, 2);
        lua_pushvalue(L, -2);
        lua_rawset(L, lua_upvalueindex(1));
    }
    if (!lua_isnil(L, -1))
        return 1;
    if (strcmp(key, "client") == 0) {
        push_client(L, c->caps);
    } else if (strcmp(key, "session") == 0) {
        lua_newtable(L);
        lua_pushstring(L, c->session->id);
        lua_setfield(L, -2, "id");
    } else if (strcmp(key, "workspace") == 0) {
        lua_pushstring(L, c->gen->cfg.workspace);
    }
    return 1;
}

int orch_luaopen_ctx(lua_State *L)
{
    enum { T = ORCH_CTX_TOOL | ORCH_CTX_SCRIPT };
    if (!luaL_newmetatable(L, ORCH_CTX_META))
        return 0;
    lua_newtable(L);
    orch_api_set(L, "ctx:",
                 (struct orch_api[]){ { "vm", l_vm, T },
                                      { "progress", l_progress, T },
                                      { "log", l_log, T },
                                      { "cancelled", l_cancelled, T },
                                      { "release", l_release, T },
                                      { "task", l_task, T },
                                      { "read_file", l_read_file, T },
                                      { "list_dir", l_list_dir, T },
                                      { "elicit", orch_ctx_elicit, T },
                                      { "sample", orch_ctx_sample, T },
                                      { "roots", orch_ctx_roots, T },
                                      { "ask", orch_ctx_ask, T },
                                      { "call", NULL, 0 },
                                      { 0 } });
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, METHODS);
    if (orch_state_context(L) == ORCH_CTX_SCRIPT) {
        orch_api_lua(L, "ctx:", "http", "http", "fetch");
        orch_api_lua(L, "ctx:", "output", "output", "result");
    }
    lua_pushcclosure(L, ctx_index, 1);
    lua_setfield(L, -2, "__index");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    return 0;
}
