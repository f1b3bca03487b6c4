#include "bind.h"

#include "../call/call.h"

struct orch_env *orch_env_of(lua_State *L)
{
    return orch_state_host(L);
}

struct orch_call *orch_ctx_call(lua_State *L)
{
    return orch_check_call(L, orch_env_of(L)->calls);
}

static int wrong_context(lua_State *L)
{
    const char *who = lua_tostring(L, lua_upvalueindex(1));
    int contexts = (int)lua_tointeger(L, lua_upvalueindex(2));
    if (!contexts)
        return luaL_error(L, "%s is not available yet", who);
    if (contexts == ORCH_CTX_SCRIPT)
        return luaL_error(L, "%s is for trusted scripts only", who);
    return luaL_error(L, "%s is not for policies; tools and trusted scripts only", who);
}

void orch_api_set(lua_State *L, const char *prefix, const struct orch_api *api)
{
    int here = (int)orch_state_context(L);
    for (; api->name; api++) {
        if (api->fn && (api->contexts & here)) {
            lua_pushcfunction(L, api->fn);
        } else {
            lua_pushfstring(L, "%s%s", prefix, api->name);
            lua_pushinteger(L, api->fn ? api->contexts : 0);
            lua_pushcclosure(L, wrong_context, 2);
        }
        lua_setfield(L, -2, api->name);
    }
}

/* A function that waits for several things is Lua's: C cannot go on after a wait. Loaded at its
 * first use. */
void orch_api_lua(lua_State *L, const char *prefix, const char *name, const char *module,
                  const char *function)
{
    if (orch_state_context(L) != ORCH_CTX_SCRIPT) {
        orch_api_set(L, prefix,
                     (struct orch_api[]){ { name, wrong_context, ORCH_CTX_SCRIPT }, { 0 } });
        return;
    }
    if (luaL_loadstring(L, "local require, module, name = ... return function(...) return "
                           "require(module)[name](...) end"))
        lua_error(L);
    lua_getglobal(L, "require");
    lua_pushstring(L, module);
    lua_pushstring(L, function);
    lua_call(L, 3, 1);
    lua_setfield(L, -2, name);
}

void orch_class_new(lua_State *L, const char *name, const luaL_Reg *methods, lua_CFunction gc)
{
    luaL_newmetatable(L, name);
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_setfield(L, -2, "__index");
    lua_pushcfunction(L, gc);
    lua_setfield(L, -2, "__gc");
    lua_pushboolean(L, 0);
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
}
