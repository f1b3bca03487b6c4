/* The configuration: orchestrator.lua, run bounded, checked by lua/policy/config.lua. */
#include "policy_int.h"

#include "../script/jsonlib.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <string.h>
#include <sys/stat.h>

/* Secrets: env "NAME" in orchestrator.lua. */
static int secret_concat(lua_State *L)
{
    lua_settop(L, 2);
    cleanup_buf struct orch_buf b = { 0 };
    for (int i = 1; i <= 2; i++) {
        const char *s = lua_type(L, i) == LUA_TUSERDATA ? luaL_testudata(L, i, "orch.secret")
                                                        : lua_tostring(L, i);
        if (!s)
            return luaL_error(L, "a secret can only be joined with strings");
        orch_buf_str(&b, s);
    }
    memcpy(lua_newuserdata(L, b.n + 1), b.p, b.n + 1);
    luaL_getmetatable(L, "orch.secret");
    lua_setmetatable(L, -2);
    return 1;
}

static int secret_tostring(lua_State *L)
{
    lua_pushliteral(L, "[secret]");
    return 1;
}

static int l_is_secret(lua_State *L)
{
    lua_pushboolean(L,
                    lua_type(L, 1) == LUA_TUSERDATA && luaL_testudata(L, 1, "orch.secret") != NULL);
    return 1;
}

static int l_config_env(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    const char *value = getenv(name);
    if (!value) {
        if (lua_gettop(L) < 2)
            return luaL_error(L,
                              "the environment variable %s is not set; set it, or give a default: "
                              "env(\"%s\", nil)",
                              name, name);
        lua_settop(L, 2);
        return 1;
    }
    memcpy(lua_newuserdata(L, strlen(value) + 1), value, strlen(value) + 1);
    if (luaL_newmetatable(L, "orch.secret")) {
        lua_pushcfunction(L, secret_concat);
        lua_setfield(L, -2, "__concat");
        lua_pushcfunction(L, secret_tostring);
        lua_setfield(L, -2, "__tostring");
        lua_pushboolean(L, 0);
        lua_setfield(L, -2, "__metatable");
    }
    lua_setmetatable(L, -2);
    return 1;
}

/* ---- the configuration */

/* Walks a dotted path in the table at the top; pushes the value (nil when absent). */
static void push_path(lua_State *L, const char *path)
{
    cleanup_free char *copy = orch_xstrdup(path);
    lua_pushvalue(L, -1);
    for (char *save, *part = strtok_r(copy, ".", &save); part; part = strtok_r(NULL, ".", &save)) {
        if (lua_istable(L, -1)) {
            lua_getfield(L, -1, part);
        } else {
            lua_pushnil(L);
        }
        lua_remove(L, -2);
    }
}

static char *config_string(lua_State *L, const char *path)
{
    push_path(L, path);
    char *s = lua_type(L, -1) == LUA_TSTRING ? orch_xstrdup(lua_tostring(L, -1)) : NULL;
    lua_pop(L, 1);
    return s;
}

static char *config_secret(lua_State *L, const char *path)
{
    push_path(L, path);
    char *s = luaL_testudata(L, -1, "orch.secret") ? orch_xstrdup(lua_touserdata(L, -1)) : NULL;
    lua_pop(L, 1);
    return s;
}

static double config_number(lua_State *L, const char *path)
{
    push_path(L, path);
    double v = lua_tonumber(L, -1);
    lua_pop(L, 1);
    return v;
}

