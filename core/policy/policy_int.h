/* Inside core/policy: the loading of a generation. */
#ifndef ORCH_POLICY_POLICY_INT_H
#define ORCH_POLICY_POLICY_INT_H

#include "current.h"

/* The time is the limit; steps bound what the clock is too coarse for. */
enum { ORCH_STEPS_PER_MS = 1000000 };

struct orch_loading {
    struct orch_current *cur;
    struct orch_generation *g;
    enum orch_trust_mode mode;
    struct orch_trust trust; /* CHECK: what was recorded */
    bool needs_trust;
    bool unheld; /* a program that orch started may have written to what was to be loaded */
    char *base;  /* the configuration's folder */
    char *trust_dir;
    struct orch_buf *errors;
    enum orch_class cls;
    struct orch_sha256_ctx hash;
    char sha[65]; /* of the source read last */
    unsigned files;
};

/* ---- source.c */

/* Notes an error; loading goes on, so that one run shows them all. */
void orch_load_fail(struct orch_loading *l, enum orch_class cls, const char *fmt, ...)
    ORCH_PRINTF(3, 4);
/* An error of a file, which is named even where the error's text does not. */
void orch_load_fail_file(struct orch_loading *l, const char *shown, const struct orch_err *err);
/* The path as messages show it: relative to the configuration's folder when beneath it. */
const char *orch_load_display(const struct orch_loading *l, const char *path);
/* Reads dirfd/name once, hashes it, holds it against what is trusted. Product files need no
 * trust. */
int orch_load_read(struct orch_loading *l, int dirfd, const char *name, const char *path,
                   bool product, struct orch_buf *out);
/* Compiles and runs a source; its one result is left on the stack. n_args values on the stack are
 * its arguments (they are consumed). */
int orch_load_run(struct orch_loading *l, struct orch_state *s, const char *shown,
                  struct orch_slice text, int n_args);
/* The same for one of the product's files below lua/. */
int orch_load_run_product(struct orch_loading *l, struct orch_state *s, const char *name,
                          int n_args);
struct orch_state *orch_load_state(struct orch_loading *l, enum orch_context ctx,
                                   size_t memory_bytes);
/* Pushes a table of what orch's own Lua files depend on: json, nearest, duration, size. */
void orch_load_push_deps(lua_State *L);
/* Pushes the schema module, loaded into this state; 0, or a negative errno with nothing pushed. */
int orch_load_push_schema(struct orch_loading *l, struct orch_state *s);
void orch_load_set_function(lua_State *L, const char *name, lua_CFunction fn);
/* Gives each string of the list at the top (entries may be { path =, message = }) to `each`; pops
 * it. */
void orch_load_take_lines(lua_State *L, const char *where, void (*each)(void *ud, const char *line),
                          void *ud);
void orch_load_add_error(void *ud, const char *line); /* ud: struct orch_loading */
/* A folder by the descriptor that it is held by, which is borrowed; -1 with a failure noted. */
int orch_load_open_dir(struct orch_loading *l, const char *path, const char *what, const char *fix);
/* The sorted names of its *.lua; -1 with a failure noted. */
int orch_load_list(struct orch_loading *l, int dirfd, const char *path, char ***names, size_t *n);
void orch_load_free_names(char **names, size_t n);
/* Runs each file of a folder in the tool state and hands it over with its result on the stack. */
typedef int orch_load_each_fn(struct orch_loading *l, void *ud, const char *path, const char *shown,
                              bool product);
int orch_load_dir(struct orch_loading *l, const char *dir, const char *what, bool product,
                  orch_load_each_fn *each, void *ud);

/* ---- trust.c */

int orch_load_find_trust(struct orch_loading *l, struct orch_err *err);
/* Whether the source with l->sha may be loaded; err does not name it. */
int orch_load_check_trust(struct orch_loading *l, int fd, unsigned links, const char *path,
                          bool product, struct orch_err *err);
/* The configuration says trust = "always": it is held against what is trusted now, unless it
 * was. */
int orch_load_trust_config(struct orch_loading *l, struct orch_err *err);
/* What is in force is what was seen last: from now on it is loaded only so, also by the next
 * orch. */
void orch_load_hold_to_trust(const struct orch_loading *l);
/* A descriptor of a folder of the configuration, held from its first use on, so that nobody puts
 * another in its place; borrowed, or a negative errno. */
int orch_hold_dir(struct orch_current *cur, const char *path);
void orch_held_free(struct orch_held **held);

/* ---- the parts of a generation, each loaded into l->g; negative with failures noted */

int orch_load_config(struct orch_loading *l);          /* config.c */
int orch_load_policies(struct orch_loading *l);        /* engine.c */
int orch_load_finish_policies(struct orch_loading *l); /* engine.c: when the tools are known */
int orch_load_networks(struct orch_loading *l);        /* network.c */
int orch_luaopen_network_deps(lua_State *L,
                              struct orch_generation *g); /* network.c: into the table at the top */
void orch_networks_free(struct orch_generation *g);
int orch_load_tools(struct orch_loading *l); /* tools.c */
int orch_load_offer(struct orch_loading *l); /* offer.c */

#endif
