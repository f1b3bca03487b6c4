/* Network policies: from policies/network.lua, as lua/policy.lua checked it, to packet filters. */
#include "host.h"

#include "bind/lua_firewall.h"
#include "net/link.h"

#include <errno.h>
#include <string.h>

/* true | nil, why */
static int push_verdict(lua_State *L, int r, const struct orch_err *err)
{
    if (r < 0) {
        lua_pushnil(L);
        lua_pushstring(L, err->msg);
        return 2;
    }
    lua_pushboolean(L, 1);
    return 1;
}

/* cidr(text) -> true | nil, why: as an entry of `allow`. */
static int l_cidr(lua_State *L)
{
    struct orch_generation *g = lua_touserdata(L, lua_upvalueindex(1));
    struct orch_policy p = { .permit = g->cfg.permit, .n_permit = g->cfg.n_permit };
    struct orch_err err = { 0 };
    struct orch_cidr c;
    int r = orch_cidr_parse(luaL_checkstring(L, 1), &c, &err);
    const char *never = r < 0 ? NULL : orch_policy_never(&p, c);
    if (never)
        r = orch_err_set(&err, EACCES, "%s is never allowed (%s) unless net.permit_private in the configuration names it", lua_tostring(L, 1), never);
    return push_verdict(L, r, &err);
}

static int l_ports(lua_State *L)
{
    struct orch_err err = { 0 };
    struct orch_ports ports;
    return push_verdict(L, orch_ports_parse(luaL_checkstring(L, 1), &ports, &err), &err);
}

static int l_bandwidth(lua_State *L)
{
    struct orch_err err = { 0 };
    uint64_t bits;
    return push_verdict(L, orch_bandwidth_parse(luaL_checkstring(L, 1), &bits, &err), &err);
}

int orch_luaopen_network_deps(lua_State *L, struct orch_generation *g)
{
    lua_pushlightuserdata(L, g);
    lua_pushcclosure(L, l_cidr, 1);
    lua_setfield(L, -2, "cidr");
    lua_pushcfunction(L, l_ports);
    lua_setfield(L, -2, "ports");
    lua_pushcfunction(L, l_bandwidth);
    lua_setfield(L, -2, "bandwidth");
    return 0;
}

int orch_fill_policy(struct orch *o, struct orch_policy *p, struct orch_err *err)
{
    size_t n;
    struct orch_cidr *host = NULL;
    int r = orch_host_generation(o, err);
    if (r == 0)
        r = orch_link_host(&host, &n, err);
    if (r < 0)
        return r;
    free(o->host_addresses);
    o->host_addresses = host;
    p->host = host;
    p->n_host = n;
    p->permit = o->gen->cfg.permit;
    p->n_permit = o->gen->cfg.n_permit;
    return 0;
}

/* The policy of that name, permit and host addresses filled in. */
static int read_network(struct orch_generation *g, const char *network, struct orch_policy_box *b, struct orch_err *err)
{
    lua_State *L = orch_state_lua(g->policy);
    int top = lua_gettop(L);
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "networks");
    lua_getfield(L, -1, network);
    int r = lua_istable(L, -1) ? orch_lua_read_policy(L, -1, b, err)
                               : orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT, "no network policy \"%s\" in %s/network.lua", network,
                                               g->cfg.policies);
    lua_settop(L, top);
    if (r == 0 && (r = orch_fill_policy(g->host, &b->p, err)) < 0)
        orch_policy_box_fini(b);
    return r;
}

struct orch_rules *orch_generation_rules(struct orch_generation *g, const char *network, struct orch_err *err)
{
    struct orch_policy_box b;
    if (read_network(g, network, &b, err) < 0)
        return NULL;
    struct orch_rules *rules = orch_rules_new(&b.p, err);
    orch_policy_box_fini(&b);
    return rules;
}

int orch_generation_explain_packet(struct orch_generation *g, const char *network, uint32_t addr, uint8_t proto, uint16_t port, bool *allowed,
                                   char *rule, size_t n, struct orch_err *err)
{
    struct orch_policy_box b;
    int r = read_network(g, network, &b, err);
    if (r < 0)
        return r;
    *allowed = orch_policy_explain(&b.p, addr, proto, port, rule, n);
    orch_policy_box_fini(&b);
    return 0;
}

int orch_generation_rules_text(struct orch_generation *g, const char *network, struct orch_buf *out, struct orch_err *err)
{
    struct orch_rules *r = orch_generation_rules(g, network, err);
    if (!r)
        return -EINVAL;
    for (size_t i = 0; i < r->n_rules; i++) {
        const struct orch_rule *rule = &r->rules[i];
        orch_buf_printf(out, "%-6s %-12s  %-10s  %s\n", orch_chain_family(rule->chain), orch_chain_names[rule->chain],
                        orch_verdict_names[rule->verdict], rule->label);
    }
    orch_rules_free(r);
    return 0;
}
