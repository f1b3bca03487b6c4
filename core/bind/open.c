/* Opens the whole API for a state: the one file that knows every module. */
#include "bind.h"

#include "../call/call.h"
#include "../script/jsonlib.h"

int orch_luaopen_orch(lua_State *L)
{
    lua_newtable(L);
    int t = lua_gettop(L);
    orch_luaopen_json(L);
    lua_setfield(L, t, "json");
    orch_luaopen_sys(L, t);
    orch_luaopen_task(L); /* { spawn, sleep } */
    lua_getfield(L, -1, "sleep");
    lua_setfield(L, t, "sleep");
    lua_pushnil(L);
    lua_setfield(L, -2, "sleep");
    lua_setfield(L, t, "task");
    orch_luaopen_vm(L, t);
    orch_luaopen_mcp(L, t);
    if (orch_state_context(L) != ORCH_CTX_POLICY) {
        orch_luaopen_ctx(L);
        lua_pop(L, 1);
    }
    lua_newtable(L);
    orch_api_lua(L, "orch.http.", "request", "http", "request");
    lua_setfield(L, t, "http");
    orch_luaopen_firewall(L, t);
    orch_api_set(L, "orch.", (struct orch_api[]){ { "on", NULL, 0 }, { 0 } });
    if (orch_state_context(L) == ORCH_CTX_SCRIPT) {
        lua_getfield(L, LUA_REGISTRYINDEX, "_LOADED");
        lua_pushvalue(L, t);
        lua_setfield(L, -2, "orch");
        lua_pop(L, 1);
    } else {
        orch_state_freeze(L, t);
    }
    lua_pushstring(L, "orch");
    lua_pushvalue(L, t);
    lua_rawset(L, LUA_GLOBALSINDEX);
    return 1;
}

void orch_bind_open(lua_State *L)
{
    orch_luaopen_orch(L);
    lua_pop(L, 1);
}

/* module[function], of a module that is loaded now: upvalues are what runs it, and the function's
 * name. */
static int load_method(lua_State *L)
{
    lua_pushvalue(L, lua_upvalueindex(1));
    orch_luaopen_call_transport(L);
    lua_call(L, 1, 1);
    lua_pushvalue(L, lua_upvalueindex(2));
    lua_rawget(L, -2);
    return 1;
}

int orch_bind_open_tools(struct orch_loading *l, struct orch_state *s)
{
    static const char *const methods[][3] = { { "http", "http.lua", "fetch" },
                                              { "output", "output.lua", "result" } };
    lua_State *L = orch_state_lua(s);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(methods); i++) {
        if (orch_load_product_later(l, s, methods[i][1]) < 0)
            return -1;
        lua_pushstring(L, methods[i][2]);
        lua_pushcclosure(L, load_method, 2);
        orch_ctx_set_lazy(L, methods[i][0]);
    }
    return 0;
}
