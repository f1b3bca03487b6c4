/* orch.vm and orch.image; the vm object. */
#include "vm_handle.h"

#include <string.h>

static int l_spawn(lua_State *L)
{
    return orch_vm_spawn_wait(L, 1, NULL);
}

/* ---- the object */

static int vm_gc(lua_State *L)
{
    struct orch_vm_handle **box = lua_touserdata(L, 1);
    if (*box)
        orch_vm_handle_unref(*box); /* its owner ends the microVM, not the collector */
    *box = NULL;
    return 0;
}

static int vm_tostring(lua_State *L)
{
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    lua_pushfstring(L, "orch.vm(%s%s)", h->id, h->vm ? "" : ", closed");
    return 1;
}

static int l_close(lua_State *L)
{
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    if (h->vm)
        orch_vm_handle_close(h, "it was closed"); /* the object keeps its own reference */
    return 0;
}

static int vm_index(lua_State *L)
{
    struct orch_vm_handle *h = orch_vm_handle_at(L);
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

/* ---- the rest */

static int l_logs(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    if (!orch_vm_handle_channel(L, h, &n_results))
        return n_results;
    struct orch_slice tail = orch_vm_log_tail(h->vm);
    lua_pushlstring(L, tail.p ? tail.p : "", tail.n);
    return 1;
}

static int l_network(lua_State *L)
{
    int n_results;
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    if (!orch_vm_handle_channel(L, h, &n_results))
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
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    if (!orch_vm_handle_channel(L, h, &n_results))
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
    struct orch_vm_handle *h = orch_vm_handle_at(L);
    if (!orch_vm_handle_channel(L, h, &n_results))
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
    if (orch_state_context(L) != ORCH_CTX_POLICY && luaL_newmetatable(L, ORCH_VM_META)) {
        lua_newtable(L);
        orch_api_set(L, "vm:",
                     (struct orch_api[]){ { "exec", orch_vm_handle_exec, TS },
                                          { "write_file", orch_vm_handle_write_file, TS },
                                          { "read_file", orch_vm_handle_read_file, TS },
                                          { "list_dir", orch_vm_handle_list_dir, TS },
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
    orch_api_set(L, "orch.vm.",
                 (struct orch_api[]){
                     { "spawn", l_spawn, S }, { "list", l_list, S }, { "pool", NULL, 0 }, { 0 } });
    lua_setfield(L, t, "vm");
    lua_newtable(L);
    orch_api_set(L, "orch.image.",
                 (struct orch_api[]){ { "build", NULL, 0 }, { "list", NULL, 0 }, { 0 } });
    lua_setfield(L, t, "image");
    return 0;
}
