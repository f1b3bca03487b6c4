/* One Lua state: which libraries it opens, how much it may use, how code enters it.
 *
 * Bounded states (policy, tool) stay in the interpreter (`jit` is never opened), have a capped
 * allocator, a count hook, and string and table functions of orch's own (strlib) that charge steps
 * to the same budget. Trusted states (script) have the full standard library and the JIT, no bounds.
 *
 * Everything enters Lua through orch_state_pcall or a task (task.h); both arm the budget. When a
 * budget is used up the error cannot be swallowed: the hook is re-armed at every instruction, pcall
 * in bounded states rethrows it, until control is back in C. */
#ifndef ORCH_SCRIPT_STATE_H
#define ORCH_SCRIPT_STATE_H

#include "../base/err.h"
#include <lua.h>

enum orch_context { /* a bit each, so that an API function names the contexts it serves */
    ORCH_CTX_POLICY = 1,
    ORCH_CTX_TOOL = 2,
    ORCH_CTX_SCRIPT = 4,
};

struct orch_state;

struct orch_state_opts {
    enum orch_context ctx;
    size_t memory_bytes;  /* cap of the allocator; 0: none (script only) */
    uint64_t steps;       /* per entry from C: VM instructions + strlib steps + bytes allocated / 16; 0: none */
    int64_t cpu_ms;       /* per entry: time inside Lua; 0: none. A task's entries add up */
    const char *lua_dir;  /* where boot.lua and the shipped modules are */
    void *host;           /* for binders: orch_state_host */
};

struct orch_state *orch_state_new(const struct orch_state_opts *o, struct orch_err *err);
void orch_state_free(struct orch_state *s);
lua_State *orch_state_lua(struct orch_state *s);
struct orch_state *orch_state_of(lua_State *L); /* from any coroutine of the state */
enum orch_context orch_state_context(lua_State *L);
void *orch_state_host(lua_State *L);
size_t orch_state_memory(const struct orch_state *s); /* bytes allocated now */
void orch_state_set_limits(struct orch_state *s, size_t memory_bytes, uint64_t steps, int64_t cpu_ms);

/* Compiles text (never bytecode) under the name "@path" and leaves the function on the stack. In a
 * bounded state its environment is a fresh table that reads through to the shared read-only globals.
 * -EINVAL with file:line in err. Source over 1 MiB: -EFBIG. */
int orch_state_load(struct orch_state *s, const char *path, struct orch_slice text, struct orch_err *err);

/* Calls the function below nargs arguments, with budget and traceback. On failure pops everything and
 * sets err: the error's text with file:line, then the traceback on further lines; class LIMIT when a
 * budget ended it (the text then says which one, its size and where). */
int orch_state_pcall(struct orch_state *s, int nargs, int nresults, struct orch_err *err);

/* For binders and strlib: charges n steps; raises the limit error when the budget is used up. */
void orch_state_charge(lua_State *L, uint64_t n); /* raises */
/* Freezes the table at idx and every table below it: writes raise, pairs and # go on working. */
void orch_state_freeze(lua_State *L, int idx); /* raises */

#endif
