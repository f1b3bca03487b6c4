/* orch.mcp: serve (scripts), connect (scripts; stdio servers of the legacy era). */
#include "bind.h"
#include "lua_json.h"

#include "../mcp/client.h"
#include "../mcp/session.h"

#include <errno.h>
#include <string.h>

enum { ARGV_MAX = 4096, CALL_TIMEOUT_MS = 60000, CLOSE_GRACE_MS = 500 };

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
    } keys[] = { { "tools", LUA_TTABLE }, { "resources", LUA_TTABLE }, { "resource_templates", LUA_TTABLE }, { "prompts", LUA_TTABLE },
                 { "complete", LUA_TFUNCTION } };
    bool any = false;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(keys); i++)
        any = orch_opt_push(o, keys[i].key, keys[i].type) || any;
    orch_opts_done(o);
    if (!any)
        return;
    lua_getglobal(L, "require");
    lua_pushliteral(L, "serve");
    lua_call(L, 1, 1);
    lua_pushvalue(L, 1);
    lua_call(L, 1, 5);
    so->features = (lua_toboolean(L, -3) ? ORCH_MCP_RESOURCES : 0) | (lua_toboolean(L, -2) ? ORCH_MCP_PROMPTS : 0) |
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

/* ---- connect */

#define CLIENT_META "orch.mcp.client"

struct client {
    struct orch_mcp_client *c; /* NULL once closed */
    struct orch_wait wait;     /* of connect */
    bool waiting;
    int self_ref;
    lua_State *main;
    struct orch_err err;
};

static struct client *check_client(lua_State *L)
{
    struct client **box = luaL_checkudata(L, 1, CLIENT_META);
    if (!*box || !(*box)->c)
        luaL_error(L, "the MCP client is closed");
    return *box;
}

static void client_close(struct client *k)
{
    struct orch_mcp_client *c = k->c;
    k->c = NULL;
    orch_mcp_client_free(c, CLOSE_GRACE_MS);
}

static int client_gc(lua_State *L)
{
    struct client **box = lua_touserdata(L, 1);
    if (*box) {
        client_close(*box);
        free(*box);
        *box = NULL;
    }
    return 0;
}

static int l_client_close(lua_State *L)
{
    struct client **box = luaL_checkudata(L, 1, CLIENT_META);
    if (*box && (*box)->c)
        client_close(*box);
    return 0;
}

static int connect_push(lua_State *L, void *ud)
{
    struct client *k = ud;
    lua_rawgeti(L, LUA_REGISTRYINDEX, k->self_ref);
    luaL_unref(L, LUA_REGISTRYINDEX, k->self_ref);
    k->self_ref = LUA_NOREF;
    if (!k->err.cls)
        return 1;
    lua_pop(L, 1);
    client_close(k);
    return orch_push_err(L, &k->err);
}

static void connect_ready(void *ud, const struct orch_err *err)
{
    struct client *k = ud;
    if (err)
        k->err = *err;
    if (k->waiting) {
        k->waiting = false;
        orch_task_ready(k->wait, connect_push, k);
    }
}

static void connect_cancel(void *ud)
{
    struct client *k = ud;
    k->waiting = false;
    luaL_unref(k->main, LUA_REGISTRYINDEX, k->self_ref);
    k->self_ref = LUA_NOREF;
}

static int l_connect(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_opts o = orch_opts_begin(L, 1, "orch.mcp.connect");
    if (orch_opt_string(&o, "url", NULL))
        return luaL_error(L, "orch.mcp.connect: url is not available yet; give a command");
    const char *cwd = orch_opt_string(&o, "cwd", NULL);
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", 10000);
    if (strcmp(orch_opt_string(&o, "sandbox", "host"), "host") != 0)
        return luaL_error(L, "orch.mcp.connect: sandbox \"vm\" is not available yet");
    const char **envp = orch_opt_push(&o, "env", LUA_TTABLE) ? orch_check_strings(L, -1, "env", ARGV_MAX) : NULL;
    if (!orch_opt_push(&o, "command", LUA_TTABLE))
        return luaL_error(L, "orch.mcp.connect: command is missing (a list: program and arguments)");
    const char **argv = orch_check_strings(L, -1, "command", ARGV_MAX);
    orch_opts_done(&o);
    if (!argv[0])
        return luaL_error(L, "orch.mcp.connect: command is empty");

    struct client **box = lua_newuserdata(L, sizeof *box);
    *box = NULL;
    luaL_getmetatable(L, CLIENT_META);
    lua_setmetatable(L, -2);
    struct client *k = *box = orch_xcalloc(1, sizeof *k);
    k->main = orch_state_lua(orch_state_of(L));
    k->self_ref = LUA_NOREF;
    k->c = orch_mcp_client_new(env->loop,
                               &(struct orch_mcp_client_opts){ .name = argv[0],
                                                               .argv = argv,
                                                               .env = envp ? envp : (const char *const *)environ,
                                                               .cwd = cwd,
                                                               .start_timeout_ms = timeout,
                                                               .ready = connect_ready,
                                                               .ud = k },
                               &k->err);
    if (!k->c)
        return orch_push_err(L, &k->err);
    k->self_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    k->waiting = true;
    return orch_task_wait(L, connect_cancel, k, &k->wait);
}

/* ---- requests */

struct request {
    struct orch_wait wait;
    struct orch_mcp_client_call *call;
    struct orch_buf result;
    struct orch_err err;
    char member[16]; /* of the result to return; empty: all of it */
};

