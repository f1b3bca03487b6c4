/* Of the private module "orch.transport": a child process spoken to by lines.
 *   process_open{ command, env, cwd, protect }  pipe; protect: it cannot change orch's own files
 *   pipe:read()      waits for the next line, without its end; nil, message, code once the child is
 *   gone
 *   pipe:send(text)  text and a line's end; does not wait
 *   pipe:stderr()    the end of what it wrote to stderr
 *   pipe:close()     ends it, waiting as orch_proc_end does
 * Its stdout is read only while a task waits for a line, so that a flood stays in the child. */
#include "bind.h"

#include "../base/log.h"
#include "../base/json.h"
#include "../base/proc.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

enum {
    READ_BYTES = 64 * 1024,
    LINE_MAX_BYTES = 16 << 20,
    OUT_MAX_BYTES = 64 << 20,
    ARGV_MAX = 4096,
};

#define PIPE_META "orch.pipe"

struct pipe {
    struct orch_proc *proc; /* NULL once closed */
    struct orch_watch *in, *out;
    struct orch_buf inbuf, outbuf;
    size_t scanned; /* of inbuf: has no line's end */
    char *name;
    struct orch_wait wait;
    bool waiting;
    int self_ref; /* while a task waits */
    lua_State *main;
    struct orch_err why; /* cls 0 while it lives */
};

static struct pipe *check_pipe(lua_State *L)
{
    return luaL_checkudata(L, 1, PIPE_META);
}

static void release(struct pipe *p)
{
    p->waiting = false;
    luaL_unref(p->main, LUA_REGISTRYINDEX, p->self_ref);
    p->self_ref = LUA_NOREF;
}

static bool has_line(struct pipe *p)
{
    const char *nl = p->inbuf.n > p->scanned
                         ? memchr(p->inbuf.p + p->scanned, '\n', p->inbuf.n - p->scanned)
                         : NULL;
    p->scanned = nl ? (size_t)(nl - p->inbuf.p) : p->inbuf.n;
    return nl != NULL;
}

static int push_line(lua_State *L, struct pipe *p)
{
    if (!has_line(p))
        return orch_push_err(L, &p->why);
    size_t n = p->scanned;
    lua_pushlstring(L, p->inbuf.p, n && p->inbuf.p[n - 1] == '\r' ? n - 1 : n);
    orch_buf_consume(&p->inbuf, n + 1);
    p->scanned = 0;
    return 1;
}

static int pipe_push(lua_State *L, void *ud)
{
    struct pipe *p = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, p->self_ref);
    release(p);
    return push_line(L, p);
}

static void wake(struct pipe *p)
{
    if (p->in)
        orch_watch_set(p->in, 0);
    if (p->waiting)
        orch_task_ready(p->wait, pipe_push, p);
    p->waiting = false;
}

static void pipe_cancel(void *ud)
{
    struct pipe *p = ud;
    if (p->in)
        orch_watch_set(p->in, 0);
    release(p);
}

/* 1 with bytes read, 0 for none yet, -1 at the end or when a line is too long. */
static int take(struct pipe *p)
{
    orch_buf_reserve(&p->inbuf, READ_BYTES);
    ssize_t r = read(orch_proc_stdout(p->proc), p->inbuf.p + p->inbuf.n,
                     p->inbuf.cap - p->inbuf.n - 1);
    if (r < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (r <= 0)
        return -1;
    p->inbuf.n += (size_t)r;
    if (has_line(p) || p->inbuf.n <= LINE_MAX_BYTES)
        return 1;
    orch_err_setc(&p->why, ORCH_CLASS_UPSTREAM, EMSGSIZE, "%s: a line of its stdout is over 16 MiB",
                  p->name);
    return -1;
}

static void on_readable(void *ud, int events)
{
    (void)events;
    struct pipe *p = ud;
    int r = take(p);
    if (r < 0) {
        /* the exit status follows; one that only closed its stdout is ended */
        orch_watch_set(p->in, 0);
        orch_proc_kill(p->proc, p->why.cls ? SIGKILL : SIGTERM);
    }
    if (p->why.cls || has_line(p))
        wake(p);
}

static void flush(struct pipe *p)
{
    while (p->outbuf.n) {
        ssize_t w = write(orch_proc_stdin(p->proc), p->outbuf.p, p->outbuf.n);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno != EAGAIN)
            p->outbuf.n = 0; /* it is going away: its exit tells why */
        if (w < 0)
            break;
        orch_buf_consume(&p->outbuf, (size_t)w);
    }
    orch_watch_set(p->out, p->outbuf.n ? ORCH_WRITE : 0);
}

static void on_writable(void *ud, int events)
{
    (void)events;
    flush(ud);
}

static void on_exit_status(void *ud, int status)
{
    struct pipe *p = ud;
    char how[96];
    cleanup_buf struct orch_buf tail = { 0 };
    if (!p->why.cls) {
        while (p->inbuf.n <= LINE_MAX_BYTES && take(p) > 0) /* its last words */
            ;
        p->why = (struct orch_err){ 0 };
        orch_proc_describe(status, how, sizeof how);
        orch_proc_stderr_describe(p->proc, &tail);
        orch_err_setc(&p->why, ORCH_CLASS_UPSTREAM, ECHILD, "%s: the server ended (%s); %s",
                      p->name, how, tail.p);
    }
    wake(p);
}

