/* vm:exec, and files in and out of a microVM. */
#include "vm_handle.h"

#include "../base/log.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum {
    ARGV_MAX = 4096,
    MAX_OUTPUT_BYTES = 1 << 20,
    OUTPUT_MOST_BYTES = 64 << 20,
    FILE_MAX_BYTES = 16 << 20,
    STDIN_CHUNK = 64 * 1024,
    PENDING_MAX_BYTES = 128 * 1024, /* of inherited output, before the guest has to wait */
};

static void push_streams(lua_State *L, const struct orch_vm_operation *op, bool truncated,
                         int64_t ms)
{
    lua_pushlstring(L, op->out.p ? op->out.p : "", op->out.n);
    lua_setfield(L, -2, "stdout");
    lua_pushlstring(L, op->err_out.p ? op->err_out.p : "", op->err_out.n);
    lua_setfield(L, -2, "stderr");
    lua_pushboolean(L, truncated);
    lua_setfield(L, -2, "truncated");
    lua_pushnumber(L, (double)ms);
    lua_setfield(L, -2, "ms");
}

/* Of a command whose microVM failed: what came of it is not lost. */
static int push_so_far(lua_State *L, struct orch_vm_operation *op)
{
    lua_newtable(L);
    bool full = op->max_output && (op->out.n >= op->max_output || op->err_out.n >= op->max_output);
    push_streams(L, op, full, (orch_now_us() - op->begun_us) / 1000);
    return 1;
}

static int exec_push(lua_State *L, struct orch_vm_operation *op)
{
    struct orch_exec_result *r = &op->result;
    static const char *const reasons[] = {
        "", "not found", "not executable", "working directory", "user", "resources"
    };
    lua_newtable(L);
    if (r->fail) {
        /* As a shell reports it: 127 not found, 126 not executable, 125 for the rest. */
        lua_pushinteger(L, r->fail == ORCH_WIRE_FAIL_NOT_FOUND        ? 127
                           : r->fail == ORCH_WIRE_FAIL_NOT_EXECUTABLE ? 126
                                                                      : 125);
        lua_setfield(L, -2, "status");
        const char *reason = (size_t)r->fail < ORCH_ARRAY_LEN(reasons) ? reasons[r->fail] : "?";
        orch_buf_printf(&op->err_out, "orch: the command could not be started: %s (%s)\n", reason,
                        strerror(r->sys_errno));
        lua_pushstring(L, reason);
        lua_setfield(L, -2, "failed");
    } else if (r->signal) {
        lua_pushinteger(L, r->signal);
        lua_setfield(L, -2, "signal");
    } else {
        lua_pushinteger(L, r->status);
        lua_setfield(L, -2, "status");
    }
    push_streams(L, op, r->cut_stdout || r->cut_stderr, r->ms);
    lua_pushboolean(L, r->timed_out);
    lua_setfield(L, -2, "timed_out");
    for (int i = 0; i < 2; i++)
        if (op->outlets[i].failed) {
            lua_pushfstring(L, "standard %s: %s", i ? "error" : "output",
                            strerror(op->outlets[i].failed));
            lua_setfield(L, -2, "unwritten");
        }
    if (r->out_of_memory) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, "out_of_memory");
        lua_pushfstring(L, "%d MiB: vm.memory", (int)(op->h->memory_bytes >> 20));
        lua_setfield(L, -2, "limit");
    } else if (r->timed_out || op->capped) {
        lua_pushstring(L, op->limit);
        lua_setfield(L, -2, "limit");
    }
    if (op->capped) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, "capped");
    }
    return 1;
}

static void call_output_fn(struct orch_vm_operation *op, int ref, struct orch_slice bytes)
{
    struct orch_err err = { 0 };
    lua_State *L = op->h->main;
    lua_rawgeti(L, LUA_REGISTRYINDEX, ref);
    lua_pushlstring(L, bytes.p, bytes.n);
    if (orch_state_pcall(orch_state_of(L), 1, 0, &err) < 0)
        orch_log(ORCH_ERROR, "exec: output callback: %s", err.msg);
}

/* ---- the process's own streams. A reader that is behind must not stop the loop, and the
 * descriptors are shared with other processes, so they are not made non-blocking: a pipe that poll
 * calls writable takes PIPE_BUF bytes at once. */

static void outlet_flush(struct orch_vm_outlet *out);

static void outlet_writable(void *ud, int events)
{
    (void)events;
    outlet_flush(ud);
}

