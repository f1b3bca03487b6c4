/* orch.vm and orch.image; the vm object. */
#include "bind.h"

#include "../base/log.h"
#include "../vm/vm.h"

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

#define VM_META "orch.vm"

/* Shared by the Lua object, its owner and what is under way; freed with the last of them. */
struct orch_vm_handle {
    struct orch_vm_handle *next;
    struct orch_vm_handle **list; /* the owner's, while owned */
    unsigned refs;
    struct orch_vm *vm;         /* NULL when it is over, see err; ask usable() for it */
    struct orch_err err;        /* why it is over */
    struct orch_toolcall *call; /* the owner; NULL: the host, or it is over */
    lua_State *main;
    struct orch_env *env;
    struct operation *operations;
    /* While it is spawned: its task waits; the call's time stands still. */
    struct orch_wait wait;
    bool waiting, held;
    /* What it was stays known. */
    char id[16];
    char *image;
    const char *backend, *isolation;
    double spawn_ms;
};

/* A wait of one exec or file operation. */
struct operation {
    struct operation *next, **at;
    struct orch_vm_handle *h;
    struct orch_wait wait;
    struct orch_exec *exec;
    struct orch_fileop *file;
    struct orch_buf out, err_out, in;
    size_t in_sent;
    int on_stdout, on_stderr; /* registry references */
    bool inherit_in, inherit_out; /* the process's own stdin; stdout and stderr */
    bool stdin_file;              /* stdin cannot be watched (a file, /dev/null): it is read when there is room */
    struct orch_watch *stdin_watch;
    struct outlet {
        struct operation *op;
        struct orch_watch *watch; /* while its reader is behind */
        struct orch_buf pending;
        int fd;
        bool closed;              /* nobody reads it any more */
    } outlets[2];
    bool ended; /* the command has, its output is still being written */
    bool capped; /* it was to get more time than there is */
    char limit[200]; /* of its time, for people; empty: none */
    int64_t begun_us; /* 0: no command was started */
    uint64_t max_output;
    struct orch_exec_result result;
    struct orch_err err;
    int (*push)(lua_State *L, struct operation *op);
};

static void handle_drop(struct orch_vm_handle *h, unsigned refs)
{
    h->refs -= refs;
    if (h->refs)
        return;
    free(h->image);
    free(h);
}

static void handle_unref(struct orch_vm_handle *h)
{
    handle_drop(h, 1);
}

static void operation_free(struct operation *op)
{
    *op->at = op->next;
    if (op->next)
        op->next->at = op->at;
    if (op->exec)
        orch_exec_drop(op->exec);
    if (op->file)
        orch_fileop_drop(op->file);
    orch_watch_free(op->stdin_watch);
    for (struct outlet *out = op->outlets; out < op->outlets + 2; out++) {
        orch_watch_free(out->watch);
        orch_buf_free(&out->pending);
    }
    luaL_unref(op->h->main, LUA_REGISTRYINDEX, op->on_stdout);
    luaL_unref(op->h->main, LUA_REGISTRYINDEX, op->on_stderr);
    orch_buf_free(&op->out);
    orch_buf_free(&op->err_out);
    orch_buf_free(&op->in);
    handle_unref(op->h);
    free(op);
}

static void push_so_far(lua_State *L, struct operation *op);

static int operation_push(lua_State *L, void *ud)
{
    struct operation *op = ud;
    int n = op->err.cls ? orch_push_err(L, &op->err) : op->push(L, op);
    if (op->err.cls && op->begun_us) {
        push_so_far(L, op);
        n++;
    }
    operation_free(op);
    return n;
}

static void operation_ready(struct operation *op)
{
    orch_task_ready(op->wait, operation_push, op);
}

static void operation_cancel(void *ud)
{
    operation_free(ud);
}

static struct operation *operation_new(struct orch_vm_handle *h, int (*push)(lua_State *L, struct operation *op))
{
    struct operation *op = orch_xcalloc(1, sizeof *op);
    *op = (struct operation){ .next = h->operations, .at = &h->operations, .h = h, .on_stdout = LUA_NOREF, .on_stderr = LUA_NOREF,
                              .push = push };
    if (op->next)
        op->next->at = &op->next;
    h->operations = op;
    h->refs++;
    return op;
}

