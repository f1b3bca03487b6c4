/* One generation: the configuration, the policies and the tools of a moment, each in Lua states of
 * their own, checked and tested before it is used. See host.h. */
#include "loading.h"

#include "script/lines.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* ---- functions the policy engine depends on */

static int l_rate(lua_State *L)
{
    struct orch *o = orch_env_of(L)->ud;
    lua_pushboolean(L, orch_rate_take(o, luaL_checkstring(L, 1), luaL_checknumber(L, 2), (int64_t)luaL_checknumber(L, 3)));
    return 1;
}

/* What predicates see of a session, and what its client says of itself. */
static int l_session(lua_State *L)
{
    struct orch *o = orch_env_of(L)->ud;
    const char *id = luaL_checkstring(L, 1);
    struct orch_session *s = o->sessions;
    while (s && strcmp(s->id, id) != 0)
        s = s->next;
    lua_newtable(L);
    lua_pushvalue(L, 1);
    lua_setfield(L, -2, "id");
    lua_newtable(L);
    for (size_t i = 0; s && i < s->n_marks; i++) {
        lua_pushboolean(L, 1);
        lua_setfield(L, -2, s->marks[i]);
    }
    lua_setfield(L, -2, "marks");
    struct orch_slice client = s && s->mcp ? orch_mcp_session_client(s->mcp) : (struct orch_slice){ 0 };
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (client.n && orch_json_scan(&d, client, &(struct orch_json_limits){ 0 }, &fault) == 0)
        orch_lua_push_json(L, &d, 0, 0);
    else
        lua_newtable(L);
    return 2;
}

/* ---- policies */

static int engine_call(struct loading *l, const char *method, int n_args, int n_results)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    struct orch_err err = { 0 };
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, method);
    lua_remove(L, -2);
    lua_insert(L, -(n_args + 1));
    int r = orch_state_pcall(g->policy, n_args, n_results, &err);
    if (r < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s", err.msg);
    return r;
}

static int load_policy_file(struct loading *l, int dirfd, const char *name)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    cleanup_free char *path = orch_xasprintf("%s/%s", g->cfg.policies, name);
    const char *shown = orch_load_display(l, path);
    cleanup_buf struct orch_buf text = { 0 };
    if (orch_load_read(l, dirfd, name, path, l->o->paths.origin == ORCH_CONFIG_BUILTIN, &text) < 0)
        return -1;
    struct orch_slice source = { text.p, text.n };
    if (orch_load_run(l, g->policy, shown, source, 0) < 0)
        return -1;
    bool tools = strcmp(name, "tools.lua") == 0;
    lua_pushstring(L, shown);
    lua_insert(L, -2);
    orch_lines_push(L, source);
    if (engine_call(l, tools ? "load_tools" : "load_network", 3, 1) < 0)
        return -1;
    size_t before = l->errors->n;
    orch_load_take_lines(L, shown, orch_load_add_error, l);
    return l->errors->n == before ? 0 : -1;
}

/* Where everybody may write, everybody can put another file in the place of one. Borrowed. */
static int open_dir(struct loading *l, const char *path, const char *what, const char *fix)
{
    struct stat st;
    int fd = orch_hold_dir(l->o, path);
    if (fd < 0 || fstat(fd, &st) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: the %s directory cannot be opened: %s%s", orch_load_display(l, path), what,
                       strerror(fd < 0 ? -fd : errno), fix);
        return -1;
    }
    if (st.st_mode & S_IWOTH) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: everybody may write to the %s directory; run: chmod o-w %s", orch_load_display(l, path), what, path);
        return -1;
    }
    return fd;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The sorted names of *.lua in a directory; -1 with a failure noted. Frees nothing on error. */
static int list_lua(struct loading *l, int dirfd, const char *path, char ***names, size_t *n)
{
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    if (!d) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s", path, strerror(errno));
        return -1;
    }
    *names = NULL;
    *n = 0;
    for (struct dirent *e; (e = readdir(d));) {
        size_t len = strlen(e->d_name);
        if (len < 5 || e->d_name[0] == '.' || strcmp(e->d_name + len - 4, ".lua") != 0)
            continue;
        *names = orch_xrealloc(*names, (*n + 1) * sizeof **names);
        (*names)[(*n)++] = orch_xstrdup(e->d_name);
    }
    closedir(d);
    if (*n)
        qsort(*names, *n, sizeof **names, by_name);
    return 0;
}