static void outlet_flush(struct orch_vm_outlet *out)
{
    struct orch_vm_operation *op = out->op;
    while (out->pending.n) {
        struct pollfd p = { .fd = out->fd, .events = POLLOUT };
        if (poll(&p, 1, 0) == 0)
            break;
        ssize_t w = write(out->fd, out->pending.p,
                          out->pending.n < PIPE_BUF ? out->pending.n : PIPE_BUF);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno == EAGAIN)
            break;
        if (w < 0) { /* as for a program of this machine: its reader is gone */
            out->closed = true;
            out->failed = errno == EPIPE ? 0 : errno;
            out->pending.n = 0;
            if (op->exec)
                orch_exec_signal(op->exec, SIGPIPE);
            break;
        }
        orch_buf_consume(&out->pending, (size_t)w);
    }
    if (out->pending.n && !out->watch)
        out->watch = orch_watch_new(orch_env_of(op->h->main)->loop, out->fd, ORCH_WRITE,
                                    outlet_writable, out);
    if (!out->pending.n) {
        orch_watch_free(out->watch);
        out->watch = NULL;
    }
    bool behind = false;
    for (struct orch_vm_outlet *any = op->outlets; any < op->outlets + 2; any++)
        behind = behind || any->pending.n > PENDING_MAX_BYTES;
    struct orch_err err;
    /* one that ends delivers all it has */
    struct orch_channel *c = op->exec ? orch_vm_channel(op->h->vm, &err) : NULL;
    if (c)
        orch_channel_pause(c, behind);
    else if (op->ended && !op->outlets[0].pending.n && !op->outlets[1].pending.n)
        orch_vm_operation_ready(op);
}

static void exec_output(void *ud, int stream, struct orch_slice bytes)
{
    struct orch_vm_operation *op = ud;
    struct orch_vm_outlet *out = &op->outlets[stream - 1];
    int ref = stream == 1 ? op->on_stdout : op->on_stderr;
    if (op->inherit_out && !out->closed) {
        orch_buf_slice(&out->pending, bytes);
        if (!out->watch)
            outlet_flush(out);
    } else if (op->inherit_out) {
        return;
    } else if (ref != LUA_NOREF) {
        call_output_fn(op, ref, bytes);
    } else {
        orch_buf_slice(stream == 1 ? &op->out : &op->err_out, bytes);
    }
}

/* Moves one chunk of the process's stdin; false when the window is full or the input has ended. */
static bool feed_stdin(struct orch_vm_operation *op)
{
    char chunk[STDIN_CHUNK];
    if (op->in_sent == op->in.n) {
        ssize_t r = read(STDIN_FILENO, chunk, sizeof chunk);
        if (r < 0 && (errno == EINTR || errno == EAGAIN))
            return false;
        if (r <= 0) {
            orch_watch_free(op->stdin_watch);
            op->stdin_watch = NULL;
            op->stdin_file = false;
            orch_exec_close_stdin(op->exec);
            return false;
        }
        op->in.n = op->in_sent = 0;
        orch_buf_add(&op->in, chunk, (size_t)r);
    }
    op->in_sent += orch_exec_write(op->exec, op->in.p + op->in_sent, op->in.n - op->in_sent);
    return op->in_sent == op->in.n;
}

static void stdin_readable(void *ud, int events)
{
    (void)events;
    struct orch_vm_operation *op = ud;
    if (!feed_stdin(op) && op->in_sent < op->in.n)
        orch_watch_set(op->stdin_watch, 0); /* drained turns it on again */
}

static void exec_feed(void *ud)
{
    struct orch_vm_operation *op = ud;
    if (op->inherit_in) {
        if (op->stdin_watch)
            orch_watch_set(op->stdin_watch, ORCH_READ);
        while (op->stdin_file && feed_stdin(op))
            ;
        return;
    }
    while (op->in_sent < op->in.n) {
        size_t n = orch_exec_write(op->exec, op->in.p + op->in_sent, op->in.n - op->in_sent);
        if (!n)
            return;
        op->in_sent += n;
    }
    orch_exec_close_stdin(op->exec);
    orch_buf_free(&op->in);
}

static void exec_done(void *ud, const struct orch_exec_result *r, const struct orch_err *err)
{
    struct orch_vm_operation *op = ud;
    op->exec = NULL;
    op->ended = true;
    orch_watch_free(op->stdin_watch);
    op->stdin_watch = NULL;
    if (err)
        op->err = *err;
    else
        op->result = *r;
    if (!op->outlets[0].pending.n && !op->outlets[1].pending.n)
        orch_vm_operation_ready(op);
}

static void inherit_stdin(struct orch_vm_operation *op, struct orch_loop *loop)
{
    struct stat st;
    op->stdin_file = fstat(STDIN_FILENO, &st) < 0 || S_ISREG(st.st_mode) ||
                     (S_ISCHR(st.st_mode) && !isatty(STDIN_FILENO));
    if (!op->stdin_file)
        op->stdin_watch = orch_watch_new(loop, STDIN_FILENO, ORCH_READ, stdin_readable, op);
    exec_feed(op);
}

