/* Tools: one file each in the configuration's folders, and what sources give. */
#include "policy_int.h"

#include "../script/jsonlib.h"

#include <errno.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>

static int by_wire_name(const void *a, const void *b)
{
    return strcmp((*(struct orch_tool *const *)a)->wire_name,
                  (*(struct orch_tool *const *)b)->wire_name);
}

struct orch_tool *orch_generation_tool(const struct orch_generation *g, struct orch_slice name)
{
    size_t low = 0, high = g->n_tools;
    while (low < high) {
        size_t mid = (low + high) / 2;
        const char *w = g->tools[mid]->wire_name;
        int c = strncmp(name.p, w, name.n);
        if (c == 0)
            c = w[name.n] ? -1 : 0;
        if (c == 0)
            return g->tools[mid];
        if (c < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return NULL;
}

void orch_tool_fini(struct orch_tool *t)
{
    free(t->name);
    free(t->wire_name);
    free(t->server);
    free(t->file);
    free(t->limit);
    free(t->definition);
    free(t->input);
    orch_mcp_params_free(&t->headers);
}

int orch_generation_add_tool(struct orch_generation *g, const struct orch_tool *def,
                             struct orch_slice untrusted, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc schema = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&schema, orch_slice_str(def->input),
                       &(struct orch_json_limits){ .bytes = 1 << 20 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s at byte %zu", fault.rule,
                             fault.byte);
    const char *bad_header = NULL;
    struct orch_mcp_param_list headers = { 0 };
    if (strstr(def->input, "\"x-mcp-header\"") &&
        orch_mcp_params_read(&schema, 0, &headers, &bad_header) < 0)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s", bad_header);
    orch_mcp_params_free(&headers);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "add_tool");
    lua_remove(L, -2);
    lua_pushstring(L, def->name);
    lua_pushstring(L, def->server);
    orch_lua_push_json(L, &schema, 0, ORCH_LUA_JSON_KEEP_NULL); /* const: null is a schema too */
    if (untrusted.n)
        lua_pushlstring(L, untrusted.p, untrusted.n);
    else
        lua_pushnil(L);
    int r = orch_state_pcall(g->policy, 4, 2, err);
    if (r < 0)
        return r;
    if (!lua_toboolean(L, -2)) {
        const char *why = lua_tostring(L, -1);
        r = orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s",
                          why ? why : "input schema is wrong");
        lua_pop(L, 2);
        return r;
    }
    if (lua_isstring(L, -1))
        orch_buf_printf(&g->notes, "%s: schema keywords that are not checked: %s\n", def->name,
                        lua_tostring(L, -1));
    lua_pop(L, 2);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "listed");
    lua_remove(L, -2);
    lua_pushstring(L, def->name);
    r = orch_state_pcall(g->policy, 1, 1, err);
    if (r < 0)
        return r;
    struct orch_tool *t = orch_generation_tool(g, orch_slice_str(def->wire_name));
    size_t at = 0;
    while (at < g->n_tools && g->tools[at] != t)
        at++;
    if (t) { /* an own tool of the same name replaces a shipped one */
        t->replaced = g->replaced;
        g->replaced = t;
    } else {
        g->tools = orch_xrealloc(g->tools, ++g->n_tools * sizeof(struct orch_tool *));
    }
    t = g->tools[at] = orch_xmalloc(sizeof *t);
    *t = *def;
    t->name = orch_xstrdup(def->name);
    t->wire_name = orch_xstrdup(def->wire_name);
    t->server = orch_xstrdup(def->server);
    t->file = orch_xstrdup(def->file);
    t->limit = orch_xstrdup(def->limit);
    t->definition = orch_xstrdup(def->definition);
    t->input = orch_xstrdup(def->input);
    t->headers = (struct orch_mcp_param_list){ 0 };
    if (strstr(def->input, "\"x-mcp-header\""))
        orch_mcp_params_read(&schema, 0, &t->headers, &bad_header);
    t->listed = lua_toboolean(L, -1);
    lua_pop(L, 1);
    lua_pushstring(L, t->name);
    t->name_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    qsort(g->tools, g->n_tools, sizeof(struct orch_tool *), by_wire_name);
    return 0;
}