static void request_free(struct request *r)
{
    orch_buf_free(&r->result);
    free(r);
}

static int request_push(lua_State *L, void *ud)
{
    struct request *r = ud;
    if (r->err.cls) {
        int n = orch_push_err(L, &r->err);
        request_free(r);
        return n;
    }
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, (struct orch_slice){ r->result.p, r->result.n }, &(struct orch_json_limits){ 0 }, &fault) == 0)
        orch_lua_push_json(L, &d, 0, 0);
    else
        lua_newtable(L);
    if (r->member[0])
        lua_getfield(L, -1, r->member);
    request_free(r);
    return 1;
}

static void request_done(void *ud, struct orch_slice result, const struct orch_err *err)
{
    struct request *r = ud;
    r->call = NULL;
    if (err)
        r->err = *err;
    else
        orch_buf_slice(&r->result, result);
    orch_task_ready(r->wait, request_push, r);
}

static void request_cancel(void *ud)
{
    struct request *r = ud;
    if (r->call)
        orch_mcp_client_cancel(r->call, "cancelled");
    request_free(r);
}

static int start_request(lua_State *L, struct client *k, struct orch_mcp_client_request q, const char *member)
{
    struct request *r = orch_xcalloc(1, sizeof *r);
    strncat(r->member, member, sizeof r->member - 1);
    q.done = request_done;
    q.ud = r;
    r->call = orch_mcp_client_call(k->c, &q, &r->err);
    if (!r->call) {
        struct orch_err err = r->err;
        request_free(r);
        return orch_push_err(L, &err);
    }
    return orch_task_wait(L, request_cancel, r, &r->wait);
}

static int l_list_tools(lua_State *L)
{
    return start_request(L, check_client(L), (struct orch_mcp_client_request){ .method = "tools/list", .timeout_ms = CALL_TIMEOUT_MS }, "tools");
}

static int l_ping(lua_State *L)
{
    return start_request(L, check_client(L), (struct orch_mcp_client_request){ .method = "ping", .timeout_ms = CALL_TIMEOUT_MS }, "");
}

static int l_call_tool(lua_State *L)
{
    struct client *k = check_client(L);
    const char *name = luaL_checkstring(L, 2);
    struct orch_opts o = orch_opts_begin(L, 4, "call_tool");
    int64_t timeout = orch_opt_duration_ms(&o, "timeout", CALL_TIMEOUT_MS);
    orch_opts_done(&o);
    cleanup_buf struct orch_buf args = { 0 };
    char why[256];
    if (lua_isnoneornil(L, 3))
        orch_buf_str(&args, "{}");
    else if (orch_lua_encode_json(L, 3, &args, why, sizeof why) < 0)
        return luaL_error(L, "call_tool: arguments: %s", why);
    return start_request(L, k, (struct orch_mcp_client_request){ .tool = name, .args = { args.p, args.n }, .timeout_ms = timeout }, "");
}

static int client_index(lua_State *L)
{
    struct client **box = luaL_checkudata(L, 1, CLIENT_META);
    static const char *const members[][2] = { { "server_info", "serverInfo" }, { "capabilities", "capabilities" },
                                              { "protocol_version", "protocolVersion" } };
    const char *key = luaL_checkstring(L, 2);
    lua_pushvalue(L, 2);
    lua_rawget(L, lua_upvalueindex(1));
    if (!lua_isnil(L, -1))
        return 1;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(members); i++) {
        if (strcmp(key, members[i][0]) != 0 || !*box || !(*box)->c)
            continue;
        cleanup_json struct orch_json_doc d = { 0 };
        struct orch_json_fault fault;
        if (orch_json_scan(&d, orch_mcp_client_server((*box)->c), &(struct orch_json_limits){ 0 }, &fault) < 0)
            return 0;
        uint32_t tok = orch_json_get(&d, 0, members[i][1]);
        if (!tok)
            return 0;
        orch_lua_push_json(L, &d, tok, 0);
        return 1;
    }
    return 0;
}

int orch_luaopen_mcp(lua_State *L, int t)
{
    if (orch_state_context(L) == ORCH_CTX_SCRIPT && luaL_newmetatable(L, CLIENT_META)) {
        lua_newtable(L);
        orch_api_set(L, "client:",
                     (struct orch_api[]){ { "list_tools", l_list_tools, ORCH_CTX_SCRIPT },
                                          { "call_tool", l_call_tool, ORCH_CTX_SCRIPT },
                                          { "ping", l_ping, ORCH_CTX_SCRIPT },
                                          { "close", l_client_close, ORCH_CTX_SCRIPT },
                                          { "list_resources", NULL, 0 },
                                          { "read_resource", NULL, 0 },
                                          { "list_prompts", NULL, 0 },
                                          { "get_prompt", NULL, 0 },
                                          { 0 } });
        lua_pushcclosure(L, client_index, 1);
        lua_setfield(L, -2, "__index");
        lua_pushcfunction(L, client_gc);
        lua_setfield(L, -2, "__gc");
        lua_pushboolean(L, 0);
        lua_setfield(L, -2, "__metatable");
        lua_pop(L, 1);
    }
    lua_newtable(L);
    orch_api_set(L, "orch.mcp.",
                 (struct orch_api[]){ { "serve", l_serve, ORCH_CTX_SCRIPT }, { "changed", l_changed, ORCH_CTX_SCRIPT }, { "connect", l_connect, ORCH_CTX_SCRIPT }, { 0 } });
    lua_setfield(L, t, "mcp");
    return 0;
}
