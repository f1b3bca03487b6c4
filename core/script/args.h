/* Arguments of functions that Lua calls: options by name, durations, sizes, lists; and how a
 * failure of the world is returned. A caller's mistake raises. An option table is read with
 * orch_opt_*, which know name, type and range; orch_opts_done refuses what was not asked for. */
#ifndef ORCH_SCRIPT_ARGS_H
#define ORCH_SCRIPT_ARGS_H

#include "../base/err.h"
#include <lua.h>

/* nil, message, code. */
int orch_push_err(lua_State *L, const struct orch_err *err);

/* Options. idx is a table, or none for all defaults. Each raises on a wrong type or range. */
struct orch_opts {
    lua_State *L;
    int idx; /* absolute; 0 when absent */
    const char *what;
    const char *known[32];
    int n_known;
};
struct orch_opts orch_opts_begin(lua_State *L, int idx, const char *what); /* raises */
const char *orch_opt_string(struct orch_opts *o, const char *key, const char *def);
double orch_opt_number(struct orch_opts *o, const char *key, double def, double least, double most);
bool orch_opt_bool(struct orch_opts *o, const char *key, bool def);
/* seconds or "30s" */
int64_t orch_opt_duration_ms(struct orch_opts *o, const char *key, int64_t def);
int64_t orch_opt_size_bytes(struct orch_opts *o, const char *key, int64_t def);
bool orch_opt_push(struct orch_opts *o, const char *key, int type); /* pushes the value, or false */
void orch_opts_done(struct orch_opts *o);                           /* raises on an unknown key */

/* A duration or size at idx as the API takes them. Raises. */
int64_t orch_check_duration_ms(lua_State *L, int idx, const char *what);
/* The list of strings at idx as a NULL-terminated array in a userdata left on the stack (so that it
 * lives as long as the frame); raises when it is no list of strings without NUL or is over max. */
const char **orch_check_strings(lua_State *L, int idx, const char *what, size_t max);

#endif