static void pipe_close(struct pipe *p, int64_t eof_ms, int64_t term_ms)
{
    if (!p->proc)
        return;
    orch_watch_free(p->in);
    orch_watch_free(p->out);
    p->in = p->out = NULL;
    if (!p->why.cls) {
        orch_proc_end(p->proc, eof_ms, term_ms);
        orch_err_setc(&p->why, ORCH_CLASS_CLOSED, ECANCELED, "%s: closed", p->name);
    }
    orch_proc_free(p->proc);
    p->proc = NULL;
    wake(p);
}

static int pipe_gc(lua_State *L)
{
    struct pipe *p = lua_touserdata(L, 1);
    pipe_close(p, ORCH_PROC_HURRY_EOF_MS, ORCH_PROC_HURRY_TERM_MS);
    orch_buf_free(&p->inbuf);
    orch_buf_free(&p->outbuf);
    free(p->name);
    p->name = NULL;
    return 0;
}

static int l_pipe_close(lua_State *L)
{
    pipe_close(check_pipe(L), ORCH_PROC_EOF_MS, ORCH_PROC_TERM_MS);
    return 0;
}

static int l_pipe_read(lua_State *L)
{
    struct pipe *p = check_pipe(L);
    if (p->self_ref != LUA_NOREF)
        return luaL_error(L, "the pipe is being read by another task");
    if (has_line(p) || p->why.cls)
        return push_line(L, p);
    lua_pushvalue(L, 1);
    p->self_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    p->waiting = true;
    orch_watch_set(p->in, ORCH_READ);
    return orch_task_wait(L, pipe_cancel, p, &p->wait);
}

static int l_pipe_send(lua_State *L)
{
    struct pipe *p = check_pipe(L);
    size_t n;
    const char *text = luaL_checklstring(L, 2, &n);
    if (p->why.cls)
        return orch_push_err(L, &p->why);
    if (n > OUT_MAX_BYTES - p->outbuf.n) {
        struct orch_err err = { 0 };
        orch_err_setc(&err, ORCH_CLASS_UPSTREAM, ENOBUFS,
                      "%s: the server does not read its input (%zu bytes wait)", p->name,
                      p->outbuf.n);
        return orch_push_err(L, &err);
    }
    size_t from = p->outbuf.n;
    orch_buf_add(&p->outbuf, text, n);
    orch_json_one_line(&p->outbuf, from);
    orch_buf_char(&p->outbuf, '\n');
    flush(p);
    lua_pushboolean(L, 1);
    return 1;
}

static int l_pipe_stderr(lua_State *L)
{
    struct pipe *p = check_pipe(L);
    cleanup_buf struct orch_buf tail = { 0 };
    if (p->proc)
        orch_proc_stderr_describe(p->proc, &tail);
    lua_pushlstring(L, tail.n ? tail.p : "", tail.n);
    return 1;
}

static int t_process_open(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, 1, "orch.mcp.connect");
    const char *cwd = orch_opt_string(&o, "cwd", NULL);
    bool protect = orch_opt_bool(&o, "protect", false);
    const char **envp = orch_opt_push(&o, "env", LUA_TTABLE)
                            ? orch_check_strings(L, -1, "env", ARGV_MAX)
                            : NULL;
    if (!orch_opt_push(&o, "command", LUA_TTABLE))
        return luaL_error(L,
                          "orch.mcp.connect: command is missing (a list: program and arguments)");
    const char **argv = orch_check_strings(L, -1, "command", ARGV_MAX);
    orch_opts_done(&o);
    if (!argv[0])
        return luaL_error(L, "orch.mcp.connect: command is empty");
    struct pipe *p = lua_newuserdata(L, sizeof *p);
    *p = (struct pipe){ .name = orch_xstrdup(argv[0]),
                        .self_ref = LUA_NOREF,
                        .main = orch_state_lua(orch_state_of(L)) };
    luaL_getmetatable(L, PIPE_META);
    lua_setmetatable(L, -2);
    struct orch_err err = { 0 };
    struct orch_proc_via *via = protect ? env->protect(env->ud, &err) : NULL;
    if (protect && !via)
        return orch_push_err(L, &err);
    p->proc = orch_proc_start(env->loop,
                              &(struct orch_proc_opts){ .argv = argv,
                                                        .env = envp ? envp
                                                                    : (const char *const *)environ,
                                                        .cwd = cwd,
                                                        .via = via,
                                                        .on_exit = on_exit_status,
                                                        .log_as = p->name,
                                                        .ud = p },
                              &err);
    if (!p->proc) {
        orch_err_wrap(&err, "%s", argv[0]);
        if (err.cls != ORCH_CLASS_ISOLATION)
            err.cls = ORCH_CLASS_UPSTREAM;
        return orch_push_err(L, &err);
    }
    p->in = orch_watch_new(env->loop, orch_proc_stdout(p->proc), 0, on_readable, p);
    p->out = orch_watch_new(env->loop, orch_proc_stdin(p->proc), 0, on_writable, p);
    return 1;
}

void orch_luaopen_pipe(lua_State *L)
{
    static const luaL_Reg methods[] = { { "read", l_pipe_read },
                                        { "send", l_pipe_send },
                                        { "stderr", l_pipe_stderr },
                                        { "close", l_pipe_close },
                                        { NULL, NULL } };
    luaL_newmetatable(L, PIPE_META);
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_setfield(L, -2, "__index");
    lua_pushcfunction(L, pipe_gc);
    lua_setfield(L, -2, "__gc");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
    lua_pushcfunction(L, t_process_open);
    lua_setfield(L, -2, "process_open");
}
