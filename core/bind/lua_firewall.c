/* orch.firewall: what a policy makes of packets. */
#include "bind.h"

#include "../policy/current.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

static int push_bad_policy(lua_State *L, struct orch_policy_box *b, const struct orch_err *err)
{
    orch_policy_box_fini(b);
    return orch_push_err(L, err);
}

/* permit and host of a policy that is written in a script. */
static int fill(const struct orch_env *env, struct orch_policy *p, struct orch_err *err)
{
    int r = orch_current_need(env->current, err);
    return r < 0 ? r : orch_generation_fill_policy(env->current->gen, p, err);
}

/* check(policy) -> { { chain =, rule =, verdict = }… } in the order of evaluation */
static int l_check(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_policy_box b;
    struct orch_err err = { 0 };
    luaL_checktype(L, 1, LUA_TTABLE);
    if (orch_policy_box_read(L, 1, &b, &err) < 0)
        return orch_push_err(L, &err);
    if (fill(env, &b.p, &err) < 0)
        return push_bad_policy(L, &b, &err);
    struct orch_rules *r = orch_rules_new(&b.p, &err);
    if (!r)
        return push_bad_policy(L, &b, &err);
    lua_newtable(L);
    for (size_t i = 0; i < r->n_rules; i++) {
        lua_newtable(L);
        lua_pushstring(L, orch_chain_names[r->rules[i].chain]);
        lua_setfield(L, -2, "chain");
        lua_pushstring(L, r->rules[i].label);
        lua_setfield(L, -2, "rule");
        lua_pushstring(L, orch_verdict_names[r->rules[i].verdict]);
        lua_setfield(L, -2, "verdict");
        lua_rawseti(L, -2, (int)i + 1);
    }
    orch_rules_free(r);
    orch_policy_box_fini(&b);
    return 1;
}

/* explain(policy, { ip =, port =, proto = }) -> "allow" | "deny", the rule that decides */
static int l_explain(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_policy_box b;
    struct orch_err err = { 0 };
    struct in_addr address;
    char rule[128];
    luaL_checktype(L, 1, LUA_TTABLE);
    struct orch_opts o = orch_opts_begin(L, 2, "orch.firewall.explain");
    const char *ip = orch_opt_string(&o, "ip", NULL), *proto = orch_opt_string(&o, "proto", "tcp");
    int port = (int)orch_opt_number(&o, "port", 0, 1, 65535);
    if (orch_opt_string(&o, "host", NULL))
        return luaL_error(L, "orch.firewall.explain: host is not available yet; give ip");
    orch_opts_done(&o);
    if (!ip || inet_pton(AF_INET, ip, &address) != 1)
        return luaL_error(L, "orch.firewall.explain: ip must be an IPv4 address");
    if (strcmp(proto, "tcp") != 0 && strcmp(proto, "udp") != 0)
        return luaL_error(L, "orch.firewall.explain: proto must be \"tcp\" or \"udp\"");
    if (!port)
        return luaL_error(L, "orch.firewall.explain: port is missing");
    if (orch_policy_box_read(L, 1, &b, &err) < 0)
        return orch_push_err(L, &err);
    if (fill(env, &b.p, &err) < 0)
        return push_bad_policy(L, &b, &err);
    bool allowed = orch_policy_explain(&b.p, ntohl(address.s_addr),
                                       strcmp(proto, "udp") == 0 ? IPPROTO_UDP : IPPROTO_TCP,
                                       (uint16_t)port, rule, sizeof rule);
    orch_policy_box_fini(&b);
    lua_pushstring(L, allowed ? "allow" : "deny");
    lua_pushstring(L, rule);
    return 2;
}

int orch_luaopen_firewall(lua_State *L, int t)
{
    enum { TS = ORCH_CTX_TOOL | ORCH_CTX_SCRIPT };
    lua_newtable(L);
    orch_api_set(L, "orch.firewall.",
                 (struct orch_api[]){
                     { "check", l_check, TS }, { "explain", l_explain, TS }, { 0 } });
    lua_setfield(L, t, "firewall");
    return 0;
}