static void handle_hold(struct orch_vm_handle *h, bool on)
{
    if (h->held != on)
        h->env->call->hold(h->call, on);
    h->held = on;
}

static int spawn_push(lua_State *L, void *ud);

/* Ends the microVM; what is under way fails with why, as everything later does. The owner drops one reference
 * when it has one. */
static void handle_close(struct orch_vm_handle *h, const struct orch_err *why)
{
    struct orch_vm *vm = h->vm;
    h->vm = NULL;
    h->err = *why;
    handle_hold(h, false);
    for (struct operation *op = h->operations; op; op = op->next) {
        if (!op->exec && !op->file)
            continue;
        if (op->exec)
            orch_exec_drop(op->exec);
        if (op->file)
            orch_fileop_drop(op->file);
        op->exec = NULL;
        op->file = NULL;
        orch_watch_free(op->stdin_watch);
        op->stdin_watch = NULL;
        op->err = h->err;
        operation_ready(op);
    }
    orch_vm_free(vm);
    if (h->waiting)
        orch_task_ready(h->wait, spawn_push, h);
    h->waiting = false;
    if (!h->list)
        return;
    struct orch_vm_handle **at = h->list;
    while (*at != h)
        at = &(*at)->next;
    *at = h->next;
    h->list = NULL;
    h->call = NULL;
    handle_unref(h);
}

static void handle_close_because(struct orch_vm_handle *h, const char *why)
{
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_CLOSED, ESHUTDOWN, "microVM %s: %s", h->id, why);
    handle_close(h, &err);
}

void orch_vm_handles_close(struct orch_vm_handle **list, const char *why)
{
    while (*list)
        handle_close_because(*list, why);
}

void orch_vm_handles_end(struct orch_vm_handle *list, const struct orch_err *why)
{
    for (struct orch_vm_handle *h = list; h; h = h->next) /* lost, or not ready, is told in turns of their own */
        orch_vm_end(h->vm, why);
}

/* ---- spawn */

static int push_vm(lua_State *L, struct orch_vm_handle *h)
{
    struct orch_vm_handle **box = lua_newuserdata(L, sizeof *box);
    *box = h;
    h->refs++;
    luaL_getmetatable(L, VM_META);
    lua_setmetatable(L, -2);
    return 1;
}

static int spawn_push(lua_State *L, void *ud)
{
    struct orch_vm_handle *h = ud;
    int n = h->vm ? push_vm(L, h) : orch_push_err(L, &h->err);
    handle_unref(h); /* the wait's */
    return n;
}

static void vm_waits(void *ud, bool waits)
{
    struct orch_vm_handle *h = ud;
    if (h->call)
        handle_hold(h, waits);
}

static void vm_ready(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    struct orch_vm_handle *h = ud;
    if (err) {
        struct orch_err why = *err; /* the microVM's, which goes */
        handle_close(h, &why);
        return;
    }
    h->image = orch_xstrdup(orch_vm_image(vm));
    h->backend = orch_vm_backend(vm);
    h->isolation = orch_isolation_name(orch_vm_isolation(vm));
    h->spawn_ms = orch_vm_spawn_ms(vm);
    if (h->call)
        h->env->call->ran(h->call, vm);
    h->waiting = false;
    orch_task_ready(h->wait, spawn_push, h);
}

static void vm_lost(void *ud, struct orch_vm *vm, const struct orch_err *err)
{
    (void)vm;
    struct orch_err why = *err; /* the microVM's, which goes */
    handle_close(ud, &why);
}

/* Nobody will take it. */
static void spawn_cancel(void *ud)
{
    struct orch_vm_handle *h = ud;
    h->waiting = false;
    if (h->vm)
        handle_close_because(h, "its task was cancelled");
    handle_unref(h); /* the wait's */
}

