/* Trusted scripts: their state, and what one serves itself. */
#include "host.h"

#include "../base/log.h"

#include <errno.h>
#include <lauxlib.h>
#include <string.h>

struct running {
    bool done;
    int status;
    struct orch_err err;
};

static void script_done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct running *r = ud;
    r->done = true;
    if (err)
        r->err = *err;
    else if (nres > 0 && lua_type(L, -nres) == LUA_TNUMBER)
        r->status = (int)lua_tonumber(L, -nres);
}

static struct orch_state *script_state(struct orch *o, const char *script_dir, struct orch_err *err)
{
    static const luaL_Reg private[] = { { "orch.internal", orch_luaopen_internal },
                                        { "orch.transport", orch_luaopen_transport },
                                        { "orch.crypto", orch_luaopen_crypto },
                                        { "orch.client", orch_luaopen_client },
                                        { NULL, NULL } };
    if (o->script.state)
        return o->script.state;
    cleanup_free char *lua_dir = orch_xasprintf("%s/lua", o->paths.share);
    o->script.state = orch_state_new(&(struct orch_state_opts){ .ctx = ORCH_CTX_SCRIPT,
                                                                .lua_dir = lua_dir,
                                                                .script_dir = script_dir,
                                                                .host = &o->env },
                                     err);
    if (!o->script.state)
        return NULL;
    lua_State *L = orch_state_lua(o->script.state);
    orch_luaopen_orch(L);
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "preload");
    luaL_setfuncs(L, private, 0);
    lua_settop(L, 0);
    return o->script.state;
}

int orch_host_run(struct orch *o, const char *name, struct orch_slice text, int argc,
                  const char *const *argv, struct orch_err *err)
{
    cleanup_free char *dir = strchr(name, '/')
                                 ? orch_xstrndup(name, (size_t)(strrchr(name, '/') - name))
                                 : orch_xstrdup(".");
    struct orch_state *s = script_state(o, dir, err);
    if (!s)
        return -1;
    lua_State *L = orch_state_lua(s);
    if (!o->script.file)
        o->script.file = realpath(name, NULL); /* NULL: it is no file */
    if (text.n > 2 && text.p[0] == '#') {      /* keep the line's number */
        const char *nl = memchr(text.p, '\n', text.n);
        size_t skip = nl ? (size_t)(nl - text.p) : text.n;
        text.p += skip;
        text.n -= skip;
    }
    lua_createtable(L, argc, 1);
    lua_pushstring(L, name);
    lua_rawseti(L, -2, 0);
    for (int i = 0; i < argc; i++) {
        lua_pushstring(L, argv[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setglobal(L, "arg");
    if (orch_state_load(s, name, text, err) < 0) {
        err->cls = ORCH_CLASS_CONFIG;
        return -1;
    }
    /* A task takes few arguments; a script's may be many. */
    if (luaL_loadstring(L, "local script, arg = ... return script(unpack(arg))"))
        return orch_err_set(err, ENOMEM, "%s", lua_tostring(L, -1)), -1;
    lua_insert(L, -2);
    lua_getglobal(L, "arg");
    struct running r = { 0 };
    o->script.task = orch_task_start(o->loop, s, 2, script_done, &r);
    while (!r.done)
        orch_loop_step(o->loop, -1);
    o->script.task = NULL;
    if (r.err.cls) {
        *err = r.err;
        return -1;
    }
    return r.status;
}

/* ---- what it serves */

static void name_server(struct orch_serving *v, const struct orch_serve_opts *so)
{
    cleanup_buf struct orch_buf b = { 0 };
    if (so->instructions && !v->instructions)
        v->instructions = orch_xstrdup(so->instructions);
    if ((!so->name && !so->version) || v->server_info)
        return;
    orch_buf_str(&b, "{\"name\":");
    orch_json_quote(&b, orch_slice_str(so->name ? so->name : "orch"));
    orch_buf_str(&b, ",\"version\":");
    orch_json_quote(&b, orch_slice_str(so->version ? so->version : ORCH_VERSION));
    orch_buf_char(&b, '}');
    v->server_info = orch_steal_ptr(&b.p);
}

static void keep_tool(void *ud, struct orch_tool *t)
{
    orch_host_keep_tool(ud, t);
}

int orch_script_offer(struct orch *o, const struct orch_serve_opts *so, struct orch_err *err)
{
    struct orch_offer *offer = &o->calls.offer;
    name_server(&o->serving, so);
    if (!so->tools)
        return 0;
    if (offer->state)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EBUSY,
                             "a script serves one set of tools, resources and prompts");
    offer->state = o->script.state;
    offer->features = so->features;
    lua_pushvalue(so->L, so->handle);
    offer->handle_ref = luaL_ref(so->L, LUA_REGISTRYINDEX);
    o->tools.source.alone = true;
    return orch_tools_read(&o->current, offer->state, so->L, so->tools, "orch.mcp.serve: tools",
                           keep_tool, o, err);
}
