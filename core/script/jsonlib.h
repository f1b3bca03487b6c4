/* JSON in Lua: the table orch.json, and the conversions that every binder uses.
 *
 *   JSON            Lua
 *   object          plain table with string keys; the order of keys is not kept
 *   array           table with the shared array metatable, so that [] and {} stay distinct
 *   null            orch.json.null, one userdata a state; as a member of an object absent unless
 *                   ORCH_LUA_JSON_KEEP_NULL is given
 *   number          number; an integer beyond ±2^53 is an opaque userdata (tostring and == only)
 *                   that is written back digit for digit
 *
 * From Lua: a table with the array metatable and a plain non-empty sequence 1..n are arrays, a
 * table of string keys and an empty plain table are objects, any other table is an error. Tables
 * are read raw: no metamethod runs.
 *
 * For states of core/script. The work is charged to the state's budget, so besides the memory error
 * every function here may raise the limit error; C memory is released then. */
#ifndef ORCH_SCRIPT_JSONLIB_H
#define ORCH_SCRIPT_JSONLIB_H

#include "../base/json.h"
#include <lua.h>

#define ORCH_LUA_JSON_KEEP_NULL 1 /* null members of objects become orch.json.null */

/* Pushes the table orch.json:
 *   encode(v)  text; raises on what JSON cannot hold, with its path: functions and the like, nil,
 *              NaN and infinity, strings that are not UTF-8, mixed or sparse keys, an empty table
 *              with a metatable of its own, over 64 levels (so also cycles), over 64 MiB of text
 *   decode(s)  value, or nil, "RULE at byte N", "failed"; null members of objects are absent in
 *              policies and orch.json.null elsewhere. Limits: 16 MiB, 64 levels, 1,000,000 values
 *   null       compares equal to itself only; tostring gives "null"
 *   array(t)   gives t the array metatable and returns it */
int orch_luaopen_json(lua_State *L);

/* Pushes the value at tok. True when some object in it has a null member, kept or not, so that a
 * caller strips only when needed. */
bool orch_lua_push_json(lua_State *L, const struct orch_json_doc *d, uint32_t tok, unsigned mode);

/* Pushes a deep copy of the value at idx without the null members of objects; nulls in arrays stay.
 * Raises on cycles. */
void orch_lua_strip_nulls(lua_State *L, int idx);

/* Appends the JSON at tok, of which idx is the value, without the members that its objects no
 * longer have; what is left is as it came. */
void orch_lua_json_less(lua_State *L, int idx, const struct orch_json_doc *d, uint32_t tok,
                        struct orch_buf *out);

/* Whether the value carries the array metatable; whether it is an opaque integer beyond ±2^53. */
bool orch_lua_is_array(lua_State *L, int idx);
bool orch_lua_is_bigint(lua_State *L, int idx);

/* Appends the value at idx as JSON. 0; or -EINVAL with out as it was and, when n_why is not 0, why:
 * "args.items[3]: function cannot be JSON". The Lua stack is as before. */
int orch_lua_encode_json(lua_State *L, int idx, struct orch_buf *out, char *why, size_t n_why);

#endif