static void free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

static int load_policies(struct loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    orch_load_push_deps(L);
    orch_load_set_function(L, "rate", l_rate);
    orch_load_set_function(L, "session", l_session);
    orch_luaopen_network_deps(L, g);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    if (orch_load_push_schema(l, g->policy) < 0)
        return -1;
    lua_setfield(L, -2, "schema");
    if (orch_load_run_product(l, g->policy, "policy.lua", 1) < 0)
        return -1;
    lua_getfield(L, -1, "judge");
    g->judge_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    g->engine_ref = luaL_ref(L, LUA_REGISTRYINDEX);

    int dirfd = open_dir(l, g->cfg.policies, "policies", "; run: orch init");
    if (dirfd < 0)
        return -1;
    char **names;
    size_t n;
    if (list_lua(l, dirfd, g->cfg.policies, &names, &n) < 0)
        return -1;
    int r = 0;
    bool tools = false;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], "tools.lua") != 0 && strcmp(names[i], "network.lua") != 0) {
            orch_load_fail(l, ORCH_CLASS_CONFIG, "%s/%s: not a policy file; only tools.lua and network.lua belong here", orch_load_display(l, g->cfg.policies),
                 names[i]);
            r = -1;
        } else if (load_policy_file(l, dirfd, names[i]) < 0) {
            r = -1;
        }
        tools = tools || strcmp(names[i], "tools.lua") == 0;
    }
    free_names(names, n);
    if (!tools) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s/tools.lua: missing; without rules every call would be denied; run: orch init",
             orch_load_display(l, g->cfg.policies));
        return -1;
    }
    return r;
}

/* ---- tools */

static int by_wire_name(const void *a, const void *b)
{
    return strcmp((*(struct orch_tool *const *)a)->wire_name, (*(struct orch_tool *const *)b)->wire_name);
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

int orch_generation_add_tool(struct orch_generation *g, const struct orch_tool *def, struct orch_slice untrusted, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc schema = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&schema, orch_slice_str(def->input), &(struct orch_json_limits){ .bytes = 1 << 20 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s at byte %zu", fault.rule, fault.byte);
    const char *bad_header = NULL;
    struct orch_mcp_param_list headers = { 0 };
    if (strstr(def->input, "\"x-mcp-header\"") && orch_mcp_params_read(&schema, 0, &headers, &bad_header) < 0)
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
        r = orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s", why ? why : "input schema is wrong");
        lua_pop(L, 2);
        return r;
    }
    if (lua_isstring(L, -1))
        orch_buf_printf(&g->notes, "%s: schema keywords that are not checked: %s\n", def->name, lua_tostring(L, -1));
    lua_pop(L, 2);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "listed");
    lua_remove(L, -2);
    lua_pushstring(L, def->name);
    r = orch_state_pcall(g->policy, 1, 1, err);
    if (r < 0)
        return r;
    struct orch_tool *t = orch_generation_tool(g, orch_slice_str(def->wire_name));
    if (t) { /* an own tool of the same name replaces a shipped one */
        orch_tool_fini(t);
    } else {
        t = orch_xmalloc(sizeof *t);
        g->tools = orch_xrealloc(g->tools, (g->n_tools + 1) * sizeof(struct orch_tool *));
        g->tools[g->n_tools++] = t;
    }
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

/* JSON with its keys in order, since a Lua table has none: clients keep what they were told by its bytes. */
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
static int read_tool(struct loading *l, struct orch_state *s, int dispatch_ref, const char *shown, struct orch_tool *t)
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
    *t = (struct orch_tool){ .state = s, .task = task, .timeout_ms = (int64_t)lua_tonumber(L, -2) };
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

static int register_tool(struct loading *l, void *ud, const char *path, const char *shown, bool shipped)
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
        r = orch_err_set(&err, EEXIST, "the name %s is taken by %s", t.name, orch_load_display(l, same->file));
    else
        r = orch_generation_add_tool(g, &t, (struct orch_slice){ 0 }, &err);
    orch_tool_fini(&t);
    if (r < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s%s", shown, r == -EEXIST ? "" : "input: ", err.msg);
    return r;
}

/* Runs each file of a directory in the tool state and hands it over with its result on the stack. */
typedef int each_fn(struct loading *l, void *ud, const char *path, const char *shown, bool product);
static int load_dir(struct loading *l, const char *dir, const char *what, bool product, each_fn *each, void *ud)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->tools_state);
    int dirfd = open_dir(l, dir, what, "");
    if (dirfd < 0)
        return -1;
    char **names;
    size_t n;
    if (list_lua(l, dirfd, dir, &names, &n) < 0)
        return -1;
    int r = 0;
    for (size_t i = 0; i < n; i++) {
        cleanup_free char *path = orch_xasprintf("%s/%s", dir, names[i]);
        const char *shown = orch_load_display(l, path);
        cleanup_buf struct orch_buf text = { 0 };
        if (orch_load_read(l, dirfd, names[i], path, product, &text) < 0) {
            r = -1;
            continue;
        }
        struct orch_err err = { 0 };
        if (orch_state_load_known(g->tools_state, shown, (struct orch_slice){ text.p, text.n }, l->sha, &err) < 0) {
            orch_load_fail_file(l, shown, &err);
            r = -1;
            continue;
        }
        orch_state_env(L, -1);
        int env_ref = luaL_ref(L, LUA_REGISTRYINDEX);
        if (orch_state_pcall(g->tools_state, 0, 1, &err) < 0) {
            orch_load_fail_file(l, shown, &err);
            r = -1;
        } else {
            lua_rawgeti(L, LUA_REGISTRYINDEX, env_ref);
            orch_state_freeze(L, lua_gettop(L));
            lua_pop(L, 1);
            if (each(l, ud, path, shown, product) < 0)
                r = -1;
        }
        luaL_unref(L, LUA_REGISTRYINDEX, env_ref);
    }
    free_names(names, n);
    return r;
}

