/* orch.firewall, and network policies from Lua tables. */
#ifndef ORCH_BIND_LUA_FIREWALL_H
#define ORCH_BIND_LUA_FIREWALL_H

#include "../net/ruleset.h"
#include <lua.h>

/* A policy with what it points to. */
struct orch_policy_box {
    struct orch_policy p;
    struct orch_allow *allow;
    struct orch_ports *ports;
};
void orch_policy_box_fini(struct orch_policy_box *b);

/* Reads { allow = { { cidr =, ports = { 443, "8000-8010" }, proto = "tcp" | "udp" }… }, connections =,
 * bandwidth = "10mbit" } at idx. permit and host stay empty. -EINVAL, class CONFIG:
 * entry and reason. Reads raw: no metamethod runs. */
int orch_lua_read_policy(lua_State *L, int idx, struct orch_policy_box *b, struct orch_err *err);

/* orch.firewall.check and explain, set into the table at index t. */
int orch_luaopen_firewall(lua_State *L, int t);

#endif
