/* One Lua state: which libraries it opens, how much it may use, how code enters it.
 *
 * Bounded states (policy, tool) stay in the interpreter (`jit` is never opened), have a capped
 * allocator, a count hook, and string and table functions of orch's own (strlib) that charge steps
 * to the same budget. Trusted states (script) have the full standard library and the JIT, no
 * bounds.
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
    size_t memory_bytes; /* cap of the allocator (a single block may pass it by 1/16); 0: none */
    /* per entry from C: VM instructions + strlib steps + bytes allocated / 16; 0: none */
    uint64_t steps;
    int64_t cpu_ms;      /* per entry: CPU time inside Lua; 0: none. A task's entries add up */
    const char *lua_dir; /* where boot.lua and the shipped modules are */
    /* script only: `require` looks there after lua_dir; NULL: nowhere else */
    const char *script_dir;
    void *host; /* for binders: orch_state_host */
};

struct orch_state *orch_state_new(const struct orch_state_opts *o, struct orch_err *err);
/* Cancels the state's tasks first (their waits' cancel and their done are called). */
void orch_state_free(struct orch_state *s);
lua_State *orch_state_lua(struct orch_state *s);
struct orch_state *orch_state_of(lua_State *L); /* from any coroutine of the state */
enum orch_context orch_state_context(lua_State *L);
void *orch_state_host(lua_State *L);
size_t orch_state_memory(const struct orch_state *s); /* bytes allocated now */
void orch_state_set_limits(struct orch_state *s, size_t memory_bytes, uint64_t steps,
                           int64_t cpu_ms);

/* Compiles text (never bytecode) under the name "@path" and leaves the function on the stack. In a
 * bounded state its environment is a fresh table that reads through to the shared read-only
 * globals. -EINVAL with file:line in err. Source over 1 MiB: -EFBIG. */
int orch_state_load(struct orch_state *s, const char *path, struct orch_slice text,
                    struct orch_err *err);
/* The same for a text whose SHA-256 is known: when make compiled exactly this text (one of orch's
 * own files, unchanged), that is taken; messages then name the file as lua/NAME. */
int orch_state_load_known(struct orch_state *s, const char *path, struct orch_slice text,
                          const char *sha256, struct orch_err *err);

/* Calls the function below nargs arguments, with budget and traceback. On failure pops everything
 * and sets err: the error's text with file:line, then the traceback on further lines; class LIMIT
 * when a budget ended it: "limit: policy time 100 ms used up in policies/tools.lua:12". Inside
 * another entry the budget of that one is used on. */
int orch_state_pcall(struct orch_state *s, int nargs, int nresults, struct orch_err *err);

/* Runs fn(L, ud) on the main thread so that a Lua error in it (also out of memory) is an error
 * here. For host code that pushes values; arms no budget. fn leaves nothing on the stack. */
typedef void orch_state_fn(lua_State *L, void *ud);
int orch_state_protect(struct orch_state *s, orch_state_fn *fn, void *ud, struct orch_err *err);

/* For binders and strlib: charges n steps; raises the limit error when the budget is used up. */
void orch_state_charge(lua_State *L, uint64_t n); /* raises */

/* Freezes the table at idx in place: assignments, rawset, table.insert and so on raise.
 *  - A table of named things (a library): also every table below it. Reads and pairs go on working;
 *    `#` and next do not, since what is left is a proxy: not for arrays, which stay as they are.
 *  - The environment of a loaded chunk (orch_state_env): its globals can no longer be assigned; the
 *    tables they hold are left alone. */
void orch_state_freeze(lua_State *L, int idx); /* raises */
/* Pushes the environment of the function at fn_idx; returns 1. */
int orch_state_env(lua_State *L, int fn_idx);

/* ---- Inside core/script only
 * ------------------------------------------------------------------ */

/* Made by compile.lua; ends with an empty entry. */
struct orch_compiled {
    const char *sha256, *code; /* of the source; bytecode */
    size_t n;
};
extern const struct orch_compiled orch_compiled[];

struct orch_task;
struct orch_tasks;

/* What an entry, or a task over all its entries, has used. */
struct orch_meter {
    uint64_t steps;
    int64_t used_us;
};

struct orch_state {
    lua_State *L; /* the main thread */
    enum orch_context ctx;
    bool bounded;
    size_t memory, memory_max, collect_at; /* bytes */
    uint64_t steps_max;
    int64_t cpu_us_max;
    void *host;

    /* The entry in progress. */
    int depth;                /* entries on the C stack */
    struct orch_meter *meter; /* never NULL */
    uint64_t next_check;      /* meter->steps at which clock and limits are looked at again */
    int64_t look_us, cpu_us;  /* monotonic clock at the last look; CPU clock then, -1 not read */
    /* not 0: ended by this; every instruction raises until C is reached */
    enum orch_class over;
    int over_code;
    char over_msg[256];
    bool placed;            /* over_msg names a line */
    bool no_memory;         /* the allocator refused */
    bool armed;             /* the hook fires at the next instruction */
    int nest;               /* C functions that call back into Lua, on the C stack */
    struct orch_task *task; /* running now */
    lua_State *task_thread;
    struct orch_meter own;

    int guarded; /* inside orch_state_protect */
    orch_state_fn *protect_fn;
    void *protect_ud;
    int ref_traceback, ref_protect, ref_slot, ref_env;
    struct orch_tasks *tasks; /* task.c's; freed by tasks_free before the state */
    void (*tasks_free)(struct orch_tasks *ts);
};

struct orch_entry {
    struct orch_meter *meter;
    struct orch_task *task;
    lua_State *task_thread;
    int nest;
    bool own;
};

/* Around everything that runs Lua. m: a task's meter; NULL: a fresh budget, or the outer entry's
 * when there is one. false: the outer entry is over, nothing may run. */
bool orch_state_enter(struct orch_state *s, struct orch_entry *e, struct orch_meter *m);
/* true: a limit or a cancellation ended it, and err says which. */
bool orch_state_leave(struct orch_state *s, struct orch_entry *e, struct orch_err *err);
/* Ends the entry in progress as if a budget were used up (bounded states). */
void orch_state_stop(struct orch_state *s, enum orch_class cls, int code, const char *msg);
/* Error value at the top of the main thread to err; pops it. T: thread for the traceback or
 * NULL. */
int orch_state_describe(struct orch_state *s, int status, lua_State *T, struct orch_err *err);
bool orch_state_frozen(lua_State *L, int idx);
#define ORCH_BOOT_NAME "@boot.lua"
const char *orch_state_name(const struct orch_state *s); /* of its context, for messages */
/* A new state. open: opens the libraries of its context and runs boot.lua; raises. */
typedef void orch_state_open_fn(lua_State *L, const struct orch_state_opts *o,
                                struct orch_slice boot);
struct orch_state *orch_state_make(const struct orch_state_opts *o, orch_state_open_fn *open,
                                   struct orch_err *err);
/* Pushes the text tostring would give (calls __tostring); raises. */
const char *orch_state_text(lua_State *L, int idx, size_t *n);
/* A C function that may call back into Lua counts itself, since every level costs C stack:
 * ORCH_NEST(L); raises when too many are on the C stack. */
struct orch_state *orch_state_nest(lua_State *L); /* raises */
static inline void orch_state_unnest(struct orch_state **s)
{
    (*s)->nest--;
}
#define ORCH_NEST(L) \
    ORCH_CLEANUP(orch_state_unnest) \
    __attribute__((unused)) struct orch_state *orch_nested = orch_state_nest(L)

extern const char orch_wait_marker; /* its address is what a waiting C function yields */

#endif