int orch_vm_spawn_wait(lua_State *L, int idx, struct orch_toolcall *call)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_err err = { 0 };
    struct orch_opts o = orch_opts_begin(L, idx, call ? "ctx:vm" : "orch.vm.spawn");
    struct orch_vm_opts vo = {
        .image = orch_opt_string(&o, "image", NULL),
        .memory_bytes = (uint64_t)orch_opt_size_bytes(&o, "memory", 0),
        .vcpus = (int)orch_opt_number(&o, "vcpus", 0, 1, 64),
        .timeout_ms = orch_opt_duration_ms(&o, "timeout", -1),
        .timeout_name = call ? "timeout of ctx:vm" : "timeout",
    };
    if (call) {
        const char *keep = orch_opt_string(&o, "keep", NULL), *workspace = orch_opt_string(&o, "workspace", "none");
        if (keep)
            return luaL_error(L, "ctx:vm: keep = \"%s\" is not available yet", keep);
        if (strcmp(workspace, "none") != 0)
            return luaL_error(L, "ctx:vm: workspace = \"%s\" is not available yet; only \"none\" is", workspace);
        vo.network = env->call->network(call);
        vo.call = env->call->id(call);
    } else {
        vo.network = orch_opt_string(&o, "network", "none");
        vo.backend = orch_opt_string(&o, "backend", NULL);
        vo.name = orch_opt_string(&o, "name", NULL);
        if (orch_opt_string(&o, "from", NULL))
            return luaL_error(L, "orch.vm.spawn: from is not available yet");
    }
    orch_opts_done(&o);
    struct orch_vms *vms = env->vms(env->ud, &err);
    if (!vms || env->vm_defaults(env->ud, &vo, &err) < 0)
        return orch_push_err(L, &err);
    if (strcmp(vo.network, "none") != 0 && env->rules(env->ud, vo.network, &vo.rules, &err) < 0)
        return orch_push_err(L, &err);
    struct orch_vm_handle *h = orch_xcalloc(1, sizeof *h);
    h->main = orch_state_lua(orch_state_of(L));
    h->env = env;
    h->call = call;
    vo.ready = vm_ready;
    vo.lost = vm_lost;
    vo.waits = vm_waits;
    vo.ud = h;
    h->vm = orch_vm_spawn(vms, &vo, &err);
    if (!h->vm) {
        free(h);
        return orch_push_err(L, &err);
    }
    snprintf(h->id, sizeof h->id, "%s", orch_vm_id(h->vm));
    h->refs = 2; /* the wait's, the owner's */
    h->list = call ? env->call->vms(call) : &env->vm_handles;
    h->next = *h->list;
    *h->list = h;
    h->waiting = true;
    if (call)
        handle_hold(h, true);
    return orch_task_wait(L, spawn_cancel, h, &h->wait);
}

static int l_spawn(lua_State *L)
{
    return orch_vm_spawn_wait(L, 1, NULL);
}

/* ---- the object */

static struct orch_vm_handle *handle_at(lua_State *L)
{
    struct orch_vm_handle **box = luaL_checkudata(L, 1, VM_META);
    return *box;
}

/* The one way to a handle's microVM, right before it is used: its channel, or NULL with nil, message, code
 * pushed when it is over, whether the handle was told so already or not. */
static struct orch_channel *usable(lua_State *L, const struct orch_vm_handle *h, int *n_results)
{
    struct orch_err err = h->err;
    struct orch_channel *c = h->vm ? orch_vm_channel(h->vm, &err) : NULL;
    if (!c)
        *n_results = orch_push_err(L, &err);
    return c;
}

static int vm_gc(lua_State *L)
{
    struct orch_vm_handle **box = lua_touserdata(L, 1);
    if (*box)
        handle_unref(*box); /* its owner ends the microVM, not the collector */
    *box = NULL;
    return 0;
}

static int vm_tostring(lua_State *L)
{
    struct orch_vm_handle *h = handle_at(L);
    lua_pushfstring(L, "orch.vm(%s%s)", h->id, h->vm ? "" : ", closed");
    return 1;
}

