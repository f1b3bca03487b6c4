/* Requests beyond tools (resources, prompts, completion): answered by lua/policy/offer.lua from
 * what a script serves or the configuration's folders hold, each in a task of its own. */
#include "call_int.h"

#include "../script/jsonlib.h"

#include <string.h>

static bool cacheable(const char *method)
{
    return strcmp(method, "prompts/get") != 0 && strcmp(method, "completion/complete") != 0;
}

/* Error as nil, message, code, data: a JSON-RPC error. */
static void take_error(struct orch_call *c, lua_State *L, int first, int nres)
{
    const char *text = nres >= 2 ? lua_tostring(L, first + 1) : NULL;
    const char *word = nres >= 3 && lua_type(L, first + 2) == LUA_TSTRING
                           ? lua_tostring(L, first + 2)
                           : NULL;
    double code = nres >= 3 && lua_type(L, first + 2) == LUA_TNUMBER ? lua_tonumber(L, first + 2)
                                                                     : ORCH_RPC_INTERNAL_ERROR;
    char why[256];
    if (word && strcmp(word, "capability") == 0 && c->modern && c->missing) {
        orch_call_missing(c);
        return;
    }
    orch_call_rpc_error(c, (int)code, orch_slice_str(text ? text : "no reason given"));
    if (nres >= 4 && lua_istable(L, first + 3) &&
        orch_lua_encode_json(L, first + 3, &c->rpc_data, why, sizeof why) < 0)
        c->rpc_data.n = 0;
}

static void take_result(struct orch_call *c, lua_State *L, int nres)
{
    int first = lua_gettop(L) - nres + 1;
    cleanup_buf struct orch_buf json = { 0 };
    char why[256];
    if (nres == 0 || !lua_istable(L, first)) {
        take_error(c, L, first, nres);
        return;
    }
    if (orch_lua_encode_json(L, first, &json, why, sizeof why) < 0 || json.p[0] != '{') {
        cleanup_free char *m = orch_xasprintf("%s: the result cannot be sent: %s", c->method,
                                              json.n ? "it must be an object" : why);
        orch_call_rpc_error(c, ORCH_RPC_INTERNAL_ERROR, orch_slice_str(m));
        return;
    }
    c->text.n = 0;
    orch_buf_add(&c->text, json.p + 1, json.n - 2);
    if (!c->modern)
        return;
    bool hinted = true, meta = true;
    lua_getfield(L, first, "ttlMs");
    hinted = !lua_isnil(L, -1) || !cacheable(c->method);
    lua_getfield(L, first, "_meta");
    meta = !lua_isnil(L, -1);
    lua_pop(L, 2);
    if (!hinted)
        orch_buf_str(&c->text, c->text.n ? ",\"ttlMs\":0,\"cacheScope\":\"private\""
                                         : "\"ttlMs\":0,\"cacheScope\":\"private\"");
    if (!meta)
        orch_buf_printf(&c->text, "%s\"_meta\":{\"" ORCH_MCP_META "serverInfo\":%s}",
                        c->text.n ? "," : "", c->server_info);
}

static void done(void *ud, lua_State *L, int nres, const struct orch_err *err)
{
    struct orch_call *c = ud;
    c->run = NULL;
    if (err)
        orch_call_rpc_error(c, ORCH_RPC_INTERNAL_ERROR, orch_slice_str(err->msg));
    else
        take_result(c, L, nres);
    orch_call_end(c);
}

void orch_call_request(struct orch_session *s, struct orch_mcp_request *rq,
                       const struct orch_json_doc *d, const char *method,
                       const struct orch_mcp_params *p)
{
    struct orch_call *c = orch_call_new(s);
    const struct orch_offer *offer = &s->calls->offer;
    struct orch_err err = { 0 };
    c->method = method;
    orch_call_clock(c, c->gen->cfg.vm_timeout_ms, "vm.timeout");
    orch_call_of_request(c, rq);
    orch_questions_begin(c, method, d, p);
    orch_call_running(c);
    uint32_t args = p->args ? p->args : p->all ? orch_json_get(d, p->all, "argument") : 0;
    if ((p->name.n || args) && orch_record_request(c, p->name, d, args, &err) < 0) {
        orch_call_rpc_error(c, ORCH_RPC_INTERNAL_ERROR, orch_slice_str(err.msg));
        orch_call_end(c);
        return;
    }
    struct orch_state *state = offer->state ? offer->state : c->gen->tools_state;
    lua_State *L = orch_state_lua(state);
    lua_rawgeti(L, LUA_REGISTRYINDEX, offer->state ? offer->handle_ref : c->gen->handle_ref);
    lua_pushstring(L, method);
    if (p->all)
        orch_lua_push_json(L, d, p->all, 0);
    else
        lua_newtable(L);
    orch_push_ctx(L, c->slot, c->serial);
    orch_lua_start(c, state, 3, done);
}
