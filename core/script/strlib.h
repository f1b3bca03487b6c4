/* `string` and `table` of bounded states. No hook runs inside a C function, so these charge steps
 * in proportion to their work while they do it (orch_state_charge) and none can run long. Behaviour
 * is that of LuaJIT's own (Lua 5.1 patterns, %g and %f, string.rep's separator), except:
 *  - "\0" is an ordinary character in patterns;
 *  - table.sort is stable, leaves the table as it was when the comparator throws, and does not mind
 *    a comparator that contradicts itself;
 *  - string.dump, table.maxn, getn, foreach, foreachi and move are not there, table.unpack is. */
#ifndef ORCH_SCRIPT_STRLIB_H
#define ORCH_SCRIPT_STRLIB_H

#include <lua.h>

/* Pushes `string`, and makes it the methods of strings. */
void orch_strlib_push(lua_State *L); /* raises */
/* Pushes `table`, but for unpack. */
void orch_tablib_push(lua_State *L); /* raises */

#endif