static int l_close(lua_State *L)
{
    struct orch_vm_handle *h = handle_at(L);
    if (h->vm)
        handle_close_because(h, "it was closed"); /* the object keeps its own reference */
    return 0;
}

static int vm_index(lua_State *L)
{
    struct orch_vm_handle *h = handle_at(L);
    const char *key = luaL_checkstring(L, 2);
    lua_pushvalue(L, 2);
    lua_rawget(L, lua_upvalueindex(1));
    if (!lua_isnil(L, -1))
        return 1;
    if (strcmp(key, "id") == 0)
        lua_pushstring(L, h->id);
    else if (strcmp(key, "backend") == 0)
        lua_pushstring(L, h->backend);
    else if (strcmp(key, "isolation") == 0)
        lua_pushstring(L, h->isolation);
    else if (strcmp(key, "image") == 0)
        lua_pushstring(L, h->image);
    else if (strcmp(key, "spawn_ms") == 0)
        lua_pushnumber(L, h->spawn_ms);
    else
        return 0;
    return 1;
}

/* ---- exec */

static void push_streams(lua_State *L, const struct operation *op, bool truncated, int64_t ms)
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
static void push_so_far(lua_State *L, struct operation *op)
{
    lua_newtable(L);
    bool full = op->max_output && (op->out.n >= op->max_output || op->err_out.n >= op->max_output);
    push_streams(L, op, full, (orch_now_us() - op->begun_us) / 1000);
}

static int exec_push(lua_State *L, struct operation *op)
{
    struct orch_exec_result *r = &op->result;
    static const char *const reasons[] = { "", "not found", "not executable", "working directory", "user", "resources" };
    lua_newtable(L);
    if (r->fail) {
        /* As a shell reports it: 127 not found, 126 not executable, 125 for the rest. */
        lua_pushinteger(L, r->fail == ORCH_WIRE_FAIL_NOT_FOUND ? 127 : r->fail == ORCH_WIRE_FAIL_NOT_EXECUTABLE ? 126 : 125);
        lua_setfield(L, -2, "status");
        const char *reason = (size_t)r->fail < ORCH_ARRAY_LEN(reasons) ? reasons[r->fail] : "?";
        orch_buf_printf(&op->err_out, "orch: the command could not be started: %s (%s)\n", reason, strerror(r->sys_errno));
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
    if (r->timed_out || op->capped) {
        lua_pushstring(L, op->limit);
        lua_setfield(L, -2, "limit");
    }
    if (op->capped) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, "capped");
    }
    return 1;
}

static void call_output_fn(struct operation *op, int ref, struct orch_slice bytes)
{
    struct orch_err err = { 0 };
    lua_State *L = op->h->main;
    lua_rawgeti(L, LUA_REGISTRYINDEX, ref);
    lua_pushlstring(L, bytes.p, bytes.n);
    if (orch_state_pcall(orch_state_of(L), 1, 0, &err) < 0)
        orch_log(ORCH_ERROR, "exec: output callback: %s", err.msg);
}

/* ---- the process's own streams. A reader that is behind must not stop the loop, and the descriptors are
 * shared with other processes, so they are not made non-blocking: a pipe that poll calls writable takes
 * PIPE_BUF bytes at once. */

static void outlet_flush(struct outlet *out);

static void outlet_writable(void *ud, int events)
{
    (void)events;
    outlet_flush(ud);
}