void orch_generation_list(struct orch_generation *g)
{
    g->list.n = 0;
    orch_buf_char(&g->list, '[');
    for (size_t i = 0; i < g->n_tools; i++) {
        if (!g->tools[i]->listed)
            continue;
        if (g->list.n > 1)
            orch_buf_char(&g->list, ',');
        orch_buf_str(&g->list, g->tools[i]->definition);
    }
    orch_buf_char(&g->list, ']');
}

/* JSON with its keys in order, since a Lua table has none: clients keep what they were told by its
 * bytes. */
static char *ordered(const char *json)
{
    cleanup_json struct orch_json_doc d = { 0 };
    cleanup_buf struct orch_buf out = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, orch_slice_str(json), &(struct orch_json_limits){ 0 }, &fault) < 0)
        return orch_xstrdup(json);
    orch_json_canonical(&d, 0, &out);
    return orch_steal_ptr(&out.p);
}

/* dispatch.register(where, table) in the state, with the tool's table on its stack (popped). */
static int read_tool(struct orch_loading *l, struct orch_state *s, int dispatch_ref,
                     const char *shown, struct orch_tool *t)
{
    lua_State *L = orch_state_lua(s);
    struct orch_err err = { 0 };
    lua_rawgeti(L, LUA_REGISTRYINDEX, dispatch_ref);
    lua_getfield(L, -1, "register");
    lua_remove(L, -2);
    lua_pushstring(L, shown);
    lua_pushvalue(L, -3);
    lua_remove(L, -4);
    if (orch_state_pcall(s, 2, 7, &err) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s", err.msg);
        return -1;
    }
    if (lua_isnil(L, -7)) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s", lua_tostring(L, -6));
        lua_pop(L, 7);
        return -1;
    }
    int task = (int)lua_tointeger(L, -1);
    lua_pop(L, 1);
    *t = (struct orch_tool){ .state = s,
                             .backend = l->cur->ops->lua_tools,
                             .task = task,
                             .timeout_ms = (int64_t)lua_tonumber(L, -2) };
    if (lua_isnil(L, -1)) {
        t->output_ref = LUA_NOREF;
        lua_pop(L, 1);
    } else {
        t->output_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    }
    lua_pop(L, 1); /* name, run, definition, input */
    lua_pushvalue(L, -3);
    t->run_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    t->name = orch_xstrdup(lua_tostring(L, -4));
    t->wire_name = orch_xstrdup(t->name);
    t->server = orch_xstrdup("local");
    t->limit = t->timeout_ms ? orch_xasprintf("timeout of %s", shown) : NULL;
    t->definition = ordered(lua_tostring(L, -2));
    t->input = orch_xstrdup(lua_tostring(L, -1));
    lua_pop(L, 4);
    return 0;
}

static int register_tool(struct orch_loading *l, void *ud, const char *path, const char *shown,
                         bool shipped)
{
    int dispatch_ref = *(const int *)ud;
    struct orch_generation *g = l->g;
    struct orch_err err = { 0 };
    struct orch_tool t;
    if (read_tool(l, g->tools_state, dispatch_ref, shown, &t) < 0)
        return -1;
    t.shipped = shipped;
    t.file = orch_xstrdup(path);
    const struct orch_tool *same = orch_generation_tool(g, orch_slice_str(t.wire_name));
    int r;
    if (same && !same->shipped)
        r = orch_err_set(&err, EEXIST, "the name %s is taken by %s", t.name,
                         orch_load_display(l, same->file));
    else
        r = orch_generation_add_tool(g, &t, (struct orch_slice){ 0 }, &err);
    orch_tool_fini(&t);
    if (r < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s%s", shown,
                       r == -EEXIST ? "" : "input: ", err.msg);
    return r;
}