/* How long a command may run: at most what is left of the call's time, so that the guest ends it
 * and its output is there to be answered with. Negative with err: nothing is left. */
static int bound_exec(struct orch_vm_operation *op, struct orch_exec_opts *x, struct orch_err *err)
{
    struct orch_vm_handle *h = op->h;
    double seconds = (double)x->timeout_ms / 1000;
    const char *name = "the argument timeout";
    if (h->call) {
        struct orch_call_time t = orch_call_time(h->call);
        double whole = (double)t.whole_ms / 1000;
        if (t.left_ms <= 0) {
            orch_err_setc(err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, ORCH_VM_TIME_OVER, whole, t.limit);
            return orch_err_wrap(err, "microVM %s", h->id);
        }
        op->capped = x->timeout_ms > t.whole_ms;
        if (!x->timeout_ms || x->timeout_ms > t.left_ms) {
            x->timeout_ms = t.left_ms;
            seconds = whole;
            name = t.limit;
        }
    }
    snprintf(op->limit, sizeof op->limit, "%g s: %s", seconds, name);
    return 0;
}

int orch_vm_handle_exec(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    bool trusted = orch_state_context(L) == ORCH_CTX_SCRIPT;
    struct orch_opts o = orch_opts_begin(L, 3, "vm:exec");
    struct orch_exec_opts x = {
        .cwd = orch_opt_string(&o, "cwd", NULL),
        .user = orch_opt_string(&o, "user", NULL),
        .timeout_ms = orch_opt_duration_ms(&o, "timeout", 0),
        .max_output = (uint64_t)orch_opt_size_bytes(&o, "max_output", MAX_OUTPUT_BYTES),
        .pty = orch_opt_bool(&o, "pty", false),
        .output = exec_output,
        .drained = exec_feed,
        .done = exec_done,
    };
    /* Of the command line: the process's own streams; or its stdin alone. */
    bool inherit_all = trusted && orch_opt_bool(&o, "inherit", false);
    bool inherit = trusted && (orch_opt_bool(&o, "inherit_stdin", false) || inherit_all);
    if (orch_opt_push(&o, "env", LUA_TTABLE)) {
        /* { NAME = "value" } as a list of "NAME=value", kept on the stack. */
        lua_newtable(L);
        int list = lua_gettop(L), i = 0;
        lua_pushnil(L);
        while (lua_next(L, list - 1)) {
            if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TSTRING)
                return luaL_error(L, "vm:exec: env must map names to strings");
            lua_pushfstring(L, "%s=%s", lua_tostring(L, -2), lua_tostring(L, -1));
            lua_rawseti(L, list, ++i);
            lua_pop(L, 1);
        }
        x.env = orch_check_strings(L, list, "env", ARGV_MAX);
    }
    size_t n_input = 0;
    const char *input = NULL;
    if (orch_opt_push(&o, "stdin", LUA_TSTRING))
        input = lua_tolstring(L, -1, &n_input);
    bool out_fn = orch_opt_push(&o, "on_stdout", LUA_TFUNCTION);
    int out_idx = lua_gettop(L);
    bool err_fn = orch_opt_push(&o, "on_stderr", LUA_TFUNCTION);
    int err_idx = lua_gettop(L);
    orch_opts_done(&o);
    if (x.max_output < 1 || (x.max_output > OUTPUT_MOST_BYTES && !(out_fn && err_fn)))
        return luaL_error(
            L,
            "vm:exec: max_output must be from 1 byte to 64M; more needs on_stdout and on_stderr");
    if (inherit_all)
        x.max_output = 0;
    x.argv = orch_check_strings(L, 2, "vm:exec: argv", ARGV_MAX);
    if (!x.argv[0])
        return luaL_error(L, "vm:exec: argv is empty");
    struct orch_channel *channel = orch_vm_handle_channel(L, h, &n_results);
    if (!channel)
        return n_results;
    x.no_aslr = orch_vm_no_aslr(h->vm);

    struct orch_vm_operation *op = orch_vm_operation_new(h, exec_push);
    if (out_fn) {
        lua_pushvalue(L, out_idx);
        op->on_stdout = luaL_ref(L, LUA_REGISTRYINDEX);
    }
    if (err_fn) {
        lua_pushvalue(L, err_idx);
        op->on_stderr = luaL_ref(L, LUA_REGISTRYINDEX);
    }
    if (input)
        orch_buf_add(&op->in, input, n_input);
    op->inherit_in = inherit;
    op->inherit_out = inherit_all;
    for (int i = 0; i < 2; i++) {
        op->outlets[i].op = op;
        op->outlets[i].fd = i + 1;
    }
    x.stdin_open = input || inherit;
    x.ud = op;
    op->max_output = x.max_output;
    struct orch_err err = { 0 };
    if (bound_exec(op, &x, &err) < 0 || !(op->exec = orch_exec_start(channel, &x, &err))) {
        orch_vm_operation_free(op);
        return orch_push_err(L, &err);
    }
    op->begun_us = orch_now_us();
    op->so_far = push_so_far;
    if (inherit)
        inherit_stdin(op, orch_env_of(L)->loop);
    else if (input)
        exec_feed(op);
    return orch_task_wait(L, orch_vm_operation_cancel, op, &op->wait);
}