static void read_config(struct orch_loading *l, lua_State *L)
{
    struct orch_config *c = &l->g->cfg;
    c->policies = config_string(L, "policies");
    c->workspace = config_string(L, "workspace");
    c->vm_backend = config_string(L, "vm.backend");
    c->vm_accel = config_string(L, "vm.accel");
    c->vm_image = config_string(L, "vm.image");
    c->vm_memory_bytes = (uint64_t)config_number(L, "vm.memory");
    c->vm_vcpus = (int)config_number(L, "vm.vcpus");
    c->vm_max = (int)config_number(L, "vm.max");
    c->vm_timeout_ms = (int64_t)config_number(L, "vm.timeout");
    c->message_bytes = (size_t)config_number(L, "limits.message");
    c->depth = (unsigned)config_number(L, "limits.depth");
    c->calls = (unsigned)config_number(L, "limits.calls");
    c->policy_time_ms = (int64_t)config_number(L, "limits.policy.time");
    c->policy_memory_bytes = (size_t)config_number(L, "limits.policy.memory");
    c->tool_cpu_ms = (int64_t)config_number(L, "limits.tool.cpu");
    c->tool_memory_bytes = (size_t)config_number(L, "limits.tool.memory");
    c->http_listen = config_string(L, "http.listen");
    c->http_token = config_secret(L, "http.token");
    push_path(L, "trust");
    c->trust_always = lua_isstring(L, -1); /* "always" is all there is */
    lua_pop(L, 1);
    c->audit_dir = config_string(L, "audit.dir");
    if (!c->audit_dir)
        c->audit_dir = orch_xasprintf("%s/audit", l->cur->paths->state);
    cleanup_free char *sync = config_string(L, "audit.sync");
    c->audit_sync = !sync || strcmp(sync, "none") == 0 ? ORCH_AUDIT_SYNC_NONE
                    : strcmp(sync, "each") == 0        ? ORCH_AUDIT_SYNC_EACH
                                                       : ORCH_AUDIT_SYNC_INTERVAL;
    c->audit_keep_ms = (int64_t)config_number(L, "audit.keep");
    push_path(L, "net.permit_private");
    c->n_permit = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    c->permit = orch_xcalloc(c->n_permit, sizeof *c->permit);
    size_t kept = 0;
    for (size_t i = 0; i < c->n_permit; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        if (orch_cidr_parse(lua_tostring(L, -1), &c->permit[kept], NULL) ==
            0) /* IPv6: nothing is reachable by it */
            kept++;
        lua_pop(L, 1);
    }
    c->n_permit = kept;
    lua_pop(L, 1);
    push_path(L, "tools");
    size_t n = lua_istable(L, -1) ? lua_objlen(L, -1) : 0;
    c->tools = orch_xcalloc(n + 1, sizeof *c->tools);
    for (size_t i = 0; i < n; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        c->tools[i] = orch_xstrdup(lua_tostring(L, -1));
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

static void add_note(void *ud, const char *line)
{
    struct orch_loading *l = ud;
    orch_buf_str(&l->g->notes, line);
    orch_buf_char(&l->g->notes, '\n');
}

int orch_load_config(struct orch_loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    cleanup_buf struct orch_buf text = { 0 };
    int dirfd = orch_hold_dir(l->cur, *l->base ? l->base : "/");
    if (dirfd < 0)
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s", l->base, strerror(-dirfd));
    if (dirfd < 0 ||
        orch_load_read(l, dirfd, strrchr(l->cur->paths->config, '/') + 1, l->cur->paths->config,
                       l->cur->paths->origin == ORCH_CONFIG_BUILTIN, &text) < 0)
        return -1;
    const char *shown = orch_load_display(l, l->cur->paths->config);
    char sha[sizeof l->sha];
    memcpy(sha, l->sha, sizeof sha);
    struct orch_err err = { 0 };
    if (orch_state_load(g->policy, shown, (struct orch_slice){ text.p, text.n }, &err) < 0) {
        orch_load_fail_file(l, shown, &err);
        return -1;
    }
    orch_state_env(L, -1);
    orch_load_set_function(L, "env", l_config_env);
    lua_pop(L, 1);
    if (orch_state_pcall(g->policy, 0, 1, &err) < 0) {
        orch_load_fail_file(l, shown, &err);
        return -1;
    }
    orch_load_push_deps(L);
    orch_load_set_function(L, "is_secret", l_is_secret);
    lua_pushstring(L, l->cur->paths->home);
    lua_setfield(L, -2, "home");
    lua_pushstring(L, l->cur->paths->cwd);
    lua_setfield(L, -2, "cwd");
    if (orch_load_run_product(l, g->policy, "policy/config.lua", 1) < 0)
        return -1;
    lua_getfield(L, -1, "check"); /* value, module, check */
    lua_pushvalue(L, -3);
    lua_newtable(L);
    lua_pushstring(L, l->base);
    lua_setfield(L, -2, "dir");
    lua_pushstring(L, shown);
    lua_setfield(L, -2, "file");
    if (orch_state_pcall(g->policy, 2, 2, &err) < 0) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: %s", shown, err.msg);
        return -1;
    }
    if (lua_isnil(L, -2)) {
        orch_load_take_lines(L, shown, orch_load_add_error, l);
        return -1;
    }
    lua_pop(L, 1);
    read_config(l, L);
    memcpy(l->sha, sha, sizeof sha);
    if (g->cfg.trust_always && orch_load_trust_config(l, &err) < 0) {
        orch_load_fail(l, err.cls, "%s: %s", shown, err.msg);
        return -1;
    }
    push_path(L, "notes");
    orch_load_take_lines(L, shown, add_note, l);
    lua_getfield(L, -2, "show"); /* value, module, cfg, show */
    lua_pushvalue(L, -2);
    if (orch_state_pcall(g->policy, 1, 1, &err) == 0) {
        cleanup_buf struct orch_buf json = { 0 };
        char why[256];
        if (orch_lua_encode_json(L, -1, &json, why, sizeof why) == 0)
            g->config_show = orch_steal_ptr(&json.p);
    }
    lua_settop(L, 0);
    struct stat st;
    if (g->cfg.workspace && (stat(g->cfg.workspace, &st) < 0 || !S_ISDIR(st.st_mode))) {
        orch_load_fail(l, ORCH_CLASS_CONFIG, "%s: workspace: %s is not a directory", shown,
                       g->cfg.workspace);
        return -1;
    }
    return 0;
}
