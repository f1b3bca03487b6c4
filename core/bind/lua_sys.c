/* orch.now, orch.log, orch.version (every context); orch.env, orch.process.run, orch.fs
 * (scripts). */
#include "bind.h"
#include "../script/jsonlib.h"

#include "../base/log.h"
#include "../base/proc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { FILE_MAX_BYTES = 64 << 20, ARGV_MAX = 4096, PROCESS_OUTPUT_BYTES = 16 << 20 };

static int l_now(lua_State *L)
{
    lua_pushnumber(L, (double)orch_now_us() / 1e6);
    return 1;
}

static int log_at(lua_State *L, enum orch_level level)
{
    size_t n;
    const char *s = luaL_checklstring(L, 1, &n);
    cleanup_buf struct orch_buf fields = { 0 };
    if (!lua_isnoneornil(L, 2)) {
        char why[256];
        luaL_checktype(L, 2, LUA_TTABLE);
        if (orch_lua_encode_json(L, 2, &fields, why, sizeof why) < 0)
            return luaL_error(L, "orch.log: fields: %s", why);
    }
    orch_log_fields(level, (struct orch_slice){ s, n }, (struct orch_slice){ fields.p, fields.n });
    return 0;
}

static int l_debug(lua_State *L)
{
    return log_at(L, ORCH_DEBUG);
}
static int l_info(lua_State *L)
{
    return log_at(L, ORCH_INFO);
}
static int l_warn(lua_State *L)
{
    return log_at(L, ORCH_WARN);
}
static int l_error(lua_State *L)
{
    return log_at(L, ORCH_ERROR);
}

static int l_exit(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    int status = lua_isboolean(L, 1) ? !lua_toboolean(L, 1) : (int)luaL_optinteger(L, 1, 0);
    env->exit(env->ud, status);
    return 0;
}

static int l_env(lua_State *L)
{
    const char *v = getenv(luaL_checkstring(L, 1));
    if (!v)
        return 0;
    lua_pushstring(L, v);
    return 1;
}

/* ---- orch.process.run(argv, { stdin, env, cwd, timeout }) */

struct process {
    struct orch_loop *loop;
    struct orch_proc *proc;
    struct orch_watch *out, *in;
    struct orch_timer *timer;
    struct orch_wait wait;
    struct orch_buf stdout_bytes, stdin_bytes;
    int status;
    bool timed_out, exited, drained;
};

static void process_free(struct process *p)
{
    orch_watch_free(p->out);
    orch_watch_free(p->in);
    orch_timer_free(p->timer);
    orch_proc_free(p->proc);
    orch_buf_free(&p->stdout_bytes);
    orch_buf_free(&p->stdin_bytes);
    free(p);
}

static int process_push(lua_State *L, void *ud)
{
    struct process *p = ud;
    struct orch_slice err = orch_proc_stderr(p->proc);
    lua_newtable(L);
    if (WIFEXITED(p->status)) {
        lua_pushinteger(L, WEXITSTATUS(p->status));
        lua_setfield(L, -2, "status");
    } else {
        lua_pushinteger(L, WTERMSIG(p->status));
        lua_setfield(L, -2, "signal");
    }
    lua_pushlstring(L, p->stdout_bytes.p ? p->stdout_bytes.p : "", p->stdout_bytes.n);
    lua_setfield(L, -2, "stdout");
    lua_pushlstring(L, err.p ? err.p : "", err.n);
    lua_setfield(L, -2, "stderr");
    lua_pushboolean(L, p->timed_out);
    lua_setfield(L, -2, "timed_out");
    process_free(p);
    return 1;
}

static void process_maybe_done(struct process *p)
{
    if (p->exited && p->drained)
        orch_task_ready(p->wait, process_push, p);
}

static void process_readable(void *ud, int events)
{
    (void)events;
    struct process *p = ud;
    char chunk[16384];
    ssize_t r = read(orch_proc_stdout(p->proc), chunk, sizeof chunk);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (r > 0 && p->stdout_bytes.n < PROCESS_OUTPUT_BYTES) {
        orch_buf_add(&p->stdout_bytes, chunk, (size_t)r);
        return;
    }
    orch_watch_set(p->out, 0);
    p->drained = true;
    if (r > 0)
        orch_proc_kill(p->proc, SIGKILL);
    process_maybe_done(p);
}

static void process_writable(void *ud, int events)
{
    (void)events;
    struct process *p = ud;
    if (p->stdin_bytes.n) {
        ssize_t w = write(orch_proc_stdin(p->proc), p->stdin_bytes.p, p->stdin_bytes.n);
        if (w < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        orch_buf_consume(&p->stdin_bytes, w < 0 ? p->stdin_bytes.n : (size_t)w);
    }
    if (!p->stdin_bytes.n) {
        orch_watch_free(p->in);
        p->in = NULL;
        orch_proc_close_stdin(p->proc);
    }
}

static void process_exited(void *ud, int status)
{
    struct process *p = ud;
    p->status = status;
    p->exited = true;
    process_maybe_done(p);
}

static void process_timed_out(void *ud)
{
    struct process *p = ud;
    p->timed_out = true;
    orch_proc_kill(p->proc, SIGKILL);
}

static void process_cancel(void *ud)
{
    process_free(ud);
}

static int l_process_run(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, 2, "orch.process.run");
    const char *cwd = orch_opt_string(&o, "cwd", NULL);
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", 0);
    const char *input = orch_opt_string(&o, "stdin", NULL);
    const char **envp = orch_opt_push(&o, "env", LUA_TTABLE)
                            ? orch_check_strings(L, -1, "env", ARGV_MAX)
                            : NULL;
    orch_opts_done(&o);
    const char **argv = orch_check_strings(L, 1, "argv", ARGV_MAX);
    if (!argv[0])
        return luaL_error(L, "orch.process.run: argv is empty");
    struct process *p = orch_xcalloc(1, sizeof *p);
    struct orch_err err = { 0 };
    p->loop = env->loop;
    p->proc = orch_proc_start(env->loop,
                              &(struct orch_proc_opts){ .argv = argv,
                                                        .env = envp ? envp
                                                                    : (const char *const *)environ,
                                                        .cwd = cwd,
                                                        .stderr_keep = 1 << 20,
                                                        .on_exit = process_exited,
                                                        .ud = p },
                              &err);
    if (!p->proc) {
        process_free(p);
        return orch_push_err(L, &err);
    }
    orch_buf_str(&p->stdin_bytes, input ? input : "");
    p->out = orch_watch_new(env->loop, orch_proc_stdout(p->proc), ORCH_READ, process_readable, p);
    p->in = orch_watch_new(env->loop, orch_proc_stdin(p->proc), ORCH_WRITE, process_writable, p);
    if (timeout) {
        p->timer = orch_timer_new(env->loop, process_timed_out, p);
        orch_timer_set(p->timer, timeout);
    }
    return orch_task_wait(L, process_cancel, p, &p->wait);
}