/* ---- files */

static void file_done(void *ud, struct orch_slice data, const struct orch_err *err)
{
    struct orch_vm_operation *op = ud;
    op->file = NULL;
    if (err)
        op->err = *err;
    else
        orch_buf_slice(&op->out, data);
    orch_vm_operation_ready(op);
}

static int push_true(lua_State *L, struct orch_vm_operation *op)
{
    (void)op;
    lua_pushboolean(L, 1);
    return 1;
}

static int push_bytes(lua_State *L, struct orch_vm_operation *op)
{
    lua_pushlstring(L, op->out.p ? op->out.p : "", op->out.n);
    return 1;
}

/* Entries "type mode size mtime name\0" as { { name, type, mode, size, mtime }, … }. */
static int push_entries(lua_State *L, struct orch_vm_operation *op)
{
    lua_newtable(L);
    int i = 0;
    for (const char *p = op->out.p, *end = p ? p + op->out.n : p; p < end; p += strlen(p) + 1) {
        char type;
        unsigned mode;
        unsigned long long size;
        long long mtime;
        int at = 0;
        if (sscanf(p, "%c %o %llu %lld %n", &type, &mode, &size, &mtime, &at) < 4 || !at)
            continue;
        lua_newtable(L);
        lua_pushstring(L, p + at);
        lua_setfield(L, -2, "name");
        lua_pushstring(L, type == 'f'   ? "file"
                          : type == 'd' ? "directory"
                          : type == 'l' ? "link"
                                        : "other");
        lua_setfield(L, -2, "type");
        lua_pushinteger(L, (lua_Integer)mode);
        lua_setfield(L, -2, "mode");
        lua_pushnumber(L, (double)size);
        lua_setfield(L, -2, "size");
        lua_pushnumber(L, (double)mtime);
        lua_setfield(L, -2, "mtime");
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}

static int start_file(lua_State *L, struct orch_vm_operation *op)
{
    if (!op->file) {
        struct orch_err err;
        orch_err_set(&err, EBUSY, "too many operations at once in this microVM");
        orch_vm_operation_free(op);
        return orch_push_err(L, &err);
    }
    return orch_task_wait(L, orch_vm_operation_cancel, op, &op->wait);
}

int orch_vm_handle_write_file(lua_State *L)
{
    int n_results;
    size_t n;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    const char *data = luaL_checklstring(L, 3, &n);
    struct orch_opts o = orch_opts_begin(L, 4, "vm:write_file");
    mode_t mode = (mode_t)orch_opt_number(&o, "mode", 0644, 0, 07777);
    orch_opts_done(&o);
    struct orch_channel *channel = orch_vm_handle_channel(L, h, &n_results);
    if (!channel)
        return n_results;
    struct orch_vm_operation *op = orch_vm_operation_new(h, push_true);
    op->file = orch_channel_write_file(channel, path, (struct orch_slice){ data, n }, mode,
                                       file_done, op);
    return start_file(L, op);
}

int orch_vm_handle_read_file(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    struct orch_opts o = orch_opts_begin(L, 3, "vm:read_file");
    uint64_t offset = (uint64_t)orch_opt_number(&o, "offset", 0, 0, 9e15),
             length = (uint64_t)orch_opt_number(&o, "length", 0, 0, 9e15);
    orch_opts_done(&o);
    struct orch_channel *channel = orch_vm_handle_channel(L, h, &n_results);
    if (!channel)
        return n_results;
    struct orch_vm_operation *op = orch_vm_operation_new(h, push_bytes);
    op->file = orch_channel_read_file(channel, path, offset, length, FILE_MAX_BYTES, file_done, op);
    return start_file(L, op);
}

int orch_vm_handle_list_dir(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    struct orch_channel *channel = orch_vm_handle_channel(L, h, &n_results);
    if (!channel)
        return n_results;
    struct orch_vm_operation *op = orch_vm_operation_new(h, push_entries);
    op->file = orch_channel_list_dir(channel, path, file_done, op);
    return start_file(L, op);
}
