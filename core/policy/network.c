/* Network policies: from policies/network.lua, as lua/policy/engine.lua checked it, to packet
 * filters. */
#include "policy_int.h"

#include "../net/hostaddr.h"

#include <errno.h>
#include <inttypes.h>
#include <lauxlib.h>
#include <math.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- what the policy engine checks with */

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
        r = orch_err_set(
            &err, EACCES,
            "%s is never allowed (%s) unless net.permit_private in the configuration names it",
            lua_tostring(L, 1), never);
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

/* ---- from Lua */

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

/* No key of the table at idx but these. */
static int check_keys(lua_State *L, int idx, size_t entry, const char *const *known,
                      struct orch_err *err)
{
    lua_pushnil(L);
    while (lua_next(L, idx)) {
        size_t i = 0;
        lua_pop(L, 1);
        const char *key = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : NULL;
        while (known[i] && (!key || strcmp(known[i], key) != 0))
            i++;
        if (known[i])
            continue;
        const char *near = key ? orch_nearest(key, known) : NULL;
        return bad(err, entry, "unknown key %s%s%s%s", key ? key : "that is no text",
                   near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
    }
    return 0;
}

static int read_ports(lua_State *L, int idx, size_t entry, struct orch_allow *a,
                      struct orch_ports *out, struct orch_err *err)
{
    if (get(L, idx, "ports") != LUA_TTABLE || !lua_objlen(L, -1) ||
        lua_objlen(L, -1) > ORCH_PORTS_MAX)
        return bad(err, entry, "ports is required: a list of 1 to %d ports or ranges",
                   ORCH_PORTS_MAX);
    a->ports = out;
    a->n_ports = lua_objlen(L, -1);
    for (size_t i = 0; i < a->n_ports; i++) {
        struct orch_err why = { 0 };
        lua_rawgeti(L, -1, (int)i + 1);
        const char *text = lua_type(L, -1) == LUA_TSTRING || lua_type(L, -1) == LUA_TNUMBER
                               ? lua_tostring(L, -1)
                               : "";
        if (orch_ports_parse(text, &out[i], &why) < 0)
            return bad(err, entry, "ports[%zu]: %s", i + 1, why.msg);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return 0;
}

static int read_allow(lua_State *L, int idx, size_t entry, struct orch_allow *a,
                      struct orch_ports *ports, struct orch_err *err)
{
    static const char *const known[] = { "cidr", "ports", "proto", "host", NULL };
    struct orch_err why = { 0 };
    if (check_keys(L, idx, entry, known, err) < 0)
        return -EINVAL;
    if (get(L, idx, "host") != LUA_TNIL)
        return bad(err, entry, "rules by host name are not available yet; use cidr");
    lua_pop(L, 1);
    if (get(L, idx, "cidr") != LUA_TSTRING ||
        orch_cidr_parse(lua_tostring(L, -1), &a->cidr, &why) < 0)
        return bad(err, entry, "cidr: %s",
                   why.msg[0] ? why.msg : "must be a text like \"198.51.100.0/24\"");
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
    static const char *const known[] = { "allow", "connections", "bandwidth", NULL };
    if (check_keys(L, idx, 0, known, err) < 0)
        return -EINVAL;
    int type = get(L, idx, "connections");
    double n = lua_tonumber(L, -1);
    if (type != LUA_TNIL && !(type == LUA_TNUMBER && n >= 1 && n <= 65535 && n == floor(n)))
        return bad(err, 0, "connections must be a whole number from 1 to 65535");
    p->connections = (uint32_t)n;
    lua_pop(L, 1);
    struct orch_err why = { 0 };
    type = get(L, idx, "bandwidth");
    if (type != LUA_TNIL && type != LUA_TSTRING)
        return bad(err, 0, "bandwidth must be a text like \"10mbit\"");
    if (type == LUA_TSTRING &&
        orch_bandwidth_parse(lua_tostring(L, -1), &p->bandwidth_bits, &why) < 0)
        return bad(err, 0, "bandwidth %s", why.msg);
    lua_pop(L, 1);
    return 0;
}

int orch_policy_box_read(lua_State *L, int idx, struct orch_policy_box *b, struct orch_err *err)
{
    int top = lua_gettop(L), r = 0;
    if (idx < 0)
        idx = top + idx + 1;
    *b = (struct orch_policy_box){ 0 };
    luaL_checkstack(L, 8, NULL);
    if (!lua_istable(L, idx) || get(L, idx, "allow") != LUA_TTABLE ||
        lua_objlen(L, -1) > ORCH_ALLOW_MAX) {
        lua_settop(L, top);
        return bad(err, 0, "a network policy is { allow = { … } } with at most %d entries",
                   ORCH_ALLOW_MAX);
    }
    int list = lua_gettop(L);
    size_t n = lua_objlen(L, list);
    b->allow = orch_xcalloc(n, sizeof *b->allow);
    b->ports = orch_xcalloc(n * ORCH_PORTS_MAX, sizeof *b->ports);
    b->p.allow = b->allow;
    b->p.n_allow = n;
    for (size_t i = 0; i < n && r == 0; i++) {
        lua_rawgeti(L, list, (int)i + 1);
        r = lua_istable(L, -1) ? read_allow(L, lua_gettop(L), i + 1, &b->allow[i],
                                            b->ports + i * ORCH_PORTS_MAX, err)
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

/* ---- the policies of a generation, read once */

struct orch_network {
    char *name;
    struct orch_policy_box box;
};

int orch_load_networks(struct orch_loading *l)
{
    struct orch_generation *g = l->g;
    lua_State *L = orch_state_lua(g->policy);
    int top = lua_gettop(L), r = 0;
    lua_rawgeti(L, LUA_REGISTRYINDEX, g->engine_ref);
    lua_getfield(L, -1, "networks");
    int list = lua_gettop(L);
    lua_pushnil(L);
    while (r == 0 && lua_next(L, list)) {
        struct orch_err err = { 0 };
        struct orch_network n = { .name = NULL };
        const char *name = lua_tostring(L, -2);
        r = orch_policy_box_read(L, -1, &n.box, &err);
        lua_settop(L, list + 1);
        if (r < 0) {
            orch_load_fail(l, err.cls, "network.lua: %s: %s", name, err.msg);
            break;
        }
        n.name = orch_xstrdup(name);
        g->networks = orch_xrealloc(g->networks, (g->n_networks + 1) * sizeof *g->networks);
        g->networks[g->n_networks++] = n;
    }
    lua_settop(L, top);
    return r;
}

void orch_networks_free(struct orch_generation *g)
{
    for (size_t i = 0; i < g->n_networks; i++) {
        free(g->networks[i].name);
        orch_policy_box_fini(&g->networks[i].box);
    }
    free(g->networks);
}

int orch_generation_fill_policy(const struct orch_generation *g, struct orch_policy *p,
                                struct orch_err *err)
{
    int r = orch_hostaddr_get(g->hostaddr, &p->host, &p->n_host, err);
    p->permit = g->cfg.permit;
    p->n_permit = g->cfg.n_permit;
    return r;
}

/* The policy of that name, permit and host addresses filled in; what it points to is borrowed. */
static int find(const struct orch_generation *g, const char *network, struct orch_policy *p,
                struct orch_err *err)
{
    size_t i = 0;
    while (i < g->n_networks && strcmp(g->networks[i].name, network) != 0)
        i++;
    if (i == g->n_networks)
        return orch_err_setc(err, ORCH_CLASS_CONFIG, ENOENT,
                             "no network policy \"%s\" in %s/network.lua", network,
                             g->cfg.policies);
    *p = g->networks[i].box.p;
    return orch_generation_fill_policy(g, p, err);
}

struct orch_rules *orch_generation_rules(const struct orch_generation *g, const char *network,
                                         struct orch_err *err)
{
    struct orch_policy p;
    return find(g, network, &p, err) < 0 ? NULL : orch_rules_new(&p, err);
}

int orch_generation_explain_packet(const struct orch_generation *g, const char *network,
                                   uint32_t addr, uint8_t proto, uint16_t port, bool *allowed,
                                   char *rule, size_t n, struct orch_err *err)
{
    struct orch_policy p;
    int r = find(g, network, &p, err);
    if (r == 0)
        *allowed = orch_policy_explain(&p, addr, proto, port, rule, n);
    return r;
}

int orch_generation_rules_text(const struct orch_generation *g, const char *network,
                               struct orch_buf *out, struct orch_err *err)
{
    struct orch_rules *r = orch_generation_rules(g, network, err);
    if (!r)
        return -EINVAL;
    for (size_t i = 0; i < r->n_rules; i++) {
        const struct orch_rule *rule = &r->rules[i];
        orch_buf_printf(out, "%-6s %-12s  %-10s  %s\n", orch_chain_family(rule->chain),
                        orch_chain_names[rule->chain], orch_verdict_names[rule->verdict],
                        rule->label);
    }
    for (size_t i = 0; i < r->n_sets; i++) {
        orch_buf_printf(out, "set %-9zu", i + 1);
        for (size_t k = 0; k < r->sets[i].n; k++) {
            char first[ORCH_CIDR_TEXT], last[ORCH_CIDR_TEXT];
            orch_cidr_text((struct orch_cidr){ r->sets[i].v[k].first, 32 }, first);
            orch_cidr_text((struct orch_cidr){ r->sets[i].v[k].last, 32 }, last);
            orch_buf_printf(out, strcmp(first, last) ? " %s-%s" : " %s", first, last);
        }
        orch_buf_str(out, "\n");
    }
    if (r->bandwidth_bits)
        orch_buf_printf(out, "bandwidth     %" PRIu64 " bits a second in each direction\n",
                        r->bandwidth_bits);
    orch_rules_free(r);
    return 0;
}
