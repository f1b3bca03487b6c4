/* The policy engine's C side: loads what lies in policies/ into the policy state, where
 * lua/policy.lua compiles it, and asks it. */
#include "policy_int.h"

#include "../script/jsonlib.h"
#include "../script/lines.h"
#include "../script/regex.h"

#include <errno.h>
#include <lauxlib.h>
#include <string.h>

/* The policy state's code gets what it depends on as upvalue 1: the struct orch_current. */
static struct orch_current *current_of(lua_State *L)
{
    return lua_touserdata(L, lua_upvalueindex(1));
}

static int l_rate(lua_State *L)
{
    lua_pushboolean(L, orch_rate_take(&current_of(L)->rates, luaL_checkstring(L, 1),
                                      luaL_checknumber(L, 2), (int64_t)luaL_checknumber(L, 3)));
    return 1;
}

static int l_session(lua_State *L)
{
    const struct orch_current *cur = current_of(L);
    cur->ops->session(cur->ud, L, luaL_checkstring(L, 1));
    return 2;
}

static void set_dep(lua_State *L, struct orch_current *cur, const char *name, lua_CFunction fn)
{
    lua_pushlightuserdata(L, cur);
    lua_pushcclosure(L, fn, 1);
    lua_setfield(L, -2, name);
}

static int engine_call(struct orch_loading *l, const char *method, int n_args, int n_results)
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

static int load_policy_file(struct orch_loading *l, int dirfd, const char *name)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    cleanup_free char *path = orch_xasprintf("%s/%s", g->cfg.policies, name);
    const char *shown = orch_load_display(l, path);
    cleanup_buf struct orch_buf text = { 0 };
    if (orch_load_read(l, dirfd, name, path, l->cur->paths->origin == ORCH_CONFIG_BUILTIN, &text) <
        0)
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

int orch_load_policies(struct orch_loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    orch_load_push_deps(L);
    set_dep(L, l->cur, "rate", l_rate);
    set_dep(L, l->cur, "session", l_session);
    orch_luaopen_network_deps(L, g);
    orch_luaopen_regex(L);
    lua_setfield(L, -2, "regex");
    if (orch_load_push_schema(l, g->policy) < 0)
        return -1;
    lua_setfield(L, -2, "schema");
    if (orch_load_run_product(l, g->policy, "policy/engine.lua", 1) < 0)
        return -1;
    lua_getfield(L, -1, "judge");
    g->judge_ref = luaL_ref(L, LUA_REGISTRYINDEX);
    g->engine_ref = luaL_ref(L, LUA_REGISTRYINDEX);

    int dirfd = orch_load_open_dir(l, g->cfg.policies, "policies", "; run: orch init");
    if (dirfd < 0)
        return -1;
    char **names;
    size_t n;
    if (orch_load_list(l, dirfd, g->cfg.policies, &names, &n) < 0)
        return -1;
    int r = 0;
    bool tools = false;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], "tools.lua") != 0 && strcmp(names[i], "network.lua") != 0) {
            orch_load_fail(l, ORCH_CLASS_CONFIG,
                           "%s/%s: not a policy file; only tools.lua and network.lua belong here",
                           orch_load_display(l, g->cfg.policies), names[i]);
            r = -1;
        } else if (load_policy_file(l, dirfd, names[i]) < 0) {
            r = -1;
        }
        tools = tools || strcmp(names[i], "tools.lua") == 0;
    }
    orch_load_free_names(names, n);
    if (!tools) {
        orch_load_fail(
            l, ORCH_CLASS_CONFIG,
            "%s/tools.lua: missing; without rules every call would be denied; run: orch init",
            orch_load_display(l, g->cfg.policies));
        return -1;
    }
    return r;
}

static int compile_redact(struct orch_loading *l)
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

static int run_policy_tests(struct orch_loading *l)
{
    size_t before = l->errors->n;
    if (engine_call(l, "run_tests", 0, 1) < 0)
        return -1;
    orch_load_take_lines(orch_state_lua(l->g->policy), "tests", orch_load_add_error, l);
    return l->errors->n == before ? 0 : -1;
}

int orch_load_finish_policies(struct orch_loading *l)
{
    return compile_redact(l) < 0 || run_policy_tests(l) < 0 ? -1 : 0;
}

/* ---- judging */

static void take_redact(struct orch_judgement *j, lua_State *L)
{
    j->n_redact = lua_objlen(L, -1);
    j->redact = orch_xcalloc(j->n_redact, sizeof *j->redact);
    for (size_t i = 0; i < j->n_redact; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        j->redact[i] = (uint16_t)(lua_tointeger(L, -1) - 1);
        lua_pop(L, 1);
    }
}

static void take_marks(struct orch_judgement *j, lua_State *L)
{
    size_t n = lua_objlen(L, -1);
    j->marks = orch_xcalloc(n + 1, sizeof *j->marks);
    for (size_t i = 0; i < n; i++) {
        lua_rawgeti(L, -1, (int)i + 1);
        j->marks[i] = orch_xstrdup(lua_tostring(L, -1));
        lua_pop(L, 1);
    }
}