/* ---- resources and prompts: one file each in lua/resources and lua/prompts beside the configuration */

struct offer_dir {
    const char *name;
    int n;
    struct orch_sha256_ctx *sum;
};

/* The options for lua/serve.lua are below the file's table: options[name][n], options.where[name][n]. */
static int take_offer_file(struct loading *l, void *ud, const char *path, const char *shown, bool product)
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

static int load_offer(struct loading *l)
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
        if (orch_hold_dir(l->o, path) != -ENOENT && load_dir(l, path, dirs[i].name, false, take_offer_file, &dirs[i]) < 0)
            r = -1;
    }
    orch_sha256_final(&sum, g->offer_digest);
    if (r < 0 || !(dirs[0].n + dirs[1].n)) {
        lua_pop(L, 1);
        return r;
    }
    if (orch_load_run_product(l, g->tools_state, "serve.lua", 0) < 0)
        return -1;
    lua_insert(L, -2);
    if (orch_state_pcall(g->tools_state, 1, 2, &err) < 0) { /* tools, which it has none of here, and the handler */
        char *end = strchr(err.msg, '\n');
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%.*s", end ? (int)(end - err.msg) : (int)strlen(err.msg), err.msg);
        return -1;
    }
    g->handle_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_pop(L, 1);
    g->features = (dirs[0].n ? ORCH_MCP_RESOURCES : 0u) | (dirs[1].n ? ORCH_MCP_PROMPTS : 0u);
    return 0;
}

/* The schema module of the tool state: few tools have an output schema, and compiling it costs a fifth of
 * the start, so it is loaded when the first one asks. */
static int l_schema_module(lua_State *L)
{
    struct loading *l = lua_touserdata(L, lua_upvalueindex(1));
    lua_getfield(L, LUA_REGISTRYINDEX, "orch.schema");
    if (!lua_isnil(L, -1))
        return 1;
    if (orch_load_push_schema(l, orch_state_of(L)) < 0)
        return luaL_error(L, "the schema module cannot be loaded");
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, "orch.schema");
    return 1;
}

