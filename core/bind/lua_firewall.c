#include "lua_firewall.h"

#include "bind.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

void orch_policy_box_fini(struct orch_policy_box *b)
{
    free(b->allow);
    free(b->ports);
    *b = (struct orch_policy_box){ 0 };
}

/* The raw member at the top; its type. */
static int get(lua_State *L, int idx, const char *key)
{
    lua_pushstring(L, key);
    lua_rawget(L, idx < 0 ? idx - 1 : idx);
    return lua_type(L, -1);
}

static int bad(struct orch_err *err, size_t entry, const char *fmt, ...) ORCH_PRINTF(3, 4);
static int bad(struct orch_err *err, size_t entry, const char *fmt, ...)
{
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return entry ? orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "allow[%zu]: %s", entry, text)
                 : orch_err_setc(err, ORCH_CLASS_CONFIG, EINVAL, "%s", text);
}

static int read_ports(lua_State *L, int idx, size_t entry, struct orch_allow *a, struct orch_ports *out, struct orch_err *err)
{
    if (get(L, idx, "ports") != LUA_TTABLE || !lua_objlen(L, -1) || lua_objlen(L, -1) > ORCH_PORTS_MAX)
        return bad(err, entry, "ports is required: a list of 1 to %d ports or ranges", ORCH_PORTS_MAX);
    a->ports = out;
    a->n_ports = lua_objlen(L, -1);
    for (size_t i = 0; i < a->n_ports; i++) {
        struct orch_err why = { 0 };
        lua_rawgeti(L, -1, (int)i + 1);
        const char *text = lua_type(L, -1) == LUA_TSTRING || lua_type(L, -1) == LUA_TNUMBER ? lua_tostring(L, -1) : "";
        if (orch_ports_parse(text, &out[i], &why) < 0)
            return bad(err, entry, "ports[%zu]: %s", i + 1, why.msg);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return 0;
}

static int read_allow(lua_State *L, int idx, size_t entry, struct orch_allow *a, struct orch_ports *ports, struct orch_err *err)
{
    struct orch_err why = { 0 };
    if (get(L, idx, "host") != LUA_TNIL)
        return bad(err, entry, "rules by host name are not available yet; use cidr");
    lua_pop(L, 1);
    if (get(L, idx, "cidr") != LUA_TSTRING || orch_cidr_parse(lua_tostring(L, -1), &a->cidr, &why) < 0)
        return bad(err, entry, "cidr: %s", why.msg[0] ? why.msg : "must be a text like \"198.51.100.0/24\"");
    lua_pop(L, 1);
    int type = get(L, idx, "proto");
    const char *proto = type == LUA_TSTRING ? lua_tostring(L, -1) : "";
    if (type != LUA_TNIL && strcmp(proto, "tcp") != 0 && strcmp(proto, "udp") != 0)
        return bad(err, entry, "proto must be \"tcp\" or \"udp\"");
    a->proto = strcmp(proto, "udp") == 0 ? IPPROTO_UDP : IPPROTO_TCP;
    lua_pop(L, 1);
    return read_ports(L, idx, entry, a, ports, err);
}

static int read_numbers(lua_State *L, int idx, struct orch_policy *p, struct orch_err *err)
{
    int type = get(L, idx, "connections");
    double n = lua_tonumber(L, -1);
    if (type != LUA_TNIL && !(type == LUA_TNUMBER && n >= 1 && n <= 65535))
        return bad(err, 0, "connections must be 1 to 65535");
    p->connections = (uint32_t)n;
    lua_pop(L, 1);
    struct orch_err why = { 0 };
    type = get(L, idx, "bandwidth");
    if (type != LUA_TNIL && type != LUA_TSTRING)
        return bad(err, 0, "bandwidth must be a text like \"10mbit\"");
    if (type == LUA_TSTRING && orch_bandwidth_parse(lua_tostring(L, -1), &p->bandwidth_bits, &why) < 0)
        return bad(err, 0, "bandwidth %s", why.msg);
    lua_pop(L, 1);
    return 0;
}

int orch_lua_read_policy(lua_State *L, int idx, struct orch_policy_box *b, struct orch_err *err)
{
    int top = lua_gettop(L), r = 0;
    if (idx < 0)
        idx = top + idx + 1;
    *b = (struct orch_policy_box){ 0 };
    luaL_checkstack(L, 8, NULL);
    if (!lua_istable(L, idx) || get(L, idx, "allow") != LUA_TTABLE || lua_objlen(L, -1) > ORCH_ALLOW_MAX) {
        lua_settop(L, top);
        return bad(err, 0, "a network policy is { allow = { … } } with at most %d entries", ORCH_ALLOW_MAX);
    }
    int list = lua_gettop(L);
    size_t n = lua_objlen(L, list);
    b->allow = orch_xcalloc(n, sizeof *b->allow);
    b->ports = orch_xcalloc(n * ORCH_PORTS_MAX, sizeof *b->ports);
    b->p.allow = b->allow;
    b->p.n_allow = n;
    for (size_t i = 0; i < n && r == 0; i++) {
        lua_rawgeti(L, list, (int)i + 1);
        r = lua_istable(L, -1) ? read_allow(L, lua_gettop(L), i + 1, &b->allow[i], b->ports + i * ORCH_PORTS_MAX, err)
                               : bad(err, i + 1, "must be a table");
        lua_settop(L, list);
    }
    if (r == 0)
        r = read_numbers(L, idx, &b->p, err);
    lua_settop(L, top);
    if (r < 0)
        orch_policy_box_fini(b);
    return r;
}

/* ---- orch.firewall */

static int push_bad_policy(lua_State *L, struct orch_policy_box *b, const struct orch_err *err)
{
    orch_policy_box_fini(b);
    return orch_push_err(L, err);
}

/* check(policy) -> { { chain =, rule =, verdict = }… } in the order of evaluation */
static int l_check(lua_State *L)
{
    struct orch_env *env = orch_env_of(L);
    struct orch_policy_box b;
    struct orch_err err = { 0 };
    luaL_checktype(L, 1, LUA_TTABLE);
    if (orch_lua_read_policy(L, 1, &b, &err) < 0)
        return orch_push_err(L, &err);
    if (env->fill_policy(env->ud, &b.p, &err) < 0)
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
    if (!port)
        return luaL_error(L, "orch.firewall.explain: port is missing");
    if (orch_lua_read_policy(L, 1, &b, &err) < 0)
        return orch_push_err(L, &err);
    if (env->fill_policy(env->ud, &b.p, &err) < 0)
        return push_bad_policy(L, &b, &err);
    bool allowed = orch_policy_explain(&b.p, ntohl(address.s_addr), strcmp(proto, "udp") == 0 ? IPPROTO_UDP : IPPROTO_TCP, (uint16_t)port,
                                       rule, sizeof rule);
    orch_policy_box_fini(&b);
    lua_pushstring(L, allowed ? "allow" : "deny");
    lua_pushstring(L, rule);
    return 2;
}

int orch_luaopen_firewall(lua_State *L, int t)
{
    enum { TS = ORCH_CTX_TOOL | ORCH_CTX_SCRIPT };
    lua_newtable(L);
    orch_api_set(L, "orch.firewall.", (struct orch_api[]){ { "check", l_check, TS }, { "explain", l_explain, TS }, { 0 } });
    lua_setfield(L, t, "firewall");
    return 0;
}