static void take_effects(struct orch_judgement *j, lua_State *L, int idx)
{
    lua_getfield(L, idx, "redact");
    if (lua_istable(L, -1))
        take_redact(j, L);
    lua_getfield(L, idx, "network");
    if (lua_isstring(L, -1))
        j->network = orch_xstrdup(lua_tostring(L, -1));
    lua_getfield(L, idx, "marks");
    if (lua_istable(L, -1) && j->verdict == ORCH_ALLOW)
        take_marks(j, L);
    lua_pop(L, 3);
}

/* What engine.judge returned is at the stack's top. */
static int take_args(struct orch_judgement *j, lua_State *L, const struct orch_json_doc *d,
                     uint32_t args, struct orch_err *err)
{
    char why[256];
    struct orch_json_fault fault;
    /* Rewritten, when that is what runs; or without the nulls that stand for absent members. */
    bool rewritten = lua_istable(L, -1) && j->verdict == ORCH_ALLOW;
    if (!rewritten && !lua_istable(L, -6))
        return 0;
    orch_buf_char(&j->args, '[');
    if (!rewritten)
        orch_lua_json_less(L, -6, d, args, &j->args);
    else if (orch_lua_encode_json(L, -1, &j->args, why, sizeof why) < 0)
        return orch_err_set(err, EINVAL, "the rewritten arguments cannot be JSON: %s", why);
    orch_buf_char(&j->args, ']');
    /* The limits of messages are the session's, which they have passed. */
    if (orch_json_scan(&j->doc, (struct orch_slice){ j->args.p, j->args.n },
                       &(struct orch_json_limits){ .bytes = 256 << 20, .depth = 1000 }, &fault) < 0)
        return orch_err_set(err, EINVAL, "the %sarguments: %s", rewritten ? "rewritten " : "",
                            fault.rule);
    return 0;
}

int orch_generation_judge(struct orch_generation *g, const struct orch_tool *tool,
                          const char *session, const char *caller, const struct orch_json_doc *d,
                          uint32_t args, struct orch_judgement *j, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    *j = (struct orch_judgement){ .rules = "[]", .g = g };
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->judge_ref);
    lua_rawgeti(L, LUA_REGISTRYINDEX, tool->name_ref);
    bool nulls = false;
    if (args)
        nulls = orch_lua_push_json(L, d, args, ORCH_LUA_JSON_KEEP_NULL);
    else
        lua_newtable(L);
    if (nulls)
        orch_lua_strip_nulls(L, -1);
    else
        lua_pushvalue(L, -1);
    lua_pushstring(L, session);
    lua_pushstring(L, caller);
    int r = orch_state_pcall(g->policy, 5, 6, err);
    if (r < 0) {
        lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
        lua_getfield(L, -1, "current");
        return lua_isstring(L, -1) ? orch_err_wrap(err, "%s", lua_tostring(L, -1)) : r;
    }
    /* arguments without nulls, verdict, reason, rules, effects, rewritten arguments */
    j->verdict = (int)lua_tointeger(L, -5);
    j->reason = lua_tostring(L, -4);
    if (lua_isstring(L, -3))
        j->rules = lua_tostring(L, -3);
    if (lua_istable(L, -2))
        take_effects(j, L, lua_gettop(L) - 1);
    return take_args(j, L, d, args, err);
}

void orch_judgement_fini(struct orch_judgement *j)
{
    if (j->g)
        lua_settop(orch_state_lua(j->g->policy), 0); /* reason and rules are there */
    free(j->network);
    free(j->redact);
    for (char **m = j->marks; m && *m; m++)
        free(*m);
    free(j->marks);
    orch_buf_free(&j->args);
    orch_json_doc_free(&j->doc);
    *j = (struct orch_judgement){ .rules = "[]" };
}

void orch_generation_forget_session(struct orch_generation *g, const char *id)
{
    lua_State *L = orch_state_lua(g->policy);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "forget_session");
    lua_remove(L, -2);
    lua_pushstring(L, id);
    (void)orch_state_pcall(g->policy, 1, 0,
                           NULL); /* it cannot fail but by a limit: then it is kept */
}

/* Calls engine.METHOD with n_args values already pushed; its one result as JSON. */
static int engine_json(struct orch_generation *g, const char *method, int n_args,
                       struct orch_buf *out, struct orch_err *err)
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

int orch_generation_explain(struct orch_generation *g, const char *tool, struct orch_slice args,
                            struct orch_buf *out, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, args, &(struct orch_json_limits){ 0 }, &fault) < 0)
        return orch_err_setc(err, ORCH_CLASS_USAGE, EINVAL, "arguments: %s at byte %zu", fault.rule,
                             fault.byte);
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
