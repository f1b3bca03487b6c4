/* Inside the loading of a generation: shared by loading.c (sources, states), config.c and generation.c. */
#ifndef ORCH_LOADING_H
#define ORCH_LOADING_H

#include "host.h"

#include "base/hash.h"

/* The time is the limit; steps bound what the clock is too coarse for. */
enum { ORCH_STEPS_PER_MS = 1000000 };

struct loading {
    struct orch *o;
    struct orch_generation *g;
    enum orch_trust_mode mode;
    struct orch_trust trust; /* CHECK: what was recorded */
    bool needs_trust;
    bool unheld; /* a child may have written to what was to be loaded */
    char *base; /* the configuration's folder */
    char *trust_dir;
    struct orch_buf *errors;
    enum orch_class cls;
    struct orch_sha256_ctx hash;
    char sha[65]; /* of the source read last */
    unsigned files;
};

/* Notes an error; loading goes on, so that one run shows them all. */
void orch_load_fail(struct loading *l, enum orch_class cls, const char *fmt, ...) ORCH_PRINTF(3, 4);
/* An error of a file, which is named even where the error's text does not. */
void orch_load_fail_file(struct loading *l, const char *shown, const struct orch_err *err);
/* The path as messages show it: relative to the configuration's folder when beneath it. */
const char *orch_load_display(const struct loading *l, const char *path);
/* Reads dirfd/name once, hashes it, holds it against what is trusted. Product files need no trust. */
int orch_load_read(struct loading *l, int dirfd, const char *name, const char *path, bool product, struct orch_buf *out);
/* The configuration says trust = "always": it is held against what is trusted now, unless it was before. */
int orch_load_trust_config(struct loading *l);
/* Compiles and runs a source; its one result is left on the stack. n_args values on the stack are its
 * arguments (they are consumed). */
int orch_load_run(struct loading *l, struct orch_state *s, const char *shown, struct orch_slice text, int n_args);
/* The same for one of the product's files below lua/. */
int orch_load_run_product(struct loading *l, struct orch_state *s, const char *name, int n_args);
struct orch_state *orch_load_state(struct loading *l, enum orch_context ctx, size_t memory_bytes);
/* Pushes a table of what orch's own Lua files depend on: json, nearest, duration, size. */
void orch_load_push_deps(lua_State *L);
/* Pushes the schema module, loaded into this state; 0, or a negative errno with nothing pushed. */
int orch_load_push_schema(struct loading *l, struct orch_state *s);
void orch_load_set_function(lua_State *L, const char *name, lua_CFunction fn);
/* Gives each string of the list at the top (entries may be { path =, message = }) to `each`; pops it. */
void orch_load_take_lines(lua_State *L, const char *where, void (*each)(void *ud, const char *line), void *ud);
void orch_load_add_error(void *ud, const char *line); /* ud: struct loading */

int orch_load_config(struct loading *l); /* core/config.c */

#endif
