/* Where the elements of a returned table are written, so that a message about a value can name its
 * line: a scanner of Lua tokens over `return { … }`. It follows nested table constructors; what is
 * made by code (calls, functions, computed keys) has no line. Pure. */
#ifndef ORCH_SCRIPT_LINES_H
#define ORCH_SCRIPT_LINES_H

#include "../base/util.h"
#include <lua.h>

/* Pushes a table: path → line, with paths such as "rules[3]" and "packages.allow[2]". */
void orch_lines_push(lua_State *L, struct orch_slice text);

#endif