static void outlet_flush(struct outlet *out)
{
    struct operation *op = out->op;
    while (out->pending.n) {
        struct pollfd p = { .fd = out->fd, .events = POLLOUT };
        if (poll(&p, 1, 0) == 0)
            break;
        ssize_t w = write(out->fd, out->pending.p, out->pending.n < PIPE_BUF ? out->pending.n : PIPE_BUF);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && errno == EAGAIN)
            break;
        if (w < 0) { /* as for a program of this machine: its reader is gone */
            out->closed = true;
            out->pending.n = 0;
            if (op->exec)
                orch_exec_signal(op->exec, SIGPIPE);
            break;
        }
        orch_buf_consume(&out->pending, (size_t)w);
    }
    if (out->pending.n && !out->watch)
        out->watch = orch_watch_new(orch_env_of(op->h->main)->loop, out->fd, ORCH_WRITE, outlet_writable, out);
    if (!out->pending.n) {
        orch_watch_free(out->watch);
        out->watch = NULL;
    }
    bool behind = false;
    for (struct outlet *any = op->outlets; any < op->outlets + 2; any++)
        behind = behind || any->pending.n > PENDING_MAX_BYTES;
    struct orch_err err;
    struct orch_channel *c = op->exec ? orch_vm_channel(op->h->vm, &err) : NULL; /* one that ends delivers all it has */
    if (c)
        orch_channel_pause(c, behind);
    else if (op->ended && !op->outlets[0].pending.n && !op->outlets[1].pending.n)
        operation_ready(op);
}

static void exec_output(void *ud, int stream, struct orch_slice bytes)
{
    struct operation *op = ud;
    struct outlet *out = &op->outlets[stream - 1];
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
static bool feed_stdin(struct operation *op)
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
    struct operation *op = ud;
    if (!feed_stdin(op) && op->in_sent < op->in.n)
        orch_watch_set(op->stdin_watch, 0); /* drained turns it on again */
}

static void exec_feed(void *ud)
{
    struct operation *op = ud;
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
    struct operation *op = ud;
    op->exec = NULL;
    op->ended = true;
    orch_watch_free(op->stdin_watch);
    op->stdin_watch = NULL;
    if (err)
        op->err = *err;
    else
        op->result = *r;
    if (!op->outlets[0].pending.n && !op->outlets[1].pending.n)
        operation_ready(op);
}

static void inherit_stdin(struct operation *op, struct orch_loop *loop)
{
    struct stat st;
    op->stdin_file = fstat(STDIN_FILENO, &st) < 0 || S_ISREG(st.st_mode) || (S_ISCHR(st.st_mode) && !isatty(STDIN_FILENO));
    if (!op->stdin_file)
        op->stdin_watch = orch_watch_new(loop, STDIN_FILENO, ORCH_READ, stdin_readable, op);
    exec_feed(op);
}

/* How long a command may run: at most what is left of the call's time, so that the guest ends it and its output
 * is there to be answered with. Negative with err: nothing is left. */
