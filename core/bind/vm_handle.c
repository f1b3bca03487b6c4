/* The life of a microVM that Lua holds: spawned, owned, ended. */
#include "vm_handle.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static void handle_drop(struct orch_vm_handle *h, unsigned refs)
{
    h->refs -= refs;
    if (h->refs)
        return;
    free(h->image);
    free(h);
}

void orch_vm_handle_unref(struct orch_vm_handle *h)
{
    handle_drop(h, 1);
}

void orch_vm_operation_free(struct orch_vm_operation *op)
{
    *op->at = op->next;
    if (op->next)
        op->next->at = op->at;
    if (op->exec)
        orch_exec_drop(op->exec);
    if (op->file)
        orch_fileop_drop(op->file);
    orch_watch_free(op->stdin_watch);
    for (struct orch_vm_outlet *out = op->outlets; out < op->outlets + 2; out++) {
        orch_watch_free(out->watch);
        orch_buf_free(&out->pending);
    }
    luaL_unref(op->h->main, LUA_REGISTRYINDEX, op->on_stdout);
    luaL_unref(op->h->main, LUA_REGISTRYINDEX, op->on_stderr);
    orch_buf_free(&op->out);
    orch_buf_free(&op->err_out);
    orch_buf_free(&op->in);
    orch_vm_handle_unref(op->h);
    free(op);
}

static int operation_push(lua_State *L, void *ud)
{
    struct orch_vm_operation *op = ud;
    int n = op->err.cls ? orch_push_err(L, &op->err) : op->push(L, op);
    if (op->err.cls && op->so_far)
        n += op->so_far(L, op);
    orch_vm_operation_free(op);
    return n;
}

void orch_vm_operation_ready(struct orch_vm_operation *op)
{
    orch_task_ready(op->wait, operation_push, op);
}

void orch_vm_operation_cancel(void *ud)
{
    orch_vm_operation_free(ud);
}

