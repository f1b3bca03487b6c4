/* ctx:elicit, ctx:sample, ctx:roots, ctx:ask: a call's questions to its client, in whichever way
 * the client's era wants them. Each waits for the answers. */
#include "bind.h"

#include "../call/call.h"
#include "../script/jsonlib.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { ITEMS_MAX = 32, KEY_MAX_BYTES = 128 };

struct asking {
    struct orch_ask *ask;
    struct orch_wait wait;
    bool single;
};

static int push_answer(lua_State *L, const struct orch_ask_item *it)
{
    cleanup_json struct orch_json_doc d = { 0 };
    struct orch_json_fault fault;
    if (orch_json_scan(&d, (struct orch_slice){ it->answer.p, it->answer.n },
                       &(struct orch_json_limits){ .bytes = 64 << 20 }, &fault) < 0)
        return luaL_error(L, "the client's answer is no JSON: %s", fault.rule);
    orch_lua_push_json(L, &d, 0, 0);
    return 1;
}

static int push_answers(lua_State *L, struct asking *k)
{
    size_t n;
    const struct orch_ask_item *items = orch_ask_items(k->ask, &n);
    lua_createtable(L, 0, (int)n);
    for (size_t i = 0; i < n; i++) {
        if (items[i].failed) {
            struct orch_err err = { 0 };
            orch_err_setc(&err, items[i].failed, EPROTO, "%s", items[i].error.p);
            return orch_push_err(L, &err);
        }
        push_answer(L, &items[i]);
        if (k->single && strcmp(items[i].method, "roots/list") == 0)
            lua_getfield(L, -1, "roots");
        if (k->single)
            return 1;
        lua_setfield(L, -2, items[i].key);
    }
    return 1;
}

static void asking_free(struct asking *k)
{
    orch_ask_free(k->ask);
    free(k);
}

static int asking_push(lua_State *L, void *ud)
{
    struct asking *k = ud;
    int n = push_answers(L, k);
    asking_free(k);
    return n;
}

static void asking_done(void *ud)
{
    struct asking *k = ud;
    orch_task_ready(k->wait, asking_push, k);
}

static void asking_cancel(void *ud)
{
    asking_free(ud);
}

/* Takes items. */
static int start(lua_State *L, struct orch_call *c, struct orch_ask_item *items, size_t n,
                 bool single)
{
    struct asking *k = orch_xcalloc(1, sizeof *k);
    struct orch_err err = { 0 };
    k->single = single;
    k->ask = orch_ask_start(c, items, n, asking_done, k, &err);
    if (!k->ask) {
        free(k);
        orch_push_err(L, &err);
        if (err.code == ENOTSUP) {
            lua_pop(L, 1);
            lua_pushliteral(L, "capability");
        }
        return 3;
    }
    if (orch_ask_done(k->ask))
        return asking_push(L, k);
    return orch_task_wait(L, asking_cancel, k, &k->wait);
}

/* ---- questions as JSON: built as a Lua table first, on top of the stack */

static void copy(lua_State *L, int from, const char *key, const char *as)
{
    lua_getfield(L, from, key);
    lua_setfield(L, -2, as);
}

static const char *const elicit_keys[] = { "key", "message", "schema", "url", NULL };
static const char *const sample_keys[] = { "key",    "prompt",      "messages", "max_tokens",
                                           "system", "temperature", "stop",     "model",
                                           "tools",  "tool_choice", "metadata", NULL };
static const char *const roots_keys[] = { "key", NULL };