/* ---- orch.fs */

static int fs_fail(lua_State *L, const char *path, int e)
{
    struct orch_err err;
    orch_err_set(&err, e, "%s: %s", path, strerror(e));
    return orch_push_err(L, &err);
}

static int l_fs_read(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    cleanup_buf struct orch_buf b = { 0 };
    int r = orch_read_file(AT_FDCWD, path, FILE_MAX_BYTES, &b);
    if (r < 0)
        return fs_fail(L, path, -r);
    lua_pushlstring(L, b.p ? b.p : "", b.n);
    return 1;
}

static int l_fs_write(lua_State *L)
{
    size_t n;
    const char *path = luaL_checkstring(L, 1);
    const char *data = luaL_checklstring(L, 2, &n);
    struct orch_opts o = orch_opts_begin(L, 3, "orch.fs.write");
    mode_t mode = (mode_t)orch_opt_number(&o, "mode", 0644, 0, 0777);
    orch_opts_done(&o);
    int r = orch_write_file(AT_FDCWD, path, data, n, mode);
    if (r < 0)
        return fs_fail(L, path, -r);
    lua_pushboolean(L, 1);
    return 1;
}

static int l_fs_list(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    DIR *d = opendir(path);
    if (!d)
        return fs_fail(L, path, errno);
    lua_newtable(L);
    int i = 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        lua_pushstring(L, e->d_name);
        lua_rawseti(L, -2, ++i);
    }
    closedir(d);
    return 1;
}

static int l_fs_stat(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    struct stat st;
    if (stat(path, &st) < 0)
        return fs_fail(L, path, errno);
    lua_newtable(L);
    lua_pushstring(L, S_ISREG(st.st_mode) ? "file" : S_ISDIR(st.st_mode) ? "directory" : "other");
    lua_setfield(L, -2, "type");
    lua_pushnumber(L, (double)st.st_size);
    lua_setfield(L, -2, "size");
    lua_pushinteger(L, st.st_mode & 07777);
    lua_setfield(L, -2, "mode");
    lua_pushnumber(L, (double)st.st_mtim.tv_sec + (double)st.st_mtim.tv_nsec / 1e9);
    lua_setfield(L, -2, "mtime");
    return 1;
}

static int l_fs_mkdir(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    struct orch_opts o = orch_opts_begin(L, 2, "orch.fs.mkdir");
    mode_t mode = (mode_t)orch_opt_number(&o, "mode", 0777, 0, 0777);
    orch_opts_done(&o);
    int r = orch_mkdir_p(path, mode);
    if (r < 0)
        return fs_fail(L, path, -r);
    lua_pushboolean(L, 1);
    return 1;
}

int orch_luaopen_sys(lua_State *L, int t)
{
    enum { ALL = ORCH_CTX_POLICY | ORCH_CTX_TOOL | ORCH_CTX_SCRIPT, S = ORCH_CTX_SCRIPT };
    lua_pushvalue(L, t);
    orch_api_set(L, "orch.",
                 (struct orch_api[]){ { "now", l_now, ALL }, { "env", l_env, S }, { 0 } });
    lua_pushstring(L, ORCH_VERSION);
    lua_setfield(L, -2, "version");
    lua_pop(L, 1);
    if (orch_state_context(L) == ORCH_CTX_SCRIPT) {
        lua_getglobal(L, "os");
        lua_pushcfunction(L, l_exit);
        lua_setfield(L, -2, "exit");
        lua_pop(L, 1);
    }
    lua_newtable(L);
    orch_api_set(L, "orch.log.",
                 (struct orch_api[]){ { "debug", l_debug, ALL },
                                      { "info", l_info, ALL },
                                      { "warn", l_warn, ALL },
                                      { "error", l_error, ALL },
                                      { 0 } });
    lua_setfield(L, t, "log");
    lua_newtable(L);
    orch_api_set(L, "orch.process.", (struct orch_api[]){ { "run", l_process_run, S }, { 0 } });
    lua_setfield(L, t, "process");
    lua_newtable(L);
    orch_api_set(L, "orch.fs.",
                 (struct orch_api[]){ { "read", l_fs_read, S },
                                      { "write", l_fs_write, S },
                                      { "list", l_fs_list, S },
                                      { "stat", l_fs_stat, S },
                                      { "mkdir", l_fs_mkdir, S },
                                      { 0 } });
    lua_setfield(L, t, "fs");
    return 0;
}
