/* Resources and prompts: one file each in lua/resources and lua/prompts beside the
 * configuration. */
#include "policy_int.h"

#include "../mcp/session.h"

#include <errno.h>
#include <lauxlib.h>
#include <string.h>

struct offer_dir {
    const char *name;
    int n;
    struct orch_sha256_ctx *sum;
};

/* The options for lua/policy/offer.lua are below the file's table: options[name][n],
 * options.where[name][n]. */
static int take_offer_file(struct orch_loading *l, void *ud, const char *path, const char *shown,
                           bool product)
{
    struct offer_dir *dir = ud;
    lua_State *L = orch_state_lua(l->g->tools_state);
    (void)path;
    (void)product;
    const char *name = dir->name;
    if (strcmp(name, "resources") == 0 && lua_istable(L, -1)) {
        lua_getfield(L, -1, "uri_template");
        name = lua_isnil(L, -1) ? name : "resource_templates";
        lua_pop(L, 1);
    }
    lua_getfield(L, -2, name);
    int n = (int)lua_objlen(L, -1) + 1;
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, n);
    lua_getfield(L, -3, "where");
    lua_getfield(L, -1, name);
    lua_pushstring(L, shown);
    lua_rawseti(L, -2, n);
    lua_pop(L, 4);
    orch_sha256_update(dir->sum, l->sha, 64);
    dir->n++;
    return 0;
}

int orch_load_offer(struct orch_loading *l)
{
    static const char *const lists[] = { "resources", "resource_templates", "prompts" };
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    struct orch_sha256_ctx sum;
    struct orch_err err = { 0 };
    orch_sha256_init(&sum);
    struct offer_dir dirs[] = { { "resources", 0, &sum }, { "prompts", 0, &sum } };
    lua_newtable(L);
    lua_newtable(L);
    for (size_t i = 0; i < ORCH_ARRAY_LEN(lists); i++) {
        lua_newtable(L);
        lua_setfield(L, -2, lists[i]);
        lua_newtable(L);
        lua_setfield(L, -3, lists[i]);
    }
    lua_setfield(L, -2, "where");
    int r = 0;
    for (size_t i = 0; i < ORCH_ARRAY_LEN(dirs); i++) {
        cleanup_free char *path = orch_xasprintf("%s/lua/%s", l->base, dirs[i].name);
        if (orch_hold_dir(l->cur, path) != -ENOENT &&
            orch_load_dir(l, path, dirs[i].name, false, take_offer_file, &dirs[i]) < 0)
            r = -1;
    }
    orch_sha256_final(&sum, g->offer_digest);
    if (r < 0 || !(dirs[0].n + dirs[1].n)) {
        lua_pop(L, 1);
        return r;
    }
    if (orch_load_run_product(l, g->tools_state, "policy/offer.lua", 0) < 0)
        return -1;
    lua_insert(L, -2);
    if (orch_state_pcall(g->tools_state, 1, 2, &err) <
        0) { /* tools, which it has none of here, and the handler */
        char *end = strchr(err.msg, '\n');
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%.*s",
                       end ? (int)(end - err.msg) : (int)strlen(err.msg), err.msg);
        return -1;
    }
    g->handle_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_pop(L, 1);
    g->features = (dirs[0].n ? ORCH_MCP_RESOURCES : 0u) | (dirs[1].n ? ORCH_MCP_PROMPTS : 0u);
    return 0;
}