static void check_keys(lua_State *L, int idx, const char *what, const char *const *known)
{
    luaL_checktype(L, idx, LUA_TTABLE);
    lua_pushnil(L);
    while (lua_next(L, idx)) {
        lua_pop(L, 1);
        const char *key = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "(not a string)";
        const char *const *k = known;
        while (*k && strcmp(*k, key) != 0)
            k++;
        if (!*k) {
            const char *near = orch_nearest(key, known);
            luaL_error(L, "%s: unknown option '%s'%s%s%s", what, key,
                       near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
        }
    }
}

static const char *string_of(lua_State *L, int idx, const char *key)
{
    lua_getfield(L, idx, key);
    const char *s = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : NULL;
    if (!s && !lua_isnil(L, -1))
        luaL_error(L, "%s must be a string, got %s", key, luaL_typename(L, -1));
    lua_pop(L, 1); /* anchored in the table */
    return s;
}

static void build_elicit(lua_State *L, int idx, struct orch_ask_item *it)
{
    check_keys(L, idx, "elicit", elicit_keys);
    const char *url = string_of(L, idx, "url");
    if (!string_of(L, idx, "message"))
        luaL_error(L, "elicit: message is missing (what to ask, a string)");
    it->method = "elicitation/create";
    it->needs = url ? ORCH_MCP_CAP_URL : ORCH_MCP_CAP_FORM;
    lua_newtable(L);
    copy(L, idx, "message", "message");
    if (url) {
        lua_pushliteral(L, "url");
        lua_setfield(L, -2, "mode");
        copy(L, idx, "url", "url");
        if (!orch_ctx_call(L)->modern) { /* 2025-11-25 wants a name for it */
            cleanup_buf struct orch_buf id = { 0 };
            uint8_t random[16];
            if (orch_random(random, sizeof random) < 0)
                luaL_error(L, "elicit: no random numbers");
            orch_buf_hex(&id, random, sizeof random);
            lua_pushlstring(L, id.p, id.n);
            lua_setfield(L, -2, "elicitationId");
        }
        return;
    }
    lua_getfield(L, idx, "schema");
    if (lua_isnil(L, -1)) {
        lua_pop(L, 1);
        lua_newtable(L);
        lua_pushliteral(L, "object");
        lua_setfield(L, -2, "type");
        lua_newtable(L);
        lua_setfield(L, -2, "properties");
    }
    lua_setfield(L, -2, "requestedSchema");
}

static void build_sample(lua_State *L, int idx, struct orch_ask_item *it)
{
    check_keys(L, idx, "sample", sample_keys);
    it->method = "sampling/createMessage";
    it->needs = ORCH_MCP_CAP_SAMPLING;
    lua_newtable(L);
    if (string_of(L, idx, "prompt")) {
        lua_createtable(L, 1, 0);
        lua_newtable(L);
        lua_pushliteral(L, "user");
        lua_setfield(L, -2, "role");
        lua_newtable(L);
        lua_pushliteral(L, "text");
        lua_setfield(L, -2, "type");
        copy(L, idx, "prompt", "text");
        lua_setfield(L, -2, "content");
        lua_rawseti(L, -2, 1);
        lua_setfield(L, -2, "messages");
    } else {
        copy(L, idx, "messages", "messages");
        lua_getfield(L, -1, "messages");
        if (!lua_istable(L, -1))
            luaL_error(L, "sample: prompt (a string) or messages (a list) is missing");
        lua_pop(L, 1);
    }
    copy(L, idx, "max_tokens", "maxTokens");
    lua_getfield(L, -1, "maxTokens");
    if (lua_isnil(L, -1)) {
        lua_pushinteger(L, 1000);
        lua_setfield(L, -3, "maxTokens");
    }
    lua_pop(L, 1);
    copy(L, idx, "system", "systemPrompt");
    copy(L, idx, "temperature", "temperature");
    copy(L, idx, "stop", "stopSequences");
    copy(L, idx, "model", "modelPreferences");
    copy(L, idx, "metadata", "metadata");
    copy(L, idx, "tools", "tools");
    copy(L, idx, "tool_choice", "toolChoice");
    lua_getfield(L, idx, "tools");
    if (!lua_isnil(L, -1))
        it->needs |= ORCH_MCP_CAP_SAMPLING_TOOLS;
    lua_pop(L, 1);
}

static void build_roots(lua_State *L, int idx, struct orch_ask_item *it)
{
    if (idx)
        check_keys(L, idx, "roots", roots_keys);
    it->method = "roots/list";
    it->needs = ORCH_MCP_CAP_ROOTS;
    lua_newtable(L);
}

typedef void build_fn(lua_State *L, int idx, struct orch_ask_item *it);

/* Encodes the table on top, pops it. params is the item's only buffer until all of it is right. */
static void finish_item(lua_State *L, struct orch_ask_item *it, const char *what)
{
    char why[256];
    if (orch_lua_encode_json(L, -1, &it->params, why, sizeof why) < 0)
        luaL_error(L, "%s: %s", what, why);
    lua_pop(L, 1);
}

/* Items that are not handed over yet, freed also when an error is raised. */
struct items {
    struct orch_ask_item *list;
    size_t n;
};

static void items_free(struct items *s)
{
    for (size_t i = 0; i < s->n; i++) {
        free(s->list[i].key);
        orch_buf_free(&s->list[i].params);
    }
    free(s->list);
}

static struct orch_ask_item *items_add(struct items *s, const char *key)
{
    if (!s->list)
        s->list = orch_xcalloc(ITEMS_MAX, sizeof *s->list);
    struct orch_ask_item *it = &s->list[s->n++];
    it->key = orch_xstrdup(key);
    return it;
}

static int ask_one(lua_State *L, build_fn *build, const char *what)
{
    struct orch_call *c = orch_ctx_call(L);
    ORCH_CLEANUP(items_free) struct items items = { 0 };
    const char *key = lua_isnoneornil(L, 2)
                          ? NULL
                          : (luaL_checktype(L, 2, LUA_TTABLE), string_of(L, 2, "key"));
    if (key && (!*key || strlen(key) > KEY_MAX_BYTES))
        return luaL_error(L, "%s: key must be 1 to %d bytes", what, KEY_MAX_BYTES);
    char made[32];
    snprintf(made, sizeof made, "%s_%u", what, ++c->questions);
    struct orch_ask_item *it = items_add(&items, key ? key : made);
    build(L, lua_isnoneornil(L, 2) ? 0 : 2, it);
    finish_item(L, it, what);
    size_t n = items.n;
    items.n = 0;
    return start(L, c, orch_steal_ptr(&items.list), n, true);
}

int orch_ctx_elicit(lua_State *L)
{
    luaL_checktype(L, 2, LUA_TTABLE);
    return ask_one(L, build_elicit, "elicit");
}

int orch_ctx_sample(lua_State *L)
{
    luaL_checktype(L, 2, LUA_TTABLE);
    return ask_one(L, build_sample, "sample");
}

int orch_ctx_roots(lua_State *L)
{
    return ask_one(L, build_roots, "roots");
}

/* ctx:ask{ KEY = { elicit = {…} } | { sample = {…} } | { roots = true }, … } -> { KEY = answer,
 * … } */
int orch_ctx_ask(lua_State *L)
{
    static const struct {
        const char *name;
        build_fn *build;
    } kinds[] = { { "elicit", build_elicit },
                  { "sample", build_sample },
                  { "roots", build_roots } };
    struct orch_call *c = orch_ctx_call(L);
    luaL_checktype(L, 2, LUA_TTABLE);
    ORCH_CLEANUP(items_free) struct items items = { 0 };
    lua_pushnil(L);
    while (lua_next(L, 2)) {
        if (lua_type(L, -2) != LUA_TSTRING || !lua_istable(L, -1) || items.n == ITEMS_MAX)
            return luaL_error(L,
                              "ask: a table of up to %d questions by name is needed, like { who = "
                              "{ elicit = { message = … } } }",
                              ITEMS_MAX);
        int question = lua_gettop(L);
        struct orch_ask_item *it = items_add(&items, lua_tostring(L, -2));
        for (size_t i = 0; i < ORCH_ARRAY_LEN(kinds) && !it->method; i++) {
            lua_getfield(L, question, kinds[i].name);
            if (lua_istable(L, -1) || (lua_toboolean(L, -1) && kinds[i].build == build_roots)) {
                kinds[i].build(L, lua_istable(L, -1) ? lua_gettop(L) : 0, it);
                finish_item(L, it, it->key);
            }
        }
        if (!it->method)
            return luaL_error(L, "ask: %s: one of elicit, sample, roots is needed", it->key);
        lua_settop(L, question);
        lua_pop(L, 1);
    }
    if (!items.n)
        return luaL_error(L, "ask: no question");
    size_t n = items.n;
    items.n = 0;
    return start(L, c, orch_steal_ptr(&items.list), n, false);
}