/* Loads lua/dispatch.lua into the state; its reference, or -1. */
static int load_dispatch(struct loading *l, struct orch_state *s)
{
    lua_State *L = orch_state_lua(s);
    orch_load_push_deps(L);
    lua_pushlightuserdata(L, l);
    lua_pushcclosure(L, l_schema_module, 1);
    lua_setfield(L, -2, "schema"); /* called while loading only: l is gone afterwards */
    return orch_load_run_product(l, s, "dispatch.lua", 1) < 0 ? -1 : luaL_ref(L, LUA_REGISTRYINDEX);
}

/* The methods of ctx that are written in Lua. */
static int load_ctx(struct loading *l)
{
    lua_State *L = orch_state_lua(l->g->tools_state);
    orch_luaopen_call_transport(L);
    if (orch_load_run_product(l, l->g->tools_state, "http.lua", 1) < 0 ||
        orch_load_run_product(l, l->g->tools_state, "output.lua", 0) < 0)
        return -1;
    lua_getfield(L, -1, "result");
    orch_ctx_set(L, "output");
    lua_getfield(L, -2, "fetch");
    orch_ctx_set(L, "http");
    lua_pop(L, 2);
    return 0;
}

static int load_folders(struct loading *l)
{
    struct orch_generation *g = l->g;
    if (load_ctx(l) < 0)
        return -1;
    int dispatch_ref = load_dispatch(l, g->tools_state);
    if (dispatch_ref < 0)
        return -1;
    cleanup_free char *shipped = orch_xasprintf("%s/lua/tools", l->o->paths.share);
    int r = load_dir(l, shipped, "tools", true, register_tool, &dispatch_ref);
    for (char **dir = g->cfg.tools; *dir; dir++)
        if (strcmp(*dir, shipped) != 0 && load_dir(l, *dir, "tools", false, register_tool, &dispatch_ref) < 0)
            r = -1;
    luaL_unref(orch_state_lua(g->tools_state), LUA_REGISTRYINDEX, dispatch_ref);
    return r;
}

static int load_tools(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_generation *g = l->g;
    /* In front of one server, or of what a script offers, there are no tools but those. */
    int r = o->offer.on || o->upstream ? 0 : load_folders(l);
    if (!o->offer.on && !o->upstream && load_offer(l) < 0)
        r = -1;
    struct orch_err err = { 0 };
    for (size_t i = 0; i < o->n_c_tools; i++)
        if (orch_generation_add_tool(g, &o->c_tools[i], (struct orch_slice){ 0 }, &err) < 0) {
            orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: input: %s", o->c_tools[i].name, err.msg);
            r = -1;
        }
    return r;
}

static void add_c_tool(struct orch *o, const struct orch_tool *t)
{
    o->c_tools = orch_xrealloc(o->c_tools, (o->n_c_tools + 1) * sizeof *o->c_tools);
    o->c_tools[o->n_c_tools++] = *t;
}

int orch_script_tools(struct orch *o, lua_State *L, int idx, struct orch_err *err)
{
    cleanup_buf struct orch_buf errors = { 0 };
    struct loading l = { .o = o, .errors = &errors };
    lua_State *main = orch_state_lua(o->script);
    orch_sha256_init(&l.hash);
    int dispatch_ref = load_dispatch(&l, o->script);
    for (size_t i = 1; dispatch_ref >= 0 && i <= lua_objlen(L, idx); i++) {
        struct orch_tool t;
        char shown[64];
        snprintf(shown, sizeof shown, "orch.mcp.serve: tools[%zu]", i);
        lua_rawgeti(L, idx, (int)i);
        lua_xmove(L, main, L == main ? 0 : 1);
        if (read_tool(&l, o->script, dispatch_ref, shown, &t) == 0)
            add_c_tool(o, &t);
    }
    if (dispatch_ref >= 0)
        luaL_unref(main, LUA_REGISTRYINDEX, dispatch_ref);
    if (errors.n)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%.*s", (int)errors.n - 1, errors.p);
    return 0;
}

/* ---- all of it */