/* The schema module of the tool state: few tools have an output schema, and compiling it costs a
 * fifth of the start, so it is loaded when the first one asks. */
static int l_schema_module(lua_State *L)
{
    struct orch_loading *l = lua_touserdata(L, lua_upvalueindex(1));
    lua_getfield(L, LUA_REGISTRYINDEX, "orch.schema");
    if (!lua_isnil(L, -1))
        return 1;
    if (orch_load_push_schema(l, orch_state_of(L)) < 0)
        return luaL_error(L, "the schema module cannot be loaded");
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, "orch.schema");
    return 1;
}

/* Loads lua/policy/tools.lua into the state; its reference, or -1. */
static int load_dispatch(struct orch_loading *l, struct orch_state *s)
{
    lua_State *L = orch_state_lua(s);
    orch_load_push_deps(L);
    lua_pushlightuserdata(L, l);
    lua_pushcclosure(L, l_schema_module, 1);
    lua_setfield(L, -2, "schema"); /* called while loading only: l is gone afterwards */
    return orch_load_run_product(l, s, "policy/tools.lua", 1) < 0 ? -1
                                                                  : luaL_ref(L, LUA_REGISTRYINDEX);
}

static int load_folders(struct orch_loading *l)
{
    struct orch_generation *g = l->g;
    if (l->cur->ops->open_tools(l, g->tools_state) < 0)
        return -1;
    int dispatch_ref = load_dispatch(l, g->tools_state);
    if (dispatch_ref < 0)
        return -1;
    cleanup_free char *shipped = orch_xasprintf("%s/lua/tools", l->cur->paths->share);
    int r = orch_load_dir(l, shipped, "tools", true, register_tool, &dispatch_ref);
    for (char **dir = g->cfg.tools; *dir; dir++)
        if (strcmp(*dir, shipped) != 0 &&
            orch_load_dir(l, *dir, "tools", false, register_tool, &dispatch_ref) < 0)
            r = -1;
    luaL_unref(orch_state_lua(g->tools_state), LUA_REGISTRYINDEX, dispatch_ref);
    return r;
}

static int add_sources(struct orch_loading *l)
{
    int r = 0;
    for (struct orch_tool_source *s = l->cur->sources; s; s = s->next) {
        struct orch_err err = { 0 };
        if (s->add(s->ud, l->g, &err) < 0) {
            orch_load_fail(l, err.cls, "%s", err.msg);
            r = -1;
        }
    }
    return r;
}

int orch_load_tools(struct orch_loading *l)
{
    for (struct orch_tool_source *s = l->cur->sources; s; s = s->next)
        l->g->alone = l->g->alone || s->alone;
    int r = l->g->alone ? 0 : load_folders(l);
    return add_sources(l) < 0 ? -1 : r;
}

int orch_tools_read(struct orch_current *cur, struct orch_state *s, lua_State *L, int idx,
                    const char *where, void (*each)(void *ud, struct orch_tool *t), void *ud,
                    struct orch_err *err)
{
    cleanup_buf struct orch_buf errors = { 0 };
    struct orch_loading l = { .cur = cur, .errors = &errors };
    lua_State *main = orch_state_lua(s);
    orch_sha256_init(&l.hash);
    int dispatch_ref = load_dispatch(&l, s);
    for (size_t i = 1; dispatch_ref >= 0 && i <= lua_objlen(L, idx); i++) {
        struct orch_tool t;
        char shown[64];
        snprintf(shown, sizeof shown, "%s[%zu]", where, i);
        lua_rawgeti(L, idx, (int)i);
        lua_xmove(L, main, L == main ? 0 : 1);
        if (read_tool(&l, s, dispatch_ref, shown, &t) == 0)
            each(ud, &t);
    }
    if (dispatch_ref >= 0)
        luaL_unref(main, LUA_REGISTRYINDEX, dispatch_ref);
    if (errors.n)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%.*s", (int)errors.n - 1, errors.p);
    return 0;
}