static int bound_exec(struct operation *op, struct orch_exec_opts *x, struct orch_err *err)
{
    struct orch_vm_handle *h = op->h;
    double seconds = (double)x->timeout_ms / 1000;
    const char *name = "the argument timeout";
    if (h->call) {
        struct orch_call_time t = h->env->call->time(h->call);
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

static int l_exec(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
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
        return luaL_error(L, "vm:exec: max_output must be from 1 byte to 64M; more needs on_stdout and on_stderr");
    if (inherit_all)
        x.max_output = 0;
    x.argv = orch_check_strings(L, 2, "vm:exec: argv", ARGV_MAX);
    if (!x.argv[0])
        return luaL_error(L, "vm:exec: argv is empty");
    struct orch_channel *channel = usable(L, h, &n_results);
    if (!channel)
        return n_results;
    x.no_aslr = orch_vm_no_aslr(h->vm);

    struct operation *op = operation_new(h, exec_push);
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
        operation_free(op);
        return orch_push_err(L, &err);
    }
    op->begun_us = orch_now_us();
    if (inherit)
        inherit_stdin(op, orch_env_of(L)->loop);
    else if (input)
        exec_feed(op);
    return orch_task_wait(L, operation_cancel, op, &op->wait);
}

/* ---- files */

static void file_done(void *ud, struct orch_slice data, const struct orch_err *err)
{
    struct operation *op = ud;
    op->file = NULL;
    if (err)
        op->err = *err;
    else
        orch_buf_slice(&op->out, data);
    operation_ready(op);
}

static int push_true(lua_State *L, struct operation *op)
{
    (void)op;
    lua_pushboolean(L, 1);
    return 1;
}

static int push_bytes(lua_State *L, struct operation *op)
{
    lua_pushlstring(L, op->out.p ? op->out.p : "", op->out.n);
    return 1;
}

/* Entries "type mode size mtime name\0" as { { name, type, mode, size, mtime }, … }. */
static int push_entries(lua_State *L, struct operation *op)
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
        lua_pushstring(L, type == 'f' ? "file" : type == 'd' ? "directory" : type == 'l' ? "link" : "other");
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

static int start_file(lua_State *L, struct operation *op)
{
    if (!op->file) {
        struct orch_err err;
        orch_err_set(&err, EBUSY, "too many operations at once in this microVM");
        operation_free(op);
        return orch_push_err(L, &err);
    }
    return orch_task_wait(L, operation_cancel, op, &op->wait);
}

static int l_write_file(lua_State *L)
{
    int n_results;
    size_t n;
    struct orch_vm_handle *h = handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    const char *data = luaL_checklstring(L, 3, &n);
    struct orch_opts o = orch_opts_begin(L, 4, "vm:write_file");
    mode_t mode = (mode_t)orch_opt_number(&o, "mode", 0644, 0, 07777);
    orch_opts_done(&o);
    struct orch_channel *channel = usable(L, h, &n_results);
    if (!channel)
        return n_results;
    struct operation *op = operation_new(h, push_true);
    op->file = orch_channel_write_file(channel, path, (struct orch_slice){ data, n }, mode, file_done, op);
    return start_file(L, op);
}

static int l_read_file(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    struct orch_opts o = orch_opts_begin(L, 3, "vm:read_file");
    uint64_t offset = (uint64_t)orch_opt_number(&o, "offset", 0, 0, 9e15), length = (uint64_t)orch_opt_number(&o, "length", 0, 0, 9e15);
    orch_opts_done(&o);
    struct orch_channel *channel = usable(L, h, &n_results);
    if (!channel)
        return n_results;
    struct operation *op = operation_new(h, push_bytes);
    op->file = orch_channel_read_file(channel, path, offset, length, FILE_MAX_BYTES, file_done, op);
    return start_file(L, op);
}

static int l_list_dir(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
    const char *path = luaL_checkstring(L, 2);
    struct orch_channel *channel = usable(L, h, &n_results);
    if (!channel)
        return n_results;
    struct operation *op = operation_new(h, push_entries);
    op->file = orch_channel_list_dir(channel, path, file_done, op);
    return start_file(L, op);
}

/* ---- the rest */

static int l_logs(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
    if (!usable(L, h, &n_results))
        return n_results;
    struct orch_slice tail = orch_vm_log_tail(h->vm);
    lua_pushlstring(L, tail.p ? tail.p : "", tail.n);
    return 1;
}

static int l_network(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
    if (!usable(L, h, &n_results))
        return n_results;
    const char *network = orch_vm_network(h->vm);
    lua_pushstring(L, strcmp(network, "none") ? network : "no interface");
    return 1;
}

static void push_counter(void *ud, const char *label, uint64_t packets, uint64_t bytes)
{
    lua_State *L = ud;
    lua_createtable(L, 0, 3);
    lua_pushstring(L, label);
    lua_setfield(L, -2, "label");
    lua_pushnumber(L, (double)packets);
    lua_setfield(L, -2, "packets");
    lua_pushnumber(L, (double)bytes);
    lua_setfield(L, -2, "bytes");
    lua_rawseti(L, -2, (int)lua_objlen(L, -2) + 1);
}

static int l_stats(lua_State *L)
{
    int n_results;
    struct orch_err err = { 0 };
    struct orch_vm_usage u;
    struct orch_vm_handle *h = handle_at(L);
    if (!usable(L, h, &n_results))
        return n_results;
    if (orch_vm_usage(h->vm, &u, &err) < 0)
        return orch_push_err(L, &err);
    lua_newtable(L);
    lua_createtable(L, 0, 2);
    lua_pushnumber(L, (double)u.vmm_bytes);
    lua_setfield(L, -2, "vmm");
    lua_pushnumber(L, (double)u.uplink_bytes);
    lua_setfield(L, -2, "uplink");
    lua_setfield(L, -2, "memory");
    lua_pushinteger(L, (lua_Integer)u.connections);
    lua_setfield(L, -2, "connections");
    lua_newtable(L);
    if (orch_vm_counters(h->vm, push_counter, L, &err) < 0)
        return orch_push_err(L, &err);
    lua_setfield(L, -2, "rules");
    return 1;
}

static int l_phases(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = handle_at(L);
    if (!usable(L, h, &n_results))
        return n_results;
    lua_newtable(L);
    int i = 0;
    for (const struct orch_vm_phase *p = orch_vm_phases(h->vm); p->name; p++) {
        lua_newtable(L);
        lua_pushstring(L, p->name);
        lua_setfield(L, -2, "name");
        lua_pushnumber(L, p->ms);
        lua_setfield(L, -2, "ms");
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}

static void list_one(void *ud, struct orch_vm *vm)
{
    lua_State *L = ud;
    lua_newtable(L);
    lua_pushstring(L, orch_vm_id(vm));
    lua_setfield(L, -2, "id");
    lua_pushstring(L, orch_vm_image(vm));
    lua_setfield(L, -2, "image");
    lua_pushstring(L, orch_vm_backend(vm));
    lua_setfield(L, -2, "backend");
    lua_pushstring(L, orch_isolation_name(orch_vm_isolation(vm)));
    lua_setfield(L, -2, "isolation");
    lua_rawseti(L, -2, (int)lua_objlen(L, -2) + 1);
}

static int l_list(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_err err = { 0 };
    struct orch_vms *vms = env->vms(env->ud, &err);
    if (!vms)
        return orch_push_err(L, &err);
    lua_newtable(L);
    orch_vms_each(vms, list_one, L);
    return 1;
}

int orch_luaopen_vm(lua_State *L, int t)
{
    enum { TS = ORCH_CTX_TOOL | ORCH_CTX_SCRIPT, S = ORCH_CTX_SCRIPT };
    if (orch_state_context(L) != ORCH_CTX_POLICY && luaL_newmetatable(L, VM_META)) {
        lua_newtable(L);
        orch_api_set(L, "vm:",
                     (struct orch_api[]){ { "exec", l_exec, TS },
                                          { "write_file", l_write_file, TS },
                                          { "read_file", l_read_file, TS },
                                          { "list_dir", l_list_dir, TS },
                                          { "logs", l_logs, TS },
                                          { "network", l_network, TS },
                                          { "stats", l_stats, TS },
                                          { "phases", l_phases, S },
                                          { "close", l_close, TS },
                                          { "copy_in", NULL, 0 },
                                          { "copy_out", NULL, 0 },
                                          { "changes", NULL, 0 },
                                          { "pause", NULL, 0 },
                                          { "resume", NULL, 0 },
                                          { "snapshot", NULL, 0 },
                                          { "fork", NULL, 0 },
                                          { "set_network", NULL, 0 },
                                          { 0 } });
        lua_pushcclosure(L, vm_index, 1);
        lua_setfield(L, -2, "__index");
        lua_pushcfunction(L, vm_gc);
        lua_setfield(L, -2, "__gc");
        lua_pushcfunction(L, vm_tostring);
        lua_setfield(L, -2, "__tostring");
        lua_pushboolean(L, 0);
        lua_setfield(L, -2, "__metatable");
        lua_pop(L, 1);
    }
    lua_newtable(L);
    orch_api_set(L, "orch.vm.", (struct orch_api[]){ { "spawn", l_spawn, S }, { "list", l_list, S }, { "pool", NULL, 0 }, { 0 } });
    lua_setfield(L, t, "vm");
    lua_newtable(L);
    orch_api_set(L, "orch.image.", (struct orch_api[]){ { "build", NULL, 0 }, { "list", NULL, 0 }, { 0 } });
    lua_setfield(L, t, "image");
    return 0;
}