static int compile_redact(struct loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "redact");
    g->n_redact = lua_objlen(L, -1);
    g->redact = orch_xcalloc(g->n_redact, sizeof(struct orch_regex *));
    g->redact_text = orch_xcalloc(g->n_redact, sizeof(char *));
    int r = 0;
    for (size_t i = 0; i < g->n_redact; i++) {
        struct orch_err err = { 0 };
        lua_rawgeti(L, -1, (int)i + 1);
        g->redact_text[i] = orch_xstrdup(lua_tostring(L, -1));
        lua_pop(L, 1);
        g->redact[i] = orch_regex_compile(orch_slice_str(g->redact_text[i]), &err);
        if (!g->redact[i]) {
            orch_load_fail(l, ORCH_CLASS_CONFIG, "redact: %s", err.msg);
            r = -1;
        }
    }
    lua_pop(L, 2);
    return r;
}

static int run_policy_tests(struct loading *l)
{
    size_t before = l->errors->n;
    if (engine_call(l, "run_tests", 0, 1) < 0)
        return -1;
    orch_load_take_lines(orch_state_lua(l->g->policy), "tests", orch_load_add_error, l);
    return l->errors->n == before ? 0 : -1;
}

static int find_trust(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_err err = { 0 };
    if (l->mode != ORCH_TRUST_CHECK || o->paths.origin == ORCH_CONFIG_BUILTIN)
        return 0;
    if (orch_trust_read(o, &l->trust, &err) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "trust: %s", err.msg);
        return -1;
    }
    l->needs_trust = o->paths.origin == ORCH_CONFIG_CWD || l->trust.always;
    return 0;
}

/* From now on this configuration is loaded only as the user has seen it, also by the next orch: what is in force is what
 * was seen last. */
static void hold_to_trust(struct orch *o)
{
    struct orch_err err = { 0 };
    struct orch_trust t = { .list = o->gen->sources, .always = true };
    if (orch_trust_record(o, &t, &err) < 0)
        orch_log(ORCH_ERROR, "that %s must be trusted could not be recorded: %s", o->paths.config, err.msg);
}

static int load_all(struct loading *l)
{
    struct orch *o = l->o;
    struct orch_generation *g = l->g;
    if (find_trust(l) < 0)
        return -1;
    g->policy = orch_load_state(l, ORCH_CTX_POLICY, 64 << 20);
    if (!g->policy || orch_load_config(l) < 0)
        return -1;
    g->tools_state = orch_load_state(l, ORCH_CTX_TOOL, g->cfg.tool_memory_bytes);
    if (!g->tools_state)
        return -1;
    /* Both are tried, so that one run shows the errors of policies and tools alike. */
    int r = load_policies(l);
    if (g->engine_ref <= 0 || load_tools(l) < 0 || r < 0)
        return -1;
    struct orch_err err = { 0 };
    if (o->upstream && orch_upstream_add_tools(o->upstream, g, &err) < 0) {
        orch_load_fail(l, err.cls, "%s", err.msg);
        return -1;
    }
    if (compile_redact(l) < 0 || run_policy_tests(l) < 0)
        return -1;
    orch_generation_list(g);
    orch_state_set_limits(g->policy, g->cfg.policy_memory_bytes, (uint64_t)g->cfg.policy_time_ms * ORCH_STEPS_PER_MS, g->cfg.policy_time_ms);
    orch_state_set_limits(g->tools_state, g->cfg.tool_memory_bytes, (uint64_t)g->cfg.tool_cpu_ms * ORCH_STEPS_PER_MS, g->cfg.tool_cpu_ms);
    uint8_t digest[ORCH_SHA256_BYTES];
    orch_sha256_final(&l->hash, digest);
    cleanup_buf struct orch_buf hex = { 0 };
    orch_buf_hex(&hex, digest, sizeof digest);
    memcpy(g->hash, hex.p, 65);
    orch_buf_printf(&g->audit_field, ",\"generation\":\"%s\"", g->hash);
    return 0;
}