struct orch_vm_operation *orch_vm_operation_new(struct orch_vm_handle *h,
                                                int (*push)(lua_State *L,
                                                            struct orch_vm_operation *op))
{
    struct orch_vm_operation *op = orch_xcalloc(1, sizeof *op);
    *op = (struct orch_vm_operation){ .next = h->operations,
                                      .at = &h->operations,
                                      .h = h,
                                      .on_stdout = LUA_NOREF,
                                      .on_stderr = LUA_NOREF,
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
        orch_call_hold(h->call, on);
    h->held = on;
}

static int spawn_push(lua_State *L, void *ud);

/* Ends the microVM; what is under way fails with why, as everything later does. The owner drops one
 * reference when it has one. */
static void handle_close(struct orch_vm_handle *h, const struct orch_err *why)
{
    struct orch_vm *vm = h->vm;
    h->vm = NULL;
    h->err = *why;
    handle_hold(h, false);
    for (struct orch_vm_operation *op = h->operations; op; op = op->next) {
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
        orch_vm_operation_ready(op);
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
    orch_vm_handle_unref(h);
}

void orch_vm_handle_close(struct orch_vm_handle *h, const char *why)
{
    struct orch_err err;
    orch_err_setc(&err, ORCH_CLASS_CLOSED, ESHUTDOWN, "microVM %s: %s", h->id, why);
    handle_close(h, &err);
}

/* ---- their owners */

static void handles_close(struct orch_vm_handle **list, const char *why)
{
    while (*list)
        orch_vm_handle_close(*list, why);
}

void orch_bind_close(struct orch_env *env)
{
    handles_close(&env->vm_handles, "orch is closing");
}

struct handles {
    struct orch_call_part part;
    struct orch_vm_handle *list;
};

static void handles_end(struct orch_call_part *p, struct orch_call *c)
{
    (void)c;
    handles_close(&((struct handles *)p)->list, "the call is over");
}

/* What runs in them is ended by their guests. */
static bool handles_late(struct orch_call_part *p, struct orch_call *c, bool now)
{
    struct handles *all = (struct handles *)p;
    struct orch_err err;
    if (!now)
        return all->list != NULL;
    orch_err_setc(&err, ORCH_CLASS_TIMEOUT, ETIMEDOUT, ORCH_VM_TIME_OVER, (double)c->time_ms / 1000,
                  c->limit);
    /* lost, or not ready, is told in turns of their own */
    for (struct orch_vm_handle *h = all->list; h; h = h->next)
        orch_vm_end(h->vm, &err);
    return true;
}

static void handles_free(struct orch_call_part *p)
{
    free(p);
}

static const struct orch_call_part_ops handles_ops = {
    .end = handles_end,
    .late = handles_late,
    .free = handles_free,
};

static struct orch_vm_handle **handles_of(struct orch_call *c)
{
    struct handles *all = (struct handles *)orch_call_part(c, &handles_ops);
    if (!all) {
        all = orch_xcalloc(1, sizeof *all);
        all->part.ops = &handles_ops;
        orch_call_add_part(c, &all->part);
    }
    return &all->list;
}

static void note_microvm(struct orch_call *c, const struct orch_vm *vm)
{
    c->isolation = orch_isolation_name(orch_vm_isolation(vm));
    snprintf(c->vm_id, sizeof c->vm_id, "%s", orch_vm_id(vm));
}

/* ---- spawn */

static int push_vm(lua_State *L, struct orch_vm_handle *h)
{
    struct orch_vm_handle **box = lua_newuserdata(L, sizeof *box);
    *box = h;
    h->refs++;
    luaL_getmetatable(L, ORCH_VM_META);
    lua_setmetatable(L, -2);
    return 1;
}

static int spawn_push(lua_State *L, void *ud)
{
    struct orch_vm_handle *h = ud;
    int n = h->vm ? push_vm(L, h) : orch_push_err(L, &h->err);
    orch_vm_handle_unref(h); /* the wait's */
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
        note_microvm(h->call, vm);
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
        orch_vm_handle_close(h, "its task was cancelled");
    orch_vm_handle_unref(h); /* the wait's */
}

const char *orch_bind_image(const struct orch_current *cur)
{
    if (cur->gen->cfg.vm_image)
        return cur->gen->cfg.vm_image;
    cleanup_free char *built = orch_xasprintf("%s/images/debian/manifest", cur->paths->cache);
    return access(built, F_OK) == 0 ? "debian" : "base";
}

/* Lowers and fills what the configuration bounds; a timeout of -1 is none given. */
static int take_defaults(const struct orch_env *env, struct orch_vm_opts *v, struct orch_err *err)
{
    const struct orch_config *c = &env->current->gen->cfg;
    if (v->call && v->memory_bytes > c->vm_memory_bytes)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EINVAL,
                             "memory %llu is over the configured vm.memory (%llu bytes)",
                             (unsigned long long)v->memory_bytes,
                             (unsigned long long)c->vm_memory_bytes);
    if (v->call && v->vcpus > c->vm_vcpus)
        return orch_err_setc(err, ORCH_CLASS_LIMIT, EINVAL,
                             "vcpus %d is over the configured vm.vcpus (%d)", v->vcpus,
                             c->vm_vcpus);
    if (!v->memory_bytes)
        v->memory_bytes = c->vm_memory_bytes;
    if (!v->vcpus)
        v->vcpus = c->vm_vcpus;
    if (v->timeout_ms < 0) { /* a call's microVM ends with the call's time */
        v->timeout_ms = v->call ? 0 : c->vm_timeout_ms;
        v->timeout_name = "vm.timeout";
    }
    if (!v->image)
        v->image = orch_bind_image(env->current);
    if (!v->backend)
        v->backend = c->vm_backend;
    v->accel = c->vm_accel;
    return 0;
}

int orch_vm_spawn_wait(lua_State *L, int idx, struct orch_call *call)
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
        const char *keep = orch_opt_string(&o, "keep", NULL),
                   *workspace = orch_opt_string(&o, "workspace", "none");
        if (keep)
            return luaL_error(L, "ctx:vm: keep = \"%s\" is not available yet", keep);
        if (strcmp(workspace, "none") != 0)
            return luaL_error(L,
                              "ctx:vm: workspace = \"%s\" is not available yet; only \"none\" is",
                              workspace);
        vo.network = orch_call_network(call);
        vo.call = call->id;
    } else {
        vo.network = orch_opt_string(&o, "network", "none");
        vo.backend = orch_opt_string(&o, "backend", NULL);
        vo.name = orch_opt_string(&o, "name", NULL);
        if (orch_opt_string(&o, "from", NULL))
            return luaL_error(L, "orch.vm.spawn: from is not available yet");
    }
    orch_opts_done(&o);
    struct orch_vms *vms = env->vms(env->ud, &err);
    if (!vms || take_defaults(env, &vo, &err) < 0)
        return orch_push_err(L, &err);
    if (strcmp(vo.network, "none") != 0 &&
        !(vo.rules = orch_generation_rules(env->current->gen, vo.network, &err)))
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
    h->list = call ? handles_of(call) : &env->vm_handles;
    h->next = *h->list;
    *h->list = h;
    h->waiting = true;
    if (call)
        handle_hold(h, true);
    return orch_task_wait(L, spawn_cancel, h, &h->wait);
}

/* ---- the object */

struct orch_vm_handle *orch_vm_handle_at(lua_State *L)
{
    struct orch_vm_handle **box = luaL_checkudata(L, 1, ORCH_VM_META);
    return *box;
}

/* The one way to a handle's microVM, right before it is used: its channel, or NULL with nil,
 * message, code pushed when it is over, whether the handle was told so already or not. */
struct orch_channel *orch_vm_handle_channel(lua_State *L, const struct orch_vm_handle *h,
                                            int *n_results)
{
    struct orch_err err = h->err;
    struct orch_channel *c = h->vm ? orch_vm_channel(h->vm, &err) : NULL;
    if (!c)
        *n_results = orch_push_err(L, &err);
    return c;
}
