/* Which generation is in force, and how another comes to be: at the first need, when a file
 * changes, when asked. What fails changes nothing. */
#ifndef ORCH_POLICY_CURRENT_H
#define ORCH_POLICY_CURRENT_H

#include "../base/loop.h"
#include "policy.h"

struct orch_dirwatch;
struct orch_held;
struct orch_loading;
struct orch_rate;

/* What loading needs of those above; ud is given to each. */
struct orch_current_ops {
    const struct orch_tool_backend *lua_tools; /* how tools that are written in Lua run */
    void (*open)(lua_State *L);                /* opens the API in a new state */
    /* And what of it is Lua's, in the tool state: by orch_load_product_later. */
    int (*open_tools)(struct orch_loading *l, struct orch_state *s);
    /* Pushes what predicates see of a session { id =, marks = }, and what its client says of
     * itself. */
    void (*session)(void *ud, lua_State *L, const char *id);
    /* Whether programs run that orch started and an agent may steer; whether none of them could
     * have written to the open file. */
    bool (*steered)(void *ud);
    bool (*held)(void *ud, int fd);
    /* Another generation is in force. */
    void (*swapped)(void *ud, const struct orch_generation *before);
};

struct orch_current {
    struct orch_loop *loop;
    const struct orch_paths *paths;
    struct orch_hostaddr *hostaddr;
    struct orch_audit *audit; /* where reloads are noted; NULL: nowhere yet */
    const struct orch_current_ops *ops;
    void *ud, *states_host; /* states_host: orch_state_host of a generation's states */
    struct orch_tool_source *sources;

    struct orch_generation *gen; /* NULL before the first load */
    const char *problem;         /* why no tool can be called now (a source's); NULL: they can */
    struct orch_buf error;       /* of the last reload when it failed */
    uint64_t reloads;
    struct orch_rate *rates;
    struct orch_held *held; /* folders by descriptor, trust.c */
    struct orch_dirwatch *watch;
    struct orch_buf watched; /* the folders it watches, each ended by NUL */
};

void orch_current_fini(struct orch_current *cur);

/* Loads the first one, unless there is one. */
int orch_current_need(struct orch_current *cur, struct orch_err *err);
/* Loads anew and swaps; on failure the old generation stays. 0 or the errors' class as a negative
 * number. */
int orch_current_reload(struct orch_current *cur, const char *why);
/* From now on changes of the files of the generation in force are reloads. */
void orch_current_watch(struct orch_current *cur);
void orch_current_unwatch(struct orch_current *cur);

void orch_current_add_source(struct orch_current *cur, struct orch_tool_source *s);
void orch_current_remove_source(struct orch_current *cur, struct orch_tool_source *s);

/* Reads one of the product's files below lua/ and pushes a C function that runs it, with its
 * arguments, when it is needed first. Negative with the failure noted. */
int orch_load_product_later(struct orch_loading *l, struct orch_state *s, const char *name);

/* Folders beside the configuration that are read when they are there; ended by NULL. */
extern const char *const orch_beside[];

/* Whether calls to this rule and caller are still within limit per window. */
bool orch_rate_take(struct orch_rate **rates, const char *key, double limit, int64_t window_ms);
void orch_rates_free(struct orch_rate **rates);

#endif