struct orch_generation *orch_generation_load(struct orch *o, enum orch_trust_mode mode, struct orch_buf *errors, enum orch_class *cls)
{
    struct loading l = { .o = o, .mode = mode, .errors = errors, .cls = ORCH_CLASS_CONFIG };
    l.g = orch_xcalloc(1, sizeof *l.g);
    l.g->host = o;
    l.g->refs = 1;
    l.base = orch_xstrdup(o->paths.config);
    *strrchr(l.base, '/') = 0;
    l.trust_dir = orch_trust_dir(o);
    orch_sha256_init(&l.hash);
    int r = load_all(&l);
    if (l.unheld && o->gen)
        hold_to_trust(o);
    orch_trust_fini(&l.trust);
    free(l.trust_dir);
    free(l.base);
    if (r < 0) {
        *cls = l.cls;
        orch_generation_unref(l.g);
        return NULL;
    }
    return l.g;
}

struct orch_generation *orch_generation_ref(struct orch_generation *g)
{
    g->refs++;
    return g;
}

void orch_generation_unref(struct orch_generation *g)
{
    if (!g || --g->refs)
        return;
    orch_state_free(g->policy);
    orch_state_free(g->tools_state);
    for (size_t i = 0; i < g->n_tools; i++) {
        orch_tool_fini(g->tools[i]);
        free(g->tools[i]);
    }
    free(g->tools);
    for (size_t i = 0; i < g->n_redact; i++) {
        orch_regex_free(g->redact[i]);
        free(g->redact_text[i]);
    }
    free(g->redact);
    free(g->redact_text);
    struct orch_config *c = &g->cfg;
    for (char **dir = c->tools; dir && *dir; dir++)
        free(*dir);
    free(c->tools);
    free(c->permit);
    free(c->policies);
    free(c->workspace);
    free(c->audit_dir);
    free(c->http_listen);
    free(c->http_token);
    free(c->vm_backend);
    free(c->vm_accel);
    free(c->vm_image);
    free(g->config_show);
    free(g->linked);
    orch_trust_files_free(g->sources.files, g->sources.n);
    orch_buf_free(&g->list);
    orch_buf_free(&g->audit_field);
    orch_buf_free(&g->notes);
    free(g);
}

void orch_generation_forget_session(struct orch_generation *g, const char *id)
{
    lua_State *L = orch_state_lua(g->policy);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "forget_session");
    lua_remove(L, -2);
    lua_pushstring(L, id);
    (void)orch_state_pcall(g->policy, 1, 0, NULL); /* it cannot fail but by a limit: then it is kept */
}

/* Calls engine.METHOD with n_args values already pushed; its one result as JSON. */
static int engine_json(struct orch_generation *g, const char *method, int n_args, struct orch_buf *out, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    char why[256];
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, method);
    lua_remove(L, -2);
    lua_insert(L, -(n_args + 1));
    int r = orch_state_pcall(g->policy, n_args, 1, err);
    if (r < 0) { /* a limit: the rule that used it up is named as a call's denial names it */
        lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
        lua_getfield(L, -1, "current");
        if (lua_isstring(L, -1))
            orch_err_wrap(err, "%s", lua_tostring(L, -1));
        lua_pop(L, 2);
        return r;
    }
    r = orch_lua_encode_json(L, -1, out, why, sizeof why);
    lua_pop(L, 1);
    return r < 0 ? orch_err_set(err, EINVAL, "%s", why) : 0;
}

int orch_generation_explain(struct orch_generation *g, const char *tool, struct orch_slice args, struct orch_buf *out, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, args, &(struct orch_json_limits){ 0 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "arguments: %s at byte %zu", fault.rule, fault.byte);
    if (d.toks[0].type != ORCH_JSON_OBJECT)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "arguments: must be a JSON object");
    lua_pushstring(L, tool);
    orch_lua_push_json(L, &d, 0, ORCH_LUA_JSON_KEEP_NULL);
    lua_pushliteral(L, "explain");
    lua_pushliteral(L, "explain");
    return engine_json(g, "explain", 4, out, err);
}

int orch_generation_show(struct orch_generation *g, struct orch_buf *out, struct orch_err *err)
{
    return engine_json(g, "show", 0, out, err);
}
