/* orch.mcp of scripts: serve, changed; connect is lua/mcp/client.lua. */
#include "bind.h"

#include "../mcp/session.h"

#include <errno.h>
#include <string.h>

enum { ARGV_MAX = 4096 };

/* ---- serve */

struct serving {
    struct orch_env *env;
    struct orch_wait wait;
    int status;
    char why[512];
};

static int serve_push(lua_State *L, void *ud)
{
    struct serving *s = ud;
    lua_pushinteger(L, s->status);
    if (s->why[0])
        lua_pushstring(L, s->why);
    else
        lua_pushnil(L);
    free(s);
    return 2;
}

static void serve_done(void *ud, int status, const char *why)
{
    struct serving *s = ud;
    s->status = status;
    if (why)
        strncat(s->why, why, sizeof s->why - 1);
    orch_task_ready(s->wait, serve_push, s);
}

static void serve_cancel(void *ud)
{
    struct serving *s = ud;
    s->env->serve_stop(s->env->ud);
    free(s);
}

/* What the script serves itself, if anything: leaves tools and handler on the stack. */
static void take_offer(lua_State *L, struct orch_opts *o, struct orch_serve_opts *so)
{
    static const struct {
        const char *key;
        int type;
    } keys[] = { { "tools", LUA_TTABLE },
                 { "resources", LUA_TTABLE },
                 { "resource_templates", LUA_TTABLE },
                 { "prompts", LUA_TTABLE },
                 { "complete", LUA_TFUNCTION } };
    bool any = false;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(keys); i++)
        any = orch_opt_push(o, keys[i].key, keys[i].type) || any;
    orch_opts_done(o);
    if (!any)
        return;
    lua_getglobal(L, "require");
    lua_pushliteral(L, "policy.offer");
    lua_call(L, 1, 1);
    lua_pushvalue(L, 1);
    lua_call(L, 1, 5);
    so->features = (lua_toboolean(L, -3) ? ORCH_MCP_RESOURCES : 0) |
                   (lua_toboolean(L, -2) ? ORCH_MCP_PROMPTS : 0) |
                   (lua_toboolean(L, -1) ? ORCH_MCP_COMPLETIONS : 0);
    lua_pop(L, 3);
    so->L = L;
    so->tools = lua_gettop(L) - 1;
    so->handle = lua_gettop(L);
}

static int l_serve(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, 1, "orch.mcp.serve");
    struct orch_serve_opts so = { .transport = orch_opt_string(&o, "transport", "stdio"),
                                  .as = orch_opt_string(&o, "as", "cmd"),
                                  .protect = orch_opt_bool(&o, "protect", true),
                                  .start_ms = orch_opt_duration_ms(&o, "start_timeout",
                                                                   5 * 60 * 1000),
                                  .timeout_ms = orch_opt_duration_ms(&o, "timeout", 60 * 60 * 1000),
                                  .listen = orch_opt_string(&o, "listen", NULL),
                                  .token = orch_opt_string(&o, "token", NULL),
                                  .name = orch_opt_string(&o, "name", NULL),
                                  .version = orch_opt_string(&o, "version", NULL),
                                  .instructions = orch_opt_string(&o, "instructions", NULL) };
    if (orch_opt_push(&o, "command", LUA_TTABLE))
        so.command = orch_check_strings(L, -1, "command", ARGV_MAX);
    take_offer(L, &o, &so);
    struct serving *s = orch_xcalloc(1, sizeof *s);
    struct orch_err err = { 0 };
    s->env = env;
    so.done = serve_done;
    so.ud = s;
    if (env->serve(env->ud, &so, &err) < 0) {
        free(s);
        return orch_push_err(L, &err);
    }
    return orch_task_wait(L, serve_cancel, s, &s->wait);
}

/* orch.mcp.changed{ tools =, prompts =, resources = true, uri = "…" }: clients are told. */
static int l_changed(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, 1, "orch.mcp.changed");
    unsigned what = (orch_opt_bool(&o, "tools", false) ? ORCH_MCP_TOOLS_CHANGED : 0u) |
                    (orch_opt_bool(&o, "prompts", false) ? ORCH_MCP_PROMPTS_CHANGED : 0u) |
                    (orch_opt_bool(&o, "resources", false) ? ORCH_MCP_RESOURCES_CHANGED : 0u);
    const char *uri = orch_opt_string(&o, "uri", NULL);
    orch_opts_done(&o);
    if (what)
        env->changed(env->ud, what, (struct orch_slice){ 0 });
    if (uri)
        env->changed(env->ud, 0, orch_slice_str(uri));
    return 0;
}

int orch_luaopen_mcp(lua_State *L, int t)
{
    lua_newtable(L);
    orch_api_set(L, "orch.mcp.",
                 (struct orch_api[]){ { "serve", l_serve, ORCH_CTX_SCRIPT },
                                      { "changed", l_changed, ORCH_CTX_SCRIPT },
                                      { 0 } });
    orch_api_lua(L, "orch.mcp.", "connect", "mcp.client", "connect");
    lua_setfield(L, t, "mcp");
    return 0;
}
